//! The emulated rack: what a rack of hosts is made of when there is none.
//!
//! Each node is one QEMU process running the hypervisor; the nodes and this
//! process (the *launcher*) share memory regions and doorbells. All of it is
//! anonymous (memfds, socket pairs, eventfds), so that nothing is left behind
//! however the launcher ends, and the nodes die with it.

pub mod boot;
mod console;
mod doorbell;
mod error;
mod image;
mod node;
mod preflight;
mod qemu;
mod rack;
mod region;
mod size;
mod spawn;
mod spec;
mod stream;

pub use boot::BootFiles;
pub use console::{ConsoleLog, ConsoleRead};
pub use error::RackError;
pub use node::NodeEnd;
pub use preflight::{Accelerator, Programs, beside_executable};
pub use rack::{LogSink, NodeStatus, Rack, RackEnd, RackStatus, StartOptions, VcpuCounters};
pub use size::Size;
pub use spec::{Guest, RackFile, RackSpec, RootFs, VmSpec};
pub use stream::{RingReader, RingWriter};
