//! The run loop of a vCPU that has a core: the only place that enters the
//! guest. [`Core`] decides whose turn it is, and sleeps.
//!
//! ```text
//!   take requests, timer, doorbell ──> halted, asked away, another's turn?
//!     ▲                                  │                        └──> core
//!     │                                  ▼
//!     │                       hold interrupts, arm, deliver
//!     │                                  │
//!     └── handle the exit <── #VMEXIT ── VMRUN <── answer ──┐
//!                                │                          │
//!                                └── a plain question ──────┘
//! ```
#![expect(unsafe_code, reason = "enters the guest")]

use vmm_shared::control::Counter;

use super::exit::{Exit, Outcome, StopReason};
use super::host_core::{Core, Yield};
use super::nmi::{NmiEntry, Readiness};
use super::{Interrupt, RunState, Vcpu};
use crate::arch::apic;
use crate::arch::svm::state::Injection;
use crate::arch::svm::{exit, switch};
use crate::vm::Vm;

impl Vcpu {
    /// Runs this vCPU, whose registers the core has, until it gives it up.
    pub(super) fn run(&mut self, core: &mut Core<'_>) -> Yield {
        let vm = core.vm();
        loop {
            core.look_around();
            self.take_requests(vm);
            if let Some(why) = vm.fabric().held() {
                return Yield::Stop(StopReason::Held(why));
            }
            if self.is_ordered {
                return Yield::Ordered;
            }
            if !self.is_runnable() {
                return Yield::Halted;
            }
            if core.wants_turn() {
                return Yield::Turn;
            }
            core.set_timer(self.next_event(vm));
            switch::hold_interrupts();
            // What came since it was looked for would not end the guest's run.
            if core.is_called() || !vm.posted(self.id).arm() {
                switch::release_interrupts();
                continue;
            }
            let exit = vm.memory.barrier.enter(core.number).map(|tables| {
                self.deliver(vm);
                let exit = self.run_guest(tables, core);
                vm.memory.barrier.leave(core.number);
                exit
            });
            vm.posted(self.id).disarm();
            switch::release_interrupts();
            if let Some(exit) = exit
                && let Some(reason) = self.after_exit(exit, vm)
            {
                return Yield::Stop(reason);
            }
        }
    }

    /// Takes its state out of the core's registers.
    pub(super) fn leave_core(&mut self, mask: u64) {
        // Registers that have been set from outside are not loaded yet.
        if !core::mem::replace(&mut self.must_load, true) {
            switch::save(&mut self.vmcb);
        }
        self.resident.save(mask);
    }

    /// Puts its state into the core's registers.
    pub(super) fn come_to_core(&mut self, mask: u64) {
        self.resident.load(mask);
        // The translations that the core remembers are another's.
        self.tables = 0;
    }

    /// Chooses what the next entry delivers. An event put back or raised by
    /// the last exit goes first.
    fn deliver(&mut self, vm: &Vm) {
        self.vmcb.set_cr8(self.lapic.cr8());
        self.vmcb.withdraw_offer();
        let readiness = match (self.vmcb.has_event(), self.vmcb.is_in_shadow()) {
            (true, _) => Readiness::Queued,
            (false, true) => Readiness::InShadow,
            (false, false) => Readiness::Ready,
        };
        let nmi = self.nmi.enter(readiness);
        self.vmcb.intercept_iret(self.nmi.awaits_iret());
        match nmi {
            NmiEntry::Nothing => self.deliver_interrupt(readiness, vm),
            NmiEntry::Deliver => self.vmcb.inject_nmi(),
            NmiEntry::Step => self.step.begin(&mut self.registers.rflags),
            // It comes when the queued event is delivered, before the first
            // instruction of its handler.
            NmiEntry::Return => apic::kick(apic::id()),
        }
        // While anything is requested, the task priority matters at once.
        // Besides, QEMU 7.2 aborts if a guest sets it with an offer open.
        let watched = self.lapic.has_requests() || self.offered.is_some();
        self.vmcb.intercept_cr8_writes(watched);
    }

    fn deliver_interrupt(&mut self, readiness: Readiness, vm: &Vm) {
        let Some(interrupt) = self.next_interrupt(vm) else {
            return;
        };
        // An offer would do, if all processors heeded the shadow at the entry.
        // QEMU 7.2 forgets it, and STI; HLT would sleep through the interrupt.
        if readiness == Readiness::InShadow {
            self.step.begin(&mut self.registers.rflags);
            return;
        }
        let vector = interrupt.vector();
        if interrupt == Interrupt::Apic(vector)
            && self.lapic.is_only(vector)
            && !vm.is_level(vector)
        {
            self.pv.offer_eoi(&vm.memory);
        }
        if self.vmcb.is_interruptible(&self.registers) {
            self.vmcb.inject_interrupt(vector);
            self.accept(interrupt, vm);
        } else {
            match interrupt {
                Interrupt::Apic(vector) => self.vmcb.offer_interrupt(vector),
                Interrupt::External(vector) => self.vmcb.offer_external(vector),
            }
            self.offered = Some(interrupt);
        }
    }

    fn accept(&mut self, interrupt: Interrupt, vm: &Vm) {
        match interrupt {
            Interrupt::External(_) => vm.acknowledge_external(),
            Interrupt::Apic(vector) if vm.is_level(vector) => self.lapic.accept_level(vector),
            Interrupt::Apic(vector) => self.lapic.accept(vector),
        }
        vm.count(self.id, Counter::Injected);
    }

    /// Runs the guest under a generation of the nested tables until an exit
    /// that takes more than an answer.
    ///
    /// In between the vCPU stays armed and the core in the barrier, as if the
    /// guest had not been left: a kick that comes then ends the next run as
    /// soon as it has begun.
    fn run_guest(&mut self, tables: u64, core: &mut Core<'_>) -> Exit {
        let vm = core.vm();
        loop {
            self.enter(tables);
            let exit = exit::decode(&self.vmcb.control);
            vm.count_exit(self.id, &exit, self.registers.rip);
            self.vmcb.requeue_interrupted_event();
            let is_busy = self.vmcb.has_event() || self.nmi.is_busy() || self.step.is_under_way();
            // A node that has slept may wake up here, put out in the meantime.
            let is_held = vm.fabric().held().is_some();
            if is_busy || is_held || !self.answer(exit, vm) {
                return exit;
            }
            // Of what is answered so, only the deadline's MSR changes it.
            if exit == Exit::WriteMsr {
                core.set_timer(self.next_event(vm));
            }
        }
    }

    /// Enters under a generation of the nested tables.
    fn enter(&mut self, tables: u64) {
        if core::mem::take(&mut self.must_load) {
            switch::load(&self.vmcb);
        }
        if core::mem::replace(&mut self.tables, tables) == tables {
            self.vmcb.keep_translations();
        } else {
            self.vmcb.drop_translations();
        }
        let shadowed = self.vmcb.is_in_shadow().then_some(self.registers.rip);
        // SAFETY: 1. an illegal state only makes the exit INVALID; 2. the
        // nested tables map nothing but the VM's own memory, and the
        // permission maps pass nothing that is the hypervisor's.
        unsafe { switch::run(&mut self.vmcb, &mut self.registers) };
        // The instruction has not been executed. One that jumps to itself
        // has: then the shadow ends with the next step.
        if shadowed == Some(self.registers.rip) {
            self.vmcb.begin_shadow();
        }
    }

    /// Handles the exit; a reason if the VM is to stop.
    fn after_exit(&mut self, exit: Exit, vm: &Vm) -> Option<StopReason> {
        self.note_progress(&exit, vm);
        let is_debug = matches!(exit, Exit::Exception { vector: 1, .. });
        let returned = self.nmi.leave(is_debug, self.registers.rip);
        let rflags = &mut self.registers.rflags;
        let stepped = self.step.end(is_debug, returned, rflags);
        self.lapic.set_cr8(self.vmcb.cr8());
        if let Some(interrupt) = self.offered.take()
            && (!self.vmcb.is_offer_open()
                || self.vmcb.queued_interrupt() == Some(interrupt.vector()))
        {
            self.accept(interrupt, vm);
        }
        if self.pv.take_eoi(&vm.memory) {
            self.lapic.end_of_interrupt();
        }
        if stepped {
            self.vmcb.forget_step();
            self.vmcb.end_shadow();
            return None;
        }
        match self.handle(exit, vm) {
            Outcome::Resume => None,
            Outcome::Inject(exception) => {
                vm.count(self.id, Counter::Faults);
                if let Some(vector) = self.vmcb.take_queued_interrupt() {
                    self.lapic.put_back(vector);
                }
                match self.vmcb.inject_exception(exception) {
                    Injection::Done => None,
                    Injection::TripleFault => Some(StopReason::TripleFault {
                        rip: self.registers.rip,
                    }),
                }
            }
            Outcome::Block => {
                self.state = RunState::Halted;
                None
            }
            Outcome::Stop(reason) => Some(reason),
        }
    }
}
