//! The atomics that the log and the queues are written with.
//!
//! In a normal build these are `core`'s, over a [`SharedMem`] window. Under
//! `--cfg loom` they are the model checker's, over words of its own, so that
//! the very code that runs in a hypervisor is the code that is explored.

#![cfg_attr(
    not(loom),
    expect(unsafe_code, reason = "keeps the words of a window beside the window")
)]

#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{AtomicU64, Ordering, fence};
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU64, Ordering, fence};

#[cfg(not(loom))]
use crate::shm::SharedMem;

/// A window of shared memory seen as 64-bit words. Copying the handle copies
/// the window, not the memory.
#[derive(Clone, Debug)]
pub(crate) struct Words {
    /// Keeps the window's promise for `words`.
    #[cfg(not(loom))]
    _memory: SharedMem,
    /// The window's words; never given out for longer than `self` lives.
    #[cfg(not(loom))]
    words: &'static [AtomicU64],
    #[cfg(loom)]
    words: loom::sync::Arc<Vec<AtomicU64>>,
    #[cfg(loom)]
    start: usize,
    #[cfg(loom)]
    count: usize,
}

#[cfg(not(loom))]
impl Words {
    pub(crate) const fn new(memory: SharedMem) -> Self {
        // SAFETY: `memory` is kept beside them, and `slice`, the only way to
        // them, binds what it returns to `self`.
        let words = unsafe { memory.words_unbound() };
        Self {
            _memory: memory,
            words,
        }
    }

    pub(crate) const fn len(&self) -> usize {
        self.words.len()
    }

    /// The `count` words from word `start` on, if all are inside.
    #[cfg(any(feature = "alloc", test))]
    pub(crate) fn part(&self, start: usize, count: usize) -> Option<Self> {
        let words = self.words.get(start..start.checked_add(count)?)?;
        Some(Self { words, ..*self })
    }

    #[inline]
    pub(crate) fn slice(&self, start: usize, count: usize) -> Option<&[AtomicU64]> {
        self.words.get(start..start.checked_add(count)?)
    }
}

#[cfg(loom)]
impl Words {
    /// `count` zeroed words, known to the model checker.
    pub(crate) fn model(count: usize) -> Self {
        let words = (0..count).map(|_| AtomicU64::new(0)).collect();
        Self {
            words: loom::sync::Arc::new(words),
            start: 0,
            count,
        }
    }

    pub(crate) const fn len(&self) -> usize {
        self.count
    }

    pub(crate) fn part(&self, start: usize, count: usize) -> Option<Self> {
        (start.checked_add(count)? <= self.count).then(|| Self {
            words: self.words.clone(),
            start: self.start + start,
            count,
        })
    }

    pub(crate) fn slice(&self, start: usize, count: usize) -> Option<&[AtomicU64]> {
        if start.checked_add(count)? > self.count {
            return None;
        }
        let from = self.start + start;
        self.words.get(from..from + count)
    }
}

impl Words {
    /// The word at `index`.
    ///
    /// # Panics
    /// If it is outside. Indices come from geometry that was checked when the
    /// window was attached, never from what peers write.
    #[inline]
    pub(crate) fn at(&self, index: usize) -> &AtomicU64 {
        &self.slice(index, 1).expect("inside the checked geometry")[0]
    }
}

/// An `UnsafeCell` whose accesses the model checker hears of, so that it can
/// find two that nothing orders.
#[cfg(any(feature = "alloc", test, loom))]
#[derive(Debug)]
pub(crate) struct Shared<T> {
    #[cfg(not(loom))]
    cell: core::cell::UnsafeCell<T>,
    #[cfg(loom)]
    cell: loom::cell::UnsafeCell<T>,
}

#[cfg(any(feature = "alloc", test, loom))]
impl<T> Shared<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            #[cfg(not(loom))]
            cell: core::cell::UnsafeCell::new(value),
            #[cfg(loom)]
            cell: loom::cell::UnsafeCell::new(value),
        }
    }

    /// A pointer to read through. Call it where reading starts, and again
    /// where it ends.
    #[inline]
    pub(crate) fn reading(&self) -> *const T {
        #[cfg(not(loom))]
        return self.cell.get();
        #[cfg(loom)]
        return self.cell.with(|pointer| pointer);
    }

    /// A pointer to write through. Call it where writing starts, and again
    /// where it ends.
    #[inline]
    pub(crate) fn writing(&self) -> *mut T {
        #[cfg(not(loom))]
        return self.cell.get();
        #[cfg(loom)]
        return self.cell.with_mut(|pointer| pointer);
    }

    pub(crate) fn into_inner(self) -> T {
        self.cell.into_inner()
    }
}

/// Keeps its content away from its neighbours' cache lines. 128 bytes, since
/// today's processors fetch lines in pairs.
#[cfg(any(feature = "alloc", test, loom))]
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Padded<T>(pub(crate) T);
