//! Getting an interrupt to the vCPUs it is for.

use core::sync::atomic::Ordering;

use vmm_shared::addr::{ApicId, VcpuId};

use super::{DOORBELL_VCPU, Vm};
use crate::arch::apic;
use crate::devices::ioapic::{DeliveryMode, DestinationMode, Message};
use crate::vcpu::lapic::{Delivery, Destination, Ipi};
use crate::vcpu::posted::{Kick, Signal};

impl Vm {
    /// Tells which core runs a vCPU, for those who must kick it.
    pub fn set_core(&self, vcpu: VcpuId, core: u8) {
        self.cores[usize::from(vcpu.0)].store(core, Ordering::Relaxed);
    }

    fn kick(&self, vcpu: u16, kick: Kick) {
        if kick == Kick::Needed {
            apic::kick(self.cores[usize::from(vcpu)].load(Ordering::Relaxed));
        }
    }

    /// Makes the vCPU that serves the doorbell look at it.
    pub(super) fn nudge_doorbell_vcpu(&self) {
        let vcpu = DOORBELL_VCPU.0;
        self.kick(vcpu, self.posted[usize::from(vcpu)].nudge());
    }

    fn vcpus(&self) -> impl Iterator<Item = u16> + use<> {
        0..u16::try_from(self.posted.len()).expect("a VM has at most 254 vCPUs")
    }

    fn post(&self, vcpu: u16, vector: u8) {
        let kick = self.posted[usize::from(vcpu)].post(vector);
        self.kick(vcpu, kick);
    }

    fn signal(&self, vcpu: u16, signal: Signal) {
        let kick = self.posted[usize::from(vcpu)].signal(signal);
        self.kick(vcpu, kick);
    }

    /// Sends an inter-processor interrupt.
    pub fn send(&self, sender: ApicId, ipi: Ipi) {
        let meant = |vcpu: &u16| {
            ipi.destination
                .includes(Self::apic_id(VcpuId(*vcpu)), sender)
        };
        let mut targets = self.vcpus().filter(meant);
        match ipi.delivery {
            Delivery::Fixed(vector) => targets.for_each(|vcpu| self.post(vcpu, vector)),
            Delivery::Lowest(vector) => {
                if let Some(vcpu) = targets.next() {
                    self.post(vcpu, vector);
                }
            }
            Delivery::Init => targets.for_each(|vcpu| self.signal(vcpu, Signal::Init)),
            Delivery::StartUp(page) => {
                targets.for_each(|vcpu| self.signal(vcpu, Signal::StartUp(page)));
            }
        }
    }

    /// Sends a vector to the APIC ids `base`, `base + 1`, … whose bits are
    /// set; returns how many there were.
    pub fn send_to_set(&self, set: u128, base: u64, vector: u8) -> u64 {
        let mut sent = 0;
        for vcpu in self.vcpus() {
            let bit = u64::from(vcpu).checked_sub(base).filter(|bit| *bit < 128);
            if bit.is_some_and(|bit| set & 1 << bit != 0) {
                self.post(vcpu, vector);
                sent += 1;
            }
        }
        sent
    }

    /// Ends the HLT of the vCPU with this APIC id.
    pub fn unhalt(&self, target: u64) {
        if let Some(vcpu) = self.vcpus().find(|vcpu| u64::from(*vcpu) == target) {
            self.signal(vcpu, Signal::Unhalt);
        }
    }

    /// Delivers what the IOAPIC sends.
    pub(super) fn deliver(&self, message: Message) {
        let destination = match (message.destination_mode, message.destination) {
            (_, 0xff) => Destination::All,
            (DestinationMode::Physical, id) => Destination::Physical(ApicId(id.into())),
            // With x2APIC ids the low half of the destination is a set of
            // members of cluster 0, as the kernel fills it in.
            (DestinationMode::Logical, members) => Destination::Logical {
                cluster: 0,
                members: members.into(),
            },
        };
        let delivery = match message.delivery_mode {
            DeliveryMode::Fixed => Delivery::Fixed(message.vector),
            DeliveryMode::LowestPriority => Delivery::Lowest(message.vector),
            // NMI, SMI, INIT and external interrupts by a pin: no device here
            // asks for them, and a guest gains nothing from them.
            _ => return,
        };
        // The sender only matters for shorthands, which a pin doesn't use.
        self.send(
            ApicId(u32::MAX),
            Ipi {
                destination,
                delivery,
            },
        );
    }
}
