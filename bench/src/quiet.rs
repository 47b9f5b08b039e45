//! Whether the host is quiet enough for figures to mean anything.

use std::fs;
use std::thread;
use std::time::Duration;

const WINDOW: Duration = Duration::from_millis(500);

/// Below this share of idle time, others take part in what is measured.
pub(crate) const QUIET: f64 = 0.9;

/// The share of the processors' time that nobody uses, while this process
/// waits.
pub(crate) fn idle_share() -> Option<f64> {
    let before = Times::now()?;
    thread::sleep(WINDOW);
    Some(before.idle_until(&Times::now()?))
}

/// Ticks since the host was started.
#[derive(Clone, Copy, Debug)]
struct Times {
    idle: u32,
    all: u32,
}

impl Times {
    fn now() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/stat").ok()?)
    }

    /// From the first line of /proc/stat: user, nice, system, idle, iowait…
    fn parse(stat: &str) -> Option<Self> {
        let line = stat.lines().next()?.strip_prefix("cpu ")?;
        let ticks = line.split_whitespace().map(|word| word.parse::<u64>().ok());
        let ticks: Vec<u64> = ticks.collect::<Option<_>>()?;
        // Only differences count, and they are small.
        let wrapped = |value: u64| u32::try_from(value & u64::from(u32::MAX)).ok();
        Some(Self {
            idle: wrapped(ticks.get(3)? + ticks.get(4)?)?,
            all: wrapped(ticks.iter().take(8).sum())?,
        })
    }

    fn idle_until(&self, later: &Self) -> f64 {
        let idle = later.idle.wrapping_sub(self.idle);
        let all = later.all.wrapping_sub(self.all).max(1);
        f64::from(idle) / f64::from(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_is_told_from_work() {
        let before = Times::parse("cpu  10 0 10 100 5 0 0 0 7 7\ncpu0 1\n").expect("sound");
        let after = Times::parse("cpu  20 0 20 120 15 0 5 5 9 9\n").expect("sound");
        assert!((before.idle_until(&after) - 0.5).abs() < 1e-9);
        assert!(Times::parse("intr 1 2 3\n").is_none());
        assert!(Times::parse("cpu  1 x\n").is_none());
    }
}
