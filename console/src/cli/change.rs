//! Words that change what runs: desired sizes, nodes, vCPUs, jobs, policies.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use rack::Size;

use super::{ShowArgs, Target};

pub(super) const CHANGE_STATUSES: &str = "\
Exit statuses:
  0    it is as asked
  3    it cannot be, and nothing was changed (one line on stderr says why)
  4    its job ended otherwise: rolled back, cancelled, in part, or stuck
  124  --timeout is over; the job goes on
  125  Viaduct itself failed, or this rack has no control node";

/// What all changes have in common.
#[derive(Debug, Args)]
pub(crate) struct ChangeArgs {
    #[command(flatten)]
    pub target: Target,
    /// Only show the plan and what it costs.
    #[arg(long)]
    pub dry_run: bool,
    /// Don't wait for the job's end; print its number.
    #[arg(long, conflicts_with = "dry_run")]
    pub no_wait: bool,
    /// Wait so many seconds at most; the job goes on.
    #[arg(long, value_name = "SECONDS", conflicts_with = "no_wait")]
    pub timeout: Option<u64>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ResizeArgs {
    /// vCPUs that the VM shall have.
    #[arg(long, value_name = "N")]
    pub vcpus: Option<u32>,
    /// Memory that it shall have, a multiple of 2M.
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<Size>,
    #[command(flatten)]
    pub change: ChangeArgs,
}

#[derive(Debug, Args)]
pub(crate) struct NodeArgs {
    /// Which.
    #[arg(value_name = "N")]
    pub node: u16,
    #[command(flatten)]
    pub change: ChangeArgs,
}

#[derive(Debug, Args)]
pub(crate) struct JoinArgs {
    /// Which.
    #[arg(value_name = "N")]
    pub node: u16,
    #[command(flatten)]
    pub target: Target,
    /// Only say whether it can.
    #[arg(long)]
    pub dry_run: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// Nothing new comes onto it.
    #[command(after_help = CHANGE_STATUSES)]
    Cordon(NodeArgs),
    /// Things may come onto it again.
    #[command(after_help = CHANGE_STATUSES)]
    Uncordon(NodeArgs),
    /// Move all that the VM has there to other nodes, and cordon it.
    #[command(after_help = CHANGE_STATUSES)]
    Drain(NodeArgs),
    /// Let it come back after it has left; or, if it decides, after it has
    /// ended.
    #[command(after_help = CHANGE_STATUSES)]
    Join(JoinArgs),
    /// Take it out of the tables; it must give nothing. Then it may end.
    #[command(after_help = CHANGE_STATUSES)]
    Leave(NodeArgs),
}

#[derive(Debug, Subcommand)]
pub(crate) enum VcpuCommand {
    /// Let a vCPU go on on another node.
    #[command(after_help = CHANGE_STATUSES)]
    Move(MoveArgs),
    /// Give the guest a vCPU that it does not have.
    #[command(after_help = CHANGE_STATUSES)]
    Add(AddArgs),
    /// Take a vCPU away; any but the one that the guest booted on.
    #[command(after_help = CHANGE_STATUSES)]
    Remove(RemoveArgs),
}

#[derive(Debug, Args)]
pub(crate) struct AddArgs {
    /// Which.
    #[arg(value_name = "I")]
    pub vcpu: u16,
    /// The node that runs it [default: the one that the guest takes it to be
    /// near to].
    #[arg(long, value_name = "N")]
    pub on: Option<u16>,
    #[command(flatten)]
    pub change: ChangeArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RemoveArgs {
    /// Which.
    #[arg(value_name = "I")]
    pub vcpu: u16,
    #[command(flatten)]
    pub change: ChangeArgs,
}

#[derive(Debug, Args)]
pub(crate) struct MoveArgs {
    /// Which.
    #[arg(value_name = "I")]
    pub vcpu: u16,
    /// The node on which it shall be.
    #[arg(long, value_name = "N")]
    pub to: u16,
    #[command(flatten)]
    pub change: ChangeArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum JobCommand {
    /// Jobs that go on, and the last that have ended.
    List(ShowArgs),
    /// Wait for a job's end.
    #[command(after_help = CHANGE_STATUSES)]
    Wait(JobWaitArgs),
    /// Undo what a job has done so far.
    #[command(after_help = CHANGE_STATUSES)]
    Cancel(CancelArgs),
}

#[derive(Debug, Args)]
pub(crate) struct CancelArgs {
    /// Which.
    #[arg(value_name = "JOB")]
    pub job: u32,
    /// Don't wait for what the guest does not answer: what it may still have
    /// stays the VM's.
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub change: ChangeArgs,
}

#[derive(Debug, Args)]
pub(crate) struct JobWaitArgs {
    /// Which.
    #[arg(value_name = "JOB")]
    pub job: u32,
    /// Wait so many seconds at most.
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
    #[command(flatten)]
    pub show: ShowArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Print the policy in force.
    Show(ShowArgs),
    /// Put a policy in force; if it has a fault, the old one stays.
    #[command(after_help = CHANGE_STATUSES)]
    Load(PolicyArgs),
}

#[derive(Debug, Args)]
pub(crate) struct PolicyArgs {
    /// The policy.
    #[arg(value_name = "FILE.toml")]
    pub file: PathBuf,
    #[command(flatten)]
    pub change: ChangeArgs,
}
