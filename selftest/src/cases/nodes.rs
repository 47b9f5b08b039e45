//! What a rack needs of several hosts: one node tries, the second helps.
//!
//! ```text
//!   memory of node 0   page 0   word 0    round that node 0 asks for
//!                               word 8    round that node 1 has answered
//!                               words 16, 24 of cases, each on a line of its own
//! ```
#![expect(unsafe_code, reason = "executes code that the other node has written")]

use alloc::format;
use core::sync::atomic::{AtomicU64, Ordering, fence};

use hypervisor::arch::time::Clocks;
use hypervisor::arch::{cpu, paging};
use hypervisor::fabric::Regions;
use hypervisor::fabric::proof::{Fetch, Pages, ProofError};
use vmm_shared::addr::{Hpa, NodeId};
use vmm_shared::shm::SharedMem;

use crate::suite::{Finding, Suite, Verdict, holds, same};

/// Rounds of a litmus test, and milliseconds after which there are no more: on
/// a host with fewer processors than nodes, every round takes a time slice.
const ROUNDS: u64 = 20_000;
const ROUNDS_MS: u64 = 1_000;
/// Pairs of stores for each question.
const STORES: u64 = 1_000;
/// Spins for one answer; only a node that is gone takes so long.
const PATIENCE: u64 = 2_000_000_000;
const NODE_0: NodeId = NodeId(0);

/// The words that both nodes use.
#[derive(Clone, Copy)]
struct Words(SharedMem);

#[derive(Clone, Copy)]
enum Word {
    Asked = 0,
    Answered = 1,
    X = 2,
    Y = 3,
    Seen = 4,
}

/// What node 1 is to do, in the upper half of a question; the round is in the
/// lower half.
const STORE_THEN_LOAD: u64 = 1 << 32;
const TWO_STORES: u64 = 2 << 32;
const TIME: u64 = 3 << 32;

impl Words {
    fn new(regions: &Regions) -> Option<Self> {
        let page = regions.memories.first()?.window(0, 4096)?;
        Some(Self(page))
    }

    /// Words lie on lines of their own.
    fn word(&self, word: Word) -> &AtomicU64 {
        self.0
            .atomic_u64(word as usize * 64)
            .expect("within the page")
    }

    /// What node 1 does for a question.
    fn answer(&self) {
        // Acquire: what was set up before the question is visible.
        let asked = self.word(Word::Asked).load(Ordering::Acquire);
        if asked == self.word(Word::Answered).load(Ordering::Relaxed) {
            return;
        }
        match asked & !0xffff_ffff {
            STORE_THEN_LOAD => {
                self.word(Word::Y).store(1, Ordering::Relaxed);
                fence(Ordering::SeqCst);
                let seen = self.word(Word::X).load(Ordering::Relaxed);
                self.word(Word::Seen).store(seen, Ordering::Relaxed);
            }
            TWO_STORES => {
                let first = (asked & 0xffff_ffff) * STORES;
                for value in first..first + STORES {
                    self.word(Word::X).store(value, Ordering::Relaxed);
                    // x86 keeps stores in order; Release only binds the compiler.
                    self.word(Word::Y).store(value, Ordering::Release);
                }
            }
            TIME => self.word(Word::Seen).store(cpu::rdtsc(), Ordering::Relaxed),
            _ => {}
        }
        // Release: the answer comes before its number.
        self.word(Word::Answered).store(asked, Ordering::Release);
    }

    fn ask(&self, question: u64) {
        self.word(Word::Asked).store(question, Ordering::Release);
    }

    fn wait(&self, question: u64) -> Verdict {
        for _ in 0..PATIENCE {
            if self.word(Word::Answered).load(Ordering::Acquire) == question {
                return Ok(());
            }
            core::hint::spin_loop();
        }
        Err(silent())
    }
}

/// As many rounds as there is time for, numbered from 1.
fn rounds(clocks: Clocks, mut round: impl FnMut(u64) -> Verdict) -> Verdict {
    let end = cpu::rdtsc() + clocks.ticks(ROUNDS_MS * 1000);
    (1..=ROUNDS)
        .take_while(|_| cpu::rdtsc() < end)
        .try_for_each(&mut round)
}

fn silent() -> Finding {
    Finding::Wrong {
        expected: "an answer of node 1".into(),
        seen: "none".into(),
    }
}

/// The life of every node but the first.
pub(crate) fn help(regions: &Regions, node: NodeId) -> ! {
    let pages = regions.control.proof(NODE_0).and_then(Pages::new);
    let words = Words::new(regions);
    loop {
        if let (NodeId(1), Some(pages), Some(words)) = (node, &pages, &words) {
            pages.help();
            words.answer();
        }
        core::hint::spin_loop();
    }
}

/// Adds the cases, which run on node 0.
pub(crate) fn add(suite: &mut Suite, regions: &Regions, clocks: Clocks) {
    let pages = regions.control.proof(NODE_0).and_then(Pages::new);
    let (Some(pages), Some(words)) = (pages, Words::new(regions)) else {
        return;
    };
    suite.case("nodes/atomics", "7.3.2", move |_| {
        match pages.prove_atomics() {
            Ok(_) => Ok(()),
            Err(ProofError::NoHelper) => Err(silent()),
            Err(why) => Err(Finding::Wrong {
                expected: "every addition counts".into(),
                seen: format!("{why}"),
            }),
        }
    });
    suite.case("nodes/instruction-coherence", "7.6.1", move |_| {
        let page = Hpa(pages.code().addr() as u64);
        // SAFETY: 1. only the helper writes code there, by whole words; 2. this
        // is the node's only core.
        let execute = || unsafe { paging::call_shared_code(page) };
        match pages.prove_fetch(execute) {
            Ok(found) => holds(found == Fetch::Coherent, || {
                (
                    "code as the other node has rewritten it",
                    "what was there before",
                )
            }),
            Err(why) => Err(Finding::Wrong {
                expected: "code as the other node has written it".into(),
                seen: format!("{why}"),
            }),
        }
    });
    suite.case("nodes/stores-stay-in-order", "7.2", move |_| {
        rounds(clocks, |round| {
            let last = round * STORES + STORES - 1;
            words.ask(TWO_STORES | round);
            // While it answers: what comes second must not be seen first.
            loop {
                let second = words.word(Word::Y).load(Ordering::Acquire);
                let first = words.word(Word::X).load(Ordering::Relaxed);
                holds(first >= second, || {
                    let expected = format!("at least {second} in the first word");
                    (expected, format!("{first}"))
                })?;
                if second == last {
                    break;
                }
            }
            words.wait(TWO_STORES | round)
        })
    });
    suite.case("nodes/fences-order-stores-and-loads", "7.4.2", move |_| {
        rounds(clocks, |round| {
            words.word(Word::X).store(0, Ordering::Relaxed);
            words.word(Word::Y).store(0, Ordering::Relaxed);
            words.ask(STORE_THEN_LOAD | round);
            // At changing times after the question.
            for _ in 0..round % 64 {
                core::hint::spin_loop();
            }
            words.word(Word::X).store(1, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            let here = words.word(Word::Y).load(Ordering::Relaxed);
            words.wait(STORE_THEN_LOAD | round)?;
            let there = words.word(Word::Seen).load(Ordering::Relaxed);
            holds(here | there != 0, || {
                let seen = format!("neither in round {round}");
                ("one of two stores seen by the other", seen)
            })
        })
    });
    suite.case("nodes/clocks-keep-their-distance", "15.30.5", move |_| {
        clocks_drift(words, clocks)
    });
}

/// The other node's time minus ours: the least and the most that it can be,
/// over many exchanges.
fn distance(words: Words, clocks: Clocks, first: u64) -> Result<(i64, i64), Finding> {
    let mut bounds: Option<(u64, i64, i64)> = None;
    rounds(clocks, |round| {
        let round = first + round;
        let sent = cpu::rdtsc();
        words.ask(TIME | round);
        words.wait(TIME | round)?;
        let received = cpu::rdtsc();
        let theirs = words.word(Word::Seen).load(Ordering::Relaxed);
        // The answer was taken between the two.
        let (base, low, high) =
            bounds.get_or_insert((theirs.wrapping_sub(received), i64::MIN, i64::MAX));
        let least = theirs
            .wrapping_sub(received)
            .wrapping_sub(*base)
            .cast_signed();
        let most = theirs.wrapping_sub(sent).wrapping_sub(*base).cast_signed();
        (*low, *high) = ((*low).max(least), (*high).min(most));
        Ok(())
    })?;
    let (base, low, high) = bounds.expect("there were exchanges");
    let at = |bound: i64| base.cast_signed().wrapping_add(bound);
    Ok((at(low), at(high)))
}

fn clocks_drift(words: Words, clocks: Clocks) -> Verdict {
    let (low, high) = distance(words, clocks, 0)?;
    clocks.spin_us(200_000);
    let (later_low, later_high) = distance(words, clocks, ROUNDS)?;
    same(
        "sign of the distance's width",
        0,
        i64::from(high < low).cast_unsigned(),
    )?;
    // The two intervals must meet, within what 50 parts per million of drift
    // could make of 200 ms.
    let slack = i64::try_from(clocks.ticks(10)).unwrap_or(0);
    let meets = later_low <= high.saturating_add(slack) && low <= later_high.saturating_add(slack);
    holds(meets, || {
        (
            format!("a distance within {low}..={high} ticks"),
            format!("{later_low}..={later_high} after 200 ms"),
        )
    })
}
