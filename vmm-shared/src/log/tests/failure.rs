//! Members that stop at every point, and some that wake up again.

use super::super::batch::{Kind, Piece, batch_words, offer_at, write};
use super::super::member::State;
use super::super::order::{Link, Slot};
use super::super::testing::op;
use super::super::{Change, Geometry, Log, MemberId, ReplicaError};
use super::{FakeClock, TINY, TestReplica, join, log};
use zerocopy::IntoBytes;

/// Ticks `replica` until it has evicted `member`.
fn evict_by_lease(replica: &TestReplica<'_>, member: MemberId, clock: &FakeClock) {
    for _ in 0..100 {
        clock.advance(60_000_000);
        replica.tick().expect("alive");
        if replica.log().status(member).state == State::Evicted {
            return;
        }
    }
    panic!("never evicted");
}

/// A batch that adds 1 to key 1, written by `member` into its lane's end as a
/// member does before it links.
fn prepare(log: &Log, member: MemberId, epoch: u32) -> Link {
    let geometry = log.geometry();
    let line = geometry.lane_lines - 1;
    let words = batch_words(geometry, 1, 0);
    let space = log.layout.lane(member, line, words).expect("the last line");
    let adds = op(1, 1);
    let piece = Piece {
        kind: Kind::Operation,
        first: adds.as_bytes(),
        second: &[],
    };
    write(space, geometry, epoch, [piece].into_iter());
    Link { member, line }
}

fn end(log: &Log) -> (u64, u64) {
    let position = (log.head()..)
        .find(|at| log.is_free(*at))
        .expect("a free slot");
    let Slot::Free(free) = log.look(position) else {
        panic!("the end is free");
    };
    (position, free)
}

fn offer(log: &Log, link: Link, position: u64) {
    let space = log.layout.lane(link.member, link.line, 2).expect("inside");
    offer_at(space, position);
}

#[test]
fn a_silent_member_is_evicted_after_its_lease_and_not_before() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let (a, b) = (join(&log, &clock), join(&log, &clock));
    for _ in 0..20 {
        clock.advance(40_000_000);
        a.tick().expect("alive");
        b.tick().expect("alive");
    }
    assert_eq!(log.status(b.member()).state, State::Live);
    evict_by_lease(&a, b.member(), &clock);
    let mut ta = a.thread().expect("a seat");
    let changes = ta.read(|map| map.changes.clone()).expect("running");
    assert!(changes.ends_with(&[(Change::Evicted, b.member().index())]));
}

#[test]
fn a_watcher_that_slept_does_not_count_its_own_sleep() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let (a, b) = (join(&log, &clock), join(&log, &clock));
    a.tick().expect("alive");
    clock.advance(60_000_000_000);
    a.tick().expect("alive");
    assert_eq!(log.status(b.member()).state, State::Live);
}

#[test]
fn a_member_that_wakes_after_its_eviction_cannot_write_and_frees_its_slot() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let (a, b) = (join(&log, &clock), join(&log, &clock));
    evict_by_lease(&a, b.member(), &clock);
    let mut tb = b.thread().expect("a seat");
    assert_eq!(tb.update(op(1, 1)), Err(ReplicaError::Ended));
    assert_eq!(tb.read(|map| map.get(1)), Err(ReplicaError::Ended));
    assert_eq!(b.tick(), Err(ReplicaError::Ended));
    assert_eq!(log.status(b.member()).state, State::Free);
    let mut ta = a.thread().expect("a seat");
    assert_eq!(ta.read(|map| map.get(1)), Ok(0));
}

/// As small, but long enough to be replayed from its start.
const LONGER: Geometry = Geometry {
    order_slots: 64,
    ..TINY
};

#[test]
fn a_slot_in_quarantine_is_free_only_on_someones_word() {
    let (log, clock) = (log(LONGER), FakeClock::default());
    let (a, b) = (join(&log, &clock), join(&log, &clock));
    let (member, epoch) = (b.member(), b.epoch());
    std::mem::forget(b);
    evict_by_lease(&a, member, &clock);
    for _ in 0..2 {
        let other = join(&log, &clock);
        assert_ne!(other.member(), member);
        std::mem::forget(other);
    }
    assert!(!log.confirm_dead(member, epoch + 1));
    assert!(log.confirm_dead(member, epoch));
    assert_eq!(log.status(member).state, State::Free);
}

#[test]
fn a_node_that_is_known_dead_is_evicted_without_its_lease() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let a = join(&log, &clock);
    let config = super::Config {
        node: 7,
        ..super::Config::default()
    };
    let b = super::Replica::join(log.clone(), super::Map::default(), &clock, config);
    let b = b.expect("room");
    a.tick().expect("alive");
    log.confirm_node_dead(7);
    assert_eq!(log.status(b.member()).state, State::Ending);
    clock.advance(60_000_000);
    a.tick().expect("alive");
    clock.advance(60_000_000);
    a.tick().expect("alive");
    assert_eq!(log.status(b.member()).state, State::Free);
}

#[test]
fn stopped_before_the_link_leaves_no_trace() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let (a, b) = (join(&log, &clock), join(&log, &clock));
    // b writes its batch and stops.
    prepare(&log, b.member(), b.epoch());
    let mut ta = a.thread().expect("a seat");
    for round in 0..50 {
        assert_eq!(ta.update(op(1, 1)), Ok(round), "nobody waits for b");
        b.tick().expect("alive");
    }
    assert_eq!(a.counters().expect("idle").malformed, 0);
}

#[test]
fn asleep_between_the_look_and_the_link_the_link_fails() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let (a, b) = (join(&log, &clock), join(&log, &clock));
    let link = prepare(&log, b.member(), b.epoch());
    let (position, free) = end(&log);
    offer(&log, link, position);
    evict_by_lease(&a, b.member(), &clock);
    let mut ta = a.thread().expect("a seat");
    for _ in 0..100 {
        assert!(!log.link(position, free, link));
        ta.update(op(2, 1)).expect("room");
    }
    assert_eq!(ta.read(|map| map.get(1)), Ok(0));
}

#[test]
fn a_link_after_the_eviction_is_a_tombstone_on_every_replica() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let (a, b, c) = (join(&log, &clock), join(&log, &clock), join(&log, &clock));
    let link = prepare(&log, b.member(), b.epoch());
    c.tick().expect("alive");
    a.evict(b.member(), b.epoch()).expect("linked");
    // b ignores its status and finds the new end of the log.
    let (position, free) = end(&log);
    offer(&log, link, position);
    assert!(log.link(position, free, link));
    for replica in [&a, &c] {
        let mut seat = replica.thread().expect("a seat");
        assert_eq!(seat.read(|map| map.get(1)), Ok(0));
        assert_eq!(replica.counters().expect("idle").tombstones, 1);
    }
    // It is told so itself, although its batch is in the log.
    let mut tb = b.thread().expect("a seat");
    assert_eq!(tb.read(|map| map.get(1)), Err(ReplicaError::Ended));
}

#[test]
fn linked_before_the_eviction_counts_once_everywhere() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let (a, b, c) = (join(&log, &clock), join(&log, &clock), join(&log, &clock));
    let link = prepare(&log, b.member(), b.epoch());
    let (position, free) = end(&log);
    offer(&log, link, position);
    assert!(log.link(position, free, link));
    // b stops here, before it has applied its batch.
    let (member, epoch) = (b.member(), b.epoch());
    std::mem::forget(b);
    c.tick().expect("alive");
    a.evict(member, epoch).expect("linked");
    for replica in [&a, &c] {
        let mut seat = replica.thread().expect("a seat");
        assert_eq!(seat.read(|map| map.get(1)), Ok(1));
    }
}

#[test]
fn an_eviction_whose_evictor_died_is_finished_by_another() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let (a, b) = (join(&log, &clock), join(&log, &clock));
    let live = State::Live;
    assert!(log.change_status(b.member(), b.epoch(), live, State::Evicting));
    evict_by_lease(&a, b.member(), &clock);
}

#[test]
fn a_join_that_gives_up_frees_its_slot() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let a = join(&log, &clock);
    let mut ta = a.thread().expect("a seat");
    for _ in 0..50 {
        ta.update(op(1, 1)).expect("room");
    }
    // Nobody ticks for a, so no snapshot comes.
    let machine = super::Map::default();
    let config = super::Config::default();
    let late = super::Replica::join(log.clone(), machine, &clock, config);
    assert_eq!(late.err(), Some(ReplicaError::TimedOut));
    let member = MemberId::new(1).expect("small");
    assert_eq!(log.status(member).state, State::Ending);
    for _ in 0..10 {
        clock.advance(60_000_000);
        a.tick().expect("alive");
    }
    assert_eq!(log.status(member).state, State::Free);
}

#[test]
fn the_last_survivor_goes_on() {
    let (log, clock) = (log(LONGER), FakeClock::default());
    let a = join(&log, &clock);
    for _ in 0..3 {
        std::mem::forget(join(&log, &clock));
    }
    let mut ta = a.thread().expect("a seat");
    for round in 0..100 {
        assert_eq!(ta.update(op(1, 1)), Ok(round));
        clock.advance(10_000_000);
        a.tick().expect("alive");
    }
    assert_eq!(a.counters().expect("idle").evictions, 3);
}
