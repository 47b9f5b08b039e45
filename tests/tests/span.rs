//! One guest on several nodes: whether they are one machine to it, and what
//! operators are shown of that.

use serde_json::Value;
use viaduct_tests::{Bench, alarms, litmus};

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
