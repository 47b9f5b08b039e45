//! Memory as the guest sees it.

mod guest;

pub use guest::{GuestMemory, GuestMemoryError};
