//! Why a guest exited and what follows from it, in no processor's terms.

use vmm_shared::addr::{Gpa, VcpuId};
use vmm_shared::control::Counter;

use crate::fabric::keeper::Held;

/// Which way data goes, seen from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Into the guest's registers.
    In,
    /// Out of them.
    Out,
}

/// An access to an I/O port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortAccess {
    /// First port.
    pub port: u16,
    /// Direction.
    pub direction: Direction,
    /// Bytes: 1, 2 or 4.
    pub width: u8,
    /// Whether it is INS or OUTS, whose data lie in memory.
    pub string: bool,
    /// Address of the next instruction.
    pub next_rip: u64,
}

/// Why the guest stopped running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The host got an interrupt.
    HostInterrupt,
    /// CPUID.
    Cpuid,
    /// IRET, after an NMI.
    Iret,
    /// HLT.
    Halt,
    /// IN, OUT, INS or OUTS.
    Port(PortAccess),
    /// RDMSR.
    ReadMsr,
    /// WRMSR.
    WriteMsr,
    /// VMMCALL.
    Hypercall,
    /// XSETBV.
    Xsetbv,
    /// MOV to CR8.
    WriteCr8,
    /// MOV to or from DR7.
    DebugControl(Direction),
    /// RDPMC.
    Rdpmc,
    /// WBINVD or INVD.
    CacheInstruction,
    /// An instruction that this virtual processor doesn't have.
    Undefined,
    /// An exception that must not be left to the guest alone.
    Exception {
        /// Its vector.
        vector: u8,
        /// Its error code, 0 if it has none.
        error: u32,
    },
    /// An access that the nested page tables don't allow.
    NestedFault {
        /// The guest physical address.
        gpa: Gpa,
        /// The fault's error bits: 0 present, 1 write, 4 fetch; 32 final
        /// access, 33 walk of the guest's own tables.
        error: u64,
    },
    /// The guest's third fault in a row.
    Shutdown,
    /// The processor refused the vCPU's state.
    InvalidState,
    /// Anything else.
    Other {
        /// The processor's code for it.
        code: u64,
    },
}

impl Exit {
    /// Under what this exit is counted.
    #[must_use]
    pub const fn counter(&self) -> Counter {
        match self {
            Self::HostInterrupt => Counter::ExitInterrupt,
            Self::Cpuid => Counter::ExitCpuid,
            Self::Halt => Counter::ExitHlt,
            Self::Port(_) => Counter::ExitIo,
            Self::ReadMsr | Self::WriteMsr => Counter::ExitMsr,
            Self::Hypercall => Counter::ExitHypercall,
            Self::NestedFault { .. } => Counter::ExitNpf,
            _ => Counter::ExitOther,
        }
    }
}

/// An exception for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Its vector.
    pub vector: u8,
    /// Its error code, if it has one.
    pub error: Option<u32>,
}

impl Exception {
    /// Invalid opcode.
    pub const UD: Self = Self {
        vector: 6,
        error: None,
    };
    /// Double fault.
    pub const DF: Self = Self {
        vector: 8,
        error: Some(0),
    };
    /// General protection.
    pub const GP: Self = Self {
        vector: 13,
        error: Some(0),
    };
}

/// Why the VM stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel says that it has failed.
    GuestFailed,
    /// The guest wrote to its exit port.
    Exit {
        /// What it wrote.
        value: u32,
    },
    /// A triple fault.
    TripleFault {
        /// Where the guest was.
        rip: u64,
    },
    /// The processor refused the vCPU's state.
    InvalidState {
        /// Where the guest was.
        rip: u64,
    },
    /// An instruction that accesses a device in a way that isn't emulated.
    Unemulated {
        /// Where the guest was.
        rip: u64,
        /// What it accessed.
        gpa: Gpa,
    },
    /// The nodes don't agree any more on who may do what with a page.
    Incoherent {
        /// The page.
        gpa: Gpa,
    },
    /// An exit that should not happen.
    UnknownExit {
        /// The processor's code for it.
        code: u64,
    },
    /// A vCPU that was sent here can't be taken over.
    BadImage {
        /// Which.
        vcpu: VcpuId,
    },
    /// No vCPU may run on this node any more.
    Held(Held),
}

/// What an exit handler wants; only the run loop acts on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Go on where the registers say.
    Resume,
    /// Raise an exception at the instruction that exited.
    Inject(Exception),
    /// Wait until there is something to do.
    Block,
    /// Stop the whole VM.
    Stop(StopReason),
}
