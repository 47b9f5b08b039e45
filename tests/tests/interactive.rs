//! A person at a terminal.

use viaduct_tests::{Bench, Terminal};

#[test]
fn a_shell_with_job_control() {
    let bench = Bench::new();
    let mut terminal = Terminal::start(&bench, &["run"]);
    // A prompt that nothing else looks like, its own definition included.
    terminal.expect("# ");
    terminal.type_in("PS1='<rea''dy>'\r");
    terminal.expect("<ready>");
    terminal.type_in("tty; stty size; echo $TERM; echo $-\r");
    let said = terminal.expect("<ready>");
    assert!(said.contains("/dev/pts/"), "{said}");
    assert!(said.contains("vt100"), "{said}");
    // A shell that is interactive and controls jobs says so.
    let flags = said.lines().find(|line| line.starts_with('h'));
    let flags = flags.expect("the shell's options");
    assert!(flags.contains('m') && flags.contains('i'), "{said}");

    // Echoed as two words, printed as one: only the output matches. The job
    // itself prints it, so that it is in the foreground by then.
    let job = "sh -c 'echo be\"\"gun; exec sleep 1000'\r";
    terminal.type_in(job);
    terminal.expect("begun");
    terminal.type_in("\x03");
    terminal.expect("<ready>");
    terminal.type_in("echo \"status $?\"\r");
    terminal.expect("status 130");
    terminal.expect("<ready>");

    terminal.type_in(job);
    terminal.expect("begun");
    terminal.type_in("\x1a");
    terminal.expect("Stopped");
    terminal.expect("<ready>");
    // While the job is still known as stopped, that is what `wait` says.
    let wait = "until wait %1 2>/dev/null; s=$?; [ $s != 148 ]; do :; done";
    terminal.type_in(&format!("kill %1; {wait}; echo ended $s\r"));
    terminal.expect("ended 143");
    terminal.expect("<ready>");

    terminal.type_in("exit 3\r");
    let (status, _) = terminal.finish();
    assert_eq!(status.code(), Some(3));
    bench.assert_nothing_left();
}

#[test]
fn the_console_of_a_rack_that_is_up() {
    let bench = Bench::new();
    bench.up("seen", &["--rootfs", "busybox", "--memory", "256M"]);
    let mut terminal = Terminal::start(&bench, &["console", "--name", "seen"]);
    terminal.type_in("\r");
    terminal.expect("# ");
    terminal.type_in("echo here $((6 * 7))\r");
    terminal.expect("here 42");
    terminal.type_in("\x1d");
    let (status, _) = terminal.finish();
    assert_eq!(status.code(), Some(0));
    // The rack goes on without it.
    let done = bench.exec("seen", &["echo", "still"]).finish().well();
    assert_eq!(done.out(), "still\n");
    bench.down("seen");
    bench.assert_nothing_left();
}

#[test]
fn progress_is_shown_and_wiped_away() {
    let bench = Bench::new();
    let words = ["run", "--rootfs", "busybox", "--", "echo", "the output"];
    let mut terminal = Terminal::start(&bench, &words);
    terminal.expect("booting");
    terminal.expect("the output");
    let (status, _) = terminal.finish();
    assert_eq!(status.code(), Some(0));
    bench.assert_nothing_left();
}
