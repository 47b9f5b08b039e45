//! Memory as the guest sees it.

mod guest;
pub mod walk;

pub use guest::{GuestMemory, GuestMemoryError};
