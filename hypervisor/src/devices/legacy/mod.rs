//! A PC's old devices: what bare-metal programs find at fixed ports.
//!
//! Like all devices here they know no clock: who accesses them says what time
//! it is, in nanoseconds since the VM started.

pub mod clock;
pub mod pic;
pub mod pit;

/// Ticks of the ACPI timer in a second.
const PM_TIMER_HZ: u128 = 3_579_545;
const PM_TIMER_BITS: u32 = 24;

/// What the ACPI timer reads: 24 bits that wrap. Source: ACPI 6.5, 4.8.2.1.
#[must_use]
pub fn pm_timer(now_ns: u64) -> u32 {
    let ticks = u128::from(now_ns) * PM_TIMER_HZ / 1_000_000_000;
    u32::try_from(ticks % (1 << PM_TIMER_BITS)).expect("24 bits")
}

#[cfg(test)]
mod tests {
    use super::pm_timer;

    #[test]
    fn the_acpi_timer_counts_and_wraps() {
        assert_eq!(pm_timer(0), 0);
        assert_eq!(pm_timer(1_000_000_000), 3_579_545);
        assert_eq!(pm_timer(5_000_000_000), 17_897_725 - (1 << 24));
        let _ = pm_timer(u64::MAX);
    }
}
