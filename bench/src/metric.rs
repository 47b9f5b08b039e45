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
    /// What the system that is judged should reach.
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

const fn one_node(ratio: f64) -> Target {
    Target {
        against: System::Viaduct,
        ratio,
    }
}

const fn linux(ratio: f64) -> Target {
    Target {
        against: System::LinuxGuest,
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

/// A hypervisor against others and against none.
pub(crate) const HYPERVISORS: [Metric; 9] = [
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

/// One thread of the compute program, and two with as much each.
pub(crate) const COMPUTE: [&str; 2] = ["compute_one", "compute_two"];

/// A VM on two nodes against the same on one.
pub(crate) const SPANNING: [Metric; 11] = [
    metric(BOOT, "boot to init, guest's clock", SECONDS, &[]),
    metric(LAUNCH, "launch to init, host's clock", SECONDS, &[]),
    metric(COMPUTE[0], "compute, one thread", SECONDS, &[]),
    // At least 0.97 of the speed.
    metric(
        COMPUTE[1],
        "compute, two threads",
        SECONDS,
        &[one_node(1.0 / 0.97)],
    ),
    // At least 0.9 of the speed.
    metric(
        "one_page",
        "write to a line, two vCPUs in a page",
        NANOSECONDS,
        &[one_node(1.0 / 0.9)],
    ),
    metric(
        "one_word",
        "word to the other vCPU and back",
        NANOSECONDS,
        &[one_node(1.5)],
    ),
    metric("ipi_p50", "IPI and its answer, p50", MICROSECONDS, &[]),
    metric("ipi_p99", "IPI and its answer, p99", MICROSECONDS, &[]),
    metric(
        "pipe",
        "pipe round trip, two vCPUs",
        MICROSECONDS,
        &[one_node(2.0)],
    ),
    metric("futex", "futex round trip, two vCPUs", MICROSECONDS, &[]),
    metric("page_fault", "anonymous page fault", MICROSECONDS, &[]),
];

/// Page faults of four threads on one node, and on two.
pub(crate) const FAULTS: [&str; 2] = ["faults_one", "faults_two"];

/// The paravirtual guest against Linux.
pub(crate) const GUESTS: [Metric; 13] = [
    metric(BOOT, "boot to the first command", SECONDS, &[linux(0.25)]),
    metric("getpid", "getpid", NANOSECONDS, &[linux(1.0)]),
    metric("clock", "clock_gettime", NANOSECONDS, &[linux(1.0)]),
    metric(
        "pipe_here",
        "pipe round trip, one node",
        MICROSECONDS,
        &[linux(1.0)],
    ),
    metric("pipe", "pipe round trip, two nodes", MICROSECONDS, &[]),
    metric(
        "futex_here",
        "futex round trip, one node",
        MICROSECONDS,
        &[linux(1.0)],
    ),
    metric(
        "futex",
        "futex round trip, two nodes",
        MICROSECONDS,
        &[linux(1.0)],
    ),
    metric("fork_exec", "200 × fork and exec", SECONDS, &[linux(1.0)]),
    metric(
        "map",
        "map, touch and unmap 64 KiB",
        MICROSECONDS,
        &[linux(1.0)],
    ),
    metric(
        FAULTS[0],
        "page fault of 4 threads, one node",
        MICROSECONDS,
        &[],
    ),
    metric(
        FAULTS[1],
        "page fault of 4 threads, two nodes",
        MICROSECONDS,
        &[],
    ),
    metric(COMPUTE[0], "compute, one thread", SECONDS, &[]),
    metric(COMPUTE[1], "compute, two threads", SECONDS, &[]),
];

/// kvm-unit-tests' vmexit: each kind of exit by its name there.
pub(crate) const VMEXIT: [Metric; 6] = [
    vmexit("cpuid", "CPUID"),
    vmexit("vmcall", "hypercall"),
    vmexit("inl_from_pmtimer", "IN from the ACPI timer"),
    vmexit("mov_to_cr8", "MOV to CR8"),
    vmexit("ipi", "IPI and its answer, two vCPUs"),
    // The one that waits for its interrupt wants one vCPU.
    vmexit("tscdeadline_immed", "TSC deadline that has passed"),
];

const HALF_OF_KVM: &[Target] = &[kvm(0.5)];

const fn vmexit(name: &'static str, title: &'static str) -> Metric {
    metric(name, title, MICROSECONDS, HALF_OF_KVM)
}

/// The metric of this name that a guest with processes measures.
pub(crate) fn find(name: &str) -> Option<&'static Metric> {
    HYPERVISORS
        .iter()
        .chain(&SPANNING)
        .chain(&GUESTS)
        .find(|metric| metric.name == name)
}

/// The metric in a line of vmexit, and its TSC ticks.
pub(crate) fn find_vmexit(line: &str) -> Option<(&'static Metric, u32)> {
    let (name, ticks) = line.split_once(' ')?;
    let metric = VMEXIT.iter().find(|metric| metric.name == name)?;
    Some((metric, ticks.parse().ok()?))
}
