//! What the vCPUs are doing, for the line that says why a guest was given up.

use std::thread;
use std::time::Duration;

use rack::{Rack, VcpuCounters};

/// How long it is looked at.
const WINDOW: Duration = Duration::from_millis(500);

/// Each vCPU's last RIP and its exits within half a second, in one line.
pub(crate) fn vcpus(rack: &Rack) -> String {
    let before = rack.counters();
    thread::sleep(WINDOW);
    let after = rack.counters();
    let all: Vec<String> = before.iter().zip(&after).map(vcpu).collect();
    all.join("; ")
}

fn vcpu((then, now): (&VcpuCounters, &VcpuCounters)) -> String {
    let place = format!("vCPU {} was at {:#x}", now.id.0, now.rip);
    let counts = then.values.iter().zip(&now.values);
    let recent: Vec<String> = counts
        .map(|((name, before), (_, after))| (name, after.saturating_sub(*before)))
        .filter(|(_, more)| *more > 0)
        .map(|(name, more)| format!("{more} {name}"))
        .collect();
    match recent.is_empty() {
        true => format!("{place} and makes no exits"),
        false => format!("{place} with {} in 500 ms", recent.join(", ")),
    }
}
