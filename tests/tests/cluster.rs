//! The cluster's log and its control role: replicas that stay equal, whoever
//! dies, and an operator who is told the truth.

use rustix::process::Signal;
use serde_json::Value;
use viaduct_tests::{COLUMNS, ROWS, Terminal, Up};

fn start(name: &'static str, words: &[&str]) -> Up {
    let fixed = ["--cores", "1", "--memory", "256M"];
    Up::start(name, &[words, &fixed].concat())
}

fn is_cordoned(status: &Value, node: usize) -> bool {
    status["cluster"]["nodes"][node]["cordoned"] == true
}

#[test]
fn two_nodes_without_control_have_equal_tables_and_a_fixed_shape() {
    let rack = start("pair", &["--nodes", "2"]);
    let status = rack.wait_for_equal_replicas(&[0, 1]);
    let cluster = &status["cluster"];
    assert_eq!(cluster["controller"], Value::Null);
    for part in ["desired", "granted", "seen"] {
        let amount = &cluster["vm"][part];
        assert_eq!(amount["vcpus"], 2, "{part}");
        assert_eq!(amount["memory_bytes"], 256 << 20, "{part}");
    }
    assert_eq!(cluster["vm"]["homes"], serde_json::json!([0, 1]));
    rack.refused(
        &["node", "cordon", "1"],
        125,
        &["no control node", "--control 1"],
    );
    rack.refused(&["node", "join", "1"], 3, &["node 1", "can't bring"]);
    let refused = rack.console(&["node", "join", "1", "--json"]);
    assert_eq!(refused.status, 3);
    let refused: Value = serde_json::from_slice(&refused.stdout).expect("a change");
    assert_eq!(refused["verdict"], "refused", "{refused}");
    let reason = refused["reason"].as_str().expect("why");
    assert!(reason.contains("node 1"), "{reason}");
    rack.assert_alive();
    rack.down();
}

#[test]
fn a_control_node_may_die_and_come_back_and_nothing_decided_is_lost() {
    let rack = start("trio", &["--nodes", "2", "--control", "1"]);
    let status = rack.wait_for_equal_replicas(&[0, 1, 2]);
    assert_eq!(status["cluster"]["controller"], 2);
    assert_eq!(status["nodes"][2]["role"], "control");
    assert_eq!(status["nodes"][2]["vcpus"], 0);
    rack.console(&["node", "cordon", "1"]).well();

    let busy = ["sh", "-c", "while :; do echo; sleep 0.1; done"];
    let busy = rack.bench.exec(rack.name, &busy).start();
    busy.wait_for_output();
    for term in [2, 3] {
        rack.kill(2);
        rack.assert_alive();
        let status = rack.wait_for_equal_replicas(&[0, 1]);
        assert!(is_cordoned(&status, 1), "{status:#}");
        rack.refused(&["node", "uncordon", "1"], 125, &["node 2", "node join 2"]);
        // What is only looked at needs nobody who decides.
        assert!(
            rack.console(&["events"])
                .well()
                .out()
                .contains("cordon node 1")
        );

        let dry = rack.json(&["node", "join", "2", "--dry-run"]);
        assert_eq!(dry["verdict"], "applied");
        assert_eq!(rack.json(&["nodes"])[2]["state"], "stopped", "it was dry");
        rack.console(&["node", "join", "2"]).well();
        rack.bench.wait_until("it is in charge again", || {
            rack.json(&["status"])["cluster"]["term"] == term
        });
        let status = rack.wait_for_equal_replicas(&[0, 1, 2]);
        assert!(is_cordoned(&status, 1), "{status:#}");
        assert_eq!(status["cluster"]["controller"], 2);
        assert_eq!(status["vm"]["state"], "running");
    }
    rack.console(&["node", "uncordon", "1"]).well();
    let status = rack.wait_for_equal_replicas(&[0, 1, 2]);
    assert!(!is_cordoned(&status, 1));
    rack.refused(&["node", "join", "2"], 3, &["node 2", "already"]);
    busy.signal(Signal::KILL);
    drop(busy.finish());
    rack.down();
}

#[test]
fn another_control_node_takes_over() {
    let rack = start("heirs", &["--nodes", "1", "--control", "2"]);
    let first = rack.wait_for_equal_replicas(&[0, 1, 2]);
    let first = first["cluster"]["controller"]
        .as_u64()
        .expect("one decides");
    let other = 3 - first;
    rack.kill(usize::try_from(first).expect("small"));
    rack.bench.wait_until("the other takes over", || {
        rack.json(&["status"])["cluster"]["controller"].as_u64() == Some(other)
    });
    rack.console(&["node", "cordon", "0"]).well();
    let living = [0, usize::try_from(other).expect("small")];
    assert!(is_cordoned(&rack.wait_for_equal_replicas(&living), 0));
    rack.assert_alive();
    rack.down();
}

#[test]
fn top_shows_the_rack_as_it_changes() {
    let rack = start("seen", &["--nodes", "2", "--control", "1"]);
    let _ = rack.wait_for_equal_replicas(&[0, 1, 2]);
    let mut terminal = Terminal::start(&rack.bench, &["top", "--name", rack.name]);
    let mut screen = vt100::Parser::new(ROWS, COLUMNS, 0);
    // What the guest has started gets into the tables a moment later.
    let facts = [
        "q quits",
        "vm running  node 2 rules",
        "desired 2 vCPUs 256M  granted 2 vCPUs 256M  seen 2 vCPUs 256M",
        "0     data",
        "2     control",
        "0:0 1:1",
        "from 0",
        "finished",
    ];
    let shown = terminal.expect_screen(&mut screen, |shown| {
        facts.iter().all(|fact| shown.contains(fact))
    });
    // Half of the memory is each node's.
    let map = "0".repeat(36) + &"1".repeat(36);
    assert!(shown.contains(&map), "{shown}");
    let coloured = (0..ROWS).flat_map(|row| (0..COLUMNS).map(move |column| (row, column)));
    let colours = coloured.filter_map(|(row, column)| screen.screen().cell(row, column));
    let colours = colours.filter(|cell| cell.contents() == "1");
    assert!(
        colours
            .clone()
            .any(|cell| cell.fgcolor() != vt100::Color::Default)
    );

    // For programs, a line each.
    let lines = rack.console(&["top", "--json", "--count", "2"]).well();
    assert_eq!(lines.out().lines().count(), 2);
    for line in lines.out().lines() {
        let shown: Value = serde_json::from_str(line).expect("JSON");
        assert_eq!(shown["status"]["vm"]["state"], "running");
        let exits = shown["exits_per_second"].as_array().expect("by node");
        assert_eq!(exits.len(), 3);
    }

    rack.console(&["node", "cordon", "1"]).well();
    terminal.expect_screen(&mut screen, |shown| shown.contains("ready, cordoned"));
    rack.kill(2);
    terminal.expect_screen(&mut screen, |shown| {
        shown.contains("nobody rules") && shown.contains("stopped")
    });
    // It counts: vCPUs that idle still exit now and then.
    terminal.expect_screen(&mut screen, |shown| {
        let line = shown
            .lines()
            .find(|line| line.starts_with("0 "))
            .unwrap_or("");
        let rate = line
            .split_whitespace()
            .last()
            .and_then(|rate| rate.parse().ok());
        rate.is_some_and(|rate: u64| rate > 0)
    });
    terminal.type_in("q");
    let (status, _) = terminal.finish();
    assert_eq!(status.code(), Some(0));
    rack.down();
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let rack = start("no", &["--nodes", "2", "--control", "1"]);
    let before = rack.wait_for_equal_replicas(&[0, 1, 2]);
    let bad = rack
        .bench
        .file("bad.toml", b"[[constraint]]\nname = \"x\"\nkind = \"y\"\n");
    let bad = bad.to_str().expect("plain letters");
    let contrary = b"[[constraint]]\nname = \"a\"\nkind = \"pack\"\nweight = 1\n\
        [[constraint]]\nname = \"b\"\nkind = \"spread\"\nweight = 1\n";
    let contrary = rack.bench.file("contrary.toml", contrary);
    let contrary = contrary.to_str().expect("plain letters");
    let refusals: [(&[&str], i32, &[&str]); 11] = [
        (&["resize", "--vcpus", "0"], 3, &["nearest is 1 vCPUs"]),
        (&["resize", "--vcpus", "99"], 3, &["nearest is 2 vCPUs"]),
        (&["resize", "--memory", "64M"], 3, &["nearest", "256M"]),
        (&["resize", "--memory", "255M"], 3, &["256M or 384M"]),
        (&["resize"], 125, &["--vcpus"]),
        (&["node", "cordon", "9"], 3, &["no node 9"]),
        (&["node", "leave", "0"], 3, &["drain it first"]),
        (&["node", "drain", "0"], 3, &["drain", "node 0"]),
        (&["job", "cancel", "77"], 3, &["no job 77"]),
        (
            &["policy", "load", bad],
            3,
            &["line 3", "no kind \"y\"", "stays"],
        ),
        (
            &["policy", "load", contrary],
            3,
            &["line 5", "contradicts", "\"a\""],
        ),
    ];
    for (words, status, facts) in refusals {
        rack.refused(words, status, facts);
    }
    let policy = rack.console(&["policy", "show"]).well().out();
    assert!(policy.contains("boot-vcpu"), "{policy}");
    let after = rack.wait_for_equal_replicas(&[0, 1, 2]);
    for part in ["vm", "nodes"] {
        assert_eq!(after["cluster"][part], before["cluster"][part]);
    }
    // What is as asked already is done.
    rack.console(&["resize", "--vcpus", "2", "--memory", "256M"])
        .well();
    rack.assert_alive();
    rack.down();
}
