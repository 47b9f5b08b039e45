//! How steps of jobs are made so.

use control_plane::cluster::{Cluster, Step, StepKind, StepResult};
use control_plane::policy::ANY;
use control_plane::role::Executor;

/// The reason of a step that nobody can do.
const NO_WAY: u16 = 1;

/// Makes steps so, on whichever nodes they are about.
#[derive(Debug, Default)]
pub(super) struct NodeExecutor;

impl Executor for NodeExecutor {
    fn can(&self, step: &Step) -> Result<(), &'static str> {
        let of_vcpus = step.vcpu != ANY;
        match step.kind {
            StepKind::Lease | StepKind::Release => Ok(()),
            StepKind::Move if of_vcpus => Err("cannot move a vCPU while the VM runs"),
            StepKind::Move => Err("cannot move memory between nodes while the VM runs"),
            StepKind::Add | StepKind::Remove if of_vcpus => {
                Err("cannot change the number of vCPUs while the VM runs")
            }
            StepKind::Add | StepKind::Remove => Err("cannot change memory while the VM runs"),
        }
    }

    fn drive(&mut self, _: &Cluster, _: &Step) -> Option<StepResult> {
        // Only a log of another version has such a step.
        Some(StepResult::Failed { reason: NO_WAY })
    }
}
