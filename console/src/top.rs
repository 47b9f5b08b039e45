//! `top`: a rack at a glance, live.
//!
//! What is shown is a function of two reports, the last and the one before;
//! everything fits 24 lines of 80 characters for a rack of eight nodes and one
//! that decides. On smaller screens the most important parts are shown.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rack::Size;
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, Row, Table};

use crate::cli::TopArgs;
use crate::protocol::{NodeReport, Report, RunReport, VcpuReport};
use crate::stdio::print;
use crate::tables::{Amount, ClusterReport, JobReport};
use crate::{client, show, signals};

/// How often the rack is asked.
const PERIOD: Duration = Duration::from_millis(500);
/// Columns of the labels at the left.
const LABEL: usize = 7;
/// Most lines of the map of slices.
const SLICE_LINES: u16 = 4;
/// Colours by which nodes are told apart.
const COLOURS: [Color; 8] = [
    Color::Cyan,
    Color::Yellow,
    Color::Green,
    Color::Magenta,
    Color::Blue,
    Color::Red,
    Color::LightCyan,
    Color::LightYellow,
];

pub(crate) fn top(args: &TopArgs) -> Result<u8> {
    let name = &args.target.name;
    if args.json {
        return lines(args.count, || client::status(name));
    }
    // Before the screen is taken: what is wrong is said on a plain line.
    let first = client::status(name)?;
    let mut view = View::new(first);
    let mut terminal = ratatui::try_init().context("top needs a terminal")?;
    signals::at_end(ratatui::restore);
    let outcome = watch(&mut terminal, &mut view, || client::status(name));
    ratatui::restore();
    outcome.map(|()| 0)
}

/// What `--json` would print of a rack that stands still.
#[cfg(test)]
pub(crate) fn json(report: Report) -> serde_json::Result<serde_json::Value> {
    View::new(report).json()
}

/// A line of JSON for each period.
fn lines(count: Option<u64>, ask: impl Fn() -> Result<Report>) -> Result<u8> {
    let mut view = View::new(ask()?);
    let mut printed = 0;
    while count.is_none_or(|count| printed < count) {
        std::thread::sleep(PERIOD);
        view.update(ask()?);
        let line = view.json().context("cannot write JSON")?;
        print(&format!("{line}\n"))?;
        printed += 1;
    }
    Ok(0)
}

fn watch(
    terminal: &mut ratatui::DefaultTerminal,
    view: &mut View,
    ask: impl Fn() -> Result<Report>,
) -> Result<()> {
    let mut next = Instant::now() + PERIOD;
    loop {
        terminal
            .draw(|frame| view.draw(frame))
            .context("cannot draw")?;
        let left = next.saturating_duration_since(Instant::now());
        if event::poll(left).context("cannot read the keyboard")? {
            if is_end(&event::read().context("cannot read the keyboard")?) {
                return Ok(());
            }
        } else {
            view.update(ask()?);
            next = Instant::now() + PERIOD;
        }
    }
}

/// q, Escape or Ctrl-C.
fn is_end(event: &Event) -> bool {
    let Event::Key(key) = event else { return false };
    let control_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    let leaves = matches!(key.code, KeyCode::Char('q') | KeyCode::Esc);
    key.kind == KeyEventKind::Press && (leaves || control_c)
}

/// The last two reports.
struct View {
    last: Report,
    before: Option<Report>,
}

impl View {
    fn new(first: Report) -> Self {
        Self {
            last: first,
            before: None,
        }
    }

    fn update(&mut self, report: Report) {
        self.before = Some(std::mem::replace(&mut self.last, report));
    }

    /// How much a count has grown in a second.
    fn rate(&self, count: impl Fn(&Report) -> Option<u64>) -> u64 {
        let Some(before) = &self.before else { return 0 };
        let seconds = self.last.uptime_seconds - before.uptime_seconds;
        let grown = count(&self.last)
            .unwrap_or(0)
            .saturating_sub(count(before).unwrap_or(0));
        let millis = Duration::from_secs_f64(seconds.max(0.001)).as_millis();
        u64::try_from(u128::from(grown) * 1000 / millis.max(1)).unwrap_or(u64::MAX)
    }

    fn exits(&self, node: u16) -> u64 {
        self.rate(|report| {
            let here = report.vcpus.iter().filter(|vcpu| vcpu.node == node);
            Some(here.map(exits).sum())
        })
    }

    fn ipis(&self, from: u16, to: u16) -> u64 {
        self.rate(|report| {
            let node = report.nodes.iter().find(|node| node.id == from)?;
            node.ipis_to.get(usize::from(to)).copied()
        })
    }

    /// What there is room for, the most important first; what room is left goes
    /// between the parts, into the map of slices, and to older jobs.
    fn draw(&self, frame: &mut Frame<'_>) {
        let area = frame.area();
        let vcpus = self.homes(area.width);
        let table = |rows: usize| u16::try_from(rows + 1).unwrap_or(u16::MAX);
        // By rank, with the lines that each needs.
        let needs = [
            (Part::Head, 2),
            (Part::Nodes, table(self.last.nodes.len())),
            (Part::Jobs, 1),
            (Part::Slices, 1),
            (Part::Vcpus, 1),
            (Part::Matrix, table(self.data_nodes().count())),
        ];
        let mut left = area.height;
        let mut shown: Vec<(Part, u16)> = Vec::new();
        for (part, lines) in needs {
            // What stands first is shown as far as it goes.
            let lines = match part {
                Part::Head | Part::Nodes => lines.min(left),
                _ if lines > left => continue,
                _ => lines,
            };
            left -= lines;
            shown.push((part, lines));
        }
        shown.sort();
        // A line may hold all runs of memory.
        let runs = self.last.memory.len().div_ceil(room(area.width).max(1));
        let wanted = u16::try_from(runs).map_or(SLICE_LINES, |runs| runs.clamp(1, SLICE_LINES));
        let gaps = u16::try_from(shown.len().saturating_sub(1)).unwrap_or(0);
        let gap = u16::from(left >= gaps);
        left -= gap * gaps;
        for (part, lines) in &mut shown {
            let more = match part {
                Part::Slices => left.min(wanted - 1),
                Part::Jobs => left,
                _ => 0,
            };
            left -= more;
            *lines += more;
        }
        let heights = shown.iter().map(|(_, lines)| Constraint::Length(*lines));
        let places = Layout::vertical(heights).spacing(gap).split(area);
        for ((part, _), place) in shown.iter().zip(places.iter()) {
            match part {
                Part::Head => frame.render_widget(Paragraph::new(self.head(*place)), *place),
                Part::Nodes => frame.render_widget(self.nodes(), *place),
                Part::Vcpus => frame.render_widget(&vcpus, *place),
                Part::Matrix => frame.render_widget(self.matrix(), *place),
                Part::Slices => frame.render_widget(Paragraph::new(self.slices(*place)), *place),
                Part::Jobs => frame.render_widget(Paragraph::new(self.jobs()), *place),
            }
        }
    }

    fn head(&self, place: Rect) -> Vec<Line<'static>> {
        let report = &self.last;
        let rule = match report.cluster.as_ref().map(|cluster| cluster.controller) {
            Some(Some(node)) => format!("node {node} rules"),
            _ => "nobody rules".to_owned(),
        };
        let first = format!(
            "{}  {}  {} nodes  vm {}  {rule}",
            report.name,
            report.accelerator,
            report.nodes.len(),
            report.vm.state,
        );
        let how = "q quits";
        let width = usize::from(place.width);
        let first = match width.checked_sub(how.len() + 1) {
            Some(room) if room >= first.len() => format!("{first:room$} {how}"),
            _ => first,
        };
        let sizes = report.cluster.as_ref().and_then(shape);
        let second = sizes.unwrap_or_else(|| {
            let memory = Size(report.vm.memory_bytes);
            format!("{} vCPUs, {memory}", report.vm.vcpus)
        });
        vec![Line::from(first.bold()), Line::from(second)]
    }

    fn nodes(&self) -> Table<'static> {
        let rows = self.last.nodes.iter().map(|node| {
            let cells = [
                node.id.to_string(),
                node.role.clone(),
                self.state(node),
                format!("{}/{}", node.vcpus, node.cores),
                Size(node.memory_bytes).to_string(),
                Size(node.counter("memory_mapped_bytes")).to_string(),
                self.exits(node.id).to_string(),
            ];
            Row::new(cells).style(colour(node.id))
        });
        let header = ["NODE", "ROLE", "STATE", "VCPUS", "GIVES", "MAPS", "EXITS/s"];
        let widths = [5, 8, 18, 8, 8, 8, 10].map(Constraint::Length);
        Table::new(rows, widths).header(Row::new(header).bold())
    }

    fn state(&self, node: &NodeReport) -> String {
        let rows = self.last.cluster.iter().flat_map(|cluster| &cluster.nodes);
        let mut its = rows.filter(|row| row.id == node.id);
        match its.any(|row| row.cordoned) {
            true => format!("{}, cordoned", node.state),
            false => node.state.clone(),
        }
    }

    /// Each vCPU in its node's colour: its number and its node if there is room
    /// for that, else, in the order of their numbers, the nodes.
    fn homes(&self, width: u16) -> Line<'static> {
        let name = |vcpu: &VcpuReport| format!("{}:{} ", vcpu.id, vcpu.node);
        let names = self.last.vcpus.iter().map(name).map(|name| name.len());
        let is_wide = names.sum::<usize>() <= room(width);
        let mut spans = vec![label("VCPUS")];
        let mut next = 0;
        for vcpu in &self.last.vcpus {
            let text = match is_wide {
                true => name(vcpu),
                false => {
                    let absent = usize::from(vcpu.id.saturating_sub(next));
                    next = vcpu.id.saturating_add(1);
                    ".".repeat(absent) + &digit(vcpu.node).to_string()
                }
            };
            spans.push(Span::styled(text, colour(vcpu.node)));
        }
        Line::from(spans)
    }

    fn data_nodes(&self) -> impl Iterator<Item = &NodeReport> {
        self.last.nodes.iter().filter(|node| node.role == "data")
    }

    /// Interrupts from node to node.
    fn matrix(&self) -> Table<'static> {
        let header = std::iter::once("IPIS/s".to_owned());
        let header = header.chain(self.data_nodes().map(|node| format!("to {}", node.id)));
        let rows = self.data_nodes().map(|from| {
            let counts = self
                .data_nodes()
                .map(|to| self.ipis(from.id, to.id).to_string());
            let cells = std::iter::once(format!("from {}", from.id)).chain(counts);
            Row::new(cells).style(colour(from.id))
        });
        let widths = std::iter::repeat_n(Constraint::Length(8), 1 + self.data_nodes().count());
        Table::new(rows, widths).header(Row::new(header).bold())
    }

    /// The VM's memory from its start to its end, what it booted with and then
    /// what came later: who gives most of each part.
    fn slices(&self, place: Rect) -> Vec<Line<'static>> {
        let cells = usize::from(place.height) * room(place.width);
        let map = cells_by_node(&self.last.memory, cells);
        let lines = map.chunks(room(place.width).max(1)).enumerate();
        lines
            .map(|(index, line)| {
                let first = label(if index == 0 { "SLICES" } else { "" });
                let runs = line.chunk_by(|a, b| a == b).map(|run| {
                    let text = digit(run[0]).to_string().repeat(run.len());
                    Span::styled(text, colour(run[0]))
                });
                Line::from_iter(std::iter::once(first).chain(runs))
            })
            .collect()
    }

    fn jobs(&self) -> Vec<Line<'static>> {
        let jobs = self.last.cluster.iter().flat_map(|cluster| &cluster.jobs);
        let line = |(index, job): (usize, &JobReport)| {
            let (id, state, done, steps) = (job.id, &job.state, job.done, job.steps);
            let why = show::why(job);
            let text = format!("{id:<5}{state:<14}{done}/{steps:<5} {}  {why}", job.wish);
            let text = match job.ended {
                true => text.dim(),
                false => text.bold(),
            };
            Line::from(vec![label(if index == 0 { "JOBS" } else { "" }), text])
        };
        let lines: Vec<_> = jobs.rev().enumerate().map(line).collect();
        match lines.is_empty() {
            true => vec![Line::from(label("JOBS"))],
            false => lines,
        }
    }

    /// What `--json` prints.
    fn json(&self) -> serde_json::Result<serde_json::Value> {
        let ids = || self.last.nodes.iter().map(|node| node.id);
        let exits: Vec<u64> = ids().map(|node| self.exits(node)).collect();
        let ipis = |from| ids().map(|to| self.ipis(from, to)).collect();
        let ipis: Vec<Vec<u64>> = ids().map(ipis).collect();
        Ok(serde_json::json!({
            "status": serde_json::to_value(&self.last)?,
            "exits_per_second": exits,
            "ipis_per_second": ipis,
        }))
    }
}

/// A part of the screen, in the order from top to bottom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Head,
    Nodes,
    Vcpus,
    Matrix,
    Slices,
    Jobs,
}

/// What stands left of a part that has no header.
fn label(text: &'static str) -> Span<'static> {
    Span::from(format!("{text:LABEL$}")).bold()
}

/// Columns right of a label.
fn room(width: u16) -> usize {
    usize::from(width).saturating_sub(LABEL)
}

/// A node in one column.
fn digit(node: u16) -> char {
    char::from_digit(u32::from(node % 36), 36).unwrap_or('?')
}

/// Memory in so many parts of the same size: the node that gives most of each.
fn cells_by_node(runs: &[RunReport], cells: usize) -> Vec<u16> {
    let total: u128 = runs.iter().map(|run| u128::from(run.bytes)).sum();
    let border = |cell: usize| total * cell as u128 / (cells as u128).max(1);
    let mut rest = runs.iter().scan(0, |start: &mut u128, run| {
        let from = *start;
        *start += u128::from(run.bytes);
        Some((from..*start, run.node))
    });
    let mut current = rest.next();
    let mut map = Vec::new();
    if total == 0 {
        return map;
    }
    for cell in 0..cells {
        let (from, to) = (border(cell), border(cell + 1));
        let mut given: BTreeMap<u16, u128> = BTreeMap::new();
        while let Some((range, node)) = &current {
            let part = range.end.min(to).saturating_sub(range.start.max(from));
            *given.entry(*node).or_default() += part;
            if range.end > to {
                break;
            }
            current = rest.next();
        }
        map.extend(given.into_iter().max_by_key(|it| it.1).map(|it| it.0));
    }
    map
}

fn exits(vcpu: &VcpuReport) -> u64 {
    let found = vcpu.counters.iter().find(|(name, _)| name == "exits");
    found.map_or(0, |(_, count)| *count)
}

fn shape(cluster: &ClusterReport) -> Option<String> {
    let vm = cluster.vm.as_ref()?;
    let amount = |amount: &Amount| {
        let memory = Size(amount.memory_bytes);
        format!("{} vCPUs {memory}", amount.vcpus)
    };
    Some(format!(
        "desired {}  granted {}  seen {}",
        amount(&vm.desired),
        amount(&vm.granted),
        amount(&vm.seen)
    ))
}

fn colour(node: u16) -> Style {
    Style::new().fg(COLOURS[usize::from(node) % COLOURS.len()])
}

#[cfg(test)]
mod tests;
