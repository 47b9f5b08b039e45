//! The run loop: the only place that enters the guest, sleeps or stops.
//!
//! ```text
//!   take requests, timer, doorbell ──> halted? ──> sleep ──┐
//!     ▲  ▲                               │                 │
//!     │  └───────────────────────────────┼─────────────────┘
//!     │                                  ▼
//!     │                       hold interrupts, arm, deliver
//!     │                                  │
//!     └── handle the exit <── #VMEXIT ── VMRUN
//! ```
#![expect(unsafe_code, reason = "enters the guest")]

use vmm_shared::control::Counter;

use super::exit::{Outcome, StopReason};
use super::{RunState, Vcpu};
use crate::arch::svm::state::Injection;
use crate::arch::svm::{exit, switch};
use crate::arch::time::Clocks;
use crate::arch::{apic, cpu, descriptors};
use crate::vm::{DOORBELL_VCPU, Vm};

/// The core that hears the node's doorbell.
const DOORBELL_CORE: usize = 0;

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
        loop {
            self.take_requests(vm);
            if let Some(why) = vm.fabric().held() {
                return StopReason::Held(why);
            }
            if self.state != RunState::Running {
                self.sleep(vm, clocks, &mut timer);
                continue;
            }
            self.set_timer(vm, clocks, &mut timer);
            switch::hold_interrupts();
            // What came since it was looked for would not end the guest's run.
            if self.is_called(vm, &timer) || !vm.posted(self.id).arm() {
                switch::release_interrupts();
                continue;
            }
            let entered = vm.memory.barrier.enter(self.core);
            if let Some(tables) = entered {
                self.deliver(vm);
                self.enter(tables);
                vm.memory.barrier.leave(self.core);
            }
            vm.posted(self.id).disarm();
            switch::release_interrupts();
            if entered.is_some()
                && let Some(reason) = self.after_exit(vm)
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
            self.obey(signal);
        }
        self.lapic.request_all(posted.take_vectors());
        if self.lapic.next_timer().is_some() {
            self.lapic.run_timer(vm.guest_tsc());
        }
        if self.state == RunState::Halted && self.may_go_on() {
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

    /// Waits for an interrupt of the core.
    fn sleep(&mut self, vm: &Vm, clocks: &Clocks, timer: &mut HostTimer) {
        self.set_timer(vm, clocks, timer);
        cpu::interrupts_off();
        let posted = vm.posted(self.id);
        if !self.is_called(vm, timer) && posted.arm() {
            cpu::sleep_until_interrupt();
            posted.disarm();
        }
        cpu::interrupts_on();
    }

    /// Sets the core's timer for the guest's, and on the node's first core for
    /// its next sign of life; without any it is left alone.
    fn set_timer(&self, vm: &Vm, clocks: &Clocks, timer: &mut HostTimer) {
        let beat = match self.core {
            DOORBELL_CORE => vm.next_beat(),
            _ => None,
        };
        let due = [self.lapic.next_timer(), beat].into_iter().flatten().min();
        match due {
            Some(due) => timer.set(due, vm, clocks),
            None => timer.due = None,
        }
    }

    /// Chooses what the next entry delivers. An event put back or raised by
    /// the last exit goes first.
    fn deliver(&mut self, vm: &Vm) {
        self.vmcb.set_cr8(self.lapic.cr8());
        self.vmcb.withdraw_offer();
        let Some(vector) = self.lapic.deliverable() else {
            return;
        };
        if self.lapic.is_only(vector) {
            self.pv.offer_eoi(&vm.memory);
        }
        if self.vmcb.is_interruptible(&self.registers) {
            self.vmcb.inject_interrupt(vector);
            self.accept(vector, vm);
        } else {
            self.vmcb.offer_interrupt(vector);
            self.offered = Some(vector);
        }
    }

    fn accept(&mut self, vector: u8, vm: &Vm) {
        self.lapic.accept(vector);
        vm.count(self.id, Counter::Injected);
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
        // SAFETY: 1. an illegal state only makes the exit INVALID; 2. the
        // nested tables map nothing but the VM's own memory, and the
        // permission maps pass nothing that is the hypervisor's.
        unsafe { switch::run(&mut self.vmcb, &mut self.registers) };
    }

    /// Handles the exit; a reason if the VM is to stop.
    fn after_exit(&mut self, vm: &Vm) -> Option<StopReason> {
        let exit = exit::decode(&self.vmcb.control);
        vm.count_exit(self.id, &exit);
        self.vmcb.requeue_interrupted_event();
        self.lapic.set_cr8(self.vmcb.cr8());
        if let Some(vector) = self.offered.take()
            && (!self.vmcb.is_offer_open() || self.vmcb.queued_interrupt() == Some(vector))
        {
            self.accept(vector, vm);
        }
        if self.pv.take_eoi(&vm.memory) {
            self.lapic.end_of_interrupt();
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
