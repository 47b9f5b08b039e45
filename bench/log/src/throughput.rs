//! Operations per second of a shared map.

use std::hint::black_box;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::map::{Dash, Locked, NodeReplication, Seat, Shared, Viaduct};

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) keys: u64,
    pub(crate) time: Duration,
    pub(crate) repeat: usize,
}

/// One mix of operations.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mix {
    pub(crate) replicas: usize,
    pub(crate) threads: usize,
    /// In percent of all operations.
    pub(crate) writes: u64,
}

/// What one way of sharing came to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    /// Millions of operations per second: the median of the rounds.
    pub(crate) millions: f64,
    /// How often as many the log does: the median of the rounds' ratios.
    pub(crate) ratio: f64,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub(crate) mix: Mix,
    /// The log, node-replication, RwLock, dashmap.
    pub(crate) rates: [Rate; 4],
}

fn measure<S: Shared>(shared: &S, plan: Plan, writes: u64, threads: usize) -> f64 {
    let (stop, working) = (AtomicBool::new(false), AtomicUsize::new(threads));
    let barrier = Barrier::new(threads + 1);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|index| {
                let (stop, working, barrier) = (&stop, &working, &barrier);
                scope.spawn(move || {
                    let mut seat = shared.seat(index);
                    // A step of a congruential generator, and no division: the
                    // harness must not take longer than what it measures.
                    let mut random = index as u64 + 1;
                    let limit = (writes << 32) / 100;
                    let mut operations = 0_u64;
                    barrier.wait();
                    while !stop.load(Ordering::Relaxed) {
                        for _ in 0..64 {
                            random = random
                                .wrapping_mul(6_364_136_223_846_793_005)
                                .wrapping_add(1_442_695_040_888_963_407);
                            let key = (random >> 12) & (plan.keys - 1);
                            if random >> 32 < limit {
                                seat.put(key, random);
                            } else {
                                black_box(seat.get(key));
                            }
                        }
                        operations += 64;
                    }
                    working.fetch_sub(1, Ordering::SeqCst);
                    // Another replica's thread may wait for this replica.
                    while working.load(Ordering::SeqCst) > 0 {
                        seat.keep_up();
                        std::thread::yield_now();
                    }
                    operations
                })
            })
            .collect();
        barrier.wait();
        let started = Instant::now();
        std::thread::sleep(plan.time);
        stop.store(true, Ordering::Relaxed);
        let elapsed = started.elapsed();
        let total: u64 = workers
            .into_iter()
            .map(|worker| worker.join().expect("no panic"))
            .sum();
        total as f64 / elapsed.as_secs_f64() / 1e6
    })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Measures one mix. The four ways take turns in short rounds, and what
/// counts is the ratio within a round: what else the machine does falls on all
/// of them.
fn row(plan: Plan, mix: Mix) -> Row {
    let Mix {
        replicas,
        threads,
        writes,
    } = mix;
    let viaduct = Viaduct::new(replicas, plan.keys);
    let peer = NodeReplication::new(replicas, threads, plan.keys);
    let locked = Locked::new(plan.keys);
    let dash = Dash::new(plan.keys);
    let rounds: Vec<[f64; 4]> = (0..plan.repeat)
        .map(|_| {
            [
                measure(&viaduct, plan, writes, threads),
                measure(&peer, plan, writes, threads),
                measure(&locked, plan, writes, threads),
                measure(&dash, plan, writes, threads),
            ]
        })
        .collect();
    let rate = |way: usize| Rate {
        millions: median(rounds.iter().map(|round| round[way]).collect()),
        ratio: median(rounds.iter().map(|round| round[0] / round[way]).collect()),
    };
    Row {
        mix,
        rates: [rate(0), rate(1), rate(2), rate(3)],
    }
}

/// Measures the mixes whose name `replicas/threads/writes` starts with `only`.
pub(crate) fn run<'a>(plan: Plan, only: &'a str) -> impl Iterator<Item = Row> + use<'a> {
    let sizes = [(1, 1), (1, 2), (1, 4), (2, 2), (2, 4)];
    sizes
        .into_iter()
        .flat_map(|(replicas, threads)| {
            [0, 10, 50, 100].map(|writes| Mix {
                replicas,
                threads,
                writes,
            })
        })
        .filter(move |mix| {
            format!("{}/{}/{}", mix.replicas, mix.threads, mix.writes).starts_with(only)
        })
        .map(move |mix| row(plan, mix))
}
