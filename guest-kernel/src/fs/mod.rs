//! The name space: one tree, in memory, over a read-only root image.

pub(crate) mod ext4;
pub(crate) mod locks;
pub(crate) mod names;
pub(crate) mod node;
pub(crate) mod proc;
pub(crate) mod setup;
pub(crate) mod walk;

use node::NodeId;
use proc::ProcPlace;

/// `st_dev` of the root with its writable layer.
pub(crate) const ROOT_DEVICE: u32 = 1;
/// `st_dev` of /proc.
pub(crate) const PROC_DEVICE: u32 = 2;
/// `st_dev` of /dev, /sys, /tmp and their like.
pub(crate) const MEMORY_DEVICE: u32 = 3;

/// Something that has a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Node(NodeId),
    Proc(ProcPlace),
}
