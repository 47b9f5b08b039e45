//! Running the image, and collecting what it says.
//!
//! A case that ends the node or does not end itself is reported as that, and
//! the image is started again behind it.

use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use rack::{
    Accelerator, BootBySpec, BootFiles, Faults, LogSink, NodeEnd, NodeSpec, PlatformSpec, Programs,
    Rack, RackSpec, Size, StartOptions, VmSpec, beside_executable,
};
use vmm_shared::selftest::{Record, Verdict};

use super::Case;
use crate::{progress, signals};

/// What is to be tried, and where.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wishes<'a> {
    pub only: Option<&'a str>,
    pub nodes: u32,
    /// For each case, and for the start.
    pub limit: Duration,
}

/// What came of a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Pass,
    Skip(String),
    Fail { expected: String, seen: String },
}

impl From<Verdict<'_>> for Outcome {
    fn from(verdict: Verdict<'_>) -> Self {
        match verdict {
            Verdict::Pass => Self::Pass,
            Verdict::Skip(why) => Self::Skip(why.into()),
            Verdict::Fail { expected, seen } => Self::Fail {
                expected: expected.into(),
                seen: seen.into(),
            },
        }
    }
}

/// All that the image has said.
#[derive(Clone, Debug, Default)]
pub(super) struct Findings {
    pub facts: Vec<(String, String)>,
    pub cases: Vec<Case>,
    /// From the start to the first case.
    pub to_first_case: Duration,
}

/// How a run of the image went on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// It said all it had to say.
    Complete,
    /// It came to its end in this case.
    Stuck(u32),
}

/// What is known of a run of the image so far.
#[derive(Default)]
struct Reader {
    findings: Findings,
    /// The case that runs, and since when.
    running: Option<(u32, Instant)>,
    complete: bool,
}

impl Reader {
    /// Takes a line of the log in.
    fn read(&mut self, line: &str, now: Instant) {
        match Record::parse(line) {
            Some(Record::Fact { name, value }) => {
                let facts = &mut self.findings.facts;
                // A second start says the same again.
                if facts.iter().all(|(known, _)| known != name) {
                    facts.push((name.into(), value.into()));
                }
            }
            Some(Record::Case {
                number,
                name,
                section,
            }) => {
                self.running = Some((number, now));
                self.findings.cases.push(Case {
                    name: name.into(),
                    section: section.into(),
                    // Until it says something else.
                    outcome: Outcome::Fail {
                        expected: "a verdict".into(),
                        seen: "none".into(),
                    },
                    took: Duration::ZERO,
                });
            }
            Some(Record::Ended { number, verdict }) => {
                if self.running.is_some_and(|(running, _)| running == number) {
                    self.end(verdict.into(), now);
                }
            }
            Some(Record::End) => self.complete = true,
            Some(Record::Plan { .. }) | None => {}
        }
    }

    fn end(&mut self, outcome: Outcome, now: Instant) {
        if let (Some((_, since)), Some(case)) =
            (self.running.take(), self.findings.cases.last_mut())
        {
            case.outcome = outcome;
            case.took = now.saturating_duration_since(since);
        }
    }

    /// The image is gone, or has been ended, for this reason.
    fn cut(&mut self, why: String) -> Option<Progress> {
        if self.complete {
            return Some(Progress::Complete);
        }
        let (number, _) = self.running?;
        let outcome = Outcome::Fail {
            expected: "the case to end".into(),
            seen: why,
        };
        self.end(outcome, Instant::now());
        Some(Progress::Stuck(number))
    }
}

/// Runs the image as often as it takes.
pub(super) fn collect(wishes: &Wishes<'_>) -> Result<Findings> {
    let mut reader = Reader::default();
    let mut first = 0;
    let started = Instant::now();
    loop {
        match once(wishes, first, &mut reader, started)? {
            Progress::Complete => return Ok(reader.findings),
            Progress::Stuck(number) => first = number + 1,
        }
    }
}

fn image() -> Result<PathBuf> {
    let named = std::env::var_os("VIADUCT_SELFTEST").filter(|path| !path.is_empty());
    let path = named.map_or_else(
        || beside_executable("x86_64-unknown-none/release/selftest"),
        PathBuf::from,
    );
    let hint = "build it with scripts/viaduct, or set VIADUCT_SELFTEST to its path";
    rack::boot::check_readable("self-test image", &path, hint)?;
    Ok(path)
}

fn start(wishes: &Wishes<'_>, first: u32, log: LogSink) -> Result<Rack> {
    let image = image()?;
    let mut programs = Programs::find();
    programs.hypervisor.clone_from(&image);
    let node = NodeSpec::data(1, None);
    let vm = VmSpec {
        vcpus: wishes.nodes,
        max_vcpus: wishes.nodes,
        memory: Size::mib(u64::from(wishes.nodes) * 128),
    };
    let only = wishes.only.map(|word| format!(" only={word}"));
    let boot = BootFiles {
        // There is no VM; what a node would load is what it runs.
        kernel: image,
        boot_by: BootBySpec::Image,
        initramfs: None,
        modules: Vec::new(),
        platform: PlatformSpec::Lean,
        image: None,
        command_line: format!("first={first}{}", only.unwrap_or_default()),
    };
    let options = StartOptions {
        name: format!("selftest-{}", std::process::id()),
        programs,
        accelerator: Accelerator::pick()?,
        log: Some(log),
        faults: Faults::from_env()?,
    };
    let rack = Rack::start(&RackSpec::equal(wishes.nodes, node)?, &vm, &boot, options)?;
    Ok(rack)
}

/// Runs the image once, from this case on.
fn once(
    wishes: &Wishes<'_>,
    first: u32,
    reader: &mut Reader,
    started: Instant,
) -> Result<Progress> {
    progress::say("starting the self-test");
    let (sender, lines) = mpsc::channel();
    let log: LogSink = Arc::new(move |node, line| {
        if node.0 == 0 {
            drop(sender.send(line.to_owned()));
        }
    });
    let rack = Arc::new(start(wishes, first, log)?);
    let aborted = Arc::clone(&rack);
    signals::at_end(move || aborted.kill());
    let mut deadline = Instant::now() + wishes.limit;
    let seen = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match lines.recv_timeout(left.min(Duration::from_millis(20))) {
            Ok(line) => {
                let now = Instant::now();
                reader.read(&line, now);
                if reader.findings.cases.len() == 1 && reader.findings.to_first_case.is_zero() {
                    reader.findings.to_first_case = started.elapsed();
                }
                if let Some(case) = reader.findings.cases.last() {
                    progress::say(&case.name);
                }
                deadline = now + wishes.limit;
            }
            // The sender lives as long as the rack.
            Err(_) if reader.complete => break String::new(),
            Err(_) => {
                if let Some(end) = rack.ended() {
                    // All lines of a node come before its end.
                    lines
                        .try_iter()
                        .for_each(|line| reader.read(&line, Instant::now()));
                    break format!("the node {}", end.how.what());
                }
                if left.is_zero() {
                    break format!("nothing for {} s", wishes.limit.as_secs());
                }
            }
        }
    };
    let end = rack.ended();
    rack.stop(Duration::from_secs(5));
    let said = rack.log(vmm_shared::addr::NodeId(0));
    match reader.cut(seen.clone()) {
        Some(progress) => Ok(progress),
        None => {
            let last = said.last().map_or("it said nothing", |line| line.as_str());
            match end.map(|end| end.how) {
                Some(NodeEnd::BootFailure) => bail!("the self-test could not start: {last}"),
                _ => bail!(
                    "the self-test did not get to its first case: {seen}; it last said: {last}"
                ),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[&str]) -> Reader {
        let mut reader = Reader::default();
        for line in lines {
            reader.read(line, Instant::now());
        }
        reader
    }

    #[test]
    fn verdicts_belong_to_the_case_that_runs() {
        let mut reader = read(&[
            "SeaBIOS (version 1)",
            "selftest\tfact\tTSC\t1 kHz",
            "selftest\tfact\tTSC\t1 kHz",
            "selftest\tplan\t0\t2",
            "selftest\tcase\t0\ta/b\t15.1",
            "selftest\tpass\t1",
            "qemu: a warning",
            "selftest\tfail\t0\tx\ty",
            "selftest\tpass\t0",
            "selftest\tcase\t1\ta/c\t15.2",
        ]);
        assert_eq!(reader.findings.facts.len(), 1);
        let wrong = Outcome::Fail {
            expected: "x".into(),
            seen: "y".into(),
        };
        assert_eq!(reader.findings.cases[0].outcome, wrong);
        assert_eq!(reader.cut("gone".into()), Some(Progress::Stuck(1)));
        let cut = &reader.findings.cases[1];
        assert!(matches!(&cut.outcome, Outcome::Fail { seen, .. } if seen == "gone"));
    }

    #[test]
    fn an_image_without_a_case_is_an_error_and_one_with_an_end_is_complete() {
        assert_eq!(read(&["selftest\tplan\t0\t2"]).cut("x".into()), None);
        let mut reader = read(&["selftest\tend"]);
        assert_eq!(reader.cut("x".into()), Some(Progress::Complete));
    }
}
