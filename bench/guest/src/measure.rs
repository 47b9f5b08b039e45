//! The measurements. Each returns nanoseconds of one operation: the median of
//! several rounds.

use std::hint::black_box;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use memmap2::{Advice, MmapMut};
use rustix::pipe::pipe;
use rustix::thread::{CpuSet, futex, sched_setaffinity};

pub(crate) const PAGE: usize = 4096;
const ROUNDS: usize = 5;

/// Keeps the processor busy, without a wait that would be an exit, for as
/// long as the host may take to read the counters.
pub(crate) fn pause() {
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(50) {
        std::hint::spin_loop();
    }
}

pub(crate) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The median round's time for one of `operations`. A round that isn't counted
/// comes first: translated code and the size of the emulator's TLB still show
/// what ran before.
pub(crate) fn median(
    operations: usize,
    mut round: impl FnMut() -> Result<Duration>,
) -> Result<u64> {
    let mut times = Vec::with_capacity(ROUNDS);
    round()?;
    for _ in 0..ROUNDS {
        times.push(nanoseconds(round()?));
    }
    times.sort_unstable();
    Ok(times[ROUNDS / 2] / operations as u64)
}

/// Runs a script in busybox's shell, a new one for each round.
fn shell(script: &str) -> Result<u64> {
    median(1, || {
        let start = Instant::now();
        let status = Command::new("/bin/busybox")
            .args(["sh", "-c", script])
            .stdin(Stdio::null())
            .status()
            .context("can't start busybox")?;
        let time = start.elapsed();
        ensure!(status.success(), "busybox ended with {status}");
        Ok(time)
    })
}

/// Arithmetic in a shell: user code without system calls.
pub(crate) fn shell_loop() -> Result<u64> {
    shell("i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done")
}

/// Processes: the shell forks, the child executes busybox and ends.
pub(crate) fn fork_exec() -> Result<u64> {
    // With its path, a command is not taken for the shell's own.
    shell("i=0; while [ $i -lt 200 ]; do /bin/busybox true; i=$((i + 1)); done")
}

/// Writes to each page.
pub(crate) fn touch(memory: &mut MmapMut) {
    for page in memory.chunks_exact_mut(PAGE) {
        *black_box(&mut page[0]) = 1;
    }
}

/// First touches of anonymous memory, in small pages.
pub(crate) fn page_fault() -> Result<u64> {
    const PAGES: usize = (64 << 20) / PAGE;
    median(PAGES, || {
        let mut memory = MmapMut::map_anon(PAGES * PAGE).context("can't map memory")?;
        memory
            .advise(Advice::NoHugePage)
            .context("can't ask for small pages")?;
        let start = Instant::now();
        touch(&mut memory);
        Ok(start.elapsed())
    })
}

/// Dependent reads all over 32 MiB in small pages: address translation.
pub(crate) fn random_read() -> Result<u64> {
    const WORDS: usize = (32 << 20) / size_of::<u32>();
    const READS: usize = 200_000;
    let mut memory = MmapMut::map_anon(WORDS * size_of::<u32>()).context("can't map memory")?;
    memory
        .advise(Advice::NoHugePage)
        .context("can't ask for small pages")?;
    // x → 5x + odd visits all words of a power of two before it repeats.
    for (index, word) in memory.chunks_exact_mut(size_of::<u32>()).enumerate() {
        let next = (index * 5 + 0x2_3457 * 2 + 1) % WORDS;
        word.copy_from_slice(&u32::try_from(next).context("too many words")?.to_ne_bytes());
    }
    let mut at = 0;
    median(READS, || {
        let start = Instant::now();
        for _ in 0..READS {
            let bytes = memory[at..].first_chunk().context("inside")?;
            at = u32::from_ne_bytes(*bytes) as usize * size_of::<u32>();
        }
        black_box(at);
        Ok(start.elapsed())
    })
}

/// CPUID: the least that an exit costs.
pub(crate) fn cpuid() -> Result<u64> {
    const TIMES: usize = 3000;
    median(TIMES, || {
        let start = Instant::now();
        for _ in 0..TIMES {
            black_box(std::arch::x86_64::__cpuid(black_box(0)));
        }
        Ok(start.elapsed())
    })
}

pub(crate) fn pin_to(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).with_context(|| format!("can't run on CPU {cpu}"))
}

/// Runs `ours` on CPU 0 against `theirs` on CPU 1, and times `ours`.
pub(crate) fn against(
    ours: impl FnOnce() -> Result<()>,
    theirs: impl FnOnce() -> Result<()> + Send,
) -> Result<Duration> {
    against_on(1, ours, theirs)
}

/// Runs `ours` on CPU 0 against `theirs` on another, and times `ours`.
fn against_on(
    other: usize,
    ours: impl FnOnce() -> Result<()>,
    theirs: impl FnOnce() -> Result<()> + Send,
) -> Result<Duration> {
    pin_to(0)?;
    thread::scope(|scope| {
        let thread = scope.spawn(move || {
            pin_to(other)?;
            theirs()
        });
        let start = Instant::now();
        ours()?;
        let time = start.elapsed();
        thread.join().expect("measurements don't panic")?;
        Ok(time)
    })
}

const ROUND_TRIPS: usize = 1000;

/// A byte from CPU 0 to another, or to another thread there, and back through
/// two pipes.
pub(crate) fn pipe_round_trip(other: usize) -> Result<u64> {
    median(ROUND_TRIPS, || {
        let (there_out, there_in) = pipe().context("can't make a pipe")?;
        let (back_out, back_in) = pipe().context("can't make a pipe")?;
        let mut byte = [0; 1];
        let mut echo = [0; 1];
        against_on(
            other,
            || {
                for _ in 0..ROUND_TRIPS {
                    rustix::io::write(&there_in, &byte)?;
                    rustix::io::read(&back_out, &mut byte)?;
                }
                Ok(())
            },
            || {
                for _ in 0..ROUND_TRIPS {
                    rustix::io::read(&there_out, &mut echo)?;
                    rustix::io::write(&back_in, &echo)?;
                }
                Ok(())
            },
        )
    })
}

/// Waits until `turn` is no longer `unwanted`.
fn wait_turn(turn: &AtomicU32, unwanted: u32) {
    // Acquire: pairs with the Release of the other side's turn.
    while turn.load(Ordering::Acquire) == unwanted {
        // An error means that the turn has changed, or a signal: look again.
        let _ = futex::wait(turn, futex::Flags::PRIVATE, unwanted, None);
    }
}

fn give_turn(turn: &AtomicU32, to: u32) -> Result<()> {
    turn.store(to, Ordering::Release);
    futex::wake(turn, futex::Flags::PRIVATE, 1)?;
    Ok(())
}

/// A turn from CPU 0 to another, or to another thread there, and back through
/// a futex.
pub(crate) fn futex_round_trip(other: usize) -> Result<u64> {
    median(ROUND_TRIPS, || {
        let turn = AtomicU32::new(0);
        against_on(
            other,
            || {
                for _ in 0..ROUND_TRIPS {
                    give_turn(&turn, 1)?;
                    wait_turn(&turn, 1);
                }
                Ok(())
            },
            || {
                for _ in 0..ROUND_TRIPS {
                    wait_turn(&turn, 0);
                    give_turn(&turn, 0)?;
                }
                Ok(())
            },
        )
    })
}
