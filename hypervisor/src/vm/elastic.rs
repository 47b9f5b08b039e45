//! vCPUs that come, go and move while the guest runs.
//!
//! Anyone may leave an order in a vCPU's record; the devices' node, which also
//! speaks to the guest's ACPI code, sees that it is carried out:
//!
//! ```text
//!   Grant    place New ─> its core makes it ─> guest is told ─> _OST ─> Done
//!   Reclaim  guest is asked ─> _EJ0 ─> order becomes Drop ─> its core drops it ─> Done
//!   Move     its core is told ─> saves it, place Moving ─> new core takes it ─> Done
//! ```

use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use vmm_shared::addr::{Location, VcpuId};
use vmm_shared::control::{Busy, Order, Outcome, Place, VcpuRecord};

use super::{DEVICE_CORE, DEVICE_NODE, DOORBELL_VCPU, Vm};
use crate::devices::Width;
use crate::devices::cpu_hotplug::{CpuHotplug, HotplugEffect};
use crate::platform::layout::GSI_GED;
use crate::vcpu::posted::Signal;

/// What the devices' node keeps about orders.
#[derive(Debug)]
pub(super) struct Hotplug {
    block: CpuHotplug,
    /// vCPUs of which the guest has been told and has not answered yet.
    told: Vec<bool>,
    /// The count of orders when they were last looked at.
    seen: u64,
}

impl Hotplug {
    pub(super) fn new(vcpus: u16, is_present: impl Fn(VcpuId) -> bool) -> Self {
        Self {
            block: CpuHotplug::new(vcpus, is_present),
            told: vec![false; usize::from(vcpus)],
            seen: 0,
        }
    }

    fn tell(&mut self, vcpu: VcpuId, told: bool) -> bool {
        let entry = self.told.get_mut(usize::from(vcpu.0));
        entry.is_some_and(|entry| core::mem::replace(entry, told) != told)
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

    /// Gives the guest a vCPU that it doesn't have, on this core.
    ///
    /// # Errors
    /// If another order for it stands.
    pub fn grant_vcpu(&self, vcpu: VcpuId, at: Location) -> Result<(), Busy> {
        self.order(vcpu, Order::Grant(at))
    }

    /// Asks the guest for a vCPU back.
    ///
    /// # Errors
    /// If another order for it stands.
    pub fn reclaim_vcpu(&self, vcpu: VcpuId) -> Result<(), Busy> {
        self.order(vcpu, Order::Reclaim)
    }

    /// Takes a vCPU to another core, of this node or another.
    ///
    /// # Errors
    /// If another order for it stands.
    pub fn move_vcpu(&self, vcpu: VcpuId, to: Location) -> Result<(), Busy> {
        self.order(vcpu, Order::Move(to))
    }

    fn order(&self, vcpu: VcpuId, order: Order) -> Result<(), Busy> {
        self.record(vcpu).ask(order)?;
        self.tell_devices();
        Ok(())
    }

    /// Makes the devices' node look at the orders.
    pub fn tell_devices(&self) {
        let orders = self.fabric().control().vm();
        // Release: what has changed is visible to who sees the count.
        orders.orders().fetch_add(1, Ordering::Release);
        if self.fabric().node() == DEVICE_NODE {
            self.serve_orders();
        } else {
            self.fabric().kick(DEVICE_CORE);
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
            log::error!("instruction coherence: {why}");
        }
    }

    /// Carries orders on, if any has been left or got further. Only on the
    /// devices' node.
    pub(super) fn serve_orders(&self) {
        let mut hotplug = self.hotplug.lock();
        let orders = self.fabric().control().vm();
        let orders = orders.orders().load(Ordering::Acquire);
        if core::mem::replace(&mut hotplug.seen, orders) == orders {
            return;
        }
        for vcpu in self.vcpus() {
            let record = self.record(vcpu);
            if let Some(order) = record.order()
                && let Some(outcome) = self.carry_on(&mut hotplug, vcpu, order)
            {
                record.settle(order, outcome);
                self.fabric().ring_launcher();
            }
        }
        self.set_line(GSI_GED, hotplug.block.irq_level());
    }

    /// Carries one order on; its outcome, if that is its end.
    fn carry_on(&self, hotplug: &mut Hotplug, vcpu: VcpuId, order: Order) -> Option<Outcome> {
        let record = self.record(vcpu);
        match (order, record.place()?) {
            (Order::Grant(_) | Order::Reclaim, _) if !self.machine.has_cpu_hotplug() => {
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
            (Order::Grant(_), Place::At(_)) if !hotplug.block.is_present(vcpu) => {
                hotplug.tell(vcpu, true);
                hotplug.block.insert(vcpu);
            }
            (Order::Reclaim, _) if hotplug.block.is_present(vcpu) => {
                if hotplug.tell(vcpu, true) {
                    hotplug.block.ask_back(vcpu);
                }
            }
            (Order::Grant(_), Place::At(_)) if hotplug.told[usize::from(vcpu.0)] => {}
            // The old devices' interrupts go past the local APICs, on the
            // node where these devices are.
            (Order::Move(to), _)
                if self.machine.is_legacy() && vcpu == DOORBELL_VCPU && to.node != DEVICE_NODE =>
            {
                return Some(Outcome::Unable);
            }
            (Order::Move(_), Place::New(_) | Place::Moving(_)) => {}
            (Order::Move(_), Place::At(_)) => self.signal(vcpu, Signal::Order),
            (Order::Drop | Order::Withdraw(_), _) => self.signal(vcpu, Signal::Order),
            (Order::Grant(_) | Order::Reclaim | Order::Move(_), _) => {
                return Some(Outcome::Misplaced);
            }
        }
        None
    }

    /// Reads a register of the block for vCPUs that come and go.
    pub(super) fn hotplug_in(&self, offset: u16, width: Width) -> u64 {
        let value = self.hotplug.lock().block.read(offset, width);
        u64::from(value) & width.mask()
    }

    /// Writes one.
    pub(super) fn hotplug_out(&self, offset: u16, width: Width, value: u64) {
        let value = u32::try_from(value & 0xffff_ffff).expect("32 bits");
        let mut hotplug = self.hotplug.lock();
        let effect = hotplug.block.write(offset, width, value);
        self.settle_hotplug(&mut hotplug, effect);
        self.set_line(GSI_GED, hotplug.block.irq_level());
    }

    fn settle_hotplug(&self, hotplug: &mut Hotplug, effect: HotplugEffect) {
        let vcpu = match effect {
            HotplugEffect::None => return,
            HotplugEffect::Accepted(vcpu)
            | HotplugEffect::Declined(vcpu, _)
            | HotplugEffect::Kept(vcpu, _)
            | HotplugEffect::Ejected(vcpu) => vcpu,
        };
        hotplug.tell(vcpu, false);
        let record = self.record(vcpu);
        match (effect, record.order()) {
            (HotplugEffect::Accepted(_), Some(order @ Order::Grant(_))) => {
                record.settle(order, Outcome::Done);
            }
            (HotplugEffect::Declined(_, status), _) => {
                record.replace_order(Order::Withdraw(status));
                self.signal(vcpu, Signal::Order);
            }
            (HotplugEffect::Kept(_, status), Some(order @ Order::Reclaim)) => {
                record.settle(order, Outcome::Refused(status));
            }
            (HotplugEffect::Ejected(_), _) => {
                record.replace_order(Order::Drop);
                self.signal(vcpu, Signal::Order);
            }
            _ => {}
        }
        self.fabric().ring_launcher();
    }
}
