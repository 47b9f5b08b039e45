//! Reports as tables for people.

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use rack::Size;

use crate::protocol::{Report, VcpuReport};

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(NOTHING).set_header(header);
    table
}

fn print(table: &Table) -> String {
    table
        .lines()
        .map(|line| line.trim().to_owned() + "\n")
        .collect()
}

fn duration(seconds: f64) -> String {
    let seconds = std::time::Duration::from_secs_f64(seconds.max(0.0)).as_secs();
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds}s"),
        (0, minutes, seconds) => format!("{minutes}m{seconds:02}s"),
        (hours, minutes, _) => format!("{hours}h{minutes:02}m"),
    }
}

/// The rack, its VM and its nodes.
pub(crate) fn status(report: &Report) -> String {
    let vm = &report.vm;
    let mut text = format!(
        "rack  {}: {} node(s), {}, up {}\nvm    {}: {} vCPU(s), {} of memory\n",
        report.name,
        report.nodes.len(),
        report.accelerator,
        duration(report.uptime_seconds),
        vm.state,
        vm.vcpus,
        Size(vm.memory_bytes),
    );
    if let Some(reason) = &vm.reason {
        text += &format!("      {reason}\n");
    }
    text + "\n" + &nodes(report)
}

pub(crate) fn nodes(report: &Report) -> String {
    let mut table = table(&["NODE", "STATE", "CORES", "VCPUS", "MEMORY", "PID"]);
    for node in &report.nodes {
        table.add_row([
            node.id.to_string(),
            node.state.clone(),
            node.cores.to_string(),
            node.vcpus.to_string(),
            Size(node.memory_bytes).to_string(),
            node.pid.to_string(),
        ]);
    }
    print(&table)
}

fn percent(part: u64, of: u64) -> String {
    match part.saturating_mul(100).checked_div(of) {
        Some(percent) => format!("{percent}%"),
        None => "-".to_owned(),
    }
}

/// Which node gives which part of the VM's memory; and of how much of it the
/// node has mappings, how much of that by large pages and how much on others.
pub(crate) fn memory(report: &Report) -> String {
    let mut table = table(&["NODE", "FROM", "GIVES", "SHARE", "MAPS", "LARGE", "REMOTE"]);
    let total = report.vm.memory_bytes;
    for node in &report.nodes {
        let mapped = node.counter("memory_mapped_bytes");
        table.add_row([
            node.id.to_string(),
            Size(node.memory_offset_bytes).to_string(),
            Size(node.memory_bytes).to_string(),
            percent(node.memory_bytes, total),
            Size(mapped).to_string(),
            percent(node.counter("memory_mapped_large_bytes"), mapped),
            percent(node.counter("memory_mapped_remote_bytes"), mapped),
        ]);
    }
    print(&table)
}

/// Every vCPU's counters, a column each.
pub(crate) fn vcpus(report: &Report) -> String {
    let mut header = vec!["VCPU".to_owned()];
    header.extend(report.vcpus.iter().map(|vcpu| vcpu.id.to_string()));
    let mut table = Table::new();
    table.load_preset(NOTHING).set_header(header);
    let mut row = |name: &str, value: &dyn Fn(&VcpuReport) -> String| {
        let values = report.vcpus.iter().map(value);
        table.add_row(std::iter::once(name.to_owned()).chain(values));
    };
    row("node", &|vcpu| vcpu.node.to_string());
    row("core", &|vcpu| vcpu.core.to_string());
    let names = report.vcpus.first().map(|vcpu| vcpu.counters.as_slice());
    for (index, (name, _)) in names.unwrap_or_default().iter().enumerate() {
        row(name, &|vcpu| {
            let counter = vcpu.counters.get(index);
            counter.map_or_else(String::new, |(_, value)| value.to_string())
        });
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    print(&table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{NodeReport, VmReport};

    fn report() -> Report {
        Report {
            name: "default".into(),
            accelerator: "tcg".into(),
            pid: 1,
            uptime_seconds: 61.5,
            vm: VmReport {
                state: "running".into(),
                vcpus: 2,
                memory_bytes: 1 << 30,
                reason: None,
            },
            nodes: vec![NodeReport {
                id: 0,
                state: "ready".into(),
                cores: 2,
                vcpus: 2,
                memory_bytes: 1 << 30,
                memory_offset_bytes: 0,
                pid: 4711,
                counters: vec![
                    ("memory_mapped_bytes".into(), 512 << 20),
                    ("memory_mapped_large_bytes".into(), 384 << 20),
                ],
            }],
            vcpus: [10, 20_000]
                .into_iter()
                .zip(0..)
                .map(|(exits, id)| VcpuReport {
                    id,
                    node: 0,
                    core: 0,
                    counters: vec![("exits".into(), exits), ("exit_io".into(), 1)],
                })
                .collect(),
        }
    }

    #[test]
    fn the_status_says_what_is_running() {
        let expected = "rack  default: 1 node(s), tcg, up 1m01s\n\
                        vm    running: 2 vCPU(s), 1G of memory\n\n\
                        NODE  STATE  CORES  VCPUS  MEMORY  PID\n\
                        0     ready  2      2      1G      4711\n";
        assert_eq!(status(&report()), expected);
    }

    #[test]
    fn the_memory_of_a_node_is_given_and_mapped() {
        let expected = "NODE  FROM  GIVES  SHARE  MAPS  LARGE  REMOTE\n\
                        0     0     1G     100%   512M  75%    0%\n";
        assert_eq!(memory(&report()), expected);
        let mut report = report();
        report.nodes[0].counters.clear();
        assert!(memory(&report).contains("0     -      -"), "nothing yet");
    }

    #[test]
    fn counters_stand_in_columns() {
        let text = vcpus(&report());
        assert!(text.lines().any(|line| {
            line.split_whitespace().collect::<Vec<_>>() == ["exits", "10", "20000"]
        }));
    }
}
