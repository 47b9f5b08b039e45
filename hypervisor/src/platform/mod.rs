//! The machine that a guest sees: where things are, what the firmware tables
//! say of them, and how the CPU answers questions about itself.
//!
//! Everything here is a table or builds one. Nothing here runs a device or
//! touches a vCPU: exit handlers look a rule up and act on it.

pub mod cpuid;
#[cfg(test)]
pub(crate) mod golden;
pub mod layout;
pub mod msr;
pub mod ports;

pub use layout::RamRange;

use vmm_shared::addr::Gpa;

/// A persistent-memory range: a root image that the guest maps directly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PmemRange {
    /// Where the guest sees it.
    pub gpa: Gpa,
    /// Its bytes, a multiple of 2 MiB.
    pub len: u64,
}

/// The shape of the virtual machine, as its firmware tables declare it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlatformConfig {
    /// vCPUs; their APIC ids are 0, 1, 2, …
    pub vcpus: u16,
    /// RAM in bytes.
    pub memory: u64,
    /// The root image, if there is one.
    pub image: Option<PmemRange>,
}
