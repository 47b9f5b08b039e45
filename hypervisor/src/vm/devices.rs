//! The devices of the VM behind their ports and windows.

use core::sync::atomic::Ordering;

use vmm_shared::addr::{Gpa, VcpuId};
use vmm_shared::control::{Counter, RingId};
use vmm_shared::pv;
use vmm_shared::ring::ByteRing;

use super::elastic::Kind;
use super::{DEVICE_CORE, DEVICE_NODE, DOORBELL_VCPU, Vm, Woken};
use crate::arch::{cpu, descriptors};
use crate::devices::pipe::Pipes;
use crate::devices::uart::{Uart, UartEffect};
use crate::devices::virtio::console::{Console, Effects};
use crate::devices::virtio::mmio::TransportEffect;
use crate::devices::{IrqLevel, Width, ioapic};
use crate::fabric::forward::{Access, Request, Space};
use crate::platform::layout;
use crate::platform::ports::{self, PortRule};
use crate::vcpu::exit::{Direction, StopReason};
use crate::vcpu::posted::Kick;

/// How long a vCPU's core looks for an answer before it sleeps: about as long
/// as one takes from a node that has nothing else to do.
const SPIN_US: u64 = 100;
/// The most that it sleeps before it asks again.
const NAP_US: u64 = 10_000;

/// All bits set: what a bus reads when nothing answers.
fn all_ones(width: Width) -> u64 {
    width.mask()
}

impl Vm {
    /// Accesses a device for a vCPU: here, or on the node that owns it.
    /// Nothing that answers reads as ones.
    pub fn access(&self, vcpu: VcpuId, access: &Access) -> (u64, Request) {
        if self.fabric().node() == DEVICE_NODE {
            self.access_here(access)
        } else {
            self.forward(vcpu, access)
        }
    }

    fn access_here(&self, access: &Access) -> (u64, Request) {
        let port = u16::try_from(access.address);
        let (gpa, width) = (Gpa(access.address), access.width);
        match (access.space, access.direction) {
            (Space::Ports, direction) => match (port, direction) {
                (Err(_), _) => (all_ones(width), Request::Unknown),
                (Ok(port), Direction::In) => self.port_in(port, width),
                (Ok(port), Direction::Out) => (0, self.port_out(port, width, access.value)),
            },
            (Space::Memory, Direction::In) => match self.mmio_read(gpa, width) {
                Some(value) => (value, Request::None),
                None => (all_ones(width), Request::Unknown),
            },
            (Space::Memory, Direction::Out) => match self.mmio_write(gpa, width, access.value) {
                Some(()) => (0, Request::None),
                None => (0, Request::Unknown),
            },
        }
    }

    /// Has the devices' node do it, and waits.
    fn forward(&self, vcpu: VcpuId, access: &Access) -> (u64, Request) {
        self.count(vcpu, Counter::Forwarded);
        let slot = self.fabric().slot(vcpu);
        slot.ask(access);
        let index = usize::from(vcpu.0);
        if let Some(word) = self
            .fabric()
            .control()
            .vm()
            .waiting_for_devices()
            .nth(index / 64)
        {
            // Release: the question is visible to who takes the bit.
            word.fetch_or(1 << (index % 64), Ordering::Release);
        }
        let ring = || {
            self.fabric().kick(DEVICE_CORE);
        };
        ring();
        let asked_at = cpu::rdtsc();
        let patience = self.clocks.ticks(SPIN_US);
        loop {
            if let Some(answer) = slot.take_answer() {
                return answer;
            }
            if self.fabric().held().is_some() {
                // The guest will not run to see this.
                return (all_ones(access.width), Request::None);
            }
            // The owner may need something of this node first.
            self.serve_revocations();
            self.fabric().attend();
            if cpu::rdtsc().wrapping_sub(asked_at) < patience {
                core::hint::spin_loop();
                continue;
            }
            // From here on the owner wakes this core; and if it never heard of
            // the question, it does when time has run out.
            let is_due = || !slot.may_sleep() || self.memory.is_asked();
            if self.nap(NAP_US, is_due) == Woken::ByTime {
                ring();
            }
        }
    }

    /// Gives up what other nodes have asked for. Damage to the shared state
    /// shows again at this node's own next fault, which stops the VM.
    pub fn serve_revocations(&self) {
        if let Err(why) = self.memory.serve() {
            self.fabric().refuse_garbage(1);
            log::error!("{why}");
        }
    }

    /// Does what vCPUs on other nodes have asked for.
    fn serve_forwards(&self) {
        for (base, word) in (0_u16..)
            .step_by(64)
            .zip(self.fabric().control().vm().waiting_for_devices())
        {
            let mut waiting = match word.load(Ordering::Relaxed) {
                0 => 0,
                // Acquire: pairs with the Release in `forward`.
                _ => word.swap(0, Ordering::Acquire),
            };
            while let Some(bit) = waiting.checked_ilog2() {
                waiting &= !(1 << bit);
                let vcpu = VcpuId(base + u16::try_from(bit).expect("below 64"));
                if usize::from(vcpu.0) >= self.apic_ids.len() {
                    self.fabric().refuse_garbage(1);
                    continue;
                }
                let slot = self.fabric().slot(vcpu);
                let (value, request) = match slot.question() {
                    Some(access) => self.access_here(&access),
                    None => {
                        self.fabric().refuse_garbage(1);
                        (u64::MAX, Request::Unknown)
                    }
                };
                if slot.answer(value, request) == Kick::Needed {
                    self.fabric().kick(self.posted(vcpu).location());
                }
            }
        }
    }

    /// Reads from a port.
    fn port_in(&self, port: u16, width: Width) -> (u64, Request) {
        match ports::rule(port, self.machine) {
            PortRule::Serial(offset) if width == Width::Byte => {
                let mut serial = self.serial.lock();
                let value = serial.read(offset);
                // A read may have made room for what the operator has typed.
                self.feed_serial(&mut serial);
                (value.into(), Request::None)
            }
            PortRule::SleepReset | PortRule::KeyboardReset => (0, Request::None),
            PortRule::PciAddress if width == Width::Dword => {
                (self.pci.lock().address().into(), Request::None)
            }
            PortRule::PciData(offset) => (self.pci.lock().data(offset, width), Request::None),
            PortRule::FwCfgData if width == Width::Byte => {
                (self.firmware.lock().read().into(), Request::None)
            }
            PortRule::CpuHotplug(offset) => {
                let value = self.hotplug_in(Kind::Vcpus, offset, width);
                (value, Request::None)
            }
            PortRule::MemoryHotplug(offset) => {
                let value = self.hotplug_in(Kind::Memory, offset, width);
                (value, Request::None)
            }
            PortRule::Scratch(offset) => (self.scratch.lock().read(offset, width), Request::None),
            rule @ (PortRule::Pic(_)
            | PortRule::Pit(_)
            | PortRule::Clock(_)
            | PortRule::PmTimer) => (self.legacy_in(rule, width), Request::None),
            PortRule::Serial(_)
            | PortRule::PciAddress
            | PortRule::Exit
            | PortRule::FwCfgSelect
            | PortRule::FwCfgData
            | PortRule::Line(_)
            | PortRule::Legacy => (all_ones(width), Request::None),
            PortRule::Unknown => (all_ones(width), Request::Unknown),
        }
    }

    /// Writes to a port.
    fn port_out(&self, port: u16, width: Width, value: u64) -> Request {
        let [byte, ..] = value.to_le_bytes();
        match ports::rule(port, self.machine) {
            PortRule::Serial(offset) if width == Width::Byte => {
                self.write_serial(offset, byte);
                Request::None
            }
            PortRule::SleepReset if byte == layout::SLEEP_S5 => Request::Stop(StopReason::PowerOff),
            PortRule::SleepReset if byte == layout::SLEEP_RESET => Request::Stop(StopReason::Reset),
            PortRule::KeyboardReset if byte == ports::KEYBOARD_RESET => {
                Request::Stop(StopReason::Reset)
            }
            PortRule::PciAddress if width == Width::Dword => {
                let [a, b, c, d, ..] = value.to_le_bytes();
                self.pci
                    .lock()
                    .set_address(u32::from_le_bytes([a, b, c, d]));
                Request::None
            }
            PortRule::Exit => Request::Stop(StopReason::Exit {
                value: u32::try_from(value & width.mask()).unwrap_or(u32::MAX),
            }),
            PortRule::FwCfgSelect if width == Width::Word => {
                let [low, high, ..] = value.to_le_bytes();
                self.firmware.lock().select(u16::from_le_bytes([low, high]));
                Request::None
            }
            PortRule::CpuHotplug(offset) => {
                self.hotplug_out(Kind::Vcpus, offset, width, value);
                Request::None
            }
            PortRule::MemoryHotplug(offset) => {
                self.hotplug_out(Kind::Memory, offset, width, value);
                Request::None
            }
            PortRule::Scratch(offset) => {
                self.scratch.lock().write(offset, width, value);
                Request::None
            }
            PortRule::Line(line) => {
                let level = match byte {
                    0 => IrqLevel::Deasserted,
                    _ => IrqLevel::Asserted,
                };
                self.set_line(line.into(), level);
                Request::None
            }
            rule @ (PortRule::Pic(_) | PortRule::Pit(_) | PortRule::Clock(_)) => {
                self.legacy_out(rule, byte);
                Request::None
            }
            PortRule::Unknown => Request::Unknown,
            _ => Request::None,
        }
    }

    fn write_serial(&self, offset: u8, byte: u8) {
        let mut serial = self.serial.lock();
        if let UartEffect::Transmit(byte) = serial.write(offset, byte) {
            // A console that nobody reads loses output; it never stops the
            // guest.
            self.fabric().write(RingId::ConsoleOut, &[byte]);
        }
        let level = serial.irq_level();
        self.set_line(layout::GSI_SERIAL, level);
    }

    fn feed_serial(&self, serial: &mut Uart) {
        let ring = self.fabric().control().ring(RingId::ConsoleIn);
        let mut bytes = [0; 16];
        loop {
            let space = serial.receive_space().min(bytes.len());
            let count = self.fabric().read(RingId::ConsoleIn, &mut bytes[..space]);
            serial.receive(&bytes[..count]);
            // Full, or empty and the launcher knows that we wait.
            if count == space || ring.arm_consumer() {
                break;
            }
        }
        self.set_line(layout::GSI_SERIAL, serial.irq_level());
    }

    /// Serves other nodes, moves what the launcher has sent into the devices,
    /// and what it has made room for out of them. The paravirtual guest does
    /// the latter itself.
    pub fn poll_devices(&self) {
        self.serve_forwards();
        if self.machine.is_paravirtual() {
            return self.post(DOORBELL_VCPU, pv::DOORBELL_VECTOR);
        }
        self.serve_orders();
        self.feed_serial(&mut self.serial.lock());
        let mut agent = self.agent.lock();
        let effects = agent.poll(&self.memory, &mut self.agent_pipes());
        self.settle_agent(&agent, effects);
    }

    fn agent_pipes(&self) -> Pipes<ByteRing, ByteRing> {
        let control = self.fabric().control();
        Pipes {
            to_host: control.ring(RingId::AgentOut),
            from_host: control.ring(RingId::AgentIn),
        }
    }

    fn settle_agent(&self, agent: &Console, effects: Effects) {
        if effects.contains(Effects::BROKEN) {
            log::warn!(
                "the guest's driver of the agent channel: {:?}",
                agent.error()
            );
        }
        if effects.contains(Effects::DOORBELL) {
            self.fabric().ring_launcher();
        }
        if effects.contains(Effects::AGAIN) {
            descriptors::set_doorbell();
            self.fabric().kick(DEVICE_CORE);
        }
        self.set_line(layout::GSI_VIRTIO, agent.irq_level());
    }

    fn write_agent(&self, offset: u64, width: Width, value: u64) {
        let mut agent = self.agent.lock();
        let effects = match agent.write(offset, width, value) {
            TransportEffect::Kick(queue) => {
                agent.kick(queue, &self.memory, &mut self.agent_pipes())
            }
            _ => Effects::empty(),
        };
        self.settle_agent(&agent, effects);
    }

    /// An edge on an input of the IOAPIC alone.
    pub(super) fn pulse(&self, gsi: u32) {
        let pin = usize::try_from(gsi).expect("a small number");
        let mut ioapic = self.ioapic.lock();
        let message = ioapic.set_line(pin, IrqLevel::Asserted);
        let _ = ioapic.set_line(pin, IrqLevel::Deasserted);
        drop(ioapic);
        message
            .into_iter()
            .for_each(|message| self.deliver(message));
    }

    pub(super) fn set_line(&self, gsi: u32, level: IrqLevel) {
        self.set_legacy_line(gsi, level);
        let pin = usize::try_from(gsi).expect("a small number");
        let message = self.ioapic.lock().set_line(pin, level);
        if let Some(message) = message {
            self.deliver(message);
        }
    }

    /// Whether a device's registers are at this address.
    #[must_use]
    pub fn has_device_at(gpa: Gpa) -> bool {
        within(gpa, layout::IOAPIC_BASE, layout::IOAPIC_SIZE).is_some()
            || within(gpa, layout::VIRTIO_BASE, layout::VIRTIO_SIZE).is_some()
    }

    fn write_ioapic(&self, offset: u64, value: u64) {
        let [a, b, c, d, ..] = value.to_le_bytes();
        if offset == ioapic::EOI {
            for pin in 0..ioapic::PINS {
                let message = self.ioapic.lock().end(pin, a);
                message
                    .into_iter()
                    .for_each(|message| self.deliver(message));
            }
            return;
        }
        let mut ioapic = self.ioapic.lock();
        let message = ioapic.write(offset, u32::from_le_bytes([a, b, c, d]));
        let record = self.fabric().control().vm();
        for (word, vectors) in record
            .level_vectors()
            .into_iter()
            .zip(ioapic.level_vectors())
        {
            // Relaxed: no such vector can be under way before its message.
            word.store(vectors, Ordering::Relaxed);
        }
        drop(ioapic);
        message
            .into_iter()
            .for_each(|message| self.deliver(message));
    }

    /// Reads a device register; `None` if nothing answers there.
    fn mmio_read(&self, gpa: Gpa, width: Width) -> Option<u64> {
        if let Some(offset) = within(gpa, layout::IOAPIC_BASE, layout::IOAPIC_SIZE) {
            return Some(u64::from(self.ioapic.lock().read(offset)) & width.mask());
        }
        let offset = within(gpa, layout::VIRTIO_BASE, layout::VIRTIO_SIZE)?;
        Some(self.agent.lock().read(offset, width))
    }

    /// Writes a device register; `None` if nothing answers there.
    fn mmio_write(&self, gpa: Gpa, width: Width, value: u64) -> Option<()> {
        if let Some(offset) = within(gpa, layout::IOAPIC_BASE, layout::IOAPIC_SIZE) {
            self.write_ioapic(offset, value);
            return Some(());
        }
        let offset = within(gpa, layout::VIRTIO_BASE, layout::VIRTIO_SIZE)?;
        self.write_agent(offset, width, value);
        Some(())
    }
}

fn within(gpa: Gpa, base: Gpa, len: u64) -> Option<u64> {
    gpa.0.checked_sub(base.0).filter(|offset| *offset < len)
}
