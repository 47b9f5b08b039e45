//! What each node counts, for operators. Only the node's own cores write.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::addr::{MAX_NODES, NodeId};
use crate::coherence::Counters;
use crate::shm::SharedMem;

/// Bytes for one node.
pub(super) const NODE_COUNTERS_SIZE: usize = 1 << 10;
const COHERENCE: usize = 256;
const IPIS: usize = 512;

const _: () = assert!(NodeCounter::ALL.len() * 8 <= COHERENCE);
const _: () = assert!(COHERENCE + Counters::COUNT * 8 <= IPIS);
const _: () = assert!(IPIS + MAX_NODES * 8 <= NODE_COUNTERS_SIZE);

/// What is counted for each node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum NodeCounter {
    /// Bytes of guest memory in the node's nested page tables now.
    MemoryMapped = 0,
    /// How much of that is under entries of 2 MiB.
    MemoryMappedLarge,
    /// How much of that is other nodes' memory.
    MemoryMappedRemote,
    /// Times that rights were taken out of the nested tables and all of the
    /// node's cores had to forget them.
    Shootdowns,
    /// Cores that had to leave the guest for that.
    ShootdownExits,
    /// Revocations that waited until a guest had used what it was granted.
    Holds,
    /// Words of shared memory that nobody writes who heeds its rules, found
    /// and refused by this node.
    Garbage,
}

impl NodeCounter {
    /// All counters with the names operators see.
    pub const ALL: [(Self, &'static str); 7] = [
        (Self::MemoryMapped, "memory_mapped_bytes"),
        (Self::MemoryMappedLarge, "memory_mapped_large_bytes"),
        (Self::MemoryMappedRemote, "memory_mapped_remote_bytes"),
        (Self::Shootdowns, "shootdowns"),
        (Self::ShootdownExits, "shootdown_exits"),
        (Self::Holds, "holds"),
        (Self::Garbage, "garbage"),
    ];
}

/// The counters of one node.
///
/// ```text
///   0    counters, in the order of `NodeCounter`
///   256  instruction coherence, in the order of `coherence::Counters`
///   512  interrupts sent to vCPUs on node 0, 1, …
/// ```
#[derive(Clone, Copy, Debug)]
pub struct NodeCounters(SharedMem);

impl NodeCounters {
    /// The counters in `window`; `None` if it is too small for them.
    #[must_use]
    pub fn new(window: SharedMem) -> Option<Self> {
        (window.len() >= NODE_COUNTERS_SIZE).then_some(Self(window))
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        self.0
            .atomic_u64(offset)
            .expect("`new` has checked the size")
    }

    /// Adds to a counter, modulo 2^64: the negative of a number subtracts it.
    pub fn add(&self, counter: NodeCounter, number: u64) {
        self.word(counter as usize * 8)
            .fetch_add(number, Ordering::Relaxed);
    }

    /// Adds what has been counted about instruction coherence.
    pub fn add_coherence(&self, counted: &Counters) {
        for ((_, number), index) in counted.values().zip(0..) {
            if number > 0 {
                self.word(COHERENCE + index * 8)
                    .fetch_add(number, Ordering::Relaxed);
            }
        }
    }

    /// Counts an interrupt for a vCPU on this node of the rack.
    pub fn count_ipi(&self, to: NodeId) {
        if usize::from(to.0) < MAX_NODES {
            self.word(IPIS + usize::from(to.0) * 8)
                .fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Interrupts sent to vCPUs on each of the rack's first `nodes` nodes.
    pub fn ipis(&self, nodes: usize) -> impl Iterator<Item = u64> {
        (0..nodes.min(MAX_NODES)).map(|to| self.word(IPIS + to * 8).load(Ordering::Relaxed))
    }

    /// All other counts with the names operators see.
    pub fn values(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let own = NodeCounter::ALL
            .into_iter()
            .map(|(counter, name)| (name, counter as usize * 8));
        let coherence = Counters::default()
            .values()
            .zip(0..)
            .map(|((name, _), index)| (name, COHERENCE + index * 8));
        own.chain(coherence)
            .map(|(name, offset)| (name, self.word(offset).load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::testing::leaked;

    #[test]
    fn every_count_has_a_place_of_its_own_and_a_name() {
        let counters = NodeCounters::new(leaked(NODE_COUNTERS_SIZE / 64)).expect("large enough");
        for ((counter, _), number) in NodeCounter::ALL.into_iter().zip(1..) {
            counters.add(counter, number);
        }
        let mut served = Counters::default();
        served.note_served();
        counters.add_coherence(&served);
        counters.add_coherence(&served);
        for to in [0, 2, 2, 63, 64] {
            counters.count_ipi(NodeId(to));
        }
        assert_eq!(counters.ipis(3).collect::<Vec<_>>(), [1, 0, 2]);
        assert_eq!(counters.ipis(100).sum::<u64>(), 4);
        let values: Vec<_> = counters.values().filter(|(_, value)| *value > 0).collect();
        let named = NodeCounter::ALL.into_iter().zip(1..);
        let mut expected: Vec<_> = named.map(|((_, name), number)| (name, number)).collect();
        expected.push(("revocations_served", 2));
        assert_eq!(values, expected);
        counters.add(NodeCounter::Holds, 6_u64.wrapping_neg());
        assert!(counters.values().any(|pair| pair == ("holds", 0)));
    }
}
