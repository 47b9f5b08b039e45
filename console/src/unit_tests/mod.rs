//! `kvm-unit-tests`: runs a built tree of that suite under Viaduct, compares
//! with plain QEMU, and says which failures are ours.

mod config;
mod trial;
mod verdict;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use rack::{Accelerator, Programs};
use serde::Deserialize;

use crate::cli::UnitTestArgs;
use crate::progress;
use crate::report::{self, Line};
use config::Test;
use trial::{Ending, Shape, Trial};
use verdict::{ExpectedFailures, Verdict};

/// The suite's own time limit for a test that has none.
const LIMIT: u64 = 90;

/// A test with what has come of it.
#[derive(Debug)]
pub(crate) struct Judged {
    pub name: String,
    pub verdict: Verdict,
    pub here: Option<Trial>,
    pub there: Option<Trial>,
}

impl Judged {
    fn line(&self) -> Line {
        Line {
            name: self.name.clone(),
            status: self.verdict.status(),
            word: self.verdict.word(),
            why: self.verdict.why().to_owned(),
            took: self.here.as_ref().map(|trial| trial.took),
            output: self.here.as_ref().map(|trial| trial.output.clone()),
        }
    }
}

pub(crate) fn run(args: &UnitTestArgs) -> Result<u8> {
    let folder = args.folder.join("x86");
    let path = folder.join("unittests.cfg");
    let text = fs::read_to_string(&path).with_context(|| {
        format!(
            "{}: no such file; give the folder of a built kvm-unit-tests tree",
            path.display()
        )
    })?;
    let wanted = |test: &Test| match &args.filter {
        Some(filter) => test.name.contains(filter) || test.groups.contains(filter),
        None => true,
    };
    let tests: Vec<Test> = config::parse(&text).into_iter().filter(wanted).collect();
    if tests.is_empty() {
        bail!(
            "no test is called like that; see the names in {}",
            path.display()
        );
    }
    let programs = Programs::find();
    programs.check()?;
    let suite = Suite {
        folder: &folder,
        qemu: &programs.qemu,
        accelerator: match Accelerator::pick()? {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg",
        },
        shape: Shape { nodes: args.nodes },
        compares: !args.no_reference,
        limit: args.timeout,
        verbose: args.verbose,
        expected: ExpectedFailures::list(),
        slow: SlowTests::list(),
    };
    let results = suite.run(&tests);
    progress::clear();
    print(&results, args.verbose);
    let lines: Vec<Line> = results.iter().map(Judged::line).collect();
    report::write(&args.files, "kvm-unit-tests", &lines)?;
    Ok(u8::from(
        results.iter().any(|result| result.verdict.is_bad()),
    ))
}

/// What all tests have in common.
struct Suite<'a> {
    folder: &'a Path,
    qemu: &'a Path,
    accelerator: &'static str,
    shape: Shape,
    compares: bool,
    limit: Option<u64>,
    verbose: bool,
    expected: ExpectedFailures,
    slow: SlowTests,
}

/// The reviewed list of tests with time limits of our own, and reasons.
#[derive(Debug, Deserialize)]
struct SlowTests(BTreeMap<String, (u64, String)>);

impl SlowTests {
    /// The list that is part of this program.
    ///
    /// # Panics
    /// Never: a test reads it.
    fn list() -> Self {
        toml::from_str(include_str!("slow.toml")).expect("a test reads it")
    }

    /// The limit of a test to which its tree gives `limit` seconds.
    fn at_least(&self, name: &str, limit: u64) -> u64 {
        self.0
            .get(name)
            .map_or(limit, |(seconds, _)| limit.max(*seconds))
    }
}

impl Suite<'_> {
    /// Runs all tests, side by side as far as the host's cores reach.
    fn run(&self, tests: &[Test]) -> Vec<Judged> {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        side_by_side(cores, tests, |number, test| {
            let count = tests.len();
            progress::say(format!("{} ({} of {count})", test.name, number + 1));
            let judged = self.judge(test);
            if self.verbose {
                let word = judged.verdict.word();
                progress::print_line(&format!("{word:<10}{}", test.name));
            }
            judged
        })
    }

    fn judge(&self, test: &Test) -> Judged {
        let mut judged = Judged {
            name: test.name.clone(),
            verdict: Verdict::Pass,
            here: None,
            there: None,
        };
        if let Some(why) = self.skip_reason(test) {
            judged.verdict = Verdict::Skip(why);
            return judged;
        }
        let image = self.folder.join(&test.file);
        let limit = test.timeout.unwrap_or(LIMIT);
        let limit = self.limit.unwrap_or(self.slow.at_least(&test.name, limit));
        let limit = Duration::from_secs(limit);
        let trials = trial::here(&image, test, self.shape, limit).and_then(|here| {
            // What passes needs no comparison.
            let compares = self.compares && here.ending != Ending::Pass;
            let there = compares
                .then(|| trial::reference(self.qemu, self.accelerator, &image, test, limit));
            Ok((here, there.transpose()?))
        });
        match trials {
            Ok((here, there)) => {
                judged.verdict = self.expected.judge(&test.name, &here, there.as_ref());
                (judged.here, judged.there) = (Some(here), there);
            }
            Err(error) => judged.verdict = Verdict::Ours(crate::one_line(&error)),
        }
        judged
    }

    fn skip_reason(&self, test: &Test) -> Option<String> {
        test.skip_reason(self.accelerator).or_else(|| {
            let built = self.folder.join(&test.file).is_file() && !test.file.is_empty();
            (!built).then(|| format!("{} is not built", test.file))
        })
    }
}

/// Does something with each test, on a thread of its own, and with as many
/// at once as have cores enough; the results in order.
fn side_by_side<T: Send>(
    cores: usize,
    tests: &[Test],
    each: impl Fn(usize, &Test) -> T + Sync,
) -> Vec<T> {
    let cores = Cores {
        free: Mutex::new(cores),
        given_back: Condvar::new(),
        all: cores,
    };
    let (cores, each) = (&cores, &each);
    thread::scope(|scope| {
        let mut running = Vec::new();
        for (number, test) in tests.iter().enumerate() {
            let taken = cores.take(test.smp);
            running.push(scope.spawn(move || {
                let result = each(number, test);
                cores.give_back(taken);
                result
            }));
        }
        let results = running.into_iter().map(|thread| thread.join());
        results
            .map(|result| result.expect("a test's thread does not panic"))
            .collect()
    })
}

/// The host's cores, as tests take them.
struct Cores {
    free: Mutex<usize>,
    given_back: Condvar,
    all: usize,
}

impl Cores {
    /// Waits for so many cores, or for all of them; says how many it took.
    fn take(&self, count: u32) -> usize {
        let count = usize::try_from(count).unwrap_or(self.all).min(self.all);
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free = self
            .given_back
            .wait_while(free, |free| *free < count)
            .unwrap_or_else(PoisonError::into_inner);
        *free -= count;
        count
    }

    fn give_back(&self, count: usize) {
        *self.free.lock().unwrap_or_else(PoisonError::into_inner) += count;
        self.given_back.notify_all();
    }
}

fn print(results: &[Judged], verbose: bool) {
    let mut table = Table::new();
    table.load_preset(NOTHING);
    table.set_header(["TEST", "RESULT", "SECONDS", "REASON"]);
    for result in results {
        let took = result
            .here
            .as_ref()
            .map(|here| format!("{:.1}", here.took.as_secs_f64()));
        table.add_row([
            &*result.name,
            result.verdict.word(),
            &took.unwrap_or_default(),
            result.verdict.why(),
        ]);
    }
    println!("{table}");
    if verbose {
        for result in results
            .iter()
            .filter(|result| result.verdict != Verdict::Pass)
        {
            for (place, trial) in [("here", &result.here), ("plain QEMU", &result.there)] {
                if let Some(trial) = trial {
                    println!("--- {} {place}: {:?}", result.name, trial.ending);
                    println!("{}", trial.output.replace('\r', "").trim_end());
                }
            }
        }
    }
    let count = |word| {
        results
            .iter()
            .filter(|result| result.verdict.word() == word)
            .count()
    };
    println!(
        "{} tests: {} passed, {} skipped, {} fail on the platform alone, {} expected failures, {} failed",
        results.len(),
        count("pass"),
        count("skip"),
        count("platform"),
        count("expected"),
        results
            .iter()
            .filter(|result| result.verdict.is_bad())
            .count(),
    );
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::{SlowTests, config, side_by_side};

    #[test]
    fn tests_run_side_by_side_and_wide_ones_alone() {
        let tests = config::parse("[a]\n[b]\n[wide]\nsmp = 5\n[c]\nsmp = 2\n");
        let (meeting, running) = (Barrier::new(2), AtomicUsize::new(0));
        let seen = side_by_side(2, &tests, |number, test| {
            let already = running.fetch_add(1, Ordering::SeqCst);
            // Each of the first two waits for the other.
            if test.smp == 1 {
                meeting.wait();
            } else {
                assert_eq!(already, 0, "test {number} is not alone");
            }
            running.fetch_sub(1, Ordering::SeqCst);
            number
        });
        assert_eq!(seen, [0, 1, 2, 3]);
    }

    #[test]
    fn slow_tests_get_longer_and_have_reasons() {
        let list = SlowTests::list();
        assert!(list.0.values().all(|(_, why)| why.len() > 10), "{list:?}");
        assert_eq!(list.at_least("x2apic", 30), 900);
        assert_eq!(list.at_least("x2apic", 1000), 1000);
        assert_eq!(list.at_least("cpuid", 30), 30);
    }
}
