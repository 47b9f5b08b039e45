//! One story per test, told with the model of a rack.

use super::world::World;
use crate::addr::NodeId;
use crate::coherence::*;
use Access::{Execute, Read, Write};

fn state(world: &World, frame: usize) -> State {
    world.map.view(frame).expect("in range").state
}

fn unit(world: &World, frame: usize) -> Unit {
    world.map.view(frame).expect("in range").unit
}

#[test]
fn a_boot_on_one_node_asks_nobody_and_splits_nothing() {
    let mut world = World::new(3, 1);
    for round in 0..3 {
        for access in [Write, Execute, Read] {
            for frame in [0, 1, 511, 512] {
                let grants = world.accomplish(0, frame, access).expect("works");
                let first = round == 0 && access == Write && frame % 512 == 0;
                assert_eq!(grants, u32::from(first), "frame {frame}");
            }
        }
    }
    assert_eq!(world.counters.changes(Change::FirstTouch), 2);
    assert_eq!(world.counters.transitions(), 0);
    assert_eq!(unit(&world, 1), Unit::Piece(0));
}

#[test]
fn the_second_node_converts_the_piece_as_a_whole() {
    for (access, becomes) in [
        (Read, State::Data),
        (Write, State::Data),
        (Execute, State::Code),
    ] {
        let mut world = World::new(2, 1);
        world.accomplish(0, 0, Write).expect("works");
        assert_eq!(world.accomplish(1, 511, access), Ok(1));
        assert_eq!(state(&world, 0), becomes);
        assert_eq!(unit(&world, 0), Unit::Piece(0));
        // The first node keeps what agrees with it.
        assert_eq!(world.accomplish(0, 1, access), Ok(0));
        assert_eq!(world.accomplish(0, 0, Read), Ok(0));
    }
}

#[test]
fn only_the_frame_in_question_leaves_its_piece() {
    let mut world = World::new(2, 1);
    world.accomplish(0, 0, Write).expect("works");
    world.accomplish(1, 1, Write).expect("works");
    // An execute fault in a Data piece.
    assert_eq!(world.accomplish(1, 0, Execute), Ok(1));
    assert_eq!(unit(&world, 0), Unit::Frame(0));
    assert_eq!(state(&world, 0), State::Code);
    assert_eq!(state(&world, 1), State::Data);
    for node in 0..2 {
        assert_eq!(world.accomplish(node, 1, Write), Ok(0), "not disturbed");
    }
    assert_eq!(world.accomplish(0, 0, Read), Ok(0), "reading was kept");
    // And a write fault in a Code piece.
    world.accomplish(0, 512, Write).expect("works");
    world.accomplish(1, 512, Execute).expect("works");
    assert_eq!(world.accomplish(1, 1023, Write), Ok(1));
    assert_eq!(state(&world, 1023), State::Data);
    assert_eq!(state(&world, 512), State::Code);
}

#[test]
fn who_never_executed_or_wrote_alone_need_not_refresh() {
    let refreshes = |world: &World| {
        world
            .counters
            .values()
            .find(|(name, _)| *name == "refreshes")
            .expect("counted")
            .1
    };
    let mut world = World::new(2, 1);
    world.accomplish(0, 0, Write).expect("works");
    world.accomplish(1, 0, Execute).expect("works");
    assert_eq!(refreshes(&world), 0, "node 1 had no translations");
    world.accomplish(0, 0, Write).expect("works");
    world.accomplish(0, 0, Execute).expect("works");
    assert_eq!(refreshes(&world), 0, "node 0's own stores");
    world.accomplish(1, 0, Execute).expect("works");
    assert_eq!(
        refreshes(&world),
        1,
        "node 0 wrote what node 1 had translated"
    );
    world.accomplish(1, 0, Execute).expect("works");
    assert_eq!(refreshes(&world), 1);
}

#[test]
fn a_split_remembers_who_is_stale() {
    let mut world = World::new(2, 1);
    for access in [Write, Execute] {
        world.accomplish(0, 0, access).expect("works");
    }
    // The piece becomes Data as a whole, and node 1 changes the code.
    world.accomplish(1, 0, Write).expect("works");
    world.accomplish(0, 0, Execute).expect("not the old code");
}

#[test]
fn a_refresh_that_was_not_done_is_due_the_next_time() {
    let mut world = World::new(2, 1);
    for access in [Write, Execute] {
        world.accomplish(0, 0, access).expect("works");
    }
    world.accomplish(1, 0, Write).expect("works");
    for _ in 0..2 {
        let mut fault = world.map.fault(world.member(0), 0, Execute).expect("ok");
        let grant = loop {
            match fault.poll().expect("works") {
                Step::Granted(grant) => break grant,
                _ => while world.serve(1, 0, false).expect("works") {},
            }
        };
        assert!(grant.must_refresh);
        fault.abandon().expect("granted");
    }
}

#[test]
fn code_written_and_executed_by_turns_roams_and_settles() {
    let mut world = World::new(2, 1);
    world.accomplish(0, 0, Write).expect("works");
    world.accomplish(1, 1, Read).expect("works");
    for _ in 0..6 {
        world.accomplish(0, 0, Write).expect("works");
        world.accomplish(1, 0, Execute).expect("works");
    }
    assert_eq!(state(&world, 0), State::Roaming);
    // While it roams, writing and executing on one node costs one fault.
    world.accomplish(0, 0, Write).expect("works");
    world.accomplish(0, 0, Execute).expect("works");
    assert_eq!(world.accomplish(0, 0, Write), Ok(0));
    assert_eq!(world.accomplish(0, 0, Execute), Ok(0));
    for _ in 0..10 {
        world.accomplish(0, 0, Write).expect("works");
        world.accomplish(1, 0, Write).expect("works");
    }
    assert_eq!(state(&world, 0), State::Data);
}

#[test]
fn an_instruction_that_writes_its_own_frame_gets_on() {
    let mut world = World::new(2, 1);
    world.accomplish(0, 0, Write).expect("works");
    for frame in [0, 1] {
        world.accomplish(1, frame, Read).expect("works");
    }
    // It needs Write and Execute at the same time, on a frame others read.
    let mut faults = 0;
    while !(world.access(0, 0, 0, Execute).expect("coherent")
        && world.access(0, 0, 0, Write).expect("coherent"))
    {
        faults += 1;
        assert!(faults < 10, "no progress");
        world.drain().expect("works");
        if world.access(0, 0, 0, Execute).expect("coherent") {
            continue;
        }
        world.drain().expect("works");
    }
}

#[test]
fn two_nodes_that_want_each_others_frames_both_get_them() {
    let mut world = World::new(2, 1);
    world.accomplish(0, 0, Write).expect("works");
    world.accomplish(1, 512, Write).expect("works");
    // Both lock, both ask; each must answer while it waits.
    assert!(!world.access(0, 0, 512, Write).expect("coherent"));
    assert!(!world.access(1, 0, 0, Write).expect("coherent"));
    for node in 0..2 {
        let step = world.advance(node, 0).expect("works");
        let other = NodeSet::only(NodeId(1 - node as u16));
        assert_eq!(step, Some(Step::Revoking(other)));
    }
    world.drain().expect("no deadlock");
    assert!(world.access(0, 0, 512, Write).expect("coherent"));
    assert!(world.access(1, 0, 0, Write).expect("coherent"));
}

#[test]
fn a_waiter_gets_the_lock_next() {
    let world = World::new(3, 1);
    let [mut first, mut second, mut third] =
        [0, 1, 2].map(|node| world.map.fault(world.member(node), 0, Read).expect("ok"));
    assert!(matches!(first.poll(), Ok(Step::Granted(_))));
    assert_eq!(second.poll(), Ok(Step::Busy));
    first.complete().expect("granted");
    for _ in 0..10 {
        assert_eq!(third.poll(), Ok(Step::Busy), "the second node is next");
    }
    assert!(matches!(second.poll(), Ok(Step::Revoking(_))));
    // A successor that never comes is not waited for for ever.
    let mut fourth = world.map.fault(world.member(0), 512, Read).expect("ok");
    assert!(matches!(fourth.poll(), Ok(Step::Granted(_))));
    let mut gone = world.map.fault(world.member(1), 512, Read).expect("ok");
    assert_eq!(gone.poll(), Ok(Step::Busy));
    gone.abandon().expect("holds nothing");
    fourth.complete().expect("granted");
    let mut patient = world.map.fault(world.member(2), 512, Read).expect("ok");
    let polls = (0..100).take_while(|_| patient.poll() == Ok(Step::Busy));
    assert!(polls.count() < 100);
}

#[test]
fn a_lost_doorbell_and_hint_only_cost_time() {
    let mut world = World::new(2, 1);
    world.accomplish(0, 0, Write).expect("works");
    assert!(!world.access(1, 0, 0, Write).expect("coherent"));
    world.advance(1, 0).expect("works");
    assert!(world.map.has_revocations(world.member(0)));
    world.lose_hints(0);
    assert!(!world.serve(0, 0, false).expect("works"), "knows nothing");
    world.nudge(1, 0);
    world.drain().expect("works");
}

#[test]
fn an_answer_that_comes_late_counts_for_nothing() {
    let mut world = World::new(2, 2);
    world.accomplish(0, 0, Write).expect("works");
    // Node 1 asks; both cores of node 0 take the revocation up.
    assert!(!world.access(1, 0, 0, Execute).expect("coherent"));
    world.advance(1, 0).expect("works");
    assert!(world.serve(0, 0, false).expect("works"));
    assert!(world.serve(0, 1, false).expect("works"));
    // One core serves it, and the story goes on until node 0 has the frame
    // back and node 1 has asked again.
    while world.serve(0, 0, false).expect("works") {}
    while world.advance(1, 0).expect("works").is_some() {}
    assert!(!world.access(0, 0, 0, Write).expect("coherent"));
    while world.has_fault(0, 0) {
        world.advance(0, 0).expect("works");
        while world.serve(1, 0, false).expect("works") {}
    }
    assert!(!world.access(1, 0, 0, Execute).expect("coherent"));
    world.advance(1, 0).expect("works");
    // Now the other core answers the first request.
    world.serve(0, 1, false).expect("reduces");
    world.serve(0, 1, false).expect("answers");
    let waits = world.advance(1, 0).expect("works");
    assert_eq!(waits, Some(Step::Revoking(NodeSet::only(NodeId(0)))));
    world.drain().expect("works");
    world.check().expect("coherent");
}

#[test]
fn more_faults_than_slots_wait_for_each_other() {
    let mut world = World::new(2, 5);
    for frame in [0, 512] {
        world.accomplish(0, frame, Write).expect("works");
        world.accomplish(1, frame, Write).expect("works");
    }
    // Five frames to ask about, two slots.
    for (core, frame) in [0, 1, 511, 512, 1023].into_iter().enumerate() {
        assert!(!world.access(1, core, frame, Execute).expect("coherent"));
    }
    let mut asked = 0;
    for core in 0..5 {
        let step = world.advance(1, core).expect("works");
        asked += u32::from(matches!(step, Some(Step::Revoking(_))));
    }
    assert_eq!(asked, 2);
    world.drain().expect("works");
}

#[test]
fn a_dead_node_is_not_waited_for_once_it_is_fenced() {
    let mut world = World::new(3, 1);
    world.accomplish(0, 0, Write).expect("works");
    world.accomplish(1, 0, Write).expect("works");
    assert!(!world.access(2, 0, 0, Execute).expect("coherent"));
    world.kill(0);
    while world.serve(1, 0, false).expect("works") {}
    let dead = NodeSet::only(NodeId(0));
    for _ in 0..3 {
        world.advance(2, 0).expect("works");
        while world.serve(1, 0, false).expect("works") {}
    }
    assert_eq!(world.advance(2, 0), Ok(Some(Step::Revoking(dead))));
    world.fence(0);
    world.drain().expect("works");
    assert_eq!(world.accomplish(2, 0, Execute), Ok(0));
}

#[test]
fn a_fenced_node_is_told_so_and_may_come_back() {
    let mut world = World::new(2, 1);
    let old = world.member(0);
    let mut fault = world.map.fault(old, 0, Write).expect("a member");
    assert!(matches!(fault.poll(), Ok(Step::Granted(_))));
    world.kill(0);
    world.fence(0);
    let fenced = Err(CoherenceError::Fenced { node: NodeId(0) });
    assert_eq!(fault.poll(), fenced);
    assert_eq!(
        world.map.fault(old, 0, Write).map(|_| ()),
        fenced.map(|_: Step| ())
    );
    // Its lock is void, in its own next life too.
    world.join(0).expect("a new epoch");
    assert_eq!(
        world.map.join(NodeId(0), 7),
        Err(CoherenceError::AlreadyIn { node: NodeId(0) })
    );
    world.map.fence(old).expect("harmless: another epoch");
    assert_eq!(world.accomplish(0, 0, Write), Ok(1));
}

/// Resolves node 0's fault, the others cooperating, until node 0 has used the
/// fuel up; false if it did.
fn lives(world: &mut World, mut fuel: u64) -> bool {
    let words = world.words.clone();
    while world.has_fault(0, 0) {
        let step = words.with_fuel(&mut fuel, || world.advance(0, 0));
        match step {
            None => return false,
            Some(outcome) => drop(outcome.expect("works")),
        }
        for node in 1..3 {
            while world.serve(node, 0, false).expect("works") {}
        }
    }
    true
}

#[test]
fn any_death_of_a_faulting_node_leaves_the_frame_usable() {
    let accesses = [Read, Write, Execute];
    let mut deaths = 0;
    for case in 0..27 {
        let [before, access, after] = [case % 3, case / 3 % 3, case / 9].map(|at| accesses[at]);
        let mut fuel = 0;
        loop {
            let mut world = World::new(3, 1);
            world.accomplish(1, 0, Write).expect("works");
            world.accomplish(2, 0, before).expect("works");
            assert!(!world.access(0, 0, 0, access).expect("coherent"));
            if lives(&mut world, fuel) {
                break;
            }
            deaths += 1;
            world.kill(0);
            world.fence(0);
            world.drain().expect("no lock is left behind");
            world.accomplish(1, 0, after).expect("works");
            world.join(0).expect("a new epoch");
            world.accomplish(0, 0, after).expect("works");
            world.accomplish(2, 0, Write).expect("works");
            // In the midst of the 1,500 stores of a split, a few deaths do.
            fuel += if (25..1540).contains(&fuel) { 101 } else { 1 };
        }
    }
    assert!(deaths > 500, "{deaths}");
}

#[test]
fn pieces_are_claimed_only_if_nobody_was_there() {
    let mut world = World::new(2, 1);
    world.accomplish(1, 512, Write).expect("works");
    let mut mapped = Vec::new();
    let me = world.member(0);
    world
        .map
        .claim(me, 0..2, |unit| mapped.push(unit))
        .expect("in range");
    assert_eq!(mapped, [Unit::Piece(0)]);
    assert_eq!(state(&world, 0), State::Private);
    assert!(
        world
            .map
            .view(0)
            .expect("in range")
            .mapped
            .contains(NodeId(0))
    );
    assert_eq!(
        world.map.claim(me, 2..3, |_| ()),
        Err(CoherenceError::NoSuchFrame { frame: 1024 })
    );
    // Claimed code needs no refresh, and the next node shares it as usual.
    assert_eq!(world.accomplish(1, 0, Execute), Ok(1));
}

#[test]
fn neighbours_are_joined_if_that_costs_nobody_anything() {
    let mut world = World::new(3, 1);
    for node in 0..2 {
        world.accomplish(node, 0, Write).expect("works");
    }
    assert_eq!(world.join_around(2), Ok(0), "the piece is whole");
    world.accomplish(1, 0, Execute).expect("works");
    // Frame 0 is Code; 1 and 511 are Data; the other piece is untouched.
    assert_eq!(world.join_around(2), Ok(3));
    assert_eq!(world.accomplish(2, 0, Execute), Ok(0));
    assert_eq!(world.accomplish(2, 1, Write), Ok(0));
    assert_eq!(world.accomplish(2, 1, Execute), Ok(1));
    assert_eq!(world.join_around(2), Ok(0), "it has them all");
    world.check().expect("coherent");
}

#[test]
fn nonsense_arguments_are_refused() {
    let world = World::new(2, 1);
    let me = world.member(0);
    assert_eq!(
        world.map.fault(me, 1024, Read).map(|_| ()),
        Err(CoherenceError::NoSuchFrame { frame: 1024 })
    );
    let stranger = Member {
        node: NodeId(9),
        epoch: 1,
    };
    let unknown = CoherenceError::NoSuchNode { node: NodeId(9) };
    assert_eq!(world.map.fault(stranger, 0, Read).map(|_| ()), Err(unknown));
    assert_eq!(world.map.fence(stranger), Err(unknown));
    assert_eq!(world.map.join(NodeId(9), 1), Err(unknown));
    assert!(world.map.join(NodeId(1), 0).is_err());
    let fault = world.map.fault(me, 0, Read).expect("in range");
    assert_eq!(fault.complete(), Err(CoherenceError::NotGranted));
}
