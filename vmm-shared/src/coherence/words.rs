//! The one kind of memory that the table is made of: 64-bit atomic words.
//!
//! A trait, so that the very same protocol runs over a shared region, over a
//! model checker's atomics and over memory that dies at a chosen access.

use core::sync::atomic::{self, Ordering};

use crate::shm::SharedMem;

/// An array of 64-bit atomic words. A copy of the handle is the same array.
///
/// Indexes have been checked against [`count`](Self::count) when the map was
/// made; an implementation may panic on others.
pub trait Words: Clone {
    /// Words in the array.
    fn count(&self) -> usize;
    /// Reads a word.
    fn load(&self, at: usize, order: Ordering) -> u64;
    /// Writes a word.
    fn store(&self, at: usize, value: u64, order: Ordering);
    /// Replaces `current` by `new`; on failure returns what is there, read
    /// with Acquire.
    ///
    /// # Errors
    /// The word was not `current`.
    fn compare_exchange(
        &self,
        at: usize,
        current: u64,
        new: u64,
        success: Ordering,
    ) -> Result<u64, u64>;
    /// Sets bits; returns the word before.
    fn fetch_or(&self, at: usize, bits: u64, order: Ordering) -> u64;
    /// Keeps only `bits`; returns the word before.
    fn fetch_and(&self, at: usize, bits: u64, order: Ordering) -> u64;
    /// Raises the word to at least `value`; returns the word before.
    fn fetch_max(&self, at: usize, value: u64, order: Ordering) -> u64;
    /// A fence between accesses.
    fn fence(&self, order: Ordering) {
        atomic::fence(order);
    }
}

const INSIDE: &str = "the map has checked its geometry against the window";

impl Words for SharedMem {
    fn count(&self) -> usize {
        self.len() / 8
    }

    fn load(&self, at: usize, order: Ordering) -> u64 {
        self.atomic_u64(at * 8).expect(INSIDE).load(order)
    }

    fn store(&self, at: usize, value: u64, order: Ordering) {
        self.atomic_u64(at * 8).expect(INSIDE).store(value, order);
    }

    fn compare_exchange(
        &self,
        at: usize,
        current: u64,
        new: u64,
        success: Ordering,
    ) -> Result<u64, u64> {
        self.atomic_u64(at * 8).expect(INSIDE).compare_exchange(
            current,
            new,
            success,
            Ordering::Acquire,
        )
    }

    fn fetch_or(&self, at: usize, bits: u64, order: Ordering) -> u64 {
        self.atomic_u64(at * 8).expect(INSIDE).fetch_or(bits, order)
    }

    fn fetch_and(&self, at: usize, bits: u64, order: Ordering) -> u64 {
        self.atomic_u64(at * 8)
            .expect(INSIDE)
            .fetch_and(bits, order)
    }

    fn fetch_max(&self, at: usize, value: u64, order: Ordering) -> u64 {
        self.atomic_u64(at * 8)
            .expect(INSIDE)
            .fetch_max(value, order)
    }
}
