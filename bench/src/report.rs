//! Medians, ratios and targets, as a table and as JSON.

use std::collections::BTreeMap;
use std::fs;
use std::iter::once;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use serde::Serialize;
use serde_json::{Value, json};

use crate::console::Outcome;
use crate::metric::{BOOT, METRICS, Metric, Target};
use crate::quiet::QUIET;
use crate::system::{Guest, System};

/// The most exits that a boot should take.
const BOOT_EXITS: u64 = 12_000;
/// The most memory that a node should take for itself.
const NODE_MEMORY: u64 = 32 << 20;

/// The least share of guest memory that should be under large entries.
const LARGE_PAGES: f64 = 0.9;

/// All that was measured.
#[derive(Debug)]
pub(crate) struct Report {
    runs: u32,
    guest: Guest,
    host: Host,
    outcomes: BTreeMap<System, Vec<Outcome>>,
    /// Shares of the processors' time that were idle before the runs.
    idle: Vec<f64>,
    /// Runs without figures.
    failed: BTreeMap<System, u32>,
}

/// The machine that it was measured on.
#[derive(Clone, Debug, Serialize)]
struct Host {
    cpu: String,
    cpus: usize,
    qemu: String,
    unix_time: u64,
}

impl Host {
    fn find() -> Result<Self> {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
        let model = |line: &str| {
            let (name, value) = line.split_once(':')?;
            (name.trim() == "model name").then(|| value.trim().to_owned())
        };
        let version = std::process::Command::new(rack::Programs::find().qemu)
            .arg("--version")
            .output()?;
        let version = String::from_utf8_lossy(&version.stdout).into_owned();
        Ok(Self {
            cpu: cpuinfo.lines().find_map(model).unwrap_or_default(),
            cpus: std::thread::available_parallelism()?.get(),
            qemu: version.lines().next().unwrap_or_default().to_owned(),
            unix_time: SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
        })
    }
}

impl Report {
    pub(crate) fn new(runs: u32, guest: &Guest) -> Result<Self> {
        Ok(Self {
            runs,
            guest: *guest,
            host: Host::find()?,
            outcomes: BTreeMap::new(),
            idle: Vec::new(),
            failed: BTreeMap::new(),
        })
    }

    pub(crate) fn add(&mut self, system: System, outcome: Outcome) {
        self.outcomes.entry(system).or_default().push(outcome);
    }

    /// Takes note of how quiet the host was before a run.
    pub(crate) fn add_idle(&mut self, share: Option<f64>) {
        self.idle.extend(share);
    }

    fn idle(&self) -> Option<f64> {
        median(self.idle.iter().copied())
    }

    /// Takes note of a run that gave no figures.
    pub(crate) fn add_failure(&mut self, system: System) {
        *self.failed.entry(system).or_default() += 1;
    }

    /// Runs without figures, on all systems.
    pub(crate) fn failures(&self) -> u32 {
        self.failed.values().sum()
    }

    fn of(&self, system: System) -> &[Outcome] {
        self.outcomes.get(&system).map_or(&[], Vec::as_slice)
    }

    /// The median in nanoseconds.
    fn figure(&self, metric: &Metric, system: System) -> Option<f64> {
        if metric.needs_exits && system == System::Plain {
            return None;
        }
        median(
            self.of(system)
                .iter()
                .filter_map(|outcome| outcome.values.get(metric.name).copied()),
        )
    }

    fn ratio(&self, metric: &Metric, against: System) -> Option<f64> {
        Some(self.figure(metric, System::Viaduct)? / self.figure(metric, against)?)
    }

    /// Median exits by reason during a measurement.
    fn exits(&self, metric: &Metric) -> Vec<(&'static str, u64)> {
        let counts: Vec<_> = self
            .of(System::Viaduct)
            .iter()
            .filter_map(|outcome| outcome.exits.get(metric.name))
            .collect();
        let Some(first) = counts.first() else {
            return Vec::new();
        };
        let reason = |(name, _): &(&'static str, u64)| {
            let mut values: Vec<u64> = counts
                .iter()
                .filter_map(|exits| exits.iter().find(|(known, _)| known == name))
                .map(|(_, count)| *count)
                .collect();
            values.sort_unstable();
            (*name, values[values.len() / 2])
        };
        first.iter().map(reason).collect()
    }

    fn boot_exits(&self) -> Option<u64> {
        let boot = METRICS.iter().find(|metric| metric.name == BOOT)?;
        let exits = self.exits(boot);
        let (_, count) = exits.iter().find(|(name, _)| *name == "exits")?;
        Some(*count)
    }

    fn node_memory(&self) -> Option<u64> {
        let all = self.of(System::Viaduct).iter();
        all.filter_map(|outcome| outcome.node_memory).max()
    }

    fn large_pages(&self) -> Option<f64> {
        let all = self.of(System::Viaduct).iter();
        median(all.filter_map(|outcome| outcome.large_pages))
    }

    /// The tables.
    pub(crate) fn text(&self) -> String {
        let idle = self.idle().unwrap_or(0.0);
        let warning = if idle < QUIET {
            "The host was not quiet: these figures say little.\n"
        } else {
            ""
        };
        format!(
            "{} vCPUs, {}; medians of {}; on {} × {}, {:.0} % idle before the runs; {}\n{warning}{}\n{}\n",
            self.guest.vcpus,
            self.guest.memory,
            self.runs,
            self.host.cpus,
            self.host.cpu,
            idle * 100.0,
            self.host.qemu,
            self.figures(),
            self.exit_counts(),
        )
    }

    fn figures(&self) -> Table {
        let [viaduct, plain, kvm] = System::ALL.map(System::title);
        let header = [
            "", "unit", viaduct, plain, kvm, "÷ plain", "÷ KVM", "target",
        ];
        let mut table = table(header.map(Into::into));
        for metric in &METRICS {
            let figure = |system| {
                let value = self.figure(metric, system);
                value.map_or_else(String::new, |ns| digits(ns / metric.unit.nanoseconds))
            };
            let ratio = |against| {
                let value = self.ratio(metric, against);
                value.map_or_else(String::new, |ratio| format!("{ratio:.2}"))
            };
            let targets = metric.targets.iter();
            let targets: Vec<String> = targets.map(|target| self.target(metric, target)).collect();
            table.add_row([
                metric.title.to_owned(),
                metric.unit.name.to_owned(),
                figure(System::Viaduct),
                figure(System::Plain),
                figure(System::Kvm),
                ratio(System::Plain),
                ratio(System::Kvm),
                targets.join("  "),
            ]);
        }
        let mut own = |title: &str, unit: &str, value: Option<String>, target: String| {
            let value = value.unwrap_or_default();
            let none = String::new;
            table.add_row([
                title.to_owned(),
                unit.to_owned(),
                value,
                none(),
                none(),
                none(),
                none(),
                target,
            ]);
        };
        let exits = self.boot_exits();
        own(
            "exits until init",
            "",
            exits.map(|count| count.to_string()),
            format!(
                "{} ≤ {BOOT_EXITS}",
                mark(exits.map(|count| count <= BOOT_EXITS))
            ),
        );
        let memory = self.node_memory();
        own(
            "the node's own memory",
            "MiB",
            memory.map(|bytes| (bytes >> 20).to_string()),
            format!(
                "{} ≤ {}",
                mark(memory.map(|bytes| bytes <= NODE_MEMORY)),
                NODE_MEMORY >> 20
            ),
        );
        let large = self.large_pages();
        own(
            "guest memory under 2 MiB entries",
            "%",
            large.map(|share| digits(share * 100.0)),
            format!(
                "{} ≥ {:.0}",
                mark(large.map(|share| share >= LARGE_PAGES)),
                LARGE_PAGES * 100.0
            ),
        );
        table
    }

    fn target(&self, metric: &Metric, target: &Target) -> String {
        let met = self
            .ratio(metric, target.against)
            .map(|ratio| ratio <= target.ratio);
        let against = match target.against {
            System::Viaduct => "itself",
            System::Plain => "plain",
            System::Kvm => "KVM",
        };
        format!("{} ≤ {} {against}", mark(met), target.ratio)
    }

    /// What Viaduct counted, without what it never did.
    fn exit_counts(&self) -> Table {
        let rows: Vec<_> = METRICS
            .iter()
            .map(|metric| (metric.title, self.exits(metric)))
            .filter(|(_, counts)| !counts.is_empty())
            .collect();
        let mut names: Vec<&str> = Vec::new();
        for (name, count) in rows.iter().flat_map(|(_, counts)| counts) {
            if *count > 0 && !names.contains(name) {
                names.push(name);
            }
        }
        let short = |name: &&str| name.trim_start_matches("exit_").replace('_', " ");
        let mut table = table(once("during".to_owned()).chain(names.iter().map(short)));
        for (title, counts) in &rows {
            let count = |name: &&str| {
                let found = counts.iter().find(|(known, _)| known == name);
                found.map_or_else(String::new, |(_, count)| count.to_string())
            };
            table.add_row(once((*title).to_owned()).chain(names.iter().map(count)));
        }
        table
    }

    /// Everything, also the single runs.
    pub(crate) fn to_json(&self) -> Value {
        let metrics: Vec<Value> = METRICS
            .iter()
            .map(|metric| {
                let systems: BTreeMap<System, Value> = System::ALL
                    .into_iter()
                    .filter(|system| self.figure(metric, *system).is_some())
                    .map(|system| (system, self.system_json(metric, system)))
                    .collect();
                let exits: BTreeMap<_, _> = self.exits(metric).into_iter().collect();
                json!({
                    "name": metric.name,
                    "title": metric.title,
                    "systems": systems,
                    "ratio_to_plain": self.ratio(metric, System::Plain),
                    "ratio_to_kvm": self.ratio(metric, System::Kvm),
                    "targets": metric.targets.iter().map(|target| json!({
                        "against": target.against,
                        "ratio_at_most": target.ratio,
                        "met": self.ratio(metric, target.against).map(|ratio| ratio <= target.ratio),
                    })).collect::<Vec<_>>(),
                    "viaduct_counts": exits,
                })
            })
            .collect();
        json!({
            "runs": self.runs,
            "failed_runs": self.failed,
            "guest": { "vcpus": self.guest.vcpus, "memory_bytes": self.guest.memory.0 },
            "host": self.host,
            "host_idle_before_runs": self.idle,
            "metrics": metrics,
            "boot_exits": { "count": self.boot_exits(), "at_most": BOOT_EXITS },
            "node_memory": { "bytes": self.node_memory(), "at_most": NODE_MEMORY },
            "large_pages": { "share": self.large_pages(), "at_least": LARGE_PAGES },
        })
    }

    fn system_json(&self, metric: &Metric, system: System) -> Value {
        let runs: Vec<f64> = self
            .of(system)
            .iter()
            .filter_map(|outcome| outcome.values.get(metric.name).copied())
            .collect();
        json!({ "median_ns": self.figure(metric, system), "runs_ns": runs })
    }
}

fn table(header: impl IntoIterator<Item = String>) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_FULL_CONDENSED).set_header(header);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn mark(met: Option<bool>) -> char {
    match met {
        Some(true) => '✓',
        Some(false) => '✗',
        None => '?',
    }
}

/// Three digits that count.
fn digits(value: f64) -> String {
    match value {
        v if v < 10.0 => format!("{v:.2}"),
        v if v < 100.0 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

/// The middle value, or the mean of the two in the middle.
fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let upper = values.get(values.len() / 2)?;
    let lower = values.get(values.len().saturating_sub(1) / 2)?;
    Some(f64::midpoint(*lower, *upper))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        let bits = |values: &[f64]| median(values.iter().copied()).map(f64::to_bits);
        assert_eq!(bits(&[]), None);
        assert_eq!(bits(&[3.0, 1.0, 9.0]), Some(3_f64.to_bits()));
        assert_eq!(bits(&[4.0, 1.0, 2.0, 9.0]), Some(3_f64.to_bits()));
    }
}
