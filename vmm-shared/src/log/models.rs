//! Models of the log, explored by loom: every interleaving and every value
//! that the memory model lets a load return, up to a bound on preemptions.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p vmm-shared --release models`; with
//! `VIADUCT_LOOM_PREEMPTIONS` set, the bound is that.
//!
//! Two things to know when writing one. The checker finds the switches to
//! try by looking back at the *last* access to a word, so let the thread that
//! writes run first and the one that only looks be spawned. And it carries
//! out loads in program order: an ordering that keeps a load before a later
//! store (the Release in `set_applied`, and that of the queue's `taken`) has
//! its argument in the text only.

use alloc::vec::Vec;

use loom::sync::Arc;
use loom::thread;
use zerocopy::IntoBytes;

use crate::sync::{AtomicU64, Ordering, Words};

use super::batch::{Kind, NoBatch, Piece, batch_words, fetch, offer_at, write};
use super::lane::Lane;
use super::member::State;
use super::order::{Link, Slot};
use super::testing::{Map, op};
use super::{Clock, Config, Geometry, Log, MemberId, Replica, ReplicaError};

/// As small as it gets: everything wraps after four batches.
const MODEL: Geometry = Geometry {
    order_slots: 4,
    members: 2,
    lane_lines: 8,
    entry_bytes: 24,
    stage_lines: 3,
};

/// Time stands still: no wait ends by time-out, no lease runs out.
#[derive(Clone, Copy, Debug)]
struct Still;

impl Clock for Still {
    fn now_ns(&self) -> u64 {
        0
    }
    fn pause(&self, _: u32) {
        thread::yield_now();
    }
}

type ModelReplica = Replica<Map, Still>;

fn explore(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    let deeper = std::env::var("VIADUCT_LOOM_PREEMPTIONS").ok();
    let bound = deeper.and_then(|text| text.parse().ok());
    builder.preemption_bound = Some(bound.unwrap_or(preemptions));
    builder.max_branches = 50_000;
    builder.check(model);
}

fn log() -> Log {
    Log::create_in(&Words::model(MODEL.total_bytes() / 8), MODEL).expect("legal")
}

fn join(log: &Log) -> Arc<ModelReplica> {
    let config = Config {
        threads: 2,
        part_bytes: 16,
        ..Config::default()
    };
    let replica = Replica::join(log.clone(), Map::default(), Still, config);
    Arc::new(replica.ok().expect("room"))
}

fn member(index: usize) -> MemberId {
    MemberId::new(index).expect("small")
}

/// Writes a batch that adds 1 to `key` and links it at the end.
fn append(log: &Log, lane: &mut Lane, author: MemberId, key: u64) -> u64 {
    let words = batch_words(&MODEL, 1, 0);
    let reserved = lane.reserve(1, log.head()).expect("room");
    let space = log.layout.lane(author, reserved.line, words);
    let space = space.expect("inside");
    let adds = op(key, 1);
    let piece = Piece {
        kind: Kind::Operation,
        first: adds.as_bytes(),
        second: &[],
    };
    write(space, &MODEL, 1, [piece].into_iter());
    let link = Link {
        member: author,
        line: reserved.line,
    };
    let mut position = log.head();
    loop {
        match log.look(position) {
            Slot::Filled(_) => position += 1,
            Slot::Free(free) => {
                offer_at(space, position);
                if log.link(position, free, link) {
                    lane.commit(&reserved, position);
                    return position;
                }
            }
            other => panic!("{other:?} at {position}"),
        }
    }
}

fn key_of(log: &Log, position: u64, copy: &mut Vec<u64>) -> Option<Result<u64, NoBatch>> {
    let Slot::Filled(link) = log.look(position) else {
        return None;
    };
    Some(fetch(log, position, link, copy).map(|batch| {
        let entry = batch.entry(0).expect("one entry");
        let key = entry.payload[..8].try_into().expect("eight bytes");
        u64::from_ne_bytes(key)
    }))
}

/// Publication: who sees a link sees the whole batch.
#[test]
fn a_batch_is_seen_whole_or_not_at_all() {
    explore(3, || {
        let log = log();
        let reader = {
            let log = log.clone();
            thread::spawn(move || key_of(&log, 0, &mut Vec::new()))
        };
        append(&log, &mut Lane::new(&MODEL), member(0), 10);
        let seen = reader.join().expect("no panic");
        assert!(matches!(seen, None | Some(Ok(10))), "{seen:?}");
    });
}

/// One order: two members link at once, and a third thread reads.
#[test]
fn batches_are_seen_in_one_order() {
    explore(2, || {
        let log = log();
        let writer = {
            let log = log.clone();
            thread::spawn(move || append(&log, &mut Lane::new(&MODEL), member(1), 11))
        };
        let reader = {
            let log = log.clone();
            thread::spawn(move || {
                let mut copy = Vec::new();
                [0, 1].map(|position| key_of(&log, position, &mut copy))
            })
        };
        let mine = append(&log, &mut Lane::new(&MODEL), member(0), 10);
        let others = writer.join().expect("no panic");
        let mut copy = Vec::new();
        assert_eq!(key_of(&log, mine, &mut copy), Some(Ok(10)));
        assert_eq!(key_of(&log, others, &mut copy), Some(Ok(11)));
        let seen = reader.join().expect("no panic");
        for (position, seen) in [0, 1].into_iter().zip(seen) {
            let now = key_of(&log, position, &mut copy);
            assert!(seen.is_none() || seen == now, "{seen:?} at {position}");
        }
    });
}

/// Reclaim: a reader that is overtaken while it copies finds out.
#[test]
fn an_overtaken_reader_never_believes_what_it_copied() {
    explore(3, || {
        let log = log();
        // Segments of one line.
        let mut lane = Lane::new(&Geometry {
            lane_lines: 4,
            ..MODEL
        });
        append(&log, &mut lane, member(0), 10);
        let writer = {
            let log = log.clone();
            thread::spawn(move || {
                // The segment is free again: the next batch takes it.
                log.raise_head(1);
                append(&log, &mut lane, member(0), 11);
            })
        };
        let mut copy = Vec::new();
        let seen = key_of(&log, 0, &mut copy).expect("filled");
        assert!(matches!(seen, Ok(10) | Err(NoBatch::Overrun)), "{seen:?}");
        writer.join().expect("no panic");
    });
}

/// Combining: two threads of one node, and a third that reads.
#[test]
fn two_threads_combine_and_a_reader_sees_whole_states() {
    explore(2, || {
        let replica = join(&log());
        let other = {
            let replica = replica.clone();
            thread::spawn(move || {
                let mut seat = replica.thread().expect("a seat");
                seat.update(op(0, 1)).expect("applied")
            })
        };
        let mut seat = replica.thread().expect("a seat");
        let mine = seat.update(op(0, 1)).expect("applied");
        assert!(seat.read(|map| map.get(0)).expect("running") > mine);
        let others = other.join().expect("no panic");
        assert_eq!(mine + others, 1, "each sum is answered once");
    });
}

/// The reader's flag against the writer's.
#[test]
fn readers_and_the_writer_keep_out_of_each_others_way() {
    explore(3, || {
        let replica = join(&log());
        let reader = {
            let replica = replica.clone();
            thread::spawn(move || {
                let mut seat = replica.thread().expect("a seat");
                let sums = seat.read_local(|map| (map.get(0), map.get(1)));
                sums.expect("running")
            })
        };
        let mut seat = replica.thread().expect("a seat");
        seat.update(op(0, 1)).expect("applied");
        let (first, second) = reader.join().expect("no panic");
        assert!(first <= 1 && second == 0);
    });
}

/// Linearizable reads: what was answered on one member before a read began is
/// in that read on another.
#[test]
fn a_read_sees_all_that_was_answered_before_it() {
    explore(2, || {
        let log = log();
        let (a, b) = (join(&log), join(&log));
        let answered = Arc::new(AtomicU64::new(0));
        let reader = {
            let answered = answered.clone();
            thread::spawn(move || {
                // Acquire: what a message between the two would do.
                let before = answered.load(Ordering::Acquire);
                let mut seat = b.thread().expect("a seat");
                let sum = seat.read(|map| map.get(1)).expect("running");
                assert!(sum >= before);
                sum
            })
        };
        let mut seat = a.thread().expect("a seat");
        seat.update(op(1, 1)).expect("applied");
        answered.store(1, Ordering::Release);
        assert!(reader.join().expect("no panic") <= 1);
    });
}

/// Two reads on two members never disagree on what came first.
#[test]
fn of_two_writers_that_read_each_other_one_sees_the_other() {
    explore(2, || {
        let log = log();
        let (a, b) = (join(&log), join(&log));
        let other = thread::spawn(move || {
            let mut seat = b.thread().expect("a seat");
            seat.update(op(1, 1)).expect("applied");
            seat.read(|map| map.get(2)).expect("running")
        });
        let mut seat = a.thread().expect("a seat");
        seat.update(op(2, 1)).expect("applied");
        let mine = seat.read(|map| map.get(1)).expect("running");
        let others = other.join().expect("no panic");
        assert!(mine + others >= 1);
    });
}

/// Two members with two threads each.
#[test]
fn two_members_with_two_threads_each_agree() {
    explore(1, || {
        let log = log();
        let replicas = [join(&log), join(&log)];
        let others: Vec<_> = [0, 0, 1]
            .into_iter()
            .map(|index: usize| {
                let replica = replicas[index].clone();
                thread::spawn(move || {
                    let mut seat = replica.thread().expect("a seat");
                    seat.update(op(0, 1)).expect("applied")
                })
            })
            .collect();
        let mut seat = replicas[1].thread().expect("a seat");
        let mut answers = Vec::from([seat.update(op(0, 1)).expect("applied")]);
        answers.extend(
            others
                .into_iter()
                .map(|other| other.join().expect("no panic")),
        );
        answers.sort_unstable();
        assert_eq!(answers, [0, 1, 2, 3]);
        assert_eq!(seat.read(|map| map.get(0)), Ok(4));
    });
}

/// Eviction against an update of the victim: whoever is first in the log
/// wins, and the victim's answer tells which.
#[test]
fn an_update_beside_an_eviction_is_applied_everywhere_or_nowhere() {
    explore(2, || {
        let log = log();
        let (a, b) = (join(&log), join(&log));
        let (victim, epoch) = (b.member(), b.epoch());
        let zombie = thread::spawn(move || {
            let mut seat = b.thread().expect("a seat");
            let result = seat.update(op(0, 1));
            drop(seat);
            let _ = b.tick();
            result
        });
        a.evict(victim, epoch).expect("linked");
        let result = zombie.join().expect("no panic");
        let mut seat = a.thread().expect("a seat");
        let sum = seat.read(|map| map.get(0));
        match result {
            Ok(before) => assert_eq!((before, sum), (0, Ok(1))),
            Err(error) => assert_eq!((error, sum), (ReplicaError::Ended, Ok(0))),
        }
        drop(seat);
        a.tick().expect("alive");
        let state = log.status(victim).state;
        assert!(matches!(state, State::Free | State::Evicted), "{state:?}");
    });
}

/// Eviction by two members at once of a third, which then says it is done.
#[test]
fn the_end_of_a_member_and_its_own_word_meet() {
    explore(3, || {
        let log = log();
        let (a, b) = (join(&log), join(&log));
        let (victim, epoch) = (b.member(), b.epoch());
        let zombie = thread::spawn(move || b.bury());
        a.evict(victim, epoch).expect("linked");
        zombie.join().expect("no panic");
        a.evict(victim, epoch).expect("linked");
        assert!(log.status(victim).is(State::Free, epoch));
    });
}

/// Joining by snapshot while the donor writes. Switches only where a thread
/// waits, unless a bound is given: with one preemption it takes minutes.
#[test]
fn a_replica_that_joins_beside_a_writer_has_every_operation() {
    explore(0, || {
        let log = log();
        let a = join(&log);
        let mut seat = a.thread().expect("a seat");
        for key in 0..3 {
            seat.update(op(key, 1)).expect("applied");
        }
        drop(seat);
        // The log no longer goes back to its start.
        log.raise_head(log.applied(a.member()));
        let joiner = {
            let log = log.clone();
            thread::spawn(move || join(&log))
        };
        let mut seat = a.thread().expect("a seat");
        seat.update(op(0, 1)).expect("applied");
        let live = || log.status(member(1)).state == State::Live;
        while !live() {
            a.tick().expect("alive");
            thread::yield_now();
        }
        let b = joiner.join().expect("no panic");
        let mut other = b.thread().expect("a seat");
        let sums = other.read(|map| map.sums.clone()).expect("running");
        assert_eq!(Ok(sums), seat.read(|map| map.sums.clone()));
        assert_eq!(a.log().record(member(0), 0, 1).load(Ordering::Relaxed), 0);
    });
}
