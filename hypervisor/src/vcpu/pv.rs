//! KVM's paravirtual interface, as stock Linux knows it: clock, end of
//! interrupt by a memory write, hypercalls; steal time is in [`super::steal`].
//!
//! Layouts: Linux `Documentation/virt/kvm/x86/msr.rst`. The pages are the
//! guest's; an address that it got wrong is ignored, as if the page were off.

use vmm_shared::addr::Gpa;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::steal::StealTime;
use crate::mem::GuestMemory;

/// Wakes the vCPU with a given APIC id from HLT.
pub const HYPERCALL_KICK_CPU: u64 = 5;
/// Sends an interrupt to up to 128 vCPUs.
pub const HYPERCALL_SEND_IPI: u64 = 10;
/// What a hypercall returns that we do not know: -KVM_ENOSYS.
pub const UNKNOWN_HYPERCALL: u64 = 1000_u64.wrapping_neg();

const ENABLED: u64 = 1;
/// The clock is the same on all vCPUs.
const CLOCK_STABLE: u8 = 1;

/// How guest TSC ticks become nanoseconds:
/// `(ticks << shift) * multiplier >> 32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockScale {
    multiplier: u32,
    shift: i8,
}

impl ClockScale {
    /// The scale for a TSC of this rate.
    #[must_use]
    pub fn new(tsc_khz: u32) -> Self {
        const NS_PER_MS: u128 = 1_000_000;
        let per_ms = u128::from(tsc_khz.max(1));
        // The multiplier has its top bit set: the most precision there is.
        let mut shift = 0_i8;
        loop {
            let ns = (NS_PER_MS << 64) / per_ms;
            let scaled = if shift < 0 { ns << -shift } else { ns >> shift } >> 32;
            match u32::try_from(scaled) {
                Err(_) => shift += 1,
                Ok(multiplier) if multiplier < 1 << 31 => shift -= 1,
                Ok(multiplier) => return Self { multiplier, shift },
            }
        }
    }

    /// So many ticks in nanoseconds; what no 64 bits hold is their most.
    #[must_use]
    pub fn ns(self, ticks: u64) -> u64 {
        let ticks = u128::from(ticks);
        let shifted = match self.shift {
            shift @ ..0 => ticks >> shift.unsigned_abs(),
            shift => ticks << shift.unsigned_abs(),
        };
        let scaled = shifted.saturating_mul(u128::from(self.multiplier)) >> 32;
        u64::try_from(scaled).unwrap_or(u64::MAX)
    }
}

#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct ClockPage {
    version: u32,
    padding: u32,
    tsc_timestamp: u64,
    system_time: u64,
    multiplier: u32,
    shift: i8,
    flags: u8,
    padding2: [u8; 2],
}

#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct WallClockPage {
    version: u32,
    seconds: u32,
    nanoseconds: u32,
}

/// One vCPU's paravirtual registers.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PvState {
    /// The clock page's MSR as written.
    pub system_time: u64,
    /// The wall clock's MSR as written.
    pub wall_clock: u64,
    /// What it has waited for a core.
    pub steal_time: StealTime,
    /// The end-of-interrupt word's MSR as written.
    pub eoi: u64,
    /// The guest has been told that it may end its interrupt in memory.
    eoi_offered: u64,
}

impl PvState {
    /// The guest named its clock page. The guest's TSC starts with the VM, so
    /// one write holds for ever: time is the scaled TSC.
    pub fn set_system_time(&mut self, value: u64, scale: ClockScale, memory: &impl GuestMemory) {
        self.system_time = value;
        if value & ENABLED == 0 {
            return;
        }
        let page = ClockPage {
            version: 2,
            padding: 0,
            tsc_timestamp: 0,
            system_time: 0,
            multiplier: scale.multiplier,
            shift: scale.shift,
            flags: CLOCK_STABLE,
            padding2: [0; 2],
        };
        let _ = memory.write(Gpa(value & !ENABLED), &page);
    }

    /// The guest asks what time it was when its TSC was 0.
    pub fn set_wall_clock(&mut self, value: u64, boot_ns: u64, memory: &impl GuestMemory) {
        const NS_PER_S: u64 = 1_000_000_000;
        self.wall_clock = value;
        let page = WallClockPage {
            version: 2,
            seconds: u32::try_from(boot_ns / NS_PER_S).unwrap_or(u32::MAX),
            nanoseconds: u32::try_from(boot_ns % NS_PER_S).expect("less than a second"),
        };
        let _ = memory.write(Gpa(value), &page);
    }

    /// The guest named the word in which it ends interrupts.
    pub fn set_eoi(&mut self, value: u64) {
        self.eoi = value;
        self.eoi_offered = 0;
    }

    fn eoi_word(&self) -> Option<Gpa> {
        (self.eoi & ENABLED != 0).then_some(Gpa(self.eoi & !0x3))
    }

    /// Lets the guest end the interrupt being delivered by clearing a bit.
    /// Only for an interrupt that nothing waits behind. Never waits: the core
    /// has announced that it enters the guest, and others may wait for that.
    pub fn offer_eoi(&mut self, memory: &impl GuestMemory) {
        if let Some(word) = self.eoi_word() {
            let offer = 1_u32.to_le_bytes();
            self.eoi_offered = memory.write_bytes_now(word, &offer).is_ok().into();
        }
    }

    /// After an exit: whether the guest has ended its interrupt in memory.
    /// If it has not, it will do so by its APIC.
    #[must_use]
    pub fn take_eoi(&mut self, memory: &impl GuestMemory) -> bool {
        if core::mem::take(&mut self.eoi_offered) == 0 {
            return false;
        }
        let Some(word) = self.eoi_word() else {
            return false;
        };
        match memory.read::<u32>(word) {
            Ok(value) if value & 1 == 0 => true,
            Ok(_) => {
                let _ = memory.write(word, &0_u32);
                false
            }
            Err(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::sparse::SparseMemory;

    #[test]
    fn ticks_become_nanoseconds_at_any_rate() {
        for khz in [1_000, 999_999, 1_000_000, 2_449_962, 3_500_000, 10_000_000] {
            let scale = ClockScale::new(khz);
            let ns = scale.ns(u64::from(khz) * 1000 * 3600);
            let error = ns.abs_diff(3_600_000_000_000);
            assert!(error < 3600 * 3, "{khz} kHz: off by {error} ns in an hour");
        }
    }

    #[test]
    fn an_interrupt_ended_in_memory_is_noticed_once() {
        let memory = SparseMemory::new(4096);
        let mut pv = PvState::default();
        assert!(!pv.take_eoi(&memory), "not switched on");
        pv.set_eoi(0x101);
        pv.offer_eoi(&memory);
        assert_eq!(memory.read::<u32>(Gpa(0x100)), Ok(1));
        memory.write(Gpa(0x100), &0_u32).expect("fits");
        assert!(pv.take_eoi(&memory));
        assert!(!pv.take_eoi(&memory));
    }

    #[test]
    fn an_offer_that_was_not_taken_is_withdrawn() {
        let memory = SparseMemory::new(4096);
        let mut pv = PvState::default();
        pv.set_eoi(0x101);
        pv.offer_eoi(&memory);
        assert!(!pv.take_eoi(&memory));
        assert_eq!(memory.read::<u32>(Gpa(0x100)), Ok(0));
    }

    #[test]
    fn pages_outside_of_memory_are_ignored() {
        let memory = SparseMemory::new(4096);
        let mut pv = PvState::default();
        pv.set_system_time(u64::MAX, ClockScale::new(1_000_000), &memory);
        pv.set_wall_clock(4090, 0, &memory);
        pv.set_eoi(u64::MAX);
        pv.offer_eoi(&memory);
        assert!(!pv.take_eoi(&memory));
    }
}
