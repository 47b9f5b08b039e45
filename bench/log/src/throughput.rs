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

/// Millions of operations per second of each way, by writes, threads and
/// replicas.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub(crate) writes: u64,
    pub(crate) threads: usize,
    pub(crate) replicas: usize,
    pub(crate) viaduct: f64,
    pub(crate) node_replication: f64,
    pub(crate) locked: f64,
    pub(crate) dash: f64,
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
                    let mut random = 0x9e37_79b9_7f4a_7c15 ^ (index as u64 + 1);
                    let mut operations = 0_u64;
                    barrier.wait();
                    while !stop.load(Ordering::Relaxed) {
                        for _ in 0..64 {
                            random ^= random << 13;
                            random ^= random >> 7;
                            random ^= random << 17;
                            let key = (random >> 20) % plan.keys;
                            if random % 100 < writes {
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

fn median(mut runs: Vec<f64>) -> f64 {
    runs.sort_by(f64::total_cmp);
    runs[runs.len() / 2]
}

pub(crate) fn run(plan: Plan) -> Vec<Row> {
    let mut rows = Vec::new();
    for (threads, replicas) in [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2)] {
        for writes in [0, 10, 50, 100] {
            // The four ways by turns, so that what else the machine does
            // falls on all of them.
            let mut runs = [const { Vec::new() }; 4];
            for _ in 0..plan.repeat {
                let one = |shared: f64, into: &mut Vec<f64>| into.push(shared);
                let keys = plan.keys;
                let viaduct = Viaduct::new(replicas, keys);
                one(measure(&viaduct, plan, writes, threads), &mut runs[0]);
                let peer = NodeReplication::new(replicas, keys);
                one(measure(&peer, plan, writes, threads), &mut runs[1]);
                one(
                    measure(&Locked::new(keys), plan, writes, threads),
                    &mut runs[2],
                );
                one(
                    measure(&Dash::new(keys), plan, writes, threads),
                    &mut runs[3],
                );
            }
            let [viaduct, node_replication, locked, dash] = runs.map(median);
            rows.push(Row {
                writes,
                threads,
                replicas,
                viaduct,
                node_replication,
                locked,
                dash,
            });
        }
    }
    rows
}
