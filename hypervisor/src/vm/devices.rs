//! The devices of the VM behind their ports and windows.

use vmm_shared::addr::Gpa;
use vmm_shared::control::RingId;

use super::Vm;
use crate::devices::uart::UartEffect;
use crate::devices::{IrqLevel, Width};
use crate::platform::layout;
use crate::platform::ports::{self, PortRule};
use crate::vcpu::exit::StopReason;

/// The channel to the agent.
#[derive(Debug)]
pub struct Agent;

impl Agent {
    pub(super) fn new() -> Self {
        Self
    }
}

/// What an access to a device leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Nothing more.
    None,
    /// Nothing answers there.
    Unknown,
    /// The guest wants this.
    Stop(StopReason),
}

/// All bits set: what a bus reads when nothing answers.
fn all_ones(width: Width) -> u64 {
    width.mask()
}

impl Vm {
    /// Reads from a port.
    pub fn port_in(&self, port: u16, width: Width) -> (u64, Request) {
        match ports::rule(port) {
            PortRule::Serial(offset) if width == Width::Byte => {
                let mut serial = self.serial.lock();
                let value = serial.read(offset);
                let level = serial.irq_level();
                self.set_line(layout::GSI_SERIAL, level);
                (value.into(), Request::None)
            }
            PortRule::SleepReset | PortRule::KeyboardReset => (0, Request::None),
            PortRule::Serial(_) | PortRule::Legacy => (all_ones(width), Request::None),
            PortRule::Unknown => (all_ones(width), Request::Unknown),
        }
    }

    /// Writes to a port.
    pub fn port_out(&self, port: u16, width: Width, value: u64) -> Request {
        let [byte, ..] = value.to_le_bytes();
        match ports::rule(port) {
            PortRule::Serial(offset) if width == Width::Byte => {
                self.write_serial(offset, byte);
                Request::None
            }
            PortRule::SleepReset if byte == layout::SLEEP_S5 => Request::Stop(StopReason::PowerOff),
            PortRule::SleepReset if byte == layout::SLEEP_RESET => Request::Stop(StopReason::Reset),
            PortRule::KeyboardReset if byte == ports::KEYBOARD_RESET => {
                Request::Stop(StopReason::Reset)
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
            self.fabric.write(RingId::ConsoleOut, &[byte]);
        }
        let level = serial.irq_level();
        self.set_line(layout::GSI_SERIAL, level);
    }

    /// Moves what the launcher has sent into the devices.
    pub fn poll_devices(&self) {
        let mut serial = self.serial.lock();
        let mut bytes = [0; 16];
        let space = serial.receive_space().min(bytes.len());
        let count = self.fabric.read(RingId::ConsoleIn, &mut bytes[..space]);
        if count > 0 {
            serial.receive(&bytes[..count]);
            let level = serial.irq_level();
            self.set_line(layout::GSI_SERIAL, level);
        }
    }

    fn set_line(&self, gsi: u32, level: IrqLevel) {
        let pin = usize::try_from(gsi).expect("a small number");
        let message = self.ioapic.lock().set_line(pin, level);
        if let Some(message) = message {
            self.deliver(message);
        }
    }

    /// Reads a device register; `None` if nothing answers there.
    pub fn mmio_read(&self, gpa: Gpa, width: Width) -> Option<u64> {
        if let Some(offset) = within(gpa, layout::IOAPIC_BASE, layout::IOAPIC_SIZE) {
            return Some(u64::from(self.ioapic.lock().read(offset)) & width.mask());
        }
        None
    }

    /// Writes a device register; `None` if nothing answers there.
    pub fn mmio_write(&self, gpa: Gpa, _width: Width, value: u64) -> Option<()> {
        if let Some(offset) = within(gpa, layout::IOAPIC_BASE, layout::IOAPIC_SIZE) {
            let [a, b, c, d, ..] = value.to_le_bytes();
            let message = self
                .ioapic
                .lock()
                .write(offset, u32::from_le_bytes([a, b, c, d]));
            if let Some(message) = message {
                self.deliver(message);
            }
            return Some(());
        }
        None
    }
}

fn within(gpa: Gpa, base: Gpa, len: u64) -> Option<u64> {
    gpa.0.checked_sub(base.0).filter(|offset| *offset < len)
}
