//! Building this node's part of the VM.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use vmm_shared::addr::{Gpa, Hpa, NodeId, PAGE_SIZE};
use vmm_shared::coherence::{CoherenceMap, Rights};
use vmm_shared::control::{
    BootBy, BootConfig, ControlRegion, MAX_MODULE_WORDS, NodeShare, Platform, coherence_geometry,
};
use vmm_shared::shm::SharedMem;

use super::trial::{self, GuestTime, Passed};
use super::{Node, Reason};
use crate::arch::cpu;
use crate::arch::pci::Window;
use crate::arch::svm::bitmaps::PermissionMaps;
use crate::arch::svm::npt::{GuestPage, NestedTables};
use crate::arch::svm::switch;
use crate::arch::time::Clocks;
use crate::devices::fw_cfg::FwCfg;
use crate::fabric::proof::Fetch;
use crate::fabric::{self, Fabric, Regions};
use crate::loader::{self, BareBoot, GuestEntry, LinuxBoot, Module, Protocol, PvBoot};
use crate::mem::coherent::{MappedMemory, Membership, MemoryParts};
use crate::mem::slices::Slices;
use crate::platform::cpuid::{ALL_STATE, CpuidConfig, CpuidTable};
use crate::platform::layout::PMEM_BASE;
use crate::platform::{
    Machine, PlatformConfig, PlatformNode, PmemInterface, PmemRange, Topology, msr,
};
use crate::vm::{DEVICE_NODE, Vm, VmParts};

/// A node's epoch in its first life.
const FIRST_EPOCH: u32 = 1;

/// Joins the rack and builds this node's part of the VM. On node 0 this waits
/// for all others and loads the guest.
pub(super) fn build(
    clocks: Clocks,
    cores: Vec<u8>,
    windows: &[Window],
    id: NodeId,
) -> Result<Node, Reason> {
    switch::enable()
        .map_err(|why| format!("{why}; give the node a processor with SVM and nested paging"))?;
    let regions = fabric::find_regions(windows).map_err(|why| why.to_string())?;
    trial::check_caching(windows)?;
    let config = regions.control.boot_config();
    let topology = topology(&config)?;
    if usize::from(id.0) >= topology.nodes().len() {
        let (here, nodes) = (id.0, topology.nodes().len());
        return Err(format!("this is node {here} of a rack with {nodes} nodes"));
    }
    let fabric = Fabric::join(
        id,
        regions.control,
        windows,
        cores.clone(),
        &clocks,
        &config,
    )
    .map_err(|why| why.to_string())?;
    let Passed { time, fetch } = trial::pass(&fabric, &config, &clocks)?;

    let slices = guest_slices(&topology, &fabric, &config, &regions.memories)?;
    let image = regions.image.filter(|_| config.image_len > 0);
    let membership = membership(&config, &regions.control, id, fetch)?;
    let machine = machine(&regions, &config)?;
    let mut nested = nested_tables(image);
    if machine.is_paravirtual() {
        map_rings(&mut nested, &regions.control);
    }
    let nested_root = nested.root();

    let platform = platform(topology, image, machine);
    let cpuid_config = CpuidConfig {
        topology: &platform.topology,
        tsc_khz: time.khz,
        xcr0: ALL_STATE,
    };
    let cpuid = CpuidTable::new(&cpu::Cpuid, &cpuid_config);
    let entry = match id {
        DEVICE_NODE => Some(load_guest(&slices, &regions, &config, &platform, &time)?),
        _ => None,
    };
    let counters = regions
        .control
        .node_counters(id)
        .expect("`join` has checked the id");
    let memory = MappedMemory::new(MemoryParts {
        slices,
        tables: nested,
        membership,
        bells: fabric,
        counters,
        cores: cores.len(),
        tsc_khz: time.khz,
    });
    if id == DEVICE_NODE {
        memory.claim_all().map_err(|why| why.to_string())?;
    }
    let vm = Vm::new(VmParts {
        firmware: FwCfg::new(platform.topology.vcpus(), config.memory),
        topology: platform.topology,
        machine,
        memory,
        cpuid,
        clocks,
        tsc_khz: time.khz,
        tsc_offset: time.offset,
        boot_wall_ns: time.boot_wall_ns,
    });
    let maps = PermissionMaps::new(msr::passthrough());
    Ok(Node {
        clocks,
        vm,
        nested_root,
        maps,
        entry,
        cores,
    })
}

fn few(number: u32) -> u16 {
    u16::try_from(number).unwrap_or(u16::MAX)
}

/// The shape of the VM as the launcher has configured it.
fn topology(config: &BootConfig) -> Result<Topology, Reason> {
    let nodes = usize::try_from(config.nodes).unwrap_or(usize::MAX);
    let shares = config
        .shares
        .get(..nodes)
        .ok_or_else(|| format!("a rack of {nodes} nodes is too large"))?;
    let node = |share: &NodeShare| PlatformNode {
        vcpus: share.max_vcpus,
        memory: share.memory,
    };
    let topology = Topology::new(shares.iter().map(node).collect())
        .and_then(|topology| topology.with_blocks(shares.iter().map(|share| share.blocks.into())))
        .map_err(|why| format!("the VM cannot be: {why}"))?
        .starting_with(shares.iter().map(|share| few(share.vcpus)));
    let vcpus = topology
        .vcpu_ids()
        .filter(|vcpu| topology.is_present(*vcpu));
    if vcpus.count() as u64 != u64::from(config.vcpus) || topology.memory() != config.memory {
        return Err(String::from("the nodes' shares are not the VM"));
    }
    Ok(topology)
}

/// The nodes' memories where the guest sees them, what may come last.
fn guest_slices(
    topology: &Topology,
    fabric: &Fabric,
    config: &BootConfig,
    memories: &[SharedMem],
) -> Result<Slices, Reason> {
    for (node, (memory, share)) in memories.iter().zip(&config.shares).enumerate() {
        if (memory.len() as u64) < share.room() {
            return Err(format!(
                "the memory region of node {node} is smaller than its share"
            ));
        }
    }
    let ram = topology.ram_ranges().map(|(_, ram)| ram);
    let blocks = topology.blocks();
    let blocks = blocks.map(|(block, _)| topology.block_range(block));
    let ranges = ram.chain(blocks).map(|range| (range.gpa, range.len));
    Slices::new(ranges, *fabric.pieces(), memories.to_vec())
        .ok_or_else(|| String::from("the map of guest memory does not fit the VM"))
}

/// This node's part in what the nodes decide together about guest memory; one
/// that is alone has none.
fn membership(
    config: &BootConfig,
    control: &ControlRegion,
    id: NodeId,
    fetch: Fetch,
) -> Result<Option<Membership>, Reason> {
    if config.data_nodes().count() == 1 {
        return Ok(None);
    }
    let broken = || String::from("the table of instruction coherence does not fit the VM");
    let nodes = usize::try_from(config.nodes).unwrap_or(usize::MAX);
    let shares = config.shares.get(..nodes).ok_or_else(broken)?;
    let table = control.blob(config.coherence).ok_or_else(broken)?;
    let map = CoherenceMap::new(table, coherence_geometry(shares)).ok_or_else(broken)?;
    let member = map
        .join(id, FIRST_EPOCH)
        .map_err(|why| format!("instruction coherence: {why}"))?;
    Ok(Some(Membership { map, member, fetch }))
}

/// Tables that map what is not RAM.
fn nested_tables(image: Option<SharedMem>) -> NestedTables {
    let mut nested = NestedTables::new();
    if let Some(memory) = image {
        let hpa = Hpa(memory.as_ptr().addr() as u64);
        nested.map_range(PMEM_BASE, hpa, memory.len() as u64, Rights::READ_EXECUTE);
    }
    nested
}

/// What the launcher wants the VM for. Its image says how it is booted,
/// unless the launcher does.
fn machine(regions: &Regions, config: &BootConfig) -> Result<Machine, Reason> {
    let image = regions.control.blob(config.kernel);
    let image = image.ok_or_else(|| String::from("the image lies outside of its region"))?;
    let protocol = match BootBy::from_raw(config.boot_by) {
        Some(BootBy::Image) => loader::protocol(&image)
            .map_err(|why| format!("the guest cannot be loaded: it is {why}"))?,
        Some(BootBy::Paravirtual) => Protocol::Paravirtual,
        None => return Err(format!("there is no way {} to boot", config.boot_by)),
    };
    Ok(Machine {
        protocol,
        platform: Platform::from_raw(config.platform)
            .ok_or_else(|| format!("there is no platform {}", config.platform))?,
    })
}

fn platform(topology: Topology, image: Option<SharedMem>, machine: Machine) -> PlatformConfig {
    PlatformConfig {
        topology,
        image: image.map(|memory| PmemRange {
            gpa: PMEM_BASE,
            len: memory.len() as u64,
            interface: PmemInterface::E820,
        }),
        machine,
    }
}

/// Gives the guest the rings to and from the launcher, and lets it read what it
/// has lost.
fn map_rings(nested: &mut NestedTables, control: &ControlRegion) {
    for (ring, range) in loader::rings() {
        let pages = control.ring_pages(ring);
        let start = pages.as_ptr().addr() as u64;
        for number in 0..pages.len() as u64 / PAGE_SIZE {
            let offset = number * PAGE_SIZE;
            let page = GuestPage::Small(Gpa(range.gpa + offset));
            nested.map(page, Hpa(start + offset), Rights::READ | Rights::WRITE);
        }
    }
    let losses = GuestPage::Small(Gpa(loader::losses().gpa));
    let at = control.losses_page().as_ptr().addr() as u64;
    nested.map(losses, Hpa(at), Rights::READ);
}

fn load_guest(
    memory: &Slices,
    regions: &Regions,
    config: &BootConfig,
    platform: &PlatformConfig,
    time: &GuestTime,
) -> Result<GuestEntry, Reason> {
    let blob = |blob, name: &str| {
        let outside = || format!("the {name} lies outside of the control region");
        regions.control.blob(blob).ok_or_else(outside)
    };
    let kernel = blob(config.kernel, "kernel")?;
    let len = usize::try_from(config.command_line_len).unwrap_or(usize::MAX);
    let command_line = config
        .command_line
        .get(..len)
        .ok_or_else(|| String::from("the command line is too long"))?;
    let entry = match platform.machine.protocol {
        Protocol::Linux => {
            let boot = LinuxBoot {
                platform,
                kernel: &kernel,
                initramfs: &blob(config.initramfs, "initramfs")?,
                command_line,
            };
            loader::load_linux(memory, &boot).map(GuestEntry::Linux)
        }
        Protocol::Multiboot | Protocol::Pvh => {
            let given = config.modules.iter();
            let given = given.take_while(|module| module.content.len != 0);
            let mut modules = Vec::new();
            for module in given {
                let words = blob(module.words, "module's command line")?;
                let mut line = vec![0; words.len().min(MAX_MODULE_WORDS)];
                words
                    .read_bytes(0, &mut line)
                    .expect("no longer than what it reads");
                modules.push((blob(module.content, "module")?, line));
            }
            let modules: Vec<_> = modules
                .iter()
                .map(|(content, words)| Module { content, words })
                .collect();
            let boot = BareBoot {
                platform,
                image: &kernel,
                modules: &modules,
                command_line,
            };
            loader::load_bare(memory, &boot).map(GuestEntry::Bare)
        }
        Protocol::Paravirtual => {
            let boot = PvBoot {
                platform,
                kernel: &kernel,
                init: &blob(config.initramfs, "first program")?,
                command_line,
                tsc_khz: time.khz,
                boot_wall_ns: time.boot_wall_ns,
            };
            loader::load_pv(memory, &boot).map(GuestEntry::Linux)
        }
    };
    entry.map_err(|why| format!("the guest cannot be loaded: {why}"))
}
