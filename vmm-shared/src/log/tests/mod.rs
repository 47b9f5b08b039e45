//! Tests of the log as a whole.

mod failure;
mod hostile;
mod joining;
mod linear;
mod threads;

use core::sync::atomic::{AtomicU64, Ordering};

use super::testing::{Map, op};
use super::{Clock, Config, Geometry, Log, LogError, Replica, ReplicaError};
use crate::shm::SharedMem;
use crate::shm::testing::leaked;

/// A log so small that everything in it wraps all the time.
pub(in crate::log) const TINY: Geometry = Geometry {
    order_slots: 8,
    members: 4,
    lane_lines: 32,
    entry_bytes: 32,
    stage_lines: 4,
};

/// Time that passes only when somebody looks or waits.
#[derive(Debug, Default)]
pub(super) struct FakeClock {
    now_ns: AtomicU64,
}

impl FakeClock {
    pub(super) fn advance(&self, ns: u64) {
        self.now_ns.fetch_add(ns, Ordering::Relaxed);
    }
}

impl Clock for FakeClock {
    fn now_ns(&self) -> u64 {
        self.now_ns.fetch_add(100, Ordering::Relaxed)
    }
    fn pause(&self, round: u32) {
        self.advance(50_000);
        let _ = round;
        std::thread::yield_now();
    }
}

type TestReplica<'a> = Replica<Map, &'a FakeClock>;

fn memory(geometry: Geometry) -> SharedMem {
    leaked(geometry.total_bytes() / 64)
}

fn log(geometry: Geometry) -> Log {
    Log::create(memory(geometry), geometry).expect("large enough")
}

fn join<'a>(log: &Log, clock: &'a FakeClock) -> TestReplica<'a> {
    Replica::join(log.clone(), Map::default(), clock, Config::default()).expect("there is room")
}

#[test]
fn every_replica_sees_every_operation_and_answers_are_in_order() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let (a, b) = (join(&log, &clock), join(&log, &clock));
    let (mut ta, mut tb) = (a.thread().expect("a seat"), b.thread().expect("a seat"));
    let mut sum = 0;
    for round in 0..1_000 {
        let thread = if round % 3 == 0 { &mut ta } else { &mut tb };
        assert_eq!(thread.update(op(1, round)), Ok(sum));
        sum += round;
        assert_eq!(ta.read(|map| map.get(1)), Ok(sum));
        assert_eq!(tb.read(|map| map.get(1)), Ok(sum));
    }
}

#[test]
fn a_local_read_may_be_old_but_knows_its_own_updates() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let (a, b) = (join(&log, &clock), join(&log, &clock));
    let (mut ta, mut tb) = (a.thread().expect("a seat"), b.thread().expect("a seat"));
    ta.update(op(1, 5)).expect("applied");
    assert_eq!(ta.read_local(|map| map.get(1)), Ok(5));
    assert_eq!(tb.read_local(|map| map.get(1)), Ok(0));
    b.tick().expect("alive");
    assert_eq!(tb.read_local(|map| map.get(1)), Ok(5));
}

#[test]
fn long_payloads_go_through_the_arena_and_too_long_ones_are_refused() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let (a, b) = (join(&log, &clock), join(&log, &clock));
    let (mut ta, mut tb) = (a.thread().expect("a seat"), b.thread().expect("a seat"));
    let mut sum = 0;
    for len in (0..400).chain([8 * 56]) {
        ta.update_with(op(7, 1), &vec![1; len]).expect("fits");
        sum += 1 + len as u64;
        assert_eq!(tb.read(|map| map.get(7)), Ok(sum), "with {len} bytes");
    }
    assert_eq!(
        ta.update_with(op(7, 1), &[0; 600]),
        Err(ReplicaError::TooLarge { bytes: 616 })
    );
}

#[test]
fn only_a_log_of_this_version_and_size_is_attached() {
    let memory = memory(TINY);
    assert_eq!(Log::attach(memory).err(), Some(LogError::NotALog));
    Log::create(memory, TINY).expect("large enough");
    assert_eq!(Log::attach(memory).expect("made above").geometry(), &TINY);
    let small = memory.window(0, 4096).expect("inside");
    assert!(matches!(
        Log::attach(small).err(),
        Some(LogError::TooSmall { has: 4096, .. })
    ));
    memory.write(24, &1_000_u64).expect("inside");
    assert_eq!(Log::attach(memory).err(), Some(LogError::BadGeometry));
    memory.write(8, &7_u64).expect("inside");
    assert_eq!(
        Log::attach(memory).err(),
        Some(LogError::Version { found: 7 })
    );
}

#[test]
fn senseless_limits_are_refused() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let config = Config {
        threads: 0,
        ..Config::default()
    };
    let joined = Replica::join(log, Map::default(), &clock, config);
    assert_eq!(joined.err(), Some(ReplicaError::BadConfig));
}
