//! The run loop: the only place that enters the guest, sleeps or stops.
//!
//! ```text
//!   take requests, timer, doorbell ──> halted? ──> sleep ──┐
//!     ▲  ▲                               │                 │
//!     │  └───────────────────────────────┼─────────────────┘
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
use super::halt_poll::HaltPoll;
use super::lapic::LapicEffect;
use super::nmi::{NmiEntry, Readiness};
use super::{Interrupt, RunState, Vcpu};
use crate::arch::svm::state::Injection;
use crate::arch::svm::{exit, switch};
use crate::arch::time::Clocks;
use crate::arch::{apic, cpu, descriptors};
use crate::vm::{DOORBELL_VCPU, Vm};

/// The core that hears the node's doorbell.
const DOORBELL_CORE: usize = 0;

/// Looks for work between two looks at the clock: a few microseconds.
const LOOKS: usize = 64;

/// The core's own timer.
#[derive(Clone, Copy, Debug)]
struct HostTimer {
    apic_id: u8,
    /// The guest TSC for which it is set, if it is.
    due: Option<u64>,
}

impl HostTimer {
    /// Sets the timer for this guest TSC, unless it is set for that and has
    /// not run out.
    fn set(&mut self, due: u64, vm: &Vm, clocks: &Clocks) {
        let ran_out = descriptors::timer_ran_out(self.apic_id);
        if ran_out || self.due != Some(due) {
            descriptors::forget_timer(self.apic_id);
            clocks.set_timer(due.saturating_sub(vm.guest_tsc()));
            self.due = Some(due);
        }
    }
}

impl Vcpu {
    /// Runs this vCPU on the calling core until the VM stops.
    pub fn run(&mut self, vm: &Vm, clocks: &Clocks) -> StopReason {
        let mut timer = HostTimer {
            apic_id: apic::id(),
            due: None,
        };
        let mut halt_poll = HaltPoll::new(vm.tsc_khz);
        loop {
            self.take_requests(vm);
            if let Some(why) = vm.fabric().held() {
                return StopReason::Held(why);
            }
            if self.state != RunState::Running {
                self.set_timer(vm, clocks, &mut timer);
                self.sleep(vm, &timer, &mut halt_poll);
                continue;
            }
            self.set_timer(vm, clocks, &mut timer);
            switch::hold_interrupts();
            // What came since it was looked for would not end the guest's run.
            if self.is_called(vm, &timer) || !vm.posted(self.id).arm() {
                switch::release_interrupts();
                continue;
            }
            let exit = vm.memory.barrier.enter(self.core).map(|tables| {
                self.deliver(vm);
                let exit = self.run_guest(tables, vm, clocks, &mut timer);
                vm.memory.barrier.leave(self.core);
                exit
            });
            vm.posted(self.id).disarm();
            switch::release_interrupts();
            if let Some(exit) = exit
                && let Some(reason) = self.after_exit(exit, vm)
            {
                return reason;
            }
        }
    }

    /// Takes everything that others have left for this vCPU.
    fn take_requests(&mut self, vm: &Vm) {
        vm.fabric().attend();
        if self.core == DOORBELL_CORE && descriptors::take_doorbell() {
            vm.fabric().look_for_losses();
            vm.serve_revocations();
            if self.id == DOORBELL_VCPU {
                vm.poll_devices();
            }
        }
        let posted = vm.posted(self.id);
        for signal in posted.take_signals() {
            self.obey(signal, vm);
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

    /// Whether an interrupt of this core has left something to do, or the
    /// guest must not be entered at all.
    fn is_called(&self, vm: &Vm, timer: &HostTimer) -> bool {
        let doorbell = self.core == DOORBELL_CORE && descriptors::doorbell_rung();
        doorbell
            || vm.fabric().held().is_some()
            || timer.due.is_some() && descriptors::timer_ran_out(timer.apic_id)
    }

    /// Waits until there is something to do: looks for it, then sleeps until
    /// the core is interrupted.
    fn sleep(&self, vm: &Vm, timer: &HostTimer, halt_poll: &mut HaltPoll) {
        let posted = vm.posted(self.id);
        let start = cpu::rdtsc();
        let is_called = || self.is_called(vm, timer) || !posted.is_idle();
        // Under TCG a PAUSE and a look at the clock take locks that the
        // others need: seldom.
        while cpu::rdtsc() - start < halt_poll.window() && !(0..LOOKS).any(|_| is_called()) {
            core::hint::spin_loop();
        }
        cpu::interrupts_off();
        if !self.is_called(vm, timer) && posted.arm() {
            cpu::sleep_until_interrupt();
            posted.disarm();
        }
        cpu::interrupts_on();
        halt_poll.learn(cpu::rdtsc() - start);
    }

    /// Sets the core's timer for the guest's, and on the node's first core for
    /// its next sign of life; without any it is left alone.
    fn set_timer(&self, vm: &Vm, clocks: &Clocks, timer: &mut HostTimer) {
        let beat = match self.core {
            DOORBELL_CORE => vm.next_beat(),
            _ => None,
        };
        let ticks = [self.lapic.next_timer(), vm.next_tick(self.id), beat];
        match ticks.into_iter().flatten().min() {
            Some(due) => timer.set(due, vm, clocks),
            None => timer.due = None,
        }
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
    fn run_guest(&mut self, tables: u64, vm: &Vm, clocks: &Clocks, timer: &mut HostTimer) -> Exit {
        loop {
            self.enter(tables);
            let exit = exit::decode(&self.vmcb.control);
            vm.count_exit(self.id, &exit, self.registers.rip);
            self.vmcb.requeue_interrupted_event();
            let is_busy = self.vmcb.has_event() || self.nmi.is_busy() || self.step.is_under_way();
            if is_busy || !self.answer(exit, vm) {
                return exit;
            }
            // Of what is answered so, only the deadline's MSR changes it.
            if exit == Exit::WriteMsr {
                self.set_timer(vm, clocks, timer);
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
