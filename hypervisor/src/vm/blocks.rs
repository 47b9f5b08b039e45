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

use super::elastic::Units;
use super::{DEVICE_CORE, Vm};
use crate::arch::descriptors;
use crate::devices::hotplug::HotplugEffect;
use crate::mem::moves::Given;

/// The status of a guest that has given back what it had not taken yet: a
/// failure without a reason (ACPI 6.5, table 6.14).
const FAILED: u32 = 1;

impl Vm {
    fn block(&self, block: BlockId) -> BlockRecord {
        let record = self.fabric().control().block(block);
        record.expect("the VM's blocks have records")
    }

    /// Carries the orders for blocks on.
    pub(super) fn serve_block_orders(&self, units: &mut Units) {
        for block in (0..self.blocks).map(BlockId) {
            let record = self.block(block);
            if record.is_recalled()
                && let Some(order) = record.order()
            {
                self.take_block_back(units, block, order);
            }
            if let Some(order) = record.order() {
                self.carry_on_block(units, block, order);
            }
        }
    }

    /// Ends an order that is wanted back, if the guest has not looked at it yet.
    fn take_block_back(&self, units: &mut Units, block: BlockId, order: BlockOrder) {
        let record = self.block(block);
        match (order, record.state()) {
            (BlockOrder::Grant(_), Some(BlockState::Absent)) => {
                record.settle(order, Outcome::Recalled);
            }
            (BlockOrder::Grant(_), Some(BlockState::Offered)) if units.take_back(block.0) => {
                self.withdraw(block, BlockOrder::Drop);
            }
            (BlockOrder::Reclaim, _) if units.leave(block.0) => {
                record.settle(order, Outcome::Recalled);
            }
            _ => return,
        }
        self.fabric().tell_of_orders();
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
            (BlockOrder::Drop | BlockOrder::Withdraw(_), Some(BlockState::Leaving)) => return,
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
            }
            (HotplugEffect::Declined(_, status), _) => {
                self.withdraw(block, BlockOrder::Withdraw(status));
            }
            (HotplugEffect::Kept(_, status), Some(order @ BlockOrder::Reclaim)) => {
                record.settle(order, Outcome::Refused(status));
            }
            (HotplugEffect::Ejected(_), Some(BlockOrder::Grant(_))) => {
                self.withdraw(block, BlockOrder::Withdraw(FAILED));
            }
            (HotplugEffect::Ejected(_), _) => self.withdraw(block, BlockOrder::Drop),
            _ => {}
        }
    }

    /// Begins to take a block away, which the guest does not have any more.
    fn withdraw(&self, block: BlockId, order: BlockOrder) {
        let record = self.block(block);
        record.replace_order(order);
        record.set_state(BlockState::Leaving);
        // Release: who takes the mark sees the state.
        self.is_leaving.store(true, Ordering::Release);
        descriptors::set_doorbell();
        self.fabric().kick(DEVICE_CORE);
    }

    /// A block that is to be taken away from all nodes, if there is one.
    pub(super) fn leaving_block(&self) -> Option<BlockId> {
        // Acquire: see `withdraw`.
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
        let outcome = match order {
            BlockOrder::Withdraw(status) => Outcome::Refused(status),
            _ => Outcome::Done,
        };
        record.settle(order, outcome);
        self.fabric().tell_of_orders();
    }

    /// The pieces of a block, behind all that the VM was started with.
    pub(super) fn block_pieces(&self, block: BlockId) -> Range<usize> {
        let first = self.first_block_piece + usize::from(block.0) * PIECES_PER_BLOCK;
        first..first + PIECES_PER_BLOCK
    }
}
