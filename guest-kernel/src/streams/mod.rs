//! Byte streams between processes.

pub(crate) mod pipe;
pub(crate) mod terminal;
