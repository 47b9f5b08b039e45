//! Steal time: what a vCPU has waited for a core, and that it waits for one,
//! as KVM's `MSR_KVM_STEAL_TIME` tells the guest.
//!
//! Layout and meaning: Linux `Documentation/virt/kvm/x86/msr.rst`. The sum
//! lives in the guest's page alone, as with KVM: it goes on from what stands
//! there, so it never steps back when a vCPU goes and comes again.
//!
//! While `preempted` stands in the page, another vCPU of the guest may leave a
//! flush of translations there instead of asking for it by an interrupt. Every
//! wait ends with a flush, so it need not be looked for.

use core::sync::atomic::{Ordering, fence};

use vmm_shared::addr::Gpa;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::pv::ClockScale;
use crate::mem::GuestMemory;

const ENABLED: u64 = 1;
/// The page is aligned to 64 bytes: these bits must be 0.
const RESERVED: u64 = 0x3e;
/// Of `preempted`: the vCPU can run and has no core.
const PREEMPTED: u8 = 1;

/// The page, without its padding up to 64 bytes.
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Page {
    /// In nanoseconds.
    steal: u64,
    /// Odd while the page changes.
    version: u32,
    flags: u32,
}

const VERSION: u64 = 8;
const PREEMPTED_AT: u64 = 16;

/// The guest set a reserved bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserved;

/// One vCPU's steal time.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct StealTime {
    /// The MSR as written.
    msr: u64,
    /// The guest TSC since which it waits, and one more; 0 if it does not.
    waits: u64,
}

impl StealTime {
    /// The MSR as written.
    #[must_use]
    pub fn msr(&self) -> u64 {
        self.msr
    }

    /// The guest named its page.
    ///
    /// # Errors
    /// A reserved bit is set; nothing has changed.
    pub fn set_msr(&mut self, value: u64, memory: &impl GuestMemory) -> Result<(), Reserved> {
        if value & RESERVED != 0 {
            return Err(Reserved);
        }
        self.msr = value;
        self.add(0, memory);
        Ok(())
    }

    fn page(&self) -> Option<Gpa> {
        (self.msr & ENABLED != 0).then_some(Gpa(self.msr & !ENABLED))
    }

    /// From `now` on, in guest TSC ticks, the vCPU could run and has no core,
    /// unless that is so already.
    pub fn begin_wait(&mut self, now: u64, memory: &impl GuestMemory) {
        if self.waits != 0 {
            return;
        }
        self.waits = now.saturating_add(1);
        if let Some(Gpa(page)) = self.page() {
            let _ = memory.write(Gpa(page.wrapping_add(PREEMPTED_AT)), &PREEMPTED);
        }
    }

    /// The vCPU has a core at `now`. Whether it has waited for it: then its
    /// translations must be dropped before it runs.
    #[must_use]
    pub fn end_wait(&mut self, now: u64, scale: ClockScale, memory: &impl GuestMemory) -> bool {
        let Some(since) = core::mem::take(&mut self.waits).checked_sub(1) else {
            return false;
        };
        self.add(scale.ns(now.saturating_sub(since)), memory);
        true
    }

    /// Adds to the sum, and takes `preempted` back. A page that isn't there is
    /// ignored, as if it were off.
    fn add(&self, ns: u64, memory: &impl GuestMemory) {
        let Some(gpa) = self.page() else {
            return;
        };
        let at = |offset| Gpa(gpa.0.wrapping_add(offset));
        let Ok(page) = memory.read::<Page>(gpa) else {
            return;
        };
        // What stands there at first may be odd.
        let changing = page.version.wrapping_add(1) | 1;
        let _ = memory.write(at(VERSION), &changing);
        // Release, both: the guest takes the sum only between equal versions.
        fence(Ordering::Release);
        let _ = memory.write(gpa, &page.steal.wrapping_add(ns));
        let _ = memory.write(at(PREEMPTED_AT), &0_u8);
        fence(Ordering::Release);
        let _ = memory.write(at(VERSION), &changing.wrapping_add(1));
        // SeqCst: who still finds `preempted` here and leaves a flush has
        // changed the tables before the guest's next walk of them.
        fence(Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::sparse::SparseMemory;

    const PAGE: Gpa = Gpa(0x40);

    /// A TSC tick is a nanosecond.
    fn scale() -> ClockScale {
        ClockScale::new(1_000_000)
    }

    fn page(memory: &SparseMemory) -> (u64, u32, u8) {
        let page: Page = memory.read(PAGE).expect("inside");
        let preempted = memory.read(Gpa(PAGE.0 + PREEMPTED_AT)).expect("inside");
        (page.steal, page.version, preempted)
    }

    #[test]
    fn waits_add_up_and_are_shown_while_they_last() {
        let memory = SparseMemory::new(4096);
        let mut steal = StealTime::default();
        assert_eq!(steal.set_msr(PAGE.0 | 1, &memory), Ok(()));
        assert_eq!(page(&memory), (0, 2, 0));
        assert!(!steal.end_wait(5, scale(), &memory), "it did not wait");
        assert_eq!(page(&memory), (0, 2, 0));

        steal.begin_wait(1_000, &memory);
        steal.begin_wait(2_000, &memory);
        assert_eq!(page(&memory), (0, 2, 1));
        assert!(steal.end_wait(4_000, scale(), &memory));
        let (ns, version, preempted) = page(&memory);
        assert!((2_999..=3_000).contains(&ns), "{ns}");
        assert_eq!((version, preempted), (4, 0));

        // Clocks of two nodes may differ a little.
        steal.begin_wait(9_000, &memory);
        assert!(steal.end_wait(8_999, scale(), &memory));
        assert_eq!(page(&memory), (ns, 6, 0));
    }

    #[test]
    fn a_wait_from_tick_0_is_a_wait() {
        let memory = SparseMemory::new(4096);
        let mut steal = StealTime::default();
        steal.begin_wait(0, &memory);
        assert!(steal.end_wait(10, scale(), &memory));
        steal.begin_wait(u64::MAX, &memory);
        assert!(steal.end_wait(u64::MAX, scale(), &memory));
    }

    #[test]
    fn the_sum_goes_on_from_what_stands_there() {
        let memory = SparseMemory::new(4096);
        memory.write(PAGE, &700_u64).expect("inside");
        memory
            .write(Gpa(PAGE.0 + VERSION), &u32::MAX)
            .expect("inside");
        memory
            .write(Gpa(PAGE.0 + PREEMPTED_AT), &3_u8)
            .expect("inside");
        let mut steal = StealTime::default();
        assert_eq!(steal.set_msr(PAGE.0 | 1, &memory), Ok(()));
        let (ns, version, preempted) = page(&memory);
        assert_eq!((ns, version % 2, preempted), (700, 0, 0));
    }

    #[test]
    fn reserved_bits_are_refused_and_change_nothing() {
        let memory = SparseMemory::new(4096);
        let mut steal = StealTime::default();
        for bit in 1..6 {
            assert_eq!(steal.set_msr(PAGE.0 | 1 << bit | 1, &memory), Err(Reserved));
            assert_eq!(steal.set_msr(1 << bit, &memory), Err(Reserved));
        }
        assert_eq!(steal.msr(), 0);
        assert_eq!(page(&memory), (0, 0, 0));
    }

    #[test]
    fn a_page_outside_of_memory_is_ignored() {
        let memory = SparseMemory::new(4096);
        let mut steal = StealTime::default();
        for value in [1 << 50 | 1, !RESERVED, 4096 | 1] {
            assert_eq!(steal.set_msr(value, &memory), Ok(()));
            steal.begin_wait(1, &memory);
            assert!(steal.end_wait(2, scale(), &memory));
        }
    }
}
