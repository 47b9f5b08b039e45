//! Measurements of what a kernel does for the threads of a process.

use std::hint::black_box;
use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};
use memmap2::{Advice, MmapMut};

use crate::measure::{PAGE, median, pin_to, touch};

/// The shortest system call.
pub(crate) fn getpid() -> Result<u64> {
    const TIMES: usize = 20_000;
    pin_to(0)?;
    median(TIMES, || {
        let start = Instant::now();
        for _ in 0..TIMES {
            black_box(rustix::process::getpid());
        }
        Ok(start.elapsed())
    })
}

/// Telling the time, which programs do without a system call if they can.
pub(crate) fn clock() -> Result<u64> {
    const TIMES: usize = 20_000;
    pin_to(0)?;
    median(TIMES, || {
        let start = Instant::now();
        for _ in 0..TIMES {
            black_box(Instant::now());
        }
        Ok(start.elapsed())
    })
}

/// Maps memory, touches each of its pages, and unmaps it.
pub(crate) fn map() -> Result<u64> {
    const TIMES: usize = 500;
    const PAGES: usize = 16;
    pin_to(0)?;
    median(TIMES, || {
        let start = Instant::now();
        for _ in 0..TIMES {
            let mut memory = MmapMut::map_anon(PAGES * PAGE).context("can't map memory")?;
            touch(&mut memory);
        }
        Ok(start.elapsed())
    })
}

/// First touches by four threads of one process, each of memory of its own, in
/// small pages. Thread n runs on CPU n modulo `cpus`.
fn faults(cpus: usize) -> Result<u64> {
    const THREADS: usize = 4;
    const PAGES: usize = 4096;
    median(THREADS * PAGES, || {
        pin_to(0)?;
        let ready = Barrier::new(THREADS + 1);
        let done = Barrier::new(THREADS + 1);
        thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|number| {
                    let (ready, done) = (&ready, &done);
                    scope.spawn(move || -> Result<()> {
                        let memory = pin_to(number % cpus).and_then(|()| {
                            let memory = MmapMut::map_anon(PAGES * PAGE)?;
                            memory.advise(Advice::NoHugePage)?;
                            Ok(memory)
                        });
                        ready.wait();
                        let touched = memory.map(|mut memory| {
                            touch(&mut memory);
                            memory
                        });
                        // What is given back doesn't count.
                        done.wait();
                        touched.map(drop)
                    })
                })
                .collect();
            ready.wait();
            let start = Instant::now();
            done.wait();
            let time = start.elapsed();
            for thread in threads {
                thread.join().expect("measurements don't panic")?;
            }
            Ok(time)
        })
    })
}

/// All threads on one CPU, so on one node.
pub(crate) fn faults_one() -> Result<u64> {
    faults(1)
}

/// Two threads on each of two CPUs, which lie on two nodes.
pub(crate) fn faults_two() -> Result<u64> {
    faults(2)
}
