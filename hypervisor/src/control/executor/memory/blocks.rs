//! Memory that comes and goes: orders in the records of as many blocks as the
//! step is about, see [`BlockRecord`].
//!
//! A block comes from one node. Later its pieces may lie on several. What goes
//! is counted node by node, and which block the guest gives up for it only
//! matters for the work that is left: the one with most on that node is asked
//! for first, and what other nodes had of it they take over from that node
//! afterwards. A step that is no whole block takes one in advance.

use alloc::vec::Vec;
use core::cmp::Reverse;

use control_plane::cluster::{Job, Reason, StepResult};
use vmm_shared::addr::NodeId;
use vmm_shared::control::{
    BlockOrder, BlockPlace, BlockRecord, BlockState, Outcome, PIECES_PER_BLOCK, Standing, Ticket,
    blocks,
};

use super::super::{NodeExecutor, reason};
use super::moves::Pulled;
use super::{Verdict, Work, few, short};

/// Slices of a block.
const SLICES: u32 = 64;
const _: () = assert!(SLICES as usize == PIECES_PER_BLOCK);

/// A block that may come, and what is known of it.
struct Block {
    place: BlockPlace,
    record: BlockRecord,
}

impl Block {
    /// How many of its pieces a node has.
    fn pieces_on(&self, work: Work<'_>, node: NodeId) -> usize {
        let is_there = |piece: &usize| {
            let seen = work.map.look(*piece);
            seen.is_ok_and(|seen| seen.host().is_some_and(|at| at.node == node))
        };
        self.place.pieces.clone().filter(is_there).count()
    }
}

/// What the orders of a job's step for blocks are known by, and those of undoing
/// it.
fn tickets(job: &Job) -> [Ticket; 2] {
    let index = job.current().map_or(0, |(index, _)| index);
    [false, true].map(|is_undoing| job.block_ticket(index, is_undoing))
}

/// What those are known by that the job leaves now.
fn ticket(job: &Job) -> Ticket {
    let [forward, back] = tickets(job);
    match job.is_undoing() {
        true => back,
        false => forward,
    }
}

impl NodeExecutor<'_> {
    /// The blocks that the guest has, and those that it does not have; `None`
    /// while an order of this step is waited for, or any is taken away. What
    /// others have asked is the guest's to answer: until then, it has what it has.
    fn settled(&self, work: Work<'_>) -> Option<(Vec<Block>, Vec<Block>)> {
        let with_record = |place: BlockPlace| {
            let record = self.control.block(place.id)?;
            Some(Block { place, record })
        };
        let all: Vec<Block> = blocks(work.shares).filter_map(with_record).collect();
        let (mut waits, mut rings) = (false, false);
        for block in &all {
            let is_leaving = block.record.state() == Some(BlockState::Leaving);
            let standing = self.standing(block.record.orders(), work.job, tickets(work.job));
            waits |= is_leaving
                || match standing {
                    Standing::Nothing | Standing::Others => false,
                    Standing::Seen => !work.job.is_abandoned(),
                    Standing::Own => true,
                };
            rings |= is_leaving || standing != Standing::Nothing;
        }
        if rings {
            // Who has left an order may not have lived to say so.
            self.tell_devices();
        }
        let is_present = |block: &Block| block.record.is_present();
        (!waits).then(|| all.into_iter().partition(is_present))
    }

    /// How many blocks the guest is to have, beside what it booted with.
    fn wanted(work: Work<'_>, slices: u32) -> usize {
        let more = slices.saturating_sub(work.vm.least().slices) / SLICES;
        usize::try_from(more).unwrap_or(usize::MAX)
    }

    fn order_all<'b>(
        &self,
        work: Work<'_>,
        order: BlockOrder,
        blocks: impl IntoIterator<Item = &'b Block>,
    ) {
        // One that was put out while it looked must not order anything.
        if (self.may_ask)() {
            for block in blocks {
                // A failure means that somebody else has been faster.
                let _ = block.record.ask(order, ticket(work.job));
            }
            self.tell_devices();
        }
    }

    pub(super) fn add_blocks(&self, work: Work<'_>) -> Verdict {
        let Some((there, mut absent)) = self.settled(work) else {
            return Ok(None);
        };
        let wanted = Self::wanted(work, work.vm.granted().slices + work.step.slices);
        let missing = wanted.saturating_sub(there.len());
        let to = NodeId(work.step.to);
        let has = work.vm.granted_at(to).slices;
        absent.retain(|block| !block.record.is_busy());
        // What the guest does not take once, it does not take.
        let failed = |block: &Block| match block.record.outcome_of(ticket(work.job))? {
            Outcome::Done => None,
            outcome => Some(reason(outcome, work.step)),
        };
        let failed = absent.iter().find_map(failed);
        let failed = match missing {
            0 => None,
            _ if failed.is_some() => failed,
            _ if work.job.is_abandoned() => Some(Reason::Unanswered),
            _ if absent.is_empty() => Some(Reason::NoRoom),
            _ => {
                // What was being undone may have left it more than it shall have.
                if self.even_out(work, to, has)? {
                    // Those that the guest takes to be near that node come first.
                    absent.sort_by_key(|block| (block.place.home != to, block.place.id));
                    let next = absent.iter().take(missing);
                    self.order_all(work, BlockOrder::Grant(to), next);
                }
                return Ok(None);
            }
        };
        let added = work.step.slices.saturating_sub(few(missing) * SLICES);
        if !self.even_out(work, to, has + added)? {
            return Ok(None);
        }
        match failed {
            None => Ok(Some(StepResult::Done)),
            Some(reason) => short(added, reason),
        }
    }

    pub(super) fn remove_blocks(&self, work: Work<'_>) -> Verdict {
        let Some((there, _)) = self.settled(work) else {
            return Ok(None);
        };
        let from = NodeId(work.step.from);
        let wanted = Self::wanted(
            work,
            work.vm.granted().slices.saturating_sub(work.step.slices),
        );
        let beyond = there.len().saturating_sub(wanted);
        let (busy, free): (Vec<&Block>, Vec<&Block>) =
            there.iter().partition(|block| block.record.is_busy());
        let mut refused = None;
        let mut rest: Vec<&Block> = Vec::new();
        for block in free {
            match block.record.outcome_of(ticket(work.job)) {
                Some(outcome) => refused = Some(reason(outcome, work.step)),
                None => rest.push(block),
            }
        }
        if work.job.is_abandoned() {
            // What the guest may have is the VM's.
            refused = refused.or(Some(Reason::Unanswered));
        } else if beyond > 0 && !rest.is_empty() {
            // The last ones first: so what is left lies together.
            let key = |block: &&Block| Reverse((block.pieces_on(work, from), block.place.id));
            rest.sort_by_cached_key(key);
            self.order_all(work, BlockOrder::Reclaim, rest.into_iter().take(beyond));
            return Ok(None);
        } else if beyond > 0 && !busy.is_empty() {
            // Others have asked for it already.
            return Ok(None);
        }
        let removed = work.step.slices.saturating_sub(few(beyond) * SLICES);
        let keeps = work.vm.granted_at(from).slices.saturating_sub(removed);
        if !self.even_out(work, from, keeps)? {
            return Ok(None);
        }
        match refused.filter(|_| beyond > 0) {
            None => Ok(Some(StepResult::Done)),
            // The rest of the job does not depend on it.
            Some(Reason::Kept(status)) if !work.job.is_undoing() => Ok(Some(StepResult::Short {
                slices: removed,
                reason: Reason::Kept(status).code(),
            })),
            Some(reason) => short(removed, reason),
        }
    }

    /// Lets nodes that have less than they shall have take over from one that
    /// has more than it `keeps`; whether that is over.
    fn even_out(&self, work: Work<'_>, from: NodeId, keeps: u32) -> Result<bool, Reason> {
        let beyond = work.has(from).saturating_sub(keeps);
        for (to, placement) in work.vm.placements() {
            let lacks = placement.granted.slices.saturating_sub(work.has(*to));
            let count = lacks.min(beyond);
            if count == 0 || *to == from {
                continue;
            }
            // One that can't must not keep the guest's answer back: the next
            // move from there makes up for it.
            if let Pulled::Asked = self.pull(work, from, *to, count)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
