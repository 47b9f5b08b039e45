//! Pieces of memory whose place changes: what this node has to do about it.
//!
//! A node takes pieces over if it has been asked for that. The devices' node
//! takes away what the guest has given up.

use core::sync::atomic::Ordering;

use vmm_shared::control::BlockId;
use vmm_shared::pieces::{Ended, Pull, PullRecord};
use vmm_shared::shm::SharedMem;

use super::Vm;
use crate::arch::cpu;
use crate::mem::moves::Turn;

impl Vm {
    /// Takes a piece away from the guest, or over from another node, if that
    /// is wanted and it is time. For the node's first core, outside of the
    /// guest, without locks.
    ///
    /// One piece a turn; until the next, the vCPUs of this core get as long as
    /// the piece has taken.
    pub fn change_memory(&self) {
        let record = self.fabric().pieces().pull(self.fabric().node());
        let record = record.expect("the node is one of the rack");
        let (block, pull) = (self.leaving_block(), record.standing());
        if block.is_none() && pull.is_none() {
            // Otherwise a deadline that has passed would interrupt the guest
            // for ever.
            self.next_piece.store(0, Ordering::Relaxed);
            return;
        }
        let now = cpu::rdtsc();
        // Relaxed: this core's own.
        if now < self.next_piece.load(Ordering::Relaxed) || self.fabric().held().is_some() {
            return;
        }
        let goes_on = match (block, pull) {
            (Some(block), _) => self.take_away(block),
            (None, Some(pull)) => self.take_over(&record, pull),
            (None, None) => false,
        };
        let end = cpu::rdtsc();
        let next = match goes_on {
            true => end.saturating_add(end.wrapping_sub(now)),
            false => 0,
        };
        self.next_piece.store(next, Ordering::Relaxed);
    }

    /// Takes one piece of a block away from all nodes; whether there may be
    /// more to do.
    fn take_away(&self, block: BlockId) -> bool {
        match self.memory.withdraw(self.block_pieces(block)) {
            Ok(false) => {}
            Ok(true) => self.finish_withdrawal(block),
            // The VM ends at the next fault.
            Err(why) => log::error!("block {} stays: {why}", block.0),
        }
        true
    }

    /// Takes one piece over, if any is left to take; whether there may be
    /// more.
    fn take_over(&self, record: &PullRecord<'_, SharedMem>, pull: Pull) -> bool {
        let turn = if record.taken(pull) < pull.count {
            self.memory.take_over(pull).unwrap_or_else(|why| {
                log::error!("memory of node {} stays there: {why}", pull.from.0);
                Turn::Over(Ended::Damaged)
            })
        } else {
            Turn::Over(Ended::Done)
        };
        match turn {
            Turn::Took {
                copying,
                out_of_reach,
            } => {
                record.took_one(pull, copying, out_of_reach);
                true
            }
            Turn::Over(how) => {
                record.end(pull, how);
                self.fabric().tell_of_orders();
                false
            }
        }
    }

    /// The TSC at which [`change_memory`](Self::change_memory) goes on, if
    /// ever.
    pub(super) fn next_piece(&self) -> Option<u64> {
        let next = self.next_piece.load(Ordering::Relaxed);
        (next != 0).then_some(next)
    }
}
