//! Measurements of what two vCPUs have in common: CPUs 0 and 1, which lie on
//! two nodes if the VM has two.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::thread::{MembarrierCommand, membarrier};

use crate::measure::{against, median, nanoseconds, pin_to};

/// A cache line, and what lies around it.
#[repr(align(64))]
#[derive(Default)]
struct Line(AtomicU64);

/// Two lines of one page.
#[repr(align(4096))]
#[derive(Default)]
struct Page {
    first: Line,
    second: Line,
}

/// A thread's share of the compute program: it stays in the processor, and takes
/// the best part of a second, so that starting a thread does not count.
fn compute() -> Result<()> {
    let mut state = black_box(0x9e37_79b9_7f4a_7c15_u64);
    for _ in 0..400_000_000 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
    }
    black_box(state);
    Ok(())
}

/// The program with one thread.
pub(crate) fn compute_one() -> Result<u64> {
    median(1, || {
        pin_to(0)?;
        let start = Instant::now();
        compute()?;
        Ok(start.elapsed())
    })
}

/// The program with two threads, twice as much in all.
pub(crate) fn compute_two() -> Result<u64> {
    median(1, || {
        pin_to(0)?;
        thread::scope(|scope| {
            let start = Instant::now();
            let other = scope.spawn(|| {
                pin_to(1)?;
                compute()
            });
            compute()?;
            other.join().expect("measurements don't panic")?;
            Ok(start.elapsed())
        })
    })
}

/// Each CPU writes to a line of its own; the lines share a page.
pub(crate) fn one_page() -> Result<u64> {
    const WRITES: u64 = 2_000_000;
    let page = Box::new(Page::default());
    let write = |line: &Line| -> Result<()> {
        for value in 0..WRITES {
            black_box(line).0.store(value, Ordering::Relaxed);
        }
        Ok(())
    };
    // A tenth of a nanosecond would be lost: a hundred writes are timed.
    let hundreds = usize::try_from(WRITES / 100)?;
    let hundred = median(hundreds, || {
        let finished = AtomicBool::new(false);
        against(
            || {
                write(&page.first)?;
                finished.store(true, Ordering::Relaxed);
                Ok(())
            },
            || {
                while !finished.load(Ordering::Relaxed) {
                    write(&page.second)?;
                }
                Ok(())
            },
        )
    })?;
    Ok(hundred / 100)
}

/// A word goes to the other CPU and back; both look at it without a pause.
pub(crate) fn one_word() -> Result<u64> {
    const TRIPS: u32 = 20_000;
    let wait_for = |word: &AtomicU32, value| {
        while word.load(Ordering::Acquire) != value {
            std::hint::spin_loop();
        }
    };
    median(TRIPS as usize, || {
        let word = AtomicU32::new(0);
        against(
            || {
                for trip in 0..TRIPS {
                    word.store(2 * trip + 1, Ordering::Release);
                    wait_for(&word, 2 * trip + 2);
                }
                Ok(())
            },
            || {
                for trip in 0..TRIPS {
                    wait_for(&word, 2 * trip + 1);
                    word.store(2 * trip + 2, Ordering::Release);
                }
                Ok(())
            },
        )
    })
}

/// The times, in ascending order, of interrupts that make the other CPU
/// execute a barrier and tell so.
///
/// `membarrier` interrupts all CPUs that run a thread of the process, and
/// returns when all have answered.
fn ipis() -> Result<Vec<u64>> {
    const TIMES: usize = 3000;
    membarrier(MembarrierCommand::RegisterPrivateExpedited)?;
    let finished = AtomicBool::new(false);
    let started = AtomicBool::new(false);
    let mut times = Vec::with_capacity(TIMES);
    against(
        || {
            while !started.load(Ordering::Acquire) {
                std::hint::spin_loop();
            }
            for _ in 0..TIMES {
                let start = Instant::now();
                membarrier(MembarrierCommand::PrivateExpedited)?;
                times.push(nanoseconds(start.elapsed()));
            }
            finished.store(true, Ordering::Relaxed);
            Ok(())
        },
        || {
            started.store(true, Ordering::Release);
            while !finished.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
            Ok(())
        },
    )?;
    times.sort_unstable();
    Ok(times)
}

fn ipi_percentile(percent: usize) -> Result<u64> {
    median(1, || {
        let times = ipis()?;
        let time = times.get(times.len() * percent / 100);
        Ok(Duration::from_nanos(*time.context("there are some")?))
    })
}

/// The IPI that half of all don't exceed.
pub(crate) fn ipi_p50() -> Result<u64> {
    ipi_percentile(50)
}

/// The IPI that 99 of 100 don't exceed.
pub(crate) fn ipi_p99() -> Result<u64> {
    ipi_percentile(99)
}
