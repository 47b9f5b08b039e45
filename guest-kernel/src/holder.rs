//! A lock that knows its holder, so that nobody waits for a processor that is
//! lost.
//!
//! Processors go by their numbers plus 1, and while they come up by the last
//! number. One that was put out while it slept may go on for a moment: it
//! gets no lock any more.

use core::sync::atomic::{AtomicU32, Ordering};

const FREE: u32 = 0;

/// The lock's word.
#[derive(Debug)]
pub struct Holder(AtomicU32);

/// What has become of an attempt to take the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// The caller has it.
    Taken,
    /// Another has it.
    Busy,
    /// Another has it who is lost: for good.
    Dead(u32),
    /// The caller is lost itself, and must stop.
    PutOut,
}

impl Holder {
    /// A lock that nobody has.
    #[must_use]
    pub const fn free() -> Self {
        Self(AtomicU32::new(FREE))
    }

    /// A lock that somebody has.
    #[must_use]
    pub const fn held() -> Self {
        Self(AtomicU32::new(u32::MAX))
    }

    /// Tries to take it; `is_lost` says whether a processor is.
    pub fn try_take(&self, mine: u32, is_lost: impl Fn(u32) -> bool) -> Attempt {
        // Relaxed: nothing is done by it but to ask again.
        let holder = self.0.load(Ordering::Relaxed);
        if holder != FREE {
            // It may have given it up before it was lost.
            let is_dead = is_lost(holder) && self.0.load(Ordering::Relaxed) == holder;
            return if is_dead {
                Attempt::Dead(holder)
            } else {
                Attempt::Busy
            };
        }
        // Before: others take who has it and is lost for dead.
        if is_lost(mine) {
            return Attempt::PutOut;
        }
        // Acquire: with the Release of who had it before.
        let taken = self
            .0
            .compare_exchange(FREE, mine, Ordering::Acquire, Ordering::Relaxed);
        if taken.is_err() {
            return Attempt::Busy;
        }
        // And after, as it may have slept in between.
        if is_lost(mine) {
            self.release();
            return Attempt::PutOut;
        }
        Attempt::Taken
    }

    /// Gives it up. The caller has it.
    pub fn release(&self) {
        // Release: what was done under it is seen by the next.
        self.0.store(FREE, Ordering::Release);
    }

    /// Whether a processor has it.
    #[must_use]
    pub fn is(&self, mine: u32) -> bool {
        self.0.load(Ordering::Relaxed) == mine
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::Cell;

    fn nobody(_: u32) -> bool {
        false
    }

    #[test]
    fn one_has_it_at_a_time() {
        let lock = Holder::held();
        assert_eq!(lock.try_take(1, nobody), Attempt::Busy);
        lock.release();
        assert_eq!(lock.try_take(1, nobody), Attempt::Taken);
        assert_eq!(lock.try_take(2, nobody), Attempt::Busy);
        assert_eq!(lock.try_take(2, |who| who == 1), Attempt::Dead(1));
        lock.release();
        assert_eq!(lock.try_take(2, |who| who == 1), Attempt::Taken);
    }

    #[test]
    fn who_is_put_out_never_seems_to_have_it() {
        let lock = Holder::free();
        let others = |who| {
            assert_eq!(lock.try_take(2, |who| who == 1), Attempt::Taken);
            lock.release();
            who == 1
        };
        assert_eq!(lock.try_take(1, others), Attempt::PutOut);
        // Unless it slept between a look and its turn.
        let looks = Cell::new(0);
        let sleeps = |_| looks.replace(looks.get() + 1) > 0;
        assert_eq!(lock.try_take(1, sleeps), Attempt::PutOut);
        assert_eq!(lock.try_take(2, nobody), Attempt::Taken);
    }

    #[test]
    fn who_is_lost_after_it_gave_it_up_is_not_waited_for() {
        let lock = Holder::free();
        assert_eq!(lock.try_take(2, nobody), Attempt::Taken);
        // The one who asks sleeps meanwhile.
        let lost = |who| {
            lock.release();
            who == 2
        };
        assert_eq!(lock.try_take(1, lost), Attempt::Busy);
        assert_eq!(lock.try_take(1, |who| who == 2), Attempt::Taken);
    }
}
