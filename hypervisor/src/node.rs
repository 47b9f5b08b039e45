//! What a node does once its cores run: join the rack, build the VM, run
//! vCPUs until it stops.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU16, Ordering};

use vmm_shared::addr::{Gpa, Hpa, LARGE_PAGE_SIZE, NodeId, VcpuId};
use vmm_shared::control::{BootConfig, NodeState, VmState};
use vmm_shared::shm::SharedMem;

use crate::arch::io::{self, NodeExit};
use crate::arch::pci::Window;
use crate::arch::svm::bitmaps::PermissionMaps;
use crate::arch::svm::npt::{NestedTables, Rights};
use crate::arch::svm::switch;
use crate::arch::time::Clocks;
use crate::arch::{apic, boot, cpu, descriptors};
use crate::fabric::{self, Fabric};
use crate::loader::{self, LinuxBoot, LinuxEntry};
use crate::mem::slices::{Slice, Slices};
use crate::platform::cpuid::{ALL_STATE, CpuidConfig, CpuidTable};
use crate::platform::layout::{self, PMEM_BASE};
use crate::platform::{PlatformConfig, PmemInterface, PmemRange, msr};
use crate::vcpu::Vcpu;
use crate::vcpu::exit::StopReason;
use crate::vm::{Vm, VmParts};

/// Everything that the cores of this node share.
pub struct Node {
    clocks: Clocks,
    vm: Vm,
    nested: NestedTables,
    maps: PermissionMaps,
    entry: LinuxEntry,
    vcpus: u16,
    next_core: AtomicU16,
}

/// Takes the boot core through the rest of its life.
pub fn run(clocks: Clocks, cores: usize, windows: Vec<Window>, node: NodeId) -> ! {
    match build(clocks, cores, &windows, node) {
        Ok(node) => {
            let node = Box::leak(Box::new(node));
            node.vm.fabric.set_state(NodeState::Ready);
            boot::release_other_cores(node);
            run_core(node)
        }
        Err(reason) => {
            log::error!("this node cannot start: {reason}");
            io::exit(NodeExit::BootFailure)
        }
    }
}

/// Why the node can't start, for its log.
type Reason = String;

fn build(clocks: Clocks, cores: usize, windows: &[Window], node: NodeId) -> Result<Node, Reason> {
    let say = |what: &str, why: &dyn core::fmt::Debug| format!("{what}: {why:?}");
    switch::enable().map_err(|why| {
        format!("no usable SVM ({why:?}): give the node a processor with SVM and nested paging")
    })?;
    let regions = fabric::find_regions(windows).map_err(|why| say("shared regions", &why))?;
    let config = regions.control.boot_config();
    let fabric = Fabric::join(node, regions.control, windows, apic::id())
        .map_err(|why| say("joining the rack", &why))?;

    let vcpus = u16::try_from(config.vcpus).unwrap_or(u16::MAX);
    if vcpus == 0 || usize::from(vcpus) > cores {
        return Err(format!("{vcpus} vCPUs asked of a node with {cores} cores"));
    }
    layout::check_memory_size(config.memory).map_err(|why| say("memory size", &why))?;
    let slices = guest_slices(config.memory, regions.memory)
        .ok_or_else(|| String::from("the memory region is smaller than the VM's memory"))?;

    let mut nested = NestedTables::new();
    for slice in &slices {
        map(&mut nested, slice, Rights::All);
    }
    let image = regions.image.filter(|_| config.image_len > 0);
    if let Some(memory) = image {
        map(
            &mut nested,
            &Slice {
                gpa: PMEM_BASE,
                memory,
            },
            Rights::ReadExecute,
        );
    }
    let memory = Slices::new(slices);

    let image = image.map(|memory| PmemRange {
        gpa: PMEM_BASE,
        len: memory.len() as u64,
        interface: PmemInterface::E820,
    });
    let platform = PlatformConfig {
        vcpus,
        memory: config.memory,
        image,
    };
    let entry = load_guest(&memory, &fabric, &config, &platform)?;
    let cpuid_config = CpuidConfig {
        vcpus,
        tsc_khz: clocks.tsc_khz,
        xcr0: ALL_STATE,
    };
    let cpuid = CpuidTable::new(&cpu::Cpuid, &cpuid_config);

    // The guest's time starts now; the nodes' clocks started with them.
    let now = cpu::rdtsc();
    let since_start_ns = u128::from(now) * 1_000_000 / u128::from(clocks.tsc_khz);
    let vm = Vm::new(VmParts {
        vcpus,
        memory,
        cpuid,
        tsc_khz: clocks.tsc_khz,
        tsc_offset: now.wrapping_neg(),
        boot_wall_ns: config.wall_clock_ns + u64::try_from(since_start_ns).unwrap_or(0),
        fabric,
    });
    let maps = PermissionMaps::new(msr::passthrough());
    Ok(Node {
        clocks,
        vm,
        nested,
        maps,
        entry,
        vcpus,
        next_core: AtomicU16::new(1),
    })
}

/// Cuts the node's memory region into the guest's RAM ranges.
fn guest_slices(memory: u64, region: SharedMem) -> Option<Vec<Slice>> {
    let mut offset = 0;
    layout::ram_ranges(memory)
        .map(|range| {
            let len = usize::try_from(range.len).ok()?;
            let memory = region.window(offset, len)?;
            offset += len;
            Some(Slice {
                gpa: range.gpa,
                memory,
            })
        })
        .collect()
}

fn map(nested: &mut NestedTables, slice: &Slice, rights: Rights) {
    let start = Hpa(slice.memory.as_ptr().addr() as u64);
    let mut offset = 0;
    while offset < slice.memory.len() as u64 {
        nested.map_large(Gpa(slice.gpa.0 + offset), Hpa(start.0 + offset), rights);
        offset += LARGE_PAGE_SIZE;
    }
}

fn load_guest(
    memory: &Slices,
    fabric: &Fabric,
    config: &BootConfig,
    platform: &PlatformConfig,
) -> Result<LinuxEntry, Reason> {
    let blob = |blob, name: &str| {
        let outside = || format!("the {name} lies outside of the control region");
        fabric.control().blob(blob).ok_or_else(outside)
    };
    let kernel = blob(config.kernel, "kernel")?;
    let initramfs = blob(config.initramfs, "initramfs")?;
    let len = usize::try_from(config.command_line_len).unwrap_or(usize::MAX);
    let command_line = config
        .command_line
        .get(..len)
        .ok_or_else(|| String::from("the command line is too long"))?;
    let boot = LinuxBoot {
        platform,
        kernel: &kernel,
        initramfs: &initramfs,
        command_line,
    };
    loader::load_linux(memory, &boot).map_err(|why| format!("the guest cannot be loaded: {why:?}"))
}

/// Runs a vCPU on the calling core, the boot core first, or parks the core.
pub fn run_core(node: &'static Node) -> ! {
    let is_boot_core = node.next_core.load(Ordering::Relaxed) == 1 && apic::id() == 0;
    let number = if is_boot_core {
        0
    } else {
        node.next_core.fetch_add(1, Ordering::Relaxed)
    };
    if number >= node.vcpus {
        loop {
            cpu::interrupts_off();
            cpu::sleep_until_interrupt();
        }
    }
    if number != 0
        && let Err(why) = switch::enable()
    {
        log::error!("core {number} has no usable SVM: {why:?}");
        io::exit(NodeExit::BootFailure);
    }
    let id = VcpuId(number);
    node.vm.set_core(id, apic::id());
    let mut vcpu = Vcpu::new(id, &node.vm, node.maps, &node.nested);
    if number == 0 {
        vcpu.start_linux(&node.entry);
        node.vm.fabric.set_vm_state(VmState::Running);
        // What the launcher sent before this node could hear is waiting.
        descriptors::set_doorbell();
    }
    cpu::interrupts_on();
    let reason = vcpu.run(&node.vm, &node.clocks);
    stop(node, reason)
}

fn stop(node: &Node, reason: StopReason) -> ! {
    let state = match reason {
        StopReason::PowerOff => VmState::PoweredOff,
        StopReason::Reset => VmState::Reset,
        _ => {
            log::error!("the VM has crashed: {reason:x?}");
            VmState::Crashed
        }
    };
    node.vm.fabric.set_vm_state(state);
    node.vm.fabric.set_state(NodeState::Stopped);
    io::exit(NodeExit::Done)
}
