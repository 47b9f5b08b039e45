//! Commands that look at the cluster's tables, and that change them.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use control_plane::policy::text;
use serde::Serialize;

use crate::cli::{
    AddArgs, ChangeArgs, EventsArgs, ExplainArgs, JobCommand, MoveArgs, NodeCommand, PolicyCommand,
    RemoveArgs, ResizeArgs, VcpuCommand,
};
use crate::names::RackName;
use crate::protocol::Request;
use crate::stdio::print;
use crate::tables::{Changed, JobReport, PlanReport, Wanted};
use crate::{client, progress, show};

/// It can't be, and nothing was changed.
const REFUSED: u8 = 3;
/// The job did not end as it was asked to.
const NOT_DONE: u8 = 4;
/// It goes on, but `--timeout` is over.
const TIMED_OUT: u8 = 124;

/// How long the rack is asked at once to wait for a job.
const WAIT_STEP: Duration = Duration::from_secs(5);

fn print_json(value: &impl Serialize) -> Result<()> {
    let value = serde_json::to_value(value).context("cannot write JSON")?;
    print(&format!("{value:#}\n"))
}

pub(crate) fn resize(args: &ResizeArgs) -> Result<u8> {
    if args.vcpus.is_none() && args.memory.is_none() {
        bail!("nothing to change: give --vcpus, --memory or both");
    }
    let wanted = Wanted::Resize {
        vcpus: args.vcpus,
        memory: args.memory.map(|size| size.0),
    };
    ask(&args.change, &wanted)
}

pub(crate) fn vcpu(command: &VcpuCommand) -> Result<u8> {
    let (wanted, change) = match command {
        VcpuCommand::Move(MoveArgs { vcpu, to, change }) => {
            let (vcpu, to) = (*vcpu, *to);
            (Wanted::MoveVcpu { vcpu, to }, change)
        }
        VcpuCommand::Add(AddArgs { vcpu, on, change }) => {
            let (vcpu, on) = (*vcpu, *on);
            (Wanted::AddVcpu { vcpu, on }, change)
        }
        VcpuCommand::Remove(RemoveArgs { vcpu, change }) => {
            (Wanted::RemoveVcpu { vcpu: *vcpu }, change)
        }
    };
    ask(change, &wanted)
}

pub(crate) fn rebalance(args: &ChangeArgs) -> Result<u8> {
    ask(args, &Wanted::Rebalance)
}

pub(crate) fn node(command: &NodeCommand) -> Result<u8> {
    match command {
        NodeCommand::Cordon(args) => ask(
            &args.change,
            &Wanted::Cordon {
                node: args.node,
                on: true,
            },
        ),
        NodeCommand::Uncordon(args) => ask(
            &args.change,
            &Wanted::Cordon {
                node: args.node,
                on: false,
            },
        ),
        NodeCommand::Drain(args) => ask(&args.change, &Wanted::Drain { node: args.node }),
        NodeCommand::Leave(args) => ask(&args.change, &Wanted::Leave { node: args.node }),
        NodeCommand::Join(args) => {
            progress::say("waiting for the node");
            let changed = client::join(&args.target.name, args.node, args.dry_run)?;
            if args.json {
                print_changed(&changed, None)?;
            }
            verdict(&changed, None)
        }
    }
}

pub(crate) fn policy(command: &PolicyCommand) -> Result<u8> {
    match command {
        PolicyCommand::Show(args) => {
            let text = client::policy(&args.target.name)?;
            if args.json {
                let rules: toml::Table = text.parse().context("the rack's policy is none")?;
                print_json(&rules)?;
            } else {
                print(&text)?;
            }
            Ok(0)
        }
        PolicyCommand::Load(args) => {
            let path = args.file.display();
            let text = std::fs::read_to_string(&args.file)
                .with_context(|| format!("cannot read the policy {path}"))?;
            let policy = match text::parse(&text) {
                Ok(policy) => policy,
                Err(why) => {
                    eprintln!("viaduct: {path}: {why}; the policy in force stays");
                    return Ok(REFUSED);
                }
            };
            let bytes = policy.as_bytes().to_vec();
            ask(&args.change, &Wanted::Policy { bytes })
        }
    }
}

pub(crate) fn job(command: &JobCommand) -> Result<u8> {
    match command {
        JobCommand::List(args) => {
            let cluster = client::cluster(&args.target.name)?;
            if args.json {
                print_json(&cluster.jobs)?;
            } else {
                print(&show::jobs(&cluster.jobs))?;
            }
            Ok(0)
        }
        JobCommand::Wait(args) => {
            let limit = args.timeout.map(Duration::from_secs);
            let job = wait(&args.show.target.name, args.job, limit)?;
            if args.show.json {
                print_json(&job)?;
            }
            Ok(end(&job))
        }
        JobCommand::Cancel(args) => {
            let (job, force) = (args.job, args.force);
            ask(&args.change, &Wanted::Cancel { job, force })
        }
    }
}

pub(crate) fn events(args: &EventsArgs) -> Result<u8> {
    let mut since = 0;
    loop {
        let events = client::events(&args.show.target.name, since)?;
        for event in &events {
            since = event.position + 1;
            match args.show.json {
                true => print(&(serde_json::to_string(event)? + "\n"))?,
                false => print(&(event.text.clone() + "\n"))?,
            }
        }
        if !args.follow {
            return Ok(0);
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

pub(crate) fn explain(args: &ExplainArgs) -> Result<u8> {
    let asked = args.vcpus.is_some() || args.memory.is_some();
    let wanted = asked.then(|| Wanted::Resize {
        vcpus: args.vcpus,
        memory: args.memory.map(|size| size.0),
    });
    let plan = client::explain(&args.show.target.name, wanted)?;
    if args.show.json {
        print_json(&plan)?;
    } else {
        print(&show::plan(&plan))?;
    }
    Ok(if plan.conflict.is_some() { REFUSED } else { 0 })
}

/// Asks, and waits for the job if there is one.
fn ask(args: &ChangeArgs, wanted: &Wanted) -> Result<u8> {
    let name = &args.target.name;
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .context("cannot make a request's number")?;
    let request = u64::from_le_bytes(bytes);
    let changed = client::change(name, wanted, request, args.dry_run)?;
    let job = match changed.job {
        Some(job) if !args.no_wait => Some(wait(name, job, args.timeout.map(Duration::from_secs))?),
        _ => None,
    };
    if args.json {
        print_changed(&changed, job.as_ref())?;
    } else if let Some(plan) = &changed.plan {
        print(&show::plan(plan))?;
    } else if let (Some(job), true) = (changed.job, args.no_wait) {
        print(&format!("job {job}\n"))?;
    }
    verdict(&changed, job.as_ref())
}

/// What came of a change, and of its job if that was waited for.
#[derive(Serialize)]
pub(crate) struct ChangedReport<'a> {
    #[serde(flatten)]
    pub changed: &'a Changed,
    pub ended: Option<&'a JobReport>,
}

fn print_changed(changed: &Changed, ended: Option<&JobReport>) -> Result<()> {
    print_json(&ChangedReport { changed, ended })
}

/// The exit status that it deserves, and a line that says why.
fn verdict(changed: &Changed, job: Option<&JobReport>) -> Result<u8> {
    match (changed.verdict.as_str(), job) {
        ("refused", _) => {
            complain(changed.reason.as_deref().unwrap_or("it was refused"));
            Ok(REFUSED)
        }
        ("unknown", _) => {
            bail!("nobody knows what came of it; see viaduct events")
        }
        (_, Some(job)) => Ok(end(job)),
        _ => Ok(0),
    }
}

fn complain(why: &str) {
    eprintln!("viaduct: {why}");
}

/// The exit status that a job deserves, and a line that says why.
fn end(job: &JobReport) -> u8 {
    let why = job.reason.as_deref().unwrap_or("");
    match (job.ended, job.fulfilled) {
        (_, true) => 0,
        (true, _) => {
            complain(&format!("job {} is {}: {why}", job.id, job.state));
            NOT_DONE
        }
        (false, _) => {
            let (id, state) = (job.id, &job.state);
            let waits = job.waits_for.as_ref();
            let waits = waits.map_or(String::new(), |what| format!(" and waits for {what}"));
            let or = match state.as_str() {
                "rolling-back" => format!(", or viaduct job cancel --force {id}"),
                _ => String::new(),
            };
            complain(&format!(
                "job {id} is still {state}{waits}; see viaduct job wait {id}{or}"
            ));
            TIMED_OUT
        }
    }
}

fn wait(name: &RackName, id: u32, limit: Option<Duration>) -> Result<JobReport> {
    let start = std::time::Instant::now();
    loop {
        let left = limit.map(|limit| limit.saturating_sub(start.elapsed()));
        let step = left.unwrap_or(WAIT_STEP).min(WAIT_STEP);
        let Some(job) = client::wait(name, id, step)? else {
            bail!("there is no job {id}; see viaduct job list");
        };
        if job.ended || left.is_some_and(|left| left <= step) {
            return Ok(job);
        }
        progress::say(format!(
            "job {id} {}: step {} of {}",
            job.state, job.done, job.steps
        ));
    }
}

impl Request {
    /// Whether serving it may take so long that it is to be waited for.
    pub(crate) const fn patience(&self) -> Duration {
        match self {
            Self::Join { .. } | Self::Wait { .. } => Duration::from_secs(30),
            _ => Duration::from_secs(10),
        }
    }
}

impl PlanReport {
    /// Whether nothing would be done.
    pub(crate) fn is_empty(&self) -> bool {
        self.steps.is_empty() && self.conflict.is_none()
    }
}
