//! Memory's steps, with nodes that are the test's own hand.

use control_plane::cluster::{Change, JobId, JobState, Wish};
use control_plane::optimise::Share;

use super::super::testing::{VM, World};
use super::*;

impl World {
    /// A job that moves so many slices from node 0 to node 1.
    fn move_slices(&mut self, count: u32) -> JobId {
        self.begin(Wish::MoveSlices {
            vm: VM,
            from: NodeId(0),
            to: NodeId(1),
            count,
        })
    }

    /// The pull that a node has.
    fn standing(&self, node: u16) -> Option<Pull> {
        self.map().pull(NodeId(node)).expect("a node").standing()
    }

    /// What a node does that has a pull, for one piece.
    fn take_one(&self, node: u16) {
        let (map, node) = (self.map(), NodeId(node));
        let pull = self.standing(node.0).expect("it is asked");
        let piece = map.pieces_on(pull.from).next().expect("one is there");
        let to = map.take_host(node, piece).expect("room");
        let claim = map.claim(piece, node).expect("sound").expect("free");
        assert!(map.publish(&claim, to));
        map.pull(node).expect("a node").took_one(pull, 1, 1);
    }

    fn end_pull(&self, node: u16, how: Ended) {
        let pull = self.standing(node).expect("it is asked");
        let map = self.map();
        map.pull(NodeId(node)).expect("a node").end(pull, how);
    }

    fn pieces(&self) -> [usize; 2] {
        [0, 1].map(|node| self.map().pieces_on(NodeId(node)).count())
    }
}

#[test]
fn slices_have_moved_when_the_giver_has_no_more_than_it_shall_keep() {
    let mut world = World::new();
    let job = world.move_slices(2);
    assert_eq!(world.drive(job), None);
    let pull = world.standing(1).expect("it is asked");
    assert_eq!((pull.from, pull.count), (NodeId(0), 2));
    assert_eq!(world.rings.get(), 1);
    world.take_one(1);
    assert_eq!(world.drive(job), None, "one is left");
    assert_eq!(world.standing(1), Some(pull), "the one there was");
    world.take_one(1);
    world.end_pull(1, Ended::Done);
    assert_eq!(world.drive(job), Some(StepResult::Done));
    world.report(job, StepResult::Done);
    assert_eq!(world.pieces(), [0, 4]);
    let granted = |node| world.cluster.vms()[&VM].granted_at(NodeId(node));
    assert_eq!([0, 1].map(granted), [Share::new(1, 0), Share::new(1, 4)]);
}

#[test]
fn what_is_so_already_is_done_without_asking() {
    let mut world = World::new();
    let job = world.move_slices(1);
    // Who was in charge before has died between the pull's end and the entry.
    let pull = Pull {
        id: pull_id(&world.cluster.jobs()[&job], false),
        from: NodeId(0),
        count: 1,
    };
    let map = world.map();
    map.pull(NodeId(1))
        .expect("a node")
        .ask(pull)
        .expect("free");
    world.take_one(1);
    assert_eq!(world.drive(job), None, "it stands");
    world.end_pull(1, Ended::Done);
    assert_eq!(world.drive(job), Some(StepResult::Done));
    assert_eq!(world.rings.get(), 1, "for who may not have been rung");
}

#[test]
fn more_is_asked_for_as_long_as_there_is_more() {
    let mut world = World::new();
    let job = world.move_slices(2);
    assert_eq!(world.drive(job), None);
    world.take_one(1);
    // Another was at the second piece just then.
    world.end_pull(1, Ended::Done);
    assert_eq!(world.drive(job), None);
    let map = world.map();
    let record = map.pull(NodeId(1)).expect("a node");
    let pull = world.standing(1).expect("it is asked again");
    assert_eq!((pull.count, record.taken(pull)), (2, 1), "one more");
}

#[test]
fn a_node_that_can_take_no_more_says_how_much_it_has_taken() {
    for (how, reason) in [
        (Ended::NoRoom, Reason::NoRoom),
        (Ended::Damaged, Reason::Damaged),
    ] {
        let mut world = World::new();
        let job = world.move_slices(2);
        assert_eq!(world.drive(job), None);
        world.end_pull(1, how);
        let reason = reason.code();
        assert_eq!(world.drive(job), Some(StepResult::Failed { reason }));

        let mut world = World::new();
        let job = world.move_slices(2);
        assert_eq!(world.drive(job), None);
        world.take_one(1);
        world.end_pull(1, how);
        let partly = StepResult::Short { slices: 1, reason };
        assert_eq!(world.drive(job), Some(partly));
    }
}

#[test]
fn a_cancelled_move_is_cut_short_and_goes_back() {
    let mut world = World::new();
    let job = world.move_slices(2);
    assert_eq!(world.drive(job), None);
    world.take_one(1);
    world.append(Change::Cancel { job });
    assert_eq!(world.drive(job), None);
    assert_eq!(world.standing(1).map(|pull| pull.count), Some(0));
    world.end_pull(1, Ended::Done);
    assert_eq!(world.drive(job), None);
    let pull = world.standing(0).expect("it is asked");
    assert_eq!((pull.from, pull.count), (NodeId(1), 1));
    world.take_one(0);
    world.end_pull(0, Ended::Done);
    assert_eq!(world.drive(job), Some(StepResult::Done));
    world.report(job, StepResult::Done);
    // Only bookkeeping is left.
    while world.cluster.jobs()[&job].current().is_some() {
        world.report(job, StepResult::Done);
    }
    let state = world.cluster.jobs()[&job].state();
    assert!(matches!(state, JobState::RolledBack { .. }), "{state:?}");
    assert_eq!(world.pieces(), [2, 2]);
}

#[test]
fn a_pull_of_others_is_waited_for_and_left_alone() {
    let mut world = World::new();
    let job = world.move_slices(1);
    let pull = Pull {
        id: PullId(PULL_IDS),
        from: NodeId(0),
        count: 1,
    };
    let map = world.map();
    map.pull(NodeId(1))
        .expect("a node")
        .ask(pull)
        .expect("free");
    assert_eq!(world.drive(job), None);
    world.append(Change::Cancel { job });
    assert_eq!(world.drive(job), None);
    assert_eq!(world.standing(1), Some(pull));
}

#[test]
fn who_was_put_out_asks_for_nothing() {
    let mut world = World::new();
    let job = world.move_slices(1);
    world.is_in = false;
    assert_eq!(world.drive(job), None);
    assert_eq!((world.standing(1), world.rings.get()), (None, 0));
}
