//! One core of this node, and the vCPUs that take turns on it.
//!
//! Of those that can run, each gets the core for a time slice, in order; one
//! that halts gives it up at once, and one that is woken gets it at once. The
//! registers of the last one stay loaded until another needs the core.
//!
//! ```text
//!   look around ──> new ones? ──> who is woken? ──> nobody can run: sleep
//!     ▲                                │
//!     └──── halted, slice over, <── run the first that can
//!           asked away
//! ```
//!
//! vCPUs come to a core and leave it by their records (see
//! [`vmm_shared::control::Place`]); while one is here, nobody else touches it.

use alloc::boxed::Box;
use alloc::collections::VecDeque;

use vmm_shared::addr::{Hpa, Location, VcpuId};
use vmm_shared::control::{Order, Outcome, Place, VcpuRecord};

use super::Vcpu;
use super::exit::StopReason;
use super::halt_poll::HaltPoll;
use crate::arch::svm::bitmaps::PermissionMaps;
use crate::arch::time::Clocks;
use crate::arch::{apic, cpu, descriptors};
use crate::loader::GuestEntry;
use crate::vm::{DEVICE_NODE, Vm};

/// The core that hears the node's doorbell.
pub const DOORBELL_CORE: usize = 0;

/// How long a vCPU runs while others wait, in µs: a few hundred exits, and
/// short enough that who spins for a waiting one loses little.
const SLICE_US: u64 = 3000;
/// Looks for work between two looks at the clock: a few microseconds.
const LOOKS: usize = 64;
/// The most that nodes' clocks may differ, in µs.
const CLOCKS_DIFFER_US: u64 = 1000;

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

/// Why a vCPU gives up its core.
pub(super) enum Yield {
    /// It has nothing to do.
    Halted,
    /// It is another's turn.
    Turn,
    /// It is wanted elsewhere, or to be gone.
    Ordered,
    /// The VM is to stop.
    Stop(StopReason),
}

/// What vCPUs on this node are made with.
#[derive(Debug)]
pub struct CoreParts<'a> {
    /// Where the core is.
    pub here: Location,
    /// The VM.
    pub vm: &'a Vm,
    /// This node's clocks.
    pub clocks: &'a Clocks,
    /// What guests may do without an exit.
    pub maps: PermissionMaps,
    /// Root of this node's nested tables.
    pub root: Hpa,
    /// How the first vCPU enters the guest, on the core where it starts.
    pub entry: Option<&'a GuestEntry>,
}

/// A core and its vCPUs.
#[derive(Debug)]
pub struct Core<'a> {
    parts: CoreParts<'a>,
    pub(super) number: usize,
    timer: HostTimer,
    halt_poll: HaltPoll,
    /// vCPUs that don't run, in the order of their turns.
    waiting: VecDeque<Box<Vcpu>>,
    /// Whose registers the core has.
    loaded: Option<VcpuId>,
    /// The guest TSC at which it is another's turn.
    turn_ends: u64,
    /// The count of arrivals when this core last looked for its own.
    arrivals: Option<u64>,
}

impl<'a> Core<'a> {
    /// The calling core, without vCPUs yet.
    #[must_use]
    pub fn new(parts: CoreParts<'a>) -> Self {
        Self {
            number: usize::from(parts.here.core),
            timer: HostTimer {
                apic_id: apic::id(),
                due: None,
            },
            halt_poll: HaltPoll::new(parts.vm.tsc_khz),
            waiting: VecDeque::new(),
            loaded: None,
            turn_ends: 0,
            arrivals: None,
            parts,
        }
    }

    pub(super) fn vm(&self) -> &'a Vm {
        self.parts.vm
    }

    /// Runs vCPUs on the calling core until the VM stops.
    pub fn run(&mut self) -> StopReason {
        loop {
            self.look_around();
            if let Some(why) = self.vm().fabric().held() {
                return StopReason::Held(why);
            }
            if let Err(reason) = self.take_arrivals() {
                return reason;
            }
            self.wake_called();
            let Some(next) = self.waiting.iter().position(|vcpu| vcpu.is_runnable()) else {
                self.sleep();
                continue;
            };
            let mut vcpu = self.waiting.remove(next).expect("it has just been found");
            self.load(&mut vcpu);
            let now = self.vm().guest_tsc();
            for other in &mut self.waiting {
                other.begin_wait(now, self.parts.vm);
            }
            vcpu.end_wait(self.vm());
            self.turn_ends = now + self.parts.clocks.ticks(SLICE_US);
            match vcpu.run(self) {
                Yield::Halted | Yield::Turn => self.waiting.push_back(vcpu),
                Yield::Ordered => self.obey(vcpu),
                Yield::Stop(reason) => return reason,
            }
        }
    }

    /// Does what this core has to do for its node.
    pub(super) fn look_around(&self) {
        let vm = self.vm();
        vm.fabric().attend();
        let is_first = self.number == DOORBELL_CORE;
        let is_rung = is_first && descriptors::take_doorbell();
        if is_rung {
            vm.fabric().look_for_losses();
        }
        // After both that may find a loss.
        vm.part_from_lost();
        if is_rung {
            vm.serve_revocations();
            if vm.fabric().node() == DEVICE_NODE {
                vm.poll_devices();
            }
        }
        if is_first {
            vm.change_memory();
        }
    }

    /// Whether an interrupt of this core has left something to do, or the
    /// guest must not be entered at all.
    pub(super) fn is_called(&self) -> bool {
        let doorbell = self.number == DOORBELL_CORE && descriptors::doorbell_rung();
        doorbell
            || self.vm().fabric().held().is_some()
            || self.timer.due.is_some() && descriptors::timer_ran_out(self.timer.apic_id)
            || self.has_arrivals()
    }

    /// Whether the vCPU that runs must give up its turn.
    pub(super) fn wants_turn(&self) -> bool {
        if self.has_arrivals() {
            return true;
        }
        if self.waiting.is_empty() {
            return false;
        }
        let is_over = self.turn_ends <= self.vm().guest_tsc();
        self.waiting.iter().any(|vcpu| match vcpu.is_runnable() {
            true => is_over,
            false => self.is_due(vcpu),
        })
    }

    /// Whether there is something to do for a vCPU that can't run.
    fn is_due(&self, vcpu: &Vcpu) -> bool {
        let vm = self.vm();
        let is_past = |due| due <= vm.guest_tsc();
        !vm.posted(vcpu.id).is_armed() || vcpu.next_event(vm).is_some_and(is_past)
    }

    /// Looks what has come for the vCPUs that can't run, and announces that
    /// this core will not look again unless it is kicked.
    fn wake_called(&mut self) {
        let vm = self.vm();
        let mut ordered = None;
        for index in 0..self.waiting.len() {
            let vcpu = &self.waiting[index];
            if vcpu.is_runnable() || !self.is_due(vcpu) {
                continue;
            }
            let posted = vm.posted(vcpu.id);
            let vcpu = &mut self.waiting[index];
            loop {
                posted.disarm();
                vcpu.take_requests(vm);
                if vcpu.is_runnable() || vcpu.is_ordered || posted.arm() {
                    break;
                }
            }
            if vcpu.is_ordered {
                ordered = Some(index);
            }
        }
        // Others are found when it is gone: they are not armed.
        if let Some(vcpu) = ordered.and_then(|index| self.waiting.remove(index)) {
            self.obey(vcpu);
        }
    }

    /// Waits until there is something to do: looks for it, then sleeps until
    /// the core is interrupted.
    fn sleep(&mut self) {
        let start = cpu::rdtsc();
        let window = self.halt_poll.window();
        if window > 0 && !self.waiting.is_empty() {
            let vm = self.vm();
            // While it looks, nobody need kick it.
            let posted = || self.waiting.iter().map(|vcpu| vm.posted(vcpu.id));
            posted().for_each(|posted| posted.disarm());
            let is_called = || self.is_called() || posted().any(|posted| !posted.is_idle());
            // Under TCG a PAUSE and a look at the clock take locks that the
            // others need: seldom.
            while cpu::rdtsc() - start < window && !(0..LOOKS).any(|_| is_called()) {
                core::hint::spin_loop();
            }
            self.wake_called();
        }
        if !self.waiting.iter().any(|vcpu| vcpu.is_runnable()) {
            self.set_timer(None);
            cpu::interrupts_off();
            let mut waiting = self.waiting.iter();
            let is_watched = waiting.all(|vcpu| self.vm().posted(vcpu.id).is_armed());
            if !self.is_called() && is_watched {
                cpu::sleep_until_interrupt();
            }
            cpu::interrupts_on();
        }
        self.halt_poll.learn(cpu::rdtsc() - start);
    }

    /// Sets the core's timer for what is due next: to the vCPU that runs, at
    /// `own`, or to another, and on the node's first core to the node. Without
    /// anything it is left alone.
    pub(super) fn set_timer(&mut self, own: Option<u64>) {
        let vm = self.vm();
        let beat = match self.number {
            DOORBELL_CORE => vm.next_beat(),
            _ => None,
        };
        let others = self
            .waiting
            .iter()
            .filter_map(|vcpu| match vcpu.is_runnable() {
                true => Some(self.turn_ends),
                false => vcpu.next_event(vm),
            });
        match [own, beat].into_iter().flatten().chain(others).min() {
            Some(due) => self.timer.set(due, vm, self.parts.clocks),
            None => self.timer.due = None,
        }
    }

    /// Gives a vCPU the core's registers.
    fn load(&mut self, vcpu: &mut Vcpu) {
        if self.loaded == Some(vcpu.id) {
            return;
        }
        let mask = self.vm().cpuid.supported_xcr0();
        let loaded = self.loaded.replace(vcpu.id);
        let is_loaded = |vcpu: &&mut Box<Vcpu>| Some(vcpu.id) == loaded;
        if let Some(last) = self.waiting.iter_mut().find(is_loaded) {
            last.leave_core(mask);
            // It will come back to what it was granted; that is its own turn.
            self.vm().leave_alone(self.number);
        }
        vcpu.come_to_core(mask);
    }

    fn has_arrivals(&self) -> bool {
        self.arrivals != Some(self.vm().arrivals())
    }

    /// Takes the vCPUs that have been sent here.
    fn take_arrivals(&mut self) -> Result<(), StopReason> {
        if !self.has_arrivals() {
            return Ok(());
        }
        let vm = self.vm();
        self.arrivals = Some(vm.arrivals());
        for id in vm.vcpus() {
            let record = vm.record(id);
            match record.place() {
                Some(Place::New(at)) if at == self.parts.here => self.create(id, record),
                Some(Place::Moving(at)) if at == self.parts.here => self.welcome(id, record)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn create(&mut self, id: VcpuId, record: VcpuRecord) {
        let CoreParts { maps, root, .. } = self.parts;
        let vm = self.vm();
        let mut vcpu = Vcpu::new(id, self.number, vm, maps, root);
        let entry = self.parts.entry.take_if(|_| id == VcpuId(0));
        if let Some(entry) = entry {
            vcpu.start(entry);
        }
        record.set_started(entry.is_some());
        self.house(Box::new(vcpu), record);
        if record.order().is_some() {
            vm.tell_devices();
        }
    }

    fn welcome(&mut self, id: VcpuId, record: VcpuRecord) -> Result<(), StopReason> {
        let CoreParts { maps, root, .. } = self.parts;
        let vm = self.vm();
        // Clocks of two nodes agree but for the transfer of a cache line: the
        // guest's never goes back.
        let early = record.left_at().saturating_sub(vm.guest_tsc());
        if early > self.parts.clocks.ticks(CLOCKS_DIFFER_US) {
            log::error!("vCPU {} comes from the future by {early} ticks", id.0);
            return Err(StopReason::BadImage { vcpu: id });
        }
        while vm.guest_tsc() < record.left_at() {
            core::hint::spin_loop();
        }
        let image = vm.fabric().image(id);
        let vcpu = Vcpu::from_image(id, self.number, vm, (maps, root), &image);
        let vcpu = vcpu.map_err(|why| {
            log::error!("vCPU {} can't be taken over: {why}", id.0);
            StopReason::BadImage { vcpu: id }
        })?;
        self.house(vcpu, record);
        record.arrive(vm.guest_tsc());
        record.settle(Order::Move(self.parts.here), Outcome::Done);
        vm.fabric().tell_of_orders();
        Ok(())
    }

    /// From now on a vCPU is here.
    fn house(&mut self, vcpu: Box<Vcpu>, record: VcpuRecord) {
        let posted = self.vm().posted(vcpu.id);
        // In this order: see `posted`. It is not armed yet.
        posted.set_location(self.parts.here);
        posted.disarm();
        self.waiting.push_back(vcpu);
        record.set_place(Place::At(self.parts.here));
    }

    /// Does what somebody wants of a vCPU.
    fn obey(&mut self, mut vcpu: Box<Vcpu>) {
        let vm = self.vm();
        let record = vm.record(vcpu.id);
        vcpu.is_ordered = false;
        match record.order() {
            Some(Order::Move(to)) if to != self.parts.here && vm.has_core(to) => {
                let now = vm.guest_tsc();
                record.leave(now);
                vcpu.begin_wait(now, vm);
                self.unload(&mut vcpu);
                vcpu.store(&vm.fabric().image(vcpu.id));
                record.set_place(Place::Moving(to));
                vm.fabric().announce_arrival(to);
            }
            Some(order @ (Order::Drop | Order::Withdraw(_) | Order::TakeBack)) => {
                self.unload(&mut vcpu);
                record.set_started(false);
                record.set_place(Place::Absent);
                record.settle(order, order.outcome());
                vm.fabric().tell_of_orders();
            }
            Some(order @ Order::Move(to)) => {
                self.waiting.push_back(vcpu);
                let outcome = match to == self.parts.here {
                    true => Outcome::Done,
                    false => Outcome::NoSuchCore,
                };
                record.settle(order, outcome);
                vm.fabric().tell_of_orders();
            }
            // It has been carried out, or is not for a core.
            _ => self.waiting.push_back(vcpu),
        }
    }

    /// Takes a vCPU out of the core's registers, if it is in them.
    fn unload(&mut self, vcpu: &mut Vcpu) {
        if self.loaded.take_if(|loaded| *loaded == vcpu.id).is_some() {
            vcpu.leave_core(self.vm().cpuid.supported_xcr0());
        }
        self.vm().leave_alone(self.number);
    }
}
