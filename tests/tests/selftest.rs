//! The self-test of the platform, as operators run it.

use std::collections::HashSet;

use serde_json::Value;
use viaduct_tests::{Bench, Finished};

fn selftest(bench: &Bench, words: &[&str]) -> Finished {
    bench.line(["selftest", "--json"]).words(words).finish()
}

fn report(done: &Finished) -> Value {
    serde_json::from_str(&done.out()).unwrap_or_else(|_| panic!("no JSON: {}", done.err()))
}

/// The results by name; every case has one.
fn results(report: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().expect("a string").to_owned();
    let cases = report["cases"].as_array().expect("a list");
    let results = cases
        .iter()
        .map(|case| (text(&case["name"]), text(&case["result"])));
    results.collect()
}

#[test]
fn this_platform_does_what_is_known_of_it() {
    let bench = Bench::new();
    let done = selftest(&bench, &[]);
    let report = report(&done);
    let results = results(&report);
    let bad: Vec<_> = results
        .iter()
        .filter(|(_, result)| !["pass", "known", "skip"].contains(&&**result))
        .collect();
    assert!(bad.is_empty(), "{}: {bad:?}", report["platform"]);
    assert_eq!((done.status, &report["as_known"]), (0, &Value::Bool(true)));
    let names: HashSet<_> = results.iter().map(|(name, _)| name).collect();
    assert_eq!(names.len(), results.len(), "names are not unique");
    assert!(results.len() > 200, "only {} cases", results.len());
    let passed = results.iter().filter(|(_, result)| result == "pass");
    assert!(passed.count() > 150, "{results:?}");
    let seconds = report["seconds"].as_f64().expect("a number");
    assert!(seconds <= 30.0, "it took {seconds} s");
    // A finding is complete.
    let cases = report["cases"].as_array().expect("a list").iter();
    for case in cases.filter(|case| case["result"] == "known") {
        for field in ["expected", "seen", "section", "reason"] {
            let text = case[field].as_str();
            assert!(text.is_some_and(|text| !text.is_empty()), "{case}");
        }
    }
    // All of it tells platforms apart.
    assert_eq!(report["other_platforms"], Value::Array(Vec::new()));
    bench.assert_nothing_left();
}

#[test]
fn two_nodes_are_tried_too() {
    let bench = Bench::new();
    let done = selftest(&bench, &["--nodes", "2", "--filter", "nodes/"]);
    let results = results(&report(&done));
    assert_eq!(done.status, 0, "{results:?}");
    assert_eq!(results.len(), 5, "{results:?}");
    bench.assert_nothing_left();
}

#[test]
fn findings_that_are_not_known_fail_the_run() {
    let bench = Bench::new();
    let tap = bench.path("out.tap");
    let words = ["--filter", "intercept/cpuid", "--tap"];
    let done = bench.line(["selftest"]).words(words).words([&tap]).finish();
    assert_eq!(done.status, 0, "{}", done.err());
    let text = std::fs::read_to_string(&tap).expect("written");
    assert_eq!(text, "TAP version 13\n1..1\nok 1 - intercept/cpuid\n");

    // An emulator is no processor; where it is one, there is nothing to see.
    let junit = bench.path("out.xml");
    let perfect = ["--platform", "a processor with SVM", "--junit"];
    let words = [&perfect[..], &[junit.to_str().expect("plain letters")]].concat();
    let done = selftest(&bench, &words);
    let report = report(&done);
    let results = results(&report);
    let failed = results
        .iter()
        .filter(|(_, result)| result == "FAIL")
        .count();
    assert_eq!(done.status, i32::from(failed > 0));
    assert_eq!(report["as_known"], Value::Bool(failed == 0));
    let text = std::fs::read_to_string(&junit).expect("written");
    assert!(text.contains(&format!(r#"failures="{failed}""#)), "{text}");
    let sections = text.matches(", manual 15.").count() + text.matches(", manual 11.").count();
    assert_eq!(sections, failed, "{text}");
}

#[test]
fn what_cannot_be_tested_is_said_in_a_line() {
    let bench = Bench::new();
    for (words, reason) in [
        (&["--platform", "VAX"][..], "no such platform"),
        (&["--filter", "nonsense"], "no case is called like that"),
        (&["--nodes", "3"], "--nodes"),
    ] {
        let done = selftest(&bench, words);
        let said = done.err();
        assert_eq!((done.status, said.lines().count()), (125, 1), "{said}");
        assert!(said.contains(reason), "no {reason:?} in {said}");
    }
    bench.assert_nothing_left();
}
