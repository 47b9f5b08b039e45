//! The rate of the processor's time-stamp counter.
//!
//! A guest of plain QEMU would find it by the interval timer, and fails when
//! the emulation is held up for some milliseconds at the wrong moment; then
//! it has no clock and hangs. So all guests are told by their command line.
#![expect(unsafe_code, reason = "reads the time-stamp counter")]

use std::arch::x86_64::_rdtsc;
use std::thread;
use std::time::{Duration, Instant};

const WINDOW: Duration = Duration::from_millis(50);
const WINDOWS: usize = 7;

fn now() -> (u64, Instant) {
    // SAFETY: every x86-64 processor has the instruction, and no system that
    // can run the guests forbids it.
    (unsafe { _rdtsc() }, Instant::now())
}

/// Ticks per millisecond: the median of some windows, as this process may be
/// interrupted between its two clocks.
pub(crate) fn khz() -> u64 {
    let mut rates: Vec<u64> = (0..WINDOWS)
        .map(|_| {
            let (first_ticks, first) = now();
            thread::sleep(WINDOW);
            let (last_ticks, last) = now();
            let ticks = u128::from(last_ticks.wrapping_sub(first_ticks));
            let nanoseconds = last.duration_since(first).as_nanos().max(1);
            u64::try_from(ticks * 1_000_000 / nanoseconds).unwrap_or_default()
        })
        .collect();
    rates.sort_unstable();
    rates[WINDOWS / 2]
}
