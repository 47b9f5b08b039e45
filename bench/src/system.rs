//! The systems that are compared, and one run on each.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use rack::{
    Accelerator, BootBySpec, BootFiles, ConsoleRead, Faults, NodeSpec, NodeStatus, PlatformSpec,
    Programs, Rack, RackSpec, Size, StartOptions, VmSpec,
};
use serde::Serialize;

use crate::console::{Exits, Heard, Outcome, Watch};
use crate::images::{BenchImages, utf8};
use crate::qemu::{self, Engine, Machine};
use crate::session;

/// What runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum System {
    /// Our hypervisor, under emulation
    Viaduct,
    /// Emulation alone
    Plain,
    /// Linux with KVM and QEMU, under emulation
    Kvm,
    /// Our hypervisor on two nodes, with half of the vCPUs and memory each
    Spanning,
    /// The same with the paravirtual guest, as an operator starts it
    PvGuest,
    /// The same with the Linux guest
    LinuxGuest,
}

/// The guest's size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Guest {
    pub vcpus: u32,
    pub memory: Size,
    pub verbose: bool,
}

/// For the outer Linux and its QEMU, besides the guest's own memory.
const OUTER_MEMORY: Size = Size::mib(1536);

/// What `rack` gives each node as its own RAM.
const NODE_RAM: Size = Size::mib(64);

impl System {
    /// Its name in tables.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Viaduct => "Viaduct",
            Self::Plain => "plain QEMU",
            Self::Kvm => "nested KVM",
            Self::Spanning => "Viaduct, 2 nodes",
            Self::PvGuest => "pv guest",
            Self::LinuxGuest => "Linux guest",
        }
    }

    /// Its name in a ratio.
    pub(crate) fn short(self) -> &'static str {
        match self {
            Self::Viaduct => "one node",
            Self::Plain => "plain",
            Self::Kvm => "KVM",
            Self::Spanning => "two nodes",
            Self::PvGuest => "pv",
            Self::LinuxGuest => "Linux",
        }
    }

    /// Boots the guest, lets it measure, and ends it.
    pub(crate) fn run(self, guest: &Guest, images: &BenchImages) -> Result<Outcome> {
        let machine = Machine {
            engine: Engine::Tcg,
            vcpus: guest.vcpus,
            memory: guest.memory,
            kernel: utf8(&images.kernel)?,
            initramfs: utf8(&images.initramfs)?,
            command_line: &images.command_line,
        };
        match self {
            Self::Viaduct => viaduct(1, guest, images),
            Self::Spanning => viaduct(2, guest, images),
            Self::PvGuest => session::run("pv", guest, images),
            Self::LinuxGuest => session::run("linux", guest, images),
            Self::Plain => qemu::run(&machine, images, guest.verbose),
            Self::Kvm => {
                let outer = images.outer.as_deref().context("built when asked for")?;
                let machine = Machine {
                    memory: Size(guest.memory.0 + OUTER_MEMORY.0),
                    initramfs: utf8(outer)?,
                    ..machine
                };
                qemu::run(&machine, images, guest.verbose)
            }
        }
    }
}

fn viaduct(nodes: u32, guest: &Guest, images: &BenchImages) -> Result<Outcome> {
    let node = NodeSpec::data(guest.vcpus / nodes, None);
    let spec = RackSpec {
        nodes: vec![node; nodes as usize],
    };
    let vm = VmSpec {
        max_vcpus: guest.vcpus,
        vcpus: guest.vcpus,
        memory: guest.memory,
    };
    let linux = BootFiles {
        kernel: images.kernel.clone(),
        boot_by: BootBySpec::Image,
        initramfs: Some(images.initramfs.clone()),
        modules: Vec::new(),
        platform: PlatformSpec::Lean,
        image: None,
        command_line: images.command_line.clone(),
    };
    let boot = match &images.bare {
        None => linux,
        Some(bare) => BootFiles {
            kernel: bare.file.clone(),
            initramfs: None,
            platform: PlatformSpec::Legacy,
            command_line: format!("{} {}", utf8(&bare.file)?, bare.arguments),
            ..linux
        },
    };
    let options = StartOptions {
        name: format!("bench-{}", std::process::id()),
        programs: Programs::find(),
        // Against the others, which are emulated too.
        accelerator: Accelerator::Tcg,
        log: None,
        faults: Faults::default(),
    };
    let rack = Rack::start(&spec, &vm, &boot, options)?;
    let mut watch = Watch::new(guest.verbose, || exits(&rack)).of(images);
    let console = rack.console();
    let (mut position, mut buffer) = (0, [0; 4096]);
    loop {
        match console.read(&mut position, &mut buffer, Duration::from_secs(1)) {
            ConsoleRead::Bytes(count) => {
                if watch.feed(&buffer[..count])? == Heard::End {
                    break;
                }
            }
            ConsoleRead::Timeout => {
                watch.check_time()?;
                if let Some(end) = rack.ended() {
                    return Err(rack.failure(&end).into());
                }
            }
            ConsoleRead::Closed => match rack.wait_end(Duration::from_secs(1)) {
                Some(end) => return Err(rack.failure(&end).into()),
                None => bail!("the console is closed; {}", watch.last_words()),
            },
        }
    }
    let mut outcome = watch.finish();
    let status = rack.status();
    let node = status.nodes.first().context("a rack has a node")?;
    outcome.node_memory = node_memory(node.pid);
    outcome.large_pages = large_pages(node);
    Ok(outcome)
}

/// How much of what the nested tables map is under entries of 2 MiB.
fn large_pages(node: &NodeStatus) -> Option<f64> {
    let counter = |wanted| {
        let found = node.counters.iter().find(|(name, _)| *name == wanted);
        found.map(|(_, bytes)| *bytes as f64)
    };
    let share = counter("memory_mapped_large_bytes")? / counter("memory_mapped_bytes")?;
    Some(share).filter(|share| share.is_finite())
}

/// The exits of all vCPUs so far.
fn exits(rack: &Rack) -> Exits {
    let mut sum = Exits::new();
    for vcpu in rack.counters() {
        for (name, value) in vcpu.values {
            match sum.iter_mut().find(|(known, _)| *known == name) {
                Some((_, total)) => *total += value,
                None => sum.push((name, value)),
            }
        }
    }
    sum
}

/// How much of a node's own RAM has ever been touched.
fn node_memory(pid: i32) -> Option<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    own_ram(&maps)
}

/// The resident bytes of the one mapping that has just the size of a node's
/// own RAM. Rounded up to large pages where the host gives them.
fn own_ram(maps: &str) -> Option<u64> {
    let mut sizes = None;
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let name = words.next()?;
        let number = words.next().and_then(|word| word.parse::<u64>().ok());
        match name {
            "Size:" => sizes = number,
            "Rss:" if sizes == Some(NODE_RAM.0 >> 10) => return Some(number? << 10),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_ram_is_found_among_other_mappings() {
        let maps = "7f00-7f10 rw-p 00000000 00:00 0\n\
                    Size:               2048 kB\nKernelPageSize: 4 kB\nRss:  12 kB\n\
                    7f20-7f30 rw-p 00000000 00:00 0\n\
                    Size:              65536 kB\nRss:  8192 kB\nPss:  8192 kB\n\
                    VmFlags: rd wr\n";
        assert_eq!(own_ram(maps), Some(8 << 20));
        assert_eq!(own_ram("Size: 65536 kB\n"), None);
    }
}
