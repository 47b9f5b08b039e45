//! The console from end to end, with a stand-in for the nodes: everything but
//! QEMU and the hypervisor is real.

mod support;

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use support::{Bench, text};

#[test]
fn the_exit_status_is_the_commands() {
    let bench = Bench::new();
    for status in [0, 1, 7, 255] {
        let out = bench.run(&["sh", "-c", &format!("exit {status}")]);
        assert_eq!(out.status.code(), Some(status), "{}", text(&out.stderr));
    }
    assert_eq!(
        bench.run(&["sh", "-c", "kill -TERM $$"]).status.code(),
        Some(143)
    );
    assert_eq!(bench.run(&["/nonexistent"]).status.code(), Some(127));
    assert_eq!(bench.run(&["/etc/passwd"]).status.code(), Some(126));
    bench.assert_nothing_left();
}

#[test]
fn output_and_arguments_are_exact() {
    let bench = Bench::new();
    let arguments = [
        "a b",
        "it's \"quoted\"",
        "new\nline",
        "",
        "--",
        "-x",
        "$HOME *",
    ];
    let mut command = vec!["printf", "%s\\0"];
    command.extend(arguments);
    let out = bench.run(&command);
    let expected: String = arguments.iter().map(|word| format!("{word}\0")).collect();
    assert_eq!(text(&out.stdout), expected);
    assert_eq!(text(&out.stderr), "");
    let out = bench.run(&["sh", "-c", "echo out; echo err >&2"]);
    assert_eq!((text(&out.stdout), text(&out.stderr)), ("out\n", "err\n"));
}

#[test]
fn many_binary_bytes_go_in_and_come_out() {
    let bench = Bench::new();
    let data: Vec<u8> = (0..5_000_000_u32)
        .map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[3])
        .collect();
    let (name, _up) = bench.up("bytes");
    for out in [
        bench.pipe(bench.command(&["run"], &["cat"]), &data),
        bench.pipe(bench.command(&["exec", "--name", name], &["cat"]), &data),
    ] {
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        assert!(out.stdout == data, "{} bytes came back", out.stdout.len());
    }
}

#[test]
fn a_slow_reader_gets_everything() {
    const COUNT: usize = 4 << 20;
    let bench = Bench::new();
    let (name, _up) = bench.up("slow");
    let script = format!("yes | head -c {COUNT}; yes | head -c {COUNT} >&2");
    for words in [&["exec", "--name", name][..], &["run"]] {
        let child = bench.spawn(bench.command(words, &["sh", "-c", &script]));
        std::thread::sleep(Duration::from_secs(1));
        let out = bench.end(child);
        assert_eq!((out.stdout.len(), out.stderr.len()), (COUNT, COUNT));
    }
}

#[test]
fn standard_input_may_end_early_or_never_be_read() {
    let bench = Bench::new();
    let data = vec![b'x'; 3 << 20];
    let out = bench.pipe(bench.command(&["run"], &["head", "-c", "3"]), &data);
    assert_eq!((text(&out.stdout), out.status.code()), ("xxx", Some(0)));
    let out = bench.pipe(bench.command(&["run"], &["true"]), &data);
    assert_eq!(out.status.code(), Some(0));
}

#[test]
fn a_reader_that_goes_away_ends_the_command() {
    let bench = Bench::new();
    let mut child = bench.spawn(bench.command(&["run"], &["yes"]));
    let mut first = [0; 2];
    let mut stdout = child.stdout.take().expect("piped");
    stdout.read_exact(&mut first).expect("some output");
    drop(stdout);
    assert_eq!(bench.end(child).status.code(), Some(141));
    bench.assert_nothing_left();
}

#[test]
fn up_exec_status_down() {
    let bench = Bench::new();
    let (name, up) = bench.up("life");
    let out = bench.viaduct(&["up", "--name", name], &[]);
    assert_eq!(out.status.code(), Some(125));
    assert!(
        text(&out.stderr).contains("already up"),
        "{}",
        text(&out.stderr)
    );

    let out = bench.viaduct(&["exec", "--name", name], &["sh", "-c", "echo hi; exit 3"]);
    assert_eq!((text(&out.stdout), out.status.code()), ("hi\n", Some(3)));
    assert_eq!(
        bench
            .viaduct(&["exec", "--name", name], &["/none"])
            .status
            .code(),
        Some(127)
    );

    let out = bench.viaduct(&["status", "--name", name, "--json"], &[]);
    let report = text(&out.stdout);
    assert!(report.contains("\"state\": \"running\""), "{report}");
    assert!(report.contains("42"), "{report}");
    for what in ["status", "nodes", "vcpus", "memory"] {
        let out = bench.viaduct(&[what, "--name", name], &[]);
        assert_eq!(out.status.code(), Some(0), "{what}");
    }
    let out = bench.viaduct(&["console", "--no-follow", "--name", name], &[]);
    assert_eq!(text(&out.stdout), "stand-in: booting\r\n");
    drop(up);
    let out = bench.viaduct(&["exec", "--name", name], &["true"]);
    assert!(
        text(&out.stderr).contains("no rack named life"),
        "{}",
        text(&out.stderr)
    );
    bench.assert_nothing_left();
}

#[test]
fn keys_reach_the_console() {
    let bench = Bench::new();
    let (name, _up) = bench.up("keys");
    let mut child = bench.spawn(bench.command(&["console", "--name", name], &[]));
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all(b"ping").expect("writable");
    let mut seen = vec![0; b"stand-in: booting\r\nping".len()];
    let mut stdout = child.stdout.take().expect("piped");
    stdout.read_exact(&mut seen).expect("an echo");
    assert!(seen.ends_with(b"ping"));
    child.kill().expect("ours");
    bench.end(child);
}

#[test]
fn garbage_and_dead_clients_harm_nobody() {
    let bench = Bench::new();
    let (name, _up) = bench.up("sturdy");
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"{}\n",
        b"\xff\xfe\n",
        b"\n",
    ] {
        let answer = bench.talk(name, garbage);
        assert!(text(&answer).contains("refused"), "{}", text(&answer));
    }
    let exec = b"{\"version\":2,\"request\":\"exec\"}\n";
    let mut frames = exec.to_vec();
    frames.extend([0xff; 100]);
    bench.talk(name, &frames);
    // Clients that are killed while much is on its way.
    for _ in 0..5 {
        let mut child = bench.spawn(bench.command(&["exec", "--name", name], &["yes"]));
        let mut first = [0; 1];
        let mut stdout = child.stdout.take().expect("piped");
        stdout.read_exact(&mut first).expect("some output");
        child.kill().expect("ours");
        bench.end(child);
    }
    let out = bench.viaduct(&["exec", "--name", name], &["echo", "alive"]);
    assert_eq!(text(&out.stdout), "alive\n");
}

#[test]
fn many_commands_run_side_by_side() {
    let bench = Bench::new();
    let (name, _up) = bench.up("many");
    let children: Vec<_> = (0..8)
        .map(|at| {
            let script = format!("sleep 0.2; echo {at}; exit {at}");
            bench.spawn(bench.command(&["exec", "--name", name], &["sh", "-c", &script]))
        })
        .collect();
    for (at, child) in (0..).zip(children) {
        let out = bench.end(child);
        assert_eq!(text(&out.stdout), format!("{at}\n"));
        assert_eq!(out.status.code(), Some(at));
    }
}

#[test]
fn a_rack_that_cannot_start_says_why_in_one_line() {
    let bench = Bench::new();
    for (fault, cause) in [
        ("qemu-error", "cannot set up guest memory"),
        ("boot-failure", "this CPU has no SVM"),
        ("panic", "broken invariant"),
        ("crash", "Kernel panic: oh no"),
        ("silent", "has not joined"),
        ("hang", "did not answer"),
    ] {
        for verb in ["run", "up"] {
            let command = if verb == "run" { &["true"][..] } else { &[] };
            let mut line = bench.command(&[verb, "--boot-timeout", "2"], command);
            line.env("STAND_IN", fault);
            let out = bench.end(bench.spawn(line));
            let said = text(&out.stderr);
            assert_eq!(out.status.code(), Some(125), "{fault}: {said}");
            assert_eq!(said.lines().count(), 1, "{fault}: {said}");
            assert!(said.contains(cause), "{fault}: {said}");
            assert_eq!(text(&out.stdout), "");
        }
    }
    bench.assert_nothing_left();
}

#[test]
fn a_hung_guest_is_still_taken_down() {
    let bench = Bench::new();
    let (name, up) = bench.up("hung");
    std::mem::forget(up);
    bench.stop_nodes();
    let start = Instant::now();
    let out = bench.viaduct(&["down", "--timeout", "1", "--name", name], &[]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    assert!(start.elapsed() < Duration::from_secs(8));
    bench.assert_nothing_left();
}

#[test]
fn a_killed_supervisor_leaves_a_name_that_can_be_used_again() {
    let bench = Bench::new();
    let (name, up) = bench.up("again");
    bench.kill_supervisor(name);
    std::mem::forget(up);
    let out = bench.viaduct(&["exec", "--name", name], &["true"]);
    assert!(
        text(&out.stderr).contains("no rack named"),
        "{}",
        text(&out.stderr)
    );
    bench.assert_nothing_left();
    let (_, _up) = bench.up("again");
}
