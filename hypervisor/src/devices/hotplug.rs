//! The register block by which a guest's ACPI code learns which units (vCPUs,
//! or blocks of memory) come and go, and says what it has done about it.
//!
//! ```text
//!   0   4 bytes  write: which unit the other registers are about
//!                read: the first with an event, which is chosen; ones if none
//!   4   1 byte   read: bit 0 it is there, bit 1 it has come, bit 2 it is to go
//!                write: bits 1 and 2 end the event, bit 3 takes the unit away
//!   8   4 bytes  write: the event that the guest reports on (`_OST`)
//!   12  4 bytes  write: its status, which makes the report
//! ```
//!
//! The interrupt line is up as long as there is an event: one that comes
//! before the guest's driver waits for it. An event that no read has shown yet can
//! be taken back. Until the guest has ended the event, a
//! unit that has come is not shown as there: otherwise a guest that boots would
//! find it first, and refuse it when it hears of it.

use alloc::vec;
use alloc::vec::Vec;

use super::{IrqLevel, Width};

/// Registers, by offset.
const SELECT: u16 = 0;
const FLAGS: u16 = 4;
const OST_EVENT: u16 = 8;
const OST_STATUS: u16 = 12;
/// Bytes of the block.
pub const LEN: u16 = 16;

/// The unit is there.
pub const PRESENT: u8 = 1 << 0;
/// It has come.
pub const INSERTED: u8 = 1 << 1;
/// It is to go.
pub const REMOVING: u8 = 1 << 2;
/// Takes it away.
pub const EJECT: u8 = 1 << 3;
/// Not shown: the guest has not said yet whether it will use it.
const UNANSWERED: u8 = 1 << 7;
/// Not shown: a read has told the guest of the unit's event.
const SEEN: u8 = 1 << 6;
/// Events.
const EVENTS: u8 = INSERTED | REMOVING;

/// ACPI 6.5, table 6.13: what `_OST` reports on. An ejection that the guest has
/// begun by itself is another number, and answers nothing.
const OST_DEVICE_CHECK: u32 = 1;
const OST_EJECT_REQUEST: u32 = 3;
/// Success, for any event.
const OST_SUCCESS: u32 = 0;
/// Table 6.15: the guest is still at it.
const OST_EJECT_IN_PROGRESS: u32 = 0x84;

/// What a write has led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HotplugEffect {
    /// Nothing.
    None,
    /// The guest has taken a unit into service, as far as its ACPI code is
    /// concerned.
    Accepted(u16),
    /// The guest will not use a unit that has come, for this reason.
    Declined(u16, u32),
    /// The guest will not let go of a unit, for this reason.
    Kept(u16, u32),
    /// The guest has let go of a unit.
    Ejected(u16),
}

impl HotplugEffect {
    /// The unit that it is about.
    #[must_use]
    pub const fn unit(self) -> Option<u16> {
        match self {
            Self::None => None,
            Self::Accepted(unit)
            | Self::Declined(unit, _)
            | Self::Kept(unit, _)
            | Self::Ejected(unit) => Some(unit),
        }
    }
}

/// The block.
#[derive(Clone, Debug)]
pub struct Hotplug {
    /// Flags by unit.
    units: Vec<u8>,
    /// So many are always there.
    least: usize,
    selected: usize,
    ost_event: u32,
}

impl Hotplug {
    /// A block for so many units, of which those are there that `is_present`
    /// says, and never fewer than `least`.
    #[must_use]
    pub fn new(units: u16, least: usize, is_present: impl Fn(u16) -> bool) -> Self {
        let mut flags = vec![0; usize::from(units)];
        for (unit, flags) in (0..).zip(&mut flags) {
            if is_present(unit) {
                *flags = PRESENT;
            }
        }
        Self {
            units: flags,
            least,
            selected: 0,
            ost_event: 0,
        }
    }

    /// Whether the guest has a unit.
    #[must_use]
    pub fn is_present(&self, unit: u16) -> bool {
        self.flags(unit) & PRESENT != 0
    }

    fn flags(&self, unit: u16) -> u8 {
        let flags = self.units.get(usize::from(unit));
        flags.copied().unwrap_or(0)
    }

    /// Tells the guest that a unit has come.
    pub fn insert(&mut self, unit: u16) {
        if let Some(flags) = self.units.get_mut(usize::from(unit)) {
            *flags = PRESENT | INSERTED | UNANSWERED;
        }
    }

    /// Asks the guest to let go of a unit.
    pub fn ask_back(&mut self, unit: u16) {
        if let Some(flags) = self.units.get_mut(usize::from(unit))
            && *flags & PRESENT != 0
        {
            if *flags & EVENTS == 0 {
                *flags &= !SEEN;
            }
            *flags |= REMOVING;
        }
    }

    /// Takes a unit away again that has come, unless the guest has seen that;
    /// whether it has not.
    pub fn take_back(&mut self, unit: u16) -> bool {
        let is_unseen = self.flags(unit) & (INSERTED | SEEN) == INSERTED && self.can_spare_one();
        if is_unseen {
            self.units[usize::from(unit)] = 0;
        }
        is_unseen
    }

    /// Lets the guest keep a unit that was to go, unless it has seen that;
    /// whether it has not.
    pub fn leave(&mut self, unit: u16) -> bool {
        let is_unseen = self.flags(unit) & (REMOVING | SEEN) == REMOVING;
        if is_unseen {
            self.units[usize::from(unit)] &= !REMOVING;
        }
        is_unseen
    }

    /// The level of the interrupt line.
    #[must_use]
    pub fn irq_level(&self) -> IrqLevel {
        match self.next_event() {
            Some(_) => IrqLevel::Asserted,
            None => IrqLevel::Deasserted,
        }
    }

    fn next_event(&self) -> Option<usize> {
        let has_event = |flags: &u8| flags & EVENTS != 0;
        self.units.iter().position(has_event)
    }

    fn selected(&self) -> Option<u16> {
        let number = u16::try_from(self.selected).ok()?;
        (self.selected < self.units.len()).then_some(number)
    }

    /// Reads a register. What doesn't exist reads as ones.
    pub fn read(&mut self, offset: u16, width: Width) -> u32 {
        match (offset, width) {
            (SELECT, Width::Dword) => match self.next_event() {
                Some(unit) => {
                    self.selected = unit;
                    self.units[unit] |= SEEN;
                    u32::try_from(unit).unwrap_or(u32::MAX)
                }
                None => u32::MAX,
            },
            (FLAGS, Width::Byte) => {
                let Some(flags) = self.units.get_mut(self.selected) else {
                    return 0;
                };
                if *flags & EVENTS != 0 {
                    *flags |= SEEN;
                }
                let shown = match *flags & INSERTED {
                    0 => PRESENT | EVENTS,
                    _ => EVENTS,
                };
                u32::from(*flags & shown)
            }
            _ => u32::MAX,
        }
    }

    /// Writes a register.
    pub fn write(&mut self, offset: u16, width: Width, value: u32) -> HotplugEffect {
        let [byte, ..] = value.to_le_bytes();
        match (offset, width) {
            (SELECT, Width::Dword) => {
                self.selected = usize::try_from(value).unwrap_or(usize::MAX);
                HotplugEffect::None
            }
            (FLAGS, Width::Byte) => self.write_flags(byte),
            (OST_EVENT, Width::Dword) => {
                self.ost_event = value;
                HotplugEffect::None
            }
            (OST_STATUS, Width::Dword) => self.report(value),
            _ => HotplugEffect::None,
        }
    }

    fn can_spare_one(&self) -> bool {
        let present = self.units.iter().filter(|flags| **flags & PRESENT != 0);
        present.count() > self.least
    }

    fn write_flags(&mut self, value: u8) -> HotplugEffect {
        let can_go = self.can_spare_one();
        let Some(unit) = self.selected() else {
            return HotplugEffect::None;
        };
        let flags = &mut self.units[self.selected];
        *flags &= !(value & EVENTS);
        if value & EJECT == 0 || *flags & PRESENT == 0 || !can_go {
            return HotplugEffect::None;
        }
        *flags = 0;
        HotplugEffect::Ejected(unit)
    }

    /// What the guest says in `_OST`. It reports success of an ejection, too,
    /// but that is known by then.
    fn report(&mut self, status: u32) -> HotplugEffect {
        let Some(unit) = self.selected() else {
            return HotplugEffect::None;
        };
        let can_go = self.can_spare_one();
        let flags = &mut self.units[self.selected];
        match (self.ost_event, status) {
            // Before it has ended the event, it answers an earlier one.
            (OST_DEVICE_CHECK, _) if *flags & INSERTED != 0 => HotplugEffect::None,
            (OST_EJECT_REQUEST, _) if *flags & REMOVING != 0 => HotplugEffect::None,
            (OST_DEVICE_CHECK, OST_SUCCESS) if *flags & UNANSWERED != 0 => {
                *flags &= !UNANSWERED;
                HotplugEffect::Accepted(unit)
            }
            (OST_DEVICE_CHECK, _) if *flags & UNANSWERED != 0 && can_go => {
                *flags = 0;
                HotplugEffect::Declined(unit, status)
            }
            (OST_EJECT_REQUEST, OST_SUCCESS | OST_EJECT_IN_PROGRESS) => HotplugEffect::None,
            (OST_EJECT_REQUEST, _) => HotplugEffect::Kept(unit, status),
            _ => HotplugEffect::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: u32 = u32::MAX;

    fn block() -> Hotplug {
        Hotplug::new(4, 1, |unit| unit < 2)
    }

    fn flags(block: &mut Hotplug, unit: u32) -> u32 {
        let _ = block.write(SELECT, Width::Dword, unit);
        block.read(FLAGS, Width::Byte)
    }

    fn put(block: &mut Hotplug, flags: u8) -> HotplugEffect {
        block.write(FLAGS, Width::Byte, flags.into())
    }

    fn report(block: &mut Hotplug, event: u32, status: u32) -> HotplugEffect {
        let _ = block.write(OST_EVENT, Width::Dword, event);
        block.write(OST_STATUS, Width::Dword, status)
    }

    #[test]
    fn those_are_there_that_the_vm_starts_with() {
        let mut block = block();
        let seen: Vec<_> = (0..5).map(|unit| flags(&mut block, unit)).collect();
        assert_eq!(seen, [1, 1, 0, 0, 0]);
        assert_eq!(block.read(SELECT, Width::Dword), NONE);
        assert_eq!(block.irq_level(), IrqLevel::Deasserted);
    }

    #[test]
    fn one_that_comes_is_an_event_until_the_guest_has_seen_it() {
        let mut block = block();
        block.insert(3);
        block.insert(2);
        assert_eq!(block.irq_level(), IrqLevel::Asserted);
        for unit in [2, 3] {
            assert_eq!(block.read(SELECT, Width::Dword), unit);
            let flags = block.read(FLAGS, Width::Byte);
            assert_eq!(flags, u32::from(INSERTED), "not shown as there yet");
            assert_eq!(put(&mut block, INSERTED), HotplugEffect::None);
        }
        assert_eq!(block.read(SELECT, Width::Dword), NONE);
        assert_eq!(block.irq_level(), IrqLevel::Deasserted);
        assert_eq!(flags(&mut block, 3), u32::from(PRESENT));
        let accepted = HotplugEffect::Accepted(3);
        assert_eq!(report(&mut block, 1, 0), accepted);
    }

    #[test]
    fn one_that_goes_is_gone_when_the_guest_ejects_it() {
        let mut block = block();
        block.ask_back(1);
        assert_eq!(block.read(SELECT, Width::Dword), 1);
        assert_eq!(put(&mut block, REMOVING), HotplugEffect::None);
        assert!(block.is_present(1), "not before it is ejected");
        assert_eq!(put(&mut block, EJECT), HotplugEffect::Ejected(1));
        assert_eq!(flags(&mut block, 1), 0);
        assert_eq!(put(&mut block, EJECT), HotplugEffect::None, "once");
        assert_eq!(report(&mut block, 3, 0), HotplugEffect::None);
        block.ask_back(1);
        assert_eq!(block.irq_level(), IrqLevel::Deasserted, "it is not there");
    }

    #[test]
    fn a_guest_may_refuse() {
        let mut block = block();
        block.ask_back(1);
        let _ = block.read(SELECT, Width::Dword);
        let _ = put(&mut block, REMOVING);
        assert_eq!(report(&mut block, 3, 0x84), HotplugEffect::None, "at it");
        let kept = HotplugEffect::Kept(1, 0x82);
        assert_eq!(report(&mut block, 3, 0x82), kept);
        assert!(block.is_present(1));
        block.insert(2);
        let _ = block.read(SELECT, Width::Dword);
        let none = report(&mut block, 1, 1);
        assert_eq!(none, HotplugEffect::None, "it has not seen this one");
        let _ = put(&mut block, INSERTED);
        let declined = HotplugEffect::Declined(2, 1);
        assert_eq!(report(&mut block, 1, 1), declined);
        assert!(!block.is_present(2));
        assert_eq!(block.irq_level(), IrqLevel::Deasserted);
    }

    #[test]
    fn what_the_guest_has_taken_it_can_not_decline() {
        let mut block = block();
        block.insert(2);
        let _ = block.read(SELECT, Width::Dword);
        let _ = put(&mut block, INSERTED);
        assert_eq!(report(&mut block, 1, 0), HotplugEffect::Accepted(2));
        for status in [0, 1] {
            assert_eq!(report(&mut block, 1, status), HotplugEffect::None, "once");
        }
        assert_eq!(flags(&mut block, 1), u32::from(PRESENT));
        assert_eq!(
            report(&mut block, 1, 1),
            HotplugEffect::None,
            "never offered"
        );
        assert!(block.is_present(1) && block.is_present(2));
    }

    #[test]
    fn what_the_guest_has_not_looked_at_can_be_taken_back() {
        let mut block = block();
        block.insert(2);
        block.ask_back(1);
        assert!(
            !block.take_back(1) && !block.leave(2),
            "not what they wait for"
        );
        assert!(block.take_back(2) && block.leave(1));
        assert_eq!(block.irq_level(), IrqLevel::Deasserted);
        assert!(!block.is_present(2) && block.is_present(1));
        assert!(!block.take_back(2) && !block.leave(1), "once");
        // The guest was about to: it finds nothing, and what it says is void.
        let _ = block.write(SELECT, Width::Dword, 2);
        assert_eq!(put(&mut block, INSERTED), HotplugEffect::None);
        assert_eq!(flags(&mut block, 2), 0);
        assert_eq!(report(&mut block, 1, 1), HotplugEffect::None);

        assert!(!block.take_back(9) && !block.leave(9));
    }

    /// Whichever register has shown it; ended or not.
    #[test]
    fn what_a_read_has_shown_is_not_taken_back() {
        type Look = fn(&mut Hotplug, u32);
        let looks: [Look; 2] = [
            |block, unit| assert_eq!(block.read(SELECT, Width::Dword), unit),
            |block, unit| assert_ne!(flags(block, unit), 0),
        ];
        for look in looks {
            let mut block = block();
            block.insert(2);
            look(&mut block, 2);
            assert!(!block.take_back(2), "it may be about to use it");
            let _ = put(&mut block, INSERTED);
            assert!(!block.take_back(2), "the guest is at it");
            assert_eq!(report(&mut block, 1, 0), HotplugEffect::Accepted(2));
            // The next event is another.
            block.ask_back(2);
            assert!(block.leave(2));
            block.ask_back(2);
            look(&mut block, 2);
            assert!(!block.leave(2));
            let _ = put(&mut block, REMOVING);
            assert!(!block.leave(2));
            assert!(block.is_present(2));
        }
    }

    /// A guest's administrator tries to eject what is to go, and fails.
    #[test]
    fn an_ejection_of_the_guests_own_is_no_answer() {
        let mut block = block();
        block.ask_back(1);
        let _ = block.write(SELECT, Width::Dword, 1);
        for event in [3, 0x103] {
            assert_eq!(report(&mut block, event, 0x82), HotplugEffect::None);
        }
        assert_eq!(block.read(SELECT, Width::Dword), 1, "it is still to go");
        let _ = put(&mut block, REMOVING);
        assert_eq!(report(&mut block, 0x103, 0x82), HotplugEffect::None);
        assert_eq!(report(&mut block, 3, 0x82), HotplugEffect::Kept(1, 0x82));
    }

    #[test]
    fn the_last_unit_stays_if_one_must() {
        let mut block = Hotplug::new(2, 1, |unit| unit == 1);
        assert_eq!(flags(&mut block, 1), u32::from(PRESENT));
        assert_eq!(put(&mut block, EJECT), HotplugEffect::None);
        assert!(block.is_present(1));
        let mut block = Hotplug::new(2, 0, |unit| unit == 1);
        assert_eq!(flags(&mut block, 1), u32::from(PRESENT));
        assert_eq!(put(&mut block, EJECT), HotplugEffect::Ejected(1));
    }

    #[test]
    fn a_block_without_units_is_silent() {
        let mut block = Hotplug::new(0, 0, |_| true);
        block.insert(0);
        block.ask_back(0);
        assert_eq!(block.read(SELECT, Width::Dword), NONE);
        assert_eq!(flags(&mut block, 0), 0);
        assert_eq!(put(&mut block, 0xff), HotplugEffect::None);
    }

    #[test]
    fn nonsense_has_no_effect() {
        let mut block = block();
        for unit in [4, 0xffff, u32::MAX] {
            assert_eq!(flags(&mut block, unit), 0);
            assert_eq!(put(&mut block, 0xff), HotplugEffect::None);
            assert_eq!(report(&mut block, 3, 1), HotplugEffect::None);
        }
        for offset in 0..LEN {
            for width in [Width::Byte, Width::Word, Width::Dword] {
                let _ = block.write(offset, width, 0);
                let _ = block.read(offset, width);
            }
        }
        assert!(block.is_present(0) && block.is_present(1));
    }
}
