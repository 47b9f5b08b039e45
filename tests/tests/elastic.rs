//! vCPUs that come, go, move and share cores while a guest runs.

use serde_json::Value;
use viaduct_tests::{Bench, alarms};

fn up(name: &str, words: &[&str]) -> Bench {
    let bench = Bench::new();
    let fixed = ["--rootfs", "busybox", "--memory", "512M"].into_iter();
    let words: Vec<_> = fixed.chain(words.iter().copied()).collect();
    bench.up(name, &words);
    bench
}

fn down(bench: &Bench, name: &str) {
    let log = bench.exec(name, &["dmesg"]).finish().well().out();
    assert_eq!(alarms(&log), Vec::<&str>::new());
    bench.down(name);
    bench.assert_nothing_left();
}

/// What `viaduct` shows.
fn shown(bench: &Bench, name: &str, what: &str) -> Value {
    let done = bench.viaduct([what, "--json", "--name", name]).well();
    serde_json::from_slice(&done.stdout).expect("JSON")
}

/// What the guest says, and what the three columns say.
fn assert_vcpus(bench: &Bench, name: &str, count: usize) {
    let online = bench.exec(name, &["nproc"]).finish().well().out();
    assert_eq!(online, format!("{count}\n"));
    let vm = &shown(bench, name, "status")["vm"];
    for column in ["vcpus", "vcpus_granted", "vcpus_seen"] {
        assert_eq!(vm[column], count, "{column} in {vm}");
    }
}

fn refused(bench: &Bench, words: &[&str], why: &str) {
    let done = bench.viaduct(words);
    assert_eq!(done.status, 125, "{words:?}");
    assert!(done.err().contains(why), "{words:?}: {}", done.err());
    assert_eq!(done.err().lines().count(), 1, "{}", done.err());
}

#[test]
fn vcpus_come_and_go_ten_times() {
    let bench = up(
        "sizes",
        &["--cores", "2", "--vcpus", "1", "--max-vcpus", "4"],
    );
    assert_vcpus(&bench, "sizes", 1);
    for round in 0..10 {
        let count = [4, 2, 3, 1][round % 4];
        let words = [
            "direct",
            "resize",
            "--name",
            "sizes",
            "--vcpus",
            &count.to_string(),
        ];
        let done = bench.viaduct(words).well();
        assert_eq!(done.out(), "");
        assert_vcpus(&bench, "sizes", count);
        // A second identical request changes nothing.
        bench.viaduct(words).well();
    }
    down(&bench, "sizes");
}

#[test]
fn any_vcpu_but_the_guests_first_can_go() {
    let bench = up("any", &["--cores", "2", "--vcpus", "3"]);
    bench
        .viaduct(["direct", "remove", "1", "--name", "any"])
        .well();
    let online = "cat /sys/devices/system/cpu/online";
    let done = bench.exec("any", &["sh", "-c", online]).finish().well();
    assert_eq!(done.out(), "0,2\n");
    bench
        .viaduct(["direct", "add", "1", "--name", "any"])
        .well();
    let done = bench.exec("any", &["sh", "-c", online]).finish().well();
    assert_eq!(done.out(), "0-2\n");
    for (words, why) in [
        (
            &["direct", "remove", "0", "--name", "any"][..],
            "Linux never gives up",
        ),
        (
            &["direct", "remove", "3", "--name", "any"],
            "there is no vCPU 3",
        ),
        (
            &["direct", "add", "2", "--name", "any"],
            "vCPU 2 is not where",
        ),
        (
            &["direct", "move", "1", "--to", "1", "--name", "any"],
            "there is no node 1",
        ),
        (
            &["direct", "move", "1", "--to", "0:2", "--name", "any"],
            "there is no node 0",
        ),
        (
            &["direct", "resize", "--vcpus", "0", "--name", "any"],
            "--vcpus 1 or more",
        ),
        (
            &["direct", "resize", "--vcpus", "4", "--name", "any"],
            "--vcpus 3 or fewer",
        ),
    ] {
        refused(&bench, words, why);
    }
    assert_vcpus(&bench, "any", 3);
    down(&bench, "any");
}

/// Each CPU adds to a word of its own and to one of all, between which none
/// may be lost.
const LOAD: &str = "for cpu in 0 1; do taskset $((1 << cpu)) sh -c '
    i=0; while [ $i -lt 3000 ]; do i=$((i + 1)); echo $i >/tmp/at.$0; done' $cpu & done
    i=0; while [ $i -lt 150 ]; do i=$((i + 1)); : | cat; done; wait; cat /tmp/at.0 /tmp/at.1";

#[test]
fn vcpus_move_between_nodes_while_the_guest_works() {
    let bench = up("moves", &["--nodes", "2", "--cores", "2", "--vcpus", "2"]);
    let load = bench.exec("moves", &["sh", "-c", LOAD]).start();
    let mut at = [0, 1];
    for round in 0..20 {
        let vcpu = [0, 2][round % 2];
        at[round % 2] = 1 - at[round % 2];
        let to = at[round % 2].to_string();
        let words = [
            "direct",
            "move",
            &vcpu.to_string(),
            "--to",
            &to,
            "--name",
            "moves",
        ];
        bench.viaduct(words).well();
        let vcpus = shown(&bench, "moves", "vcpus");
        let moved = vcpus.as_array().expect("vCPUs");
        let moved = moved.iter().find(|shown| shown["id"] == vcpu);
        let moved = moved.expect("it is there");
        assert_eq!(moved["node"], at[round % 2], "{moved}");
        assert_eq!(moved["moves"], round / 2 + 1, "{moved}");
        assert!(moved["blackout_us"].as_u64() > Some(0), "{moved}");
    }
    assert_eq!(load.finish().well().out(), "3000\n3000\n");
    assert_vcpus(&bench, "moves", 2);
    down(&bench, "moves");
}

#[test]
fn more_vcpus_than_cores_share_them() {
    let bench = up("shared", &["--cores", "2", "--vcpus", "4"]);
    assert_vcpus(&bench, "shared", 4);
    // Four that never halt, all of which get on.
    let spin = "for cpu in 0 1 2 3; do taskset $((1 << cpu)) sh -c '
        i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done; echo $0' $cpu & done; wait";
    let done = bench.exec("shared", &["sh", "-c", spin]).finish().well();
    let out = done.out();
    let mut ended: Vec<_> = out.lines().collect();
    ended.sort_unstable();
    assert_eq!(ended, ["0", "1", "2", "3"]);
    down(&bench, "shared");
}
