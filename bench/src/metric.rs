//! What is measured, in which unit it is shown, and what it should be.

use crate::system::System;

/// The metric at whose value the boot is over.
pub(crate) const BOOT: &str = "boot";
/// The metric that the host takes itself.
pub(crate) const LAUNCH: &str = "launch";

/// Something that is measured in the guest, in nanoseconds.
#[derive(Debug)]
pub(crate) struct Metric {
    /// The guest's name for it.
    pub name: &'static str,
    /// What it is called in the table.
    pub title: &'static str,
    /// The unit in the table.
    pub unit: Unit,
    /// What Viaduct should reach.
    pub targets: &'static [Target],
    /// A system without an exit to measure has no figure.
    pub needs_exits: bool,
}

/// A unit and its length in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unit {
    pub name: &'static str,
    pub nanoseconds: f64,
}

/// At most so many times the figure of another system.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    pub against: System,
    pub ratio: f64,
}

const SECONDS: Unit = Unit {
    name: "s",
    nanoseconds: 1e9,
};
const MICROSECONDS: Unit = Unit {
    name: "µs",
    nanoseconds: 1e3,
};
const NANOSECONDS: Unit = Unit {
    name: "ns",
    nanoseconds: 1.0,
};

const fn plain(ratio: f64) -> Target {
    Target {
        against: System::Plain,
        ratio,
    }
}

const fn kvm(ratio: f64) -> Target {
    Target {
        against: System::Kvm,
        ratio,
    }
}

const fn metric(
    name: &'static str,
    title: &'static str,
    unit: Unit,
    targets: &'static [Target],
) -> Metric {
    Metric {
        name,
        title,
        unit,
        targets,
        needs_exits: false,
    }
}

/// All metrics, in the order of the table.
pub(crate) const METRICS: [Metric; 9] = [
    metric(
        BOOT,
        "boot to init, guest's clock",
        SECONDS,
        &[plain(1.2), kvm(1.0)],
    ),
    metric(LAUNCH, "launch to init, host's clock", SECONDS, &[]),
    metric(
        "shell_loop",
        "shell loop of 20,000",
        SECONDS,
        &[plain(1.03)],
    ),
    metric("fork_exec", "200 × fork and exec", SECONDS, &[plain(1.25)]),
    metric(
        "page_fault",
        "anonymous page fault",
        MICROSECONDS,
        &[plain(1.3)],
    ),
    metric("random_read", "random read in 32 MiB", NANOSECONDS, &[]),
    Metric {
        needs_exits: true,
        ..metric("cpuid", "CPUID exit", MICROSECONDS, &[kvm(0.5)])
    },
    metric(
        "pipe",
        "pipe round trip, two vCPUs",
        MICROSECONDS,
        &[kvm(0.5)],
    ),
    metric("futex", "futex round trip, two vCPUs", MICROSECONDS, &[]),
];

/// The metric of this name.
pub(crate) fn find(name: &str) -> Option<&'static Metric> {
    METRICS.iter().find(|metric| metric.name == name)
}
