//! How far another node's clock is from node 0's.
//!
//! Every host has its own origin of time. A node asks node 0 for its TSC many
//! times; each answer was taken between the question and its receipt, so the
//! difference lies in an interval. The intersection of all intervals is about
//! as wide as the fastest transfer of a cache line, and its middle is the
//! offset.

use core::sync::atomic::Ordering;

use vmm_shared::control::NodeRecord;

use super::Fabric;
use crate::arch::cpu;

/// Questions asked: enough that some are answered without interruption.
const ROUNDS: u64 = 4000;
/// Spins for one answer; only a node 0 that is gone takes so long.
const PATIENCE: u64 = 2_000_000_000;

/// What is known of the difference node 0 minus here, modulo 2^64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Interval {
    /// The first estimate, to which the bounds are relative.
    base: u64,
    low: i64,
    high: i64,
}

impl Interval {
    /// What one exchange says: asked at `sent`, answered with `theirs`,
    /// received at `received`.
    fn new(sent: u64, theirs: u64, received: u64) -> Self {
        let base = theirs.wrapping_sub(received);
        let width = i64::try_from(received.wrapping_sub(sent)).unwrap_or(i64::MAX);
        Self {
            base,
            low: 0,
            high: width,
        }
    }

    /// Takes over what is narrower in another exchange.
    fn narrow(&mut self, other: Self) {
        let shift = other.base.wrapping_sub(self.base).cast_signed();
        self.low = self.low.max(other.low.saturating_add(shift));
        self.high = self.high.min(other.high.saturating_add(shift));
    }

    /// The middle and the width.
    fn outcome(&self) -> Option<(u64, i64)> {
        let width = self.high.checked_sub(self.low)?;
        let middle = self.low.midpoint(self.high);
        let middle = self.base.wrapping_add(middle.cast_unsigned());
        (width >= 0).then_some((middle, width))
    }
}

/// Asks node 0; returns its TSC minus this node's, modulo 2^64, and the width
/// of what remains uncertain, in ticks. `None` if node 0 does not answer, or
/// its answers contradict each other.
#[must_use]
pub fn measure(record: &NodeRecord) -> Option<(u64, i64)> {
    let mut known: Option<Interval> = None;
    for number in 1..=ROUNDS {
        let sent = cpu::rdtsc();
        record.clock_question().store(number, Ordering::Release);
        let mut spins = 0;
        // Acquire: the answer is visible once its number is.
        while record.clock_answered().load(Ordering::Acquire) != number {
            spins += 1;
            if spins > PATIENCE {
                return None;
            }
            core::hint::spin_loop();
        }
        let theirs = record.clock_answer().load(Ordering::Relaxed);
        let interval = Interval::new(sent, theirs, cpu::rdtsc());
        match &mut known {
            Some(known) => known.narrow(interval),
            None => known = Some(interval),
        }
    }
    known?.outcome()
}

/// Answers the questions that wait. Node 0 only.
pub fn answer(fabric: &Fabric) {
    let records = fabric
        .nodes()
        .filter_map(|node| fabric.control().node(node));
    for record in records {
        let question = record.clock_question().load(Ordering::Acquire);
        if question != record.clock_answered().load(Ordering::Relaxed) {
            record.clock_answer().store(cpu::rdtsc(), Ordering::Relaxed);
            // Release: the answer is visible before its number.
            record.clock_answered().store(question, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_exchanges_pin_the_offset_down() {
        // Their clock is 1,000 behind ours; transfers take 5 to 300 ticks.
        let exchange = |start: u64, there: u64, back: u64| {
            Interval::new(
                start,
                (start + there).wrapping_sub(1000),
                start + there + back,
            )
        };
        let mut known = exchange(5000, 300, 20);
        known.narrow(exchange(6000, 40, 200));
        known.narrow(exchange(7000, 5, 90));
        known.narrow(exchange(8000, 120, 6));
        let (middle, width) = known.outcome().expect("no contradiction");
        assert!(width <= 11, "{known:?}");
        let error = middle.wrapping_add(1000).cast_signed();
        assert!(error.abs() <= 6, "off by {error}");
    }

    #[test]
    fn answers_that_contradict_each_other_are_none() {
        for theirs in [0, 1, u64::MAX / 2, u64::MAX] {
            let mut known = Interval::new(1000, 900, 1010);
            known.narrow(Interval::new(2000, theirs, 2010));
            assert_eq!(known.outcome(), None, "{theirs}");
        }
    }
}
