//! What the log needs from the place it runs in.

use super::member::MemberId;

/// Time and patience, as the platform has them.
pub trait Clock {
    /// Nanoseconds since some moment of this member's own. Never steps back.
    /// Members' clocks are never compared with one another.
    fn now_ns(&self) -> u64;

    /// Called in every wait loop; `round` counts the calls of one wait from 0
    /// on. On a host with more threads than cores this should yield after some
    /// rounds, and in the end sleep: else those that wait take the time that
    /// the one they wait for needs to show that it lives.
    fn pause(&self, round: u32) {
        let _ = round;
        core::hint::spin_loop();
    }

    /// Asks that `member` runs [`tick`](super::Replica::tick) soon: it holds
    /// up others. Only a hint, which may be lost.
    fn nudge(&self, member: MemberId) {
        let _ = member;
    }
}

impl<C: Clock + ?Sized> Clock for &C {
    fn now_ns(&self) -> u64 {
        (**self).now_ns()
    }
    fn pause(&self, round: u32) {
        (**self).pause(round);
    }
    fn nudge(&self, member: MemberId) {
        (**self).nudge(member);
    }
}

/// A wait that is given up after a limit. Reads the clock only now and then,
/// so that short waits cost nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wait {
    limit_ns: u64,
    started_ns: Option<u64>,
    elapsed_ns: u64,
    round: u32,
}

impl Wait {
    pub(crate) const fn new(limit_ns: u64) -> Self {
        Self {
            limit_ns,
            started_ns: None,
            elapsed_ns: 0,
            round: 0,
        }
    }

    /// Waits a little; returns about how long this wait has lasted.
    pub(crate) fn pause<C: Clock>(&mut self, clock: &C) -> u64 {
        clock.pause(self.round);
        if self.round % 16 == 15 {
            let now = clock.now_ns();
            let started = *self.started_ns.get_or_insert(now);
            self.elapsed_ns = now.saturating_sub(started);
        }
        self.round = self.round.wrapping_add(1);
        self.elapsed_ns
    }

    /// Waits a little; says whether the limit is passed.
    pub(crate) fn expired<C: Clock>(&mut self, clock: &C) -> bool {
        self.pause(clock) > self.limit_ns
    }
}
