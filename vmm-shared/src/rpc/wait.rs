//! Waiting for messages: poll while that pays, then sleep.

use super::queue::Queue;

/// How nodes wake one another. Rings may be lost and may come for nothing;
/// nothing but latency depends on them.
pub trait Doorbell {
    /// Wakes `peer`, if it sleeps.
    fn ring(&self, peer: usize);

    /// Sleeps until someone rings or `timeout_ns` is over, or for any shorter
    /// time.
    fn sleep(&self, timeout_ns: u64);

    /// Waits a moment between two looks.
    fn relax(&self) {
        core::hint::spin_loop();
    }
}

const LEAST_POLLS: u32 = 16;
const MOST_POLLS: u32 = 4096;

/// Decides between polling and sleeping by what has paid lately: the polls
/// double when one of them finds something, and halve when none does.
#[derive(Clone, Copy, Debug)]
pub struct Waiter {
    polls: u32,
}

impl Default for Waiter {
    fn default() -> Self {
        Self { polls: 256 }
    }
}

impl Waiter {
    /// Waits until the queue has a message, but not much longer than
    /// `timeout_ns`; says whether it has one.
    pub fn wait<D: Doorbell>(&mut self, queue: &Queue, bell: &D, timeout_ns: u64) -> bool {
        for _ in 0..self.polls {
            if !queue.is_empty() {
                self.polls = (self.polls * 2).min(MOST_POLLS);
                return true;
            }
            bell.relax();
        }
        self.polls = (self.polls / 2).max(LEAST_POLLS);
        if queue.may_sleep() {
            bell.sleep(timeout_ns);
        }
        queue.is_awake();
        !queue.is_empty()
    }

    /// How often it would look before it sleeps.
    #[must_use]
    pub const fn polls(&self) -> u32 {
        self.polls
    }
}
