//! Memory as the guest sees it.

pub mod barrier;
pub mod coherent;
mod guest;
mod holds;
mod lost;
pub mod moves;
pub mod slices;
#[cfg(any(test, feature = "testing"))]
pub mod sparse;
pub mod walk;

pub use guest::{GuestMemory, GuestMemoryError};
