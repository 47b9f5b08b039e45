//! Slices that change nodes: a pull in the record of the node that is to have
//! them, until the node that gives has no more than it shall keep.

use control_plane::cluster::{Job, Reason, StepResult};
use vmm_shared::addr::NodeId;
use vmm_shared::pieces::{Ended, Pull, PullId};

use super::super::NodeExecutor;
use super::{Verdict, Work, short};

/// Ids from here on are those of others than jobs.
pub(super) const PULL_IDS: u32 = 1 << 31;

/// What a node knows the pull of a job's step by; undoing has one of its own.
pub(super) fn pull_id(job: &Job, is_undoing: bool) -> PullId {
    let index = job.current().map_or(0, |(index, _)| index);
    let step = job.id().0 << 9 | index & 0x1ff;
    PullId((step << 1 | u32::from(is_undoing)) % PULL_IDS)
}

/// How far a pull has come.
#[derive(Clone, Copy)]
pub(super) enum Pulled {
    /// It stands, or would if this node might ask.
    Asked,
    /// The node can take no more.
    No(Reason),
}

impl NodeExecutor<'_> {
    pub(super) fn move_slices(&self, work: Work<'_>) -> Verdict {
        let (from, to) = (NodeId(work.step.from), NodeId(work.step.to));
        let giver = work.map.pull(from).ok_or(Reason::NoNode)?;
        if let Some(pull) = giver.standing()
            && pull.from == to
        {
            // What is being undone need not be finished first.
            if work.job.is_undoing() && pull.id == pull_id(work.job, false) {
                giver.curtail(pull);
            }
            (self.ring)(from);
            return Ok(None);
        }
        if self.is_pulling(work, to)? {
            return Ok(None);
        }
        let keeps = work.vm.granted_at(from).slices;
        let keeps = keeps.saturating_sub(work.step.slices);
        match work.has(from).saturating_sub(keeps) {
            0 => Ok(Some(StepResult::Done)),
            left => match self.pull(work, from, to, left)? {
                Pulled::Asked => Ok(None),
                Pulled::No(reason) => short(work.step.slices.saturating_sub(left), reason),
            },
        }
    }

    /// Whether a node takes anything over now.
    fn is_pulling(&self, work: Work<'_>, node: NodeId) -> Result<bool, Reason> {
        let record = work.map.pull(node).ok_or(Reason::NoNode)?;
        let stands = record.standing().is_some();
        if stands {
            // Who has left it may not have lived to say so.
            (self.ring)(node);
        }
        Ok(stands)
    }

    /// Asks a node to take so many more slices over from another, unless it
    /// has said that it can't.
    pub(super) fn pull(
        &self,
        work: Work<'_>,
        from: NodeId,
        to: NodeId,
        left: u32,
    ) -> Result<Pulled, Reason> {
        if self.is_pulling(work, to)? {
            return Ok(Pulled::Asked);
        }
        let taker = work.map.pull(to).ok_or(Reason::NoNode)?;
        let id = pull_id(work.job, work.job.is_undoing());
        let progress = taker.progress(id);
        match progress.and_then(|progress| progress.ended) {
            Some(Ended::NoRoom) => return Ok(Pulled::No(Reason::NoRoom)),
            Some(Ended::Damaged) => return Ok(Pulled::No(Reason::Damaged)),
            // It has taken what it was asked for, and more is there.
            Some(Ended::Done) | None => {}
        }
        let taken = progress.map_or(0, |progress| progress.taken);
        let count = taken.saturating_add(left);
        // One that was put out while it looked must not order anything.
        if (self.may_ask)() && taker.ask(Pull { id, from, count }).is_ok() {
            (self.ring)(to);
        }
        Ok(Pulled::Asked)
    }
}
