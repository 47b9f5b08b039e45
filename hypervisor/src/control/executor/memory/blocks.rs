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
    BlockOrder, BlockPlace, BlockRecord, BlockState, Outcome, PIECES_PER_BLOCK, Ticket, blocks,
};

use super::super::NodeExecutor;
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

/// Why an order for a block came to nothing.
fn reason(outcome: Outcome, refused: fn(u8) -> Reason) -> Reason {
    match outcome {
        Outcome::Refused(status) => refused(status.to_le_bytes()[0]),
        Outcome::NoSuchCore => Reason::NoNode,
        Outcome::NoRoom => Reason::NoRoom,
        Outcome::Unable => Reason::Unable,
        Outcome::Misplaced | Outcome::Recalled | Outcome::Done | Outcome::Pending => {
            Reason::Misplaced
        }
    }
}

/// What the order of a job's step for a block is known by.
fn ticket(job: &Job) -> Ticket {
    direction_ticket(job, job.is_undoing())
}

fn direction_ticket(job: &Job, is_undoing: bool) -> Ticket {
    let index = job.current().map_or(0, |(index, _)| index);
    job.block_ticket(index, is_undoing)
}

impl NodeExecutor<'_> {
    /// The VM's blocks; `None` while an order for any of them is waited for, or
    /// what the guest has given up by itself is taken away.
    fn settled(&self, work: Work<'_>) -> Option<Vec<Block>> {
        let with_record = |place: BlockPlace| {
            let record = self.control.block(place.id)?;
            Some(Block { place, record })
        };
        let all: Vec<Block> = blocks(work.shares).filter_map(with_record).collect();
        let is_busy = |block: &&Block| block.record.is_busy();
        let is_leaving = |block: &Block| block.record.state() == Some(BlockState::Leaving);
        if !all.iter().any(|block| is_busy(&block) || is_leaving(block)) {
            return Some(all);
        }
        let mut waits = !work.job.is_abandoned() || all.iter().any(is_leaving);
        for block in all.iter().filter(is_busy) {
            waits |= self.want_block_back(work.job, &block.record);
        }
        // Who has left it may not have lived to say so.
        self.tell_devices();
        (!waits).then_some(all)
    }

    /// What is being undone need not be finished first: wants the order back that
    /// stands. Whether that may end it yet.
    fn want_block_back(&self, job: &Job, record: &BlockRecord) -> bool {
        let was_recalled = record.is_recalled();
        if job.is_undoing() && (self.may_ask)() {
            record.recall(direction_ticket(job, false));
            if job.is_abandoned() && !record.is_recalled() {
                record.recall(direction_ticket(job, true));
            }
        }
        record.is_recalled() && !was_recalled
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
        let Some(all) = self.settled(work) else {
            return Ok(None);
        };
        let wanted = Self::wanted(work, work.vm.granted().slices + work.step.slices);
        let is_used = |block: &&Block| block.record.state() == Some(BlockState::Used);
        let missing = wanted.saturating_sub(all.iter().filter(is_used).count());
        let to = NodeId(work.step.to);
        let has = work.vm.granted_at(to).slices;
        if missing == 0 {
            let is_even = self.even_out(work, to, has + work.step.slices)?;
            return Ok(is_even.then_some(StepResult::Done));
        }
        let added = || work.step.slices.saturating_sub(few(missing) * SLICES);
        // What the guest does not take once, it does not take.
        let failed = |block: &Block| match block.record.outcome_of(ticket(work.job))? {
            Outcome::Done => None,
            outcome => Some(reason(outcome, Reason::Declined)),
        };
        if let Some(reason) = all.iter().find_map(failed) {
            return short(added(), reason);
        }
        if work.job.is_abandoned() {
            return short(added(), Reason::Unanswered);
        }
        let is_absent = |block: &&Block| block.record.state() == Some(BlockState::Absent);
        let mut absent: Vec<&Block> = all.iter().filter(is_absent).collect();
        if absent.is_empty() {
            return short(added(), Reason::NoRoom);
        }
        // What was being undone may have left it more than it shall have.
        if !self.even_out(work, to, has)? {
            return Ok(None);
        }
        // Those that the guest takes to be near that node come first.
        absent.sort_by_key(|block| (block.place.home != to, block.place.id));
        let next = absent.into_iter().take(missing);
        self.order_all(work, BlockOrder::Grant(to), next);
        Ok(None)
    }

    pub(super) fn remove_blocks(&self, work: Work<'_>) -> Verdict {
        let Some(all) = self.settled(work) else {
            return Ok(None);
        };
        let from = NodeId(work.step.from);
        let wanted = Self::wanted(
            work,
            work.vm.granted().slices.saturating_sub(work.step.slices),
        );
        let is_there = |block: &&Block| block.record.state() != Some(BlockState::Absent);
        let there: Vec<&Block> = all.iter().filter(is_there).collect();
        let beyond = there.len().saturating_sub(wanted);
        let mut refused = None;
        let mut rest: Vec<&Block> = Vec::new();
        for block in there {
            match block.record.outcome_of(ticket(work.job)) {
                Some(outcome) => refused = Some(reason(outcome, Reason::Kept)),
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
