//! What joining, leaving and dying members cost those that go on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vmm_shared::log::{At, BadSnapshot, Config, Geometry, Replica, State, StateMachine};
use zerocopy::IntoBytes;

use crate::map::{GEOMETRY, Put};
use crate::region::{HostClock, new_log};

/// A table of words: a large state that is cut by index.
pub(crate) struct Table {
    words: Vec<u64>,
}

impl Table {
    fn new(words: usize) -> Self {
        Self {
            // Touched, so that its memory is counted from the start.
            words: vec![1; words],
        }
    }

    fn index(&self, key: u64) -> usize {
        usize::try_from(key % self.words.len() as u64).expect("below a length")
    }
}

impl StateMachine for Table {
    type Op = Put;
    type Answer = u64;

    fn apply(&mut self, put: &Put, _: &[u8], _: At) -> u64 {
        let index = self.index(put.key);
        core::mem::replace(&mut self.words[index], put.value)
    }
    fn reset(&mut self) {
        // The parts that follow cover every word.
    }
    fn save(&self, from: u64, budget: usize, out: &mut Vec<u8>) -> Option<u64> {
        let start = usize::try_from(from).unwrap_or(usize::MAX);
        let rest = self.words.get(start..).unwrap_or(&[]);
        let part = &rest[..rest.len().min(budget / 8)];
        out.extend_from_slice(part.as_bytes());
        (part.len() < rest.len()).then(|| from + part.len() as u64)
    }
    fn load(&mut self, from: u64, part: &[u8]) -> Result<(), BadSnapshot> {
        let start = usize::try_from(from).map_err(|_| BadSnapshot)?;
        let (words, odd) = part.as_chunks::<8>();
        let place = self.words.get_mut(start..).ok_or(BadSnapshot)?;
        if !odd.is_empty() || words.len() > place.len() {
            return Err(BadSnapshot);
        }
        for (to, from) in place.iter_mut().zip(words) {
            *to = u64::from_ne_bytes(*from);
        }
        Ok(())
    }
    fn apply_below(&mut self, bound: u64, put: &Put, payload: &[u8], at: At) {
        if (self.index(put.key) as u64) < bound {
            self.apply(put, payload, at);
        }
    }
}

/// Latencies in microseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Latency {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) most: f64,
}

fn latency(samples: &mut [u64]) -> Latency {
    samples.sort_unstable();
    let at = |permille: usize| {
        let index = samples.len().saturating_sub(1) * permille / 1000;
        samples.get(index).map_or(0.0, |ns| *ns as f64 / 1e3)
    };
    Latency {
        p50: at(500),
        p99: at(990),
        p999: at(999),
        most: at(1000),
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Join {
    pub(crate) state_mib: usize,
    pub(crate) seconds: f64,
    pub(crate) quiet: Latency,
    pub(crate) joining: Latency,
    pub(crate) back_percent: f64,
}

fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = text.split_whitespace().nth(1);
    pages
        .and_then(|pages| pages.parse::<u64>().ok())
        .unwrap_or(0)
        * 4096
}

fn config() -> Config {
    Config {
        lease_ns: 1_000_000_000,
        patience_ns: 500_000_000,
        wait_ns: 60_000_000_000,
        part_bytes: 512 << 10,
        ..Config::default()
    }
}

pub(crate) fn join(state_mib: usize) -> Join {
    // What a writer that never pauses appends while a part is on its way, the
    // joiner has to apply before it can take the next: a long log only makes
    // the way longer.
    let geometry = Geometry {
        order_slots: 1 << 14,
        lane_lines: 1 << 14,
        stage_lines: 1 << 14,
        ..GEOMETRY
    };
    let log = new_log(geometry);
    let words = state_mib << 17;
    let make = || {
        let table = Table::new(words);
        Replica::join(log.clone(), table, HostClock::new(), config())
    };
    let first = make().unwrap_or_else(|error| panic!("join: {error:?}"));
    let stop = AtomicBool::new(false);
    let write = || {
        let mut samples = Vec::with_capacity(1 << 24);
        let mut seat = first.thread().expect("a seat");
        let mut key = 1_u64;
        while !stop.load(Ordering::Relaxed) {
            key = key.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let started = Instant::now();
            seat.update(Put { key, value: key }).expect("applied");
            let ns = started.elapsed().as_nanos();
            samples.push(u64::try_from(ns).expect("short"));
        }
        samples
    };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                first.tick().expect("alive");
                std::thread::yield_now();
            }
        });
        let writer = scope.spawn(write);
        std::thread::sleep(Duration::from_millis(1500));
        stop.store(true, Ordering::SeqCst);
        let quiet = latency(&mut writer.join().expect("no panic"));
        stop.store(false, Ordering::SeqCst);
        let before = resident_bytes();
        let writer = scope.spawn(write);
        let started = Instant::now();
        let second = make().unwrap_or_else(|error| panic!("join: {error:?}"));
        let seconds = started.elapsed().as_secs_f64();
        stop.store(true, Ordering::SeqCst);
        let mut samples = writer.join().expect("no panic");
        let joining = latency(&mut samples);
        drop(samples);
        let with = resident_bytes();
        drop(second.leave().expect("linked"));
        let after = resident_bytes();
        done.store(true, Ordering::SeqCst);
        let grown = with.saturating_sub(before).max(1) as f64;
        Join {
            state_mib,
            seconds,
            quiet,
            joining,
            back_percent: with.saturating_sub(after) as f64 / grown * 100.0,
        }
    })
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Eviction {
    pub(crate) lease_ms: f64,
    pub(crate) evicted_ms: f64,
    pub(crate) longest_write_ms: f64,
}

/// A member stops; another writes into a log that soon is full because of it.
pub(crate) fn evict() -> Eviction {
    let geometry = Geometry {
        order_slots: 1 << 10,
        lane_lines: 1 << 10,
        ..GEOMETRY
    };
    let log = new_log(geometry);
    let config = Config {
        lease_ns: 200_000_000,
        ..config()
    };
    let make = || {
        Replica::join(log.clone(), Table::new(1024), HostClock::new(), config)
            .unwrap_or_else(|error| panic!("join: {error:?}"))
    };
    let (first, second) = (make(), make());
    second.tick().expect("alive");
    first.tick().expect("alive");
    let stopped = Instant::now();
    let mut evicted = None;
    let mut longest = Duration::ZERO;
    let mut seat = first.thread().expect("a seat");
    let mut ticked = Instant::now();
    while evicted.is_none_or(|at: Duration| stopped.elapsed() < at + Duration::from_millis(100)) {
        let started = Instant::now();
        seat.update(Put { key: 1, value: 1 }).expect("applied");
        longest = longest.max(started.elapsed());
        if ticked.elapsed() > Duration::from_millis(5) {
            first.tick().expect("alive");
            ticked = Instant::now();
        }
        if evicted.is_none() && log.status(second.member()).state != State::Live {
            evicted = Some(stopped.elapsed());
        }
    }
    Eviction {
        lease_ms: 200.0,
        evicted_ms: evicted.map_or(0.0, |at| at.as_secs_f64() * 1e3),
        longest_write_ms: longest.as_secs_f64() * 1e3,
    }
}
