//! The command line of a node: every QEMU flag that Viaduct uses, with its
//! reason.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use vmm_shared::addr::NodeId;

use crate::preflight::Accelerator;
use crate::spawn::inherited_path;

/// RAM of the node itself, in MiB: the hypervisor's own, its page tables and
/// the firmware's. Guest memory comes from the regions.
const OWN_MEMORY_MIB: u32 = 64;

/// A region as a node gets it.
#[derive(Debug)]
pub(crate) struct RegionWindow {
    /// The region's file, to be inherited.
    pub file: OwnedFd,
    /// Its length, a power of two.
    pub len: u64,
    /// Who sees what this node writes.
    pub sharing: Sharing,
}

/// Who sees what a node writes into a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// All who have the region.
    Shared,
    /// This node alone: the file never changes.
    Private,
}

/// Whether a node's locked instructions are atomic towards other processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Atomics {
    /// They are.
    Exact,
    /// As a fault, on a node with one core, they are not under TCG.
    Broken,
}

/// What a node is started with.
#[derive(Debug)]
pub(crate) struct NodeConfig<'a> {
    pub node: NodeId,
    pub rack: &'a str,
    pub cores: u32,
    /// Doorbell vectors: the most cores that any node of the rack has.
    pub vectors: u32,
    pub accelerator: Accelerator,
    pub atomics: Atomics,
    pub hypervisor: &'a Path,
    /// The node's end of the doorbell connection, to be inherited.
    pub doorbell: &'a OwnedFd,
    pub regions: &'a [RegionWindow],
}

#[derive(Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn flag(&mut self, name: &str) {
        self.0.push(name.into());
    }

    fn pair(&mut self, name: &str, value: impl Into<OsString>) {
        self.0.push(name.into());
        self.0.push(value.into());
    }
}

/// The arguments of a node's QEMU.
pub(crate) fn arguments(config: &NodeConfig<'_>) -> Vec<OsString> {
    let node = config.node.0;
    let mut qemu = Arguments::default();

    // Tells nodes apart in `ps`.
    qemu.pair("-name", format!("viaduct-{}-node{node}", config.rack));
    // Nothing from the user's QEMU configuration, no default devices, no
    // window, no monitor: a node has what is listed here.
    qemu.flag("-no-user-config");
    qemu.flag("-nodefaults");
    qemu.pair("-display", "none");
    // A modern chipset with 64-bit PCI windows, without the devices that the
    // firmware would spend time on.
    qemu.pair("-machine", "q35,sata=off,smbus=off,usb=off,vmport=off");
    match config.accelerator {
        Accelerator::Kvm => {
            qemu.pair("-accel", "kvm");
            // Everything the host has, SVM with all its extras included.
            qemu.pair("-cpu", cpu_model("host"));
        }
        Accelerator::Tcg => {
            // A thread per core. With maxcpus below, this is also what makes
            // atomic instructions atomic towards other processes.
            qemu.pair("-accel", "tcg,thread=multi");
            // Everything TCG knows, SVM included.
            qemu.pair("-cpu", cpu_model("max"));
        }
    }
    // With a single possible CPU, TCG compiles LOCK instructions to plain
    // loads and stores, and updates of memory shared with other processes are
    // lost. A second possible CPU prevents that; it need not exist.
    // Its first processor starts the others and sleeps, where there are several
    // (see the hypervisor's `has_spare_core`).
    let has_spare = config.accelerator == Accelerator::Tcg && config.cores > 1;
    let processors = config.cores + u32::from(has_spare);
    let possible = match config.atomics {
        Atomics::Exact => processors.max(2),
        Atomics::Broken => processors,
    };
    qemu.pair("-smp", format!("{processors},maxcpus={possible}"));
    qemu.pair("-m", format!("{OWN_MEMORY_MIB}M"));
    // A node whose CPU triple-faults ends, and is reported; it never reboots
    // into a rack that has gone on without it.
    qemu.flag("-no-reboot");

    // The hypervisor: an ELF file with a PVH note, entered in 32-bit mode.
    qemu.pair("-kernel", config.hypervisor);
    let spare = if has_spare { " spare" } else { "" };
    qemu.pair("-append", format!("node={node}{spare}"));

    // The hypervisor's log: one OUT per byte, to standard output.
    qemu.pair("-chardev", "file,id=log,path=/dev/stdout");
    qemu.pair("-device", "isa-debugcon,iobase=0xe9,chardev=log");
    // Writing v to this port ends QEMU with status 2v+1.
    qemu.pair("-device", "isa-debug-exit,iobase=0xf4,iosize=4");

    // Control region and doorbell: both come over the inherited socket.
    let socket = config.doorbell.as_raw_fd();
    qemu.pair("-chardev", format!("socket,id=doorbell,fd={socket}"));
    // A vector for each core of a node: a doorbell says who is to look, and
    // shared memory at what. The number bounds those of peers, too.
    let vectors = config.vectors;
    qemu.pair(
        "-device",
        format!("ivshmem-doorbell,chardev=doorbell,vectors={vectors}"),
    );

    // All other regions are plain windows of memory, found by their headers.
    for (index, region) in config.regions.iter().enumerate() {
        let path = inherited_path(&region.file);
        let len = region.len;
        // Private: writes go to this process's copy of the page, so that a
        // cached image can never change.
        let share = match region.sharing {
            Sharing::Shared => "on",
            Sharing::Private => "off",
        };
        qemu.pair(
            "-object",
            format!(
                "memory-backend-file,id=region{index},mem-path={path},size={len},share={share}"
            ),
        );
        qemu.pair("-device", format!("ivshmem-plain,memdev=region{index}"));
    }
    qemu.0
}

/// `VIADUCT_CPU` overrides the CPU model, to try nodes with less.
fn cpu_model(default: &str) -> String {
    std::env::var("VIADUCT_CPU").unwrap_or_else(|_| default.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(cores: u32, accelerator: Accelerator) -> String {
        let file = || OwnedFd::from(tempfile::tempfile().expect("a file"));
        let config = NodeConfig {
            node: NodeId(3),
            rack: "test",
            cores,
            vectors: 4,
            accelerator,
            atomics: Atomics::Exact,
            hypervisor: Path::new("/h"),
            doorbell: &file(),
            regions: &[RegionWindow {
                file: file(),
                len: 4 << 20,
                sharing: Sharing::Private,
            }],
        };
        arguments(&config)
            .iter()
            .map(|argument| argument.to_string_lossy().into_owned())
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn atomics_are_exact_even_on_a_node_with_one_core() {
        assert!(joined(1, Accelerator::Tcg).contains("-smp 1,maxcpus=2"));
        assert!(joined(4, Accelerator::Tcg).contains("-smp 5,maxcpus=5"));
    }

    #[test]
    fn a_private_region_is_not_shared_back_to_its_file() {
        let line = joined(2, Accelerator::Kvm);
        assert!(line.contains("size=4194304,share=off"), "{line}");
        assert!(line.contains("-append node=3"), "{line}");
    }
}
