//! Racks of several nodes, with stand-ins for them: who gives what, and what
//! becomes of a rack when a node fails it.

mod support;

use std::time::{Duration, Instant};

use support::{Bench, text};
use vmm_shared::region::VERSION;

/// Three unequal nodes, for a VM of six vCPUs and 256 MiB.
const UNEQUAL: &str = "[[node]]\ncores = 1\nmemory = \"64M\"\n\
                       [[node]]\ncores = 3\n\
                       [[node]]\ncores = 2\nmemory = \"1G\"\n";

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

#[test]
fn a_vm_gets_its_parts_from_all_nodes() {
    let bench = Bench::new();
    let rack = bench.file("rack.toml", UNEQUAL);
    let up = ["up", "--name", "parts", "--rack", &rack, "--memory", "256M"];
    let out = bench.viaduct(&up, &[]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));

    let show = |what, more: &[&str]| {
        let line = [&[what, "--name", "parts"], more].concat();
        let out = bench.viaduct(&line, &[]);
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        text(&out.stdout).to_owned()
    };
    let nodes = show("nodes", &[]);
    let rows: Vec<_> = nodes
        .lines()
        .skip(1)
        .map(|row| words(row)[..6].join(" "))
        .collect();
    assert_eq!(
        rows,
        [
            "0 data ready 1 1 64M",
            "1 data ready 3 3 96M",
            "2 data ready 2 2 96M"
        ]
    );
    let memory = show("memory", &[]);
    let rows: Vec<_> = memory
        .lines()
        .skip(1)
        .take(3)
        .map(|row| words(row)[..9].join(" "))
        .collect();
    // Where it begins, what it started with, was added, is seen, is elsewhere, is given and could be added.
    assert_eq!(
        rows,
        [
            "0 0 64M 0 64M 0 64M 0 25%",
            "1 64M 96M 0 96M 0 96M 384M 37%",
            "2 160M 96M 0 96M 0 96M 896M 37%"
        ]
    );
    let vcpus = show("vcpus", &[]);
    let row = |name| {
        let found = vcpus.lines().find(|row| words(row).first() == Some(&name));
        words(found.expect("a row"))[1..].join(" ")
    };
    assert_eq!(row("node"), "0 1 1 1 2 2");
    assert_eq!(row("core"), "0 0 1 2 0 1");
    assert_eq!(row("exits"), "42 43 44 45 46 47");
    for what in ["nodes", "memory"] {
        let json = show(what, &["--json"]);
        assert!(json.contains("\"memory_offset_bytes\": 67108864"), "{json}");
    }
    assert!(show("vcpus", &["--json"]).contains("\"core\": 2"));

    let out = bench.viaduct(&["exec", "--name", "parts"], &["echo", "hi"]);
    assert_eq!(text(&out.stdout), "hi\n");
    let out = bench.viaduct(&["down", "--name", "parts"], &[]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    bench.assert_nothing_left();
}

#[test]
fn the_widest_rack_runs_a_command() {
    let bench = Bench::new();
    let line = ["run", "--nodes", "8", "--cores", "31"];
    let out = bench.viaduct(&line, &["sh", "-c", "echo wide; exit 3"]);
    assert_eq!(text(&out.stdout), "wide\n", "{}", text(&out.stderr));
    assert_eq!(out.status.code(), Some(3));
    bench.assert_nothing_left();
}

#[test]
fn a_node_that_cannot_join_is_named_with_the_cause() {
    let bench = Bench::new();
    let stand_in = |fault| ("STAND_IN", fault);
    let fault = |fault| ("VIADUCT_FAULT", fault);
    let versions = format!("has version {}, and this is version {VERSION}", VERSION + 1);
    for ((name, value), node, cause) in [
        (stand_in("boot-failure@1"), "node 1", "this CPU has no SVM"),
        (
            stand_in("qemu-error@2"),
            "node 2",
            "cannot set up guest memory",
        ),
        (stand_in("panic@0"), "node 0", "broken invariant"),
        (stand_in("silent@2"), "node 2", "has not joined"),
        (stand_in("idle@1"), "node 1", "not in service"),
        (fault("paused@1"), "node 1", "has not joined"),
        (fault("doorbell@2"), "node 2", "doorbell server"),
        (fault("version@1"), "node 1", &versions),
        (fault("header@2"), "memory region of node 2", "no header"),
        (fault("size@0"), "memory region of node 0", "promises"),
        (fault("size@-1"), "VIADUCT_FAULT", "docs/console.md"),
    ] {
        let mut line = bench.command(&["run", "--nodes", "3", "--boot-timeout", "2"], &["true"]);
        line.env(name, value);
        let start = Instant::now();
        let out = bench.end(bench.spawn(line));
        let said = text(&out.stderr);
        assert!(start.elapsed() < Duration::from_secs(10), "{value}");
        assert_eq!(out.status.code(), Some(125), "{value}: {said}");
        assert_eq!(said.lines().count(), 1, "{value}: {said}");
        assert!(
            said.contains(node) && said.contains(cause),
            "{value}: {said}"
        );
        bench.assert_nothing_left();
    }
}

#[test]
fn a_silent_node_is_named_long_before_the_boot_timeout() {
    let bench = Bench::new();
    let mut line = bench.command(&["run", "--nodes", "2"], &["true"]);
    line.env("STAND_IN", "silent@1");
    let start = Instant::now();
    let out = bench.end(bench.spawn(line));
    let said = text(&out.stderr);
    assert!(
        said.contains("node 1 has not joined the rack within 8 s"),
        "{said}"
    );
    assert!(start.elapsed() < Duration::from_secs(20));
    bench.assert_nothing_left();
}

#[test]
fn a_node_that_dies_freezes_the_vm_and_is_named() {
    let bench = Bench::new();
    for victim in [0, 1, 2] {
        let named = format!("node {victim} was killed");
        let up = ["up", "--name", "loss", "--nodes", "3", "--cores", "1"];
        let out = bench.viaduct(&up, &[]);
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        let mut exec = bench.spawn(bench.command(
            &["exec", "--name", "loss"],
            &["sh", "-c", "echo; sleep 1000"],
        ));
        let mut first = [0];
        let mut stdout = exec.stdout.take().expect("piped");
        std::io::Read::read_exact(&mut stdout, &mut first).expect("it runs");
        let start = Instant::now();
        bench.kill_node(victim);
        let out = bench.end(exec);
        let said = text(&out.stderr);
        assert!(start.elapsed() < Duration::from_secs(10));
        assert_eq!(out.status.code(), Some(125), "{said}");
        assert!(said.contains(&named), "{said}");

        let out = bench.viaduct(&["status", "--name", "loss"], &[]);
        let report = text(&out.stdout);
        assert!(
            report.contains("frozen") && report.contains(&named),
            "{report}"
        );
        let out = bench.viaduct(&["down", "--name", "loss"], &[]);
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        bench.assert_nothing_left();
    }
}

#[test]
fn racks_that_cannot_be_are_refused_in_one_line() {
    let bench = Bench::new();
    let idle = bench.file("idle.toml", "[[node]]\ncores = 1\n[[node]]\ncores = 0\n");
    let none = bench.file("none.toml", "node = []\n");
    let small = bench.file("small.toml", "[[node]]\ncores = 1\nmemory = \"64M\"\n");
    let wrong = bench.file("wrong.toml", "[[node]]\ncores = \"many\"\n");
    for (words, cause) in [
        (&["--rack", &idle][..], "node 1 has no cores"),
        (&["--rack", &none], "at least one node"),
        (&["--rack", &small], "--memory 64M or less"),
        (&["--rack", &wrong], "line 2"),
        (&["--rack", "/nonexistent"], "/nonexistent"),
        (&["--rack", &small, "--nodes", "2"], "cannot be used with"),
        (&["--nodes", "0"], "--nodes 1"),
        (&["--nodes", "9"], "--nodes 8"),
        (&["--nodes", "4294967295"], "--nodes 8"),
        (&["--nodes", "2", "--cores", "0"], "node 0 has no cores"),
        (&["--nodes", "8", "--cores", "64"], "254"),
        (&["--nodes", "2", "--vcpus", "33"], "--vcpus 32 or fewer"),
        (
            &["--nodes", "2", "--node-memory", "32M"],
            "--memory 64M or less",
        ),
        (&["--nodes", "2", "--node-memory", "65M"], "64M or 66M"),
        (&["--nodes", "2", "--node-memory", "0"], "node 0"),
    ] {
        let out = bench.viaduct(&[&["run"], words].concat(), &["true"]);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(125), "{words:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{words:?}: {said}");
        assert!(said.contains(cause), "{words:?}: {said}");
        assert_eq!(text(&out.stdout), "");
    }
    bench.assert_nothing_left();
}
