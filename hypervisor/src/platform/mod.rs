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

use vmm_shared::addr::Gpa;

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

/// The shape of the virtual machine, as its firmware tables declare it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlatformConfig {
    /// vCPUs and RAM, and which nodes they come from.
    pub topology: Topology,
    /// The root image, if there is one.
    pub image: Option<PmemRange>,
}
