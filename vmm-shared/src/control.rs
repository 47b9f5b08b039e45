//! The control region: what the launcher and the hypervisors tell each other.
//!
//! One per rack. Offsets are into the region's content (behind
//! [`CONTENT_OFFSET`](crate::region::CONTENT_OFFSET)):
//!
//! ```text
//!   0x000000  boot configuration     launcher writes, once, before any node starts
//!   0x001000  node records, 128 B each: see `NodeRecord`
//!   0x003000  VM record              see `VmRecord`
//!   0x004000  vCPU counters, 512 B each, one writer: the node that runs the vCPU
//!   0x040000  rings: console out, console in, agent out, agent in
//!   0x320000  vCPU homes, 1 KiB each: see `VcpuHome`
//!   0x360000  node counters, 1 KiB each: see `NodeCounters`
//!   0x3f0000  blocks of hot-added memory, 64 B each: see `BlockRecord`
//!   0x400000  vCPU images, 8 KiB each: all state of a vCPU that moves
//!   0x700000  membership             see `Membership`
//!   0x710000  proofs of each node, 8 KiB each: words and code
//!   0x800000  boot bundle            kernel, initramfs: launcher writes, once
//! ```

mod block;
#[cfg(any(feature = "alloc", test, loom))]
pub mod cluster;
mod node_counters;
mod order;
mod replica_digest;
mod vcpu;

use core::ops::Range;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::{LARGE_PAGE_SIZE, Location, MAX_NODES, MAX_VCPUS, NodeId, PAGE_SIZE, VcpuId};
use crate::coherence::{Geometry, MAX_SLOTS, NodeSet};
use crate::losses::LossRecord;
use crate::membership::Membership;
use crate::pieces::{MapGeometry, PieceMap};
use crate::region::CONTENT_OFFSET;
use crate::ring::{ByteRing, ring_size};
use crate::shm::SharedMem;

use block::BLOCK_RECORD_SIZE;
pub use block::{
    BLOCK_SIZE, BlockId, BlockOrder, BlockRecord, BlockState, MAX_BLOCKS, PIECES_PER_BLOCK,
};
use node_counters::NODE_COUNTERS_SIZE;
pub use node_counters::{NodeCounter, NodeCounters};
pub use order::{Busy, OrderWords, Outcome, Standing, Ticket};
pub use replica_digest::{Digest, ReplicaDigest};
use vcpu::VCPU_RECORD_SIZE;
pub use vcpu::{Order, Place, VcpuRecord};

const BOOT_CONFIG: usize = 0;
const NODE_RECORDS: usize = 0x1000;
const NODE_RECORD_SIZE: usize = 128;
const VM_RECORD: usize = 0x3000;
const VM_RECORD_SIZE: usize = 256;
const COUNTERS: usize = 0x4000;
const COUNTERS_SIZE: usize = 8 * Counter::SLOTS;
const VCPU_HOMES: usize = 0x32_0000;
const VCPU_HOME_SIZE: usize = 1 << 10;
const MEMBERSHIP: usize = 0x70_0000;
const PROOFS: usize = 0x71_0000;
const PROOF_SIZE: usize = 8 << 10;
const LOSSES: usize = 0x7f_0000;
const NODE_COUNTERS: usize = 0x36_0000;
/// Offset in a vCPU's home.
const LAST_RIP: usize = 0x100;
/// Offset in a vCPU's home.
const VCPU_RECORD: usize = 0x140;
const BLOCK_RECORDS: usize = 0x3f_0000;
const VCPU_IMAGES: usize = 0x40_0000;
/// Bytes of room for a vCPU's image.
pub const VCPU_IMAGE_SIZE: usize = 8 << 10;
/// Where the launcher puts kernel and initramfs, in bytes of content.
pub const BUNDLE_OFFSET: u64 = 8 << 20;

/// The doorbell id of the launcher; nodes use their [`NodeId`].
pub const LAUNCHER_PEER: u16 = 64;
const _: () = assert!(LAUNCHER_PEER as usize == MAX_NODES);

/// Longest kernel command line, in bytes.
pub const MAX_COMMAND_LINE: usize = 2048;

/// The most modules that a VM boots with.
pub const MAX_MODULES: usize = 8;
/// Longest command line of a module, in bytes.
pub const MAX_MODULE_WORDS: usize = 256;

/// A blob in the boot bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Blob {
    /// First byte, counted from the start of the content.
    pub offset: u64,
    /// Bytes; 0 if there is none.
    pub len: u64,
}

/// A file that a multiboot or PVH image is booted with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Module {
    /// Its bytes.
    pub content: Blob,
    /// Its own command line, without a terminator; at most
    /// [`MAX_MODULE_WORDS`] bytes.
    pub words: Blob,
}

/// The devices that a VM has besides those that every VM has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Platform {
    /// None.
    #[default]
    Lean = 0,
    /// A PC's interval timer, interrupt controllers, clock and ACPI timer.
    Legacy = 1,
}

impl Platform {
    /// The platform with this number, if there is one.
    #[must_use]
    pub const fn from_raw(raw: u32) -> Option<Self> {
        match raw {
            0 => Some(Self::Lean),
            1 => Some(Self::Legacy),
            _ => None,
        }
    }
}

/// Who says by which protocol the guest is booted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum BootBy {
    /// Its image's headers.
    #[default]
    Image = 0,
    /// The operator: it is the paravirtual guest, see [`crate::pv`].
    Paravirtual = 1,
}

impl BootBy {
    /// The one with this number, if there is one.
    #[must_use]
    pub const fn from_raw(raw: u32) -> Option<Self> {
        match raw {
            0 => Some(Self::Image),
            1 => Some(Self::Paravirtual),
            _ => None,
        }
    }
}

/// What one node gives to the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NodeShare {
    /// Bytes of memory that it gives when the VM starts, a multiple of 2 MiB:
    /// the first of the content of its memory region. Guest memory is the
    /// nodes' shares in order.
    pub memory: u64,
    /// Cores that the node has.
    pub cores: u32,
    /// vCPUs that it runs when the VM starts.
    pub vcpus: u32,
    /// vCPUs that it has room for: the first `vcpus` of them are there when
    /// the VM starts. All nodes' are numbered through, node after node.
    pub max_vcpus: u16,
    /// Blocks of [`BLOCK_SIZE`] bytes that may come from it while the VM runs.
    /// Guest memory goes on with them; all nodes' are numbered through, node
    /// after node.
    pub blocks: u16,
    /// Pieces of 2 MiB that its memory region has: for what it gives at the
    /// start, what may come and what may move there.
    pub room: u32,
}

impl NodeShare {
    /// Bytes of the node's memory region.
    #[must_use]
    pub fn room(&self) -> u64 {
        u64::from(self.room) * LARGE_PAGE_SIZE
    }

    /// Bytes of guest memory that the guest takes to be near the node: what it
    /// gives at the start, and what may come.
    #[must_use]
    pub fn home(&self) -> u64 {
        self.memory
            .saturating_add(u64::from(self.blocks) * BLOCK_SIZE)
    }
}

/// What the VM is and what it boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BootConfig {
    /// Nodes in the rack.
    pub nodes: u32,
    /// vCPUs that the VM starts with.
    pub vcpus: u32,
    /// Guest memory in bytes, a multiple of 2 MiB.
    pub memory: u64,
    /// `CLOCK_REALTIME` of the launcher when the nodes' clocks started, in ns.
    pub wall_clock_ns: u64,
    /// The guest kernel.
    pub kernel: Blob,
    /// The initial RAM file system, or the paravirtual guest's first program.
    pub initramfs: Blob,
    /// The table of instruction coherence (see [`crate::coherence`]), zeroed.
    pub coherence: Blob,
    /// Where each piece of guest memory is: see [`crate::pieces`].
    pub pieces: Blob,
    /// Bytes of the root image that the guest gets as persistent memory; 0 if
    /// there is none.
    pub image_len: u64,
    /// Bytes of `command_line` in use.
    pub command_line_len: u32,
    /// A [`Platform`].
    pub platform: u32,
    /// A [`BootBy`].
    pub boot_by: u32,
    /// Zero.
    pub reserved: u32,
    /// Bits of the nodes with the role `control`.
    pub control: u64,
    /// The log and the queues of the cluster: see [`cluster`].
    pub cluster: Blob,
    /// The kernel command line.
    pub command_line: [u8; MAX_COMMAND_LINE],
    /// Modules of a multiboot or PVH image; the first that is empty ends them.
    pub modules: [Module; MAX_MODULES],
    /// What each node gives; zero from `nodes` on.
    pub shares: [NodeShare; MAX_NODES],
}

const _: () =
    assert!(size_of::<BootConfig>() == 136 + MAX_COMMAND_LINE + 32 * MAX_MODULES + 24 * MAX_NODES);
const _: () = assert!(size_of::<BootConfig>() <= NODE_RECORDS - BOOT_CONFIG);

impl BootConfig {
    /// The nodes with the role `control`.
    #[must_use]
    pub const fn control_nodes(&self) -> NodeSet {
        NodeSet::from_bits(self.control)
    }

    /// The nodes that can give something to the VM.
    #[must_use]
    pub fn data_nodes(&self) -> NodeSet {
        let nodes = usize::try_from(self.nodes).unwrap_or(usize::MAX);
        let is_data = |node: &NodeId| !self.control_nodes().contains(*node);
        (0..)
            .map(NodeId)
            .take(nodes.min(MAX_NODES))
            .filter(is_data)
            .fold(NodeSet::EMPTY, NodeSet::with)
    }

    /// How many vCPUs a node can have at the same time: see
    /// [`vcpus_per_core`].
    #[must_use]
    pub fn places(&self, node: NodeId) -> u32 {
        let share = |node: NodeId| self.shares.get(usize::from(node.0));
        let shares = || self.data_nodes().filter_map(share);
        let sum = |of: fn(&NodeShare) -> u32| shares().map(of).fold(0, u32::saturating_add);
        let per_core = vcpus_per_core(
            sum(|share| share.max_vcpus.into()),
            sum(|share| share.cores),
        );
        let own = share(node).filter(|_| self.data_nodes().contains(node));
        own.map_or(0, |own| own.cores.saturating_mul(per_core))
    }
}
const _: () = assert!(NODE_RECORDS + MAX_NODES * NODE_RECORD_SIZE <= VM_RECORD);
const _: () = assert!(VM_RECORD + VM_RECORD_SIZE <= COUNTERS);
const _: () = assert!(COUNTERS + MAX_VCPUS * COUNTERS_SIZE <= RingId::ConsoleOut.place().0);

/// How many vCPUs may share a core, if there is room for so many on so many
/// cores: as few as possible. The tables count places for vCPUs, and a core of
/// a node is as many of them.
#[must_use]
pub fn vcpus_per_core(max_vcpus: u32, cores: u32) -> u32 {
    max_vcpus.div_ceil(cores.max(1)).max(1)
}

/// Where the vCPUs are when the VM starts: on the cores of their nodes by
/// turns.
pub fn first_places(shares: &[NodeShare]) -> impl Iterator<Item = (VcpuId, Location)> {
    let on_node = |(node, share): (u16, &NodeShare)| {
        let cores = u16::try_from(share.cores).unwrap_or(u16::MAX).max(1);
        let vcpus = share.vcpus;
        (0..share.max_vcpus).map(move |vcpu| {
            let core = vcpu % cores;
            let node = NodeId(node);
            (u32::from(vcpu) < vcpus).then_some(Location { node, core })
        })
    };
    (0..)
        .map(VcpuId)
        .zip((0..).zip(shares).flat_map(on_node))
        .filter_map(|(vcpu, at)| Some((vcpu, at?)))
}

/// Guest addresses, in bytes, between which there is no RAM: what does not fit
/// below goes on above.
pub const RAM_GAP: Range<u64> = 3 << 30..4 << 30;

/// The guest address, in bytes, where the memory that comes later begins: behind
/// a VM's `memory` bytes, above the gap, and where a guest takes it as whole
/// blocks.
#[must_use]
pub const fn first_block_address(memory: u64) -> u64 {
    let above = memory.saturating_sub(RAM_GAP.start);
    RAM_GAP
        .end
        .saturating_add(above)
        .next_multiple_of(BLOCK_SIZE)
}

/// A block that may come, as all count them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockPlace {
    /// Which.
    pub id: BlockId,
    /// The node that the guest takes it to be near.
    pub home: NodeId,
    /// Its pieces of guest memory.
    pub pieces: Range<usize>,
    /// Its first guest address, in bytes.
    pub address: u64,
}

impl BlockPlace {
    /// The number that Linux gives it: it counts addresses in blocks as large.
    #[must_use]
    pub const fn linux_number(&self) -> u64 {
        self.address / BLOCK_SIZE
    }
}

/// The blocks that may come: node by node, behind all that the VM was started
/// with.
pub fn blocks(shares: &[NodeShare]) -> impl Iterator<Item = BlockPlace> {
    let started = shares.iter().map(|share| share.memory);
    let started = started.fold(0, u64::saturating_add);
    let base = first_block_address(started);
    let first = usize::try_from(started / LARGE_PAGE_SIZE).unwrap_or(usize::MAX);
    let homes = (0..).map(NodeId).zip(shares);
    let homes = homes.flat_map(|(node, share)| (0..share.blocks).map(move |_| node));
    (0..)
        .map(BlockId)
        .zip(homes)
        .take(MAX_BLOCKS)
        .map(move |(id, home)| {
            let start = first.saturating_add(usize::from(id.0) * PIECES_PER_BLOCK);
            let pieces = start..start.saturating_add(PIECES_PER_BLOCK);
            BlockPlace {
                id,
                home,
                pieces,
                address: base.saturating_add(u64::from(id.0) * BLOCK_SIZE),
            }
        })
}

/// What the table of instruction coherence is about, if the nodes give these
/// shares. All who use the table work it out alike.
#[must_use]
pub fn coherence_geometry(shares: &[NodeShare]) -> Geometry {
    let memory: u64 = shares
        .iter()
        .map(NodeShare::home)
        .fold(0, u64::saturating_add);
    let cores = shares.iter().map(|share| share.cores).max().unwrap_or(0);
    Geometry {
        frames: usize::try_from(memory / PAGE_SIZE).unwrap_or(0),
        nodes: shares.len(),
        slots: usize::try_from(cores).unwrap_or(0).clamp(1, MAX_SLOTS),
    }
}

/// How far a node has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum NodeState {
    /// Nothing heard of it yet.
    Absent = 0,
    /// Its hypervisor runs and has found the control region.
    Joined = 1,
    /// All its cores are in service.
    Ready = 2,
    /// It has ended, by request or by failure.
    Stopped = 3,
}

impl NodeState {
    /// The state with this number, if there is one.
    #[must_use]
    pub const fn from_raw(raw: u32) -> Option<Self> {
        match raw {
            0 => Some(Self::Absent),
            1 => Some(Self::Joined),
            2 => Some(Self::Ready),
            3 => Some(Self::Stopped),
            _ => None,
        }
    }
}

/// What has become of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum VmState {
    /// Its kernel has not been entered yet.
    NotStarted = 0,
    /// Its vCPUs run.
    Running = 1,
    /// The guest switched itself off.
    PoweredOff = 2,
    /// The guest asked for a reset.
    Reset = 3,
    /// A vCPU shut down: a triple fault, or a state the CPU refuses to enter.
    Crashed = 4,
    /// The guest wrote to its exit port: see [`VmRecord::exit_value`].
    Exited = 5,
    /// A node that had a part of it has died: no vCPU runs any more.
    Frozen = 6,
}

impl VmState {
    /// The state with this number, if there is one.
    #[must_use]
    pub const fn from_raw(raw: u32) -> Option<Self> {
        match raw {
            0 => Some(Self::NotStarted),
            1 => Some(Self::Running),
            2 => Some(Self::PoweredOff),
            3 => Some(Self::Reset),
            4 => Some(Self::Crashed),
            5 => Some(Self::Exited),
            6 => Some(Self::Frozen),
            _ => None,
        }
    }
}

/// What is counted for each vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Counter {
    /// Exits of any kind.
    Exits = 0,
    /// Exits for port I/O.
    ExitIo,
    /// Exits for MSR accesses.
    ExitMsr,
    /// Exits for CPUID.
    ExitCpuid,
    /// Exits for nested page faults.
    ExitNpf,
    /// Exits for HLT.
    ExitHlt,
    /// Exits because the host got an interrupt.
    ExitInterrupt,
    /// Exits for hypercalls.
    ExitHypercall,
    /// Exits for anything else.
    ExitOther,
    /// Interrupts injected.
    Injected,
    /// Inter-processor interrupts sent.
    IpiSent,
    /// Accesses to ports that nothing answers.
    UnknownPort,
    /// Accesses to MSRs that nothing answers.
    UnknownMsr,
    /// Accesses to guest physical addresses that nothing answers.
    UnknownAddress,
    /// Exceptions injected because the guest did something illegal.
    Faults,
    /// Instructions decoded to emulate an access.
    Decoded,
    /// Device accesses that another node has served.
    Forwarded,
}

impl Counter {
    /// Counters there is room for, per vCPU.
    pub const SLOTS: usize = 64;
    /// All counters with the names operators see.
    pub const ALL: [(Self, &'static str); 17] = [
        (Self::Exits, "exits"),
        (Self::ExitIo, "exit_io"),
        (Self::ExitMsr, "exit_msr"),
        (Self::ExitCpuid, "exit_cpuid"),
        (Self::ExitNpf, "exit_npf"),
        (Self::ExitHlt, "exit_hlt"),
        (Self::ExitInterrupt, "exit_interrupt"),
        (Self::ExitHypercall, "exit_hypercall"),
        (Self::ExitOther, "exit_other"),
        (Self::Injected, "injected"),
        (Self::IpiSent, "ipi_sent"),
        (Self::UnknownPort, "unknown_port"),
        (Self::UnknownMsr, "unknown_msr"),
        (Self::UnknownAddress, "unknown_address"),
        (Self::Faults, "faults"),
        (Self::Decoded, "decoded"),
        (Self::Forwarded, "forwarded"),
    ];
}

/// The byte rings between the guest's devices and the launcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingId {
    /// What the guest prints on its serial console.
    ConsoleOut,
    /// What the operator types on it.
    ConsoleIn,
    /// From the agent in the guest.
    AgentOut,
    /// To the agent in the guest.
    AgentIn,
}

impl RingId {
    /// Data that it has room for, in bytes.
    #[must_use]
    pub const fn capacity(self) -> usize {
        self.place().1
    }

    /// Offset, a multiple of a page, and data capacity in bytes.
    const fn place(self) -> (usize, usize) {
        match self {
            Self::ConsoleOut => (0x4_0000, 1 << 18),
            Self::ConsoleIn => (0x9_0000, 1 << 12),
            Self::AgentOut => (0x10_0000, 1 << 20),
            Self::AgentIn => (0x21_0000, 1 << 20),
        }
    }
}

const _: () = assert!(0x4_0000 + ring_size(1 << 18) <= 0x9_0000);
const _: () = assert!(0x9_0000 + ring_size(1 << 12) <= 0x10_0000);
const _: () = assert!(0x10_0000 + ring_size(1 << 20) <= 0x21_0000);
const _: () = assert!(0x21_0000 + ring_size(1 << 20) <= VCPU_HOMES);
const _: () = assert!(VCPU_HOMES + MAX_VCPUS * VCPU_HOME_SIZE <= NODE_COUNTERS);
const _: () = assert!(VCPU_RECORD + VCPU_RECORD_SIZE <= VCPU_HOME_SIZE);
const _: () = assert!(NODE_COUNTERS + MAX_NODES * NODE_COUNTERS_SIZE <= BLOCK_RECORDS);
const _: () = assert!(BLOCK_RECORDS + MAX_BLOCKS * BLOCK_RECORD_SIZE <= VCPU_IMAGES);
const _: () = assert!(VCPU_IMAGES + MAX_VCPUS * VCPU_IMAGE_SIZE <= MEMBERSHIP);
const _: () = assert!(MEMBERSHIP + Membership::SIZE <= PROOFS);
const _: () = assert!(PROOFS + MAX_NODES * PROOF_SIZE <= LOSSES);
const _: () = assert!((LOSSES + LossRecord::SIZE) as u64 <= BUNDLE_OFFSET);

/// What is known of a node.
///
/// ```text
///   0    state, a `NodeState`              the node writes
///   8    clock question: a number          the node writes
///   16   digest of its replica             see `ReplicaDigest`
///   64   clock answer: that number         node 0 writes
///   72   clock answer: node 0's TSC then   node 0 writes
///   96   vCPUs sent to its cores so far    who sends one
/// ```
#[derive(Clone, Copy, Debug)]
pub struct NodeRecord(SharedMem);

impl NodeRecord {
    fn word(&self, offset: usize) -> &AtomicU64 {
        self.0.atomic_u64(offset).expect("inside the record")
    }

    /// What the node says of its replica of the cluster.
    #[must_use]
    pub fn digest(&self) -> ReplicaDigest {
        let window = self.0.window(16, ReplicaDigest::SIZE);
        ReplicaDigest::new(window.expect("inside the record")).expect("large enough")
    }

    /// The number of the node's last question for node 0's clock; 0 if none.
    #[must_use]
    pub fn clock_question(&self) -> &AtomicU64 {
        self.word(8)
    }

    /// The number of the last question that node 0 has answered.
    #[must_use]
    pub fn clock_answered(&self) -> &AtomicU64 {
        self.word(64)
    }

    /// How many vCPUs have been sent to cores of this node.
    #[must_use]
    pub fn arrivals(&self) -> &AtomicU64 {
        self.word(96)
    }

    /// Node 0's TSC when it answered.
    #[must_use]
    pub fn clock_answer(&self) -> &AtomicU64 {
        self.word(72)
    }
}

/// What all nodes must agree on about the VM.
///
/// ```text
///   0    state, a `VmState`                          who stops it writes
///   8    rate of the TSC in kHz                      node 0 writes
///   16   guest TSC minus node 0's TSC, modulo 2^64   node 0 writes
///   24   what the guest wrote to its exit port        who stops it writes
///   32   vectors of level-triggered pins, 256 bits   node 0 writes
///   64   vCPUs that wait for a device access, one bit each
///   96   whether all fetch coherently: 0 unknown      node 0 writes
///   104  orders for vCPUs that have got further       who changes one
///   112  pieces that the guest can't do without       who hears that from it
///   120  bytes of memory that the operator wants      launcher writes
/// ```
#[derive(Clone, Copy, Debug)]
pub struct VmRecord(SharedMem);

impl VmRecord {
    fn word(&self, offset: usize) -> &AtomicU64 {
        self.0.atomic_u64(offset).expect("inside the record")
    }

    /// Rate of the guest's TSC in kHz.
    #[must_use]
    pub fn tsc_khz(&self) -> &AtomicU64 {
        self.word(8)
    }

    /// Guest TSC minus node 0's TSC, modulo 2^64.
    #[must_use]
    pub fn tsc_offset(&self) -> &AtomicU64 {
        self.word(16)
    }

    /// Whether instruction fetch is coherent on all nodes: 0 as long as that
    /// is not known, 1 if so.
    #[must_use]
    pub fn fetch(&self) -> &AtomicU64 {
        self.word(96)
    }

    /// Bytes of memory that the operator wants.
    #[must_use]
    pub fn desired_memory(&self) -> &AtomicU64 {
        self.word(120)
    }

    /// How often an order for a vCPU or for memory has been left or has got
    /// further: the devices' node looks at them when this has changed.
    #[must_use]
    pub fn orders(&self) -> &AtomicU64 {
        self.word(104)
    }

    /// Says that an order has been left or has got further. The devices' node
    /// must be rung besides, unless it looks soon by itself.
    pub fn count_order(&self) {
        // Release: what was written of the order is visible to who sees the
        // count.
        self.orders().fetch_add(1, Ordering::Release);
    }

    /// How many pieces of memory, from the first on, the guest can't go on
    /// without. As long as it has not said so, it needs all that it has, and
    /// all its vCPUs.
    #[must_use]
    pub fn vital_pieces(&self) -> Option<usize> {
        let pieces = usize::try_from(self.word(112).load(Ordering::Relaxed)).ok();
        pieces.filter(|pieces| *pieces > 0)
    }

    /// The guest can go on without other memory than its first so many pieces,
    /// and without any vCPU but its first.
    pub fn set_vital_pieces(&self, pieces: usize) {
        self.word(112).store(pieces as u64, Ordering::Relaxed);
    }

    /// What the guest wrote to its exit port, if it is [`VmState::Exited`].
    #[must_use]
    pub fn exit_value(&self) -> &AtomicU64 {
        self.word(24)
    }

    /// The words of the set of vectors that level-triggered pins send.
    #[must_use]
    pub fn level_vectors(&self) -> [&AtomicU64; 4] {
        core::array::from_fn(|index| self.word(32 + index * 8))
    }

    /// The words of the set of vCPUs that wait for a device access.
    pub fn waiting_for_devices(&self) -> impl Iterator<Item = &AtomicU64> {
        (0..MAX_VCPUS.div_ceil(64)).map(|index| self.word(64 + index * 8))
    }
}

/// Typed access to a mapped control region.
#[derive(Clone, Copy, Debug)]
pub struct ControlRegion {
    content: SharedMem,
}

impl ControlRegion {
    /// The control region in `region` (header included), or `None` if it is
    /// too small to be one.
    #[must_use]
    pub fn new(region: SharedMem) -> Option<Self> {
        let header = usize::try_from(CONTENT_OFFSET).ok()?;
        let content = region.window(header, region.len().checked_sub(header)?)?;
        (content.len() as u64 >= BUNDLE_OFFSET).then_some(Self { content })
    }

    /// A copy of the boot configuration.
    #[must_use]
    pub fn boot_config(&self) -> BootConfig {
        self.content
            .read(BOOT_CONFIG)
            .expect("`new` has checked the size")
    }

    /// Stores the boot configuration. Launcher only, before any node starts.
    pub fn set_boot_config(&self, config: &BootConfig) {
        self.content
            .write(BOOT_CONFIG, config)
            .expect("`new` has checked the size");
    }

    /// The bytes of a blob, or `None` if it is not inside the region or not
    /// aligned to 8 bytes.
    #[must_use]
    pub fn blob(&self, blob: Blob) -> Option<SharedMem> {
        self.content.window(
            usize::try_from(blob.offset).ok()?,
            usize::try_from(blob.len).ok()?,
        )
    }

    /// A node's record; the id must be below [`MAX_NODES`].
    #[must_use]
    pub fn node(&self, node: NodeId) -> Option<NodeRecord> {
        let node = usize::from(node.0);
        if node >= MAX_NODES {
            return None;
        }
        let offset = NODE_RECORDS + node * NODE_RECORD_SIZE;
        self.content
            .window(offset, NODE_RECORD_SIZE)
            .map(NodeRecord)
    }

    /// A node's [`NodeState`]; the id must be below [`MAX_NODES`].
    #[must_use]
    pub fn node_state(&self, node: NodeId) -> Option<&AtomicU32> {
        let node = usize::from(node.0);
        if node >= MAX_NODES {
            return None;
        }
        self.content
            .atomic_u32(NODE_RECORDS + node * NODE_RECORD_SIZE)
    }

    /// Who takes part in the rack.
    #[must_use]
    pub fn membership(&self) -> Membership {
        self.content
            .window(MEMBERSHIP, Membership::SIZE)
            .and_then(Membership::new)
            .expect("`new` has checked the size")
    }

    /// Two pages in which a node proves its platform; the id must be below
    /// [`MAX_NODES`].
    #[must_use]
    pub fn proof(&self, node: NodeId) -> Option<SharedMem> {
        let node = usize::from(node.0);
        (node < MAX_NODES).then_some(())?;
        self.content.window(PROOFS + node * PROOF_SIZE, PROOF_SIZE)
    }

    /// Counts words of shared memory that a node has refused as garbage. Only
    /// for that node.
    pub fn count_garbage(&self, node: NodeId, words: u64) {
        if let Some(counters) = self.node_counters(node) {
            counters.add(NodeCounter::Garbage, words);
        }
    }

    /// What a node has counted; the id must be below [`MAX_NODES`].
    #[must_use]
    pub fn node_counters(&self, node: NodeId) -> Option<NodeCounters> {
        let node = usize::from(node.0);
        if node >= MAX_NODES {
            return None;
        }
        let offset = NODE_COUNTERS + node * NODE_COUNTERS_SIZE;
        self.content
            .window(offset, NODE_COUNTERS_SIZE)
            .and_then(NodeCounters::new)
    }

    /// The VM's record.
    #[must_use]
    pub fn vm(&self) -> VmRecord {
        VmRecord(
            self.content
                .window(VM_RECORD, VM_RECORD_SIZE)
                .expect("`new` has checked the size"),
        )
    }

    /// The VM's [`VmState`].
    #[must_use]
    pub fn vm_state(&self) -> &AtomicU32 {
        self.content
            .atomic_u32(VM_RECORD)
            .expect("`new` has checked the size")
    }

    /// Marks a running VM as frozen: it has lost a node that it needs.
    pub fn freeze_vm(&self) {
        let (from, to) = (VmState::Running as u32, VmState::Frozen as u32);
        // Release: the loss is visible to who sees the state. A VM that has
        // ended in another way has ended.
        let _ = self
            .vm_state()
            .compare_exchange(from, to, Ordering::Release, Ordering::Relaxed);
    }

    /// One counter of one vCPU; the id must be below [`MAX_VCPUS`].
    #[must_use]
    pub fn counter(&self, vcpu: VcpuId, counter: Counter) -> Option<&AtomicU64> {
        let vcpu = usize::from(vcpu.0);
        if vcpu >= MAX_VCPUS {
            return None;
        }
        self.content
            .atomic_u64(COUNTERS + vcpu * COUNTERS_SIZE + counter as usize * 8)
    }

    /// The shared state of one vCPU; the id must be below [`MAX_VCPUS`].
    #[must_use]
    pub fn vcpu_home(&self, vcpu: VcpuId) -> Option<SharedMem> {
        let vcpu = usize::from(vcpu.0);
        if vcpu >= MAX_VCPUS {
            return None;
        }
        self.content
            .window(VCPU_HOMES + vcpu * VCPU_HOME_SIZE, VCPU_HOME_SIZE)
    }

    /// Where a vCPU is and what is asked for it; the id must be below
    /// [`MAX_VCPUS`].
    #[must_use]
    pub fn vcpu(&self, vcpu: VcpuId) -> Option<VcpuRecord> {
        let home = self.vcpu_home(vcpu)?;
        VcpuRecord::new(home.window(VCPU_RECORD, VCPU_RECORD_SIZE)?)
    }

    /// What is known of a block of hot-added memory; the id must be below
    /// [`MAX_BLOCKS`].
    #[must_use]
    pub fn block(&self, block: BlockId) -> Option<BlockRecord> {
        let block = usize::from(block.0);
        (block < MAX_BLOCKS).then_some(())?;
        let offset = BLOCK_RECORDS + block * BLOCK_RECORD_SIZE;
        BlockRecord::new(self.content.window(offset, BLOCK_RECORD_SIZE)?)
    }

    /// Room for all the state of a vCPU that moves; the id must be below
    /// [`MAX_VCPUS`].
    #[must_use]
    pub fn vcpu_image(&self, vcpu: VcpuId) -> Option<SharedMem> {
        let vcpu = usize::from(vcpu.0);
        if vcpu >= MAX_VCPUS {
            return None;
        }
        self.content
            .window(VCPU_IMAGES + vcpu * VCPU_IMAGE_SIZE, VCPU_IMAGE_SIZE)
    }

    /// Where the pieces of guest memory are; `None` if the map does not fit
    /// the VM.
    #[must_use]
    pub fn pieces(&self, config: &BootConfig) -> Option<PieceMap> {
        let nodes = usize::try_from(config.nodes).ok()?;
        let geometry = MapGeometry::of(config.shares.get(..nodes)?);
        PieceMap::new(self.blob(config.pieces)?, geometry)
    }

    /// Whether the VM can't go on without a node that has been put out: it has
    /// memory or a vCPU that the guest needs, or is the first, which owns the
    /// devices.
    ///
    /// What the node was about to take over stays where it is: it can't be
    /// needed for that later.
    #[must_use]
    pub fn needs(&self, node: NodeId, pieces: &PieceMap) -> bool {
        pieces.forget(node);
        let (vital, vcpus) = match self.vm().vital_pieces() {
            Some(pieces) => (pieces, 1),
            None => (usize::MAX, MAX_VCPUS),
        };
        node == NodeId(0)
            || self.vcpus_on(node).any(|vcpu| usize::from(vcpu.0) < vcpus)
            || pieces.pieces_on(node).any(|piece| piece < vital)
    }

    /// The vCPUs that are on a node.
    pub fn vcpus_on(&self, node: NodeId) -> impl Iterator<Item = VcpuId> + '_ {
        let is_there = move |vcpu: &VcpuId| {
            let place = self.vcpu(*vcpu).and_then(|record| record.place());
            place
                .and_then(Place::location)
                .is_some_and(|at| at.node == node)
        };
        (0..).map(VcpuId).take(MAX_VCPUS).filter(is_there)
    }

    /// What the VM has lost with nodes that it goes on without; the page holds
    /// nothing else, and a guest may be given it.
    #[must_use]
    pub fn losses(&self) -> LossRecord {
        LossRecord::new(self.losses_page()).expect("a page is enough")
    }

    /// The page of [`losses`](Self::losses).
    #[must_use]
    pub fn losses_page(&self) -> SharedMem {
        let page = self.content.window(LOSSES, LossRecord::SIZE);
        page.expect("`new` has checked the size")
    }

    /// The memory of one of the byte rings, in whole pages that hold nothing
    /// else: a guest may be given it.
    #[must_use]
    pub fn ring_pages(&self, ring: RingId) -> SharedMem {
        let (offset, capacity) = ring.place();
        let page = usize::try_from(PAGE_SIZE).expect("small");
        self.content
            .window(offset, ring_size(capacity).next_multiple_of(page))
            .expect("`new` has checked the size")
    }

    /// Where a vCPU was at its last exit. The node that runs it writes.
    ///
    /// # Panics
    /// If the id is not below [`MAX_VCPUS`].
    #[must_use]
    pub fn last_rip(&self, vcpu: VcpuId) -> &AtomicU64 {
        let place = VCPU_HOMES + usize::from(vcpu.0) * VCPU_HOME_SIZE + LAST_RIP;
        assert!(usize::from(vcpu.0) < MAX_VCPUS, "no such vCPU");
        self.content
            .atomic_u64(place)
            .expect("`new` has checked the size")
    }

    /// One of the byte rings.
    #[must_use]
    pub fn ring(&self, ring: RingId) -> ByteRing {
        let (offset, capacity) = ring.place();
        self.content
            .window(offset, ring_size(capacity))
            .and_then(ByteRing::new)
            .expect("`new` has checked the size")
    }
}
