//! Reports as tables for people.

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use rack::Size;

use crate::protocol::{Report, VmReport};
use crate::tables::{Amount, ClusterReport, JobReport, PlanReport};

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
        "rack  {}: {} node(s), {}, up {}\nvm    {}: {}, {}\n",
        report.name,
        report.nodes.len(),
        report.accelerator,
        duration(report.uptime_seconds),
        vm.state,
        vcpu_numbers(vm),
        memory_numbers(vm),
    );
    if let Some(reason) = &vm.reason {
        text += &format!("      {reason}\n");
    }
    if let Some(cluster) = &report.cluster {
        text += &decided(cluster);
    }
    text + "\n" + &nodes(report)
}

/// Who decides; what is wished, given and used; and what is being done.
fn decided(cluster: &ClusterReport) -> String {
    let mut text = match cluster.controller {
        Some(node) => format!("rule  by node {node}, term {}\n", cluster.term),
        None => "rule  by nobody: the VM keeps its shape\n".to_owned(),
    };
    if let Some(vm) = &cluster.vm {
        let mut table = table(&["VM", "DESIRED", "GRANTED", "SEEN"]);
        let amounts = [&vm.desired, &vm.granted, &vm.seen];
        let row = |name: &str, value: &dyn Fn(&Amount) -> String| {
            let values = amounts.iter().map(|amount| value(amount));
            std::iter::once(name.to_owned())
                .chain(values)
                .collect::<Vec<_>>()
        };
        table.add_row(row("vcpus", &|amount| amount.vcpus.to_string()));
        table.add_row(row("memory", &|amount| {
            Size(amount.memory_bytes).to_string()
        }));
        text += "\n";
        text += &print(&table);
    }
    let going_on: Vec<_> = cluster.jobs.iter().filter(|job| !job.ended).collect();
    if !going_on.is_empty() {
        text += "\n";
        text += &jobs(going_on);
    }
    text
}

/// Why a job is not as asked, or what it waits for.
pub(crate) fn why(job: &JobReport) -> String {
    let waits = job
        .waits_for
        .as_ref()
        .map(|what| format!("waits for {what}"));
    let both = job.reason.clone().into_iter().chain(waits);
    both.collect::<Vec<_>>().join("; ")
}

pub(crate) fn jobs<'a>(jobs: impl IntoIterator<Item = &'a JobReport>) -> String {
    let mut table = table(&["JOB", "STATE", "STEP", "WISH", "WHY"]);
    for job in jobs {
        table.add_row([
            job.id.to_string(),
            job.state.clone(),
            format!("{}/{}", job.done, job.steps),
            job.wish.clone(),
            why(job),
        ]);
    }
    print(&table)
}

/// A plan, what it takes and why it is as it is.
pub(crate) fn plan(plan: &PlanReport) -> String {
    if let Some(conflict) = &plan.conflict {
        return format!("{conflict}\n");
    }
    let mut text = String::new();
    for step in &plan.steps {
        text += &format!("{step}\n");
    }
    if plan.is_empty() {
        text += "nothing to do\n";
    }
    text += &format!(
        "cost  {}, {} at least; +{} -{} vCPUs, {} moved; +{} -{} of memory, {} moved\n",
        plan.cost,
        plan.bound,
        plan.vcpus_added,
        plan.vcpus_removed,
        plan.vcpus_moved,
        Size(plan.memory_added_bytes),
        Size(plan.memory_removed_bytes),
        Size(plan.memory_moved_bytes),
    );
    for line in &plan.explanation {
        text += &format!("{line}\n");
    }
    text
}

/// How many vCPUs; if the sides disagree, what each says.
fn vcpu_numbers(vm: &VmReport) -> String {
    let all = [vm.vcpus_granted, vm.vcpus_seen];
    match all.iter().all(|number| *number == vm.vcpus) {
        true => format!("{} vCPU(s)", vm.vcpus),
        false => format!(
            "{} vCPU(s) wanted, {} granted, {} seen by the guest",
            vm.vcpus, vm.vcpus_granted, vm.vcpus_seen
        ),
    }
}

/// How much memory; if the sides disagree, what each says.
fn memory_numbers(vm: &VmReport) -> String {
    let all = [vm.memory_granted_bytes, vm.memory_seen_bytes];
    let desired = Size(vm.memory_bytes);
    match all.iter().all(|bytes| *bytes == vm.memory_bytes) {
        true => format!("{desired} of memory"),
        false => format!(
            "{desired} of memory wanted, {} granted, {} seen by the guest",
            Size(vm.memory_granted_bytes),
            Size(vm.memory_seen_bytes)
        ),
    }
}

pub(crate) fn nodes(report: &Report) -> String {
    let mut table = table(&["NODE", "ROLE", "STATE", "CORES", "VCPUS", "MEMORY", "PID"]);
    let rows = report.cluster.iter().flat_map(|cluster| &cluster.nodes);
    let cordoned: Vec<u16> = rows.filter(|row| row.cordoned).map(|row| row.id).collect();
    for node in &report.nodes {
        let mut left = report.cluster.iter().flat_map(|cluster| &cluster.left);
        let state = match cordoned.contains(&node.id) {
            true => format!("{}, cordoned", node.state),
            false if left.any(|id| *id == node.id) => format!("{}, has left", node.state),
            false => node.state.clone(),
        };
        table.add_row([
            node.id.to_string(),
            node.role.clone(),
            state,
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

/// What of the VM's memory the guest takes to be near a node: what it was
/// started with and where that begins, what has come since, and what it uses of
/// both; how much of it other nodes give now. What the node gives now, and what
/// could still come from it; and of how much it has mappings, how much of that
/// by large pages and how much on others.
pub(crate) fn memory(report: &Report) -> String {
    let mut table = table(&[
        "NODE", "FROM", "HOME", "ADDED", "SEEN", "AWAY", "GIVES", "FREE", "SHARE", "MAPS", "LARGE",
        "REMOTE",
    ]);
    let total = report.vm.memory_granted_bytes;
    for node in &report.nodes {
        let mapped = node.counter("memory_mapped_bytes");
        table.add_row([
            node.id.to_string(),
            Size(node.memory_offset_bytes).to_string(),
            Size(node.memory_home_bytes).to_string(),
            Size(node.memory_added_bytes).to_string(),
            Size(node.memory_home_bytes + node.memory_added_seen_bytes).to_string(),
            Size(node.memory_away_bytes).to_string(),
            Size(node.memory_bytes).to_string(),
            Size(node.memory_free_bytes).to_string(),
            percent(node.memory_bytes, total),
            Size(mapped).to_string(),
            percent(node.counter("memory_mapped_large_bytes"), mapped),
            percent(node.counter("memory_mapped_remote_bytes"), mapped),
        ]);
    }
    let counters = columns(
        "NODE",
        report.nodes.iter().map(|node| {
            let first = [
                ("state".to_owned(), node.state.clone()),
                (
                    "taken_over_bytes".to_owned(),
                    node.memory_taken_bytes.to_string(),
                ),
                ("copying_us".to_owned(), node.memory_copying_us.to_string()),
                (
                    "out_of_reach_us".to_owned(),
                    node.memory_longest_us.to_string(),
                ),
            ];
            (node.id, with_counters(first, &node.counters))
        }),
    );
    let metadata = report.vm.metadata_bytes;
    let hundredths = metadata.saturating_mul(10_000) / total.max(1);
    let overhead = format!(
        "shared metadata: {} KiB, {}.{:02}% of the VM's memory\n",
        metadata / 1024,
        hundredths / 100,
        hundredths % 100,
    );
    [print(&table), overhead, counters].join("\n")
}

/// Where each vCPU runs and what it has counted; and interrupts from node to
/// node, if there are several.
pub(crate) fn vcpus(report: &Report) -> String {
    let mut text = columns(
        "VCPU",
        report.vcpus.iter().map(|vcpu| {
            let place = [
                ("node".to_owned(), vcpu.node.to_string()),
                ("core".to_owned(), vcpu.core.to_string()),
                ("state".to_owned(), vcpu.state.clone()),
                ("moves".to_owned(), vcpu.moves.to_string()),
                ("blackout_us".to_owned(), vcpu.blackout_us.to_string()),
            ];
            (vcpu.id, with_counters(place, &vcpu.counters))
        }),
    );
    if report.nodes.len() > 1 {
        text += "\n";
        text += &columns(
            "IPIS FROM",
            report.nodes.iter().map(|node| {
                let to = node.ipis_to.iter().zip(0..);
                let rows = to.map(|(count, to)| (format!("to {to}"), count.to_string()));
                (node.id, rows.collect())
            }),
        );
    }
    text
}

fn with_counters(
    first: impl IntoIterator<Item = (String, String)>,
    counters: &[(String, u64)],
) -> Vec<(String, String)> {
    let counters = counters
        .iter()
        .map(|(name, value)| (name.clone(), value.to_string()));
    first.into_iter().chain(counters).collect()
}

/// A column for each of some things that have the same rows.
fn columns(
    title: &str,
    things: impl Iterator<Item = (u16, Vec<(String, String)>)> + Clone,
) -> String {
    let mut header = vec![title.to_owned()];
    header.extend(things.clone().map(|(id, _)| id.to_string()));
    let mut table = Table::new();
    table.load_preset(NOTHING).set_header(header);
    let names = things
        .clone()
        .next()
        .map_or_else(Vec::new, |(_, rows)| rows);
    for (index, (name, _)) in names.iter().enumerate() {
        let values = things.clone().map(|(_, rows)| {
            let value = rows.get(index);
            value.map_or_else(String::new, |(_, value)| value.clone())
        });
        table.add_row(std::iter::once(name.clone()).chain(values));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    print(&table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{NodeReport, VcpuReport};

    fn report() -> Report {
        Report {
            name: "default".into(),
            accelerator: "tcg".into(),
            pid: 1,
            uptime_seconds: 61.5,
            vm: VmReport {
                state: "running".into(),
                vcpus: 2,
                vcpus_granted: 2,
                vcpus_seen: 2,
                vcpus_max: 2,
                memory_bytes: 1 << 30,
                metadata_bytes: 4 << 20,
                memory_granted_bytes: 1 << 30,
                memory_seen_bytes: 1 << 30,
                memory_max_bytes: 2 << 30,
                reason: None,
            },
            cluster: None,
            nodes: vec![NodeReport {
                id: 0,
                role: "data".into(),
                replica: None,
                state: "ready".into(),
                cores: 2,
                vcpus: 2,
                memory_bytes: 768 << 20,
                memory_home_bytes: 1 << 30,
                memory_offset_bytes: 0,
                memory_away_bytes: 256 << 20,
                memory_added_bytes: 0,
                memory_added_seen_bytes: 0,
                memory_free_bytes: 1 << 30,
                memory_room_bytes: 1 << 30,
                memory_taken_bytes: 0,
                memory_copying_us: 0,
                memory_longest_us: 0,
                pid: 4711,
                counters: vec![
                    ("memory_mapped_bytes".into(), 512 << 20),
                    ("memory_mapped_large_bytes".into(), 384 << 20),
                ],
                ipis_to: vec![7],
            }],
            memory: Vec::new(),
            vcpus: [10, 20_000]
                .into_iter()
                .zip(0..)
                .map(|(exits, id)| VcpuReport {
                    id,
                    node: 0,
                    core: 0,
                    state: "started".into(),
                    moves: 0,
                    blackout_us: 0,
                    counters: vec![("exits".into(), exits), ("exit_io".into(), 1)],
                })
                .collect(),
        }
    }

    #[test]
    fn the_status_says_what_is_running() {
        let expected = "rack  default: 1 node(s), tcg, up 1m01s\n\
                        vm    running: 2 vCPU(s), 1G of memory\n\n\
                        NODE  ROLE  STATE  CORES  VCPUS  MEMORY  PID\n\
                        0     data  ready  2      2      768M    4711\n";
        assert_eq!(status(&report()), expected);
    }

    #[test]
    fn the_status_says_if_the_sides_disagree() {
        let mut report = report();
        report.vm.vcpus_granted = 1;
        report.vm.vcpus_seen = 1;
        let text = status(&report);
        assert!(text.contains("2 vCPU(s) wanted, 1 granted, 1 seen by the guest, 1G"));
        report.vm.memory_granted_bytes = 3 << 29;
        let text = status(&report);
        assert!(text.contains("1G of memory wanted, 1536M granted, 1G seen by the guest"));
    }

    #[test]
    fn the_memory_of_a_node_is_given_and_mapped() {
        let expected = "NODE  FROM  HOME  ADDED  SEEN  AWAY  GIVES  FREE  SHARE  MAPS  LARGE  REMOTE\n\
                        0     0     1G    0      1G    256M  768M   1G    75%    512M  75%    0%\n";
        assert!(memory(&report()).starts_with(expected));
        assert!(memory(&report()).contains("memory_mapped_bytes        536870912\n"));
        let overhead = "\nshared metadata: 4096 KiB, 0.39% of the VM's memory\n";
        assert!(memory(&report()).contains(overhead));
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
        assert!(!text.contains("IPIS"), "there is one node");
    }

    #[test]
    fn interrupts_are_shown_from_node_to_node() {
        let mut report = report();
        let mut second = report.nodes[0].clone();
        second.id = 1;
        report.nodes[0].ipis_to = vec![1, 20];
        second.ipis_to = vec![300, 4];
        report.nodes.push(second);
        let expected = "IPIS FROM   0    1\nto 0        1  300\nto 1       20    4\n";
        assert!(vcpus(&report).ends_with(expected), "{}", vcpus(&report));
    }
}
