//! What a VM that goes on without some of its nodes has lost with them.
//!
//! The record is a page of the control region. Hypervisors write it; a
//! paravirtual guest has it mapped, read-only.
//!
//! ```text
//!   0     nodes that have been lost, one bit each
//!   64    vCPUs that have been lost with them, one bit each
//! ```
//!
//! A hypervisor writes the vCPUs before the node, and both before it takes
//! the node's memory away from its guest. So a guest that has read something
//! and then finds the node not lost has read what was there. The first 64
//! vCPUs, all that such a guest has, are lost in one instant.

use core::sync::atomic::{AtomicU64, Ordering, fence};

use crate::addr::{MAX_VCPUS, NodeId, PAGE_SIZE, VcpuId};
use crate::coherence::NodeSet;
use crate::shm::SharedMem;

const VCPUS: usize = 64;
const WORDS: usize = MAX_VCPUS.div_ceil(64);

/// The record of what has been lost.
#[derive(Clone, Copy, Debug)]
pub struct LossRecord(SharedMem);

impl LossRecord {
    /// Bytes of the record: a page that holds nothing else.
    #[expect(clippy::cast_possible_truncation, reason = "64-bit")]
    pub const SIZE: usize = PAGE_SIZE as usize;

    /// The record in `memory`, zeroed at first; `None` if it is too small.
    #[must_use]
    pub fn new(memory: SharedMem) -> Option<Self> {
        memory.window(0, Self::SIZE).map(Self)
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        self.0
            .atomic_u64(offset)
            .expect("`new` has checked the size")
    }

    /// Notes that a node has been lost, with these vCPUs. Any number of times,
    /// by anybody.
    pub fn note(&self, node: NodeId, vcpus: impl Iterator<Item = VcpuId>) {
        let mut words = [0; WORDS];
        for vcpu in vcpus.map(|vcpu| usize::from(vcpu.0)) {
            words[vcpu / 64] |= 1 << (vcpu % 64);
        }
        for (word, bits) in self.vcpu_words().zip(words) {
            word.fetch_or(bits, Ordering::Relaxed);
        }
        let bit = NodeSet::EMPTY.with(node).bits();
        // SeqCst: after the vCPUs, and before all that follows from it.
        self.word(0).fetch_or(bit, Ordering::SeqCst);
    }

    /// The nodes that have been lost.
    #[must_use]
    pub fn nodes(&self) -> NodeSet {
        // Acquire: the vCPUs have been noted before.
        NodeSet::from_bits(self.word(0).load(Ordering::Acquire))
    }

    /// The same, after all that the caller has read so far.
    #[must_use]
    pub fn nodes_by_now(&self) -> NodeSet {
        fence(Ordering::Acquire);
        self.nodes()
    }

    /// Whether a vCPU has been lost.
    #[must_use]
    pub fn has_lost(&self, vcpu: VcpuId) -> bool {
        let vcpu = usize::from(vcpu.0);
        let word = self.vcpu_words().nth(vcpu / 64);
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (vcpu % 64) & 1 != 0)
    }

    /// Those of the first 64 vCPUs that have been lost, one bit each.
    #[must_use]
    pub fn first_vcpus(&self) -> u64 {
        self.word(VCPUS).load(Ordering::Acquire)
    }

    fn vcpu_words(&self) -> impl Iterator<Item = &AtomicU64> {
        (0..WORDS).map(|index| self.word(VCPUS + index * 8))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::testing::leaked;

    #[test]
    fn what_has_been_lost_stays_lost() {
        let record = LossRecord::new(leaked(LossRecord::SIZE / 64)).expect("large enough");
        assert!(record.nodes().is_empty() && !record.has_lost(VcpuId(70)));
        for _ in 0..2 {
            record.note(NodeId(3), [2, 70].into_iter().map(VcpuId));
        }
        record.note(NodeId(0), core::iter::empty());
        let nodes = NodeSet::EMPTY.with(NodeId(3)).with(NodeId(0));
        assert_eq!((record.nodes(), record.nodes_by_now()), (nodes, nodes));
        let lost = (0..400).map(VcpuId).filter(|vcpu| record.has_lost(*vcpu));
        assert_eq!(lost.collect::<Vec<_>>(), [VcpuId(2), VcpuId(70)]);
        assert_eq!(record.first_vcpus(), 1 << 2);
    }
}
