//! Memory that comes and goes while the guest runs, in blocks.
//!
//! Anyone may leave an order in a block's record; the devices' node, which also
//! speaks to the guest's ACPI code, sees that it is carried out:
//!
//! ```text
//!   Grant    Offered ─> guest is told ─> _OST ─> Used, Done
//!   Reclaim  guest is asked ─> _EJ0 ─> Leaving, order becomes Drop ─> no node maps it ─> Absent, Done
//! ```
//!
//! Its pieces get their places before the guest is told; they are taken away
//! one by one (see [`memory`](super::memory)) before the block counts as free.

use core::ops::Range;
use core::sync::atomic::Ordering;

use vmm_shared::control::{
    BlockId, BlockOrder, BlockRecord, BlockState, Outcome, PIECES_PER_BLOCK,
};

use super::elastic::{FAILED, Units};
use super::{DEVICE_CORE, Vm};
use crate::arch::descriptors;
use crate::devices::hotplug::HotplugEffect;
use crate::mem::moves::Given;

impl Vm {
    fn block(&self, block: BlockId) -> BlockRecord {
        let record = self.fabric().control().block(block);
        record.expect("the VM's blocks have records")
    }

    /// Carries the orders for blocks on.
    pub(super) fn serve_block_orders(&self, units: &mut Units) {
        for block in (0..self.blocks).map(BlockId) {
            let record = self.block(block);
            if take_back(&record, units, block) {
                if record.state() == Some(BlockState::Leaving) {
                    self.begin_withdrawal();
                }
                self.fabric().tell_of_orders();
            }
            if let Some(order) = record.order() {
                self.carry_on_block(units, block, order);
            }
        }
    }

    /// Carries one on, and ends it if that is its end.
    fn carry_on_block(&self, units: &mut Units, block: BlockId, order: BlockOrder) {
        let record = self.block(block);
        let outcome = match (order, record.state()) {
            (BlockOrder::Grant(_) | BlockOrder::Reclaim, _) if !self.machine.has_hotplug() => {
                Outcome::Unable
            }
            (BlockOrder::Grant(giver), _) if !self.fabric().running().contains(giver) => {
                Outcome::NoSuchCore
            }
            (BlockOrder::Grant(giver), Some(BlockState::Absent)) => {
                match self.memory.give(self.block_pieces(block), giver) {
                    Ok(Given::All) => {
                        record.set_state(BlockState::Offered);
                        units.tell(block.0, true);
                        units.registers.insert(block.0);
                        return;
                    }
                    Ok(Given::NoRoom) => Outcome::NoRoom,
                    Err(why) => {
                        log::error!("block {} can't come: {why}", block.0);
                        Outcome::Unable
                    }
                }
            }
            (BlockOrder::Grant(_), Some(BlockState::Offered)) if units.is_told(block.0) => return,
            (BlockOrder::Reclaim, Some(state)) if state.is_present() => {
                if units.tell(block.0, true) {
                    units.registers.ask_back(block.0);
                }
                return;
            }
            (
                BlockOrder::Drop | BlockOrder::Withdraw(_) | BlockOrder::TakeBack,
                Some(BlockState::Leaving),
            ) => return,
            _ => Outcome::Misplaced,
        };
        record.settle(order, outcome);
        self.fabric().tell_of_orders();
    }

    /// What the guest says about a block.
    pub(super) fn settle_block(&self, block: BlockId, effect: HotplugEffect) {
        let record = self.block(block);
        match (effect, record.order()) {
            (HotplugEffect::Accepted(_), Some(order @ BlockOrder::Grant(_))) => {
                record.set_state(BlockState::Used);
                record.settle(order, Outcome::Done);
                return;
            }
            (HotplugEffect::Kept(_, status), Some(order @ BlockOrder::Reclaim)) => {
                record.settle(order, Outcome::Refused(status));
                return;
            }
            (HotplugEffect::Declined(_, status), _) => {
                withdraw(&record, BlockOrder::Withdraw(status));
            }
            (HotplugEffect::Ejected(_), Some(BlockOrder::Grant(_))) => {
                withdraw(&record, BlockOrder::Withdraw(FAILED));
            }
            (HotplugEffect::Ejected(_), _) => withdraw(&record, BlockOrder::Drop),
            _ => return,
        }
        self.begin_withdrawal();
    }

    /// Begins to take a block away that is [leaving](Self::leaving_block).
    fn begin_withdrawal(&self) {
        // Release: who takes the mark sees the state.
        self.is_leaving.store(true, Ordering::Release);
        descriptors::set_doorbell();
        self.fabric().kick(DEVICE_CORE);
    }

    /// A block that is to be taken away from all nodes, if there is one.
    pub(super) fn leaving_block(&self) -> Option<BlockId> {
        // Acquire: see `begin_withdrawal`.
        if !self.is_leaving.swap(false, Ordering::Acquire) {
            return None;
        }
        let is_leaving = |block: &BlockId| self.block(*block).state() == Some(BlockState::Leaving);
        let mut blocks = (0..self.blocks).map(BlockId);
        let block = blocks.find(is_leaving)?;
        self.is_leaving.store(true, Ordering::Relaxed);
        Some(block)
    }

    /// All its pieces have been taken away: it is free.
    pub(super) fn finish_withdrawal(&self, block: BlockId) {
        // Orders change under the lock.
        let _orders = self.hotplug.lock();
        let record = self.block(block);
        record.set_state(BlockState::Absent);
        let Some(order) = record.order() else {
            return;
        };
        record.settle(order, order.outcome());
        self.fabric().tell_of_orders();
    }

    /// The pieces of a block, behind all that the VM was started with.
    pub(super) fn block_pieces(&self, block: BlockId) -> Range<usize> {
        let first = self.first_block_piece + usize::from(block.0) * PIECES_PER_BLOCK;
        first..first + PIECES_PER_BLOCK
    }
}

/// The guest does not have a block any more: no node shall.
fn withdraw(record: &BlockRecord, order: BlockOrder) {
    record.replace_order(order);
    record.set_state(BlockState::Leaving);
}

/// Answers who wants an order back that stands: it ends if the guest has not seen
/// its event. Whether there was anything to say.
fn take_back(record: &BlockRecord, units: &mut Units, block: BlockId) -> bool {
    if !record.orders().is_recalled() {
        return false;
    }
    match (record.order(), record.state()) {
        (Some(order @ BlockOrder::Grant(_)), Some(BlockState::Absent)) => {
            record.settle(order, Outcome::Recalled);
        }
        (Some(BlockOrder::Grant(_)), Some(BlockState::Offered)) if units.take_back(block.0) => {
            withdraw(record, BlockOrder::TakeBack);
        }
        (Some(order @ BlockOrder::Reclaim), _) if units.leave(block.0) => {
            record.settle(order, Outcome::Recalled);
        }
        (Some(BlockOrder::Grant(_) | BlockOrder::Reclaim), _) => {
            record.orders().refuse_recall();
        }
        // It is being taken away.
        _ => return false,
    }
    true
}

#[cfg(test)]
mod tests;
