//! Memory that moves between nodes while a guest runs.

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use viaduct_tests::{Bench, alarms, litmus};

const MEMORY: u64 = 256 << 20;

fn up(name: &str, words: &[&str]) -> Bench {
    let bench = Bench::new();
    let fixed = ["--rootfs", "busybox", "--memory", "256M"].into_iter();
    let words: Vec<_> = fixed.chain(words.iter().copied()).collect();
    bench.up(name, &words);
    bench
}

/// What the guest and the rack must say at the end.
fn down(bench: &Bench, name: &str) {
    let log = bench.exec(name, &["dmesg"]).finish().well().out();
    assert_eq!(alarms(&log), Vec::<&str>::new());
    bench.down(name);
    bench.assert_nothing_left();
}

fn shown(bench: &Bench, name: &str, what: &str) -> Value {
    let done = bench.viaduct([what, "--json", "--name", name]).well();
    serde_json::from_slice(&done.stdout).expect("JSON")
}

fn bytes(node: &Value, what: &str) -> u64 {
    let value = node[what].as_u64();
    value.unwrap_or_else(|| panic!("no {what} in {node}"))
}

/// Moves memory, until it is there.
fn slices(bench: &Bench, name: &str, from: u16, to: u16, count: &[&str]) {
    let (from, to) = (from.to_string(), to.to_string());
    let fixed = ["direct", "slices", "--name", name, "--timeout", "280"];
    let words = ["--from", &from, "--to", &to];
    let done = bench.viaduct([&fixed[..], &words, count].concat()).well();
    assert_eq!(done.out(), "");
}

fn gives(bench: &Bench, name: &str) -> Vec<u64> {
    let nodes = shown(bench, name, "memory");
    let nodes = nodes.as_array().expect("nodes");
    nodes
        .iter()
        .map(|node| bytes(node, "memory_bytes"))
        .collect()
}

/// Fills a tenth of the memory with what only this guest knows, and says
/// the sum of it again and again; any byte that got lost changes it.
const PATTERNS: &str = "head -c 24000000 /dev/urandom >/tmp/pattern
    sha256sum /tmp/pattern >/tmp/sum
    until [ -e /tmp/over ]; do sha256sum -c /tmp/sum || exit 1
        cp /tmp/pattern /tmp/copy; cmp /tmp/pattern /tmp/copy || exit 1; rm /tmp/copy; done
    sha256sum -c /tmp/sum";

/// Code that is written, run and rewritten all the time.
const CODE: &str = "until [ -e /tmp/over ]; do /tmp/litmus 20 0,1 || exit 1; done";

#[test]
fn all_memory_moves_to_and_fro_while_the_guest_computes_and_makes_code() {
    let bench = up("fro", &["--nodes", "2", "--cores", "1"]);
    let program = std::fs::read(litmus()).expect("readable");
    let install = "cat >/tmp/litmus; chmod +x /tmp/litmus";
    let done = bench.exec("fro", &["sh", "-c", install]).input(program);
    done.finish().well();
    assert_eq!(gives(&bench, "fro"), [MEMORY / 2, MEMORY / 2]);

    let patterns = bench.exec("fro", &["sh", "-c", PATTERNS]).start();
    let code = bench.exec("fro", &["sh", "-c", CODE]).start();
    // Kernel text, page tables, per-CPU memory and the agent's buffers are
    // among what moves.
    for _ in 0..2 {
        slices(&bench, "fro", 0, 1, &[]);
        assert_eq!(gives(&bench, "fro"), [0, MEMORY]);
        slices(&bench, "fro", 1, 0, &[]);
        assert_eq!(gives(&bench, "fro"), [MEMORY, 0]);
    }
    slices(&bench, "fro", 0, 1, &["--count", "5"]);
    assert_eq!(gives(&bench, "fro"), [MEMORY - (10 << 20), 10 << 20]);

    let over = bench.exec("fro", &["touch", "/tmp/over"]).finish();
    over.well();
    patterns.finish().well();
    let said = code.finish();
    assert_eq!(said.status, 0, "{}{}", said.out(), said.err());
    let programs = said.out().matches("ok    ").count();
    assert!(
        programs > 0 && programs.is_multiple_of(17),
        "{}",
        said.out()
    );

    let nodes = shown(&bench, "fro", "memory");
    let taken = [2 * MEMORY, MEMORY / 2 + MEMORY + (10 << 20)];
    for (node, taken) in nodes.as_array().expect("nodes").iter().zip(taken) {
        // Where the guest was told that it is stays.
        assert_eq!(bytes(node, "memory_home_bytes"), MEMORY / 2);
        assert_eq!(bytes(node, "memory_taken_bytes"), taken);
        assert!(bytes(node, "memory_copying_us") > 0);
    }
    for (words, why) in [
        (&["--from", "0", "--to", "0"][..], "is there already"),
        (&["--from", "0", "--to", "2"], "there is no node 2"),
        (&["--from", "7", "--to", "0"], "there is no node 7"),
    ] {
        let done = bench.viaduct([&["direct", "slices", "--name", "fro"], words].concat());
        assert_eq!(done.status, 125, "{words:?}");
        assert!(done.err().contains(why), "{words:?}: {}", done.err());
    }
    down(&bench, "fro");
}

/// Once its memory and its vCPU have gone elsewhere, the loss of a node goes
/// unnoticed.
#[test]
fn a_node_that_gives_nothing_any_more_may_be_killed() {
    let rack = ["--nodes", "3", "--cores", "2", "--control", "1"];
    let bench = up("leave", &[&rack[..], &["--vcpus", "3"]].concat());
    let load = bench.exec("leave", &["sh", "-c", PATTERNS]).start();
    slices(&bench, "leave", 2, 1, &[]);
    bench
        .viaduct(["vcpu", "move", "4", "--to", "1", "--name", "leave"])
        .well();
    let nodes = shown(&bench, "leave", "nodes");
    assert_eq!(bytes(&nodes[2], "memory_bytes"), 0);
    assert_eq!(nodes[2]["vcpus"], 0);
    let pid = nodes[2]["pid"].as_i64();
    let pid = pid.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
    kill_process(pid.expect("a process"), Signal::KILL).expect("it runs");
    bench.wait_until("node 2 to be put out", || {
        shown(&bench, "leave", "nodes")[2]["state"] == "stopped"
    });
    let online = bench.exec("leave", &["nproc"]).finish().well().out();
    assert_eq!(online, "3\n");
    assert_eq!(shown(&bench, "leave", "status")["vm"]["state"], "running");
    // What is left can still move.
    slices(&bench, "leave", 1, 0, &["--count", "3"]);
    let over = bench.exec("leave", &["touch", "/tmp/over"]).finish();
    over.well();
    load.finish().well();
    down(&bench, "leave");
}

#[test]
fn a_node_that_is_full_says_so() {
    let words = ["--nodes", "2", "--cores", "1", "--node-memory", "130M"];
    let bench = up("full", &words);
    let done = bench.viaduct([
        "direct", "slices", "--from", "0", "--to", "1", "--name", "full",
    ]);
    assert_eq!(done.status, 125);
    let said = done.err();
    assert!(said.contains("node 1 has no room for more"), "{said}");
    assert!(said.contains("--node-memory"), "{said}");
    assert_eq!(gives(&bench, "full").iter().sum::<u64>(), MEMORY);
    assert_eq!(gives(&bench, "full")[1], 130 << 20);
    down(&bench, "full");
}
