//! Steps about memory. Where it is, the map of pieces says, and the blocks'
//! records what the guest has of it; where it shall be follows from the tables:
//! so a step is done when it is so, whoever has begun it.
//!
//! ```text
//!   an order or a pull stands ──> wait         it is so ──> Done
//!   the last was this step's, and was refused ──> that
//!   else ──> leave the order or the pull, ring the node that it is for
//! ```

mod blocks;
mod moves;

use control_plane::cluster::{Cluster, Job, Reason, Step, StepKind, StepResult, Vm, VmId};
use vmm_shared::addr::NodeId;
use vmm_shared::control::{BootBy, NodeShare};
use vmm_shared::pieces::PieceMap;

use super::NodeExecutor;

/// A step, and what it is judged by.
#[derive(Clone, Copy)]
struct Work<'a> {
    map: &'a PieceMap,
    shares: &'a [NodeShare],
    /// As before the step.
    vm: &'a Vm,
    job: &'a Job,
    step: &'a Step,
}

impl Work<'_> {
    /// Slices that a node has.
    fn has(&self, node: NodeId) -> u32 {
        few(self.map.pieces_on(node).count())
    }
}

fn few(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// What has become of a step: `None` if it has not ended.
type Verdict = Result<Option<StepResult>, Reason>;

/// So many of a step's slices are as they shall be, and no more can.
const fn short(slices: u32, reason: Reason) -> Verdict {
    match slices {
        0 => Err(reason),
        _ => Ok(Some(StepResult::Short {
            slices,
            reason: reason.code(),
        })),
    }
}

impl NodeExecutor<'_> {
    /// Whether such a step can be done at all.
    pub(super) fn can_change_memory(&self, step: &Step) -> Result<(), &'static str> {
        let is_pv = BootBy::from_raw(self.config.boot_by) == Some(BootBy::Paravirtual);
        match step.kind {
            StepKind::Add | StepKind::Remove if is_pv => {
                Err("cannot change the amount of memory of the paravirtual guest")
            }
            _ => Ok(()),
        }
    }

    /// Goes on with one.
    pub(super) fn drive_memory(
        &self,
        cluster: &Cluster,
        job: &Job,
        step: &Step,
    ) -> Option<StepResult> {
        let ended = self.work(cluster, job, step);
        ended.unwrap_or_else(|reason| {
            Some(StepResult::Failed {
                reason: reason.code(),
            })
        })
    }

    fn work(&self, cluster: &Cluster, job: &Job, step: &Step) -> Verdict {
        let nodes = usize::try_from(self.config.nodes).unwrap_or(usize::MAX);
        let map = self.control.pieces(self.config).ok_or(Reason::NoWay)?;
        let work = Work {
            map: &map,
            shares: self.config.shares.get(..nodes).ok_or(Reason::NoWay)?,
            vm: cluster.vms().get(&VmId(step.vm)).ok_or(Reason::NoWay)?,
            job,
            step,
        };
        match step.kind {
            StepKind::Move => self.move_slices(work),
            StepKind::Add => self.add_blocks(work),
            StepKind::Remove => self.remove_blocks(work),
            // Bookkeeping is nobody's to execute.
            StepKind::Lease | StepKind::Release => Ok(Some(StepResult::Done)),
        }
    }
}

#[cfg(test)]
mod tests;
