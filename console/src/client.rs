//! Requests to the process that holds a rack.

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::names::{RackName, RuntimeDir};
use crate::protocol::{Envelope, Reply, Report, Request, VERSION, receive, send};

/// How long a rack may take to answer a plain question.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

fn not_up(name: &RackName) -> String {
    format!("no rack named {name} is up; start one with: viaduct up --name {name}")
}

/// Connects, asks, and returns the connection and the answer.
fn ask(name: &RackName, request: Request, limit: Duration) -> Result<(UnixStream, Reply)> {
    let dir = RuntimeDir::of(name)?;
    if dir.holder()?.is_none() {
        bail!(not_up(name));
    }
    let mut rack = match UnixStream::connect(dir.socket()) {
        Ok(rack) => rack,
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::ConnectionRefused
            ) =>
        {
            bail!("the rack named {name} is just starting or stopping; try again shortly");
        }
        Err(error) => return Err(error).context("cannot reach the rack"),
    };
    let silent = || {
        format!("the rack named {name} does not answer; stop it with: viaduct down --name {name}")
    };
    rack.set_read_timeout(Some(limit)).with_context(silent)?;
    let envelope = Envelope {
        version: VERSION,
        request,
    };
    send(&mut rack, &envelope).with_context(silent)?;
    let reply = receive(&mut rack).with_context(silent)?;
    rack.set_read_timeout(None).with_context(silent)?;
    match reply {
        Reply::Refused(why) => bail!(why),
        reply => Ok((rack, reply)),
    }
}

fn unexpected(name: &RackName) -> anyhow::Error {
    anyhow::anyhow!("the rack named {name} was started by another version of viaduct; use that one")
}

/// How the rack is.
pub(crate) fn status(name: &RackName) -> Result<Report> {
    match ask(name, Request::Status, ANSWER_LIMIT)? {
        (_, Reply::Status(report)) => Ok(*report),
        _ => Err(unexpected(name)),
    }
}

/// A connection that carries the agent's protocol from now on.
pub(crate) fn exec(name: &RackName) -> Result<UnixStream> {
    match ask(name, Request::Exec, ANSWER_LIMIT)? {
        (rack, Reply::Ready) => Ok(rack),
        _ => Err(unexpected(name)),
    }
}

/// A connection that carries the serial console from now on.
pub(crate) fn console(name: &RackName, follow: bool) -> Result<UnixStream> {
    match ask(name, Request::Console { follow }, ANSWER_LIMIT)? {
        (rack, Reply::Ready) => Ok(rack),
        _ => Err(unexpected(name)),
    }
}

/// Stops the rack; kills it if it does not answer.
pub(crate) fn down(name: &RackName, seconds: u64) -> Result<()> {
    let dir = RuntimeDir::of(name)?;
    let Some(pid) = dir.holder()? else {
        bail!(not_up(name));
    };
    let limit = Duration::from_secs(seconds.saturating_add(10));
    let asked = ask(name, Request::Down { seconds }, limit);
    if asked.is_err()
        && let Some(pid) = Pid::from_raw(pid)
    {
        // Its nodes die with it, and its lock is free again.
        let _ = kill_process(pid, Signal::KILL);
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    while dir.holder()?.is_some() {
        if Instant::now() > deadline {
            bail!("the rack named {name} does not end; kill process {pid}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
