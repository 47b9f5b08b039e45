//! Memory as the guest sees it.

pub mod barrier;
pub mod coherent;
mod guest;
mod holds;
pub mod slices;
pub mod walk;

pub use guest::{GuestMemory, GuestMemoryError};

#[cfg(test)]
pub(crate) use guest::testing;
