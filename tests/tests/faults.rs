//! What goes wrong with a rack of several nodes: nodes that can't join, and
//! nodes that die while the VM runs. Nothing hangs, the node and the cause are
//! named, and nothing stays.

use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use viaduct_tests::{Bench, Finished};

/// Two nodes with a vCPU and half of the memory each.
const TWO: [&str; 8] = [
    "--nodes", "2", "--cores", "1", "--memory", "256M", "--rootfs", "busybox",
];

/// A rack that is up, as its nodes and its console show it.
struct Up<'a> {
    bench: &'a Bench,
    name: &'static str,
}

impl<'a> Up<'a> {
    fn start(bench: &'a Bench, name: &'static str, words: &[&str]) -> Self {
        let words = [words, &["--boot-timeout", "280"]].concat();
        bench.up(name, &words);
        Self { bench, name }
    }

    fn json(&self, what: &str) -> Value {
        let done = self.bench.viaduct([what, "--name", self.name, "--json"]);
        serde_json::from_slice(&done.well().stdout).expect("JSON")
    }

    fn send(&self, node: usize, signal: Signal) {
        let pid = self.json("nodes")[node]["pid"].as_i64();
        let pid = pid.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        kill_process(pid.expect("a process"), signal).expect("it runs");
    }

    fn wait_for(&self, what: &str, at: &str, value: &str) {
        let is_so = || self.json("status").pointer(at).and_then(Value::as_str) == Some(value);
        self.bench.wait_until(what, is_so);
    }

    fn exits(&self) -> Vec<u64> {
        let vcpus = self.json("vcpus");
        let vcpus = vcpus.as_array().expect("a list");
        let exits = |vcpu: &Value| vcpu["counters"]["exits"].as_u64().expect("a number");
        vcpus.iter().map(exits).collect()
    }

    fn log(&self) -> String {
        let path = self.bench.path("run").join("viaduct").join(self.name);
        std::fs::read_to_string(path.join("log")).expect("a log")
    }

    /// Takes the rack down, which no dead or frozen node may hold up.
    fn down(self) {
        let start = Instant::now();
        self.bench.down(self.name);
        assert!(start.elapsed() < Duration::from_secs(10));
        self.bench.assert_nothing_left();
    }
}

#[track_caller]
fn assert_failed(done: &Finished, facts: &[&str]) {
    let said = done.err();
    assert_eq!(done.status, 125, "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    for fact in facts {
        assert!(said.contains(fact), "no {fact:?} in {said}");
    }
}

/// Waits until the VM is frozen, and checks that it is, and that all say why.
#[track_caller]
fn assert_frozen(rack: &Up<'_>, facts: &[&str]) {
    rack.wait_for("the VM freezes", "/vm/state", "frozen");
    let reason = rack.json("status");
    let reason = reason["vm"]["reason"].as_str().expect("a reason");
    for fact in facts {
        assert!(reason.contains(fact), "no {fact:?} in {reason}");
    }
    assert_failed(&rack.bench.exec(rack.name, &["true"]).finish(), facts);
}

#[test]
fn a_killed_node_freezes_the_vm() {
    let bench = Bench::new();
    for (victim, peer) in [(1, 0), (0, 1)] {
        let named = format!("node {victim} was killed");
        let facts = [named.as_str(), "frozen", "1 vCPU(s) and 128M"];
        let rack = Up::start(&bench, "loss", &TWO);
        // Both vCPUs have something to do when it happens.
        let script = "while :; do :; done & while :; do echo; done";
        let busy = bench.exec("loss", &["sh", "-c", script]).start();
        busy.wait_for_output();
        rack.send(victim, Signal::KILL);
        assert_failed(&busy.finish(), &facts);
        assert_frozen(&rack, &facts);
        let noticed = format!("node {peer}: WARN: node {victim} is lost");
        bench.wait_until("the peer notices", || rack.log().contains(&noticed));
        // No vCPU enters the guest any more.
        let before = rack.exits();
        std::thread::sleep(Duration::from_millis(600));
        assert_eq!(rack.exits(), before);
        rack.down();
    }
}

#[test]
fn a_killed_node_ends_run_in_one_line() {
    let bench = Bench::new();
    let words = [&["run", "--name", "short"], &TWO[..]].concat();
    let script = "echo; while :; do :; done";
    let running = bench.line(words).guest(["sh", "-c", script]).start();
    running.wait_for_output();
    let rack = Up {
        bench: &bench,
        name: "short",
    };
    rack.send(1, Signal::KILL);
    assert_failed(&running.finish(), &["node 1 was killed", "frozen"]);
    bench.assert_nothing_left();
}

#[test]
fn a_silent_node_is_put_out_and_stops_itself_when_it_wakes_up() {
    let bench = Bench::new();
    let rack = Up::start(&bench, "mute", &TWO);
    // It asks the hypervisor something all the time: none of that may go on.
    let script = "while :; do usleep 1; done & while :; do echo; done";
    let busy = bench.exec("mute", &["sh", "-c", script]).start();
    busy.wait_for_output();
    rack.send(1, Signal::STOP);
    // Its process lives: only heartbeats tell.
    assert_frozen(&rack, &["node 1 gave no sign of life", "frozen"]);
    rack.wait_for("it is put out", "/nodes/1/state", "fenced");
    let noticed = "node 0: WARN: node 1 is lost";
    bench.wait_until("the peer notices", || rack.log().contains(noticed));
    let exits = rack.exits();
    rack.send(1, Signal::CONT);
    rack.wait_for("it stops itself", "/nodes/1/state", "stopped");
    assert!(
        rack.log().contains("have put this one out"),
        "{}",
        rack.log()
    );
    // The exit in which it found out, and none after.
    let now = rack.exits();
    assert!(now[1] <= exits[1] + 1, "{now:?} after {exits:?}");
    assert_eq!(now[0], exits[0]);
    assert_failed(&busy.finish(), &["node 1 gave no sign of life", "frozen"]);
    rack.down();
}

#[test]
fn a_vm_goes_on_without_a_node_that_gives_it_nothing() {
    let bench = Bench::new();
    let spare = "[[node]]\ncores = 1\n[[node]]\ncores = 1\nmemory = \"0\"\n";
    let spare = bench.file("spare.toml", spare.as_bytes());
    let spare = spare.to_str().expect("plain letters");
    for signal in [Signal::KILL, Signal::STOP] {
        let words = ["--rack", spare, "--vcpus", "1", "--memory", "256M"];
        let words = [&words[..], &["--rootfs", "busybox"]].concat();
        let rack = Up::start(&bench, "spare", &words);
        rack.send(1, signal);
        let noticed = "node 0: WARN: node 1 is lost";
        bench.wait_until("the peer notices", || rack.log().contains(noticed));
        let done = bench.exec("spare", &["echo", "alive"]).finish().well();
        assert_eq!(done.out(), "alive\n");
        assert_eq!(rack.json("status")["vm"]["state"], "running");
        let state = if signal == Signal::KILL {
            "stopped"
        } else {
            "fenced"
        };
        assert_eq!(rack.json("nodes")[1]["state"], state);
        rack.down();
    }
}

#[test]
fn nonsense_in_shared_memory_is_refused_and_counted() {
    let bench = Bench::new();
    let line = bench.line([&["up", "--name", "mad"], &TWO[..]].concat());
    let line = line.env("VIADUCT_FAULT", "nonsense@1");
    line.finish().well();
    let rack = Up {
        bench: &bench,
        name: "mad",
    };
    let nodes = rack.json("memory");
    let garbage = |node: usize| {
        let found = &nodes[node]["counters"]["garbage"];
        found.as_u64().expect("a number")
    };
    // The devices' node: a question of a vCPU that there is not, and one that
    // is none, unless its vCPU has asked something better in time.
    assert!((1..=2).contains(&garbage(0)), "{nodes}");
    // The other: a signal that is none.
    assert_eq!(garbage(1), 1, "{nodes}");
    let done = bench.exec("mad", &["echo", "alive"]).finish().well();
    assert_eq!(done.out(), "alive\n");
    rack.down();
}

#[test]
fn a_node_that_cannot_take_part_is_named_with_the_cause() {
    let bench = Bench::new();
    for (fault, facts) in [
        ("version@1", ["node 1", "control region has version"]),
        ("header@1", ["memory region of node 1", "no header"]),
        ("cut@1", ["memory region of node 1", "says kind 0"]),
        ("owner@1", ["memory region of node 1", "missing"]),
        ("size@1", ["memory region of node 1", "promises"]),
        (
            "short@1",
            ["memory region of node 1", "smaller than its share"],
        ),
        ("doorbell@1", ["node 1", "doorbell server is gone"]),
        ("twice@1", ["node 1", "joined already"]),
        ("atomics@1", ["node 1", "not atomic"]),
        ("paused@1", ["node 1", "has not joined"]),
    ] {
        let words = [&["run"], &TWO[..]].concat();
        let line = bench.line(words).guest(["true"]);
        let line = line
            .env("VIADUCT_FAULT", fault)
            // Faults of emulators are what is tried.
            .env("VIADUCT_ACCEL", "tcg");
        let done = line.finish();
        assert_failed(&done, &facts);
        let said = done.err();
        assert!(!said.contains(" { "), "{fault}: not a sentence: {said}");
        bench.assert_nothing_left();
    }
}
