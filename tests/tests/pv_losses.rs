//! The paravirtual guest goes on without nodes that are killed: what had
//! nothing there does not notice, what had loses just that.

use rustix::process::{Signal, kill_process};
use viaduct_tests::{Bench, Started, Up};

const NAME: &str = "losses";

/// A paravirtual guest on so many nodes of one vCPU.
fn up(nodes: &str) -> Up {
    let bench = Bench::new();
    let shape = ["--nodes", nodes, "--cores", "1", "--memory", "768M"];
    let words = [&["--guest", "pv", "--rootfs", "debian"], &shape[..]].concat();
    bench.up(NAME, &words);
    Up { bench, name: NAME }
}

/// Starts a command, and waits until it says something.
fn begin(up: &Up, script: &str) -> Started {
    let started = up.bench.exec(NAME, &["sh", "-c", script]).start();
    started.wait_for_output();
    started
}

fn run(up: &Up, script: &str) -> String {
    up.guest(&["sh", "-c", script])
}

fn send(up: &Up, node: usize, signal: Signal) {
    kill_process(up.pid(node), signal).expect("it runs");
}

fn kill(up: &Up, node: usize) {
    up.kill(node);
    up.assert_alive();
}

/// The VM runs, and nothing is left of the rack.
fn down(up: Up) {
    assert_eq!(up.json(&["status"])["vm"]["state"], "running");
    up.down();
}

/// Computes for a second or so, touching some memory, and prints the result.
const COMPUTE: &str = "i=0; while [ $i -lt 300000 ]; do i=$((i + 1)); done; echo $i";

#[test]
fn whoever_had_nothing_on_a_killed_node_goes_on() {
    let up = up("3");
    for (node, left) in [(2, "0,1"), (1, "0")] {
        run(&up, "rm -f /tmp/wake; mkfifo /tmp/wake");
        let on = |cpus: &str, script: &str| {
            let script = format!("exec 3<>/tmp/wake; echo begin; {script}");
            let line = format!("exec taskset -c {cpus} sh -c '{script}'");
            begin(&up, &line)
        };
        let stays = on("0", COMPUTE);
        let ends = on(&node.to_string(), "while :; do :; done");
        let waits = on(&node.to_string(), "read word <&3; echo $word");
        run(
            &up,
            &format!("for at in {node} 0; do taskset -c $at cp /bin/bash /tmp/$at; done"),
        );
        kill(&up, node);
        // It ran there, and is gone as if killed.
        let ends = ends.finish();
        assert_eq!(
            (ends.status, ends.out().as_str()),
            (128 + 9, "begin\n"),
            "{}",
            ends.err()
        );
        // It had its memory there: it ends as it wakes up.
        run(&up, "echo word >/tmp/wake");
        let waits = waits.finish();
        assert_eq!(
            (waits.status, waits.out().as_str()),
            (128 + 7, "begin\n"),
            "{}",
            waits.err()
        );
        let stays = stays.finish().well();
        assert_eq!(stays.out(), "begin\n300000\n");
        // What was written there is lost, and can be made anew.
        let script = format!(
            "cmp /tmp/0 /bin/bash && echo here
            cat /tmp/{node} >/dev/null 2>&1 || echo lost
            cp /bin/bash /tmp/{node} && cmp /tmp/{node} /bin/bash && echo anew
            nproc; grep -c ^cpu[0-9] /proc/stat; cat /sys/devices/system/cpu/online"
        );
        let expected = format!("here\nlost\nanew\n{node}\n{node}\n{left}\n");
        assert_eq!(run(&up, &script), expected);
        let pairs = format!("for i in 1 2 3 4 5 6 7 8; do taskset -c {left} true; done; echo on");
        assert_eq!(run(&up, &pairs), "on\n");
    }
    down(up);
}

/// What a process of several threads loses.
const PROGRAM: &str = include_str!("../programs/losses.c");

#[test]
fn a_process_loses_its_threads_and_pages_there_and_no_others() {
    let up = up("2");
    let line = up.bench.exec(
        NAME,
        &[
            "sh",
            "-c",
            "cat >/tmp/l.c; exec taskset -c 0 gcc -O1 -pthread /tmp/l.c -o /tmp/l",
        ],
    );
    line.input(PROGRAM.into()).finish().well();
    let program = begin(&up, "exec taskset -c 0 /tmp/l");
    kill(&up, 1);
    run(&up, "touch /tmp/go");
    let done = program.finish().well();
    let expected = "ready\nthread lost\nwaited 0\nhere 0 pages lost\nthere all lost\n\
        write -1 Bad address\nanew 0 pages lost\n";
    assert_eq!(done.out(), expected);
    down(up);
}

#[test]
fn a_node_that_falls_silent_is_lost_and_stops_itself_when_it_wakes_up() {
    let up = up("2");
    let ends = begin(
        &up,
        "exec taskset -c 1 sh -c 'echo begin; while :; do :; done'",
    );
    send(&up, 1, Signal::STOP);
    assert_eq!(ends.finish().status, 128 + 9);
    up.assert_alive();
    send(&up, 1, Signal::CONT);
    up.bench.wait_until("it stops itself", || {
        up.json(&["nodes"])[1]["state"] == "stopped"
    });
    up.assert_alive();
    down(up);
}

#[test]
fn a_node_that_is_killed_in_the_kernel_ends_the_vm_with_a_reason_or_not_at_all() {
    let up = up("2");
    let calls = begin(
        &up,
        "exec taskset -c 1 sh -c 'echo begin; exec dd if=/dev/zero of=/dev/null bs=1'",
    );
    send(&up, 1, Signal::KILL);
    let calls = calls.finish();
    let after = up.bench.exec(NAME, &["echo", "alive"]).finish();
    if after.status == 0 {
        assert_eq!((after.out().as_str(), calls.status), ("alive\n", 128 + 9));
    } else {
        assert_eq!((after.status, calls.status), (125, 125));
        let said = after.err();
        assert!(
            said.contains("processor 1 was lost in the kernel"),
            "{said}"
        );
    }
    up.down();
}
