//! Byte streams between processes, and what else they wait for.

pub(crate) mod address;
pub(crate) mod counter;
pub(crate) mod epoll;
pub(crate) mod flight;
pub(crate) mod pipe;
pub(crate) mod socket;
pub(crate) mod terminal;
