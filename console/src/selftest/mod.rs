//! `selftest`: runs the self-test's image on a rack, and says which known
//! platform does what it found.

mod collect;
mod platform;

use std::time::Instant;

use anyhow::{Result, bail};
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use serde::Serialize;

use crate::cli::SelftestArgs;
use crate::progress;
use crate::report::{self, Line, Status};
use collect::{Findings, Outcome, Wishes};
use platform::{Fit, Platforms};

pub(crate) fn run(args: &SelftestArgs) -> Result<u8> {
    let platforms = Platforms::list();
    if let Some(name) = &args.platform {
        platforms.check(name)?;
    }
    let started = Instant::now();
    let findings = collect::collect(&Wishes {
        only: args.filter.as_deref(),
        nodes: args.nodes,
        limit: std::time::Duration::from_secs(args.timeout),
    })?;
    let seconds = started.elapsed().as_secs_f64();
    progress::clear();
    if findings.cases.is_empty() {
        bail!("no case is called like that; see the names with viaduct selftest -v");
    }
    let fit = platforms.best(&findings.cases, args.platform.as_deref());
    let lines: Vec<Line> = findings.cases.iter().map(|case| line(case, &fit)).collect();
    match args.json {
        true => print_json(&findings, &fit, &lines, seconds)?,
        false => print(&findings, &fit, &lines, args.verbose, seconds),
    }
    report::write(&args.files, "viaduct-selftest", &lines)?;
    Ok(u8::from(!fit.is_exact()))
}

/// A case with what has come of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Case {
    pub name: String,
    pub section: String,
    pub outcome: Outcome,
    pub took: std::time::Duration,
}

fn line(case: &Case, fit: &Fit<'_>) -> Line {
    let surprise = fit.surprises.contains(&&*case.name);
    let known = fit.reason(&case.name);
    let (status, word, why) = match &case.outcome {
        Outcome::Pass if surprise => (
            Status::Failed,
            "SURPRISE",
            format!("it passes, but {} is known not to", fit.name),
        ),
        Outcome::Pass => (Status::Passed, "pass", String::new()),
        Outcome::Skip(why) => (Status::Skipped, "skip", why.clone()),
        Outcome::Fail { expected, seen } => {
            let section = &case.section;
            let found = format!("expected {expected}, seen {seen}, manual {section}");
            match known {
                Some(reason) => (Status::Known, "known", format!("{found} ({reason})")),
                None => (Status::Failed, "FAIL", found),
            }
        }
    };
    Line {
        name: case.name.clone(),
        status,
        word,
        why,
        took: Some(case.took),
        output: None,
    }
}

fn print(findings: &Findings, fit: &Fit<'_>, lines: &[Line], verbose: bool, seconds: f64) {
    for (name, value) in &findings.facts {
        println!("{name}: {value}");
    }
    println!();
    let mut table = Table::new();
    table.load_preset(NOTHING);
    table.set_header(["CASE", "RESULT", "MANUAL", "EXPECTED", "SEEN"]);
    for (case, line) in findings.cases.iter().zip(lines) {
        let (expected, seen) = match &case.outcome {
            Outcome::Fail { expected, seen } => (&**expected, &**seen),
            Outcome::Skip(why) => (&**why, ""),
            Outcome::Pass => ("", ""),
        };
        if verbose || !matches!(line.status, Status::Passed | Status::Skipped) {
            table.add_row([&*line.name, line.word, &case.section, expected, seen]);
        }
    }
    println!("{table}\n");
    let count = |status| lines.iter().filter(|line| line.status == status).count();
    println!(
        "{} cases in {seconds:.1} s, the first after {:.1} s: {} passed, {} skipped, {} deviations known, {} not",
        lines.len(),
        findings.to_first_case.as_secs_f64(),
        count(Status::Passed),
        count(Status::Skipped),
        count(Status::Known),
        count(Status::Failed),
    );
    println!("{}", fit.sentence());
}

#[derive(Serialize)]
struct JsonReport<'a> {
    facts: &'a [(String, String)],
    seconds: f64,
    seconds_to_first_case: f64,
    platform: &'a str,
    other_platforms: &'a [&'a str],
    as_known: bool,
    cases: Vec<JsonCase<'a>>,
}

#[derive(Serialize)]
struct JsonCase<'a> {
    name: &'a str,
    result: &'a str,
    section: &'a str,
    milliseconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    expected: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seen: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
}

fn print_json(findings: &Findings, fit: &Fit<'_>, lines: &[Line], seconds: f64) -> Result<()> {
    let cases = findings.cases.iter().zip(lines).map(|(case, line)| {
        let (expected, seen) = match &case.outcome {
            Outcome::Fail { expected, seen } => (Some(&**expected), Some(&**seen)),
            _ => (None, None),
        };
        JsonCase {
            name: &case.name,
            result: line.word,
            section: &case.section,
            milliseconds: case.took.as_secs_f64() * 1e3,
            expected,
            seen,
            reason: match &case.outcome {
                Outcome::Skip(why) => Some(why),
                Outcome::Fail { .. } => fit.reason(&case.name),
                Outcome::Pass => None,
            },
        }
    });
    let report = JsonReport {
        facts: &findings.facts,
        seconds,
        seconds_to_first_case: findings.to_first_case.as_secs_f64(),
        platform: fit.name,
        other_platforms: &fit.others,
        as_known: fit.is_exact(),
        cases: cases.collect(),
    };
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}
