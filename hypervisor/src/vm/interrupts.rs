//! Getting an interrupt to the vCPUs it is for.

use core::sync::atomic::Ordering;

use vmm_shared::addr::{ApicId, VcpuId};

use super::Vm;
use crate::devices::Width;
use crate::devices::ioapic::{self, DeliveryMode, DestinationMode, Message};
use crate::fabric::forward::{Access, Space};
use crate::platform::layout;
use crate::vcpu::exit::Direction;
use crate::vcpu::lapic::{Delivery, Destination, Ipi, Target};
use crate::vcpu::posted::{Kick, PostedInterrupts, Signal};

impl Vm {
    fn kick(&self, posted: &PostedInterrupts, kick: Kick) {
        if kick == Kick::Needed {
            self.fabric().kick(posted.location());
        }
    }

    /// Makes a vCPU's core look at what has changed for it.
    pub fn nudge(&self, vcpu: VcpuId) {
        let posted = self.posted(vcpu);
        self.kick(&posted, posted.nudge());
    }

    /// All vCPUs that there is room for.
    pub fn vcpus(&self) -> impl Iterator<Item = VcpuId> + use<> {
        (0_u16..).map(VcpuId).take(self.apic_ids.len())
    }

    pub(super) fn post(&self, vcpu: VcpuId, vector: u8) {
        let posted = self.posted(vcpu);
        self.kick(&posted, posted.post(vector));
    }

    pub(super) fn signal(&self, vcpu: VcpuId, signal: Signal) {
        let posted = self.posted(vcpu);
        self.kick(&posted, posted.signal(signal));
    }

    /// Counts an interrupt from a vCPU of this node to another vCPU.
    fn count_ipi(&self, to: VcpuId) {
        let location = self.posted(to).location();
        self.memory.counters().count_ipi(location.node);
    }

    fn target(&self, vcpu: VcpuId) -> Target {
        Target {
            id: self.apic_id(vcpu),
            logical: self.posted(vcpu).logical_address(),
        }
    }

    /// Sends an inter-processor interrupt.
    pub fn send(&self, sender: ApicId, ipi: Ipi) {
        let meant = |vcpu: &VcpuId| ipi.destination.includes(self.target(*vcpu), sender);
        let targets = self.vcpus().filter(meant);
        self.send_to(targets.inspect(|vcpu| self.count_ipi(*vcpu)), ipi.delivery);
    }

    fn send_to(&self, mut targets: impl Iterator<Item = VcpuId>, delivery: Delivery) {
        match delivery {
            Delivery::Fixed(vector) => targets.for_each(|vcpu| self.post(vcpu, vector)),
            Delivery::Lowest(vector) => {
                if let Some(vcpu) = targets.next() {
                    self.post(vcpu, vector);
                }
            }
            Delivery::Nmi => targets.for_each(|vcpu| self.signal(vcpu, Signal::Nmi(1))),
            Delivery::Init => targets.for_each(|vcpu| self.signal(vcpu, Signal::Init)),
            Delivery::StartUp(page) => {
                targets.for_each(|vcpu| self.signal(vcpu, Signal::StartUp(page)));
            }
        }
    }

    /// Sends to the APIC ids `base`, `base + 1`, … whose bits are set; returns
    /// how many there were.
    pub fn send_to_set(&self, set: u128, base: u64, delivery: Delivery) -> u64 {
        let meant = |vcpu: &VcpuId| {
            let id = u64::from(self.apic_id(*vcpu).0);
            let bit = id.checked_sub(base).filter(|bit| *bit < 128);
            bit.is_some_and(|bit| set & 1 << bit != 0)
        };
        let targets = || self.vcpus().filter(meant);
        self.send_to(targets().inspect(|vcpu| self.count_ipi(*vcpu)), delivery);
        targets().count() as u64
    }

    /// Ends the HLT of the vCPU with this APIC id.
    pub fn unhalt(&self, target: u64) {
        if let Some(vcpu) = self
            .vcpus()
            .find(|vcpu| u64::from(self.apic_id(*vcpu).0) == target)
        {
            self.signal(vcpu, Signal::Unhalt);
        }
    }

    /// Tells the IOAPIC that an interrupt has been ended, if it wants to know.
    pub fn end_of_interrupt(&self, vcpu: VcpuId, vector: u8) {
        if self.is_level(vector) {
            let access = Access {
                space: Space::Memory,
                direction: Direction::Out,
                width: Width::Dword,
                address: layout::IOAPIC_BASE.0 + ioapic::EOI,
                value: vector.into(),
            };
            self.access(vcpu, &access);
        }
    }

    /// Whether a level-triggered pin sends this vector.
    #[must_use]
    pub fn is_level(&self, vector: u8) -> bool {
        let record = self.fabric().control().vm();
        record.level_vectors()[usize::from(vector >> 6)].load(Ordering::Relaxed)
            & 1 << (vector & 63)
            != 0
    }

    /// Delivers what the IOAPIC sends.
    pub(super) fn deliver(&self, message: Message) {
        let logical = message.destination_mode == DestinationMode::Logical;
        let destination = Destination::eight_bits(message.destination, logical);
        let delivery = match message.delivery_mode {
            DeliveryMode::Fixed => Delivery::Fixed(message.vector),
            DeliveryMode::LowestPriority => Delivery::Lowest(message.vector),
            DeliveryMode::Nmi => Delivery::Nmi,
            // SMI, INIT and external interrupts by a pin: no device here
            // asks for them, and a guest gains nothing from them.
            _ => return,
        };
        // The sender only matters for shorthands, which a pin doesn't use.
        let sender = ApicId(u32::MAX);
        let meant = |vcpu: &VcpuId| destination.includes(self.target(*vcpu), sender);
        self.send_to(self.vcpus().filter(meant), delivery);
    }
}
