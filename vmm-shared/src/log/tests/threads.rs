//! Several threads on several replicas.

use std::thread;

use super::super::testing::{Map, op};
use super::super::{Config, Geometry, Replica};
use super::{FakeClock, TINY, log};

const ROUNDS: u64 = if cfg!(miri) { 20 } else { 3_000 };

fn race(geometry: Geometry) {
    let (log, clock) = (log(geometry), FakeClock::default());
    let config = Config {
        // Time here passes with every look at the clock.
        lease_ns: u64::MAX / 4,
        patience_ns: u64::MAX / 4,
        wait_ns: u64::MAX / 4,
        ..Config::default()
    };
    let replicas: Vec<_> = (0..2)
        .map(|_| Replica::join(log.clone(), Map::default(), &clock, config).expect("room"))
        .collect();
    thread::scope(|scope| {
        for (node, replica) in replicas.iter().enumerate() {
            for thread in 0..2 {
                scope.spawn(move || {
                    let mut seat = replica.thread().expect("a seat");
                    let own = 100 + node as u64 * 2 + thread;
                    for round in 0..ROUNDS {
                        seat.update(op(0, 1)).expect("applied");
                        // Nobody else changes this key, so the answers count.
                        assert_eq!(seat.update(op(own, 1)), Ok(round));
                        let (all, mine) = seat
                            .read(|map| (map.get(0), map.get(own)))
                            .expect("readable");
                        assert!(all > round && mine == round + 1);
                    }
                });
            }
        }
        // Keeps up a replica whose threads are done.
        scope.spawn(|| {
            let behind = |replica: &super::TestReplica<'_>| {
                replica.tick().expect("alive");
                let mut seat = replica.thread().expect("a seat");
                seat.read_local(|map| map.get(0) < 4 * ROUNDS)
                    .expect("running")
            };
            // All are ticked in each round.
            while replicas.iter().filter(|replica| behind(replica)).count() > 0 {
                thread::yield_now();
            }
        });
    });
    for replica in replicas {
        let map = replica.leave().expect("alive");
        assert_eq!(map.get(0), 4 * ROUNDS);
        assert_eq!(map.sums.len(), 5);
    }
}

#[test]
fn answers_and_reads_hold_on_a_large_log() {
    race(Geometry {
        order_slots: 1 << 10,
        lane_lines: 1 << 10,
        ..TINY
    });
}

#[test]
fn answers_and_reads_hold_on_a_log_that_wraps_all_the_time() {
    race(TINY);
}

#[test]
fn seats_are_given_out_once_and_again_when_free() {
    let (log, clock) = (log(TINY), FakeClock::default());
    let config = Config {
        threads: 2,
        ..Config::default()
    };
    let replica = Replica::join(log, Map::default(), &clock, config).expect("room");
    let first = replica.thread().expect("a seat");
    let _second = replica.thread().expect("a seat");
    assert!(replica.thread().is_none());
    drop(first);
    assert!(replica.thread().is_some());
}
