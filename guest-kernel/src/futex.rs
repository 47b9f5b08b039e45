//! Futexes: threads that wait for a word of memory to change.
//!
//! A word is known by where it is kept: private ones by address space and
//! address, others by the frame, so that mappings at different addresses
//! meet. A frame that a thread waits in can't go away: the word's page is
//! held by the mapping of the caller, who has just read it.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;

use core::sync::atomic::Ordering;

use vmm_shared::shm::SharedMem;

use crate::errno::{Errno, Outcome, Result};
use crate::kernel::Kernel;
use crate::mem::frames::Frame;
use crate::mem::regions::Access;
use crate::mem::{index, page_down};
use crate::wait::{Key, Tid};

/// Any of the bits that a waiter and a waker can agree on.
pub(crate) const ANY: u32 = u32::MAX;

/// A word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Word {
    Private(u32, u64),
    Shared(u64),
}

/// A thread that waits, and for which wakers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Waiter {
    tid: Tid,
    bits: u32,
}

/// All waiters, in the order in which they came.
#[derive(Debug, Default)]
pub(crate) struct Futexes(BTreeMap<Word, VecDeque<Waiter>>);

impl Futexes {
    fn add(&mut self, word: Word, waiter: Waiter) {
        self.0.entry(word).or_default().push_back(waiter);
    }

    /// Takes a thread off; whether it was there.
    fn remove(&mut self, tid: Tid) {
        self.0.retain(|_, waiters| {
            waiters.retain(|waiter| waiter.tid != tid);
            !waiters.is_empty()
        });
    }

    /// Whether anybody waits.
    pub(crate) fn has(&self, word: Word) -> bool {
        self.0.contains_key(&word)
    }

    /// A thread waits for any waker, behind the others.
    pub(crate) fn add_any(&mut self, word: Word, tid: Tid) {
        self.add(word, Waiter { tid, bits: ANY });
    }

    /// The same, before the others.
    pub(crate) fn add_first(&mut self, word: Word, tid: Tid) {
        let waiters = self.0.entry(word).or_default();
        waiters.push_front(Waiter { tid, bits: ANY });
    }

    /// Takes the first off.
    pub(crate) fn take_first(&mut self, word: Word) -> Option<Tid> {
        Some(self.take(word, 1, ANY).front()?.tid)
    }

    /// Takes all off that wait for a word which is lost.
    fn take_lost(&mut self, is_lost: impl Fn(Word) -> bool) -> Vec<Tid> {
        let lost = self.0.extract_if(.., |word, _| is_lost(*word));
        let tids = |waiters: VecDeque<Waiter>| waiters.into_iter().map(|waiter| waiter.tid);
        lost.flat_map(|(_, waiters)| tids(waiters)).collect()
    }

    /// Takes up to `count` waiters that match off.
    fn take(&mut self, word: Word, count: u64, bits: u32) -> VecDeque<Waiter> {
        let mut taken = VecDeque::new();
        let Some(waiters) = self.0.get_mut(&word) else {
            return taken;
        };
        waiters.retain(|waiter| {
            let hit = (taken.len() as u64) < count && waiter.bits & bits != 0;
            if hit {
                taken.push_back(*waiter);
            }
            !hit
        });
        if waiters.is_empty() {
            self.0.remove(&word);
        }
        taken
    }
}

/// Who can meet at a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    Private,
    Shared,
}

impl Kernel {
    /// Where a word is: who meets there, and its page and place in it.
    pub(crate) fn futex_place(
        &mut self,
        tid: Tid,
        address: u64,
        scope: Scope,
    ) -> Result<(Word, SharedMem, usize)> {
        let (word, frame, within) = self.place_for(tid, address, scope, Access::Write)?;
        Ok((word, self.objects.frames.page(frame), within))
    }

    fn place_for(
        &mut self,
        tid: Tid,
        address: u64,
        scope: Scope,
        access: Access,
    ) -> Result<(Word, Frame, usize)> {
        let space_id = self.process_of(tid).space.ok_or(Errno::EFAULT)?;
        let (objects, space) = self.memory_of(tid).ok_or(Errno::EFAULT)?;
        let frame = space.word(objects, address, access)?;
        let within = address % 4096;
        let word = match scope {
            Scope::Private => Word::Private(space_id, address),
            Scope::Shared => Word::Shared(frame.0 + within),
        };
        Ok((word, frame, index(within)))
    }

    /// Wakes who waits for a word that is lost: nobody else will, and what
    /// it reads there next tells it.
    pub(crate) fn wake_from_lost(&mut self) {
        let (spaces, frames) = (&self.spaces, &self.objects.frames);
        let woken = self.futexes.take_lost(|word| match word {
            Word::Private(space, address) => {
                let space = spaces.get(space);
                space.is_some_and(|space| space.has_lost(address))
            }
            Word::Shared(address) => frames.is_lost(Frame(page_down(address))),
        });
        for tid in woken {
            self.wake_from_futex(tid);
        }
    }

    /// The word at an address, and its value.
    fn futex_word(&mut self, tid: Tid, address: u64, scope: Scope) -> Result<(Word, u32)> {
        let access = match scope {
            Scope::Private => Access::Read,
            // The frame that is written is the one that others see.
            Scope::Shared => Access::Write,
        };
        let (word, frame, within) = self.place_for(tid, address, scope, access)?;
        let frames = &self.objects.frames;
        let page = frames.page(frame);
        let value = page.atomic_u32(within).ok_or(Errno::EINVAL)?;
        let value = value.load(Ordering::Acquire);
        match frames.is_lost(frame) {
            true => Err(Errno::EFAULT),
            false => Ok((word, value)),
        }
    }

    /// Waits until woken, unless the word has another value by now.
    pub(crate) fn futex_wait(
        &mut self,
        tid: Tid,
        address: u64,
        scope: Scope,
        expected: u32,
        bits: u32,
        deadline: Option<u64>,
    ) -> Outcome {
        if bits == 0 {
            return Err(Errno::EINVAL.into());
        }
        let call = self.thread(tid).call.ok_or(Errno::EINVAL)?;
        if call.woken {
            return Ok(0);
        }
        self.futexes.remove(tid);
        // Woken without a waker: its time has come.
        if call.done > 0 && deadline.is_some_and(|at| at <= self.now()) {
            return Err(Errno::ETIMEDOUT.into());
        }
        let (word, value) = self.futex_word(tid, address, scope)?;
        if value != expected {
            return Err(Errno::EAGAIN.into());
        }
        if deadline.is_some_and(|at| at <= self.now()) {
            return Err(Errno::ETIMEDOUT.into());
        }
        self.futexes.add(word, Waiter { tid, bits });
        if let Some(call) = &mut self.thread(tid).call {
            call.done = 1;
        }
        Err(self.block(tid, &[Key::Time], deadline))
    }

    /// Wakes up to `count` threads; returns how many.
    pub(crate) fn futex_wake(
        &mut self,
        tid: Tid,
        address: u64,
        scope: Scope,
        count: u64,
        bits: u32,
    ) -> Result<u64> {
        if bits == 0 {
            return Err(Errno::EINVAL);
        }
        let (word, _) = self.futex_word(tid, address, scope)?;
        Ok(self.wake_waiters(word, count, bits))
    }

    fn wake_waiters(&mut self, word: Word, count: u64, bits: u32) -> u64 {
        let woken = self.futexes.take(word, count, bits);
        for waiter in &woken {
            self.wake_from_futex(waiter.tid);
        }
        woken.len() as u64
    }

    /// Lets a thread go on that was taken off its word.
    pub(crate) fn wake_from_futex(&mut self, tid: Tid) {
        let thread = self.threads.get_mut(&tid);
        if let Some(call) = thread.and_then(|thread| thread.call.as_mut()) {
            call.woken = true;
        }
        self.wake_thread(tid);
    }

    /// Wakes some, and lets others wait for another word.
    pub(crate) fn futex_requeue(
        &mut self,
        tid: Tid,
        from: u64,
        to: u64,
        scope: Scope,
        counts: (u64, u64),
        expected: Option<u32>,
    ) -> Result<u64> {
        let (first, value) = self.futex_word(tid, from, scope)?;
        let (second, _) = self.futex_word(tid, to, scope)?;
        if expected.is_some_and(|expected| expected != value) {
            return Err(Errno::EAGAIN);
        }
        let woken = self.wake_waiters(first, counts.0, ANY);
        let moved = self.futexes.take(first, counts.1, ANY);
        let count = moved.len() as u64;
        for waiter in moved {
            self.futexes.add(second, waiter);
        }
        Ok(woken + count)
    }

    /// A thread no longer waits for any word.
    pub(crate) fn futex_forget(&mut self, tid: Tid) {
        self.futexes.remove(tid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiters_are_woken_in_order_and_by_their_bits() {
        let mut futexes = Futexes::default();
        let word = Word::Private(1, 0x1000);
        for (tid, bits) in [(1, ANY), (2, 1), (3, 2), (4, ANY)] {
            futexes.add(word, Waiter { tid, bits });
        }
        let tids = |waiters: VecDeque<Waiter>| {
            waiters
                .into_iter()
                .map(|waiter| waiter.tid)
                .collect::<Vec<_>>()
        };
        assert_eq!(tids(futexes.take(word, 2, 2)), [1, 3]);
        assert_eq!(tids(futexes.take(Word::Shared(0x1000), 9, ANY)), []);
        futexes.add_any(Word::Shared(0x1000), 5);
        futexes.add_first(Word::Shared(0x1000), 6);
        let is_lost = |word| matches!(word, Word::Shared(_));
        assert_eq!(futexes.take_lost(is_lost), [6, 5]);
        assert!(!futexes.has(Word::Shared(0x1000)));
        futexes.remove(2);
        assert_eq!(tids(futexes.take(word, u64::MAX, ANY)), [4]);
        assert!(futexes.0.is_empty());
    }
}
