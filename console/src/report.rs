//! Results of tests as TAP and as JUnit XML.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};

use crate::cli::ResultFiles;

/// What a test's result means to whoever counts failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Passed,
    /// It had nothing to test.
    Skipped,
    /// It failed, as was known.
    Known,
    Failed,
}

/// One result.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub name: String,
    pub status: Status,
    /// The result in a word, and why.
    pub word: &'static str,
    pub why: String,
    pub took: Option<Duration>,
    pub output: Option<String>,
}

/// Writes what is asked for of a suite's results.
pub(crate) fn write(files: &ResultFiles, suite: &str, lines: &[Line]) -> Result<()> {
    if let Some(path) = &files.tap {
        write_tap(path, lines)?;
    }
    if let Some(path) = &files.junit {
        write_junit(path, suite, lines)?;
    }
    Ok(())
}

/// Writes TAP version 13.
fn write_tap(path: &Path, lines: &[Line]) -> Result<()> {
    fs::write(path, tap(lines)).with_context(|| format!("cannot write {}", path.display()))
}

fn tap(lines: &[Line]) -> String {
    let mut text = format!("TAP version 13\n1..{}\n", lines.len());
    for (number, line) in (1..).zip(lines) {
        let (word, directive) = match line.status {
            Status::Passed => ("ok", ""),
            Status::Skipped => ("ok", " # SKIP "),
            Status::Known => ("not ok", " # TODO "),
            Status::Failed => ("not ok", " # "),
        };
        // A hash would start a directive of its own.
        let why = line.why.replace('#', "\\#");
        text += &format!("{word} {number} - {}{directive}{why}\n", line.name);
    }
    text
}

/// Writes JUnit XML.
fn write_junit(path: &Path, name: &str, lines: &[Line]) -> Result<()> {
    let mut suite = TestSuite::new(name);
    for line in lines {
        let status = match line.status {
            Status::Passed => TestCaseStatus::success(),
            Status::Skipped | Status::Known => {
                let mut status = TestCaseStatus::skipped();
                status.set_message(format!("{}: {}", line.word, line.why));
                status
            }
            Status::Failed => {
                let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
                status.set_message(&*line.why);
                status
            }
        };
        let mut case = TestCase::new(&*line.name, status);
        if let Some(took) = line.took {
            case.set_time(took);
        }
        if let Some(output) = &line.output {
            case.set_system_out(&**output);
        }
        suite.add_test_case(case);
    }
    let mut report = Report::new(name);
    report.add_test_suite(suite);
    let text = report.to_string().context("cannot make JUnit XML")?;
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines() -> Vec<Line> {
        let line = |name: &str, status, word, why: &str| Line {
            name: name.into(),
            status,
            word,
            why: why.into(),
            took: None,
            output: None,
        };
        vec![
            line("a", Status::Passed, "pass", ""),
            line("b", Status::Skipped, "skip", "i386 only"),
            line("c", Status::Failed, "FAIL", "FAIL: <x> #1"),
            line("d", Status::Known, "platform", "FAIL: y"),
        ]
    }

    #[test]
    fn tap_has_a_plan_and_directives() {
        let expected = "TAP version 13\n1..4\nok 1 - a\nok 2 - b # SKIP i386 only\n\
                        not ok 3 - c # FAIL: <x> \\#1\nnot ok 4 - d # TODO FAIL: y\n";
        assert_eq!(tap(&lines()), expected);
    }

    #[test]
    fn junit_counts_what_is_ours() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("report.xml");
        write_junit(&path, "suite", &lines()).expect("written");
        let text = fs::read_to_string(path).expect("written");
        assert!(
            text.contains(r#"tests="4""#) && text.contains(r#"failures="1""#),
            "{text}"
        );
        assert!(text.contains("&lt;x&gt;"), "{text}");
    }
}
