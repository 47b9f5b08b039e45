//! vCPUs that come, go and move while the guest runs; and the block of
//! registers about them and about [memory](super::memory).
//!
//! Who decides leaves an order in a vCPU's record; the devices' node, which also
//! speaks to the guest's ACPI code, sees that it is carried out:
//!
//! ```text
//!   Grant    place New ─> its core makes it ─> guest is told ─> _OST ─> Done
//!   Reclaim  guest is asked ─> _EJ0 ─> order becomes Drop ─> its core drops it ─> Done
//!   Move     its core is told ─> saves it, place Moving ─> new core takes it ─> Done
//! ```
//!
//! Who has left an order may want it back. That ends it as long as the guest has
//! not seen its event; a guest that has must be waited for: it may use what has
//! come any moment. The record says which of both.

use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use vmm_shared::addr::{Location, VcpuId};
use vmm_shared::coherence::NodeSet;
use vmm_shared::control::{BlockId, Order, Outcome, Place, VcpuRecord};

/// The status of a guest that has given back what it had not taken yet: a
/// failure without a reason (ACPI 6.5, table 6.14).
pub(super) const FAILED: u32 = 1;

use super::{DEVICE_NODE, DOORBELL_VCPU, Vm};
use crate::devices::hotplug::{self, HotplugEffect};
use crate::devices::{IrqLevel, Width};
use crate::platform::layout::GSI_GED;
use crate::vcpu::posted::Signal;

/// What the devices' node keeps about orders.
#[derive(Debug)]
pub(super) struct Hotplug {
    vcpus: Units,
    pub(super) memory: Units,
    /// The count of orders when they were last looked at, and who was there.
    seen: (u64, NodeSet),
}

/// Units of one kind that come and go.
#[derive(Debug)]
pub(crate) struct Units {
    pub(crate) registers: hotplug::Hotplug,
    /// Those of which the guest has been told and has not answered yet.
    told: Vec<bool>,
}

/// Which units an access to registers is about.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Vcpus,
    Memory,
}

impl Units {
    pub(crate) fn new(count: u16, least: usize, is_present: impl Fn(u16) -> bool) -> Self {
        Self {
            registers: hotplug::Hotplug::new(count, least, is_present),
            told: vec![false; usize::from(count)],
        }
    }

    /// Notes whether the guest has to answer; whether that is new.
    pub(crate) fn tell(&mut self, unit: u16, told: bool) -> bool {
        let entry = self.told.get_mut(usize::from(unit));
        entry.is_some_and(|entry| core::mem::replace(entry, told) != told)
    }

    /// Takes a unit back that was to come, unless the guest has seen it; whether
    /// it has not.
    pub(super) fn take_back(&mut self, unit: u16) -> bool {
        let is_unseen = !self.registers.is_present(unit) || self.registers.take_back(unit);
        if is_unseen {
            self.tell(unit, false);
        }
        is_unseen
    }

    /// Leaves a unit to the guest that was to go, unless it has seen that;
    /// whether it has not.
    pub(super) fn leave(&mut self, unit: u16) -> bool {
        let is_unseen = !self.is_told(unit) || self.registers.leave(unit);
        if is_unseen {
            self.tell(unit, false);
        }
        is_unseen
    }

    pub(super) fn is_told(&self, unit: u16) -> bool {
        self.told.get(usize::from(unit)).is_some_and(|told| *told)
    }
}

impl Hotplug {
    /// One vCPU always stays: without any there would be nobody to ask for
    /// another. Of memory, only what came later goes.
    pub(super) fn new(vcpus: u16, is_present: impl Fn(u16) -> bool, blocks: u16) -> Self {
        Self {
            vcpus: Units::new(vcpus, 1, is_present),
            memory: Units::new(blocks, 0, |_| false),
            seen: (0, NodeSet::EMPTY),
        }
    }

    fn units(&mut self, kind: Kind) -> &mut Units {
        match kind {
            Kind::Vcpus => &mut self.vcpus,
            Kind::Memory => &mut self.memory,
        }
    }

    fn irq_level(&self) -> IrqLevel {
        match self.vcpus.registers.irq_level() {
            IrqLevel::Deasserted => self.memory.registers.irq_level(),
            asserted => asserted,
        }
    }
}

impl Vm {
    /// Where a vCPU is and what is asked for it.
    ///
    /// # Panics
    /// If the id is beyond the control region's table.
    #[must_use]
    pub fn record(&self, vcpu: VcpuId) -> VcpuRecord {
        let record = self.fabric().control().vcpu(vcpu);
        record.expect("the VM's vCPUs have homes")
    }

    /// Makes the devices' node look at the orders.
    pub fn tell_devices(&self) {
        self.fabric().tell_devices();
        if self.fabric().node() == DEVICE_NODE {
            self.serve_orders();
        }
    }

    /// How many vCPUs have been sent to cores of this node.
    #[must_use]
    pub fn arrivals(&self) -> u64 {
        self.fabric().arrivals()
    }

    /// Whether a vCPU can be sent there.
    #[must_use]
    pub fn has_core(&self, at: Location) -> bool {
        self.fabric().has_core(at)
    }

    /// A core lets others have what its guest has used: it runs another
    /// vCPU now, or none.
    pub fn leave_alone(&self, core: usize) {
        if let Err(why) = self.memory.guest_got_on(core) {
            log::error!("{why}");
        }
    }

    /// Carries orders on, if any has been left or got further. Only on the
    /// devices' node.
    pub(super) fn serve_orders(&self) {
        let mut hotplug = self.hotplug.lock();
        let orders = self.fabric().control().vm();
        let seen = (
            orders.orders().load(Ordering::Acquire),
            self.fabric().running(),
        );
        if core::mem::replace(&mut hotplug.seen, seen) == seen {
            return;
        }
        for vcpu in self.vcpus() {
            let record = self.record(vcpu);
            if take_back(&record, &mut hotplug.vcpus, vcpu) {
                self.fabric().tell_of_orders();
            }
            if let Some(order) = record.order()
                && let Some(outcome) = self.carry_on(&mut hotplug.vcpus, vcpu, order)
            {
                record.settle(order, outcome);
                self.fabric().tell_of_orders();
            }
        }
        self.serve_block_orders(&mut hotplug.memory);
        self.set_line(GSI_GED, hotplug.irq_level());
    }

    /// Carries one order on; its outcome, if that is its end.
    fn carry_on(&self, units: &mut Units, vcpu: VcpuId, order: Order) -> Option<Outcome> {
        let record = self.record(vcpu);
        match (order, record.place()?) {
            (Order::Grant(_) | Order::Reclaim, _) if !self.machine.has_hotplug() => {
                return Some(Outcome::Unable);
            }
            (Order::Grant(at) | Order::Move(at), _) if !self.has_core(at) => {
                return Some(Outcome::NoSuchCore);
            }
            (Order::Grant(at), Place::Absent) => {
                self.posted(vcpu).clear();
                record.set_place(Place::New(at));
                self.fabric().announce_arrival(at);
            }
            (Order::Grant(_), Place::New(_)) => {}
            (Order::Grant(_), Place::At(_)) if !units.registers.is_present(vcpu.0) => {
                units.tell(vcpu.0, true);
                units.registers.insert(vcpu.0);
            }
            (Order::Reclaim, _) if units.registers.is_present(vcpu.0) => {
                if units.tell(vcpu.0, true) {
                    units.registers.ask_back(vcpu.0);
                }
            }
            (Order::Grant(_), Place::At(_)) if units.is_told(vcpu.0) => {}
            // The old devices' interrupts go past the local APICs, on the
            // node where these devices are.
            (Order::Move(to), _)
                if self.machine.is_legacy() && vcpu == DOORBELL_VCPU && to.node != DEVICE_NODE =>
            {
                return Some(Outcome::Unable);
            }
            (Order::Move(_), Place::New(_) | Place::Moving(_)) => {}
            (Order::Move(_), Place::At(_)) => self.signal(vcpu, Signal::Order),
            (Order::Drop | Order::Withdraw(_) | Order::TakeBack, _) => {
                self.signal(vcpu, Signal::Order);
            }
            (Order::Grant(_) | Order::Reclaim | Order::Move(_), _) => {
                return Some(Outcome::Misplaced);
            }
        }
        None
    }

    /// Reads a register of a block for units that come and go.
    pub(super) fn hotplug_in(&self, kind: Kind, offset: u16, width: Width) -> u64 {
        let mut hotplug = self.hotplug.lock();
        let value = hotplug.units(kind).registers.read(offset, width);
        u64::from(value) & width.mask()
    }

    /// Writes one.
    pub(super) fn hotplug_out(&self, kind: Kind, offset: u16, width: Width, value: u64) {
        let value = u32::try_from(value & 0xffff_ffff).expect("32 bits");
        let mut hotplug = self.hotplug.lock();
        let units = hotplug.units(kind);
        let effect = units.registers.write(offset, width, value);
        if let Some(unit) = effect.unit() {
            units.tell(unit, false);
            match kind {
                Kind::Vcpus => self.settle_vcpu(VcpuId(unit), effect),
                Kind::Memory => self.settle_block(BlockId(unit), effect),
            }
            self.fabric().tell_of_orders();
        }
        self.set_line(GSI_GED, hotplug.irq_level());
    }

    fn settle_vcpu(&self, vcpu: VcpuId, effect: HotplugEffect) {
        if take_answer(&self.record(vcpu), effect) {
            self.signal(vcpu, Signal::Order);
        }
    }
}

/// Answers who wants an order back that stands: it ends if the guest has not seen
/// its event. Whether there was anything to say.
pub(crate) fn take_back(record: &VcpuRecord, units: &mut Units, vcpu: VcpuId) -> bool {
    if !record.orders().is_recalled() {
        return false;
    }
    match (record.order(), record.place()) {
        (Some(order @ Order::Grant(_)), Some(Place::Absent)) => {
            record.settle(order, Outcome::Recalled);
        }
        (Some(Order::Grant(_)), Some(Place::At(_))) if units.take_back(vcpu.0) => {
            record.replace_order(Order::TakeBack);
        }
        (Some(order @ Order::Reclaim), _) if units.leave(vcpu.0) => {
            record.settle(order, Outcome::Recalled);
        }
        (Some(Order::Grant(_)), Some(Place::At(_))) | (Some(Order::Reclaim), _) => {
            record.orders().refuse_recall();
        }
        // Its core makes it, or is taking it away.
        _ => return false,
    }
    true
}

/// What the guest says about a vCPU; whether its core has to take it away.
pub(crate) fn take_answer(record: &VcpuRecord, effect: HotplugEffect) -> bool {
    match (effect, record.order()) {
        (HotplugEffect::Accepted(_), Some(order @ Order::Grant(_))) => {
            record.settle(order, Outcome::Done);
        }
        (HotplugEffect::Kept(_, status), Some(order @ Order::Reclaim)) => {
            record.settle(order, Outcome::Refused(status));
        }
        (HotplugEffect::Declined(_, status), _) => {
            record.replace_order(Order::Withdraw(status));
            return true;
        }
        (HotplugEffect::Ejected(_), Some(Order::Grant(_))) => {
            record.replace_order(Order::Withdraw(FAILED));
            return true;
        }
        (HotplugEffect::Ejected(_), _) => {
            record.replace_order(Order::Drop);
            return true;
        }
        _ => {}
    }
    false
}

#[cfg(test)]
mod tests;
