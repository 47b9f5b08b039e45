//! One guest on several nodes: whether they are one machine to it, and what
//! operators are shown of that.

use std::fmt::Write;
use std::time::Duration;

use serde_json::Value;
use viaduct_tests::{Bench, Up, alarms, litmus};

/// A rack that is up, with the litmus programs in the guest.
fn up(name: &str, words: &[&str]) -> Bench {
    let bench = Bench::new();
    let fixed = ["--rootfs", "busybox", "--memory", "512M"].into_iter();
    let words: Vec<_> = fixed.chain(words.iter().copied()).collect();
    bench.up(name, &words);
    let program = std::fs::read(litmus()).expect("readable");
    let install = "cat >/tmp/litmus; chmod +x /tmp/litmus";
    let done = bench.exec(name, &["sh", "-c", install]).input(program);
    done.finish().well();
    bench
}

fn agree(bench: &Bench, name: &str, rounds: &str, cpus: &str) {
    let done = bench.exec(name, &["/tmp/litmus", rounds, cpus]).finish();
    assert_eq!(done.status, 0, "{}{}", done.out(), done.err());
    assert_eq!(done.out().matches("ok    ").count(), 17, "{}", done.out());
}

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

fn counter(of: &Value, name: &str) -> u64 {
    let value = of["counters"][name].as_u64();
    value.unwrap_or_else(|| panic!("no {name} in {of}"))
}

#[test]
fn two_nodes_are_one_machine_and_say_what_they_do() {
    let bench = up("two", &["--nodes", "2", "--cores", "1"]);
    agree(&bench, "two", "200", "0,1");

    let nodes = shown(&bench, "two", "memory");
    for (here, there) in [(0, 1), (1, 0)] {
        let node = &nodes[here];
        assert!(node["ipis_to"][there].as_u64() > Some(0), "{node}");
        assert_eq!(node["memory_bytes"], 256 << 20);
        let mapped = counter(node, "memory_mapped_bytes");
        let large = counter(node, "memory_mapped_large_bytes");
        let remote = counter(node, "memory_mapped_remote_bytes");
        assert!(mapped <= 512 << 20 && large <= mapped, "{node}");
        assert!(remote > 0 && remote <= 256 << 20, "{node}");
        for name in [
            "shootdowns",
            "code_to_data",
            "data_to_code",
            "moves",
            "refreshes",
        ] {
            assert!(counter(node, name) > 0, "no {name} in {node}");
        }
        let asked = counter(node, "revocations_asked");
        let served = counter(&nodes[there], "revocations_served");
        // A late core may serve the same once more.
        assert!(asked > 0 && served >= asked, "{asked} and {served}");
    }
    let vm = &shown(&bench, "two", "status")["vm"];
    let metadata = vm["metadata_bytes"].as_u64().expect("a number");
    // At most a hundredth, also of a small VM.
    assert!(0 < metadata && metadata * 100 <= 512 << 20, "{vm}");
    let vcpus = shown(&bench, "two", "vcpus");
    assert_eq!(
        (&vcpus[0]["node"], &vcpus[1]["node"]),
        (&0.into(), &1.into())
    );
    assert_eq!(counter(&vcpus[0], "forwarded"), 0, "it has the devices");
    assert!(counter(&vcpus[1], "forwarded") > 0);
    down(&bench, "two");
}

#[test]
fn all_vcpus_of_two_nodes_are_one_machine() {
    let bench = up("four", &["--nodes", "2", "--cores", "2"]);
    agree(&bench, "four", "50", "0,1,2,3");
    down(&bench, "four");
}

/// Faults of the nested tables, and changes of what may be executed and what
/// written, on all nodes so far.
fn changes(rack: &Up) -> (u64, u64) {
    let all = |what, names: &[&str]| {
        let rows = rack.json(&[what]);
        let rows = rows.as_array().expect("a list").iter();
        rows.flat_map(|row| names.iter().map(|name| counter(row, name)))
            .sum()
    };
    let transitions = ["code_to_data", "data_to_code", "moves"];
    (all("vcpus", &["exit_npf"]), all("memory", &transitions))
}

#[test]
fn a_guest_at_rest_and_one_that_computes_cost_no_faults() {
    const WINDOW: Duration = Duration::from_secs(5);
    let rack = Up::start(
        "calm",
        &["--nodes", "2", "--cores", "1", "--memory", "512M"],
    );
    let computes = "while :; do :; done";
    let computes = format!("taskset 1 sh -c '{computes}' & exec taskset 2 sh -c '{computes}'");
    let mut busy = None;
    for _ in ["at rest", "computing"] {
        let mut seen = String::new();
        // What has just started still takes pages into use.
        let is_calm = (0..6).any(|_| {
            let (faults, transitions) = changes(&rack);
            std::thread::sleep(WINDOW);
            let (later, changed) = changes(&rack);
            let (faults, transitions) = (later - faults, changed - transitions);
            write!(seen, " {faults} faults, {transitions} transitions;").expect("memory");
            faults == 0 && transitions < WINDOW.as_secs()
        });
        assert!(is_calm, "in {WINDOW:?} each:{seen}");
        busy.get_or_insert_with(|| rack.bench.exec("calm", &["sh", "-c", &computes]).start());
    }
    rack.down();
}

#[test]
fn six_vcpus_of_three_nodes_are_on_line() {
    let words = ["--nodes", "3", "--cores", "2", "--memory", "768M"];
    let rack = Up::start("three", &words);
    let survey = "nproc; cat /sys/devices/system/node/online; awk '/MemTotal/ { print ($4 > 8192) }' \
                  /sys/devices/system/node/node?/meminfo";
    let said = rack.guest(&["sh", "-c", survey]);
    let said: Vec<&str> = said.split_whitespace().collect();
    assert_eq!(said, ["6", "0-2", "1", "1", "1"]);
    rack.assert_healthy();
    rack.down();
}

/// A build on all vCPUs gives the same as one on a single vCPU, and stress-ng
/// finds nothing wrong: short forms of `scripts/soak build` and `stress`.
#[test]
fn a_program_is_built_and_debian_is_stressed_across_nodes() {
    let bench = Bench::new();
    bench.up("work", &["--nodes", "2", "--cores", "2", "--memory", "1G"]);
    let generate = include_str!("../soak/generate.py").replace("FILES = 28", "FILES = 3");
    let done = bench.exec("work", &["sh", "-c", "cd /tmp; python3 -"]);
    done.input(generate.into_bytes()).finish().well();
    let build = |make: &str| {
        let script = format!(
            "cd /tmp/build; rm -f *.o program; {make}; ./program; cat *.c | wc -l; sha256sum *.o program"
        );
        let done = bench.exec("work", &["sh", "-euc", &script]);
        done.finish().well().out()
    };
    let alone = build("taskset -c 0 make -s -j1");
    assert_eq!(alone.matches(".o\n").count(), 3 + 1, "{alone}");
    assert_eq!(build("make -s -j4"), alone);
    for stressor in [
        "cpu", "vm", "futex", "switch", "mmap", "fork", "pipe", "sem",
    ] {
        let stressor = format!("--{stressor}");
        let words = ["stress-ng", &stressor, "4", "--timeout", "1", "--verify"];
        let done = bench.exec("work", &words).finish();
        let said = (done.out() + &done.err()).to_lowercase();
        assert_eq!(done.status, 0, "{said}");
        assert!(!said.contains("fail") && !said.contains("error"), "{said}");
    }
    down(&bench, "work");
}
