//! The host's clocks: the TSC for reading, the APIC timer for waking.
//!
//! Both are measured once against the ACPI PM timer, whose rate is fixed by
//! its specification.
#![expect(unsafe_code, reason = "the PM timer is a port")]

use super::{apic, cpu, io};

/// ACPI PM timer, ticks per second (ACPI 6.5, 4.8.2.1).
const PM_TIMER_HZ: u64 = 3_579_545;
/// Port of the PM timer on QEMU's q35 and pc once firmware has set it up.
const PM_TIMER_PORT: u16 = 0x608;
const CALIBRATION_PM_TICKS: u32 = 3_579_545 / 40;

/// Rates of this node's clocks.
#[derive(Clone, Copy, Debug)]
pub struct Clocks {
    /// TSC ticks per second, divided by 1,000.
    pub tsc_khz: u32,
    /// APIC timer ticks per TSC tick, as a fraction of 2^32.
    apic_per_tsc: u64,
}

fn pm_timer() -> u32 {
    // SAFETY: reading the timer has no effect.
    unsafe { io::inl(PM_TIMER_PORT) & 0xff_ffff }
}

impl Clocks {
    /// Measures for 25 ms; `None` if there is no PM timer.
    #[must_use]
    pub fn measure() -> Option<Self> {
        let start = pm_timer();
        let moves = (0..100_000).any(|_| pm_timer() != start);
        if !moves {
            return None;
        }
        let ((tsc, pm), apic) = apic::count_ticks(|| {
            let (tsc_start, pm_start) = (cpu::rdtsc(), pm_timer());
            loop {
                let pm = pm_timer().wrapping_sub(pm_start) & 0xff_ffff;
                if pm >= CALIBRATION_PM_TICKS {
                    break (cpu::rdtsc() - tsc_start, pm);
                }
            }
        });
        let tsc_khz = tsc * PM_TIMER_HZ / u64::from(pm) / 1000;
        Some(Self {
            tsc_khz: u32::try_from(tsc_khz).ok()?,
            apic_per_tsc: (u64::from(apic) << 32) / tsc.max(1),
        })
    }

    /// TSC ticks in so many microseconds.
    #[must_use]
    pub fn ticks(&self, us: u64) -> u64 {
        us * u64::from(self.tsc_khz) / 1000
    }

    /// Makes the core's timer fire about `tsc_ticks` from now.
    pub fn set_timer(&self, tsc_ticks: u64) {
        let ticks = (u128::from(tsc_ticks) * u128::from(self.apic_per_tsc)) >> 32;
        // A wait too long for the counter ends early; who waits looks again.
        apic::set_timer(u32::try_from(ticks).unwrap_or(u32::MAX).max(1));
    }

    /// Spins for this many microseconds.
    pub fn spin_us(&self, us: u32) {
        let end = cpu::rdtsc() + self.ticks(us.into());
        while cpu::rdtsc() < end {
            core::hint::spin_loop();
        }
    }
}
