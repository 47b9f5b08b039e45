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
    /// More nodes than an emulated rack can have.
    #[error(
        "a rack of {asked} nodes is more than one host can emulate; use --nodes {most} or fewer"
    )]
    TooManyNodes {
        /// Nodes asked for.
        asked: u32,
        /// The most there can be.
        most: u32,
    },
    /// A rack without nodes.
    #[error("a rack needs at least one node; use --nodes 1 or more")]
    EmptyRack,
    /// A node without cores.
    #[error("node {} has no cores; give it at least one (--cores, or cores in the rack file)", node.0)]
    NoCores {
        /// The node.
        node: NodeId,
    },
    /// More cores than the platform of a node can have.
    #[error("node {}: {asked} cores are more than a node can have; use {most} or fewer", node.0)]
    TooManyCores {
        /// The node.
        node: NodeId,
        /// Cores asked for.
        asked: u32,
        /// The most there can be.
        most: u32,
    },
    /// More cores than a VM could use.
    #[error("{cores} cores in all are more than a rack can have; use {most} or fewer")]
    TooManyCoresInAll {
        /// Cores asked for.
        cores: u32,
        /// The most there can be.
        most: usize,
    },
    /// The first node owns the VM's devices.
    #[error(
        "node 0 owns the VM's devices, so it can't have the role control; list a data node first"
    )]
    FirstIsControl,
    /// The scheduler has found no place for the VM.
    #[error("the VM has no place in the rack: {reason}")]
    NoPlacement {
        /// Why, in the scheduler's words.
        reason: String,
    },
    /// The cluster's log can't be used.
    #[error("the cluster's log does not work: {reason}; this is a defect")]
    Log {
        /// Why.
        reason: String,
    },
    /// Nobody decides in this rack.
    #[error(
        "this rack has no control node, so its shape stays as it is; start one with --control 1"
    )]
    NoControl,
    /// Who decides is gone.
    #[error("node {}, which decides in this rack, is gone; start it again with: viaduct node join {}", node.0, node.0)]
    ControlGone {
        /// The node.
        node: NodeId,
    },
    /// Who decides does not answer.
    #[error("node {}, which decides in this rack, does not answer; it may still do what it was asked: see viaduct events", node.0)]
    ControlSilent {
        /// The node.
        node: NodeId,
    },
    /// A node that can't be started while the VM runs.
    #[error("node {} {why}", node.0)]
    NoJoin {
        /// The node.
        node: NodeId,
        /// What keeps it, as in "node 1 …".
        why: &'static str,
    },
    /// A node's memory that can't be given in large pages.
    #[error(
        "node {}: {memory} of memory is not a multiple of 2M, at least 2M; use {below}{}", node.0, or(*above, *below)
    )]
    NodeMemory {
        /// The node.
        node: NodeId,
        /// The memory asked for.
        memory: Size,
        /// The nearest legal size below.
        below: Size,
        /// The nearest legal size above.
        above: Size,
    },
    /// A VM without vCPUs.
    #[error("a VM needs at least one vCPU; use --vcpus 1 or more")]
    NoVcpus,
    /// More vCPUs than the cores can share.
    #[error(
        "{vcpus} vCPUs are too many for the rack's {cores} core(s); use --vcpus {most} or fewer, or a rack with more --cores"
    )]
    TooManyVcpus {
        /// vCPUs asked for.
        vcpus: u32,
        /// Cores in the rack.
        cores: u32,
        /// The most that they run.
        most: u32,
    },
    /// Room for fewer vCPUs than there are, or for more than can be.
    #[error("there can't be room for {max_vcpus} vCPUs; use --max-vcpus from {least} to {most}")]
    MaxVcpus {
        /// Room asked for.
        max_vcpus: u32,
        /// vCPUs at the start.
        least: u32,
        /// The most that the rack's cores run.
        most: u32,
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
    #[error(
        "kernel {path}: {reason}; use an x86-64 Linux bzImage of version 3.8 or later, or an ELF image with a multiboot 1 header or a PVH note"
    )]
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
    /// More modules than an image can have.
    #[error("an image can have {most} modules; leave out some --module")]
    Modules {
        /// The most there can be.
        most: usize,
    },
    /// A module's command line that is too long or holds a NUL.
    #[error("module {path}: its command line is too long; use at most {most} bytes")]
    ModuleWords {
        /// The module's file.
        path: PathBuf,
        /// The most bytes there can be.
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
    /// A node runs but does not come into service.
    #[error("node {} {what} within {seconds} s: {cause}; see its log with -v", node.0)]
    NodeSilent {
        /// The node.
        node: NodeId,
        /// What it has not done.
        what: &'static str,
        /// How long it was given.
        seconds: u64,
        /// What it said last.
        cause: String,
    },
    /// A node is cut off from its peers' doorbells.
    #[error("node {} cannot join: its doorbell server is gone; start the rack again", node.0)]
    NoDoorbell {
        /// The node.
        node: NodeId,
    },
    /// Somebody has written into a region's header.
    #[error("the {region} is damaged ({damage}): node {} {what}: {cause}", node.0)]
    RegionDamaged {
        /// Which region.
        region: String,
        /// What is wrong with it.
        damage: String,
        /// The node that could not go on.
        node: NodeId,
        /// What it did.
        what: &'static str,
        /// What it said last.
        cause: String,
    },
    /// `VIADUCT_FAULT` is not of its form.
    #[error("VIADUCT_FAULT={0:?} is not known; see docs/console.md, or unset it")]
    UnknownFault(String),
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

/// The second of two alternatives, if it is one.
fn or(other: Size, first: Size) -> String {
    if other == first {
        return String::new();
    }
    format!(" or {other}")
}
