//! Taking memory away from a running guest.
//!
//! Withdrawals are counted in the VM's record. Before the devices' node counts
//! one, it marks the memory as leaving; a node that sees the count unmaps all
//! that is leaving, makes its cores forget it, and says so in its own record.
//! When all have, nobody maps it any more.

use core::sync::atomic::Ordering;

use vmm_shared::control::{NodeRecord, VmRecord};

/// What has been withdrawn, and what this node has done about it.
#[derive(Clone, Copy, Debug)]
pub struct Withdrawals {
    vm: VmRecord,
    node: NodeRecord,
}

impl Withdrawals {
    /// Those of a VM, seen by one of its nodes.
    #[must_use]
    pub const fn new(vm: VmRecord, node: NodeRecord) -> Self {
        Self { vm, node }
    }

    /// Counts one more, for what has just been marked as leaving; its number.
    /// Only for the devices' node.
    #[must_use]
    pub fn count(&self) -> u64 {
        // Release: who sees the count sees what is leaving.
        let before = self.vm.withdrawals().fetch_add(1, Ordering::Release);
        before.wrapping_add(1)
    }

    /// The number of the last withdrawal, if this node has not done it.
    #[must_use]
    pub fn next(&self) -> Option<u64> {
        // Acquire: what is leaving is marked so.
        let last = self.vm.withdrawals().load(Ordering::Acquire);
        (last > self.node.withdrawn().load(Ordering::Relaxed)).then_some(last)
    }

    /// This node maps nothing that left up to this withdrawal. Whether it is
    /// the first core that says so.
    pub fn done(&self, number: u64) -> bool {
        // Release: no access of this node comes after. Two cores may do the
        // same at the same time, or an old and a new one.
        self.node.withdrawn().fetch_max(number, Ordering::Release) < number
    }
}
