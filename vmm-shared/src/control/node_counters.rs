//! What each node counts, for operators: one writer, the node.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::shm::SharedMem;

/// Bytes for one node.
pub(super) const NODE_COUNTERS_SIZE: usize = 1 << 10;

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
}

impl NodeCounter {
    /// All counters with the names operators see.
    pub const ALL: [(Self, &'static str); 3] = [
        (Self::MemoryMapped, "memory_mapped_bytes"),
        (Self::MemoryMappedLarge, "memory_mapped_large_bytes"),
        (Self::MemoryMappedRemote, "memory_mapped_remote_bytes"),
    ];
}

/// The counters of one node.
///
/// ```text
///   0    counters, in the order of `NodeCounter`
/// ```
#[derive(Clone, Copy, Debug)]
pub struct NodeCounters(SharedMem);

impl NodeCounters {
    /// The counters in `window`; `None` if it is too small for them.
    #[must_use]
    pub fn new(window: SharedMem) -> Option<Self> {
        (window.len() >= NODE_COUNTERS_SIZE).then_some(Self(window))
    }

    fn word(&self, counter: NodeCounter) -> &AtomicU64 {
        self.0
            .atomic_u64(counter as usize * 8)
            .expect("`new` has checked the size")
    }

    /// What has been counted.
    #[must_use]
    pub fn get(&self, counter: NodeCounter) -> u64 {
        self.word(counter).load(Ordering::Relaxed)
    }

    /// Publishes a new value.
    pub fn set(&self, counter: NodeCounter, value: u64) {
        self.word(counter).store(value, Ordering::Relaxed);
    }

    /// All values with the names operators see.
    pub fn values(&self) -> impl Iterator<Item = (&'static str, u64)> {
        NodeCounter::ALL
            .into_iter()
            .map(|(counter, name)| (name, self.get(counter)))
    }
}
