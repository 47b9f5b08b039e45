//! What measures in a guest: its first process, or a command in it.
//!
//! It tells the host what it finds, a line each: `@bench value NAME NS`. Every
//! measurement is announced by `@bench start NAME` and a pause, so that the
//! host can read the hypervisor's counters between the two.

mod machine;
mod measure;
mod span;
mod threads;

use std::time::Duration;

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
    ("pipe", || measure::pipe_round_trip(1)),
    ("futex", || measure::futex_round_trip(1)),
];

/// Of a VM on several nodes against one on a single node.
const SPAN: [Measurement; 9] = [
    ("compute_one", span::compute_one),
    ("compute_two", span::compute_two),
    ("one_page", span::one_page),
    ("one_word", span::one_word),
    ("ipi_p50", span::ipi_p50),
    ("ipi_p99", span::ipi_p99),
    ("pipe", || measure::pipe_round_trip(1)),
    ("futex", || measure::futex_round_trip(1)),
    ("page_fault", measure::page_fault),
];

/// Of the paravirtual guest against Linux, each on two nodes of one CPU.
const PV: [Measurement; 12] = [
    ("getpid", threads::getpid),
    ("clock", threads::clock),
    ("pipe_here", || measure::pipe_round_trip(0)),
    ("pipe", || measure::pipe_round_trip(1)),
    ("futex_here", || measure::futex_round_trip(0)),
    ("futex", || measure::futex_round_trip(1)),
    ("fork_exec", measure::fork_exec),
    ("map", threads::map),
    ("faults_one", threads::faults_one),
    ("faults_two", threads::faults_two),
    ("compute_one", span::compute_one),
    ("compute_two", span::compute_two),
];

fn main() {
    // Before anything else: this is the time that the boot took.
    let booted = clock_gettime(ClockId::Boottime);
    let booted = Duration::try_from(booted).unwrap_or_default();
    // A command comes later, and is told when the guest was up.
    let told = std::env::var("booted")
        .ok()
        .and_then(|text| text.parse().ok());
    let booted = told.map_or(booted, Duration::from_secs_f64);
    tell(&format!("value boot {}", booted.as_nanos()));
    measure::pause();
    let measurements: &[Measurement] = match std::env::var("suite").as_deref() {
        Ok("span") => &SPAN,
        Ok("pv") => &PV,
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
    if rustix::process::getpid().is_init() {
        power_off()
    }
}
