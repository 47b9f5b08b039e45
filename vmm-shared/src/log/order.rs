//! The order ring: the one place where members decide what comes next.
//!
//! Position `p` of the log has one 64-bit word, slot `p mod N`:
//!
//! ```text
//!  63                     26 25      20 19              0
//! +-------------------------+----------+-----------------+
//! | lap = p / N + 1         | member   | line in its lane|
//! +-------------------------+----------+-----------------+
//! ```
//!
//! A batch enters the log by one compare-and-swap of that word, from what the
//! previous lap left there. So a slot is never reserved and unpublished: it
//! is free, or it holds a whole batch. With 2¹⁶ slots and a million batches a
//! second the laps last for more than 500 years.

use crate::lapped::{self, Found};
use crate::sync::Ordering;

use super::Log;
use super::layout::{LINE_BITS, MEMBER_BITS};
use super::member::MemberId;

const _: () = assert!(LINE_BITS + MEMBER_BITS == lapped::CONTENT_BITS);

/// Where a batch lies: what a filled slot says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) member: MemberId,
    pub(crate) line: usize,
}

/// What a position's slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    /// Nothing yet. The word is the one that a link has to replace.
    Free(u64),
    /// A batch.
    Filled(Link),
    /// A later position's batch: the reader was too slow.
    Overrun,
    /// A word that the protocol never leaves there.
    Corrupt,
}

impl Log {
    #[inline]
    fn slots(&self) -> u64 {
        self.layout.geometry().order_slots as u64
    }

    #[inline]
    fn slot(&self, position: u64) -> &crate::sync::AtomicU64 {
        self.layout.order(lapped::index(position, self.slots()))
    }

    /// What is at `position`.
    #[inline]
    pub(crate) fn look(&self, position: u64) -> Slot {
        // Acquire: pairs with the Release in `link`, so that the batch's
        // bytes, and all that its writer had seen, are visible.
        let word = self.slot(position).load(Ordering::Acquire);
        match lapped::decode(word, position, self.slots()) {
            Found::Free => Slot::Free(word),
            Found::Later => Slot::Overrun,
            Found::Corrupt => Slot::Corrupt,
            Found::Filled(content) => {
                let member = MemberId::from_low_bits(content >> LINE_BITS);
                let line = usize::try_from(content & ((1 << LINE_BITS) - 1)).expect("20 bits");
                if member.index() < self.layout.geometry().members {
                    Slot::Filled(Link { member, line })
                } else {
                    Slot::Corrupt
                }
            }
        }
    }

    /// Whether nothing is at `position` yet: a [`look`](Self::look) that asks
    /// no more.
    #[inline]
    pub(crate) fn is_free(&self, position: u64) -> bool {
        // Acquire: as in `look`.
        let word = self.slot(position).load(Ordering::Acquire);
        lapped::is_free(word, position, self.slots())
    }

    /// Enters a batch at `position`, if its slot still holds `free`. The only
    /// step by which anything gets into the log.
    #[inline]
    pub(crate) fn link(&self, position: u64, free: u64, link: Link) -> bool {
        let content = (link.member.bits() << LINE_BITS) | link.line as u64;
        let word = lapped::word(position, self.slots(), content);
        // Release: the batch's bytes before its word; pairs with the Acquire
        // in `look`. Relaxed on failure: the caller looks again.
        self.slot(position)
            .compare_exchange(free, word, Ordering::Release, Ordering::Relaxed)
            .is_ok()
    }

    /// Whether the log has positions left at and after `position`.
    #[inline]
    pub(crate) fn has_laps_left(&self, position: u64) -> bool {
        lapped::is_countable(position, self.slots())
    }

    /// The reclaim frontier: batches before it may be overwritten.
    #[inline]
    pub(crate) fn head(&self) -> u64 {
        // Acquire: pairs with the Release in `raise_head`, so that the reads
        // of whoever has applied those batches are over before their space is
        // written again.
        self.layout.head().load(Ordering::Acquire)
    }

    /// Moves the reclaim frontier up to `to`, if it is below.
    pub(crate) fn raise_head(&self, to: u64) {
        // AcqRel: Release pairs with `head`; Acquire chains earlier raises,
        // so that whoever sees this one sees their reasons as well.
        self.layout.head().fetch_max(to, Ordering::AcqRel);
    }
}
