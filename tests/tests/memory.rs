//! Memory that comes and goes while a guest runs.

use rustix::process::Signal;
use serde_json::{Value, json};
use viaduct_tests::{Started, Up};

const MIB: u64 = 1 << 20;

fn up(name: &'static str, words: &[&str]) -> Up {
    Up::start(name, &[&["--memory", "512M"], words].concat())
}

fn down(up: Up) {
    up.assert_healthy();
    up.down();
}

fn memory<'a>(change: &'a str, size: &'a str, node: &'a str) -> [&'a str; 6] {
    ["direct", "memory", change, size, "--on", node]
}

/// What the guest has of a node's memory, in MiB.
fn in_guest(up: &Up, node: u16) -> u64 {
    let file = format!("/sys/devices/system/node/node{node}/meminfo");
    let text = up.guest(&["cat", &file]);
    let line = text.lines().find(|line| line.contains("MemTotal"));
    let kib = line.and_then(|line| line.split_whitespace().nth(3));
    kib.and_then(|kib| kib.parse::<u64>().ok()).expect(&text) / 1024
}

/// What `viaduct` says of a node's added memory, and of all the VM's: desired,
/// granted and seen; in MiB.
fn shown(up: &Up, node: usize) -> ([u64; 3], [u64; 3]) {
    let status = up.json(&["status"]);
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

/// Puts so many MiB into a file system in a node's memory; prints what it sums
/// up to.
fn fill(up: &Up, node: u16, mib: u64) -> String {
    let script = format!(
        "mkdir -p /data && mount -t tmpfs -o size=90%,mpol=bind:{node} none /data &&
         dd if=/dev/urandom of=/data/file bs=1M count={mib} 2>/dev/null && sha256sum /data/file"
    );
    up.guest(&["sh", "-c", &script])
}

/// The same sum again, on the last CPU.
fn check(up: &Up) -> String {
    let script = "taskset -c $(($(nproc) - 1)) sha256sum /data/file";
    up.guest(&["sh", "-c", script])
}

/// The host's interrupts while the guest computes.
fn disturbed(up: &Up) -> u64 {
    let count = || {
        let vcpus = up.json(&["vcpus"]);
        let count = &vcpus[0]["counters"]["exit_interrupt"];
        count.as_u64().expect("it is counted")
    };
    let before = count();
    let spin = "i=0; while [ $i -lt 50000 ]; do i=$((i+1)); done";
    assert_eq!(up.guest(&["sh", "-c", spin]), "");
    count() - before
}

#[test]
fn a_node_gives_more_memory_and_takes_it_back_again_and_again() {
    let up = up("more", &["--cores", "1"]);
    let booted = in_guest(&up, 0);
    let quiet = disturbed(&up);
    assert_eq!(shown(&up, 0), ([0, 0, 512], [512; 3]));
    for _ in 0..3 {
        up.console(&memory("--add", "256M", "0")).well();
        assert_eq!(in_guest(&up, 0), booted + 256);
        assert_eq!(shown(&up, 0), ([256, 256, 256], [768; 3]));
        // It moves into what the guest has booted with when that goes.
        let sum = fill(&up, 0, 64);
        up.console(&memory("--remove", "256M", "0")).well();
        assert_eq!(in_guest(&up, 0), booted);
        assert_eq!(shown(&up, 0), ([0, 0, 512], [512; 3]));
        assert_eq!(check(&up), sum);
        assert_eq!(up.guest(&["umount", "/data"]), "");
    }
    // Nothing is left to do for the hypervisor: some hundreds before, and not
    // some hundred thousand now.
    let after = disturbed(&up);
    assert!(after < 30 * quiet.max(100), "{after}, before {quiet}");
    for (change, size, node, why) in [
        ("--add", "640M", "0", "node 0 has 512M left to give"),
        ("--add", "100M", "0", "use 128M or 256M instead of 100M"),
        ("--add", "200M", "0", "use 128M or 256M instead of 200M"),
        ("--add", "0", "0", "use 128M or 256M instead of 0"),
        ("--add", "128M", "1", "there is no node 1"),
        ("--remove", "128M", "0", "has got 0 from node 0"),
    ] {
        up.refused(&memory(change, size, node), 125, &[why]);
    }
    down(up);
}

#[test]
fn memory_comes_from_the_node_that_was_chosen() {
    let up = up("far", &["--nodes", "2", "--cores", "1"]);
    let booted = [0, 1].map(|node| in_guest(&up, node));
    for _ in 0..2 {
        up.console(&memory("--add", "256M", "1")).well();
        let now = [0, 1].map(|node| in_guest(&up, node));
        assert_eq!(now, [booted[0], booted[1] + 256]);
        assert_eq!(shown(&up, 1), ([256, 256, 512], [768; 3]));
        assert_eq!(shown(&up, 0).0, [0, 0, 768]);
        // More than node 1 had before, written by one node, read by the other.
        let sum = fill(&up, 1, 300);
        assert_eq!(check(&up), sum);
        assert_eq!(up.guest(&["umount", "/data"]), "");
        let sum = fill(&up, 1, 48);
        up.console(&memory("--remove", "256M", "1")).well();
        assert_eq!(in_guest(&up, 1), booted[1]);
        assert_eq!(shown(&up, 1), ([0, 0, 768], [512; 3]));
        assert_eq!(check(&up), sum);
        assert_eq!(up.guest(&["umount", "/data"]), "");
    }
    down(up);
}

/// What the tables and the hypervisors say of the VM's memory (desired, granted,
/// seen), and how much more than at first its nodes have in the guest; in MiB.
#[track_caller]
fn assert_memory(up: &Up, sizes: [u64; 3], booted: [u64; 2]) {
    let status = up.json(&["status"]);
    let mib = |value: &Value| value.as_u64().expect("a size") / MIB;
    let tables = &status["cluster"]["vm"];
    let said = ["desired", "granted", "seen"].map(|column| mib(&tables[column]["memory_bytes"]));
    assert_eq!(said, sizes, "{status:#}");
    assert_eq!(shown(up, 0).1, sizes);
    let has: u64 = [0, 1].map(|node| in_guest(up, node)).iter().sum();
    assert_eq!(has - booted.iter().sum::<u64>(), sizes[2] - 512);
    let gives = up.json(&["memory"]);
    let nodes = &status["cluster"]["nodes"];
    let are = [0, 1].map(|node: usize| &gives[node]["memory_bytes"]);
    let said = [0, 1].map(|node: usize| &nodes[node]["gives"]["memory_bytes"]);
    assert_eq!(said, are);
}

fn last_job(up: &Up) -> Value {
    let jobs = up.json(&["job", "list"]);
    jobs.as_array().expect("jobs").last().expect("one").clone()
}

#[test]
fn jobs_give_a_vm_more_memory_and_take_it_back() {
    let rack = "--nodes 2 --cores 2 --vcpus 2 --control 1 --node-memory 1G";
    let words: Vec<&str> = rack.split(' ').collect();
    let up = up("jobs", &words);
    let booted = [0, 1].map(|node| in_guest(&up, node));
    assert_memory(&up, [512; 3], booted);
    let plan = up.json(&["resize", "--memory", "768M", "--dry-run"])["plan"].clone();
    assert_eq!(plan["memory_added_bytes"], 256 * MIB, "{plan:#}");
    assert_memory(&up, [512; 3], booted);
    for size in [768, 640, 1024, 512] {
        let words = ["resize", "--memory", &format!("{size}M")];
        let done = up.console(&words).well();
        assert_eq!(done.out(), "");
        assert_memory(&up, [size; 3], booted);
        // A second identical request changes nothing.
        up.console(&words).well();
    }
    let refusals: [(&str, &[&str]); 5] = [
        ("600M", &["blocks of 128M", "512M and 640M"]),
        ("513M", &["512M or 640M"]),
        ("384M", &["nearest is 2 vCPUs and 512M"]),
        ("0", &["nearest is 2 vCPUs and 512M"]),
        ("1T", &["nearest is 2 vCPUs and 2048M"]),
    ];
    for (size, facts) in refusals {
        up.refused(&["resize", "--memory", size], 3, facts);
    }
    up.console(&["node", "cordon", "1"]).well();
    let lacks = [
        "2048M of memory asked",
        "node 1 gives 256M at most by cordon",
    ];
    up.refused(&["resize", "--memory", "2G"], 3, &lacks);
    up.console(&["node", "uncordon", "1"]).well();

    up.console(&["resize", "--memory", "1G"]).well();
    assert_memory(&up, [1024; 3], booted);

    // What has come goes elsewhere with the rest, and from there.
    up.console(&["node", "drain", "1"]).well();
    assert_memory(&up, [1024; 3], booted);
    assert_eq!(up.json(&["memory"])[1]["memory_bytes"], 0);
    up.console(&["resize", "--memory", "768M"]).well();
    assert_memory(&up, [768; 3], booted);
    up.console(&["node", "uncordon", "1"]).well();
    up.console(&["rebalance"]).well();
    assert_memory(&up, [768; 3], booted);

    // One block stays.
    assert_eq!(up.guest(&["sh", "-c", PIN]), "");
    let shrink = ["resize", "--memory", "512M"];
    let why = ["128M stayed as they were", "memory32 of node 0", "in use"];
    up.refused(&shrink, 4, &why);
    let job = last_job(&up);
    assert_eq!(job["state"], "finished");
    let block = json!({
        "block": 0, "guest_name": "memory32", "home": 0,
        "reason": "the guest says that it is in use",
    });
    assert_eq!(
        (&job["short_bytes"], &job["refused_blocks"]),
        (&json!(128 * MIB), &json!([block]))
    );
    // So the guest calls it, too.
    let file = "/sys/devices/system/memory/memory32/online";
    assert_eq!(up.guest(&["cat", file]), "1\n");
    assert_memory(&up, [512, 640, 640], booted);
    up.refused(&shrink, 4, &why);
    assert_memory(&up, [512, 640, 640], booted);
    down(up);
}

#[test]
fn jobs_about_memory_outlive_who_asked_and_who_decides() {
    let rack = "--nodes 2 --cores 1 --control 1 --node-memory 1G";
    let words: Vec<&str> = rack.split(' ').collect();
    let up = up("hardy", &words);
    let booted = [0, 1].map(|node| in_guest(&up, node));
    let resize = |size: &'static str| {
        let line = up.bench.line(up.named(&["resize", "--memory", size]));
        line.start()
    };

    // Two operators at the same time: the same, then not the same.
    for one in [resize("768M"), resize("768M")] {
        one.finish().well();
    }
    assert_memory(&up, [768; 3], booted);
    let ended = [resize("1G"), resize("640M")].map(Started::finish);
    let statuses = ended.each_ref().map(|one| one.status);
    assert!(statuses.contains(&0), "{statuses:?}");
    for one in ended.iter().filter(|one| one.status != 0) {
        assert_eq!(one.status, 3, "{}", one.err());
        assert!(one.err().contains("changes the VM"), "{}", one.err());
    }
    let [_, _, seen] = shown(&up, 0).1;
    assert!([640, 1024].contains(&seen), "{seen}");
    assert_memory(&up, [seen; 3], booted);

    // The console is killed as soon as its job is there.
    up.console(&["resize", "--memory", "512M"]).well();
    let jobs = || up.json(&["job", "list"]).as_array().expect("jobs").len();
    let before = jobs();
    let console = resize("1G");
    up.bench.wait_until("the job is there", || jobs() > before);
    console.signal(Signal::KILL);
    drop(console.finish());
    let id = last_job(&up)["id"].to_string();
    up.console(&["job", "wait", &id]).well();
    assert_memory(&up, [1024; 3], booted);

    // Who decides is killed in mid-job, until a job was really caught; it is
    // finished, and so it says.
    let mut caught = false;
    for size in [512, 1024].iter().cycle().take(10) {
        let pid = up.pid(2);
        let words = ["resize", "--memory", &format!("{size}M"), "--no-wait"];
        up.console(&words).well();
        up.kill_process(2, pid);
        let job = last_job(&up);
        up.assert_alive();
        up.console(&["node", "join", "2"]).well();
        let id = job["id"].to_string();
        up.console(&["job", "wait", &id]).well();
        let ended = last_job(&up);
        assert_eq!(
            (&ended["id"], &ended["state"]),
            (&job["id"], &json!("finished"))
        );
        assert_memory(&up, [*size; 3], booted);
        if job["ended"] == false {
            caught = true;
            let events = up.console(&["events"]).well().out();
            let taken = events.rfind("is in charge").expect("it took over");
            let done = events.rfind(&format!("job {id} step")).expect("steps");
            assert!(taken < done, "finished by who came after: {events}");
            break;
        }
    }
    assert!(caught, "no job was in mid-way");
    down(up);
}

/// A guest without ACPI's drivers never looks at what it is asked.
#[test]
fn what_a_guest_never_looks_at_is_taken_back() {
    let rack = "--nodes 1 --cores 2 --vcpus 1 --max-vcpus 2 --control 1";
    let mut words: Vec<&str> = rack.split(' ').collect();
    words.extend(["--append", "initcall_blacklist=ged_driver_init"]);
    let up = up("deaf", &words);
    let booted = in_guest(&up, 0);
    let now = || {
        let status = up.json(&["status"]);
        let vm = &status["cluster"]["vm"];
        let said = ["desired", "granted", "seen"].map(|column| {
            let amount = &vm[column];
            let memory = amount["memory_bytes"].as_u64().expect("a size") / MIB;
            (amount["vcpus"].as_u64().expect("a number"), memory)
        });
        assert_eq!(shown(&up, 0).1, said.map(|(_, memory)| memory));
        said
    };
    for (wish, waits) in [
        (["--memory", "768M"], "the guest to take 256M"),
        (["--vcpus", "2"], "the guest to take vCPU 1"),
    ] {
        up.console(&[&["resize", "--no-wait"], &wish[..]].concat())
            .well();
        let id = last_job(&up)["id"].to_string();
        up.bench
            .wait_until("it is asked", || last_job(&up)["waits_for"] == waits);
        let waits = ["still running", waits];
        up.refused(&["job", "wait", &id, "--timeout", "1"], 124, &waits);
        up.console(&["job", "cancel", &id]).well();
        up.refused(&["job", "wait", &id], 4, &["rolled-back", "cancelled"]);
        assert_eq!(now(), [(1, 512); 3], "as before");
        assert_eq!(in_guest(&up, 0), booted);
        // And it is there for others.
        assert_eq!(shown(&up, 0).0[2], 512);
        up.console(&["resize", "--memory", "512M", "--vcpus", "1"])
            .well();
    }
    down(up);
}

/// Pages of a file are in a pipe that nobody reads as yet: Linux tries for ever
/// to move them.
const HELD: &str = "cat /data/file | (dd bs=1 count=1 2>/dev/null | wc -c
    until [ -e /tmp/read ]; do sleep 1; done; cat >/dev/null)";

#[test]
fn who_cancels_need_not_wait_for_a_guest_that_is_at_it() {
    let up = up("busy", &["--cores", "1", "--control", "1"]);
    let booted = in_guest(&up, 0);
    up.console(&["resize", "--memory", "640M"]).well();
    let _ = fill(&up, 0, 64);
    let held = up.bench.exec(up.name, &["sh", "-c", HELD]).start();
    held.wait_for_output();
    up.console(&["resize", "--memory", "512M", "--no-wait"])
        .well();
    let id = last_job(&up)["id"].to_string();
    let waits = "the guest to give up 128M";
    up.bench
        .wait_until("it is asked", || last_job(&up)["waits_for"] == waits);
    // It may look any moment now.
    up.bench.wait_until("it is at it", || {
        up.guest(&["cat", "/sys/devices/system/memory/memory32/state"]) == "going-offline\n"
    });
    up.console(&["job", "cancel", &id]).well();
    let waits = ["still rolling-back", waits];
    up.refused(&["job", "wait", &id, "--timeout", "1"], 124, &waits);
    up.console(&["job", "cancel", "--force", &id]).well();
    up.refused(&["job", "wait", &id], 4, &["rolled-back", "cancelled"]);
    // It has what it had, and who is asked next waits for it.
    assert_eq!(shown(&up, 0).1, [640; 3]);
    up.refused(
        &["job", "cancel", "--force", &id],
        3,
        &["can't be undone any more"],
    );

    // It answers at last, and the tables follow.
    assert_eq!(up.guest(&["touch", "/tmp/read"]), "");
    held.finish().well();
    up.bench
        .wait_until("it has gone", || shown(&up, 0).1 == [640, 512, 512]);
    assert_eq!(in_guest(&up, 0), booted);
    up.console(&["resize", "--memory", "640M"]).well();
    assert_eq!(shown(&up, 0).1, [640; 3]);
    down(up);
}

#[test]
fn what_the_guest_gives_up_by_itself_is_not_granted_any_more() {
    let rack = "--nodes 1 --cores 2 --vcpus 2 --control 1";
    let words: Vec<&str> = rack.split(' ').collect();
    let up = up("generous", &words);
    let booted = in_guest(&up, 0);
    up.console(&["resize", "--memory", "640M"]).well();
    let eject = "cd /sys/bus/acpi/devices && for device in PNP0C80* ACPI0007*; do
        echo 1 >$device/eject; done 2>/dev/null; :";
    assert_eq!(up.guest(&["sh", "-c", eject]), "");
    let columns = || {
        let vm = up.json(&["status"])["cluster"]["vm"].clone();
        ["desired", "granted", "seen"].map(|column| vm[column].clone())
    };
    let size = |vcpus, memory| json!({"vcpus": vcpus, "memory_bytes": memory * MIB});
    up.bench.wait_until("the tables know", || {
        columns() == [size(2, 640), size(1, 512), size(1, 512)]
    });
    assert_eq!(in_guest(&up, 0), booted);
    let events = up.console(&["events"]).well().out();
    for what in ["vCPU 1", "128M"] {
        let line = format!("has given up {what} of node 0");
        assert!(events.contains(&line), "{events}");
    }
    // What is desired is not there: the same request is no success by itself.
    up.console(&["resize", "--memory", "640M", "--vcpus", "2"])
        .well();
    assert_eq!(columns(), [(); 3].map(|()| size(2, 640)));
    assert_eq!(in_guest(&up, 0), booted + 128);
    assert_eq!(up.guest(&["nproc"]), "2\n");
    down(up);
}

/// Makes the kernel use a block for itself.
const PIN: &str = "cd /sys/devices/system/memory/memory32 && echo offline >state &&
    echo online_kernel >state && mkdir -p /pins && mount -t tmpfs none /pins && cd /pins &&
    seq 1 2000 | xargs mkdir";

#[test]
fn a_block_that_the_guest_can_not_do_without_stays_and_is_named() {
    let up = up("kept", &["--cores", "1"]);
    let booted = in_guest(&up, 0);
    up.console(&memory("--add", "256M", "0")).well();
    assert_eq!(up.guest(&["sh", "-c", PIN]), "");
    let why = "128M of 256M done: the guest keeps 128M on node 0: something in it";
    up.refused(&memory("--remove", "256M", "0"), 125, &[why]);
    assert_eq!(in_guest(&up, 0), booted + 128);
    let (node, vm) = shown(&up, 0);
    assert_eq!((node, vm), ([128, 128, 384], [512, 640, 640]));
    let why = "0 of 128M done: the guest keeps 128M";
    up.refused(&memory("--remove", "128M", "0"), 125, &[why]);
    // It is of use still, and goes when nothing of the kernel's is in it.
    let pins = "ls /pins | wc -l";
    let count = up.guest(&["sh", "-c", pins]);
    assert_eq!(count, "2000\n");
    up.console(&memory("--add", "128M", "0")).well();
    assert_eq!(in_guest(&up, 0), booted + 256);
    up.console(&memory("--remove", "128M", "0")).well();
    assert_eq!(in_guest(&up, 0), booted + 128);
    down(up);
}
