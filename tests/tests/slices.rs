//! Memory that moves between nodes while a guest runs.

use serde_json::Value;
use viaduct_tests::{Up, litmus};

const MEMORY: u64 = 256 << 20;

fn up(name: &'static str, words: &[&str]) -> Up {
    Up::start(name, &[&["--memory", "256M"], words].concat())
}

/// What the guest and the rack must say at the end.
fn down(up: Up) {
    up.assert_healthy();
    up.down();
}

fn bytes(node: &Value, what: &str) -> u64 {
    let value = node[what].as_u64();
    value.unwrap_or_else(|| panic!("no {what} in {node}"))
}

/// Moves memory, until it is there.
fn slices(up: &Up, from: u16, to: u16, count: &[&str]) {
    let (from, to) = (from.to_string(), to.to_string());
    let fixed = ["direct", "slices", "--timeout", "280"];
    let words = ["--from", &from, "--to", &to];
    let done = up.console(&[&fixed[..], &words, count].concat()).well();
    assert_eq!(done.out(), "");
}

fn gives(up: &Up) -> Vec<u64> {
    let nodes = up.json(&["memory"]);
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
    let up = up("fro", &["--nodes", "2", "--cores", "1"]);
    let program = std::fs::read(litmus()).expect("readable");
    let install = "cat >/tmp/litmus; chmod +x /tmp/litmus";
    let done = up
        .bench
        .exec(up.name, &["sh", "-c", install])
        .input(program);
    done.finish().well();
    assert_eq!(gives(&up), [MEMORY / 2, MEMORY / 2]);

    let patterns = up.bench.exec(up.name, &["sh", "-c", PATTERNS]).start();
    let code = up.bench.exec(up.name, &["sh", "-c", CODE]).start();
    // Kernel text, page tables, per-CPU memory and the agent's buffers are
    // among what moves.
    for _ in 0..2 {
        slices(&up, 0, 1, &[]);
        assert_eq!(gives(&up), [0, MEMORY]);
        slices(&up, 1, 0, &[]);
        assert_eq!(gives(&up), [MEMORY, 0]);
    }
    slices(&up, 0, 1, &["--count", "5"]);
    assert_eq!(gives(&up), [MEMORY - (10 << 20), 10 << 20]);

    assert_eq!(up.guest(&["touch", "/tmp/over"]), "");
    patterns.finish().well();
    let said = code.finish();
    assert_eq!(said.status, 0, "{}{}", said.out(), said.err());
    let programs = said.out().matches("ok    ").count();
    assert!(
        programs > 0 && programs.is_multiple_of(17),
        "{}",
        said.out()
    );

    let nodes = up.json(&["memory"]);
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
        let done = up.console(&[&["direct", "slices"], words].concat());
        assert_eq!(done.status, 125, "{words:?}");
        assert!(done.err().contains(why), "{words:?}: {}", done.err());
    }
    down(up);
}

fn last_job(up: &Up) -> Value {
    let jobs = up.json(&["job", "list"]);
    jobs.as_array().expect("jobs").last().expect("one").clone()
}

/// What each data node gives, in the tables and in truth.
#[track_caller]
fn assert_gives(up: &Up, expected: [u64; 2]) {
    assert_eq!(gives(up)[..2], expected);
    let nodes = up.json(&["status"])["cluster"]["nodes"].clone();
    let said = [0, 1].map(|node: usize| bytes(&nodes[node]["gives"], "memory_bytes"));
    assert_eq!(said, expected);
}

/// Begins to drain node 1, and waits until some of its memory has gone.
fn begin_drain(up: &Up) -> String {
    let asked = up.console(&["node", "drain", "1", "--no-wait"]).well();
    up.bench
        .wait_until("some memory has moved", || gives(up)[1] < MEMORY / 2);
    asked.out().trim().replace("job ", "")
}

/// Once a job has emptied it, the loss of a node goes unnoticed.
#[test]
fn a_node_is_drained_by_a_job_and_killed_and_the_guest_goes_on() {
    let rack = ["--nodes", "2", "--cores", "2", "--control", "1"];
    let up = up("leave", &[&rack[..], &["--vcpus", "2"]].concat());
    let load = up.bench.exec(up.name, &["sh", "-c", PATTERNS]).start();
    let half = [MEMORY / 2; 2];
    assert_gives(&up, half);
    let plan = up.json(&["node", "drain", "1", "--dry-run"])["plan"].clone();
    assert_eq!(bytes(&plan, "memory_moved_bytes"), MEMORY / 2, "{plan:#}");
    assert_gives(&up, half);

    // Cancelled in mid-way: what has gone comes back.
    let id = begin_drain(&up);
    up.console(&["job", "cancel", &id]).well();
    up.refused(&["job", "wait", &id], 4, &["rolled-back", "cancelled"]);
    assert_gives(&up, half);

    // Who decides is killed in mid-way, and goes on with it when it is back.
    let id = begin_drain(&up);
    up.kill(2);
    assert_eq!(last_job(&up)["ended"], false, "it was in mid-way");
    up.console(&["node", "join", "2"]).well();
    up.console(&["job", "wait", &id]).well();
    assert_gives(&up, [MEMORY, 0]);
    assert_eq!(up.json(&["nodes"])[1]["vcpus"], 0);

    up.console(&["node", "uncordon", "1"]).well();
    up.console(&["rebalance"]).well();
    assert_gives(&up, half);
    assert_eq!(up.json(&["nodes"])[1]["vcpus"], 1);

    up.console(&["node", "drain", "1"]).well();
    assert_gives(&up, [MEMORY, 0]);
    up.kill(1);
    assert_eq!(up.guest(&["nproc"]), "2\n");
    assert_eq!(up.json(&["status"])["vm"]["state"], "running");
    assert_eq!(up.guest(&["touch", "/tmp/over"]), "");
    load.finish().well();
    down(up);
}

#[test]
fn a_node_that_is_full_says_so() {
    let words = ["--nodes", "2", "--cores", "1", "--node-memory", "130M"];
    let up = up("full", &words);
    let done = up.console(&["direct", "slices", "--from", "0", "--to", "1"]);
    assert_eq!(done.status, 125);
    let said = done.err();
    assert!(said.contains("node 1 has no room for more"), "{said}");
    assert!(said.contains("--node-memory"), "{said}");
    assert_eq!(gives(&up).iter().sum::<u64>(), MEMORY);
    assert_eq!(gives(&up)[1], 130 << 20);
    down(up);
}
