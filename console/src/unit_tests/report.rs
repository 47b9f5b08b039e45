//! The results as TAP and as JUnit XML.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};

use super::Judged;
use super::verdict::Verdict;

const SUITE: &str = "kvm-unit-tests";

/// Writes TAP version 13.
pub(crate) fn write_tap(path: &Path, results: &[Judged]) -> Result<()> {
    fs::write(path, tap(results)).with_context(|| format!("cannot write {}", path.display()))
}

fn tap(results: &[Judged]) -> String {
    let mut text = format!("TAP version 13\n1..{}\n", results.len());
    for (number, result) in (1..).zip(results) {
        let (word, directive) = match &result.verdict {
            Verdict::Pass => ("ok", ""),
            Verdict::Skip(_) => ("ok", " # SKIP "),
            Verdict::Platform(_) | Verdict::Expected(_) => ("not ok", " # TODO "),
            Verdict::Ours(_) | Verdict::Surprise => ("not ok", " # "),
        };
        // A hash would start a directive of its own.
        let why = result.verdict.why().replace('#', "\\#");
        text += &format!("{word} {number} - {}{directive}{why}\n", result.name);
    }
    text
}

/// Writes JUnit XML.
pub(crate) fn write_junit(path: &Path, results: &[Judged]) -> Result<()> {
    let mut suite = TestSuite::new(SUITE);
    for result in results {
        let status = match &result.verdict {
            Verdict::Pass => TestCaseStatus::success(),
            Verdict::Skip(why) | Verdict::Platform(why) | Verdict::Expected(why) => {
                let mut status = TestCaseStatus::skipped();
                status.set_message(format!("{}: {why}", result.verdict.word()));
                status
            }
            Verdict::Ours(_) | Verdict::Surprise => {
                let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
                status.set_message(result.verdict.why());
                status
            }
        };
        let mut case = TestCase::new(&*result.name, status);
        if let Some(trial) = &result.here {
            case.set_time(trial.took);
            case.set_system_out(&*trial.output);
        }
        suite.add_test_case(case);
    }
    let mut report = Report::new(SUITE);
    report.add_test_suite(suite);
    let text = report.to_string().context("cannot make JUnit XML")?;
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results() -> Vec<Judged> {
        let judged = |name: &str, verdict| Judged {
            name: name.into(),
            verdict,
            here: None,
            there: None,
        };
        vec![
            judged("a", Verdict::Pass),
            judged("b", Verdict::Skip("i386 only".into())),
            judged("c", Verdict::Ours("FAIL: <x> #1".into())),
            judged("d", Verdict::Platform("FAIL: y".into())),
        ]
    }

    #[test]
    fn tap_has_a_plan_and_directives() {
        let expected = "TAP version 13\n1..4\nok 1 - a\nok 2 - b # SKIP i386 only\n\
                        not ok 3 - c # FAIL: <x> \\#1\nnot ok 4 - d # TODO FAIL: y\n";
        assert_eq!(tap(&results()), expected);
    }

    #[test]
    fn junit_counts_what_is_ours() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("report.xml");
        write_junit(&path, &results()).expect("written");
        let text = fs::read_to_string(path).expect("written");
        assert!(
            text.contains(r#"tests="4""#) && text.contains(r#"failures="1""#),
            "{text}"
        );
        assert!(text.contains("&lt;x&gt;"), "{text}");
    }
}
