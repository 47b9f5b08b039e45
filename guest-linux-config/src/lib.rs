//! The stock Linux guest: its kernel, its root file systems, its command
//! line, and the client of the agent that runs commands in it.
//!
//! Kernel and userland are Debian's own, taken as packages from the sources
//! that the host's apt is configured with; see [`Images`].

pub mod agent_client;
pub mod command_line;
mod error;
mod images;

pub use error::{ImageError, KernelProblem};
pub use images::{Images, KernelSource, Root, Stage, region_len};
