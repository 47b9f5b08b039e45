//! The agent as an ordinary process, spoken to by the launcher's client.

use std::io::{self, Read, Write};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use guest_linux_config::agent_client::{
    AgentClient, ClientError, Event, Events, ExecRequest, Session,
};
use vmm_shared::agent::{
    ExitStatus, FailReason, Frame, Hello, INITIAL_WINDOW, Message, PROTOCOL_VERSION, WindowSize,
};

/// Only a hang takes so long.
const HANG: Duration = Duration::from_secs(60);

struct Agent {
    process: Child,
    client: AgentClient,
}

impl Agent {
    fn start() -> Self {
        let mut process = spawn_agent();
        let reader = process.stdout.take().expect("piped");
        let writer = process.stdin.take().expect("piped");
        let client = AgentClient::new(reader, writer);
        client.wait_hello(HANG).expect("the agent answers");
        Self { process, client }
    }

    fn exec(&self, argv: &[&str]) -> Session {
        self.exec_request(&ExecRequest::new(argv))
    }

    fn exec_request(&self, request: &ExecRequest) -> Session {
        self.client.exec(request).expect("the request is valid")
    }

    fn run(&self, argv: &[&str]) -> Outcome {
        Outcome::of(self.exec(argv).events)
    }

    fn sh(&self, script: &str) -> Outcome {
        self.run(&["sh", "-c", script])
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn spawn_agent() -> Child {
    Command::new(env!("CARGO_BIN_EXE_viaduct-agent"))
        .arg("--serve")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the agent runs")
}

#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    last: Option<Event>,
}

impl Outcome {
    fn of(mut events: Events) -> Self {
        let mut outcome = Self {
            stdout: Vec::new(),
            stderr: Vec::new(),
            last: None,
        };
        while let Some(event) = events.next_within(HANG).expect("the command goes on") {
            assert_eq!(outcome.last, None, "the last event is the last");
            match event {
                Event::Stdout(bytes) => outcome.stdout.extend(bytes),
                Event::Stderr(bytes) => outcome.stderr.extend(bytes),
                Event::StdoutEof | Event::StderrEof => {}
                event => outcome.last = Some(event),
            }
        }
        outcome
    }

    fn code(&self) -> u8 {
        match &self.last {
            Some(Event::Exited(status)) => status.shell_status(),
            Some(Event::Failed(failure)) => failure.shell_status(),
            last => panic!("neither exited nor failed: {last:?}"),
        }
    }

    fn text(&self) -> &str {
        str::from_utf8(&self.stdout).expect("text")
    }
}

/// Bytes that show when one is lost, doubled or moved.
fn pattern(len: usize) -> Vec<u8> {
    let mut state = 1_u32;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_le_bytes()[3]
        })
        .collect()
}

#[test]
fn arguments_arrive_untouched() {
    let agent = Agent::start();
    let mut request = ExecRequest::new(["printf", "%s\\0"]);
    let arguments: [&[u8]; 8] = [
        b"",
        b" two  words ",
        b"\"'`$HOME\\",
        b"line\nline\n",
        b"*",
        b"-n",
        &[0xff, 0xfe, 0x80, 1],
        "\u{1f980}".as_bytes(),
    ];
    request.argv.extend(arguments.map(<[u8]>::to_vec));
    let outcome = Outcome::of(agent.exec_request(&request).events);
    let mut expected = arguments.join(&0);
    expected.push(0);
    assert_eq!(outcome.stdout, expected);
    assert_eq!(outcome.code(), 0);
}

#[test]
fn a_command_longer_than_a_frame_arrives() {
    let agent = Agent::start();
    let long = "x".repeat(120_000);
    let mut request = ExecRequest::new(["printf", "%s"]);
    request.argv.extend(vec![long.clone().into_bytes(); 10]);
    let outcome = Outcome::of(agent.exec_request(&request).events);
    assert_eq!(outcome.stdout.len(), 10 * long.len());

    let mut request = ExecRequest::new(["true"]);
    request.argv.push(vec![b'x'; 5 << 20]);
    assert_eq!(
        agent.client.exec(&request).err(),
        Some(ClientError::BadRequest)
    );
}

#[test]
fn what_the_kernel_refuses_is_126_and_the_agent_goes_on() {
    let agent = Agent::start();
    // One argument may have 128 KiB on Linux.
    let long = "x".repeat(200_000);
    assert_eq!(agent.run(&["true", &long]).code(), 126);
    assert_eq!(agent.run(&["true"]).code(), 0);
}

#[test]
fn environment_and_directory_are_as_asked() {
    let agent = Agent::start();
    let mut request =
        ExecRequest::new(["sh", "-c", "pwd; echo \"$A|$B|$PATH\""]).env("A", "x = y\n");
    request = request.env("B", "");
    request.cwd = Some(b"/usr/bin".to_vec());
    let outcome = Outcome::of(agent.exec_request(&request).events);
    let text = outcome.text();
    assert!(
        text.starts_with("/usr/bin\nx = y\n||/usr/local/sbin"),
        "{text}"
    );

    request.cwd = Some(b"/no/such/place".to_vec());
    let outcome = Outcome::of(agent.exec_request(&request).events);
    assert!(
        matches!(&outcome.last, Some(Event::Failed(f)) if f.reason == FailReason::BadDirectory)
    );
}

#[test]
fn binary_output_of_32_mib_is_exact() {
    let agent = Agent::start();
    let expected = pattern(32 << 20);
    let file = std::env::temp_dir().join(format!("viaduct-agent-{}", std::process::id()));
    std::fs::write(&file, &expected).expect("temporary file");
    let outcome = agent.run(&["cat", file.to_str().expect("plain path")]);
    std::fs::remove_file(&file).expect("it was made");
    assert!(outcome.stdout == expected, "{} bytes", outcome.stdout.len());
    assert_eq!(outcome.code(), 0);
}

#[test]
fn input_of_8_mib_goes_through_cat() {
    let agent = Agent::start();
    let sent = pattern(8 << 20);
    let Session {
        mut stdin, events, ..
    } = agent.exec(&["cat"]);
    let copy = sent.clone();
    let feeder = thread::spawn(move || stdin.write_all(&copy));
    let outcome = Outcome::of(events);
    feeder.join().expect("no panic").expect("all taken");
    assert!(outcome.stdout == sent, "{} bytes", outcome.stdout.len());
    assert_eq!(outcome.code(), 0);
}

#[test]
fn input_that_nobody_reads_ends_the_writer() {
    let agent = Agent::start();
    let Session {
        mut stdin, events, ..
    } = agent.exec(&["head", "-c", "3"]);
    let feeder = thread::spawn(move || stdin.write_all(&vec![b'y'; 8 << 20]));
    let outcome = Outcome::of(events);
    assert_eq!(outcome.stdout, b"yyy");
    let error = feeder.join().expect("no panic").expect_err("cut off");
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
}

#[test]
fn exit_statuses_are_passed_on() {
    let agent = Agent::start();
    for code in [0, 1, 7, 255] {
        let outcome = agent.sh(&format!("exit {code}"));
        assert_eq!(outcome.last, Some(Event::Exited(ExitStatus::Code(code))));
    }
    for signal in [1, 9, 15, 11] {
        let outcome = agent.sh(&format!("kill -{signal} $$"));
        assert_eq!(
            outcome.last,
            Some(Event::Exited(ExitStatus::Signal(signal)))
        );
        assert_eq!(outcome.code(), 128 + signal);
    }
}

#[test]
fn what_cannot_be_run_says_why() {
    let agent = Agent::start();
    assert_eq!(agent.run(&["no-such-program"]).code(), 127);
    assert_eq!(agent.run(&["/no/such/program"]).code(), 127);
    assert_eq!(agent.run(&[""]).code(), 127);
    assert_eq!(agent.run(&["/etc/passwd"]).code(), 126);
    assert_eq!(agent.run(&["/etc"]).code(), 126);
}

#[test]
fn output_streams_stay_apart_and_complete() {
    let agent = Agent::start();
    let outcome = agent.sh("echo out; echo err >&2; exec 1>&-; echo more >&2");
    assert_eq!(outcome.stdout, b"out\n");
    assert_eq!(outcome.stderr, b"err\nmore\n");
}

#[test]
fn a_reader_that_stands_still_blocks_nobody() {
    let agent = Agent::start();
    let slow = agent.exec(&["sh", "-c", "yes slow | head -c 4000000; echo end >&2"]);
    for _ in 0..20 {
        assert_eq!(agent.sh("echo quick").stdout, b"quick\n");
    }
    // Nothing was taken, so no more than a window can have come.
    thread::sleep(Duration::from_millis(200));
    let outcome = Outcome::of(slow.events);
    assert_eq!(outcome.stdout.len(), 4_000_000);
    assert_eq!(outcome.stderr, b"end\n");
}

#[test]
fn the_agent_waits_for_credit() {
    let mut process = spawn_agent();
    let (mut input, mut output) = (
        process.stdin.take().expect("piped"),
        process.stdout.take().expect("piped"),
    );
    use vmm_shared::agent::{Frame, Hello, Message, decode, encode_exec};
    let mut bytes = Vec::new();
    let hello = Hello {
        version: vmm_shared::agent::PROTOCOL_VERSION,
        nonce: 5,
    };
    Frame {
        stream: 0,
        message: Message::Hello(hello),
    }
    .encode(&mut bytes);
    let mut exec = Vec::new();
    encode_exec(&mut exec, None, b"", &["yes"], &[]).expect("valid");
    Frame {
        stream: 9,
        message: Message::Exec(&exec),
    }
    .encode(&mut bytes);
    input.write_all(&bytes).expect("taken");

    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        output.read_to_end(&mut all).map(|_| all)
    });
    thread::sleep(Duration::from_millis(500));
    drop(input); // The agent hangs up on `yes` and ends.
    let all = reader.join().expect("no panic").expect("readable");
    process.wait().expect("it ends");
    let (mut at, mut total) = (0, 0);
    while let Some((frame, len)) = decode(&all[at..]).expect("valid frames") {
        at += len;
        if let Message::Stdout(bytes) = frame.message {
            total += bytes.len();
        }
    }
    assert_eq!(u32::try_from(total), Ok(INITIAL_WINDOW));
}

#[test]
fn many_sessions_run_at_once() {
    let agent = Agent::start();
    let sessions: Vec<_> = (0..40)
        .map(|index| {
            let script = format!("cat; echo {index}; exit {index}");
            (index, agent.exec(&["sh", "-c", &script]))
        })
        .collect();
    let workers: Vec<_> = sessions
        .into_iter()
        .rev()
        .map(|(index, session)| {
            thread::spawn(move || {
                let Session {
                    mut stdin, events, ..
                } = session;
                stdin.write_all(b"in ").expect("taken");
                drop(stdin);
                let outcome = Outcome::of(events);
                assert_eq!(outcome.text(), format!("in {index}\n"));
                assert_eq!(outcome.code(), index);
            })
        })
        .collect();
    for worker in workers {
        worker.join().expect("as expected");
    }
}

#[test]
fn more_sessions_than_allowed_are_refused_and_those_running_go_on() {
    let agent = Agent::start();
    let running: Vec<_> = (0..256).map(|_| agent.exec(&["cat"])).collect();
    let outcome = agent.run(&["true"]);
    assert!(matches!(&outcome.last, Some(Event::Failed(f)) if f.reason == FailReason::TooMany));
    for session in running {
        drop(session.stdin);
        assert_eq!(Outcome::of(session.events).code(), 0);
    }
    assert_eq!(agent.run(&["true"]).code(), 0);
}

#[test]
fn a_terminal_is_one() {
    let agent = Agent::start();
    let size = WindowSize {
        rows: 33,
        cols: 101,
    };
    let script = "test -t 0 && test -t 1 && test -t 2 && stty size && echo $TERM; \
                  trap 'stty size; exit 3' WINCH; echo ready; read line; while :; do sleep 0.05; done";
    let request = ExecRequest::new(["sh", "-c", script])
        .on_terminal(size)
        .env("TERM", "vt100");
    let Session {
        mut stdin,
        mut events,
        control,
    } = agent.exec_request(&request);
    let mut seen = String::new();
    while !seen.contains("ready") {
        match events.next_within(HANG).expect("goes on") {
            Some(Event::Stdout(bytes)) => seen.push_str(str::from_utf8(&bytes).expect("text")),
            event => panic!("{event:?} after {seen}"),
        }
    }
    assert_eq!(seen.trim_end(), "33 101\r\nvt100\r\nready");
    stdin.write_all(b"typed\n").expect("taken");
    control
        .resize(WindowSize { rows: 5, cols: 6 })
        .expect("sent");
    let outcome = Outcome::of(events);
    assert!(outcome.text().contains("typed"), "the terminal echoes");
    assert!(outcome.text().ends_with("5 6\r\n"), "{}", outcome.text());
    assert_eq!(outcome.code(), 3);
}

#[test]
fn a_terminal_passes_everything_before_the_exit() {
    let agent = Agent::start();
    let size = WindowSize { rows: 24, cols: 80 };
    let request = ExecRequest::new(["seq", "20000"]).on_terminal(size);
    let outcome = Outcome::of(agent.exec_request(&request).events);
    assert!(outcome.text().ends_with("19999\r\n20000\r\n"));
    assert_eq!(outcome.text().lines().count(), 20_000);

    let request = ExecRequest::new(["cat"]).on_terminal(size);
    let Session {
        mut stdin, events, ..
    } = agent.exec_request(&request);
    stdin.write_all(b"line\n").expect("taken");
    drop(stdin);
    let outcome = Outcome::of(events);
    assert_eq!(outcome.text(), "line\r\nline\r\n");
    assert_eq!(outcome.code(), 0);
}

#[test]
fn control_c_on_a_terminal_reaches_the_command() {
    let agent = Agent::start();
    let size = WindowSize { rows: 24, cols: 80 };
    let request = ExecRequest::new(["sh", "-c", "echo ready; exec sleep 100"]).on_terminal(size);
    let Session {
        mut stdin,
        mut events,
        ..
    } = agent.exec_request(&request);
    let first = events.next_within(HANG).expect("goes on");
    assert_eq!(first, Some(Event::Stdout(b"ready\r\n".to_vec())));
    stdin.write_all(&[3]).expect("taken");
    assert_eq!(
        Outcome::of(events).last,
        Some(Event::Exited(ExitStatus::Signal(2)))
    );
}

#[test]
fn signals_reach_the_whole_group() {
    let agent = Agent::start();
    let session = agent.exec(&["sh", "-c", "sleep 1000 & echo ready; wait"]);
    let mut events = session.events;
    let first = events.next_within(HANG).expect("goes on");
    assert_eq!(first, Some(Event::Stdout(b"ready\n".to_vec())));
    session.control.signal(15).expect("sent");
    let outcome = Outcome::of(events);
    assert_eq!(outcome.last, Some(Event::Exited(ExitStatus::Signal(15))));
    // A signal after the end is no error.
    session.control.signal(15).expect("sent");
    assert_eq!(session.control.signal(0), Err(ClientError::BadRequest));
}

#[test]
fn a_background_process_does_not_hold_up_the_exit() {
    let agent = Agent::start();
    let start = Instant::now();
    let outcome = agent.sh("seq 1 10000; (sleep 5; echo late) & echo end; exit 4");
    assert!(outcome.text().ends_with("10000\nend\n"));
    assert_eq!(outcome.code(), 4);
    let outcome = agent.sh("yes & echo $! >&2; exit 5");
    assert_eq!(outcome.code(), 5);
    let pid = str::from_utf8(&outcome.stderr).expect("text").trim();
    assert!(start.elapsed() < Duration::from_secs(5));
    // It was not killed by a broken pipe.
    thread::sleep(Duration::from_millis(300));
    assert_eq!(agent.run(&["sh", "-c", &format!("kill {pid}")]).code(), 0);
}

#[test]
fn a_session_given_up_is_ended() {
    let agent = Agent::start();
    let file = std::env::temp_dir().join(format!("viaduct-agent-pid-{}", std::process::id()));
    let name = file.to_str().expect("plain path");
    let script = format!(
        "echo $$ >{name}; trap '' HUP; echo ready; for i in $(seq 1200); do sleep 0.1; done"
    );
    let mut session = agent.exec(&["sh", "-c", &script]);
    session.events.next_within(HANG).expect("goes on");
    drop(session);
    let pid = std::fs::read_to_string(&file).expect("written");
    std::fs::remove_file(&file).expect("it was made");
    let deadline = Instant::now() + HANG;
    while agent.sh(&format!("kill -0 {pid}")).code() == 0 {
        assert!(Instant::now() < deadline, "it still runs");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn garbage_is_survived() {
    let mut process = spawn_agent();
    let reader = process.stdout.take().expect("piped");
    let mut writer = process.stdin.take().expect("piped");
    writer.write_all(&pattern(100_000)).expect("taken");
    let client = AgentClient::new(reader, writer);
    client.wait_hello(HANG).expect("back in step");
    let agent = Agent { process, client };
    assert_eq!(agent.sh("echo fine").stdout, b"fine\n");
    agent.client.ping(HANG).expect("alive");
}

#[test]
fn a_dead_agent_is_noticed() {
    let mut agent = Agent::start();
    let session = agent.exec(&["sleep", "1000"]);
    agent.process.kill().expect("it runs");
    let outcome = Outcome::of(session.events);
    assert!(matches!(outcome.last, Some(Event::Lost(_))));
    assert!(agent.client.exec(&ExecRequest::new(["true"])).is_err());
}

#[test]
fn no_answer_is_told() {
    let (_keep, other) = io::pipe().expect("pipe");
    let client = AgentClient::new(_keep, io::sink());
    let short = Duration::from_millis(50);
    assert_eq!(client.wait_hello(short), Err(ClientError::NoAnswer(short)));
    drop(other);
}

#[test]
fn an_agent_that_nobody_hears_ends() {
    let mut process = spawn_agent();
    let mut stdout = process.stdout.take().expect("piped");
    let mut first = [0];
    stdout.read_exact(&mut first).expect("it says hello");
    drop(stdout);
    // Its input stays open, but every answer is a failure from now on.
    let mut stdin = process.stdin.take().expect("piped");
    let mut bytes = Vec::new();
    let (version, nonce) = (PROTOCOL_VERSION, 1);
    let message = Message::Hello(Hello { version, nonce });
    let stream = 0;
    Frame { stream, message }.encode(&mut bytes);
    stdin.write_all(&bytes).expect("it listens");
    let start = Instant::now();
    while process.try_wait().expect("ours").is_none() {
        assert!(start.elapsed() < HANG, "it goes on for nobody");
        thread::sleep(Duration::from_millis(5));
    }
}
