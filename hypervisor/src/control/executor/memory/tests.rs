//! Memory's steps, with nodes that are the test's own hand.

use control_plane::cluster::{Change, JobId, JobState, Wish};
use control_plane::optimise::Share;
use vmm_shared::control::{BlockId, BlockOrder, BlockPlace, BlockRecord, BlockState, Outcome};
use vmm_shared::control::{Ticket, blocks};
use vmm_shared::pieces::{Ended, Pull, PullId};

use super::super::testing::{VM, World};
use super::moves::{PULL_IDS, pull_id};
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

    /// A job that gives the VM so many slices.
    fn resize(&mut self, slices: u32) -> JobId {
        let to = Share::new(2, slices);
        self.begin(Wish::Resize { vm: VM, to })
    }

    /// The same; what comes, on one node.
    fn grow(&mut self, slices: u32, on: u16) -> JobId {
        self.cordon(1 - on, true);
        let job = self.resize(slices);
        self.cordon(1 - on, false);
        job
    }

    fn cordon(&mut self, node: u16, on: bool) {
        let node = NodeId(node);
        self.append(Change::Cordon { node, on });
    }

    fn block(&self, block: u16) -> (BlockPlace, BlockRecord) {
        let mut all = blocks(self.shares());
        let place = all.nth(block.into()).expect("one of those");
        (place, self.control.block(BlockId(block)).expect("one"))
    }

    fn order(&self, block: u16) -> Option<BlockOrder> {
        self.block(block).1.order()
    }

    fn refuse(&self, block: u16, status: u32) {
        let (_, record) = self.block(block);
        let order = record.order().expect("it is asked");
        record.settle(order, Outcome::Refused(status));
    }

    /// A block that the guest is told of.
    fn offer(&self, block: u16) {
        let (place, record) = self.block(block);
        let order = record.order().expect("it is asked");
        let BlockOrder::Grant(node) = order else {
            panic!("{order:?}");
        };
        for piece in place.pieces {
            let host = self.map().take_host(node, piece).expect("room");
            assert!(self.map().add(piece, host));
        }
        record.set_state(BlockState::Offered);
    }

    /// What becomes of a block that the guest takes.
    fn take(&self, block: u16) {
        self.offer(block);
        let (_, record) = self.block(block);
        record.set_state(BlockState::Used);
        record.settle(record.order().expect("it is asked"), Outcome::Done);
    }

    /// No node has a block any more, and that is what has become of its order.
    fn drop(&self, block: u16, outcome: Outcome) {
        let (place, record) = self.block(block);
        for piece in place.pieces {
            let claim = self.map().claim(piece, NodeId(0)).expect("sound");
            assert!(self.map().remove(&claim.expect("free")));
        }
        record.set_state(BlockState::Absent);
        if let Some(order) = record.order() {
            record.settle(order, outcome);
        }
    }

    /// What becomes of a block that the guest gives up.
    fn give_up(&self, block: u16) {
        assert_eq!(self.order(block), Some(BlockOrder::Reclaim));
        self.drop(block, Outcome::Done);
    }

    /// The guest has not seen what was ordered for a block.
    fn take_back(&self, block: u16) {
        let (_, record) = self.block(block);
        assert!(record.orders().is_recalled());
        match record.order().expect("it stands") {
            BlockOrder::Grant(_) if record.is_present() => self.drop(block, Outcome::Recalled),
            order => record.settle(order, Outcome::Recalled),
        }
    }

    /// The guest has seen it.
    fn has_seen(&self, block: u16) {
        let (_, record) = self.block(block);
        assert!(record.orders().is_recalled());
        record.orders().refuse_recall();
    }

    /// A VM to which blocks 2 and 3 have come, both of node 1.
    fn grown() -> Self {
        let mut world = World::with_blocks(2);
        let job = world.grow(4 + 128, 1);
        assert_eq!(world.drive(job), None);
        world.take(2);
        world.take(3);
        world.finish(job);
        world
    }

    /// The step at hand is done, and then the job is.
    fn finish(&mut self, job: JobId) {
        assert_eq!(self.drive(job), Some(StepResult::Done));
        while self.cluster.jobs()[&job].current().is_some() {
            self.report(job, StepResult::Done);
        }
    }

    fn granted(&self) -> [u32; 2] {
        let vm = &self.cluster.vms()[&VM];
        [0, 1].map(|node| vm.granted_at(NodeId(node)).slices)
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

#[test]
fn blocks_have_come_when_the_guest_uses_them() {
    let mut world = World::with_blocks(2);
    let job = world.grow(4 + 128, 1);
    assert_eq!(world.drive(job), None);
    // Those that the guest takes to be near that node.
    let grant = Some(BlockOrder::Grant(NodeId(1)));
    let orders = [0, 1, 2, 3].map(|block| world.order(block));
    assert_eq!(orders, [None, None, grant, grant]);
    assert_eq!(world.rings.get(), 1);
    world.take(2);
    assert_eq!(world.drive(job), None, "one is missing");
    assert_eq!(world.order(3), grant, "the order that there was");
    world.take(3);
    world.finish(job);
    assert_eq!(world.granted(), [2, 130]);
    assert_eq!(world.pieces(), [2, 130]);
}

#[test]
fn a_node_may_give_what_the_guest_takes_to_be_near_another() {
    let mut world = World::grown();
    let job = world.begin(Wish::MoveSlices {
        vm: VM,
        from: NodeId(1),
        to: NodeId(0),
        count: 130,
    });
    assert_eq!(world.drive(job), None);
    (0..130).for_each(|_| world.take_one(0));
    world.end_pull(0, Ended::Done);
    world.finish(job);
    let job = world.grow(4 + 192, 1);
    assert_eq!(world.drive(job), None);
    assert_eq!(world.order(0), Some(BlockOrder::Grant(NodeId(1))));
    world.take(0);
    world.finish(job);
    assert_eq!(world.pieces(), [132, 64]);
}

#[test]
fn what_the_guest_does_not_take_is_told_with_its_reason() {
    let mut world = World::with_blocks(2);
    let job = world.grow(4 + 128, 1);
    assert_eq!(world.drive(job), None);
    world.take(2);
    world.refuse(3, 1);
    let reason = Reason::Declined(1).code();
    let short = StepResult::Short { slices: 64, reason };
    assert_eq!(world.drive(job), Some(short));

    let mut world = World::with_blocks(2);
    let job = world.grow(4 + 64, 1);
    assert_eq!(world.drive(job), None);
    world.refuse(2, 1);
    assert_eq!(world.drive(job), Some(StepResult::Failed { reason }));
    assert_eq!(world.order(3), None, "it is not asked again");
}

#[test]
fn another_block_goes_for_one_that_the_guest_keeps() {
    let mut world = World::grown();
    let job = world.resize(4 + 64);
    assert_eq!(world.drive(job), None);
    let orders = [2, 3].map(|block| world.order(block));
    assert_eq!(orders, [None, Some(BlockOrder::Reclaim)], "the last first");
    world.refuse(3, 0x82);
    assert_eq!(world.drive(job), None);
    world.give_up(2);
    world.finish(job);
    assert_eq!(world.granted(), [2, 66]);
    // And if none goes, that is what the job says; the next one asks again.
    let job = world.resize(4);
    assert_eq!(world.drive(job), None);
    world.refuse(3, 0x82);
    let kept = StepResult::Short {
        slices: 0,
        reason: Reason::Kept(0x82).code(),
    };
    assert_eq!(world.drive(job), Some(kept));
    world.report(job, kept);
    world.report(job, StepResult::Done);
    let job = world.resize(4);
    assert_eq!(world.drive(job), None);
    world.give_up(3);
    world.finish(job);
    assert_eq!(world.pieces(), [2, 2]);
}

/// The guest keeps the block that is all on the node that is to give less.
#[test]
fn what_another_node_had_of_a_block_it_takes_over() {
    let mut world = spread();
    let job = world.resize(4 + 64);
    assert_eq!(world.drive(job), None);
    assert_eq!(world.order(2), Some(BlockOrder::Reclaim), "all on node 1");
    world.refuse(2, 0x82);
    assert_eq!(world.drive(job), None);
    world.give_up(3);
    assert_eq!(world.pieces(), [2, 66]);
    assert_eq!(world.drive(job), None);
    let pull = world.standing(0).expect("it is asked");
    assert_eq!((pull.from, pull.count), (NodeId(1), 10));
    (0..10).for_each(|_| world.take_one(0));
    world.end_pull(0, Ended::Done);
    world.finish(job);
    assert_eq!((world.granted(), world.pieces()), ([12, 56], [12, 56]));
}

/// Ten pieces of block 3 are on node 0.
fn spread() -> World {
    let mut world = World::grown();
    let job = world.begin(Wish::MoveSlices {
        vm: VM,
        from: NodeId(1),
        to: NodeId(0),
        count: 10,
    });
    let map = world.map();
    for piece in world.block(3).0.pieces.take(10) {
        let to = map.take_host(NodeId(0), piece).expect("room");
        let claim = map.claim(piece, NodeId(0)).expect("sound").expect("free");
        assert!(map.publish(&claim, to));
    }
    world.finish(job);
    assert_eq!(world.granted(), [12, 120]);
    world
}

#[test]
fn what_a_guest_gives_up_by_itself_is_missed_node_by_node() {
    let mut world = spread();
    assert_eq!(world.found(), None);
    let (place, record) = world.block(3);
    record.set_state(BlockState::Leaving);
    for piece in place.pieces {
        assert_eq!(world.found(), None, "it is on its way");
        let claim = world.map().claim(piece, NodeId(0)).expect("sound");
        assert!(world.map().remove(&claim.expect("free")));
    }
    record.set_state(BlockState::Absent);
    for _ in 0..2 {
        let lost = world.found().expect("it is gone");
        world.append(lost);
    }
    assert_eq!(world.found(), None);
    assert_eq!((world.granted(), world.pieces()), ([2, 66], [2, 66]));
}

#[test]
fn what_is_being_undone_is_wanted_back() {
    let mut world = World::with_blocks(2);
    let job = world.grow(4 + 128, 1);
    assert_eq!(world.drive(job), None);
    world.offer(3);
    world.append(Change::Cancel { job });
    assert_eq!(world.drive(job), None);
    world.take_back(2);
    assert_eq!(world.drive(job), None, "of the other, too");
    world.take_back(3);
    world.finish(job);
    assert_eq!((world.granted(), world.pieces()), ([2, 2], [2, 2]));

    let mut world = World::grown();
    let job = world.resize(4 + 64);
    assert_eq!(world.drive(job), None);
    world.append(Change::Cancel { job });
    assert_eq!(world.drive(job), None);
    world.take_back(3);
    world.finish(job);
    assert_eq!(world.granted(), [2, 130]);
}

/// What ends a job whose guest is at it and never answers.
#[test]
fn an_abandoned_job_leaves_the_vm_what_the_guest_may_have() {
    // What was to come may come.
    let mut world = World::with_blocks(2);
    let job = world.grow(4 + 128, 1);
    assert_eq!(world.drive(job), None);
    world.take(2);
    world.offer(3);
    world.append(Change::Abandon { job });
    for _ in 0..3 {
        assert_eq!(world.drive(job), None, "nobody has decided");
    }
    world.has_seen(3);
    let reason = Reason::Unanswered.code();
    let ended = world.drive(job).expect("it is not waited for");
    assert_eq!(ended, StepResult::Failed { reason });
    assert_eq!(world.order(2), None, "nothing more is asked");
    world.report(job, ended);
    let state = world.cluster.jobs()[&job].state();
    assert_eq!(state, JobState::Stuck { reason });
    assert_eq!((world.granted(), world.pieces()), ([2, 130], [2, 130]));
    assert_eq!(world.found(), None);
    // The guest refuses after all.
    world.drop(3, Outcome::Refused(1));
    let lost = world.found().expect("it is gone");
    world.append(lost);
    assert_eq!((world.granted(), world.pieces()), ([2, 66], [2, 66]));

    // What was to go is there, and so it is given back.
    let mut world = World::grown();
    let job = world.resize(4);
    assert_eq!(world.drive(job), None);
    world.append(Change::Abandon { job });
    assert_eq!(world.drive(job), None, "it may be taken back");
    world.take_back(2);
    world.has_seen(3);
    world.finish(job);
    let state = world.cluster.jobs()[&job].state();
    assert!(matches!(state, JobState::RolledBack { .. }), "{state:?}");
    assert_eq!(world.granted(), [2, 130]);
}

/// A job that has taken block 3 away, and gives it back: the guest is told.
fn giving_back() -> (World, JobId) {
    let mut world = World::grown();
    let job = world.resize(4);
    assert_eq!(world.drive(job), None);
    world.give_up(3);
    world.append(Change::Cancel { job });
    assert_eq!(world.drive(job), None);
    world.take_back(2);
    assert_eq!(world.drive(job), None);
    assert_eq!(world.order(2), None);
    world.offer(3);
    (world, job)
}

#[test]
fn what_is_given_back_and_seen_is_the_vms_when_the_job_is_abandoned() {
    let (mut world, job) = giving_back();
    world.append(Change::Abandon { job });
    assert_eq!(world.drive(job), None);
    world.has_seen(3);
    world.finish(job);
    assert_eq!((world.granted(), world.pieces()), ([2, 130], [2, 130]));
    assert_eq!(world.found(), None);
}

#[test]
fn what_is_given_back_and_not_seen_is_taken_back_when_the_job_is_abandoned() {
    let (mut world, job) = giving_back();
    world.append(Change::Abandon { job });
    assert_eq!(world.drive(job), None);
    world.take_back(3);
    let reason = Reason::Unanswered.code();
    let ended = StepResult::Short { slices: 64, reason };
    assert_eq!(world.drive(job), Some(ended));
    world.report(job, ended);
    assert_eq!((world.granted(), world.pieces()), ([2, 66], [2, 66]));
    assert_eq!(world.found(), None);
}

#[test]
fn an_abandoned_job_leaves_each_node_with_what_the_tables_say() {
    let mut world = spread();
    let job = world.resize(4 + 64);
    assert_eq!(world.drive(job), None);
    world.refuse(2, 0x82);
    assert_eq!(world.drive(job), None);
    world.give_up(3);
    world.append(Change::Abandon { job });
    assert_eq!(world.drive(job), None);
    (0..10).for_each(|_| world.take_one(0));
    world.end_pull(0, Ended::Done);
    let reason = Reason::Unanswered.code();
    let ended = StepResult::Failed { reason };
    assert_eq!(world.drive(job), Some(ended));
    world.report(job, ended);
    assert_eq!((world.granted(), world.pieces()), ([12, 56], [12, 56]));
}

/// A guest that never answers for block 3.
fn silent() -> World {
    let mut world = World::grown();
    let job = world.resize(4 + 64);
    assert_eq!(world.drive(job), None);
    world.append(Change::Abandon { job });
    assert_eq!(world.drive(job), None);
    world.has_seen(3);
    world.finish(job);
    assert_eq!(world.order(3), Some(BlockOrder::Reclaim));
    world
}

#[test]
fn a_block_that_the_guest_does_not_answer_for_keeps_no_other_job() {
    let mut world = silent();
    let job = world.resize(4 + 64);
    assert_eq!(world.drive(job), None);
    world.give_up(2);
    world.finish(job);
    assert_eq!((world.granted(), world.pieces()), ([2, 66], [2, 66]));
    let job = world.grow(4 + 128, 1);
    assert_eq!(world.drive(job), None);
    world.take(2);
    world.finish(job);
    assert_eq!((world.granted(), world.pieces()), ([2, 130], [2, 130]));
    // All are to go: that one is waited for, and it need not be undone.
    let job = world.resize(4);
    assert_eq!(world.drive(job), None);
    world.give_up(2);
    assert_eq!(world.drive(job), None);
    world.append(Change::Cancel { job });
    assert_eq!(world.drive(job), None);
    world.take(2);
    world.finish(job);
    // The guest answers, and gives up what it was not asked for.
    let (_, other) = world.block(2);
    other.set_state(BlockState::Leaving);
    world.drop(2, Outcome::Done);
    let lost = world.found().expect("it is gone");
    world.append(lost);
    assert_eq!(world.granted(), [2, 66]);
    world.give_up(3);
    let lost = world.found().expect("it is gone");
    world.append(lost);
    assert_eq!((world.granted(), world.pieces()), ([2, 2], [2, 2]));
}

/// A job has ended, and what it has asked for comes: as when a node is lost.
#[test]
fn what_comes_for_no_job_is_the_vms() {
    let mut world = World::with_blocks(2);
    let job = world.grow(4 + 64, 1);
    assert_eq!(world.drive(job), None);
    let reason = Reason::NodeLost.code();
    world.report(job, StepResult::Failed { reason });
    world.report(job, StepResult::Done);
    assert_eq!(world.granted(), [2, 2]);
    assert_eq!(world.found(), None, "it is not there yet");
    world.offer(2);
    let got = world.found().expect("the guest may use it");
    world.append(got);
    assert_eq!((world.granted(), world.pieces()), ([2, 66], [2, 66]));
    assert_eq!(world.found(), None);
    world.cluster.check().expect("sound tables");
}

#[test]
fn a_cancelled_resize_takes_back_what_has_come() {
    let mut world = World::with_blocks(2);
    let job = world.grow(4 + 128, 1);
    assert_eq!(world.drive(job), None);
    world.append(Change::Cancel { job });
    world.take(2);
    assert_eq!(
        world.drive(job),
        None,
        "the guest has to answer for the other"
    );
    world.refuse(3, 1);
    assert_eq!(world.drive(job), None);
    world.give_up(2);
    world.finish(job);
    assert_eq!((world.granted(), world.pieces()), ([2, 2], [2, 2]));
}

#[test]
fn who_takes_over_rings_for_orders_that_stand() {
    let mut world = World::with_blocks(1);
    let job = world.grow(4 + 64, 1);
    let ticket = world.cluster.jobs()[&job].block_ticket(1, false);
    let order = BlockOrder::Grant(NodeId(1));
    let (_, record) = world.block(1);
    record.ask(order, ticket).expect("free");
    assert_eq!((world.drive(job), world.rings.get()), (None, 1));
    world.take(1);
    world.finish(job);
    // An order of others is waited for, too.
    let job = world.resize(4);
    record
        .ask(BlockOrder::Reclaim, Ticket::NO_JOB)
        .expect("free");
    assert_eq!(world.drive(job), None);
    world.give_up(1);
    world.finish(job);
}
