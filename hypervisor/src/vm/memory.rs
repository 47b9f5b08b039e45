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
//! What is offered is mapped when the guest touches it; what is leaving is
//! withdrawn from all nodes before it counts as free.

use core::sync::atomic::Ordering;

use vmm_shared::addr::NodeId;
use vmm_shared::control::{BlockId, BlockOrder, BlockRecord, BlockState, Outcome};

use super::elastic::Units;
use super::{DEVICE_NODE, Vm};
use crate::devices::hotplug::HotplugEffect;
use crate::mem::coherent::Bells;

/// The status of a guest that has given back what it had not taken yet: a
/// failure without a reason (ACPI 6.5, table 6.14).
const FAILED: u32 = 1;

impl Vm {
    fn block(&self, block: BlockId) -> BlockRecord {
        let record = self.fabric().control().block(block);
        record.expect("the VM's blocks have records")
    }

    fn giver(&self, block: BlockId) -> NodeId {
        self.givers[usize::from(block.0)]
    }

    /// Carries the orders for blocks on.
    pub(super) fn serve_block_orders(&self, units: &mut Units) {
        for block in (0..).map(BlockId).take(self.givers.len()) {
            if let Some(order) = self.block(block).order() {
                self.carry_on_block(units, block, order);
            }
        }
    }

    /// Carries one on, and ends it if that is its end.
    fn carry_on_block(&self, units: &mut Units, block: BlockId, order: BlockOrder) {
        let record = self.block(block);
        let giver = self.giver(block);
        let outcome = match (order, record.state()) {
            (BlockOrder::Grant | BlockOrder::Reclaim, _) if !self.machine.has_hotplug() => {
                Outcome::Unable
            }
            (BlockOrder::Grant, _) if !self.fabric().running().contains(giver) => {
                Outcome::NoSuchCore
            }
            (BlockOrder::Grant, Some(BlockState::Absent)) => {
                record.set_state(BlockState::Offered(giver));
                units.tell(block.0, true);
                units.registers.insert(block.0);
                return;
            }
            (BlockOrder::Grant, Some(BlockState::Offered(_))) if units.is_told(block.0) => return,
            (BlockOrder::Reclaim, Some(state)) if state.is_present() => {
                if units.tell(block.0, true) {
                    units.registers.ask_back(block.0);
                }
                return;
            }
            (BlockOrder::Drop | BlockOrder::Withdraw(_), Some(BlockState::Leaving(_))) => {
                return self.finish_withdrawal(block);
            }
            _ => Outcome::Misplaced,
        };
        record.settle(order, outcome);
        self.fabric().ring_launcher();
    }

    /// What the guest says about a block.
    pub(super) fn settle_block(&self, block: BlockId, effect: HotplugEffect) {
        let record = self.block(block);
        match (effect, record.order()) {
            (HotplugEffect::Accepted(_), Some(order @ BlockOrder::Grant)) => {
                record.set_state(BlockState::Used(self.giver(block)));
                record.settle(order, Outcome::Done);
            }
            (HotplugEffect::Declined(_, status), _) => {
                self.withdraw(block, BlockOrder::Withdraw(status));
            }
            (HotplugEffect::Kept(_, status), Some(order @ BlockOrder::Reclaim)) => {
                record.settle(order, Outcome::Refused(status));
            }
            (HotplugEffect::Ejected(_), Some(BlockOrder::Grant)) => {
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
        record.set_state(BlockState::Leaving(self.giver(block)));
        record.set_withdrawal(self.memory.withdrawals.count());
        self.serve_revocations();
        let others = self.fabric().running().without(DEVICE_NODE);
        self.fabric().ring_nodes(others);
        self.finish_withdrawal(block);
    }

    /// Once no node maps it, a block that leaves is free.
    fn finish_withdrawal(&self, block: BlockId) {
        let record = self.block(block);
        let is_done = |node| {
            let node = self.fabric().control().node(node);
            // Acquire: the node's last access to it comes before.
            node.is_some_and(|node| node.withdrawn().load(Ordering::Acquire) >= record.withdrawal())
        };
        if !self.fabric().running().all(is_done) {
            return;
        }
        let Some(order) = record.order() else {
            return;
        };
        record.set_state(BlockState::Absent);
        let outcome = match order {
            BlockOrder::Withdraw(status) => Outcome::Refused(status),
            _ => Outcome::Done,
        };
        record.settle(order, outcome);
        self.fabric().ring_launcher();
    }
}
