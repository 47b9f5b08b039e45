//! What a node proves of its platform before it may take part.
//!
//! A *prover* and a *helper*, another node, share a page of words and a page
//! of code. Every node proves with node 0's help, and node 0 with node 1's.
//!
//! - **Atomics**: both add to one word with locked instructions, as fast as
//!   they can, and the sum must be that of their counts. An emulator may turn
//!   locked instructions into plain ones, and real hosts must not.
//! - **Coherent loads**: what the helper has written is what the prover reads.
//! - **Coherent fetch**: the prover executes code that the helper has written,
//!   and again after the helper has rewritten it. If it still does what the
//!   old bytes said, its fetch is not coherent. That is no failure: then all
//!   nodes keep it so by protocol ([`vmm_shared::coherence`]).
//!
//! ```text
//!   0      step asked for             prover writes
//!   64     last step done             helper writes
//!   72     additions of the helper    helper writes
//!   128    the word to which both add
//!   192    outcome                    prover writes
//!   4096   code
//! ```

use core::sync::atomic::{AtomicU64, Ordering};

use vmm_shared::shm::SharedMem;

/// The helper is to add.
const ADD: u64 = 1;
/// It is to stop that.
const STOP: u64 = 2;
/// From here on: it is to write code that returns the step's number.
const FIRST_CODE: u64 = 16;
const LAST_CODE: u64 = FIRST_CODE + 4;

/// The code page's offset.
const CODE: usize = 4096;
/// Additions that must have come between two of the other's.
const CONTENDED: u32 = 2000;
/// The most that each adds: without contention there is nothing to see.
const MOST: u64 = 1 << 22;
/// Additions of the helper for each look at what it is asked.
const BATCH: u64 = 500;
/// Spins for one step; only a helper that is gone takes so long.
const PATIENCE: u64 = 2_000_000_000;

/// What a node has found out about its platform.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Fetch {
    /// Instruction fetch sees what other nodes write.
    Coherent = 1,
    /// It may see what was there before.
    Stale = 2,
}

impl Fetch {
    /// What a word in shared memory says; `None` if nothing yet.
    #[must_use]
    pub const fn from_raw(raw: u64) -> Option<Self> {
        match raw {
            0 => None,
            1 => Some(Self::Coherent),
            // Garbage too: that side is always right.
            _ => Some(Self::Stale),
        }
    }
}

/// Why a platform won't do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProofError {
    /// The helper gives no answer.
    #[error("the node that should help with the proofs does not answer")]
    NoHelper,
    /// Additions were lost.
    #[error(
        "its locked instructions are not atomic towards other nodes: {lost} of {added} additions were lost; \
         give it hosts, or emulators with two possible CPUs, whose atomics are exact"
    )]
    Atomics {
        /// Additions made.
        added: u64,
        /// Those that were lost.
        lost: u64,
    },
    /// A load did not see what the helper had stored.
    #[error(
        "it does not see what other nodes write: read {found:#x} where {written:#x} was written"
    )]
    Loads {
        /// What the helper has written.
        written: u64,
        /// What was read.
        found: u64,
    },
    /// Code did what neither the old nor the new bytes say.
    #[error("it executes shared code wrongly: step {expected} returned {found}")]
    Execution {
        /// What the newest bytes return.
        expected: u64,
        /// What was returned.
        found: u64,
    },
}

/// The pages that a prover and its helper share.
#[derive(Clone, Copy, Debug)]
pub struct Pages(SharedMem);

/// `mov eax, value; ret`, and breakpoints.
fn code_returning(value: u64) -> u64 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u64::from_le_bytes([0xb8, a, b, c, d, 0xc3, 0xcc, 0xcc])
}

impl Pages {
    /// The pages in `memory`; `None` if it is too small.
    #[must_use]
    pub fn new(memory: SharedMem) -> Option<Self> {
        (memory.len() >= CODE + 8).then_some(Self(memory))
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        self.0
            .atomic_u64(offset)
            .expect("`new` has checked the size")
    }

    fn asked(&self) -> &AtomicU64 {
        self.word(0)
    }

    fn done(&self) -> &AtomicU64 {
        self.word(64)
    }

    fn helpers(&self) -> &AtomicU64 {
        self.word(72)
    }

    fn sum(&self) -> &AtomicU64 {
        self.word(128)
    }

    /// Where the code is.
    #[must_use]
    pub fn code(&self) -> *const u8 {
        self.word(CODE).as_ptr().cast_const().cast()
    }

    /// What the prover has found out, once it has.
    #[must_use]
    pub fn outcome(&self) -> Option<Fetch> {
        Fetch::from_raw(self.word(192).load(Ordering::Acquire))
    }

    /// The prover is through.
    pub fn set_outcome(&self, outcome: Fetch) {
        self.word(192).store(outcome as u64, Ordering::Release);
    }

    /// Does a piece of what the prover asks for. Never waits.
    pub fn help(&self) {
        // Acquire: what the prover did before it asked comes before.
        let asked = self.asked().load(Ordering::Acquire);
        let is_done = self.done().load(Ordering::Relaxed) == asked;
        match asked {
            ADD => {
                for _ in 0..BATCH {
                    self.sum().fetch_add(1, Ordering::Relaxed);
                }
                let helpers = self.helpers();
                let count = helpers.load(Ordering::Relaxed).wrapping_add(BATCH);
                helpers.store(count, Ordering::Relaxed);
            }
            FIRST_CODE..=LAST_CODE if !is_done => {
                self.word(CODE)
                    .store(code_returning(asked), Ordering::Relaxed);
            }
            _ => {}
        }
        if !is_done {
            // Release: the step's effects come before its end.
            self.done().store(asked, Ordering::Release);
        }
    }

    fn ask(&self, step: u64) -> Result<(), ProofError> {
        self.asked().store(step, Ordering::Release);
        for _ in 0..PATIENCE {
            // Acquire: pairs with the Release in `help`.
            if self.done().load(Ordering::Acquire) == step {
                return Ok(());
            }
            core::hint::spin_loop();
        }
        Err(ProofError::NoHelper)
    }

    /// Proves that additions of both sides are exact; how many came between
    /// two of the other's.
    ///
    /// # Errors
    /// Some were lost, or nobody helps.
    pub fn prove_atomics(&self) -> Result<u32, ProofError> {
        self.ask(ADD)?;
        let (mut mine, mut contended) = (0, 0);
        let mut next = self.sum().load(Ordering::Relaxed);
        while mine < MOST && contended < CONTENDED {
            let before = self.sum().fetch_add(1, Ordering::Relaxed);
            contended += u32::from(before != next);
            next = before.wrapping_add(1);
            mine += 1;
        }
        self.ask(STOP)?;
        let added = mine.wrapping_add(self.helpers().load(Ordering::Relaxed));
        match added.wrapping_sub(self.sum().load(Ordering::Relaxed)) {
            0 => Ok(contended),
            lost => Err(ProofError::Atomics { added, lost }),
        }
    }

    /// Finds out whether instruction fetch is coherent. `execute` calls the
    /// code at [`code`](Self::code).
    ///
    /// # Errors
    /// The platform is wrong in another way, or nobody helps.
    pub fn prove_fetch(&self, execute: impl Fn() -> u64) -> Result<Fetch, ProofError> {
        let mut before = None;
        for step in FIRST_CODE..=LAST_CODE {
            self.ask(step)?;
            let (written, found) = (
                code_returning(step),
                self.word(CODE).load(Ordering::Relaxed),
            );
            if found != written {
                return Err(ProofError::Loads { written, found });
            }
            let returned = execute();
            if returned != step {
                let (expected, found) = (step, returned);
                return match before {
                    Some(old) if old == found => Ok(Fetch::Stale),
                    _ => Err(ProofError::Execution { expected, found }),
                };
            }
            before = Some(step);
        }
        Ok(Fetch::Coherent)
    }
}

#[cfg(test)]
#[expect(unsafe_code, reason = "leaked buffers as pages")]
mod tests {
    use super::*;
    use core::cell::Cell;
    use core::ptr::NonNull;
    use core::sync::atomic::AtomicBool;

    fn pages() -> Pages {
        let memory = Box::leak(vec![0_u64; 1024].into_boxed_slice());
        let base = NonNull::new(memory.as_mut_ptr()).expect("not null").cast();
        // SAFETY: leaked, aligned, and reached through the window only.
        Pages::new(unsafe { SharedMem::new(base, 8192) }).expect("large enough")
    }

    fn with_helper<T>(pages: Pages, help: impl Fn(&Pages) + Sync, prove: impl Fn() -> T) -> T {
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    help(&pages);
                }
            });
            let result = prove();
            over.store(true, Ordering::Relaxed);
            result
        })
    }

    /// What the bytes at the code's place return.
    fn interpret(pages: &Pages) -> u64 {
        (pages.word(CODE).load(Ordering::Relaxed) >> 8) & 0xffff_ffff
    }

    #[test]
    fn a_sound_platform_passes() {
        let pages = pages();
        let outcome = with_helper(pages, Pages::help, || {
            pages.prove_atomics()?;
            pages.prove_fetch(|| interpret(&pages))
        });
        assert_eq!(outcome, Ok(Fetch::Coherent));
    }

    #[test]
    fn lost_additions_are_noticed() {
        let pages = pages();
        // As a host would whose additions are a load and a store.
        let lossy = |pages: &Pages| {
            let before = pages.sum().load(Ordering::Relaxed);
            pages.help();
            if pages.asked().load(Ordering::Relaxed) == ADD {
                pages.sum().store(before + 1, Ordering::Relaxed);
            }
        };
        let outcome = with_helper(pages, lossy, || pages.prove_atomics());
        let lost = matches!(outcome, Err(ProofError::Atomics { lost, .. }) if lost > 0);
        assert!(lost, "{outcome:?}");
    }

    #[test]
    fn stale_and_wrong_code_are_told_apart() {
        let outcome = |execute: &dyn Fn(&Pages) -> u64| {
            let pages = pages();
            with_helper(pages, Pages::help, || pages.prove_fetch(|| execute(&pages)))
        };
        let first = Cell::new(None);
        let cached = |pages: &Pages| {
            let value = first.get().unwrap_or_else(|| interpret(pages));
            first.set(Some(value));
            value
        };
        assert_eq!(outcome(&cached), Ok(Fetch::Stale));
        let wrong = outcome(&|_| 7);
        assert!(matches!(wrong, Err(ProofError::Execution { found: 7, .. })));
    }

    #[test]
    fn stores_that_do_not_arrive_are_noticed() {
        let pages = pages();
        let deaf = |pages: &Pages| {
            let asked = pages.asked().load(Ordering::Relaxed);
            pages.done().store(asked, Ordering::Release);
        };
        let outcome = with_helper(pages, deaf, || pages.prove_fetch(|| 0));
        assert!(
            matches!(outcome, Err(ProofError::Loads { .. })),
            "{outcome:?}"
        );
    }

    #[test]
    fn garbage_is_no_step() {
        let pages = pages();
        for step in [0, 3, LAST_CODE + 1, u64::MAX] {
            pages.asked().store(step, Ordering::Relaxed);
            pages.help();
            assert_eq!(pages.sum().load(Ordering::Relaxed), 0);
            assert_eq!(pages.word(CODE).load(Ordering::Relaxed), 0);
        }
        assert_eq!(Fetch::from_raw(99), Some(Fetch::Stale));
    }
}
