use std::thread;

use super::*;
use crate::mem::moves::{Given, Turn};
use crate::mem::slices::testing::{self, leaked};
use vmm_shared::coherence::Geometry;
use vmm_shared::pieces::{Ended, HostPiece, Pull, PullId};

/// Doorbells that nobody hears: the tests look for themselves.
#[derive(Debug)]
struct Silent(NodeId);

impl Bells for Silent {
    fn node(&self) -> NodeId {
        self.0
    }
    fn kick_core(&self, core: usize) {
        panic!("core {core} is never in its guest");
    }
    fn ring_nodes(&self, _nodes: NodeSet) {}
    fn lost(&self) -> NodeSet {
        NodeSet::EMPTY
    }
    fn is_out(&self) -> bool {
        false
    }
}

type Memory = MappedMemory<Silent>;

/// Where the piece is that a rack may get.
const BLOCK: Gpa = Gpa(8 << 20);

/// Two nodes with 4 MiB that node 0 gives, and room for as much on node 1;
/// a piece that may come; their holds last for seconds.
fn rack() -> [Memory; 2] {
    rack_with(Fetch::Stale)
}

fn rack_with(fetch: Fetch) -> [Memory; 2] {
    let geometry = Geometry {
        frames: 1536,
        nodes: 2,
        slots: 2,
    };
    let table = leaked(geometry.table_size().expect("legal"));
    let rack = testing::rack(&[(2, 2), (0, 2)], 1);
    [0, 1].map(NodeId).map(|node| {
        let map = CoherenceMap::new(table, geometry).expect("large enough");
        let member = map.join(node, 1).expect("fresh");
        Memory::new(MemoryParts {
            slices: Slices::new(
                [(Gpa(0), 4 << 20), (BLOCK, 2 << 20)],
                rack.map,
                rack.regions.clone(),
            )
            .expect("they fit"),
            tables: NestedTables::new(),
            membership: Some(Membership { map, member, fetch }),
            bells: Silent(node),
            counters: NodeCounters::new(leaked(1024)).expect("large enough"),
            cores: 1,
            tsc_khz: u32::MAX,
        })
    })
}

const FRAME: Gpa = Gpa(0x5000);

fn place(rip: u64) -> Place {
    Place { rip, rcx: 0 }
}

fn rights(memory: &Memory, gpa: Gpa) -> Rights {
    memory.tables.lock().rights(gpa)
}

/// Lets a node's guest fault while the other node does what `meanwhile` says,
/// which has to end in giving up what is asked for.
fn fault_meanwhile(memory: &Memory, access: Access, meanwhile: impl FnOnce()) {
    thread::scope(|scope| {
        let fault = scope.spawn(|| memory.guest_fault(0, place(1), FRAME, access));
        meanwhile();
        let resolution = fault.join().expect("no panic");
        assert_eq!(resolution, Ok(Resolution::Mapped));
    });
    assert!(rights(memory, FRAME).contains(access.needs()));
}

fn wait_until_asked(memory: &Memory) {
    while !memory.is_asked() {
        thread::yield_now();
    }
}

#[test]
fn what_a_guest_was_granted_stays_until_it_has_used_it() {
    let [one, other] = rack();
    let granted = one.guest_fault(0, place(7), FRAME, Access::Write);
    assert_eq!(granted, Ok(Resolution::Mapped));
    fault_meanwhile(&other, Access::Execute, || {
        wait_until_asked(&one);
        for _ in 0..3 {
            one.serve().expect("sound");
            assert!(rights(&one, FRAME).contains(Rights::WRITE), "taken away");
        }
        one.guest_was_interrupted(0, place(7)).expect("sound");
        assert!(rights(&one, FRAME).contains(Rights::WRITE), "taken away");
        one.guest_got_on(0).expect("sound");
        assert!(!rights(&one, FRAME).contains(Rights::WRITE), "kept");
    });
    assert!(
        one.counters
            .values()
            .any(|(name, value)| name == "holds" && value >= 3)
    );
}

#[test]
fn an_interrupt_at_another_place_shows_that_it_has_used_it() {
    let [one, other] = rack();
    let granted = one.guest_fault(0, place(7), FRAME, Access::Write);
    assert_eq!(granted, Ok(Resolution::Mapped));
    fault_meanwhile(&other, Access::Execute, || {
        wait_until_asked(&one);
        one.guest_was_interrupted(0, place(9)).expect("sound");
    });
    assert!(!rights(&one, FRAME).contains(Rights::WRITE));
}

#[test]
fn the_hypervisor_writes_only_what_this_node_may_write() {
    let [one, other] = rack();
    fault_meanwhile(&one, Access::Write, || ());
    one.guest_got_on(0).expect("sound");
    fault_meanwhile(&other, Access::Execute, || {
        wait_until_asked(&one);
        one.serve().expect("sound");
    });
    other.guest_got_on(0).expect("sound");
    // Code on both nodes now: a write has to ask, or must not happen.
    let offer = one.write_bytes_now(FRAME, &[1; 4]);
    assert!(offer.is_err(), "it would have to ask");
    assert_eq!(one.read::<u32>(FRAME), Ok(0));
    let bytes = [7; 0x2000];
    thread::scope(|scope| {
        let write = scope.spawn(|| one.write_bytes(Gpa(0x4800), &bytes));
        while !write.is_finished() {
            other.serve().expect("sound");
            thread::yield_now();
        }
        assert_eq!(write.join().expect("no panic"), Ok(()));
    });
    assert!(!rights(&other, FRAME).contains(Rights::EXECUTE));
    assert_eq!(one.read::<u32>(Gpa(0x67fc)), Ok(0x0707_0707));
    assert_eq!(one.read::<u32>(Gpa(0x6800)), Ok(0));
    assert_eq!(one.write_bytes_now(FRAME, &[1; 4]), Ok(()));
    let beyond = one.write_bytes(Gpa((4 << 20) - 2), &[1; 4]);
    assert!(beyond.is_err());
    assert_eq!(one.read::<u16>(Gpa((4 << 20) - 2)), Ok(0), "all or nothing");
}

/// What a node does while the other serves.
fn while_served<T: Send>(
    rack: &[Memory; 2],
    node: usize,
    act: impl FnOnce(&Memory) -> T + Send,
) -> T {
    thread::scope(|scope| {
        let acting = scope.spawn(|| act(&rack[node]));
        while !acting.is_finished() {
            rack[1 - node].serve().expect("sound");
            thread::yield_now();
        }
        acting.join().expect("no panic")
    })
}

/// Lets a node take a piece over from the other.
fn take_one(rack: &[Memory; 2], node: usize) -> Turn {
    let (id, count) = (PullId(1), 1);
    let from = rack[1 - node].bells.node();
    let pull = Pull { id, from, count };
    while_served(rack, node, |memory| memory.take_over(pull)).expect("sound")
}

fn at(memory: &Memory, piece: usize) -> HostPiece {
    let seen = memory.slices.look(piece).expect("sound");
    seen.host().expect("somewhere")
}

#[test]
fn a_piece_moves_with_its_bytes_and_is_taken_from_everybody() {
    for fetch in [Fetch::Stale, Fetch::Coherent] {
        let rack = rack_with(fetch);
        rack[0].write(FRAME, &7_u64).expect("inside");
        let first = at(&rack[0], 0);
        assert!(rights(&rack[0], FRAME).contains(Rights::WRITE));
        assert!(matches!(take_one(&rack, 1), Turn::Took { .. }), "{fetch:?}");
        let there = at(&rack[0], 0);
        assert_eq!((first.node, there.node), (NodeId(0), NodeId(1)));
        for memory in &rack {
            assert_eq!(rights(memory, FRAME), Rights::NONE);
            assert_eq!(memory.read::<u64>(FRAME), Ok(7));
        }
        // Both write and read the new place, and nobody the old one.
        let old = rack[0].slices.memory(first).expect("inside");
        old.write(0x5000, &9_u64).expect("inside");
        for (node, offset, value) in [(1, 8, 8_u64), (0, 16, 6)] {
            let place = Gpa(FRAME.0 + offset);
            while_served(&rack, node, |memory| memory.write(place, &value)).expect("inside");
        }
        assert_eq!(rack[0].read(FRAME), Ok([7_u64, 8, 6]));
        assert!(matches!(take_one(&rack, 1), Turn::Took { .. }));
        assert_eq!(take_one(&rack, 1), Turn::Over(Ended::Done));
        assert_eq!(rack[0].slices.map().pieces_on(NodeId(0)).count(), 0);
        assert_eq!(rack[0].slices.map().free(NodeId(0)), 2, "given back");
    }
}

#[test]
fn a_node_without_room_takes_no_more() {
    let rack = rack();
    for piece in 0..2 {
        assert!(rack[1].slices.map().take_host(NodeId(1), piece).is_some());
    }
    assert_eq!(take_one(&rack, 1), Turn::Over(Ended::NoRoom));
    assert_eq!(at(&rack[0], 0).node, NodeId(0));
}

/// A guest's fault on a piece that moves waits, and is granted where the
/// piece is then.
#[test]
fn who_needs_a_moving_piece_waits_for_it() {
    let rack = rack();
    let map = rack[1].slices.map();
    let claim = map.claim(0, NodeId(1)).expect("sound").expect("free");
    let to = map.take_host(NodeId(1), 0).expect("room");
    thread::scope(|scope| {
        let fault = scope.spawn(|| rack[0].guest_fault(0, place(1), FRAME, Access::Write));
        for _ in 0..100 {
            thread::yield_now();
            assert_eq!(rights(&rack[0], FRAME), Rights::NONE);
        }
        assert!(!fault.is_finished());
        assert!(rack[0].write_bytes_now(FRAME, &[1; 4]).is_err());
        assert!(map.publish(&claim, to));
        let resolution = fault.join().expect("no panic");
        assert_eq!(resolution, Ok(Resolution::Mapped));
    });
    rack[0].write_bytes_now(FRAME, &[1; 4]).expect("mapped");
    let there = rack[0].slices.memory(to).expect("inside");
    assert_eq!(there.read(0x5000), Some([1_u8; 4]));
}

/// A grant that comes when its piece has just been claimed leaves nothing
/// mapped, and the entry free for others.
#[test]
fn a_grant_for_a_piece_that_has_begun_to_move_maps_nothing() {
    let rack = rack();
    let own = rack[0].membership.as_ref().expect("two nodes");
    let mut fault = own.map.fault(own.member, 5, Access::Write).expect("alive");
    let Step::Granted(grant) = fault.poll().expect("sound") else {
        panic!("nobody else has it");
    };
    let map = rack[0].slices.map();
    let claim = map.claim(0, NodeId(1)).expect("sound").expect("free");
    assert_eq!(rack[0].apply(&grant), Ok(false));
    fault.abandon().expect("alive");
    assert_eq!(rights(&rack[0], FRAME), Rights::NONE);
    map.release(&claim);
    let granted = rack[0].guest_fault(0, place(1), FRAME, Access::Write);
    assert_eq!(granted, Ok(Resolution::Mapped));
}

/// What a node has translated from a place, it forgets before it executes
/// what has moved there since.
#[test]
fn a_place_is_strange_to_who_has_executed_there_before() {
    let rack = rack();
    let stale = || {
        let own = rack[0].membership.as_ref().expect("two nodes");
        own.map.view(5).expect("inside").stale
    };
    let execute = |node: usize| {
        let resolution = while_served(&rack, node, |memory| {
            memory.guest_fault(0, place(1), FRAME, Access::Execute)
        });
        assert_eq!(resolution, Ok(Resolution::Mapped));
        rack[node].guest_got_on(0).expect("sound");
    };
    execute(0);
    execute(1);
    let home = at(&rack[0], 0);
    assert!(matches!(take_one(&rack, 1), Turn::Took { .. }));
    assert_eq!(stale(), NodeSet::EMPTY, "nobody was ever there");
    execute(1);
    assert!(matches!(take_one(&rack, 0), Turn::Took { .. }));
    assert_eq!(at(&rack[0], 0), home);
    // Node 0 has written there itself.
    assert_eq!(stale(), NodeSet::only(NodeId(1)));
    execute(0);
    execute(1);
    assert_eq!(stale(), NodeSet::EMPTY, "refreshed");
}

/// A piece that comes, goes and comes again is memory in between, for all
/// nodes, and its place is free afterwards.
#[test]
fn memory_that_comes_is_mapped_when_it_is_touched_and_gone_when_withdrawn() {
    for fetch in [Fetch::Stale, Fetch::Coherent] {
        let rack = rack_with(fetch);
        let map = rack[0].slices.map();
        let touch = |node: usize, gpa| {
            while_served(&rack, node, |memory| {
                memory.guest_fault(0, place(1), gpa, Access::Write)
            })
        };
        let inside = Gpa(BLOCK.0 + 0x3000);
        rack[0].claim_all().expect("sound");
        for _ in 0..3 {
            for (node, memory) in rack.iter().enumerate() {
                assert!(rights(memory, inside).is_empty());
                assert_eq!(touch(node, inside), Ok(Resolution::NotMemory));
                assert!(memory.write(inside, &1_u64).is_err());
                assert!(memory.write_bytes_now(inside, &[1]).is_err());
                assert!(memory.read::<u64>(inside).is_err());
            }
            assert_eq!(rack[0].give(2..3, NodeId(1)), Ok(Given::All));
            assert_eq!(map.free(NodeId(1)), 1);
            for (node, memory) in rack.iter().enumerate() {
                assert_eq!(touch(node, inside), Ok(Resolution::Mapped));
                assert!(rights(memory, inside).contains(Rights::WRITE));
                memory.guest_got_on(0).expect("sound");
            }
            let write = while_served(&rack, 1, |memory| memory.write(inside, &7_u64));
            assert_eq!(write, Ok(()));
            assert_eq!(rack[0].read::<u64>(inside), Ok(7));
            for is_all in [false, true] {
                let withdrawn = while_served(&rack, 0, |memory| memory.withdraw(2..3));
                assert_eq!(withdrawn, Ok(is_all));
            }
            assert_eq!(map.free(NodeId(1)), 2, "given back");
            assert_eq!(touch(0, FRAME), Ok(Resolution::Mapped), "as it was");
            rack[0].guest_got_on(0).expect("sound");
        }
    }
}

#[test]
fn memory_comes_as_a_whole_or_not_at_all() {
    let rack = rack();
    let map = rack[0].slices.map();
    assert!(map.take_host(NodeId(1), 0).is_some());
    assert!(map.take_host(NodeId(1), 1).is_some());
    assert_eq!(rack[0].give(2..3, NodeId(1)), Ok(Given::NoRoom));
    assert_eq!(map.look(2).expect("sound").host(), None);
    assert_eq!(map.free(NodeId(1)), 0);
}

/// What a place held is strange to those who have executed it, also if it
/// was taken from the guest in between.
#[test]
fn a_place_that_was_taken_away_is_strange_to_who_has_executed_there() {
    let rack = rack();
    let stale = || {
        let own = rack[0].membership.as_ref().expect("two nodes");
        let frame = 2 * FRAMES_PER_PIECE;
        own.map.view(frame).expect("inside").stale
    };
    let execute = |node: usize| {
        let resolution = while_served(&rack, node, |memory| {
            memory.guest_fault(0, place(1), BLOCK, Access::Execute)
        });
        assert_eq!(resolution, Ok(Resolution::Mapped));
        rack[node].guest_got_on(0).expect("sound");
    };
    assert_eq!(rack[0].give(2..3, NodeId(1)), Ok(Given::All));
    execute(0);
    execute(1);
    assert_eq!(stale(), NodeSet::EMPTY);
    let withdrawn = while_served(&rack, 0, |memory| memory.withdraw(2..3));
    assert_eq!(withdrawn, Ok(false));
    assert_eq!(rack[0].give(2..3, NodeId(1)), Ok(Given::All));
    assert_eq!(stale(), NodeSet::only(NodeId(0)).with(NodeId(1)));
    execute(0);
    execute(1);
    assert_eq!(stale(), NodeSet::EMPTY, "refreshed");
}

#[test]
fn lost_memory_is_out_of_reach_and_stops_nobody() {
    for fetch in [Fetch::Stale, Fetch::Coherent] {
        let [_, other] = rack_with(fetch);
        let access = |gpa| other.guest_fault(0, place(1), gpa, Access::Write);
        assert_eq!(access(FRAME), Ok(Resolution::Mapped));
        let lost = NodeSet::EMPTY.with(NodeId(0));
        assert_eq!(other.next_lost(Gpa(0), NodeSet::EMPTY), None);
        assert_eq!(other.next_lost(Gpa(3 << 20), lost), Some(2 << 20..4 << 20));
        assert_eq!(other.next_lost(Gpa(0), lost), Some(0..4 << 20));
        assert_eq!(other.next_lost(Gpa(4 << 20), lost), None);
        assert_eq!(other.pieces_below(Gpa(4 << 20)), Some(2));
        assert_eq!(other.pieces_below(Gpa((4 << 20) + 1)), None);
        for _ in 0..2 {
            other.part_from(lost).expect("sound");
        }
        assert_eq!(other.parted(), lost);
        assert_eq!(rights(&other, FRAME), Rights::NONE);
        // The other node is gone: nobody would answer.
        assert_eq!(access(FRAME), Ok(Resolution::Mapped));
        assert_eq!(rights(&other, FRAME), Rights::ALL);
        let next = Gpa(FRAME.0 + PAGE_SIZE);
        assert_eq!(rights(&other, next), Rights::NONE, "page by page");
        let mapped = other.tables.lock().mapped();
        assert_eq!((mapped.large, mapped.small), (0, PAGE_SIZE));
    }
}
