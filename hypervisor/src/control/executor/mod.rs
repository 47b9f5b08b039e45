//! How steps of jobs are made so.
//!
//! An executor remembers nothing: what has been asked and what came of it is
//! in shared memory, and whoever takes over finds it there. It never waits: it
//! is asked again whenever something may have changed.

mod memory;
mod unasked;
mod vcpus;

use control_plane::cluster::{Change, Cluster, Job, Step, StepResult};
use control_plane::policy::ANY;
use control_plane::role::Executor;
use vmm_shared::addr::NodeId;
use vmm_shared::control::{BootConfig, ControlRegion};

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

    fn given_up(&self, cluster: &Cluster) -> Option<Change> {
        self.unasked(cluster)
    }
}

#[cfg(test)]
mod testing;
