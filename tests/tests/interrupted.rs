//! Ctrl-C and its kin, at whatever moment, leave nothing behind.

use rustix::process::Signal;
use viaduct_tests::{Bench, Started};

/// How far `run` is when the signal comes.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// Perhaps before it takes signals at all.
    AtOnce,
    /// A node's process is there.
    NodeStarted,
    /// The guest's kernel talks on its console.
    Booting,
    /// The command has begun.
    Running,
}

const MOMENTS: [Moment; 4] = [
    Moment::AtOnce,
    Moment::NodeStarted,
    Moment::Booting,
    Moment::Running,
];

fn start(bench: &Bench, moment: Moment, script: &str) -> Started {
    let words = ["run", "--rootfs", "busybox", "--name", "cut"];
    let script = format!("echo ready; {script}");
    let line = bench.line(words);
    // With -v the console comes on standard error, which shows the boot.
    let line = match moment {
        Moment::Booting => line.words(["-v", "--append", "ignore_loglevel"]),
        _ => line,
    };
    let started = line.guest(["sh", "-c", &script]).start();
    match moment {
        Moment::AtOnce => {}
        Moment::NodeStarted => bench.wait_for_node(),
        Moment::Booting => started.wait_for_complaint("smpboot:"),
        Moment::Running => started.wait_for_output(),
    }
    started
}

fn check(signal: Signal, number: i32) {
    let bench = Bench::new();
    for moment in MOMENTS {
        let started = start(&bench, moment, "exec sleep 1000");
        started.signal(signal);
        let done = started.finish();
        assert_eq!(done.status, 128 + number, "{moment:?}: {}", done.err());
        bench.assert_nothing_left();
    }
}

#[test]
fn ctrl_c() {
    check(Signal::INT, 2);
}

#[test]
fn termination() {
    check(Signal::TERM, 15);
}

#[test]
fn a_closed_terminal() {
    check(Signal::HUP, 1);
}

#[test]
fn kill() {
    let bench = Bench::new();
    for moment in MOMENTS {
        let started = start(&bench, moment, "exec sleep 1000");
        started.signal(Signal::KILL);
        assert_eq!(started.finish().status, 128 + 9);
        bench.wait_until("the node ends", || bench.processes().is_empty());
    }
    // What is left of the last one's files is no obstacle, and goes.
    let words = ["run", "--rootfs", "busybox", "--name", "cut"];
    let done = bench.line(words).guest(["echo", "fine"]).finish().well();
    assert_eq!(done.out(), "fine\n");
    bench.assert_nothing_left();
}

#[test]
fn a_command_that_ignores_them() {
    let bench = Bench::new();
    let script = "while :; do sleep 1; done";
    let deaf = format!("trap 'echo no' INT TERM; echo deaf; {script}");
    let words = ["run", "--rootfs", "busybox"];
    let started = bench.line(words).guest(["sh", "-c", &deaf]).start();
    started.wait_for_output();
    started.signal(Signal::INT);
    started.wait_for_output();
    started.signal(Signal::INT);
    assert_eq!(started.finish().status, 130);
    bench.assert_nothing_left();

    let started = bench.line(words).guest(["sh", "-c", &deaf]).start();
    started.wait_for_output();
    started.signal(Signal::TERM);
    assert_eq!(started.finish().status, 143);
    bench.assert_nothing_left();
}

#[test]
fn a_rack_that_is_up() {
    let bench = Bench::new();
    let words = ["up", "--rootfs", "busybox", "--name", "cut"];
    let started = bench.line(words).start();
    bench.wait_for_node();
    started.signal(Signal::INT);
    assert_eq!(started.finish().status, 130);
    bench.assert_nothing_left();

    bench.viaduct(words).well();
    let (holder, _) = *bench
        .processes()
        .iter()
        .find(|(_, name)| name.starts_with("viaduct"))
        .expect("something holds the rack");
    rustix::process::kill_process(holder, Signal::TERM).expect("ours");
    bench.assert_nothing_left();
}
