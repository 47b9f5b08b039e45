//! Ctrl-C and its kin at every stage of `run`.

mod support;

use std::io::Read;
use std::process::{Child, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use support::{Bench, text};

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).expect("it runs");
}

/// Starts a command and waits until it runs.
fn started(bench: &Bench, script: &str) -> Child {
    let script = format!("echo ready; {script}");
    let mut child = bench.spawn(bench.command(&["run"], &["sh", "-c", &script]));
    let mut ready = [0; 6];
    let stdout = child.stdout.as_mut().expect("piped");
    stdout.read_exact(&mut ready).expect("the command starts");
    child
}

#[test]
fn before_the_command_starts_everything_is_torn_down() {
    let bench = Bench::new();
    for (number, status) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        for verb in ["run", "up"] {
            let mut line = bench.command(&[verb], if verb == "run" { &["true"] } else { &[] });
            line.env("STAND_IN", "hang");
            let child = bench.spawn(line);
            bench.wait_for_node();
            signal(&child, number);
            let out = bench.end(child);
            assert_eq!(
                out.status.code(),
                Some(status),
                "{verb}: {}",
                text(&out.stderr)
            );
            bench.assert_nothing_left();
        }
    }
}

#[test]
fn the_command_gets_the_first_interrupt_and_may_handle_it() {
    let bench = Bench::new();
    let child = started(
        &bench,
        "trap 'echo caught; exit 9' INT; for i in $(seq 1200); do sleep 0.1; done",
    );
    std::thread::sleep(Duration::from_millis(200));
    signal(&child, Signal::INT);
    let out = bench.end(child);
    assert_eq!(
        (text(&out.stdout), out.status.code()),
        ("caught\n", Some(9))
    );
    bench.assert_nothing_left();
}

#[test]
fn the_second_interrupt_ends_everything() {
    let bench = Bench::new();
    let child = started(
        &bench,
        "trap '' INT; for i in $(seq 1200); do sleep 0.1; done",
    );
    signal(&child, Signal::INT);
    std::thread::sleep(Duration::from_millis(300));
    signal(&child, Signal::INT);
    assert_eq!(bench.end(child).status.code(), Some(130));
    bench.assert_nothing_left();
}

#[test]
fn termination_is_forwarded_and_then_enforced() {
    let bench = Bench::new();
    let child = started(
        &bench,
        "trap 'exit 4' TERM; for i in $(seq 1200); do sleep 0.1; done",
    );
    std::thread::sleep(Duration::from_millis(200));
    signal(&child, Signal::TERM);
    assert_eq!(bench.end(child).status.code(), Some(4));
    let child = started(
        &bench,
        "trap '' TERM; for i in $(seq 1200); do sleep 0.1; done",
    );
    signal(&child, Signal::TERM);
    assert_eq!(bench.end(child).status.code(), Some(143));
    bench.assert_nothing_left();
}

#[test]
fn a_killed_launcher_takes_its_nodes_along() {
    let bench = Bench::new();
    let child = started(&bench, "sleep 1000");
    signal(&child, Signal::KILL);
    bench.end(child);
    bench.assert_nothing_left();
}

#[test]
fn a_hang_up_that_was_ignored_stays_so() {
    let bench = Bench::new();
    let plain = bench.command(&["run"], &["sh", "-c", "echo ready; sleep 1; echo done"]);
    let mut line = std::process::Command::new("nohup");
    line.arg(plain.get_program()).args(plain.get_args());
    for (name, value) in plain.get_envs() {
        match value {
            Some(value) => line.env(name, value),
            None => line.env_remove(name),
        };
    }
    line.stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = bench.spawn(line);
    let mut ready = [0; 6];
    let stdout = child.stdout.as_mut().expect("piped");
    stdout.read_exact(&mut ready).expect("the command starts");
    signal(&child, Signal::HUP);
    let out = bench.end(child);
    assert_eq!((text(&out.stdout), out.status.code()), ("done\n", Some(0)));
}
