//! What the log of a healthy guest never holds.

const ALARMS: [&str; 22] = [
    "warning:",
    "bug:",
    "oops",
    "call trace",
    "stall",
    "unstable",
    "hung",
    "lockup",
    "panic",
    "firmware bug",
    "acpi error",
    "acpi exception",
    "acpi bios error",
    "unchecked msr",
    "not responding",
    "failed to come online",
    "time went backwards",
    "tsc warp",
    "spurious",
    "no irq handler",
    "nobody cared",
    "general protection",
];

/// Lines with an alarm's word in them that are harmless.
fn is_harmless(line: &str) -> bool {
    // The command line asks for no wait after a panic.
    line.contains("Command line:") || line.contains("command line:") || line.contains("panic=-1")
}

/// The lines of a Linux guest's log that a healthy guest does not print.
#[must_use]
pub fn alarms(log: &str) -> Vec<&str> {
    let is_alarm = |line: &&str| {
        let lower = line.to_lowercase();
        ALARMS.iter().any(|alarm| lower.contains(alarm)) && !is_harmless(line)
    };
    log.lines().filter(is_alarm).collect()
}
