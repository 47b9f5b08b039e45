//! The virtual machine: what all its vCPUs share.

mod blocks;
mod devices;
pub(crate) mod elastic;
mod interrupts;
mod legacy;
mod memory;
pub mod paravirtual;

use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use spin::Mutex;
use vmm_shared::addr::{ApicId, LARGE_PAGE_SIZE, Location, NodeId, VcpuId};
use vmm_shared::control::Counter;

use self::elastic::Hotplug;
use self::legacy::Legacy;
use crate::arch::time::Clocks;
use crate::arch::{apic, cpu, descriptors};
use crate::devices::fw_cfg::FwCfg;
use crate::devices::ioapic::Ioapic;
use crate::devices::pci_host::PciHost;
use crate::devices::scratch::Scratch;
use crate::devices::uart::Uart;
use crate::devices::virtio::console::Console;
use crate::fabric::Fabric;
use crate::mem::coherent::MappedMemory;
use crate::platform::cpuid::CpuidTable;
use crate::platform::{Machine, Topology};
use crate::vcpu::exit::Exit;
use crate::vcpu::posted::PostedInterrupts;
use crate::vcpu::pv::ClockScale;

/// The vCPU that devices without a destination of their own interrupt.
pub const DOORBELL_VCPU: VcpuId = VcpuId(0);
/// The node that owns the devices.
pub const DEVICE_NODE: NodeId = NodeId(0);

/// The core that serves them.
pub const DEVICE_CORE: Location = Location {
    node: DEVICE_NODE,
    core: 0,
};

/// Why a core sleeps no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// The time has run out.
    ByTime,
    /// It was interrupted, or need not have slept.
    ByEvent,
}

/// Locks, in the order in which they may be taken together:
/// a device (agent, serial port or the registers of what comes and goes), then the old devices, then the IOAPIC,
/// then one of guest memory's (the nested tables or a core's hold). Nobody
/// holds a lock while it enters the guest or sleeps, and interrupt handlers
/// take none.
#[derive(Debug)]
pub struct Vm {
    /// Guest memory, and by its bells the way to launcher and other nodes.
    pub memory: MappedMemory<Fabric>,
    /// The guest's CPUID.
    pub cpuid: CpuidTable,
    /// Rate of the TSC in kHz.
    pub tsc_khz: u32,
    /// This node's clocks.
    clocks: Clocks,
    /// How its ticks become time.
    pub clock: ClockScale,
    /// Guest TSC minus host TSC, modulo 2^64.
    pub tsc_offset: u64,
    /// Wall-clock time at guest TSC 0, in ns.
    pub boot_wall_ns: u64,
    /// APIC ids of the vCPUs, by their numbers.
    apic_ids: Vec<ApicId>,
    /// What it is for.
    pub machine: Machine,
    ioapic: Mutex<Ioapic>,
    pci: Mutex<PciHost>,
    serial: Mutex<Uart>,
    agent: Mutex<Console>,
    firmware: Mutex<FwCfg>,
    scratch: Mutex<Scratch>,
    legacy: Mutex<Legacy>,
    hotplug: Mutex<Hotplug>,
    /// Blocks of memory that may come.
    blocks: u16,
    /// The number of the first piece of the first of them.
    first_block_piece: usize,
    /// Whether there may be one that is to be taken away from all nodes.
    is_leaving: AtomicBool,
    /// The TSC at which the next piece of memory may be taken over; 0 if none
    /// has been asked for.
    next_piece: AtomicU64,
    /// Held by the core that takes away what has been lost.
    parting: Mutex<()>,
}

/// What a VM is made of.
#[derive(Debug)]
#[expect(missing_docs, reason = "as in `Vm`")]
pub struct VmParts {
    pub topology: Topology,
    pub machine: Machine,
    pub firmware: FwCfg,
    pub memory: MappedMemory<Fabric>,
    pub cpuid: CpuidTable,
    pub clocks: Clocks,
    pub tsc_khz: u32,
    pub tsc_offset: u64,
    pub boot_wall_ns: u64,
}

impl Vm {
    /// A VM that has not started.
    #[must_use]
    pub fn new(parts: VmParts) -> Self {
        let topology = &parts.topology;
        let is_present = |vcpu| topology.is_present(VcpuId(vcpu));
        let blocks =
            u16::try_from(topology.blocks().count()).expect("the topology has checked that");
        let first_block_piece = topology.memory() / LARGE_PAGE_SIZE;
        let first_block_piece = usize::try_from(first_block_piece).expect("64-bit");
        let hotplug = Hotplug::new(topology.vcpus(), is_present, blocks);
        Self {
            memory: parts.memory,
            cpuid: parts.cpuid,
            tsc_khz: parts.tsc_khz,
            clocks: parts.clocks,
            clock: ClockScale::new(parts.tsc_khz),
            tsc_offset: parts.tsc_offset,
            boot_wall_ns: parts.boot_wall_ns,
            apic_ids: parts
                .topology
                .vcpu_ids()
                .map(|vcpu| parts.topology.apic_id(vcpu))
                .collect(),
            hotplug: Mutex::new(hotplug),
            blocks,
            first_block_piece,
            is_leaving: AtomicBool::new(false),
            next_piece: AtomicU64::new(0),
            parting: Mutex::new(()),
            machine: parts.machine,
            firmware: Mutex::new(parts.firmware),
            scratch: Mutex::new(Scratch::default()),
            legacy: Mutex::default(),
            ioapic: Mutex::new(Ioapic::new(0)),
            pci: Mutex::new(PciHost::new()),
            serial: Mutex::new(Uart::new()),
            agent: Mutex::new(Console::new()),
        }
    }

    /// The APIC id of a vCPU.
    ///
    /// # Panics
    /// If there is no such vCPU.
    #[must_use]
    pub fn apic_id(&self, vcpu: VcpuId) -> ApicId {
        self.apic_ids[usize::from(vcpu.0)]
    }

    /// The way to the launcher and the other nodes.
    #[must_use]
    pub fn fabric(&self) -> &Fabric {
        self.memory.bells()
    }

    /// The guest's TSC now.
    #[must_use]
    pub fn guest_tsc(&self) -> u64 {
        crate::arch::cpu::rdtsc().wrapping_add(self.tsc_offset)
    }

    /// The guest's TSC at which this node has something to do of its own, as
    /// to give a sign of life, if ever.
    #[must_use]
    pub fn next_beat(&self) -> Option<u64> {
        let due = self.fabric().next_due().into_iter();
        let due = due.chain(self.next_piece()).min()?;
        Some(due.wrapping_add(self.tsc_offset))
    }

    /// Lets this core sleep until it is interrupted or so many microseconds
    /// have passed, unless `is_due` says that there is something to do.
    /// Interrupts must be on. Whoever uses the core's timer has to set it anew.
    pub fn nap(&self, us: u64, is_due: impl FnOnce() -> bool) -> Woken {
        let core = apic::id();
        cpu::interrupts_off();
        descriptors::forget_timer(core);
        self.clocks.set_timer(self.clocks.ticks(us));
        // With interrupts off: who makes it due from now on ends the sleep.
        if !is_due() {
            cpu::sleep_until_interrupt();
        }
        let by_time = descriptors::timer_ran_out(core);
        descriptors::let_timer_run_out(core);
        cpu::interrupts_on();
        if by_time {
            Woken::ByTime
        } else {
            Woken::ByEvent
        }
    }

    /// What is requested of a vCPU.
    ///
    /// # Panics
    /// If there is no such vCPU.
    #[must_use]
    pub fn posted(&self, vcpu: VcpuId) -> PostedInterrupts {
        self.fabric().posted(vcpu)
    }

    /// Counts an exit of a vCPU, in all and by its reason, and notes where it
    /// was.
    pub fn count_exit(&self, vcpu: VcpuId, exit: &Exit, rip: u64) {
        // Relaxed: for an operator who wonders.
        let last_rip = self.fabric().control().last_rip(vcpu);
        last_rip.store(rip, Ordering::Relaxed);
        self.fabric().count(vcpu, Counter::Exits);
        self.fabric().count(vcpu, exit.counter());
    }

    /// Counts an event of a vCPU.
    pub fn count(&self, vcpu: VcpuId, counter: Counter) {
        self.fabric().count(vcpu, counter);
    }
}
