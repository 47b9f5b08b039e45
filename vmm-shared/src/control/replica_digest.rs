//! What a node publishes of its replica of the cluster, so that others can
//! tell whether all replicas are equal.

use core::sync::atomic::{AtomicU64, Ordering, fence};

use crate::shm::SharedMem;

/// A digest of a replica's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest {
    /// The log position behind the last operation in the state, or 0. Replicas
    /// that are at the same position must have the same digest.
    pub position: u64,
    /// The digest.
    pub value: u64,
}

/// Where one node publishes it; only the node writes.
///
/// ```text
///   0    count of changes: odd while it is being changed
///   8    position
///   16   digest
/// ```
#[derive(Clone, Copy, Debug)]
pub struct ReplicaDigest(SharedMem);

impl ReplicaDigest {
    /// Bytes of the record.
    pub const SIZE: usize = 24;

    /// The record in `window`; `None` if it is too small.
    #[must_use]
    pub fn new(window: SharedMem) -> Option<Self> {
        (window.len() >= Self::SIZE).then_some(Self(window))
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        self.0
            .atomic_u64(offset)
            .expect("`new` has checked the size")
    }

    /// Publishes.
    pub fn set(&self, digest: Digest) {
        let count = self.word(0).load(Ordering::Relaxed) | 1;
        self.word(0).store(count, Ordering::Relaxed);
        // Release: who sees a part of the new values sees the odd count.
        fence(Ordering::Release);
        self.word(8).store(digest.position, Ordering::Relaxed);
        self.word(16).store(digest.value, Ordering::Relaxed);
        // Release: who sees the even count sees the values.
        self.word(0).store(count.wrapping_add(1), Ordering::Release);
    }

    /// What is published; `None` if nothing is, or it is being changed.
    #[must_use]
    pub fn get(&self) -> Option<Digest> {
        // Acquire: pairs with the Release at the end of `set`.
        let count = self.word(0).load(Ordering::Acquire);
        let digest = Digest {
            position: self.word(8).load(Ordering::Relaxed),
            value: self.word(16).load(Ordering::Relaxed),
        };
        // Acquire: pairs with the fence in `set`.
        fence(Ordering::Acquire);
        let unchanged = self.word(0).load(Ordering::Relaxed) == count;
        (count != 0 && count.is_multiple_of(2) && unchanged).then_some(digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::testing::leaked;

    #[test]
    fn nothing_is_published_at_first_and_never_half_of_it() {
        let record = ReplicaDigest::new(leaked(1)).expect("large enough");
        assert_eq!(record.get(), None);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for number in 1..20_000 {
                    record.set(Digest {
                        position: number,
                        value: !number,
                    });
                }
            });
            let mut last = 0;
            while last < 19_999 {
                if let Some(found) = record.get() {
                    assert_eq!(found.value, !found.position);
                    assert!(found.position >= last);
                    last = found.position;
                }
            }
        });
    }

    #[test]
    fn a_writer_that_died_in_between_leaves_nothing_to_be_believed() {
        let record = ReplicaDigest::new(leaked(1)).expect("large enough");
        record.word(0).store(7, Ordering::Relaxed);
        assert_eq!(record.get(), None);
        let next = Digest {
            position: 3,
            value: 4,
        };
        record.set(next);
        assert_eq!(record.get(), Some(next));
    }
}
