//! Everything that can keep a rack from starting, in one line each: what is
//! wrong, and what to do about it.

use std::io;
use std::path::PathBuf;

use vmm_shared::addr::NodeId;

use crate::size::Size;

/// Why a rack did not start or did not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RackError {
    /// More nodes than this version can join.
    #[error(
        "a rack of {0} nodes is not supported yet: this version runs a VM on one node; use --nodes 1"
    )]
    ManyNodes(u32),
    /// A rack without nodes or cores.
    #[error("a rack needs at least one node and one core per node; check --nodes and --cores")]
    EmptyRack,
    /// More cores than the platform of a node can have.
    #[error("{asked} cores per node is more than a node can have; use --cores {most} or fewer")]
    TooManyCores {
        /// Cores asked for.
        asked: u32,
        /// The most there can be.
        most: u32,
    },
    /// A VM without vCPUs.
    #[error("a VM needs at least one vCPU; use --vcpus 1 or more")]
    NoVcpus,
    /// More vCPUs than there are cores.
    #[error(
        "{vcpus} vCPUs do not fit the rack's {cores} core(s); use --vcpus {cores} or fewer, or a rack with more --cores"
    )]
    TooManyVcpus {
        /// vCPUs asked for.
        vcpus: u32,
        /// Cores in the rack.
        cores: u32,
    },
    /// Less memory than a guest can boot in.
    #[error("{memory} of memory is too little for a VM; use --memory {least} or more")]
    MemoryTooSmall {
        /// Memory asked for.
        memory: Size,
        /// The least that works.
        least: Size,
    },
    /// Memory that is no multiple of a large page.
    #[error("{memory} of memory is not a multiple of 2M; use --memory {below} or {above}")]
    MemoryNotAligned {
        /// Memory asked for.
        memory: Size,
        /// The nearest legal size below.
        below: Size,
        /// The nearest legal size above.
        above: Size,
    },
    /// More memory than the rack gives.
    #[error(
        "{memory} of memory does not fit the rack's {total}; use --memory {total} or less, or a bigger --node-memory"
    )]
    MemoryTooLarge {
        /// Memory asked for.
        memory: Size,
        /// What all nodes give together.
        total: Size,
    },
    /// A rack description that can't be used.
    #[error("{path}: {reason}")]
    RackFile {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A file that is needed is not there or not readable.
    #[error("{what} {path}: {error}; {hint}")]
    File {
        /// What the file is.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// What the operating system said.
        error: io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// A guest kernel that can't be booted.
    #[error("kernel {path}: {reason}; use an x86-64 Linux bzImage of version 3.8 or later")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What its header lacks.
        reason: String,
    },
    /// A kernel command line that is too long or holds a NUL.
    #[error("the kernel command line has {len} bytes; shorten --append to at most {most} in all")]
    CommandLine {
        /// Bytes it has.
        len: usize,
        /// Bytes it may have.
        most: usize,
    },
    /// A root image in another build's format, or damaged.
    #[error(
        "root image {path}: {reason}; remove the file to have it built again, or give another --rootfs"
    )]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// No QEMU.
    #[error(
        "QEMU not found ({program}: {error}); install qemu-system-x86 or set VIADUCT_QEMU to its path"
    )]
    QemuMissing {
        /// The program that was tried.
        program: PathBuf,
        /// What the operating system said.
        error: io::Error,
    },
    /// A QEMU whose version can't be told.
    #[error(
        "{program} does not look like QEMU (its --version says {said:?}); set VIADUCT_QEMU to a qemu-system-x86_64"
    )]
    NotQemu {
        /// The program that was tried.
        program: PathBuf,
        /// The first line it printed.
        said: String,
    },
    /// A QEMU that is too old.
    #[error(
        "{program} is version {found}, but 7.2 or newer is needed; upgrade qemu-system-x86 or set VIADUCT_QEMU"
    )]
    QemuTooOld {
        /// The program that was tried.
        program: PathBuf,
        /// Its version.
        found: String,
    },
    /// KVM was demanded where it can't nest.
    #[error("KVM with nested SVM is not available here: {0}; unset VIADUCT_ACCEL to use emulation")]
    NoNestedSvm(&'static str),
    /// An unknown accelerator was demanded.
    #[error("VIADUCT_ACCEL={0:?} is not known; use \"kvm\" or \"tcg\", or unset it")]
    UnknownAccelerator(String),
    /// A node ended, or could not boot.
    #[error("node {} {what}: {cause}", node.0)]
    NodeFailed {
        /// The node.
        node: NodeId,
        /// What it did.
        what: &'static str,
        /// What it said last.
        cause: String,
    },
    /// A node runs but has not joined the rack.
    #[error(
        "node {} has not joined the rack within {seconds} s: {cause}; see its log with -v", node.0
    )]
    NodeSilent {
        /// The node.
        node: NodeId,
        /// How long it was given.
        seconds: u64,
        /// What it said last.
        cause: String,
    },
    /// The host refused a resource.
    #[error("cannot {doing}: {error}; check the host's limits on memory, processes and open files")]
    Host {
        /// What was being done.
        doing: &'static str,
        /// What the operating system said.
        error: io::Error,
    },
}

impl RackError {
    pub(crate) fn host(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Host { doing, error }
    }

    pub(crate) fn host_errno(doing: &'static str) -> impl FnOnce(rustix::io::Errno) -> Self {
        move |errno| Self::Host {
            doing,
            error: errno.into(),
        }
    }
}
