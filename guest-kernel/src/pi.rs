//! Locks whose word holds their owner's number, and which are handed on by
//! the kernel: futexes with priority inheritance. All threads have one
//! priority, so what is left of that is the order: who came first is next.

use core::sync::atomic::{AtomicU32, Ordering};

use crate::errno::{Errno, Outcome, Result};
use crate::futex::Scope;
use crate::kernel::Kernel;
use crate::wait::{Key, Tid};

/// Set in a word when its owner has died with it, and when others wait.
pub(crate) const OWNER_DIED: u32 = 1 << 30;
pub(crate) const WAITERS: u32 = 1 << 31;
const OWNER: u32 = !(OWNER_DIED | WAITERS);

/// Changes a word from what it was; programs change it at the same time.
fn change(word: &AtomicU32, from: u32, to: u32) -> bool {
    // AcqRel: the lock's data are its former owner's last.
    word.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed)
        .is_ok()
}

impl Kernel {
    /// Takes a lock; waits for it if `waits`.
    pub(crate) fn lock_owned(
        &mut self,
        tid: Tid,
        address: u64,
        scope: Scope,
        waits: bool,
        deadline: Option<u64>,
    ) -> Outcome {
        if self.thread(tid).call.is_some_and(|call| call.woken) {
            // It was handed over, unless it is lost.
            self.futex_place(tid, address, scope)?;
            return Ok(0);
        }
        self.futex_forget(tid);
        let (key, page, within) = self.futex_place(tid, address, scope)?;
        let word = page.atomic_u32(within).ok_or(Errno::EINVAL)?;
        loop {
            let value = word.load(Ordering::Relaxed);
            let owner = value & OWNER;
            if owner == tid {
                return Err(Errno::EDEADLK.into());
            }
            if owner == 0 {
                let waiters = if self.futexes.has(key) { WAITERS } else { 0 };
                if change(word, value, tid | value & OWNER_DIED | waiters) {
                    return Ok(0);
                }
                continue;
            }
            if !waits {
                return Err(Errno::EAGAIN.into());
            }
            if !self.threads.contains_key(&owner) {
                return Err(Errno::ESRCH.into());
            }
            if deadline.is_some_and(|at| at <= self.now()) {
                return Err(Errno::ETIMEDOUT.into());
            }
            if change(word, value, value | WAITERS) {
                break;
            }
        }
        self.futexes.add_any(key, tid);
        Err(self.block(tid, &[Key::Time], deadline))
    }

    pub(crate) fn unlock_owned(&mut self, tid: Tid, address: u64, scope: Scope) -> Outcome {
        match self.hand_on(tid, address, scope, 0)? {
            true => Ok(0),
            false => Err(Errno::EPERM.into()),
        }
    }

    /// Gives a lock to who is next, with `marks`; whether it was the thread's.
    pub(crate) fn hand_on(
        &mut self,
        tid: Tid,
        address: u64,
        scope: Scope,
        marks: u32,
    ) -> Result<bool> {
        let (key, page, within) = self.futex_place(tid, address, scope)?;
        let word = page.atomic_u32(within).ok_or(Errno::EINVAL)?;
        let next = self.futexes.take_first(key);
        let waiters = if self.futexes.has(key) { WAITERS } else { 0 };
        let owned = loop {
            let value = word.load(Ordering::Relaxed);
            if value & OWNER != tid {
                break false;
            }
            if change(word, value, next.map_or(0, |next| next | waiters) | marks) {
                break true;
            }
        };
        match next {
            Some(next) if owned => self.wake_from_futex(next),
            Some(next) => self.futexes.add_first(key, next),
            None => {}
        }
        Ok(owned)
    }
}
