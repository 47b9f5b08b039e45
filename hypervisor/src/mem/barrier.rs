//! Making sure that no core of this node still runs the guest on old nested
//! page tables.
//!
//! Tables have a generation. A core enters the guest under the generation it
//! has just seen, and flushes if that is new to it. Who has taken rights away
//! advances the generation and waits until each core has left the guest or
//! entered it under the new one.
//!
//! The waiter is outside of the guest itself, and so is every core that waits
//! for anything else, so waiting ends as soon as the kicked cores exit.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

const OUTSIDE: u64 = 0;

/// One core's word, on a line of its own.
#[derive(Debug)]
#[repr(align(64))]
struct Core {
    /// The generation under which it runs the guest, or [`OUTSIDE`].
    inside: AtomicU64,
}

/// The generation of the tables and who runs under which.
#[derive(Debug)]
pub struct EntryBarrier {
    generation: AtomicU64,
    cores: Vec<Core>,
}

impl EntryBarrier {
    /// A barrier for so many cores, all outside of the guest.
    #[must_use]
    pub fn new(cores: usize) -> Self {
        Self {
            generation: AtomicU64::new(1),
            cores: (0..cores)
                .map(|_| Core {
                    inside: AtomicU64::new(OUTSIDE),
                })
                .collect(),
        }
    }

    /// Announces that a core enters the guest; the generation, or `None` if it
    /// has just changed and the core must begin anew.
    #[must_use]
    pub fn enter(&self, core: usize) -> Option<u64> {
        let word = &self.cores[core].inside;
        let generation = self.generation.load(Ordering::Relaxed);
        // SeqCst on both: the announcement is visible before the generation is
        // read again. If `advance` has not seen it, it is seen here.
        word.store(generation, Ordering::SeqCst);
        if self.generation.load(Ordering::SeqCst) == generation {
            return Some(generation);
        }
        self.leave(core);
        None
    }

    /// Announces that a core has left the guest.
    pub fn leave(&self, core: usize) {
        // Release: all the guest's accesses come before.
        self.cores[core].inside.store(OUTSIDE, Ordering::Release);
    }

    /// Whether a core runs the guest, or is about to.
    #[must_use]
    pub fn is_inside(&self, core: usize) -> bool {
        // Relaxed: it may have changed before the caller looks at the answer.
        self.cores[core].inside.load(Ordering::Relaxed) != OUTSIDE
    }

    /// After a change of the tables: waits until no core runs on the old ones.
    /// `kick` must make a core leave the guest. Returns how many had to.
    pub fn advance(&self, kick: impl Fn(usize)) -> u64 {
        // SeqCst: see `enter`. Also orders the change of the tables before.
        let new = self.generation.fetch_add(1, Ordering::SeqCst) + 1;
        let is_behind = |core: &Core| {
            let inside = core.inside.load(Ordering::SeqCst);
            inside != OUTSIDE && inside < new
        };
        let mut kicked = 0;
        for (number, core) in self.cores.iter().enumerate() {
            if is_behind(core) {
                kick(number);
                kicked += 1;
            }
        }
        for core in &self.cores {
            while is_behind(core) {
                core::hint::spin_loop();
            }
        }
        kicked
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn a_core_enters_under_the_newest_generation() {
        let barrier = EntryBarrier::new(2);
        assert_eq!(barrier.enter(0), Some(1));
        barrier.leave(0);
        let kicked = barrier.advance(|core| panic!("core {core} was outside"));
        assert_eq!(kicked, 0);
        assert_eq!(barrier.enter(0), Some(2));
    }

    #[test]
    fn nobody_runs_on_a_table_that_was_taken_away() {
        let barrier = EntryBarrier::new(2);
        let mapped = AtomicBool::new(true);
        let users = AtomicU64::new(0);
        let kicked = [AtomicBool::new(false), AtomicBool::new(false)];
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for core in 0..2 {
                let (barrier, mapped, users) = (&barrier, &mapped, &users);
                let (kicked, over) = (&kicked, &over);
                scope.spawn(move || {
                    while !over.load(Ordering::SeqCst) {
                        if barrier.enter(core).is_none() {
                            continue;
                        }
                        let seen = mapped.load(Ordering::SeqCst);
                        users.fetch_add(u64::from(seen), Ordering::SeqCst);
                        while seen && !kicked[core].swap(false, Ordering::SeqCst) {
                            if over.load(Ordering::SeqCst) {
                                break;
                            }
                            std::thread::yield_now();
                        }
                        users.fetch_sub(u64::from(seen), Ordering::SeqCst);
                        barrier.leave(core);
                    }
                });
            }
            for _ in 0..2000 {
                mapped.store(false, Ordering::SeqCst);
                barrier.advance(|core| kicked[core].store(true, Ordering::SeqCst));
                assert_eq!(users.load(Ordering::SeqCst), 0, "inside on the old table");
                mapped.store(true, Ordering::SeqCst);
            }
            over.store(true, Ordering::SeqCst);
        });
    }
}
