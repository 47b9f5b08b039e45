//! AMD's Secure Virtual Machine extension.
//!
//! Manual: AMD64 vol. 2, chapter 15. The hypervisor runs with RFLAGS.IF set
//! and holds interrupts back with GIF around the world switch, so that no STI
//! stands before VMRUN.

pub mod bitmaps;
pub mod exit;
pub mod npt;
pub mod state;
pub mod switch;
pub mod vmcb;
