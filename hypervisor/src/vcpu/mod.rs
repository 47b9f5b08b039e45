//! One virtual CPU: its registers, its run loop and what each exit means.

pub mod decode;
pub mod exit;
pub mod halt_poll;
mod handlers;
pub mod host_core;
mod image;
pub mod lapic;
mod mmio;
mod nmi;
pub mod posted;
pub mod pv;
pub mod registers;
mod run;
pub mod steal;
mod step;
mod string_port;

#[cfg(any(test, feature = "testing"))]
pub use image::{carry, image_with};

use alloc::boxed::Box;

use vmm_shared::addr::{Hpa, VcpuId};

use self::decode::Bitness;
use self::lapic::{ApicBase, Lapic, LapicEffect, Mode, Role};
use self::nmi::NmiState;
use self::posted::Signal;
use self::pv::PvState;
use self::registers::{Gpr, Registers};
use self::step::Step;
use crate::arch::resident::Resident;
use crate::arch::svm::bitmaps::PermissionMaps;
use crate::arch::svm::vmcb::Vmcb;
use crate::loader::{self, GuestEntry};
use crate::platform::msr::StoredMsrs;
use crate::vm::Vm;

/// HLT's only byte; the other instructions that exit begin with 0x0f.
const HLT: u8 = 0xf4;
/// What RDX holds after reset: family, model and stepping, as in CPUID.
const RDX_RESET: u64 = 0x00a0_0f10;

/// Whether a vCPU executes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum RunState {
    /// It executes instructions.
    Running = 0,
    /// It has executed HLT.
    Halted = 1,
    /// It waits for a start-up request.
    WaitForStartUp = 2,
}

impl RunState {
    const fn from_raw(raw: u32) -> Option<Self> {
        match raw {
            0 => Some(Self::Running),
            1 => Some(Self::Halted),
            2 => Some(Self::WaitForStartUp),
            _ => None,
        }
    }
}

/// An interrupt by its vector and where it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Interrupt {
    /// The local APIC.
    Apic(u8),
    /// A PC's old interrupt controllers, past the local APIC.
    External(u8),
}

impl Interrupt {
    const fn vector(self) -> u8 {
        match self {
            Self::Apic(vector) | Self::External(vector) => vector,
        }
    }
}

/// One virtual CPU.
#[derive(Debug)]
pub struct Vcpu {
    id: VcpuId,
    /// The core that runs it, counted within this node.
    core: usize,
    /// The generation of the nested tables at the last entry.
    tables: u64,
    vmcb: Box<Vmcb>,
    registers: Registers,
    lapic: Lapic,
    pv: PvState,
    msrs: StoredMsrs,
    /// What else it has in the core's registers, while it is in none.
    resident: Resident,
    state: RunState,
    /// DR7 as the guest sees it, where the real one is kept from it.
    dr7: u64,
    /// An interrupt that the processor may have delivered by itself.
    offered: Option<Interrupt>,
    /// The registers that VMLOAD loads have been set from outside.
    must_load: bool,
    /// A kick came while nothing was halted: the next HLT returns at once.
    unhalted: bool,
    /// Somebody wants it elsewhere, or gone.
    is_ordered: bool,
    nmi: NmiState,
    step: Step,
}

/// APIC_BASE after reset: Linux is spared the way through xAPIC mode, which
/// nothing of it needs.
fn apic_base(id: VcpuId, vm: &Vm) -> ApicBase {
    let role = match id {
        VcpuId(0) => Role::Boot,
        _ => Role::Application,
    };
    let mode = match vm.machine.is_bare() {
        true => Mode::XApic,
        false => Mode::X2Apic,
    };
    ApicBase::new(role, mode)
}

impl Vcpu {
    /// A vCPU that waits for its start-up, on a core of this node, with the
    /// VM's nested tables at `root`.
    #[must_use]
    pub fn new(id: VcpuId, core: usize, vm: &Vm, maps: PermissionMaps, root: Hpa) -> Self {
        let mut vcpu = Self {
            id,
            core,
            tables: 0,
            vmcb: Vmcb::new(maps, root, vm.tsc_offset),
            registers: Registers::default(),
            lapic: Lapic::new(vm.apic_id(id), vm.tsc_khz, apic_base(id, vm)),
            pv: PvState::default(),
            msrs: StoredMsrs::new(),
            resident: Resident::default(),
            state: RunState::WaitForStartUp,
            dr7: handlers::DR7_RESET,
            offered: None,
            must_load: true,
            unhalted: false,
            is_ordered: false,
            nmi: NmiState::default(),
            step: Step::default(),
        };
        vcpu.start_at_page(0);
        if vm.machine.is_legacy() && id == VcpuId(0) {
            vcpu.lapic.open_external();
        }
        vcpu.settle_apic(LapicEffect::Addressed, vm);
        vcpu
    }

    /// Makes this the vCPU that boots the guest.
    pub fn start(&mut self, entry: &GuestEntry) {
        match entry {
            GuestEntry::Linux(entry) => self.vmcb.start_linux(&mut self.registers, entry),
            GuestEntry::Bare(entry) => self.vmcb.start_bare(&mut self.registers, entry),
        }
        self.state = RunState::Running;
        self.must_load = true;
    }

    fn start_at_page(&mut self, page: u8) {
        self.vmcb.start_at_page(&mut self.registers, page);
        self.registers.set(Gpr::Rdx, RDX_RESET);
        self.must_load = true;
    }

    /// Does what another vCPU has requested, apart from interrupts.
    fn obey(&mut self, signal: Signal, vm: &Vm) {
        match signal {
            Signal::Init => {
                self.lapic.reset();
                self.msrs = StoredMsrs::new();
                self.pv = PvState::default();
                self.state = RunState::WaitForStartUp;
                self.dr7 = handlers::DR7_RESET;
                self.unhalted = false;
                self.nmi = NmiState::default();
            }
            Signal::StartUp(page) if self.state == RunState::WaitForStartUp => {
                match vm.machine.is_paravirtual() {
                    false => {
                        self.start_at_page(page);
                        self.state = RunState::Running;
                    }
                    true => {
                        if let Some(entry) = loader::start_up(&vm.memory, page) {
                            self.start(&GuestEntry::Linux(entry));
                        }
                    }
                }
            }
            Signal::StartUp(_) => {}
            Signal::Unhalt => self.unhalted = true,
            Signal::Nmi(count) => self.nmi.request(count),
            Signal::Order => self.is_ordered = true,
        }
    }

    /// Whether it executes instructions as soon as it has a core.
    fn is_runnable(&self) -> bool {
        self.state == RunState::Running
    }

    /// It can run and does not: another vCPU has the core, or it moves.
    fn begin_wait(&mut self, now: u64, vm: &Vm) {
        if self.is_runnable() {
            self.pv.steal_time.begin_wait(now, &vm.memory);
        }
    }

    /// It is about to run.
    fn end_wait(&mut self, vm: &Vm) {
        let steal_time = &mut self.pv.steal_time;
        if steal_time.end_wait(vm.guest_tsc(), vm.clock, &vm.memory) {
            self.tables = 0;
        }
    }

    /// When something is due for it, in guest TSC ticks.
    fn next_event(&self, vm: &Vm) -> Option<u64> {
        let ticks = [self.lapic.next_timer(), vm.next_tick(self.id)];
        ticks.into_iter().flatten().min()
    }

    /// Takes everything that others have left for it, and what is due.
    fn take_requests(&mut self, vm: &Vm) {
        let posted = vm.posted(self.id);
        let signals = posted.take_signals();
        if signals.has_garbage() {
            vm.fabric().refuse_garbage(1);
        }
        for signal in signals.iter() {
            let waited = self.state == RunState::WaitForStartUp;
            self.obey(signal, vm);
            if waited && self.is_runnable() {
                vm.record(self.id).set_started(true);
                vm.fabric().tell_of_orders();
            }
            // A reset has changed it, perhaps.
            self.settle_apic(LapicEffect::Addressed, vm);
        }
        self.lapic.request_all(posted.take_vectors());
        if self.lapic.next_timer().is_some() {
            self.lapic.run_timer(vm.guest_tsc());
        }
        vm.run_ticks(self.id);
        if self.state == RunState::Halted && self.may_go_on(vm) {
            self.state = RunState::Running;
        }
    }

    /// Whether a halted vCPU has a reason to go on; consumes a kick.
    fn may_go_on(&mut self, vm: &Vm) -> bool {
        core::mem::take(&mut self.unhalted)
            || self.nmi.is_deliverable()
            || self.next_interrupt(vm).is_some() && self.vmcb.is_interruptible(&self.registers)
    }

    /// The interrupt to take as soon as the guest can.
    fn next_interrupt(&self, vm: &Vm) -> Option<Interrupt> {
        if self.lapic.passes_external()
            && let Some(vector) = vm.external_interrupt(self.id)
        {
            return Some(Interrupt::External(vector));
        }
        self.lapic.deliverable().map(Interrupt::Apic)
    }

    /// Steps over the instruction that exited, `len` bytes long.
    fn advance(&mut self, len: u64) {
        let next = self.registers.rip.wrapping_add(len);
        self.advance_to(next);
    }

    /// Steps over the instruction that exited, `unprefixed` bytes long but for
    /// its prefixes.
    fn step_over(&mut self, unprefixed: u64, vm: &Vm) {
        match self.vmcb.next_rip() {
            Some(next) => self.advance_to(next),
            None => {
                let code = self.fetch(vm);
                let code = code.as_ref().map_or(&[][..], |code| code.as_bytes());
                self.advance(length_of(code, self.vmcb.bitness(), unprefixed));
            }
        }
    }

    fn advance_to(&mut self, next: u64) {
        self.registers.rip = next;
        self.vmcb.end_shadow();
    }
}

/// The length of an instruction that has exited, told by its code as far as
/// that can be read.
fn length_of(code: &[u8], bitness: Bitness, unprefixed: u64) -> u64 {
    match code {
        // What they all begin with: no prefix.
        [] | [0x0f | HLT, ..] => unprefixed,
        _ => decode::length(code, bitness).unwrap_or(unprefixed),
    }
}
