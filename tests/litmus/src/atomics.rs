//! Whether locked instructions of different nodes are atomic to each other.
#![expect(unsafe_code, reason = "an instruction that Rust has no name for")]

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use crate::machine::Cpus;
use crate::{Failure, Outcome};

fn expect<T: PartialEq + std::fmt::Display>(
    what: &str,
    found: T,
    wanted: T,
) -> Result<(), Failure> {
    if found == wanted {
        Ok(())
    } else {
        Err(format!("{what}: {found} instead of {wanted}"))
    }
}

/// All add to the same words, of all sizes, in one line.
pub(crate) fn additions(cpus: &Cpus, rounds: u32) -> Outcome {
    #[derive(Default)]
    #[repr(align(64))]
    struct Words(AtomicU64, AtomicU32, AtomicU16, AtomicU8, AtomicU64);
    let words = Words::default();
    cpus.run(cpus.count(), |_| {
        for _ in 0..rounds {
            words.0.fetch_add(1, Ordering::Relaxed);
            words.1.fetch_add(1, Ordering::Relaxed);
            words.2.fetch_add(1, Ordering::Relaxed);
            words.3.fetch_add(1, Ordering::Relaxed);
            let add = |old| Some(old + 1);
            let _ = words
                .4
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
        }
    });
    let sum = u64::from(rounds) * cpus.count() as u64;
    let [b0, b1, b2, b3, ..] = sum.to_le_bytes();
    expect("64 bits", words.0.into_inner(), sum)?;
    expect(
        "32 bits",
        words.1.into_inner(),
        u32::from_le_bytes([b0, b1, b2, b3]),
    )?;
    expect(
        "16 bits",
        words.2.into_inner(),
        u16::from_le_bytes([b0, b1]),
    )?;
    expect("8 bits", words.3.into_inner(), b0)?;
    expect("by compare and exchange", words.4.into_inner(), sum)?;
    Ok(String::new())
}

/// Two words that are only ever changed together.
#[repr(align(16))]
struct Pair(UnsafeCell<[u64; 2]>);

// SAFETY: accessed by locked instructions only while it is shared.
unsafe impl Sync for Pair {}

impl Pair {
    /// Replaces `old` by `new`; what was there.
    fn exchange(&self, old: [u64; 2], new: [u64; 2]) -> [u64; 2] {
        let [mut low, mut high] = old;
        // SAFETY: 1. the pair is aligned to 16 bytes; 2. every x86-64 CPU that
        // Linux supports has the instruction; 3. RBX is restored.
        unsafe {
            std::arch::asm!(
                "xchg {low_new}, rbx",
                "lock cmpxchg16b [{pair}]",
                "mov rbx, {low_new}",
                low_new = inout(reg) new[0] => _,
                pair = in(reg) self.0.get(),
                inout("rax") low,
                inout("rdx") high,
                in("rcx") new[1],
            );
        }
        [low, high]
    }
}

/// All count both words of a pair up, the second three at a time.
pub(crate) fn wide_exchanges(cpus: &Cpus, rounds: u32) -> Outcome {
    let pair = Pair(UnsafeCell::new([0; 2]));
    let torn = cpus.run(cpus.count(), |_| {
        let mut torn = 0_u64;
        for _ in 0..rounds {
            let mut old = [0; 2];
            loop {
                torn += u64::from(old[1] != 3 * old[0]);
                let seen = pair.exchange(old, [old[0] + 1, old[1] + 3]);
                if seen == old {
                    break;
                }
                old = seen;
            }
        }
        torn
    });
    expect("torn pairs", torn.into_iter().sum(), 0)?;
    let sum = u64::from(rounds) * cpus.count() as u64;
    expect("first word", pair.0.into_inner()[0], sum)?;
    Ok(String::new())
}

/// A counter without atomics, under a ticket lock.
pub(crate) fn mutual_exclusion(cpus: &Cpus, rounds: u32) -> Outcome {
    struct Locked {
        next: AtomicU32,
        serving: AtomicU32,
        count: UnsafeCell<u64>,
    }
    // SAFETY: whoever touches the count has its ticket served.
    unsafe impl Sync for Locked {}
    let locked = Locked {
        next: AtomicU32::new(0),
        serving: AtomicU32::new(0),
        count: UnsafeCell::new(0),
    };
    let locked = &locked;
    cpus.run(cpus.count(), |_| {
        for _ in 0..rounds {
            let ticket = locked.next.fetch_add(1, Ordering::Relaxed);
            crate::machine::wait_until(|| locked.serving.load(Ordering::Acquire) == ticket);
            // SAFETY: no other ticket is served now.
            unsafe { *locked.count.get() += 1 };
            locked
                .serving
                .store(ticket.wrapping_add(1), Ordering::Release);
        }
    });
    // SAFETY: the threads have ended.
    let count = unsafe { *locked.count.get() };
    expect("count", count, u64::from(rounds) * cpus.count() as u64)?;
    Ok(String::new())
}
