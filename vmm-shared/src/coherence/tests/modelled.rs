//! Words that loom explores: every interleaving, and every value that a weakly
//! ordered load may see.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use loom::sync::atomic::{AtomicU64, fence};

use crate::coherence::Words;

#[derive(Clone, Debug)]
pub(crate) struct Modelled(pub(crate) Arc<Vec<AtomicU64>>);

impl Words for Modelled {
    fn count(&self) -> usize {
        self.0.len()
    }
    fn load(&self, at: usize, order: Ordering) -> u64 {
        self.0[at].load(order)
    }
    fn store(&self, at: usize, value: u64, order: Ordering) {
        self.0[at].store(value, order);
    }
    fn compare_exchange(
        &self,
        at: usize,
        current: u64,
        new: u64,
        success: Ordering,
    ) -> Result<u64, u64> {
        self.0[at].compare_exchange(current, new, success, Ordering::Acquire)
    }
    fn fetch_or(&self, at: usize, bits: u64, order: Ordering) -> u64 {
        self.0[at].fetch_or(bits, order)
    }
    fn fetch_and(&self, at: usize, bits: u64, order: Ordering) -> u64 {
        self.0[at].fetch_and(bits, order)
    }
    fn fetch_max(&self, at: usize, value: u64, order: Ordering) -> u64 {
        self.0[at].fetch_max(value, order)
    }
    fn fence(&self, order: Ordering) {
        fence(order);
    }
}
