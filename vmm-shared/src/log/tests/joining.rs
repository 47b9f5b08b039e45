//! Replicas that come late, or fall behind.

use super::super::combining::Readers;
use super::super::testing::{Map, op};
use super::super::{Change, Config, Geometry, Replica, ReplicaError};
use super::{FakeClock, TINY, TestReplica, join, log};

/// Joins while another thread runs the others' ticks.
fn join_beside<'a>(
    replicas: &[&TestReplica<'a>],
    machine: Map,
    clock: &'a FakeClock,
    config: Config,
) -> Result<TestReplica<'a>, ReplicaError> {
    let log = replicas[0].log().clone();
    std::thread::scope(|scope| {
        let joined = scope.spawn(|| Replica::join(log, machine, clock, config));
        let mut round = 0;
        while !joined.is_finished() {
            for replica in replicas {
                let _ = replica.tick();
                let mut seat = replica.thread().expect("a seat");
                // Writers go on: keys all over the range.
                let _ = seat.update(op(round * 7 % 97, 1));
                round += 1;
            }
            std::thread::yield_now();
        }
        joined.join().expect("no panic")
    })
}

fn patient() -> Config {
    Config {
        lease_ns: 10_000_000_000,
        patience_ns: 1_000_000_000,
        wait_ns: 100_000_000_000,
        part_bytes: 64,
        ..Config::default()
    }
}

fn same(replicas: &[&TestReplica<'_>]) {
    let states: Vec<Map> = replicas
        .iter()
        .map(|replica| {
            let mut seat = replica.thread().expect("a seat");
            let mut map = seat.read(Map::clone).expect("running");
            map.changes.clear();
            map.whole = false;
            map
        })
        .collect();
    for state in &states[1..] {
        assert_eq!(state, &states[0]);
    }
}

#[test]
fn a_log_from_its_start_is_replayed() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let a = join(&log, &clock);
    a.thread().expect("a seat").update(op(1, 2)).expect("room");
    assert_eq!(log.head(), 0);
    let b = join(&log, &clock);
    same(&[&a, &b]);
}

#[test]
fn a_replica_joins_part_by_part_while_writers_go_on() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let a = Replica::join(log.clone(), Map::default(), &clock, patient()).expect("room");
    let mut ta = a.thread().expect("a seat");
    for key in 0..97 {
        ta.update(op(key, key)).expect("room");
    }
    drop(ta);
    assert!(log.head() > 0, "no replay from the start");
    let b = join_beside(&[&a], Map::default(), &clock, patient()).expect("a donor");
    same(&[&a, &b]);
    assert!(a.counters().expect("idle").parts > 10);
    // And a third one from two donors, then one leaves.
    let c = join_beside(&[&a, &b], Map::default(), &clock, patient()).expect("a donor");
    same(&[&a, &b, &c]);
    b.leave().expect("linked");
    a.thread().expect("a seat").update(op(5, 5)).expect("room");
    same(&[&a, &c]);
    let mut seat = c.thread().expect("a seat");
    let changes = seat.read(|map| map.changes.clone()).expect("running");
    assert!(changes.ends_with(&[(Change::Left, 1)]));
}

#[test]
fn a_state_saved_whole_goes_in_pieces() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let whole = || Map {
        whole: true,
        ..Map::default()
    };
    let config = Config {
        // Nobody passes the joiner; it copies against the writers' waits.
        patience_ns: u64::MAX / 2,
        ..patient()
    };
    let a = Replica::join(log.clone(), whole(), &clock, config).expect("room");
    let mut ta = a.thread().expect("a seat");
    for key in 0..97 {
        ta.update(op(key, key)).expect("room");
    }
    drop(ta);
    let b = std::thread::scope(|scope| {
        let joiner = scope.spawn(|| Replica::join(log.clone(), whole(), &clock, config));
        while !joiner.is_finished() {
            let _ = a.tick();
            std::thread::yield_now();
        }
        joiner.join().expect("no panic").expect("a donor")
    });
    same(&[&a, &b]);
}

#[test]
fn a_member_that_falls_behind_holds_up_nobody_and_loads_a_snapshot() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let config = Config {
        copies: 1,
        ..Config::default()
    };
    let join = || Replica::join(log.clone(), Map::default(), &clock, config).expect("room");
    let (a, b) = (join(), join());
    let mut ta = a.thread().expect("a seat");
    for round in 0..100 {
        ta.update(op(round % 10, 1)).expect("goes on without b");
    }
    assert!(a.counters().expect("idle").passed > 0);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut tb = b.thread().expect("a seat");
            tb.read(|map| map.get(3))
        });
        while !reader.is_finished() {
            a.tick().expect("alive");
            std::thread::yield_now();
        }
        assert_eq!(reader.join().expect("no panic"), Ok(10));
    });
    assert!(b.counters().expect("idle").overruns > 0);
    same(&[&a, &b]);
}

#[test]
fn the_last_two_holders_of_the_state_do_not_pass_each_other() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let config = Config {
        lease_ns: u64::MAX / 8,
        ..Config::default()
    };
    let join = || Replica::join(log.clone(), Map::default(), &clock, config).expect("room");
    let (a, b, c) = (join(), join(), join());
    for _ in 0..100 {
        let _ = a.thread().expect("a seat").update(op(1, 1));
        b.tick().expect("alive");
    }
    // c was passed, for a and b have the state.
    assert_eq!(log.holders().count(), 2);
    assert!(a.counters().expect("idle").passed > 0);
    let passed = a.counters().expect("idle").passed;
    while a.thread().expect("a seat").update(op(1, 1)).is_ok() {}
    assert_eq!(log.holders().count(), 2);
    assert_eq!(a.counters().expect("idle").passed, passed);
    b.tick().expect("alive");
    assert!(a.thread().expect("a seat").update(op(1, 1)).is_ok());
    drop(c);
}

#[test]
fn a_member_whose_heart_beats_but_that_applies_nothing_is_evicted() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let (a, b) = (join(&log, &clock), join(&log, &clock));
    // A thread of b hangs while it combines; another ticks.
    let hung = b.lock.try_combine(Readers::Stay).expect("idle");
    for _ in 0..100 {
        // When the log is full, a finds out who is in the way.
        a.thread().expect("a seat").update(op(1, 1)).expect("room");
        a.tick().expect("alive");
        b.tick().expect("not known yet");
    }
    assert_eq!(log.holders().collect::<Vec<_>>(), [a.member()]);
    assert!(a.thread().expect("a seat").update(op(1, 1)).is_ok());
    drop(hung);
    assert_eq!(b.tick(), Err(ReplicaError::Ended));
}

#[test]
fn a_full_log_gives_back_pressure_with_a_time_out() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let config = Config {
        lease_ns: u64::MAX / 8,
        patience_ns: u64::MAX / 8,
        wait_ns: 1_000_000,
        ..Config::default()
    };
    let a = Replica::join(log.clone(), Map::default(), &clock, config).expect("room");
    let b = Replica::join(log, Map::default(), &clock, config).expect("room");
    let mut ta = a.thread().expect("a seat");
    let mut applied = 0;
    while ta.update(op(1, 1)).is_ok() {
        applied += 1;
        assert!(applied < 100, "b has not applied anything");
    }
    assert_eq!(ta.update(op(1, 1)), Err(ReplicaError::Full));
    b.tick().expect("alive");
    // What was refused was not applied, and there is room again.
    assert_eq!(ta.update(op(1, 1)), Ok(applied));
}

#[test]
fn a_slot_is_used_again_only_when_its_lane_is_read() {
    let geometry = Geometry { members: 2, ..TINY };
    let (log, clock) = (log(geometry), FakeClock::default());
    let a = Replica::join(log.clone(), Map::default(), &clock, patient()).expect("room");
    let b = join(&log, &clock);
    assert_eq!(
        Replica::join(log.clone(), Map::default(), &clock, Config::default()).err(),
        Some(ReplicaError::NoFreeMember)
    );
    let (member, epoch) = (b.member(), b.epoch());
    b.thread().expect("a seat").update(op(1, 1)).expect("room");
    b.leave().expect("linked");
    // a has not applied b's last batches: the lane is kept for it.
    assert_eq!(
        Replica::join(log.clone(), Map::default(), &clock, Config::default()).err(),
        Some(ReplicaError::NoFreeMember)
    );
    a.tick().expect("alive");
    let c = join_beside(&[&a], Map::default(), &clock, patient()).expect("b's slot");
    assert_eq!((c.member(), c.epoch()), (member, epoch + 1));
    same(&[&a, &c]);
}

#[test]
fn a_state_that_nobody_has_any_more_is_reported_lost() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let a = join(&log, &clock);
    let mut ta = a.thread().expect("a seat");
    for _ in 0..50 {
        ta.update(op(1, 1)).expect("room");
    }
    drop(ta);
    a.leave().expect("linked");
    let joined = Replica::join(log, Map::default(), &clock, Config::default());
    assert_eq!(joined.err(), Some(ReplicaError::StateLost));
}

#[test]
fn a_member_that_loads_does_not_count_as_one_that_has_the_state() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let (a, b) = (join(&log, &clock), join(&log, &clock));
    let mut seat = a.thread().expect("a seat");
    for key in 0..4 {
        seat.update(op(key, 1)).expect("applied");
    }
    drop(seat);
    assert_eq!(log.holders().count(), 2);
    // The others have gone on without it.
    log.raise_head(log.applied(a.member()));
    let holders = || log.holders().collect::<Vec<_>>();
    assert_eq!(holders(), [a.member()]);
    // It asks, and its position counts from the first piece on.
    for _ in 0..4 {
        let _ = b.tick();
        if log.applied(b.member()) < log.head() {
            assert_eq!(holders(), [a.member()]);
        }
        if log.wanted(b.member()).is_some() {
            assert_eq!(holders(), [a.member()]);
            a.tick().expect("alive");
        }
    }
    assert_eq!(log.wanted(b.member()), None);
    assert_eq!(log.holders().count(), 2);
    let mut seat = b.thread().expect("a seat");
    assert_eq!(seat.read(|map| map.get(3)), Ok(1));
}
