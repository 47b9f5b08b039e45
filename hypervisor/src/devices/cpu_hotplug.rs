//! The register block by which a guest's ACPI code learns which vCPUs come
//! and go, and says what it has done about it.
//!
//! ```text
//!   0   4 bytes  write: which vCPU the other registers are about
//!                read: the first with an event, which is chosen; ones if none
//!   4   1 byte   read: bit 0 it is there, bit 1 it has come, bit 2 it is to go
//!                write: bits 1 and 2 end the event, bit 3 takes the vCPU away
//!   8   4 bytes  write: the event that the guest reports on (`_OST`)
//!   12  4 bytes  write: its status, which makes the report
//! ```
//!
//! The interrupt line is up as long as there is an event: one that comes
//! before the guest's driver waits for it.

use alloc::vec;
use alloc::vec::Vec;

use vmm_shared::addr::VcpuId;

use super::{IrqLevel, Width};

/// Registers, by offset.
const SELECT: u16 = 0;
const FLAGS: u16 = 4;
const OST_EVENT: u16 = 8;
const OST_STATUS: u16 = 12;
/// Bytes of the block.
pub const LEN: u16 = 16;

/// The vCPU is there.
pub const PRESENT: u8 = 1 << 0;
/// It has come.
pub const INSERTED: u8 = 1 << 1;
/// It is to go.
pub const REMOVING: u8 = 1 << 2;
/// Takes it away.
pub const EJECT: u8 = 1 << 3;

/// ACPI 6.5, table 6.13: what `_OST` reports on.
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
    /// The guest has taken a vCPU into service, as far as its ACPI code is
    /// concerned.
    Accepted(VcpuId),
    /// The guest will not use a vCPU that has come, for this reason.
    Declined(VcpuId, u32),
    /// The guest will not let go of a vCPU, for this reason.
    Kept(VcpuId, u32),
    /// The guest has let go of a vCPU.
    Ejected(VcpuId),
}

/// The block.
#[derive(Clone, Debug)]
pub struct CpuHotplug {
    /// Flags by vCPU.
    vcpus: Vec<u8>,
    selected: usize,
    ost_event: u32,
}

impl CpuHotplug {
    /// A block for so many vCPUs, of which those are there that `is_present`
    /// says.
    #[must_use]
    pub fn new(vcpus: u16, is_present: impl Fn(VcpuId) -> bool) -> Self {
        let mut flags = vec![0; usize::from(vcpus)];
        for (vcpu, flags) in (0..).map(VcpuId).zip(&mut flags) {
            if is_present(vcpu) {
                *flags = PRESENT;
            }
        }
        Self {
            vcpus: flags,
            selected: 0,
            ost_event: 0,
        }
    }

    /// Whether the guest has a vCPU.
    #[must_use]
    pub fn is_present(&self, vcpu: VcpuId) -> bool {
        self.flags(vcpu) & PRESENT != 0
    }

    fn flags(&self, vcpu: VcpuId) -> u8 {
        let flags = self.vcpus.get(usize::from(vcpu.0));
        flags.copied().unwrap_or(0)
    }

    /// Tells the guest that a vCPU has come.
    pub fn insert(&mut self, vcpu: VcpuId) {
        if let Some(flags) = self.vcpus.get_mut(usize::from(vcpu.0)) {
            *flags = PRESENT | INSERTED;
        }
    }

    /// Asks the guest to let go of a vCPU.
    pub fn ask_back(&mut self, vcpu: VcpuId) {
        if let Some(flags) = self.vcpus.get_mut(usize::from(vcpu.0))
            && *flags & PRESENT != 0
        {
            *flags |= REMOVING;
        }
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
        let has_event = |flags: &u8| flags & (INSERTED | REMOVING) != 0;
        self.vcpus.iter().position(has_event)
    }

    fn selected(&self) -> Option<VcpuId> {
        let number = u16::try_from(self.selected).ok()?;
        (self.selected < self.vcpus.len()).then_some(VcpuId(number))
    }

    /// Reads a register. What doesn't exist reads as ones.
    pub fn read(&mut self, offset: u16, width: Width) -> u32 {
        match (offset, width) {
            (SELECT, Width::Dword) => match self.next_event() {
                Some(vcpu) => {
                    self.selected = vcpu;
                    u32::try_from(vcpu).unwrap_or(u32::MAX)
                }
                None => u32::MAX,
            },
            (FLAGS, Width::Byte) => {
                let flags = self.vcpus.get(self.selected);
                flags.copied().unwrap_or(0).into()
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

    fn write_flags(&mut self, value: u8) -> HotplugEffect {
        let present = self.vcpus.iter().filter(|flags| **flags & PRESENT != 0);
        let is_last = present.count() == 1;
        let Some(vcpu) = self.selected() else {
            return HotplugEffect::None;
        };
        let flags = &mut self.vcpus[self.selected];
        *flags &= !(value & (INSERTED | REMOVING));
        // Without any vCPU there would be nobody to ask for another.
        if value & EJECT == 0 || *flags & PRESENT == 0 || is_last {
            return HotplugEffect::None;
        }
        *flags = 0;
        HotplugEffect::Ejected(vcpu)
    }

    /// What the guest says in `_OST`. It reports success of an ejection, too,
    /// but that is known by then.
    fn report(&mut self, status: u32) -> HotplugEffect {
        let Some(vcpu) = self.selected() else {
            return HotplugEffect::None;
        };
        match (self.ost_event & 0xff, status) {
            (OST_DEVICE_CHECK, OST_SUCCESS) => HotplugEffect::Accepted(vcpu),
            (OST_DEVICE_CHECK, _) if self.is_present(vcpu) => {
                self.vcpus[self.selected] = 0;
                HotplugEffect::Declined(vcpu, status)
            }
            (OST_EJECT_REQUEST, OST_SUCCESS | OST_EJECT_IN_PROGRESS) => HotplugEffect::None,
            (OST_EJECT_REQUEST, _) => HotplugEffect::Kept(vcpu, status),
            _ => HotplugEffect::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: u32 = u32::MAX;

    fn block() -> CpuHotplug {
        CpuHotplug::new(4, |vcpu| vcpu.0 < 2)
    }

    fn flags(block: &mut CpuHotplug, vcpu: u32) -> u32 {
        let _ = block.write(SELECT, Width::Dword, vcpu);
        block.read(FLAGS, Width::Byte)
    }

    fn put(block: &mut CpuHotplug, flags: u8) -> HotplugEffect {
        block.write(FLAGS, Width::Byte, flags.into())
    }

    fn report(block: &mut CpuHotplug, event: u32, status: u32) -> HotplugEffect {
        let _ = block.write(OST_EVENT, Width::Dword, event);
        block.write(OST_STATUS, Width::Dword, status)
    }

    #[test]
    fn those_are_there_that_the_vm_starts_with() {
        let mut block = block();
        let seen: Vec<_> = (0..5).map(|vcpu| flags(&mut block, vcpu)).collect();
        assert_eq!(seen, [1, 1, 0, 0, 0]);
        assert_eq!(block.read(SELECT, Width::Dword), NONE);
        assert_eq!(block.irq_level(), IrqLevel::Deasserted);
    }

    #[test]
    fn one_that_comes_is_an_event_until_the_guest_has_seen_it() {
        let mut block = block();
        block.insert(VcpuId(3));
        block.insert(VcpuId(2));
        assert_eq!(block.irq_level(), IrqLevel::Asserted);
        for vcpu in [2, 3] {
            assert_eq!(block.read(SELECT, Width::Dword), vcpu);
            let flags = block.read(FLAGS, Width::Byte);
            assert_eq!(flags, u32::from(PRESENT | INSERTED));
            assert_eq!(put(&mut block, INSERTED), HotplugEffect::None);
        }
        assert_eq!(block.read(SELECT, Width::Dword), NONE);
        assert_eq!(block.irq_level(), IrqLevel::Deasserted);
        assert_eq!(flags(&mut block, 3), u32::from(PRESENT));
        let accepted = HotplugEffect::Accepted(VcpuId(3));
        assert_eq!(report(&mut block, 1, 0), accepted);
    }

    #[test]
    fn one_that_goes_is_gone_when_the_guest_ejects_it() {
        let mut block = block();
        block.ask_back(VcpuId(1));
        assert_eq!(block.read(SELECT, Width::Dword), 1);
        assert_eq!(put(&mut block, REMOVING), HotplugEffect::None);
        assert!(block.is_present(VcpuId(1)), "not before it is ejected");
        assert_eq!(put(&mut block, EJECT), HotplugEffect::Ejected(VcpuId(1)));
        assert_eq!(flags(&mut block, 1), 0);
        assert_eq!(put(&mut block, EJECT), HotplugEffect::None, "once");
        assert_eq!(report(&mut block, 3, 0), HotplugEffect::None);
        block.ask_back(VcpuId(1));
        assert_eq!(block.irq_level(), IrqLevel::Deasserted, "it is not there");
    }

    #[test]
    fn a_guest_may_refuse() {
        let mut block = block();
        block.ask_back(VcpuId(1));
        let _ = block.read(SELECT, Width::Dword);
        let _ = put(&mut block, REMOVING);
        assert_eq!(report(&mut block, 3, 0x84), HotplugEffect::None, "at it");
        let kept = HotplugEffect::Kept(VcpuId(1), 0x82);
        assert_eq!(report(&mut block, 3, 0x82), kept);
        assert!(block.is_present(VcpuId(1)));
        block.insert(VcpuId(2));
        let _ = block.read(SELECT, Width::Dword);
        let declined = HotplugEffect::Declined(VcpuId(2), 1);
        assert_eq!(report(&mut block, 1, 1), declined);
        assert!(!block.is_present(VcpuId(2)));
        assert_eq!(block.irq_level(), IrqLevel::Deasserted);
    }

    #[test]
    fn the_last_vcpu_stays() {
        let mut block = CpuHotplug::new(2, |vcpu| vcpu.0 == 1);
        assert_eq!(flags(&mut block, 1), u32::from(PRESENT));
        assert_eq!(put(&mut block, EJECT), HotplugEffect::None);
        assert!(block.is_present(VcpuId(1)));
    }

    #[test]
    fn nonsense_has_no_effect() {
        let mut block = block();
        for vcpu in [4, 0xffff, u32::MAX] {
            assert_eq!(flags(&mut block, vcpu), 0);
            assert_eq!(put(&mut block, 0xff), HotplugEffect::None);
            assert_eq!(report(&mut block, 3, 1), HotplugEffect::None);
        }
        for offset in 0..LEN {
            for width in [Width::Byte, Width::Word, Width::Dword] {
                let _ = block.write(offset, width, 0);
                let _ = block.read(offset, width);
            }
        }
        assert!(block.is_present(VcpuId(0)) && block.is_present(VcpuId(1)));
    }
}
