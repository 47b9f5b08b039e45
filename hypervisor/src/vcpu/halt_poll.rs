//! How long a halted vCPU's core looks for work before it sleeps.
//!
//! Going to sleep and being woken cost more than a short wait: the waker has
//! to send an interrupt, and the sleeper to take it. So a core first looks
//! for a while, and learns from each halt how long that is worth it.

/// The longest look, in µs, and so also how long a halt may take to count as
/// short.
const LONGEST_US: u64 = 200;
/// The first look after a halt that would have been worth one, in µs.
const FIRST_US: u64 = 25;

/// How long to look, learnt from the halts so far.
#[derive(Clone, Copy, Debug)]
pub struct HaltPoll {
    first: u64,
    longest: u64,
    /// TSC ticks to look for at the next halt.
    window: u64,
}

impl HaltPoll {
    /// Nothing learnt yet, for a TSC of this rate.
    #[must_use]
    pub fn new(tsc_khz: u32) -> Self {
        let ticks = |us: u64| us * u64::from(tsc_khz) / 1000;
        Self {
            first: ticks(FIRST_US),
            longest: ticks(LONGEST_US),
            window: 0,
        }
    }

    /// TSC ticks to look for before sleeping.
    #[must_use]
    pub fn window(&self) -> u64 {
        self.window
    }

    /// Learns from a halt that took so many TSC ticks, looking included.
    pub fn learn(&mut self, halted: u64) {
        if halted > self.longest {
            self.window = 0;
        } else if halted > self.window {
            self.window = (self.window * 2).clamp(self.first, self.longest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_halts_make_it_look_until_they_are_caught() {
        let mut poll = HaltPoll::new(1_000_000);
        assert_eq!(poll.window(), 0, "an idle vCPU's core sleeps at once");
        for expected in [25_000, 50_000, 100_000] {
            poll.learn(90_000);
            assert_eq!(poll.window(), expected);
        }
        poll.learn(90_000);
        assert_eq!(poll.window(), 100_000, "it is long enough");
    }

    #[test]
    fn it_never_looks_longer_than_a_short_halt_takes() {
        let mut poll = HaltPoll::new(1_000_000);
        for _ in 0..10 {
            poll.learn(200_000);
        }
        assert_eq!(poll.window(), 200_000);
    }

    #[test]
    fn one_long_halt_ends_it() {
        let mut poll = HaltPoll::new(1_000_000);
        poll.learn(50_000);
        poll.learn(200_001);
        assert_eq!(poll.window(), 0);
    }
}
