//! Viaduct's hypervisor, all but its entry point.
//!
//! Everything outside `arch` compiles and is tested on the host: devices are
//! register machines, exit handlers return outcomes, and only the run loop
//! acts on them.

#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod arch;
pub mod control;
pub mod devices;
pub mod fabric;
pub mod loader;
pub mod mem;
#[cfg(target_os = "none")]
pub mod node;
pub mod platform;
pub mod vcpu;
pub mod vm;
