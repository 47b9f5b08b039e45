//! A command in the guest, joined to our own standard streams.

use std::io::{self, Read, Write};
use std::thread;

use anyhow::{Context, Result};
use guest_linux_config::agent_client::{AgentClient, ClientError, Event, ExecRequest, StdinWriter};
use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use vmm_shared::agent::{FailReason, WindowSize};

use crate::signals;
use crate::stdio::Output;
use crate::terminal::{self, RawMode};

const SIGPIPE: u8 = 13;

/// How a session ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// With this exit status of the command.
    Status(u8),
    /// The command could not be started: the exit status and the reason.
    NotStarted(u8, String),
    /// The connection to the guest was lost.
    Lost(ClientError),
}

/// The request for what the operator asks for: `command`, or a shell.
pub(crate) fn request(command: &[OsString], tty: bool) -> Result<ExecRequest> {
    let shell = command.is_empty();
    let request = if shell {
        ExecRequest::new(["/bin/sh", "-c", "exec \"$(command -v bash || echo sh)\" -l"])
    } else {
        ExecRequest::new(command)
    };
    if !(tty || shell && terminal::on_stdin()) {
        return Ok(request);
    }
    if !terminal::on_stdin() {
        anyhow::bail!("--tty needs a terminal on standard input; leave it out");
    }
    let size = terminal::size().unwrap_or(WindowSize { rows: 24, cols: 80 });
    let name = std::env::var_os("TERM").unwrap_or_else(|| "vt100".into());
    Ok(request.on_terminal(size).env("TERM", name))
}

/// Runs a command to its end.
pub(crate) fn run(agent: &AgentClient, request: &ExecRequest) -> Result<Outcome> {
    let mut stdout = Output::stdout()?;
    let mut stderr = Output::stderr()?;
    let session = match agent.exec(request) {
        Ok(session) => session,
        Err(error @ ClientError::BadRequest) => return Err(error.into()),
        Err(error) => return Ok(Outcome::Lost(error)),
    };
    let on_terminal = request.tty.is_some();
    let raw = on_terminal.then(RawMode::enter).transpose()?;
    signals::forward_to(session.control.clone(), on_terminal);
    let stdin = session.stdin;
    // Ends with this program: nothing can call it back from its read.
    thread::Builder::new()
        .name("stdin".into())
        .spawn(move || forward_stdin(stdin))
        .context("cannot start the input thread")?;

    let mut outcome = Outcome::Lost(ClientError::Lost("it was closed".into()));
    for event in session.events {
        let written = match event {
            Event::Stdout(bytes) => stdout.write(&bytes),
            Event::Stderr(bytes) => stderr.write(&bytes),
            Event::StdoutEof | Event::StderrEof => Ok(()),
            Event::Exited(status) => {
                outcome = Outcome::Status(status.shell_status());
                break;
            }
            Event::Failed(failure) => {
                let what = why(failure.reason, failure.errno);
                let name = request.argv.first().cloned().unwrap_or_default();
                let name = OsString::from(std::ffi::OsStr::from_bytes(&name));
                let text = format!("{}: {what}", name.display());
                outcome = Outcome::NotStarted(failure.shell_status(), text);
                break;
            }
            Event::Lost(error) => {
                outcome = Outcome::Lost(error);
                break;
            }
        };
        if let Err(error) = written {
            if error.kind() != io::ErrorKind::BrokenPipe {
                return Err(error).context("cannot write the command's output");
            }
            // Nobody reads on: what a local command would get for that.
            let _ = session.control.signal(SIGPIPE);
            outcome = Outcome::Status(128 + SIGPIPE);
            break;
        }
    }
    signals::stop_forwarding();
    drop(raw);
    Ok(outcome)
}

fn why(reason: FailReason, errno: i32) -> String {
    let what = match reason {
        FailReason::NotFound => "not found in the guest",
        FailReason::CannotRun => "cannot be run in the guest",
        FailReason::BadDirectory => "its working directory cannot be entered",
        FailReason::TooMany => "the guest runs as many commands as its agent may",
        FailReason::NoResources => "the guest has no resources for it",
    };
    if errno == 0 || reason == FailReason::NotFound {
        return what.to_owned();
    }
    format!("{what} ({})", io::Error::from_raw_os_error(errno))
}

fn forward_stdin(mut stdin: StdinWriter) {
    // Not `std::io::stdin`, whose buffer would read ahead.
    let Ok(own) = io::stdin().as_fd().try_clone_to_owned() else {
        return;
    };
    let mut own = std::fs::File::from(own);
    let mut buffer = vec![0; 64 << 10];
    loop {
        match own.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                if stdin.write_all(&buffer[..count]).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                use rustix::event::{PollFd, PollFlags, poll};
                let _ = poll(&mut [PollFd::new(&own, PollFlags::IN)], None);
            }
            Err(_) => return,
        }
    }
}
