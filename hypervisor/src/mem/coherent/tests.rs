#![expect(unsafe_code, reason = "leaked memory as guest memory and as a table")]

use core::ptr::NonNull;
use std::alloc::{Layout, alloc_zeroed};
use std::thread;

use super::*;
use vmm_shared::addr::LARGE_PAGE_SIZE;
use vmm_shared::coherence::Geometry;
use vmm_shared::control::{BUNDLE_OFFSET, BlockId, BlockRecord, BlockState};
use vmm_shared::region::CONTENT_OFFSET;
use vmm_shared::shm::SharedMem;

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
    fn tell_withdrawn(&self) {}
    fn lost(&self) -> NodeSet {
        NodeSet::EMPTY
    }
}

fn leaked(bytes: usize) -> SharedMem {
    let align = usize::try_from(LARGE_PAGE_SIZE).expect("64-bit");
    let layout = Layout::from_size_align(bytes, align).expect("legal");
    // SAFETY: not of size 0; leaked, aligned, and reached through the window
    // only.
    unsafe {
        let base = NonNull::new(alloc_zeroed(layout)).expect("memory");
        SharedMem::new(base, bytes)
    }
}

type Memory = MappedMemory<Silent>;

/// Where the block is that a rack may get.
const BLOCK: Gpa = Gpa(8 << 20);

/// A block of 2 MiB, for tests.
fn block(control: &ControlRegion) -> BlockRecord {
    control.block(BlockId(0)).expect("a record")
}

/// Two nodes with 4 MiB that node 0 gives, and a block of 2 MiB that it may;
/// their holds last for seconds.
fn rack() -> [Memory; 2] {
    nodes(Some(()))
}

/// The same, where instruction fetch is coherent if there is no membership.
fn nodes(incoherent: Option<()>) -> [Memory; 2] {
    let control = leaked(usize::try_from(CONTENT_OFFSET + BUNDLE_OFFSET).expect("64-bit"));
    let control = ControlRegion::new(control).expect("large enough");
    let geometry = Geometry {
        frames: 1536,
        nodes: 2,
        slots: 2,
    };
    let table = leaked(geometry.table_size().expect("legal"));
    let memory = leaked(4 << 20);
    let later = leaked(2 << 20);
    [0, 1].map(NodeId).map(|node| {
        let map = CoherenceMap::new(table, geometry).expect("large enough");
        let member = map.join(node, 1).expect("fresh");
        Memory::new(MemoryParts {
            slices: Slices::new(vec![
                Slice {
                    node: NodeId(0),
                    gpa: Gpa(0),
                    memory,
                    block: None,
                },
                Slice {
                    node: NodeId(0),
                    gpa: BLOCK,
                    memory: later,
                    block: Some(block(&control)),
                },
            ]),
            tables: NestedTables::new(),
            membership: incoherent.map(|()| Membership { map, member }),
            bells: Silent(node),
            control,
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

/// Takes the block away, as the devices' node does.
fn withdraw(memory: &Memory) {
    let control = memory.slices.iter().find_map(|slice| slice.block);
    control
        .expect("a block")
        .set_state(BlockState::Leaving(NodeId(0)));
    let _ = memory.withdrawals.count();
}

#[test]
fn memory_that_comes_is_mapped_when_it_is_touched_and_gone_when_withdrawn() {
    for incoherent in [Some(()), None] {
        let [one, other] = nodes(incoherent);
        let record = one.slices.iter().find_map(|slice| slice.block);
        let record = record.expect("a block");
        let touch = |memory: &Memory, gpa| memory.guest_fault(0, place(1), gpa, Access::Write);
        let inside = Gpa(BLOCK.0 + 0x3000);
        assert_eq!(touch(&one, inside), Ok(Resolution::NotMemory));
        assert!(one.write(inside, &1_u64).is_err());
        one.claim_all().expect("sound");
        assert!(
            rights(&one, inside).is_empty(),
            "absent memory is not claimed"
        );
        for _ in 0..3 {
            record.set_state(BlockState::Offered(NodeId(0)));
            for memory in [&one, &other] {
                thread::scope(|scope| {
                    let fault = scope.spawn(|| touch(memory, inside));
                    while !fault.is_finished() {
                        one.serve().expect("sound");
                        other.serve().expect("sound");
                        one.guest_got_on(0).expect("sound");
                        thread::yield_now();
                    }
                    let resolution = fault.join().expect("no panic");
                    assert_eq!(resolution, Ok(Resolution::Mapped));
                });
                assert!(rights(memory, inside).contains(Rights::WRITE));
                memory.guest_got_on(0).expect("sound");
            }
            assert_eq!(other.write(inside, &7_u64), Ok(()));
            assert_eq!(one.read::<u64>(inside), Ok(7));
            withdraw(&one);
            for memory in [&one, &other] {
                assert!(memory.is_asked());
                memory.serve().expect("sound");
                assert!(!memory.is_asked(), "once");
                assert!(rights(memory, inside).is_empty());
                assert!(rights(memory, BLOCK).is_empty());
                assert_eq!(touch(memory, inside), Ok(Resolution::NotMemory));
                assert!(memory.write(inside, &1_u64).is_err());
                assert!(memory.write_bytes_now(inside, &[1]).is_err());
                assert!(memory.read::<u64>(inside).is_err());
            }
            record.set_state(BlockState::Absent);
            let fault = touch(&one, FRAME);
            assert_eq!(fault, Ok(Resolution::Mapped), "the rest is as it was");
            one.guest_got_on(0).expect("sound");
        }
    }
}
