//! Steps about memory.

use control_plane::cluster::{Cluster, Job, Reason, Step, StepKind, StepResult};

/// Whether such steps can be done at all; what can't, if not.
pub(super) const fn can(step: &Step) -> Result<(), &'static str> {
    match step.kind {
        StepKind::Move => Err("cannot move memory between nodes while the VM runs"),
        _ => Err("cannot change memory while the VM runs"),
    }
}

/// Goes on with one.
pub(super) const fn drive(_: &Cluster, _: &Job, _: &Step) -> Option<StepResult> {
    // Only a log of another version has such a step.
    Some(StepResult::Failed {
        reason: Reason::NoWay.code(),
    })
}
