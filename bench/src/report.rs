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
use crate::metric::{BOOT, COMPUTE, FAULTS, Metric, Target, find};
use crate::quiet::QUIET;
use crate::suite::Suite;
use crate::system::{Guest, System};

/// The most exits that a boot should take.
const BOOT_EXITS: u64 = 12_000;
/// The most memory that a node should take for itself.
const NODE_MEMORY: u64 = 32 << 20;

/// The least share of guest memory that should be under large entries.
const LARGE_PAGES: f64 = 0.9;

/// The least that two threads on two nodes should do in the time of one.
const SPEED_UP: f64 = 1.85;

/// The least that four threads fault on two nodes in the time of one node.
const FAULTS_SPEED_UP: f64 = 1.7;

/// All that was measured.
#[derive(Debug)]
pub(crate) struct Report {
    suite: Suite,
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
    pub(crate) fn new(suite: Suite, runs: u32, guest: &Guest) -> Result<Self> {
        Ok(Self {
            suite,
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
        Some(self.figure(metric, self.suite.subject())? / self.figure(metric, against)?)
    }

    /// Median exits by reason during a measurement.
    fn exits(&self, metric: &Metric) -> Vec<(&'static str, u64)> {
        let counts: Vec<_> = self
            .of(self.suite.subject())
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
        let exits = self.exits(find(BOOT)?);
        let (_, count) = exits.iter().find(|(name, _)| *name == "exits")?;
        Some(*count)
    }

    fn node_memory(&self) -> Option<u64> {
        let all = self.of(self.suite.subject()).iter();
        all.filter_map(|outcome| outcome.node_memory).max()
    }

    fn large_pages(&self) -> Option<f64> {
        let all = self.of(self.suite.subject()).iter();
        median(all.filter_map(|outcome| outcome.large_pages))
    }

    /// How often the first metric's time the second's is, for as much work.
    fn speed_up(&self, metrics: [&str; 2]) -> Option<f64> {
        let [one, two] = metrics.map(|name| self.figure(find(name)?, self.suite.subject()));
        Some(one? / two?)
    }

    /// What two threads do in the time in which one does its work.
    fn compute_speed_up(&self) -> OwnFigure {
        let factor = self.speed_up(COMPUTE).map(|factor| 2.0 * factor);
        OwnFigure::factor("two threads on two nodes against one", factor, SPEED_UP)
    }

    /// The tables.
    pub(crate) fn text(&self) -> String {
        let idle = self.idle().unwrap_or(0.0);
        let warning = if idle < QUIET {
            "The host was not quiet: these figures say little.\n"
        } else {
            ""
        };
        let exits = self
            .exit_counts()
            .map_or_else(String::new, |table| format!("{table}\n"));
        format!(
            "{} vCPUs, {}; medians of {}; on {} × {}, {:.0} % idle before the runs; {}\n{warning}{}\n{exits}",
            self.guest.vcpus,
            self.guest.memory,
            self.runs,
            self.host.cpus,
            self.host.cpu,
            idle * 100.0,
            self.host.qemu,
            self.figures(),
        )
    }

    fn figures(&self) -> Table {
        let systems = self.suite.systems();
        let others = &systems[1..];
        let mut header = vec![String::new(), "unit".to_owned()];
        header.extend(systems.iter().map(|system| system.title().to_owned()));
        header.extend(others.iter().map(|other| format!("÷ {}", other.short())));
        header.push("target".to_owned());
        let columns = header.len();
        let mut table = table(header);
        for metric in self.suite.metrics() {
            let mut row = vec![metric.title.to_owned(), metric.unit.name.to_owned()];
            row.extend(systems.iter().map(|system| {
                let value = self.figure(metric, *system);
                value.map_or_else(String::new, |ns| digits(ns / metric.unit.nanoseconds))
            }));
            row.extend(others.iter().map(|other| {
                let value = self.ratio(metric, *other);
                value.map_or_else(String::new, |ratio| format!("{ratio:.2}"))
            }));
            let targets = metric.targets.iter();
            let targets: Vec<String> = targets.map(|target| self.target(metric, target)).collect();
            row.push(targets.join("  "));
            table.add_row(row);
        }
        for own in self.own_figures() {
            let mut row = vec![own.title.to_owned(), own.unit.to_owned()];
            row.push(own.value.unwrap_or_default());
            row.resize(columns - 1, String::new());
            row.push(format!("{} {}", mark(own.met), own.target));
            table.add_row(row);
        }
        table
    }

    /// What only the system that is judged has.
    fn own_figures(&self) -> Vec<OwnFigure> {
        match self.suite {
            Suite::Hypervisors => {
                let exits = self.boot_exits();
                let memory = self.node_memory();
                let large = self.large_pages();
                vec![
                    OwnFigure {
                        title: "exits until init",
                        unit: "",
                        value: exits.map(|count| count.to_string()),
                        met: exits.map(|count| count <= BOOT_EXITS),
                        target: format!("≤ {BOOT_EXITS}"),
                    },
                    OwnFigure {
                        title: "the node's own memory",
                        unit: "MiB",
                        value: memory.map(|bytes| (bytes >> 20).to_string()),
                        met: memory.map(|bytes| bytes <= NODE_MEMORY),
                        target: format!("≤ {}", NODE_MEMORY >> 20),
                    },
                    OwnFigure {
                        title: "guest memory under 2 MiB entries",
                        unit: "%",
                        value: large.map(|share| digits(share * 100.0)),
                        met: large.map(|share| share >= LARGE_PAGES),
                        target: format!("≥ {:.0}", LARGE_PAGES * 100.0),
                    },
                ]
            }
            Suite::Vmexit => Vec::new(),
            Suite::Span => vec![self.compute_speed_up()],
            Suite::Pv => vec![
                self.compute_speed_up(),
                OwnFigure::factor(
                    "page faults on two nodes against one",
                    self.speed_up(FAULTS),
                    FAULTS_SPEED_UP,
                ),
            ],
        }
    }

    fn target(&self, metric: &Metric, target: &Target) -> String {
        let met = self
            .ratio(metric, target.against)
            .map(|ratio| ratio <= target.ratio);
        let ratio = (target.ratio * 100.0).round() / 100.0;
        format!("{} ≤ {ratio} {}", mark(met), target.against.short())
    }

    /// What the hypervisor counted, without what it never did; nothing if the
    /// guest doesn't say what it measures when.
    fn exit_counts(&self) -> Option<Table> {
        let rows: Vec<_> = self
            .suite
            .metrics()
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
        (!rows.is_empty()).then_some(table)
    }

    /// Everything, also the single runs.
    pub(crate) fn to_json(&self) -> Value {
        let systems = self.suite.systems();
        let metrics: Vec<Value> = self
            .suite
            .metrics()
            .iter()
            .map(|metric| {
                let figures: BTreeMap<System, Value> = systems
                    .iter()
                    .filter(|system| self.figure(metric, **system).is_some())
                    .map(|system| (*system, self.system_json(metric, *system)))
                    .collect();
                let ratios: BTreeMap<System, Option<f64>> = systems[1..]
                    .iter()
                    .map(|other| (*other, self.ratio(metric, *other)))
                    .collect();
                let exits: BTreeMap<_, _> = self.exits(metric).into_iter().collect();
                json!({
                    "name": metric.name,
                    "title": metric.title,
                    "systems": figures,
                    "ratio_to": ratios,
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
            "suite": self.suite.name(),
            "runs": self.runs,
            "failed_runs": self.failed,
            "guest": { "vcpus": self.guest.vcpus, "memory_bytes": self.guest.memory.0 },
            "host": self.host,
            "host_idle_before_runs": self.idle,
            "metrics": metrics,
            "own": self.own_figures(),
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

/// A figure that the other systems don't have, and whether it is good enough.
#[derive(Debug, Serialize)]
struct OwnFigure {
    title: &'static str,
    unit: &'static str,
    value: Option<String>,
    met: Option<bool>,
    target: String,
}

impl OwnFigure {
    /// A factor that should be so large at least.
    fn factor(title: &'static str, factor: Option<f64>, least: f64) -> Self {
        Self {
            title,
            unit: "×",
            value: factor.map(digits),
            met: factor.map(|factor| factor >= least),
            target: format!("≥ {least}"),
        }
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
