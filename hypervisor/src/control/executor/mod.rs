//! How steps of jobs are made so.
//!
//! An executor remembers nothing: what has been asked and what came of it is
//! in shared memory, and whoever takes over finds it there. It never waits: it
//! is asked again whenever something may have changed.

mod found;
mod memory;
mod vcpus;

use control_plane::cluster::{Change, Cluster, Job, Reason, Step, StepResult};
use control_plane::policy::ANY;
use control_plane::role::Executor;
use vmm_shared::addr::NodeId;
use vmm_shared::control::{BootConfig, ControlRegion, OrderWords, Outcome, Standing, Ticket};

/// Makes steps so, on whichever nodes they are about.
#[derive(Clone, Copy)]
pub(super) struct NodeExecutor<'a> {
    pub control: &'a ControlRegion,
    pub config: &'a BootConfig,
    /// Makes a node look at shared memory.
    pub ring: &'a dyn Fn(NodeId),
    /// Whether this node still takes part, and may ask for anything.
    pub may_ask: &'a dyn Fn() -> bool,
}

impl Executor for NodeExecutor<'_> {
    fn can(&self, step: &Step) -> Result<(), &'static str> {
        match step.vcpu {
            _ if step.is_bookkeeping() => Ok(()),
            ANY => self.can_change_memory(step),
            _ => self.can_change_vcpu(step),
        }
    }

    fn drive(&mut self, cluster: &Cluster, job: &Job, step: &Step) -> Option<StepResult> {
        match step.vcpu {
            ANY => self.drive_memory(cluster, job, step),
            _ => self.drive_vcpu(job, step),
        }
    }

    fn found(&self, cluster: &Cluster) -> Option<Change> {
        self.differs(cluster)
    }
}

impl NodeExecutor<'_> {
    /// How the order stands that a step may have left, or its undoing. What is
    /// being undone need not be finished first: it is wanted back.
    fn standing(&self, orders: OrderWords, job: &Job, [forward, back]: [Ticket; 2]) -> Standing {
        if job.is_undoing() && (self.may_ask)() {
            orders.recall(forward);
            if job.is_abandoned() {
                orders.recall(back);
            }
        }
        orders.standing_for([forward, back])
    }
}

/// Why a step's order has not led to what was asked.
fn reason(outcome: Outcome, step: &Step) -> Reason {
    match outcome {
        Outcome::Refused(status) => Reason::refused(step.kind, status),
        Outcome::NoSuchCore if step.vcpu == ANY => Reason::NoNode,
        Outcome::NoSuchCore => Reason::NoCore,
        Outcome::NoRoom => Reason::NoRoom,
        Outcome::Unable => Reason::Unable,
        Outcome::Recalled => Reason::Unanswered,
        // It was done, and has been changed since by nobody who may.
        Outcome::Misplaced | Outcome::Done | Outcome::Pending => Reason::Misplaced,
    }
}

#[cfg(test)]
mod testing;
