//! What the guest tells on its console, amid what its kernel prints.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::images::BenchImages;
use crate::metric::{self, Metric};

/// How long a guest may say nothing of note.
const SILENCE_LIMIT: Duration = Duration::from_secs(240);
/// A line that is longer isn't ours.
const LINE_LIMIT: usize = 4096;

/// Exits by reason, in the hypervisor's order.
pub(crate) type Exits = Vec<(&'static str, u64)>;

/// What one run gave.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcome {
    /// Nanoseconds by metric.
    pub values: BTreeMap<&'static str, f64>,
    /// Exits during each measurement, where they can be read.
    pub exits: BTreeMap<&'static str, Exits>,
    /// The most of the node's own memory that was in use, in bytes.
    pub node_memory: Option<u64>,
    /// The share of the mapped guest memory that is under entries of 2 MiB.
    pub large_pages: Option<f64>,
}

/// Follows one guest from its launch to its last line.
pub(crate) struct Watch<'a> {
    outcome: Outcome,
    launched: Instant,
    /// When something of note was said last.
    heard: Instant,
    line: Vec<u8>,
    last_lines: Vec<String>,
    counters: Box<dyn Fn() -> Exits + 'a>,
    /// The counters when the measurement that runs was announced.
    before: Exits,
    /// Rate of the clock of a guest that is vmexit.
    tsc_khz: Option<u64>,
    verbose: bool,
}

/// Whether to read on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// The guest has more to tell.
    More,
    /// That was its last line.
    End,
}

impl<'a> Watch<'a> {
    /// Watches a guest that is launched now; `counters` reads the exits of
    /// its vCPUs so far.
    pub(crate) fn new(verbose: bool, counters: impl Fn() -> Exits + 'a) -> Self {
        Self {
            outcome: Outcome::default(),
            launched: Instant::now(),
            heard: Instant::now(),
            line: Vec::new(),
            last_lines: Vec::new(),
            counters: Box::new(counters),
            before: Vec::new(),
            tsc_khz: None,
            verbose,
        }
    }

    /// The same for the program that `images` has instead of Linux, if any.
    pub(crate) fn of(self, images: &BenchImages) -> Self {
        let tsc_khz = images.bare.as_ref().map(|bare| bare.tsc_khz);
        Self { tsc_khz, ..self }
    }

    /// Takes what came from the console.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Result<Heard> {
        if self.verbose {
            eprint!("{}", String::from_utf8_lossy(bytes));
        }
        for byte in bytes {
            if *byte != b'\n' {
                if self.line.len() < LINE_LIMIT {
                    self.line.push(*byte);
                }
                continue;
            }
            let line = std::mem::take(&mut self.line);
            if self.take_line(String::from_utf8_lossy(&line).trim())? == Heard::End {
                return Ok(Heard::End);
            }
        }
        Ok(Heard::More)
    }

    /// Fails if the guest has been silent for too long.
    pub(crate) fn check_time(&self) -> Result<()> {
        if self.heard.elapsed() > SILENCE_LIMIT {
            bail!(
                "nothing heard for {} s; {}",
                SILENCE_LIMIT.as_secs(),
                self.last_words()
            );
        }
        Ok(())
    }

    /// The end of what the guest printed, for an error.
    pub(crate) fn last_words(&self) -> String {
        format!("the console ends with: {}", self.last_lines.join(" | "))
    }

    /// What was found.
    pub(crate) fn finish(self) -> Outcome {
        self.outcome
    }

    fn take_line(&mut self, line: &str) -> Result<Heard> {
        if !line.is_empty() {
            self.last_lines.push(line.to_owned());
            let excess = self.last_lines.len().saturating_sub(3);
            self.last_lines.drain(..excess);
        }
        if let Some(khz) = self.tsc_khz
            && let Some((metric, ticks)) = metric::find_vmexit(line)
        {
            self.heard = Instant::now();
            let nanoseconds = f64::from(ticks) * 1e6 / khz as f64;
            self.outcome.values.insert(metric.name, nanoseconds);
            if self.outcome.values.len() == metric::VMEXIT.len() {
                return Ok(Heard::End);
            }
        }
        // A message of the kernel may stand before it.
        let Some((_, told)) = line.split_once("@bench ") else {
            return Ok(Heard::More);
        };
        self.heard = Instant::now();
        let words: Vec<&str> = told.split_whitespace().collect();
        match *words.as_slice() {
            // The outer guest has got so far: the measured one starts here.
            ["launch"] => self.launched = Instant::now(),
            ["start", _] => self.before = (self.counters)(),
            ["value", name, value] => {
                let Some(metric) = metric::find(name) else {
                    bail!("the guest measures {name}, which is unknown here");
                };
                self.take_value(metric, value.parse()?);
            }
            ["end"] => return Ok(Heard::End),
            _ => bail!("the guest says: {told}"),
        }
        Ok(Heard::More)
    }

    fn take_value(&mut self, metric: &Metric, value: f64) {
        self.outcome.values.insert(metric.name, value);
        let now = (self.counters)();
        if metric.name == metric::BOOT {
            let wall = self.launched.elapsed().as_nanos();
            // Below 2^53: exact.
            let wall = u64::try_from(wall).unwrap_or(u64::MAX) as f64;
            self.outcome.values.insert(metric::LAUNCH, wall);
        }
        if now.is_empty() {
            return;
        }
        let before = |name| {
            let found = self.before.iter().find(|(before, _)| *before == name);
            found.map_or(0, |(_, count)| *count)
        };
        let during = now
            .iter()
            .map(|(name, count)| (*name, count.saturating_sub(before(*name))))
            .collect();
        self.outcome.exits.insert(metric.name, during);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn values_and_exits_are_taken_from_between_other_lines() {
        let count = Cell::new(100);
        let mut watch = Watch::new(false, || vec![("exits", count.get())]);
        let said = b"[ 0.1] kernel\r\n[ 0.2] x@bench value boot 2500\r\n@bench start pi";
        assert_eq!(watch.feed(said).expect("sound"), Heard::More);
        count.set(150);
        assert_eq!(watch.feed(b"pe\r\n").expect("sound"), Heard::More);
        count.set(175);
        let said = b"@bench value pipe 7\r\n@bench end\r\nmore";
        assert_eq!(watch.feed(said).expect("sound"), Heard::End);
        let outcome = watch.finish();
        assert_eq!(outcome.values["boot"].to_bits(), 2500_f64.to_bits());
        assert_eq!(outcome.exits["boot"], [("exits", 100)]);
        assert_eq!(outcome.exits["pipe"], [("exits", 25)]);
        assert!(outcome.values.contains_key(metric::LAUNCH));
    }

    #[test]
    fn ticks_of_vmexit_become_nanoseconds() {
        let watch = Watch::new(false, Vec::new);
        let mut watch = Watch {
            tsc_khz: Some(2_000_000),
            ..watch
        };
        let said = b"enabling apic\r\ncpuid 3000\r\nvmcall x\r\n";
        assert_eq!(watch.feed(said).expect("sound"), Heard::More);
        for metric in &metric::VMEXIT[1..] {
            let heard = watch.feed(format!("{} 2\r\n", metric.name).as_bytes());
            let last = metric.name == metric::VMEXIT[5].name;
            let expected = if last { Heard::End } else { Heard::More };
            assert_eq!(heard.expect("sound"), expected);
        }
        assert_eq!(watch.finish().values["cpuid"].to_bits(), 1500_f64.to_bits());
    }

    #[test]
    fn a_guest_that_fails_or_talks_nonsense_is_an_error() {
        let feed = |said: &[u8]| Watch::new(false, Vec::new).feed(said);
        assert!(feed(b"@bench failed pipe: no CPU 1\n").is_err());
        assert!(feed(b"@bench value pipe many\n").is_err());
        assert!(feed(b"@bench value shoes 1\n").is_err());
    }
}
