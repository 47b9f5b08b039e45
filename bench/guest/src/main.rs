//! The first process of a guest that is measured.
//!
//! It tells the host what it finds, a line each: `@bench value NAME NS`. Every
//! measurement is announced by `@bench start NAME` and a pause, so that the
//! host can read the hypervisor's counters between the two.

mod machine;
mod measure;
mod span;

use anyhow::Result;
use rustix::time::{ClockId, clock_gettime};

use machine::{power_off, tell};

/// What is measured: its name, and the function that returns nanoseconds.
type Measurement = (&'static str, fn() -> Result<u64>);

/// Of one hypervisor against others.
const HYPERVISORS: [Measurement; 7] = [
    ("shell_loop", measure::shell_loop),
    ("fork_exec", measure::fork_exec),
    ("page_fault", measure::page_fault),
    ("random_read", measure::random_read),
    ("cpuid", measure::cpuid),
    ("pipe", measure::pipe_round_trip),
    ("futex", measure::futex_round_trip),
];

/// Of a VM on several nodes against one on a single node.
const SPAN: [Measurement; 9] = [
    ("compute_one", span::compute_one),
    ("compute_two", span::compute_two),
    ("one_page", span::one_page),
    ("one_word", span::one_word),
    ("ipi_p50", span::ipi_p50),
    ("ipi_p99", span::ipi_p99),
    ("pipe", measure::pipe_round_trip),
    ("futex", measure::futex_round_trip),
    ("page_fault", measure::page_fault),
];

fn main() {
    // Before anything else: this is the time that the boot took.
    let booted = clock_gettime(ClockId::Boottime);
    tell(&format!(
        "value boot {}",
        booted.tv_sec * 1_000_000_000 + booted.tv_nsec
    ));
    measure::pause();
    let measurements: &[Measurement] = match std::env::var("suite").as_deref() {
        Ok("span") => &SPAN,
        _ => &HYPERVISORS,
    };
    for (name, measurement) in measurements {
        tell(&format!("start {name}"));
        measure::pause();
        match measurement() {
            Ok(ns) => tell(&format!("value {name} {ns}")),
            Err(error) => tell(&format!("failed {name}: {error:#}")),
        }
    }
    tell("end");
    power_off()
}
