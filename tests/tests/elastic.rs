//! vCPUs that come, go, move and share cores while a guest runs, as operators
//! ask for it: by jobs.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use viaduct_tests::{Bench, Started, Up};

/// What the guest says, and what the three columns say.
#[track_caller]
fn assert_vcpus(rack: &Up, count: usize) {
    assert_eq!(rack.guest(&["nproc"]), format!("{count}\n"));
    let status = rack.json(&["status"]);
    for column in ["desired", "granted", "seen"] {
        let vcpus = &status["cluster"]["vm"][column]["vcpus"];
        assert_eq!(*vcpus, count, "{column} in {status:#}");
    }
    for column in ["vcpus", "vcpus_granted", "vcpus_seen"] {
        assert_eq!(status["vm"][column], count, "{column} in {status:#}");
    }
    assert_tables_are_true(rack, &status);
}

/// The tables say of each vCPU where the hypervisors have it.
#[track_caller]
fn assert_tables_are_true(rack: &Up, status: &Value) {
    let homes = status["cluster"]["vm"]["homes"].as_array();
    let homes = (0_u64..).zip(homes.expect("homes"));
    let said: Vec<(u64, Value)> = homes
        .filter(|(_, home)| !home.is_null())
        .map(|(vcpu, home)| (vcpu, home.clone()))
        .collect();
    let vcpus = rack.json(&["vcpus"]);
    let vcpus = vcpus.as_array().expect("vCPUs").iter();
    let are: Vec<(u64, Value)> = vcpus
        .map(|vcpu| (vcpu["id"].as_u64().expect("a number"), vcpu["node"].clone()))
        .collect();
    assert_eq!(said, are);
}

fn online(rack: &Up) -> String {
    rack.guest(&["cat", "/sys/devices/system/cpu/online"])
}

fn last_job(rack: &Up) -> Value {
    let jobs = rack.json(&["job", "list"]);
    jobs.as_array().expect("jobs").last().expect("one").clone()
}

#[test]
fn vcpus_come_and_go_as_asked_and_what_cannot_be_is_refused() {
    let words = ["--cores", "2", "--vcpus", "1", "--max-vcpus", "4"];
    let rack = Up::start(
        "sizes",
        &[&words[..], &["--memory", "512M", "--control", "1"]].concat(),
    );
    assert_vcpus(&rack, 1);

    let before = rack.wait_for_equal_replicas(&[0, 1]);
    let plan = rack.json(&["resize", "--vcpus", "3", "--dry-run"])["plan"].clone();
    assert_eq!(plan["vcpus_added"], 2, "{plan:#}");
    let after = rack.json(&["status"]);
    for part in ["position", "digest"] {
        assert_eq!(before["cluster"][part], after["cluster"][part]);
    }
    assert_vcpus(&rack, 1);

    for count in ["4", "2", "3"] {
        let done = rack.console(&["resize", "--vcpus", count]).well();
        assert_eq!(done.out(), "");
        assert_vcpus(&rack, count.parse().expect("a number"));
        // A second identical request changes nothing.
        rack.console(&["resize", "--vcpus", count]).well();
    }

    rack.console(&["vcpu", "remove", "1"]).well();
    assert_eq!(online(&rack), "0,2\n");
    assert_vcpus(&rack, 2);
    rack.console(&["vcpu", "add", "1"]).well();
    rack.console(&["vcpu", "add", "1", "--on", "0"]).well();
    assert_eq!(online(&rack), "0-2\n");
    let refusals: [(&[&str], i32, &[&str]); 9] = [
        (&["resize", "--vcpus", "0"], 3, &["nearest is 1 vCPUs"]),
        (&["resize", "--vcpus", "5"], 3, &["nearest is 4 vCPUs"]),
        (&["resize", "--vcpus", "-1"], 125, &["-1"]),
        (&["vcpu", "remove", "9"], 3, &["no vCPU 9"]),
        (&["vcpu", "move", "3", "--to", "0"], 3, &["no vCPU 3"]),
        (&["vcpu", "move", "1", "--to", "7"], 3, &["no node 7"]),
        (&["vcpu", "move", "1", "--to", "1"], 3, &["capacity"]),
        (
            &["vcpu", "add", "1", "--on", "1"],
            3,
            &["on node 0 already"],
        ),
        (&["job", "wait", "99"], 125, &["no job 99"]),
    ];
    for (words, status, facts) in refusals {
        rack.refused(words, status, facts);
    }
    assert_vcpus(&rack, 3);
    // The guest keeps the one that it booted on, and the job says so.
    rack.refused(&["vcpu", "remove", "0"], 4, &["vCPU 0 stayed", "guest"]);
    let job = last_job(&rack);
    assert_eq!(
        (&job["state"], &job["kept_vcpus"]),
        (&json!("finished"), &json!([0]))
    );
    assert_eq!(online(&rack), "0-2\n");
    rack.console(&["resize", "--vcpus", "3"]).well();
    assert_vcpus(&rack, 3);
    rack.assert_healthy();
    rack.down();
}

/// Two data nodes of two cores, the second of which gives no memory, and one
/// that decides.
fn two_nodes(name: &'static str, vcpus: &str) -> Up {
    let bench = Bench::new();
    let text = "[[node]]\ncores = 2\n[[node]]\ncores = 2\nmemory = \"0\"\n\
                [[node]]\nrole = \"control\"\ncores = 1\n";
    let file = bench.file("rack.toml", text.as_bytes());
    let file = file.to_str().expect("plain letters");
    let fixed = ["--rootfs", "busybox", "--memory", "512M"];
    bench.up(
        name,
        &[&fixed[..], &["--rack", file, "--vcpus", vcpus]].concat(),
    );
    Up { bench, name }
}

/// Each CPU adds to a word of its own, between which none may be lost, while
/// others wake each other by pipes.
const LOAD: &str = "for cpu in 0 1; do taskset $((1 << cpu)) sh -c '
    i=0; while [ $i -lt 3000 ]; do i=$((i + 1)); echo $i >/tmp/at.$0; done' $cpu & done
    i=0; while [ $i -lt 150 ]; do i=$((i + 1)); : | cat; done; wait; cat /tmp/at.0 /tmp/at.1";

#[test]
fn vcpus_move_between_nodes_while_the_guest_works_and_a_node_may_be_emptied_and_go() {
    let rack = two_nodes("moves", "2");
    let shown = |vcpu: u64| {
        let vcpus = rack.json(&["vcpus"]);
        let vcpus = vcpus.as_array().expect("vCPUs");
        let found = vcpus.iter().find(|shown| shown["id"] == vcpu);
        found.expect("it is there").clone()
    };
    let load = rack.bench.exec(rack.name, &["sh", "-c", LOAD]).start();
    for round in 0..10 {
        let to = (round % 2).to_string();
        rack.console(&["vcpu", "move", "2", "--to", &to]).well();
        let moved = shown(2);
        assert_eq!(moved["node"], round % 2, "{moved}");
        assert_eq!(moved["moves"], round + 1, "{moved}");
        assert!(moved["blackout_us"].as_u64() > Some(0), "{moved}");
    }
    assert_eq!(load.finish().well().out(), "3000\n3000\n");
    assert_vcpus(&rack, 2);

    // The first vCPU is pinned to the node with the devices.
    rack.refused(&["vcpu", "move", "0", "--to", "1"], 3, &["boot-vcpu"]);
    rack.refused(&["node", "leave", "1"], 3, &["drain it first"]);
    rack.console(&["node", "cordon", "1"]).well();
    rack.refused(&["vcpu", "add", "3"], 3, &["cordoned"]);
    // A cordon alone takes nothing away.
    assert_eq!(shown(2)["node"], 1);
    rack.console(&["node", "drain", "1"]).well();
    assert_eq!(shown(2)["node"], 0);
    assert_vcpus(&rack, 2);
    rack.console(&["node", "drain", "1"]).well();
    rack.refused(
        &["resize", "--vcpus", "3"],
        3,
        &["3 vCPUs asked, 2 possible", "node 1"],
    );

    rack.console(&["node", "leave", "1"]).well();
    let nodes = |rack: &Up| {
        let status = rack.wait_for_equal_replicas(&[0, 2]);
        let nodes = status["cluster"]["nodes"]
            .as_array()
            .expect("nodes")
            .clone();
        let ids = nodes.iter().map(|node| node["id"].clone());
        ids.collect::<Vec<_>>()
    };
    assert_eq!(nodes(&rack), [0, 2]);
    rack.console(&["node", "join", "1"]).well();
    rack.bench
        .wait_until("it is in the tables again", || nodes(&rack) == [0, 1, 2]);
    rack.console(&["resize", "--vcpus", "3"]).well();
    assert_vcpus(&rack, 3);
    // vCPU 2 has stayed where it was, and vCPU 3 has its seat on node 1.
    assert_eq!(shown(3)["node"], 1);
    rack.console(&["resize", "--vcpus", "2"]).well();
    assert_vcpus(&rack, 2);
    assert_eq!(shown(3)["node"], 1, "as even as can be");
    rack.console(&["vcpu", "move", "3", "--to", "0"]).well();
    rack.console(&["rebalance"]).well();
    assert_vcpus(&rack, 2);
    assert_eq!(shown(3)["node"], 1, "as before");
    rack.console(&["node", "drain", "1"]).well();
    rack.console(&["node", "leave", "1"]).well();
    rack.kill(1);
    rack.assert_alive();
    assert_vcpus(&rack, 2);
    assert_eq!(rack.json(&["status"])["vm"]["state"], "running");
    rack.assert_healthy();
    rack.down();
}

#[test]
fn jobs_outlive_who_asked_and_who_decides() {
    let words = ["--cores", "2", "--vcpus", "1", "--max-vcpus", "4"];
    let rack = Up::start(
        "hardy",
        &[&words[..], &["--memory", "512M", "--control", "1"]].concat(),
    );
    let resize = |count: &'static str| {
        let line = rack.bench.line(rack.named(&["resize", "--vcpus", count]));
        line.start()
    };

    // Two operators at the same time: the same, then not the same.
    let both = [resize("3"), resize("3")];
    for one in both {
        one.finish().well();
    }
    assert_vcpus(&rack, 3);
    let ended = [resize("4"), resize("2")].map(Started::finish);
    let statuses: Vec<i32> = ended.iter().map(|one| one.status).collect();
    assert!(statuses.contains(&0), "{statuses:?}");
    for one in ended.iter().filter(|one| one.status != 0) {
        assert_eq!(one.status, 3, "{}", one.err());
        assert!(one.err().contains("changes the VM"), "{}", one.err());
    }
    let status = rack.json(&["status"]);
    let granted = status["cluster"]["vm"]["granted"]["vcpus"].as_u64();
    let granted = usize::try_from(granted.expect("a number")).expect("few");
    assert!([2, 4].contains(&granted));
    assert_vcpus(&rack, granted);

    // The console is killed as soon as its job is there.
    rack.console(&["resize", "--vcpus", "1"]).well();
    let jobs = || rack.json(&["job", "list"]).as_array().expect("jobs").len();
    let before = jobs();
    let console = resize("4");
    rack.bench
        .wait_until("the job is there", || jobs() > before);
    console.signal(Signal::KILL);
    drop(console.finish());
    let id = last_job(&rack)["id"].to_string();
    rack.console(&["job", "wait", &id]).well();
    assert_vcpus(&rack, 4);

    // Who decides is killed in mid-job, until a job was really caught.
    let mut caught = false;
    for count in ["1", "4"].iter().cycle().take(10) {
        let pid = rack.pid(1);
        rack.console(&["resize", "--vcpus", count, "--no-wait"])
            .well();
        rack.kill_process(1, pid);
        let job = last_job(&rack);
        rack.assert_alive();
        rack.console(&["node", "join", "1"]).well();
        let id = job["id"].to_string();
        rack.console(&["job", "wait", &id]).well();
        let ended = last_job(&rack);
        assert_eq!(
            (&ended["id"], &ended["state"]),
            (&job["id"], &json!("finished"))
        );
        assert_vcpus(&rack, count.parse().expect("a number"));
        if job["ended"] == false {
            caught = true;
            let events = rack.console(&["events"]).well().out();
            let step = format!("job {id} step");
            let taken = events.rfind("is in charge").expect("it took over");
            let done = events.rfind(&step).expect("steps");
            assert!(taken < done, "finished by who came after: {events}");
            break;
        }
    }
    assert!(caught, "no job was in mid-way");
    rack.assert_healthy();
    rack.down();
}

/// Begins to bring a rack up, and waits until somebody decides in it.
fn begin(name: &'static str, append: &str) -> (Up, Started) {
    let bench = Bench::new();
    let words = "--cores 2 --vcpus 1 --memory 256M --rootfs busybox --control 1 --append";
    let words = words.split(' ').chain([append]);
    let up = bench.line(["up", "--name", name]).words(words).start();
    let rack = Up { bench, name };
    rack.bench.wait_until("somebody decides", || {
        let status = rack.console(&["status", "--json"]);
        let status: Value = serde_json::from_slice(&status.stdout).unwrap_or_default();
        status["cluster"]["controller"] == 1
    });
    (rack, up)
}

#[test]
fn a_request_while_the_guest_boots_waits_for_it() {
    // This guest will never be up.
    let (rack, up) = begin("never", "rdinit=/bin/sh");
    let exec = rack.bench.exec(rack.name, &["true"]).finish();
    assert_eq!(exec.status, 125);
    assert!(exec.err().contains("still booting"), "{}", exec.err());
    rack.console(&["resize", "--vcpus", "2", "--no-wait"])
        .well();
    let job = last_job(&rack);
    let id = job["id"].to_string();
    assert_eq!(job["state"], "waiting");
    rack.refused(
        &["job", "wait", &id, "--timeout", "1"],
        124,
        &["still waiting"],
    );
    rack.refused(&["resize", "--vcpus", "1"], 3, &["changes the VM"]);
    rack.console(&["job", "cancel", &id]).well();
    rack.refused(&["job", "wait", &id], 4, &["rolled-back", "cancelled"]);
    let desired = &rack.json(&["status"])["cluster"]["vm"]["desired"];
    assert_eq!(desired["vcpus"], 1, "as before");
    rack.down();
    assert_ne!(up.finish().status, 0);

    let (rack, up) = begin("early", "");
    rack.console(&["resize", "--vcpus", "2", "--no-wait"])
        .well();
    let id = last_job(&rack)["id"].to_string();
    up.finish().well();
    rack.console(&["job", "wait", &id]).well();
    assert_vcpus(&rack, 2);
    rack.assert_healthy();
    rack.down();
}

#[test]
fn what_a_hung_guest_was_asked_for_is_taken_back() {
    // The small root has no chrt.
    let words = ["--cores", "2", "--vcpus", "1", "--max-vcpus", "2"];
    let more = ["--memory", "512M", "--control", "1", "--rootfs", "debian"];
    let (bench, name) = (Bench::new(), "silent");
    bench.up(name, &[&words[..], &more].concat());
    let rack = Up { bench, name };
    // Nothing else of the guest, its threads for interrupts included, gets on.
    let silence = rack.guest(&[
        "sh",
        "-c",
        "echo -1 > /proc/sys/kernel/sched_rt_runtime_us
         nohup setsid chrt -f 99 sh -c '
             sleep 1
             read up rest </proc/uptime
             end=$((${up%.*} + 25))
             while [ ${up%.*} -lt $end ]; do read up rest </proc/uptime; done
         ' >/dev/null 2>&1 </dev/null &",
    ]);
    assert_eq!(silence, "");
    std::thread::sleep(Duration::from_secs(3));
    let add = rack.console(&["vcpu", "add", "1", "--no-wait"]).well();
    let id = add.out().trim().replace("job ", "");
    let start = Instant::now();
    while last_job(&rack)["waits_for"] != "the guest to take vCPU 1" {
        assert!(start.elapsed() < Duration::from_secs(10), "it is asked");
    }
    rack.console(&["job", "cancel", &id]).well();
    rack.refused(&["job", "wait", &id], 4, &["rolled-back", "cancelled"]);
    let status = rack.json(&["status"]);
    for column in ["desired", "granted", "seen"] {
        assert_eq!(status["cluster"]["vm"][column]["vcpus"], 1, "{column}");
    }
    // It wakes up, and finds nothing of it.
    assert_vcpus(&rack, 1);
    rack.console(&["vcpu", "add", "1"]).well();
    assert_vcpus(&rack, 2);
    rack.assert_healthy();
    rack.down();
}

/// The part of the time that a vCPU finds stolen while all have work.
fn stolen(name: &'static str, vcpus: &str) -> f64 {
    let rack = Up::start(
        name,
        &["--cores", "1", "--vcpus", vcpus, "--memory", "512M"],
    );
    let out = rack.guest(&[
        "sh",
        "-c",
        "now() { awk '/^cpu / { print $9 / 100 } FILENAME ~ /uptime/ { print $1 }' \\
                 /proc/stat /proc/uptime; }
         before=$(now)
         for cpu in $(seq 0 $(($(nproc) - 1))); do
             timeout 6 taskset $((1 << cpu)) sh -c 'while :; do :; done' &
         done
         wait
         echo $before $(now)",
    ]);
    rack.assert_healthy();
    rack.down();
    let seconds: Vec<f64> = out.split_whitespace().flat_map(str::parse).collect();
    let [stolen, up, stolen_after, up_after] = seconds[..] else {
        panic!("{out}");
    };
    let vcpus: f64 = vcpus.parse().expect("a number");
    (stolen_after - stolen) / (up_after - up) / vcpus
}

#[test]
fn who_shares_a_core_sees_what_it_waits_as_stolen() {
    let shared = stolen("stolen", "2");
    assert!((0.2..0.6).contains(&shared), "{shared}");
    let alone = stolen("alone", "1");
    assert!((0.0..0.05).contains(&alone), "{alone}");
}

#[test]
fn more_vcpus_than_cores_share_them() {
    let rack = Up::start(
        "shared",
        &["--cores", "2", "--vcpus", "4", "--memory", "512M"],
    );
    assert_vcpus(&rack, 4);
    // Four that never halt, all of which get on.
    let spin = "for cpu in 0 1 2 3; do taskset $((1 << cpu)) sh -c '
        i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done; echo $0' $cpu & done; wait";
    let out = rack.guest(&["sh", "-c", spin]);
    let mut ended: Vec<_> = out.lines().collect();
    ended.sort_unstable();
    assert_eq!(ended, ["0", "1", "2", "3"]);
    rack.assert_healthy();
    rack.down();
}
