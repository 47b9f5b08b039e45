//! A lock that many enter and few close: each node enters through a gate of
//! its own, on a line of its own; who closes shuts all of them.
//!
//! It keeps apart those that only add to something (a page fault installs a
//! page) and those that take away (a range is unmapped). Entering costs one
//! locked instruction on a line that stays on the node; closing costs one for
//! each gate, and a wait for who is inside.
//!
//! Nobody may wait inside, or while they are closed, for anything that another
//! does only outside.

use alloc::boxed::Box;

use crate::sync::{AtomicU64, Ordering, Padded};

/// The gate is closed. The rest of the word counts who is inside.
const CLOSED: u64 = 1 << 63;

/// Gates, one for each node.
#[derive(Debug)]
pub struct Gates {
    words: Box<[Padded<AtomicU64>]>,
}

/// Somebody is inside until this is dropped.
#[derive(Debug)]
pub struct Inside<'a>(&'a AtomicU64);

/// Nobody is inside until this is dropped.
#[derive(Debug)]
pub struct Closed<'a>(&'a Gates);

impl Gates {
    /// `count` open gates.
    #[must_use]
    pub fn new(count: usize) -> Self {
        Self {
            words: (0..count).map(|_| Padded(AtomicU64::new(0))).collect(),
        }
    }

    /// Goes in, once it is open.
    ///
    /// # Panics
    /// If there is no such gate.
    #[must_use = "left at once"]
    pub fn enter(&self, gate: usize) -> Inside<'_> {
        let word = &self.words[gate].0;
        loop {
            // Acquire: with the Release of whoever opened it last.
            if word.fetch_add(1, Ordering::Acquire) & CLOSED == 0 {
                return Inside(word);
            }
            // Relaxed: nothing was done inside.
            word.fetch_sub(1, Ordering::Relaxed);
            while word.load(Ordering::Relaxed) & CLOSED != 0 {
                pause();
            }
        }
    }

    /// Closes all, and waits until everybody is out. Nobody waits for a gate
    /// whose node `is_lost`: who is inside there does nothing any more.
    #[must_use = "opened at once"]
    pub fn close(&self, is_lost: impl Fn(usize) -> bool) -> Closed<'_> {
        for (gate, word) in self.words.iter().enumerate() {
            // Acquire: with the Release of whoever closed them before. In
            // order of the gates, so that two who close don't wait for each
            // other.
            while word.0.fetch_or(CLOSED, Ordering::Acquire) & CLOSED != 0 && !is_lost(gate) {
                pause();
            }
        }
        for (gate, word) in self.words.iter().enumerate() {
            // Acquire: with the Release of the last one out.
            while word.0.load(Ordering::Acquire) != CLOSED && !is_lost(gate) {
                pause();
            }
        }
        Closed(self)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        // Release: what was done inside is seen by who closes.
        self.0.fetch_sub(1, Ordering::Release);
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        for word in &self.0.words {
            // Release: what was taken away is seen by who enters.
            word.0.fetch_and(!CLOSED, Ordering::Release);
        }
    }
}

fn pause() {
    #[cfg(loom)]
    loom::thread::yield_now();
    #[cfg(not(loom))]
    core::hint::spin_loop();
}

/// The protocol of the paravirtual kernel's page faults: a region (mapped or
/// not), the frame that backs its page, and another node's copy of that.
#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    const OLD: u64 = 1;
    const NEW: u64 = 2;

    struct Page {
        gates: Gates,
        mapped: AtomicU64,
        frame: AtomicU64,
        copy: AtomicU64,
    }

    impl Page {
        fn new(frame: u64) -> Arc<Self> {
            Arc::new(Self {
                gates: Gates::new(2),
                mapped: AtomicU64::new(1),
                frame: AtomicU64::new(frame),
                copy: AtomicU64::new(0),
            })
        }

        /// A fault on node 1, whose tables are `copy`.
        fn fault(&self) {
            let _inside = self.gates.enter(1);
            if self.mapped.load(Ordering::Relaxed) == 0 {
                return;
            }
            let installed =
                self.frame
                    .compare_exchange(0, OLD, Ordering::Relaxed, Ordering::Relaxed);
            self.copy.store(
                installed.map_or_else(|found| found, |_| OLD),
                Ordering::Relaxed,
            );
        }
    }

    #[test]
    fn no_page_outlives_its_region() {
        loom::model(|| {
            let page = Page::new(0);
            let other = page.clone();
            let fault = thread::spawn(move || other.fault());
            {
                let _closed = page.gates.close(|_| false);
                page.mapped.store(0, Ordering::Relaxed);
                page.frame.store(0, Ordering::Relaxed);
                page.copy.store(0, Ordering::Relaxed);
            }
            fault.join().expect("no panic");
            let _closed = page.gates.close(|_| false);
            assert_eq!(page.frame.load(Ordering::Relaxed), 0);
            assert_eq!(page.copy.load(Ordering::Relaxed), 0);
        });
    }

    #[test]
    fn a_replaced_page_is_in_nobodys_tables() {
        loom::model(|| {
            let page = Page::new(OLD);
            let other = page.clone();
            let fault = thread::spawn(move || other.fault());
            {
                let _closed = page.gates.close(|_| false);
                page.frame.store(NEW, Ordering::Relaxed);
                page.copy.store(0, Ordering::Relaxed);
            }
            fault.join().expect("no panic");
            let _closed = page.gates.close(|_| false);
            assert_ne!(page.copy.load(Ordering::Relaxed), OLD);
        });
    }

    #[test]
    fn two_may_close() {
        loom::model(|| {
            let page = Page::new(0);
            let other = page.clone();
            let close = |page: &Page| {
                let _closed = page.gates.close(|_| false);
                let count = page.frame.load(Ordering::Relaxed);
                page.frame.store(count + 1, Ordering::Relaxed);
            };
            let thread = thread::spawn(move || close(&other));
            close(&page);
            thread.join().expect("no panic");
            let _closed = page.gates.close(|_| false);
            assert_eq!(page.frame.load(Ordering::Relaxed), 2);
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_inside_while_they_are_closed() {
        let gates = Gates::new(3);
        let inside = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for gate in 0..3 {
                let (gates, inside) = (&gates, &inside);
                scope.spawn(move || {
                    for _ in 0..2_000 {
                        let _inside = gates.enter(gate);
                        inside.fetch_add(1, Ordering::Relaxed);
                        inside.fetch_sub(1, Ordering::Relaxed);
                    }
                });
            }
            for _ in 0..500 {
                let _closed = gates.close(|_| false);
                assert_eq!(inside.load(Ordering::Relaxed), 0);
            }
        });
    }

    #[test]
    fn nobody_waits_for_who_is_lost_inside() {
        let gates = Gates::new(2);
        core::mem::forget(gates.enter(1));
        for _ in 0..2 {
            let _closed = gates.close(|gate| gate == 1);
        }
        let _inside = gates.enter(0);
    }
}
