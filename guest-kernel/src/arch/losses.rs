//! What the hypervisor says has been lost, and a lock that can't be waited for
//! in vain.
#![expect(unsafe_code, reason = "a lock for the heap")]

use core::ops::Range;

use spin::Once;
use vmm_shared::addr::VcpuId;
use vmm_shared::losses::LossRecord;
use vmm_shared::pv::Hypercall;

use super::{cpu, entry};
use crate::holder::{Attempt, Holder};
use crate::mem::losses::Sources;

static RECORD: Once<LossRecord> = Once::new();

/// From now on nodes may be lost: the VM goes on as long as it has its memory
/// up to an address. `None` if the hypervisor can't do that.
pub(super) fn survive(record: LossRecord, end: u64) -> Option<Sources> {
    let (refused, _) = cpu::hypercall_with(Hypercall::Survive, end);
    if refused != 0 {
        return None;
    }
    RECORD.call_once(|| record);
    Some(Sources { record, next })
}

fn next(from: u64) -> Option<Range<u64>> {
    let (start, len) = cpu::hypercall_with(Hypercall::NextLost, from);
    (start != u64::MAX).then(|| start..start.saturating_add(len))
}

/// Whether a processor is lost, by its number plus 1.
pub(super) fn has_lost(holder: u32) -> bool {
    let vcpu = holder
        .checked_sub(1)
        .and_then(|cpu| u16::try_from(cpu).ok());
    let record = RECORD.get().zip(vcpu);
    record.is_some_and(|(record, vcpu)| record.has_lost(VcpuId(vcpu)))
}

/// The heap's lock. Page faults use the heap without the kernel's lock, so a
/// processor may be lost that has it.
pub(super) struct HeapLock(Holder);

// SAFETY: it is given to one at a time, who alone gives it back.
unsafe impl lock_api::RawMutex for HeapLock {
    const INIT: Self = Self(Holder::free());
    type GuardMarker = lock_api::GuardNoSend;

    fn lock(&self) {
        while !self.try_lock() {
            core::hint::spin_loop();
        }
    }

    fn try_lock(&self) -> bool {
        match self.0.try_take(entry::holder(), has_lost) {
            Attempt::Taken => true,
            Attempt::Busy => false,
            Attempt::Dead(_) => panic!("a processor was lost with the heap's lock"),
            Attempt::PutOut => cpu::stop(),
        }
    }

    unsafe fn unlock(&self) {
        self.0.release();
    }
}
