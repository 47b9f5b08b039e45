//! An IOAPIC with 24 pins.
//!
//! The platform's tables declare every pin edge-triggered, but a guest may
//! program any as level-triggered: its entry then sends one message, shows
//! remote IRR, and sends the next when that interrupt has been ended with its
//! line still asserted. Ends are written to the EOI register, by the guest or
//! on behalf of its local APICs. Register layout: 82093AA data sheet, section
//! 3; EOI register: 82801 data sheets.

use super::IrqLevel;

/// Input pins.
pub const PINS: usize = 24;
/// Bytes of the register window.
pub const WINDOW_SIZE: u64 = 0x1000;

const VERSION: u32 = 0x20;
/// Offset of the EOI register: the vector that has been ended.
pub const EOI: u64 = 0x40;

/// How the addressed APICs take a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    /// As the interrupt with the message's vector, on every destination.
    Fixed,
    /// As that interrupt on one of the destinations.
    LowestPriority,
    /// As a system management interrupt.
    Smi,
    /// As a non-maskable interrupt.
    Nmi,
    /// As an INIT request.
    Init,
    /// As an interrupt of an 8259; the vector is not the message's.
    External,
}

/// How a message's destination is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestinationMode {
    /// As an APIC id; 0xff means all.
    Physical,
    /// As a logical destination.
    Logical,
}

/// An interrupt on its way to local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who gets it; see `destination_mode`.
    pub destination: u8,
    /// What `destination` means.
    pub destination_mode: DestinationMode,
    /// What it is.
    pub delivery_mode: DeliveryMode,
    /// The vector, for those modes that have one. Below 16 it is illegal,
    /// and a local APIC drops it.
    pub vector: u8,
}

/// One redirection entry as the guest reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry(u64);

impl Entry {
    const LOGICAL: u64 = 1 << 11;
    const LEVEL: u64 = 1 << 15;
    const MASKED: u64 = 1 << 16;
    /// A level-triggered interrupt has been sent and not been ended.
    const REMOTE_IRR: u64 = 1 << 14;
    /// All but delivery status, which always reads as clear, and remote IRR.
    const WRITABLE: u64 = 0xff00_0000_0001_afff;

    const fn is_masked(self) -> bool {
        self.0 & Self::MASKED != 0
    }

    const fn is_level(self) -> bool {
        self.0 & Self::LEVEL != 0
    }

    /// What the entry sends, or `None` if its delivery mode is reserved.
    fn message(self) -> Option<Message> {
        let [vector, low, _, _, _, _, _, destination] = self.0.to_le_bytes();
        let delivery_mode = match low & 7 {
            0 => DeliveryMode::Fixed,
            1 => DeliveryMode::LowestPriority,
            2 => DeliveryMode::Smi,
            4 => DeliveryMode::Nmi,
            5 => DeliveryMode::Init,
            7 => DeliveryMode::External,
            _ => return None,
        };
        let destination_mode = if self.0 & Self::LOGICAL == 0 {
            DestinationMode::Physical
        } else {
            DestinationMode::Logical
        };
        Some(Message {
            destination,
            destination_mode,
            delivery_mode,
            vector,
        })
    }
}

/// Which half of a redirection entry a register is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Half {
    Low,
    High,
}

/// The state of the IOAPIC.
#[derive(Clone, Debug)]
pub struct Ioapic {
    select: u8,
    id: u8,
    entries: [Entry; PINS],
    lines: [IrqLevel; PINS],
}

impl Ioapic {
    /// An IOAPIC after reset, all pins masked. `id` has 4 bits.
    #[must_use]
    pub fn new(id: u8) -> Self {
        Self {
            select: 0,
            id: id & 0xf,
            entries: [Entry(Entry::MASKED); PINS],
            lines: [IrqLevel::Deasserted; PINS],
        }
    }

    /// Reads the 32-bit register at `offset` in the window.
    #[must_use]
    pub fn read(&self, offset: u64) -> u32 {
        match offset {
            0x00 => u32::from(self.select),
            0x10 => self.read_selected(),
            _ => 0,
        }
    }

    /// Writes the 32-bit register at `offset` in the window, but for
    /// [`EOI`]: see [`end`](Self::end). A level entry that opens while its line
    /// is asserted sends its message.
    #[must_use]
    pub fn write(&mut self, offset: u64, value: u32) -> Option<Message> {
        let [low, _, _, high] = value.to_le_bytes();
        match offset {
            0x00 => self.select = low,
            0x10 => match self.select {
                0 => self.id = high & 0xf,
                _ => return self.write_entry(value),
            },
            _ => {}
        }
        None
    }

    /// Sets the level of an input line; pins that don't exist are ignored.
    ///
    /// A rising edge at a masked pin is lost, as on the real chip and under
    /// KVM. A guest cannot lose an interrupt by that: its lines stay asserted
    /// until the device is served, Linux serves the device after it has
    /// unmasked the pin, and only the next edge needs a message. To keep the
    /// edge instead would hand stale interrupts to drivers that mask a pin,
    /// reprogram the device and unmask the pin.
    #[must_use]
    pub fn set_line(&mut self, pin: usize, level: IrqLevel) -> Option<Message> {
        let line = self.lines.get_mut(pin)?;
        let before = core::mem::replace(line, level);
        let entry = self.entries[pin];
        let rises = before == IrqLevel::Deasserted && level == IrqLevel::Asserted;
        if entry.is_level() {
            self.send_level(pin)
        } else if rises && !entry.is_masked() {
            entry.message()
        } else {
            None
        }
    }

    /// Takes note that an interrupt with this vector has been ended, if it was
    /// of this pin; the next one of a line that is still asserted.
    #[must_use]
    pub fn end(&mut self, pin: usize, vector: u8) -> Option<Message> {
        let entry = self.entries.get_mut(pin)?;
        let [own, ..] = entry.0.to_le_bytes();
        if own != vector || entry.0 & Entry::REMOTE_IRR == 0 {
            return None;
        }
        entry.0 &= !Entry::REMOTE_IRR;
        self.send_level(pin)
    }

    /// The vectors of level-triggered pins, as a bitmap.
    #[must_use]
    pub fn level_vectors(&self) -> [u64; 4] {
        let mut set = [0; 4];
        for entry in self.entries.iter().filter(|entry| entry.is_level()) {
            let [vector, ..] = entry.0.to_le_bytes();
            set[usize::from(vector >> 6)] |= 1 << (vector & 63);
        }
        set
    }

    /// The message of a level-triggered pin, if it is to send one now.
    fn send_level(&mut self, pin: usize) -> Option<Message> {
        let entry = &mut self.entries[pin];
        let waits = entry.is_masked() || entry.0 & Entry::REMOTE_IRR != 0;
        if waits || self.lines[pin] == IrqLevel::Deasserted {
            return None;
        }
        entry.0 |= Entry::REMOTE_IRR;
        entry.message()
    }

    fn selected_entry(&self) -> Option<(usize, Half)> {
        let register = self.select.checked_sub(0x10)?;
        let pin = usize::from(register >> 1);
        let half = if register & 1 == 0 {
            Half::Low
        } else {
            Half::High
        };
        (pin < PINS).then_some((pin, half))
    }

    fn read_selected(&self) -> u32 {
        match self.select {
            // Identification and arbitration show the same id.
            0 | 2 => u32::from(self.id) << 24,
            1 => {
                let last = u32::try_from(PINS - 1).expect("a small constant");
                (last << 16) | VERSION
            }
            _ => {
                let Some((pin, half)) = self.selected_entry() else {
                    return 0;
                };
                let [a, b, c, d, e, f, g, h] = self.entries[pin].0.to_le_bytes();
                match half {
                    Half::Low => u32::from_le_bytes([a, b, c, d]),
                    Half::High => u32::from_le_bytes([e, f, g, h]),
                }
            }
        }
    }

    fn write_entry(&mut self, value: u32) -> Option<Message> {
        let (pin, half) = self.selected_entry()?;
        let old = self.entries[pin].0;
        let new = match half {
            Half::Low => (old & !0xffff_ffff) | u64::from(value),
            Half::High => (old & 0xffff_ffff) | (u64::from(value) << 32),
        };
        let mut entry = Entry(new & Entry::WRITABLE);
        if !entry.is_level() {
            self.entries[pin] = entry;
            return None;
        }
        entry.0 |= old & Entry::REMOTE_IRR;
        self.entries[pin] = entry;
        self.send_level(pin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use IrqLevel::{Asserted, Deasserted};

    const MASKED: u32 = 1 << 16;
    const LEVEL: u32 = 1 << 15;

    fn select(ioapic: &mut Ioapic, register: u8) {
        assert_eq!(ioapic.write(0x00, u32::from(register)), None);
    }

    fn set(ioapic: &mut Ioapic, register: u8, value: u32) -> Option<Message> {
        select(ioapic, register);
        ioapic.write(0x10, value)
    }

    fn get(ioapic: &mut Ioapic, register: u8) -> u32 {
        select(ioapic, register);
        ioapic.read(0x10)
    }

    /// Programs a pin the way Linux does: high half first.
    fn program(ioapic: &mut Ioapic, pin: u8, low: u32, destination: u8) -> Option<Message> {
        let high = u32::from(destination) << 24;
        assert_eq!(set(ioapic, 0x11 + 2 * pin, high), None);
        set(ioapic, 0x10 + 2 * pin, low)
    }

    fn fixed(vector: u8, destination: u8) -> Message {
        Message {
            destination,
            destination_mode: DestinationMode::Physical,
            delivery_mode: DeliveryMode::Fixed,
            vector,
        }
    }

    #[test]
    fn identity_and_version_read_as_the_real_chip() {
        let mut ioapic = Ioapic::new(3);
        assert_eq!(get(&mut ioapic, 0), 3 << 24);
        assert_eq!(get(&mut ioapic, 1), 0x0017_0020);
        assert_eq!(set(&mut ioapic, 0, 0xff00_0000), None);
        assert_eq!(get(&mut ioapic, 0), 0x0f00_0000);
        assert_eq!(get(&mut ioapic, 2), 0x0f00_0000);
        assert_eq!(ioapic.read(0x00), 2);
    }

    #[test]
    fn all_pins_start_masked_and_registers_beyond_them_read_zero() {
        let mut ioapic = Ioapic::new(0);
        for pin in 0..24 {
            assert_eq!(get(&mut ioapic, 0x10 + 2 * pin), MASKED);
            assert_eq!(get(&mut ioapic, 0x11 + 2 * pin), 0);
        }
        for register in (0x03..0x10).chain(0x40..=0xff) {
            assert_eq!(set(&mut ioapic, register, !0), None);
            assert_eq!(get(&mut ioapic, register), 0);
        }
        assert_eq!(ioapic.read(0x40), 0);
        assert_eq!(ioapic.write(0x40, !0), None);
    }

    #[test]
    fn a_rising_edge_sends_one_message() {
        let mut ioapic = Ioapic::new(0);
        assert_eq!(program(&mut ioapic, 4, 0x31, 7), None);
        assert_eq!(ioapic.set_line(4, Asserted), Some(fixed(0x31, 7)));
        assert_eq!(ioapic.set_line(4, Asserted), None);
        assert_eq!(ioapic.set_line(4, Deasserted), None);
        assert_eq!(ioapic.set_line(4, Asserted), Some(fixed(0x31, 7)));
        assert_eq!(ioapic.set_line(5, Asserted), None, "still masked");
        assert_eq!(ioapic.set_line(24, Asserted), None, "no such pin");
    }

    #[test]
    fn an_edge_at_a_masked_pin_is_lost_but_the_next_one_is_not() {
        let mut ioapic = Ioapic::new(0);
        assert_eq!(program(&mut ioapic, 4, MASKED | 0x31, 0), None);
        assert_eq!(ioapic.set_line(4, Asserted), None);
        assert_eq!(program(&mut ioapic, 4, 0x31, 0), None);
        assert_eq!(ioapic.set_line(4, Deasserted), None);
        assert_eq!(ioapic.set_line(4, Asserted), Some(fixed(0x31, 0)));
    }

    #[test]
    fn a_level_entry_fires_at_unmask_and_then_once_for_each_end() {
        let mut ioapic = Ioapic::new(0);
        assert_eq!(program(&mut ioapic, 9, LEVEL | MASKED | 0x40, 1), None);
        assert_eq!(ioapic.set_line(9, Asserted), None);
        let sent = Some(fixed(0x40, 1));
        assert_eq!(program(&mut ioapic, 9, LEVEL | 0x40, 1), sent);
        assert_eq!(get(&mut ioapic, 0x10 + 2 * 9), LEVEL | 1 << 14 | 0x40);
        assert_eq!(ioapic.end(9, 0x41), None, "another vector");
        assert_eq!(ioapic.end(9, 0x40), sent, "still asserted");
        assert_eq!(ioapic.set_line(9, Deasserted), None);
        assert_eq!(ioapic.set_line(9, Asserted), None, "not ended yet");
        assert_eq!(ioapic.set_line(9, Deasserted), None);
        assert_eq!(ioapic.end(9, 0x40), None);
        assert_eq!(get(&mut ioapic, 0x10 + 2 * 9), LEVEL | 0x40);
        assert_eq!(ioapic.set_line(9, Asserted), sent);
    }

    #[test]
    fn an_entry_made_edge_triggered_forgets_what_it_awaits() {
        let mut ioapic = Ioapic::new(0);
        assert_eq!(program(&mut ioapic, 9, LEVEL | 0x40, 1), None);
        assert_eq!(ioapic.level_vectors(), [0, 1, 0, 0]);
        assert_eq!(ioapic.set_line(9, Asserted), Some(fixed(0x40, 1)));
        assert_eq!(program(&mut ioapic, 9, MASKED | 0x40, 1), None);
        assert_eq!(get(&mut ioapic, 0x10 + 2 * 9), MASKED | 0x40);
        assert_eq!(ioapic.level_vectors(), [0; 4]);
    }

    #[test]
    fn read_only_and_reserved_bits_stay_clear() {
        let mut ioapic = Ioapic::new(0);
        assert_eq!(set(&mut ioapic, 0x10, !0), None);
        assert_eq!(set(&mut ioapic, 0x11, !0), None);
        assert_eq!(get(&mut ioapic, 0x10), 0x0001_afff);
        assert_eq!(get(&mut ioapic, 0x11), 0xff00_0000);
    }

    #[test]
    fn delivery_and_destination_modes_are_decoded() {
        use DeliveryMode::{External, Fixed, Init, LowestPriority, Nmi, Smi};
        let modes = [
            Some(Fixed),
            Some(LowestPriority),
            Some(Smi),
            None,
            Some(Nmi),
            Some(Init),
            None,
            Some(External),
        ];
        let mut ioapic = Ioapic::new(0);
        for (bits, delivery_mode) in (0_u32..).zip(modes) {
            assert_eq!(
                program(&mut ioapic, 1, (1 << 11) | (bits << 8) | 0x20, 2),
                None
            );
            let expected = delivery_mode.map(|delivery_mode| Message {
                destination: 2,
                destination_mode: DestinationMode::Logical,
                delivery_mode,
                vector: 0x20,
            });
            assert_eq!(ioapic.set_line(1, Asserted), expected);
            assert_eq!(ioapic.set_line(1, Deasserted), None);
        }
    }
}
