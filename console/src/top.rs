//! `top`: a rack at a glance, live.
//!
//! What is shown is a function of two reports, the last and the one before;
//! everything fits 24 lines of 80 characters for a rack of eight nodes.

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
use crate::protocol::{NodeReport, Report, VcpuReport};
use crate::tables::{Amount, ClusterReport};
use crate::{client, signals};

/// How often the rack is asked.
const PERIOD: Duration = Duration::from_millis(500);
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
    // Before the screen is taken: what is wrong is said on a plain line.
    let first = client::status(name)?;
    let mut view = View::new(first);
    let mut terminal = ratatui::try_init().context("top needs a terminal")?;
    signals::at_end(ratatui::restore);
    let outcome = watch(&mut terminal, &mut view, || client::status(name));
    ratatui::restore();
    outcome.map(|()| 0)
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

    fn draw(&self, frame: &mut Frame<'_>) {
        let nodes = u16::try_from(self.last.nodes.len()).unwrap_or(u16::MAX);
        let data = self.data_nodes().count();
        let matrix = u16::try_from(data).unwrap_or(u16::MAX);
        let heights = [2, nodes + 2, 3, matrix + 2, 3].map(Constraint::Length);
        let rest = [Constraint::Min(0), Constraint::Length(1)];
        let parts: [Rect; 7] =
            Layout::vertical(heights.into_iter().chain(rest)).areas(frame.area());
        frame.render_widget(Paragraph::new(self.head()), parts[0]);
        frame.render_widget(self.nodes(), parts[1]);
        frame.render_widget(Paragraph::new(self.homes(parts[2].width)), parts[2]);
        frame.render_widget(self.matrix(), parts[3]);
        frame.render_widget(Paragraph::new(self.slices(parts[4].width)), parts[4]);
        frame.render_widget(Paragraph::new(self.jobs()), parts[5]);
        frame.render_widget(Paragraph::new("q quits".dim()), parts[6]);
    }

    fn head(&self) -> Vec<Line<'static>> {
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

    /// Each vCPU in its node's colour.
    fn homes(&self, width: u16) -> Vec<Line<'static>> {
        let mut spans = Vec::new();
        let mut room = usize::from(width);
        for vcpu in &self.last.vcpus {
            let text = format!("{}:{} ", vcpu.id, vcpu.node);
            if text.len() > room {
                break;
            }
            room -= text.len();
            spans.push(Span::styled(text, colour(vcpu.node)));
        }
        vec![Line::from("VCPU:NODE".bold()), Line::from(spans)]
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
    /// what came later, in the colours of the nodes that give it.
    fn slices(&self, width: u16) -> Vec<Line<'static>> {
        let runs = &self.last.memory;
        let total: u64 = runs.iter().map(|run| run.bytes).sum();
        let cells = |bytes: u64| bytes * u64::from(width) / total.max(1);
        let mut start = 0;
        let spans = runs.iter().map(|run| {
            let count = cells(start + run.bytes) - cells(start);
            start += run.bytes;
            let node = run.node;
            let digit = char::from_digit(u32::from(node % 10), 10).unwrap_or('?');
            let text = digit
                .to_string()
                .repeat(usize::try_from(count).unwrap_or(0));
            Span::styled(text, colour(node))
        });
        vec![
            Line::from("SLICES BY NODE".bold()),
            Line::from(spans.collect::<Vec<_>>()),
        ]
    }

    fn jobs(&self) -> Vec<Line<'static>> {
        let jobs = self.last.cluster.iter().flat_map(|cluster| &cluster.jobs);
        let rows = jobs.rev().map(|job| {
            let why = job.reason.as_deref().unwrap_or("");
            let (id, state, done, steps) = (job.id, &job.state, job.done, job.steps);
            let text = format!("{id:<5}{state:<14}{done}/{steps:<5} {}  {why}", job.wish);
            Line::from(match job.ended {
                true => text.dim(),
                false => text.bold(),
            })
        });
        std::iter::once(Line::from("JOBS".bold()))
            .chain(rows)
            .collect()
    }
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
