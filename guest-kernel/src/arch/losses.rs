//! What the hypervisor says has been lost, and a lock that can't be waited for
//! in vain.
#![expect(unsafe_code, reason = "a lock for the heap")]

use core::ops::Range;
use core::sync::atomic::{AtomicU32, Ordering};

use spin::Once;
use vmm_shared::addr::VcpuId;
use vmm_shared::losses::LossRecord;
use vmm_shared::pv::Hypercall;

use super::{cpu, entry};
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
pub(super) struct HeapLock {
    /// As in the kernel's lock.
    holder: AtomicU32,
}

// SAFETY: it is given to one at a time: who has swapped its number for 0.
unsafe impl lock_api::RawMutex for HeapLock {
    const INIT: Self = Self {
        holder: AtomicU32::new(0),
    };
    type GuardMarker = lock_api::GuardNoSend;

    fn lock(&self) {
        while !self.try_lock() {
            if has_lost(self.holder.load(Ordering::Relaxed)) {
                panic!("a processor was lost with the heap's lock");
            }
            core::hint::spin_loop();
        }
    }

    fn try_lock(&self) -> bool {
        // While a processor comes up this is anything, and nobody is lost yet.
        let mine = entry::cpu().wrapping_add(1);
        let mine = u32::try_from(mine).map_or(u32::MAX, |mine| mine.max(1));
        // Acquire: with the Release of who had it before.
        self.holder
            .compare_exchange(0, mine, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
    }

    unsafe fn unlock(&self) {
        // Release: what was done with it is seen by the next.
        self.holder.store(0, Ordering::Release);
    }
}
