//! The control region: what the launcher and the hypervisors tell each other.
//!
//! One per rack. Offsets are into the region's content (behind
//! [`CONTENT_OFFSET`](crate::region::CONTENT_OFFSET)):
//!
//! ```text
//!   0x000000  boot configuration     launcher writes, once, before any node starts
//!   0x001000  node status, 64 B each one writer: the node
//!   0x002000  VM status              one writer: the node that runs vCPU 0
//!   0x004000  vCPU counters, 512 B each, one writer: the node that runs the vCPU
//!   0x040000  rings: console out, console in, agent out, agent in
//!   0x400000  boot bundle            kernel, initramfs: launcher writes, once
//! ```

use core::sync::atomic::{AtomicU32, AtomicU64};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::{MAX_NODES, MAX_VCPUS, NodeId, VcpuId};
use crate::region::CONTENT_OFFSET;
use crate::ring::{ByteRing, ring_size};
use crate::shm::SharedMem;

const BOOT_CONFIG: usize = 0;
const NODE_STATUS: usize = 0x1000;
const NODE_STATUS_SIZE: usize = 64;
const VM_STATUS: usize = 0x2000;
const COUNTERS: usize = 0x4000;
const COUNTERS_SIZE: usize = 8 * Counter::SLOTS;
/// Where the launcher puts kernel and initramfs, in bytes of content.
pub const BUNDLE_OFFSET: u64 = 4 << 20;

/// The doorbell id of the launcher; nodes use their [`NodeId`].
pub const LAUNCHER_PEER: u16 = 64;
const _: () = assert!(LAUNCHER_PEER as usize == MAX_NODES);

/// Longest kernel command line, in bytes.
pub const MAX_COMMAND_LINE: usize = 2048;

/// A blob in the boot bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Blob {
    /// First byte, counted from the start of the content.
    pub offset: u64,
    /// Bytes; 0 if there is none.
    pub len: u64,
}

/// What the VM is and what it boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BootConfig {
    /// Nodes in the rack.
    pub nodes: u32,
    /// vCPUs of the VM.
    pub vcpus: u32,
    /// Guest memory in bytes, a multiple of 2 MiB.
    pub memory: u64,
    /// `CLOCK_REALTIME` of the launcher when the nodes' clocks started, in ns.
    pub wall_clock_ns: u64,
    /// The guest kernel.
    pub kernel: Blob,
    /// The initial RAM file system.
    pub initramfs: Blob,
    /// Bytes of the root image that the guest gets as persistent memory; 0 if
    /// there is none.
    pub image_len: u64,
    /// Bytes of `command_line` in use.
    pub command_line_len: u32,
    /// Zero.
    pub reserved: u32,
    /// The kernel command line.
    pub command_line: [u8; MAX_COMMAND_LINE],
}

const _: () = assert!(size_of::<BootConfig>() == 72 + MAX_COMMAND_LINE);
const _: () = assert!(size_of::<BootConfig>() <= NODE_STATUS - BOOT_CONFIG);
const _: () = assert!(NODE_STATUS + MAX_NODES * NODE_STATUS_SIZE <= VM_STATUS);
const _: () = assert!(COUNTERS + MAX_VCPUS * COUNTERS_SIZE <= RingId::ConsoleOut.place().0);

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
}

impl Counter {
    /// Counters there is room for, per vCPU.
    pub const SLOTS: usize = 64;
    /// All counters with the names operators see.
    pub const ALL: [(Self, &'static str); 16] = [
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
    /// Offset and data capacity in bytes.
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
const _: () = assert!(0x21_0000 + ring_size(1 << 20) as u64 <= BUNDLE_OFFSET);

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

    /// A node's [`NodeState`]; the id must be below [`MAX_NODES`].
    #[must_use]
    pub fn node_state(&self, node: NodeId) -> Option<&AtomicU32> {
        let node = usize::from(node.0);
        if node >= MAX_NODES {
            return None;
        }
        self.content
            .atomic_u32(NODE_STATUS + node * NODE_STATUS_SIZE)
    }

    /// The VM's [`VmState`].
    #[must_use]
    pub fn vm_state(&self) -> &AtomicU32 {
        self.content
            .atomic_u32(VM_STATUS)
            .expect("`new` has checked the size")
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
