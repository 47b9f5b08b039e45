//! Memory that comes and goes while a guest runs.

use serde_json::Value;
use viaduct_tests::{Bench, alarms};

const MIB: u64 = 1 << 20;

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

fn memory(name: &str, change: &str, size: &str, node: &str) -> [String; 8] {
    [
        "direct", "memory", change, size, "--on", node, "--name", name,
    ]
    .map(str::to_owned)
}

/// What the guest has of a node's memory, in MiB.
fn in_guest(bench: &Bench, name: &str, node: u16) -> u64 {
    let file = format!("/sys/devices/system/node/node{node}/meminfo");
    let text = bench.exec(name, &["cat", &file]).finish().well().out();
    let line = text.lines().find(|line| line.contains("MemTotal"));
    let kib = line.and_then(|line| line.split_whitespace().nth(3));
    kib.and_then(|kib| kib.parse::<u64>().ok()).expect(&text) / 1024
}

/// What `viaduct` says of a node's added memory, and of all the VM's: desired,
/// granted and seen; in MiB.
fn shown(bench: &Bench, name: &str, node: usize) -> ([u64; 3], [u64; 3]) {
    let done = bench.viaduct(["status", "--json", "--name", name]).well();
    let status: Value = serde_json::from_slice(&done.stdout).expect("JSON");
    let mib = |value: &Value| value.as_u64().expect("a size") / MIB;
    let of_node = &status["nodes"][node];
    let vm = &status["vm"];
    (
        [
            "memory_added_bytes",
            "memory_added_seen_bytes",
            "memory_free_bytes",
        ]
        .map(|column| mib(&of_node[column])),
        ["memory_bytes", "memory_granted_bytes", "memory_seen_bytes"]
            .map(|column| mib(&vm[column])),
    )
}

fn refused(bench: &Bench, words: &[String], why: &str) {
    let done = bench.viaduct(words);
    assert_eq!(done.status, 125, "{words:?}");
    assert!(done.err().contains(why), "{words:?}: {}", done.err());
    assert_eq!(done.err().lines().count(), 1, "{}", done.err());
}

/// Puts so many MiB into a file system in a node's memory; prints what it sums
/// up to.
fn fill(bench: &Bench, name: &str, node: u16, mib: u64) -> String {
    let script = format!(
        "mkdir -p /data && mount -t tmpfs -o size=90%,mpol=bind:{node} none /data &&
         dd if=/dev/urandom of=/data/file bs=1M count={mib} 2>/dev/null && sha256sum /data/file"
    );
    bench
        .exec(name, &["sh", "-c", &script])
        .finish()
        .well()
        .out()
}

/// The same sum again, on the last CPU.
fn check(bench: &Bench, name: &str) -> String {
    let script = "taskset -c $(($(nproc) - 1)) sha256sum /data/file";
    bench
        .exec(name, &["sh", "-c", script])
        .finish()
        .well()
        .out()
}

#[test]
fn a_node_gives_more_memory_and_takes_it_back_again_and_again() {
    let bench = up("more", &["--cores", "1"]);
    let booted = in_guest(&bench, "more", 0);
    assert_eq!(shown(&bench, "more", 0), ([0, 0, 512], [512; 3]));
    for _ in 0..3 {
        bench.viaduct(memory("more", "--add", "256M", "0")).well();
        assert_eq!(in_guest(&bench, "more", 0), booted + 256);
        assert_eq!(shown(&bench, "more", 0), ([256, 256, 256], [768; 3]));
        // It moves into what the guest has booted with when that goes.
        let sum = fill(&bench, "more", 0, 64);
        bench
            .viaduct(memory("more", "--remove", "256M", "0"))
            .well();
        assert_eq!(in_guest(&bench, "more", 0), booted);
        assert_eq!(shown(&bench, "more", 0), ([0, 0, 512], [512; 3]));
        assert_eq!(check(&bench, "more"), sum);
        bench.exec("more", &["umount", "/data"]).finish().well();
    }
    for (change, size, node, why) in [
        ("--add", "640M", "0", "node 0 has 512M left to give"),
        ("--add", "100M", "0", "use 128M or 256M instead of 100M"),
        ("--add", "200M", "0", "use 128M or 256M instead of 200M"),
        ("--add", "0", "0", "use 128M or 256M instead of 0"),
        ("--add", "128M", "1", "there is no node 1"),
        ("--remove", "128M", "0", "has got 0 from node 0"),
    ] {
        refused(&bench, &memory("more", change, size, node), why);
    }
    down(&bench, "more");
}

#[test]
fn memory_comes_from_the_node_that_was_chosen() {
    let bench = up("far", &["--nodes", "2", "--cores", "1"]);
    let booted = [0, 1].map(|node| in_guest(&bench, "far", node));
    for _ in 0..2 {
        bench.viaduct(memory("far", "--add", "256M", "1")).well();
        let now = [0, 1].map(|node| in_guest(&bench, "far", node));
        assert_eq!(now, [booted[0], booted[1] + 256]);
        assert_eq!(shown(&bench, "far", 1), ([256, 256, 512], [768; 3]));
        assert_eq!(shown(&bench, "far", 0).0, [0, 0, 768]);
        // More than node 1 had before, written by one node, read by the other.
        let sum = fill(&bench, "far", 1, 300);
        assert_eq!(check(&bench, "far"), sum);
        bench.exec("far", &["umount", "/data"]).finish().well();
        let sum = fill(&bench, "far", 1, 48);
        bench.viaduct(memory("far", "--remove", "256M", "1")).well();
        assert_eq!(in_guest(&bench, "far", 1), booted[1]);
        assert_eq!(shown(&bench, "far", 1), ([0, 0, 768], [512; 3]));
        assert_eq!(check(&bench, "far"), sum);
        bench.exec("far", &["umount", "/data"]).finish().well();
    }
    down(&bench, "far");
}

/// Makes the kernel use a block for itself.
const PIN: &str = "cd /sys/devices/system/memory/memory32 && echo offline >state &&
    echo online_kernel >state && mkdir -p /pins && mount -t tmpfs none /pins && cd /pins &&
    seq 1 2000 | xargs mkdir";

#[test]
fn a_block_that_the_guest_can_not_do_without_stays_and_is_named() {
    let bench = up("kept", &["--cores", "1"]);
    let booted = in_guest(&bench, "kept", 0);
    bench.viaduct(memory("kept", "--add", "256M", "0")).well();
    bench.exec("kept", &["sh", "-c", PIN]).finish().well();
    let why = "128M of 256M done: the guest keeps 128M on node 0: something in it";
    refused(&bench, &memory("kept", "--remove", "256M", "0"), why);
    assert_eq!(in_guest(&bench, "kept", 0), booted + 128);
    let (node, vm) = shown(&bench, "kept", 0);
    assert_eq!((node, vm), ([128, 128, 384], [512, 640, 640]));
    let why = "0 of 128M done: the guest keeps 128M";
    refused(&bench, &memory("kept", "--remove", "128M", "0"), why);
    // It is of use still, and goes when nothing of the kernel's is in it.
    let pins = "ls /pins | wc -l";
    let count = bench.exec("kept", &["sh", "-c", pins]).finish().well();
    assert_eq!(count.out(), "2000\n");
    bench.viaduct(memory("kept", "--add", "128M", "0")).well();
    assert_eq!(in_guest(&bench, "kept", 0), booted + 256);
    bench
        .viaduct(memory("kept", "--remove", "128M", "0"))
        .well();
    assert_eq!(in_guest(&bench, "kept", 0), booted + 128);
    down(&bench, "kept");
}
