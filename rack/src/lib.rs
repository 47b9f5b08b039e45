//! The emulated rack: what a rack of hosts is made of when there is none.
//!
//! Each node is one QEMU process running the hypervisor; the nodes and this
//! process (the *launcher*) share memory regions and doorbells. All of it is
//! anonymous (memfds, socket pairs, eventfds), so that nothing is left behind
//! however the launcher ends, and the nodes die with it.

pub mod boot;
mod cluster;
mod console;
mod doorbell;
mod elastic;
mod error;
mod fault;
mod fleet;
mod founding;
mod hot_memory;
mod image;
mod memory;
mod node;
mod preflight;
mod qemu;
mod rack;
mod rack_file;
mod region;
mod size;
mod slices;
mod spawn;
mod spec;
mod status;
mod stream;
mod watch;

pub use boot::{BootFiles, ModuleFile};
pub use cluster::ClusterMember;
pub use console::{ConsoleLog, ConsoleRead};
pub use elastic::VcpuStatus;
pub use error::RackError;
pub use fault::Faults;
pub use founding::{DEFAULT_POLICY, VM};
pub use guest_image::Protocol;
pub use hot_memory::{HotMemory, MemoryError};
pub use node::NodeEnd;
pub use preflight::{Accelerator, Programs, beside_executable};
pub use rack::{JOIN_LIMIT, LogSink, Rack, RackEnd, StartOptions};
pub use rack_file::{RackFile, RackFileNode};
pub use size::Size;
pub use slices::{MemoryRun, SliceError};
pub use spec::{BootBySpec, Guest, NodeSpec, PlatformSpec, RackSpec, Role, RootFs, VmSpec};
pub use status::{NodeMemory, NodeStatus, RackStatus, VcpuCounters};
pub use stream::{RingReader, RingWriter};
