//! Steps about memory. Where it is, the map of pieces says; where it shall be
//! follows from the tables: so a step is done when the node that gives up has
//! no more than it shall keep, whoever has begun it.
//!
//! ```text
//!   a pull stands ──> wait         it is so ──> Done
//!   the last was this step's, and could not go on ──> that
//!   else ──> leave the pull, ring the node that is to have the memory
//! ```

use control_plane::cluster::{Cluster, Job, Reason, Step, StepKind, StepResult, VmId};
use vmm_shared::addr::NodeId;
use vmm_shared::pieces::{Ended, PieceMap, Pull, PullId, PullRecord};

use super::NodeExecutor;

/// Ids from here on are those of others than jobs.
const PULL_IDS: u32 = 1 << 31;

/// What a node knows the pull of a job's step by; undoing has one of its own.
fn pull_id(job: &Job, is_undoing: bool) -> PullId {
    let index = job.current().map_or(0, |(index, _)| index);
    let step = job.id().0 << 9 | index & 0x1ff;
    PullId((step << 1 | u32::from(is_undoing)) % PULL_IDS)
}

/// So many of a step's slices have moved, and no more can.
const fn short(slices: u32, reason: Reason) -> StepResult {
    let reason = reason.code();
    match slices {
        0 => StepResult::Failed { reason },
        _ => StepResult::Short { slices, reason },
    }
}

impl NodeExecutor<'_> {
    /// Whether such a step can be done at all.
    pub(super) const fn can_change_memory(step: &Step) -> Result<(), &'static str> {
        match step.kind {
            StepKind::Move => Ok(()),
            _ => Err("cannot change the size of memory while the VM runs"),
        }
    }

    /// Goes on with one.
    pub(super) fn drive_memory(
        &self,
        cluster: &Cluster,
        job: &Job,
        step: &Step,
    ) -> Option<StepResult> {
        let ended = match (step.kind, self.control.pieces(self.config)) {
            (StepKind::Move, Some(map)) => self.drive_move(&map, cluster, job, step),
            // Only a log of another version has such a step.
            _ => Err(Reason::NoWay),
        };
        ended.unwrap_or_else(|reason| Some(short(0, reason)))
    }

    /// `Ok(None)`: it has not ended.
    fn drive_move(
        &self,
        map: &PieceMap,
        cluster: &Cluster,
        job: &Job,
        step: &Step,
    ) -> Result<Option<StepResult>, Reason> {
        let (from, to) = (NodeId(step.from), NodeId(step.to));
        let giver = map.pull(from).ok_or(Reason::NoNode)?;
        let taker = map.pull(to).ok_or(Reason::NoNode)?;
        if let Some(pull) = giver.standing()
            && pull.from == to
        {
            // What is being undone need not be finished first.
            if job.is_undoing() && pull.id == pull_id(job, false) {
                giver.curtail(pull);
            }
            (self.ring)(from);
            return Ok(None);
        }
        if taker.standing().is_some() {
            // Who has left it may not have lived to say so.
            (self.ring)(to);
            return Ok(None);
        }
        let vm = cluster.vms().get(&VmId(step.vm)).ok_or(Reason::NoWay)?;
        let keeps = vm.granted_at(from).slices.saturating_sub(step.slices);
        let has = u32::try_from(map.pieces_on(from).count()).unwrap_or(u32::MAX);
        match has.saturating_sub(keeps) {
            0 => Ok(Some(StepResult::Done)),
            left => Ok(self.pull(&taker, job, step, left)),
        }
    }

    /// Asks the node that is to have them for so many more slices, unless it
    /// has said that it can't take them.
    fn pull(
        &self,
        taker: &PullRecord<'_, vmm_shared::shm::SharedMem>,
        job: &Job,
        step: &Step,
        left: u32,
    ) -> Option<StepResult> {
        let id = pull_id(job, job.is_undoing());
        let progress = taker.progress(id);
        let moved = step.slices.saturating_sub(left);
        match progress.and_then(|progress| progress.ended) {
            Some(Ended::NoRoom) => return Some(short(moved, Reason::NoRoom)),
            Some(Ended::Damaged) => return Some(short(moved, Reason::Damaged)),
            // It has taken what it was asked for, and more is there.
            Some(Ended::Done) | None => {}
        }
        let taken = progress.map_or(0, |progress| progress.taken);
        let pull = Pull {
            id,
            from: NodeId(step.from),
            count: taken.saturating_add(left),
        };
        // One that was put out while it looked must not order anything.
        if (self.may_ask)() && taker.ask(pull).is_ok() {
            (self.ring)(NodeId(step.to));
        }
        None
    }
}

#[cfg(test)]
mod tests;
