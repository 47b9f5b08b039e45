//! The machine that a guest sees: where things are, what the firmware tables
//! say of them, and how the CPU answers questions about itself.
//!
//! Everything here is a table or builds one. Nothing here runs a device or
//! touches a vCPU: exit handlers look a rule up and act on it.

pub mod acpi;
pub mod cpuid;
#[cfg(test)]
pub(crate) mod golden;
pub mod layout;
pub mod msr;
pub mod ports;
pub mod topology;

pub use layout::RamRange;
pub use topology::{Domain, PlatformNode, Topology, TopologyError};

use guest_image::Protocol;
use vmm_shared::addr::Gpa;
use vmm_shared::control::Platform;

/// How a guest finds a root image.
///
/// Linux gives a persistent-memory range the page descriptors that file
/// systems need for direct access (DAX) only if it comes from E820, or if the
/// range itself begins with an information block that asks for them; and it
/// takes a range as read-only only if the NFIT says that it is not armed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PmemInterface {
    /// An E820 entry of type 12: `/dev/pmem0` with DAX, for an image that
    /// starts with its file system. Mount it read-only to keep it so.
    E820,
    /// An NVDIMM in the NFIT, marked as not armed: `/dev/pmem0`, read-only,
    /// and with DAX only for an image that starts with an `fsdax` block.
    Nfit,
}

/// A persistent-memory range: a root image that the guest maps directly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PmemRange {
    /// Where the guest sees it.
    pub gpa: Gpa,
    /// Its bytes, a multiple of 2 MiB.
    pub len: u64,
    /// How the guest is told of it.
    pub interface: PmemInterface,
}

/// What a VM is for, and so what it has and how it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    /// How its guest is booted, and so what it expects. Multiboot and PVH
    /// images get what bare-metal programs do: an exit port, `fw_cfg`, and
    /// local APICs in xAPIC mode. The paravirtual guest reaches the launcher
    /// by the shared rings themselves: see [`vmm_shared::pv`].
    pub protocol: Protocol,
    /// Whether it has a PC's old devices.
    pub platform: Platform,
}

impl Machine {
    /// The machine of a Linux guest.
    pub const LINUX: Self = Self {
        protocol: Protocol::Linux,
        platform: Platform::Lean,
    };

    /// Whether a bare-metal program runs in it.
    #[must_use]
    pub const fn is_bare(self) -> bool {
        matches!(self.protocol, Protocol::Multiboot | Protocol::Pvh)
    }

    /// Whether the paravirtual guest runs in it.
    #[must_use]
    pub const fn is_paravirtual(self) -> bool {
        matches!(self.protocol, Protocol::Paravirtual)
    }

    /// Whether its vCPUs and memory can come and go: its guest has drivers for
    /// that.
    #[must_use]
    pub const fn has_hotplug(self) -> bool {
        matches!(self.protocol, Protocol::Linux)
    }

    /// Whether it has a PC's old devices.
    #[must_use]
    pub const fn is_legacy(self) -> bool {
        matches!(self.platform, Platform::Legacy)
    }
}

/// The shape of the virtual machine, as its firmware tables declare it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlatformConfig {
    /// vCPUs and RAM, and which nodes they come from.
    pub topology: Topology,
    /// The root image, if there is one.
    pub image: Option<PmemRange>,
    /// What it is for.
    pub machine: Machine,
}
