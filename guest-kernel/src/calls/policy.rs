//! How threads are scheduled: all alike. There are no real-time classes, which
//! are refused as to who may not have them.

use linux_raw_sys::general::{SCHED_BATCH, SCHED_FIFO, SCHED_IDLE, SCHED_NORMAL, SCHED_RR};

use super::signed;
use crate::errno::{Errno, Outcome, Result};
use crate::kernel::Kernel;
use crate::sched::SLICE_NS;
use crate::wait::Tid;

impl Kernel {
    /// The thread that a number means, 0 being the caller.
    fn scheduled(&self, tid: Tid, which: u64) -> Result<Tid> {
        let which = match u32::try_from(signed(which)) {
            Err(_) => return Err(Errno::EINVAL),
            Ok(0) => tid,
            Ok(which) => which,
        };
        match self.threads.contains_key(&which) {
            true => Ok(which),
            false => Err(Errno::ESRCH),
        }
    }

    pub(crate) fn sched_getscheduler(&mut self, tid: Tid, which: u64) -> Outcome {
        self.scheduled(tid, which)?;
        Ok(SCHED_NORMAL.into())
    }

    pub(crate) fn sched_getparam(&mut self, tid: Tid, which: u64, address: u64) -> Outcome {
        self.scheduled(tid, which)?;
        self.put(tid, address, &0_u32)?;
        Ok(0)
    }

    pub(crate) fn sched_setscheduler(
        &mut self,
        tid: Tid,
        which: u64,
        policy: u32,
        address: u64,
    ) -> Outcome {
        let priority: u32 = self.get(tid, address)?;
        self.scheduled(tid, which)?;
        match (policy, priority) {
            (SCHED_NORMAL, 0) => Ok(0),
            (SCHED_BATCH | SCHED_IDLE, 0) => Err(Errno::EPERM.into()),
            (SCHED_FIFO | SCHED_RR, 1..=99) => Err(Errno::EPERM.into()),
            _ => Err(Errno::EINVAL.into()),
        }
    }

    pub(crate) fn sched_rr_get_interval(&mut self, tid: Tid, which: u64, address: u64) -> Outcome {
        self.scheduled(tid, which)?;
        self.put_timespec(tid, address, SLICE_NS)?;
        Ok(0)
    }
}

/// The least and the greatest priority of a policy.
pub(super) fn priorities(policy: u32) -> Result<[u64; 2]> {
    match policy {
        SCHED_FIFO | SCHED_RR => Ok([1, 99]),
        SCHED_NORMAL | SCHED_BATCH | SCHED_IDLE => Ok([0, 0]),
        _ => Err(Errno::EINVAL),
    }
}
