//! A control region in which peers write whatever they like: every reader of
//! it must give an answer or refuse, and never panic, whatever it reads.
#![no_main]

use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use hypervisor::fabric::forward::Slot;
use hypervisor::fabric::keeper::Keeper;
use hypervisor::fabric::proof::{Fetch, Pages};
use hypervisor::platform::{PlatformNode, Topology};
use hypervisor::vcpu::posted::PostedInterrupts;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use vmm_shared::addr::{MAX_NODES, MAX_VCPUS, NodeId, VcpuId};
use vmm_shared::coherence::{Access, CoherenceMap, NodeSet};
use vmm_shared::control::{
    BUNDLE_OFFSET, BlockId, BlockOrder, BlockState, BootConfig, ControlRegion, Counter, MAX_BLOCKS,
    NodeState, RingId, Ticket, VmState, coherence_geometry, first_places,
};
use vmm_shared::membership::Watch;
use vmm_shared::region::{CONTENT_OFFSET, RegionHeader};
use vmm_shared::shm::SharedMem;

/// Room for a table of instruction coherence behind all else.
const TABLE: u64 = 1 << 20;
const LEN: usize = (CONTENT_OFFSET + BUNDLE_OFFSET + TABLE) as usize;
/// Where it matters: offsets into the content, and how much there is.
const PLACES: [(usize, usize); 11] = [
    (0, 0x1000),
    (0x1000, 0x2000),
    (0x3000, 0x100),
    (0x4_0000, 192),
    (0x9_0000, 192),
    (0x10_0000, 192),
    (0x32_0000, 0x4000),
    (0x3f_0000, 0x4000),
    (0x70_0000, 0x1040),
    (0x71_0000, 0x4000),
    (BUNDLE_OFFSET as usize, 0x4000),
];

#[derive(Arbitrary, Debug)]
struct Write {
    place: u8,
    offset: u16,
    value: u64,
}

#[derive(Arbitrary, Debug)]
struct Input {
    header: [u8; 48],
    before: Vec<Write>,
    during: Vec<Write>,
    node: u16,
    vcpu: u16,
    frame: u16,
    bytes: Vec<u8>,
}

/// One region for all runs; runs begin with it zeroed where it was written.
fn region() -> SharedMem {
    static REGION: OnceLock<SharedMem> = OnceLock::new();
    *REGION.get_or_init(|| {
        let memory = Box::leak(vec![0_u64; LEN / 8].into_boxed_slice());
        let base = NonNull::new(memory.as_mut_ptr()).expect("not null").cast();
        // SAFETY: leaked, aligned, and reached through the window only.
        unsafe { SharedMem::new(base, LEN) }
    })
}

fn clear(region: SharedMem) {
    for (place, len) in PLACES {
        let zeros = vec![0; len];
        let at = CONTENT_OFFSET as usize + place;
        region.write_bytes(at, &zeros).expect("inside");
    }
}

fn apply(region: SharedMem, write: &Write) {
    let (place, len) = PLACES[usize::from(write.place) % PLACES.len()];
    let at = CONTENT_OFFSET as usize + place + usize::from(write.offset) * 8 % len;
    let word = region.atomic_u64(at).expect("inside");
    word.store(write.value, Ordering::Relaxed);
}

fuzz_target!(|input: Input| {
    let region = region();
    clear(region);
    region.write_bytes(0, &input.header).expect("inside");
    let _ = RegionHeader::check(&region).map_err(|why| why.to_string());
    input.before.iter().for_each(|write| apply(region, write));

    let control = ControlRegion::new(region).expect("large enough");
    let config = control.boot_config();
    configuration(&control, &config);
    let (node, vcpu) = (NodeId(input.node), VcpuId(input.vcpu));
    records(&control, node);
    block(&control, BlockId(node.0));
    vcpu_home(&control, vcpu, &input.bytes);
    rings(&control, &input.bytes);
    membership(&control, region, &input);
    coherence(&control, region, &input);
});

fn configuration(control: &ControlRegion, config: &BootConfig) {
    for blob in [config.kernel, config.initramfs, config.coherence] {
        if let Some(memory) = control.blob(blob) {
            assert!(memory.len() as u64 == blob.len);
            let _ = memory.read_bytes(0, &mut [0; 8]);
        }
    }
    let nodes = usize::try_from(config.nodes).unwrap_or(usize::MAX);
    let shares = config.shares.get(..nodes).unwrap_or(&config.shares);
    let _ = first_places(shares).count();
    if let Some(pieces) = control.pieces(config) {
        for (node, _) in (0..).map(NodeId).zip(shares) {
            let _ = control.needs(node, &pieces);
        }
    }
    let _ = coherence_geometry(shares).table_size();
    let node = |share: &vmm_shared::control::NodeShare| PlatformNode {
        vcpus: share.max_vcpus,
        memory: share.memory,
    };
    match Topology::new(shares.iter().map(node).collect()) {
        Ok(topology) => assert!(usize::from(topology.vcpus()) <= MAX_VCPUS),
        Err(why) => assert!(!why.to_string().is_empty()),
    }
}

fn records(control: &ControlRegion, node: NodeId) {
    let exists = usize::from(node.0) < MAX_NODES;
    assert_eq!(control.node(node).is_some(), exists);
    assert_eq!(control.proof(node).is_some(), exists);
    if let Some(state) = control.node_state(node) {
        let _ = NodeState::from_raw(state.load(Ordering::Relaxed));
    }
    let _ = VmState::from_raw(control.vm_state().load(Ordering::Relaxed));
    let _ = Fetch::from_raw(control.vm().fetch().load(Ordering::Relaxed));
    if let Some(pages) = control.proof(node).and_then(Pages::new) {
        let _ = pages.outcome();
        pages.help();
    }
}

fn block(control: &ControlRegion, block: BlockId) {
    let record = control.block(block);
    assert_eq!(record.is_some(), usize::from(block.0) < MAX_BLOCKS);
    if let Some(record) = record {
        let is_present = record.state().is_some_and(BlockState::is_present);
        assert_eq!(record.is_present(), is_present);
        let (order, outcome) = (record.order(), record.outcome());
        if record.ask(BlockOrder::Reclaim, Ticket::NO_JOB).is_ok() {
            assert_eq!(order, None, "one order at a time");
            record.settle(BlockOrder::Reclaim, outcome);
        }
    }
}

fn vcpu_home(control: &ControlRegion, vcpu: VcpuId, bytes: &[u8]) {
    for (counter, _) in Counter::ALL {
        let _ = control.counter(vcpu, counter);
    }
    let Some(home) = control.vcpu_home(vcpu) else {
        return;
    };
    let posted = PostedInterrupts::new(home).expect("homes are large enough");
    let _ = posted.location();
    let _ = posted.arm();
    if let [vector, ..] = bytes {
        let _ = posted.post(*vector);
    }
    let _ = posted.take_vectors();
    let _ = posted.take_signals();
    let slot = Slot::new(home).expect("homes are large enough");
    if let Some(access) = slot.question() {
        slot.ask(&access);
        assert_eq!(slot.question(), Some(access));
    }
    let _ = slot.take_answer();
    assert!(slot.take_answer().is_none(), "one answer");
}

fn rings(control: &ControlRegion, bytes: &[u8]) {
    for id in [
        RingId::ConsoleOut,
        RingId::ConsoleIn,
        RingId::AgentOut,
        RingId::AgentIn,
    ] {
        let ring = control.ring(id);
        assert!(ring.write(bytes) <= bytes.len());
        let mut back = vec![0; bytes.len()];
        assert!(ring.read(&mut back) <= back.len());
        let _ = (ring.arm_consumer(), ring.arm_producer());
        let _ = (ring.must_wake_consumer(), ring.must_wake_producer());
    }
}

/// Garbage may put nodes out; it never brings one back, nor lets one join
/// twice.
fn membership(control: &ControlRegion, region: SharedMem, input: &Input) {
    let membership = control.membership();
    let all = (0..64).map(NodeId).fold(NodeSet::EMPTY, NodeSet::with);
    let mut watch = Watch::new(membership, all);
    let keeper = membership.join(NodeId(input.node)).ok().map(|life| {
        assert!(membership.join(life.node()).is_err());
        let keeper = Keeper::new(membership, life, 1);
        keeper.start(all.without(life.node()), 0);
        (life, keeper)
    });
    let mut lost = watch.look();
    for (write, now) in input.during.iter().zip(1_u64..) {
        apply(region, write);
        let still = watch.tick();
        assert!({ lost }.all(|node| still.contains(node)));
        lost = still;
        if let Some((life, keeper)) = &keeper {
            let before = keeper.lost();
            keeper.attend(now * 250);
            keeper.look();
            assert!({ before }.all(|node| keeper.lost().contains(node)));
            assert_eq!(
                keeper.held(|_| true) == Some(hypervisor::fabric::keeper::Held::Fenced),
                !membership.is_in(*life)
            );
        }
    }
}

/// The table of two nodes with 64 MiB, and garbage in it.
fn coherence(control: &ControlRegion, region: SharedMem, input: &Input) {
    let blob = vmm_shared::control::Blob {
        offset: BUNDLE_OFFSET,
        len: TABLE,
    };
    let table = control.blob(blob).expect("inside");
    let share = vmm_shared::control::NodeShare {
        memory: 32 << 20,
        cores: 1,
        vcpus: 1,
        max_vcpus: 1,
        blocks: 0,
        room: 16,
    };
    let Some(map) = CoherenceMap::new(table, coherence_geometry(&[share, share])) else {
        panic!("the table has room for two nodes");
    };
    let Ok(member) = map.join(NodeId(0), 1) else {
        return;
    };
    let _ = map.join(NodeId(1), 1);
    let Ok(mut fault) = map.fault(member, usize::from(input.frame), Access::Write) else {
        return;
    };
    for write in &input.during {
        apply(region, write);
        if fault.poll().is_err() {
            return;
        }
        let _ = fault.nudge();
        for _ in 0..4 {
            match map.next_revocation(member) {
                Ok(Some(revocation)) => map.acknowledge(member, &revocation),
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
    let _ = fault.complete();
}
