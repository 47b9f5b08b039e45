//! The page of time data: the kernel writes it, programs read it.
//!
//! There is one for all programs and nodes. The guest's TSC is the same on
//! every vCPU wherever it runs, and its rate never changes, so time is one
//! product; what may change is one word. A sequence to check would protect
//! nothing.

use core::sync::atomic::AtomicU64;

/// What is at the start of the page.
#[repr(C)]
pub(crate) struct Clock {
    /// Nanoseconds of a tick, times 2^32.
    pub(crate) ns_per_tick: AtomicU64,
    /// Wall-clock time when ticks were 0, in ns.
    pub(crate) boot_wall_ns: AtomicU64,
}

/// Bytes of the page, which lies right before the shared object.
pub(crate) const CLOCK_PAGE: usize = 4096;

/// Nanoseconds since the VM was made. The kernel's calls use the same, so
/// that no clock goes backwards from one way of asking to the other.
pub(crate) fn nanoseconds(ticks: u64, ns_per_tick: u64) -> u64 {
    let ns = u128::from(ticks) * u128::from(ns_per_tick);
    u64::try_from(ns >> 32).unwrap_or(u64::MAX)
}
