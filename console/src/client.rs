//! Requests to the process that holds a rack.

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::names::{RackName, RuntimeDir};
use crate::protocol::{Direct, Envelope, Reply, Report, Request, VERSION, receive, send};
use crate::tables::{Changed, ClusterReport, Event, JobReport, PlanReport, Wanted};

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

/// Asks a plain question.
fn question<T>(
    name: &RackName,
    request: Request,
    take: impl FnOnce(Reply) -> Option<T>,
) -> Result<T> {
    let limit = request.patience();
    let (_, reply) = ask(name, request, limit)?;
    take(reply).ok_or_else(|| unexpected(name))
}

/// The cluster's tables.
pub(crate) fn cluster(name: &RackName) -> Result<ClusterReport> {
    question(name, Request::Cluster, |reply| match reply {
        Reply::Cluster(report) => Some(*report),
        _ => None,
    })
}

/// The journal from a position on.
pub(crate) fn events(name: &RackName, since: u64) -> Result<Vec<Event>> {
    question(name, Request::Events { since }, |reply| match reply {
        Reply::Events(events) => Some(events),
        _ => None,
    })
}

/// What a change would take, or the best placement.
pub(crate) fn explain(name: &RackName, wanted: Option<Wanted>) -> Result<PlanReport> {
    question(name, Request::Explain { wanted }, |reply| match reply {
        Reply::Plan(plan) => Some(*plan),
        _ => None,
    })
}

/// The text of the policy in force.
pub(crate) fn policy(name: &RackName) -> Result<String> {
    question(name, Request::Policy, |reply| match reply {
        Reply::Policy(text) => Some(text),
        _ => None,
    })
}

/// Asks for a change.
pub(crate) fn change(
    name: &RackName,
    wanted: &Wanted,
    number: u64,
    dry_run: bool,
) -> Result<Changed> {
    let request = Request::Change {
        wanted: wanted.clone(),
        request: number,
        dry_run,
    };
    question(name, request, |reply| match reply {
        Reply::Changed(changed) => Some(*changed),
        _ => None,
    })
}

/// Waits for a job's end, so long at most; the job, if there is one.
pub(crate) fn wait(name: &RackName, job: u32, limit: Duration) -> Result<Option<JobReport>> {
    let milliseconds = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
    let request = Request::Wait { job, milliseconds };
    question(name, request, |reply| match reply {
        Reply::Job(job) => Some(job),
        _ => None,
    })
}

/// Lets a node come back.
pub(crate) fn join(name: &RackName, node: u16, dry_run: bool) -> Result<Changed> {
    question(name, Request::Join { node, dry_run }, |reply| match reply {
        Reply::Changed(changed) => Some(*changed),
        _ => None,
    })
}

/// Changes the VM's memory, until the guest has confirmed it.
pub(crate) fn direct(name: &RackName, change: Direct, seconds: u64) -> Result<()> {
    // The rack gives up first, and says why.
    let limit = Duration::from_secs(seconds.saturating_mul(2)) + ANSWER_LIMIT;
    match ask(name, Request::Direct { change, seconds }, limit)? {
        (_, Reply::Ready) => Ok(()),
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
