//! Memory as the guest sees it.

pub mod barrier;
pub mod coherent;
mod guest;
mod holds;
pub mod slices;
#[cfg(any(test, feature = "testing"))]
pub mod sparse;
pub mod walk;
pub mod withdrawals;

pub use guest::{GuestMemory, GuestMemoryError};
