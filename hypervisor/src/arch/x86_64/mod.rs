//! x86-64 hosts with AMD's SVM.

pub mod apic;
#[cfg(target_os = "none")]
pub mod boot;
pub mod cpu;
pub mod descriptors;
pub mod io;
pub mod mtrr;
pub mod paging;
pub mod pci;
pub mod resident;
pub mod svm;
pub mod time;
