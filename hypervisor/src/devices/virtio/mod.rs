//! Virtio devices, version 1.2, behind the memory-mapped transport.
//!
//! The guest owns the rings and may write anything into them at any time.
//! Every index, length and address is checked where it is used; a queue that
//! breaks the rules stops its device (DEVICE_NEEDS_RESET) until the driver
//! resets it. The work done in one call is bounded.

pub mod chain;
pub mod console;
pub mod mmio;
pub mod queue;

#[cfg(test)]
mod testing;

/// The device follows version 1 of the specification.
pub const F_VERSION_1: u64 = 1 << 32;
/// The rings carry event indices instead of mere flags.
pub const F_EVENT_IDX: u64 = 1 << 29;
