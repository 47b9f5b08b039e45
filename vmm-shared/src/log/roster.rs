//! The membership table that every replica derives from the log itself.
//!
//! Status words (see [`member`](super::member)) are there to find and wake
//! members. What *counts* is decided here, by position in the log, so that
//! all replicas decide alike: a batch takes effect if its author was a member
//! at that position, and is a tombstone otherwise.

use super::layout::MAX_MEMBERS;
use super::member::{Epoch, MemberId};

/// A change of membership, as it stands in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The author is a member from here on.
    Joined,
    /// The author is no member from here on, by its own wish.
    Left,
    /// The member is none from here on, by another's decision.
    Evicted,
}

/// A change of membership that has taken effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemberChange {
    /// What happened.
    pub change: Change,
    /// To whom.
    pub member: MemberId,
    /// In which incarnation.
    pub epoch: Epoch,
    /// The log position of the change.
    pub position: u64,
}

/// Who is a member at one log position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Roster {
    /// Epoch shifted left by one, plus one while it is a member.
    entries: [u64; MAX_MEMBERS],
}

impl Default for Roster {
    fn default() -> Self {
        Self {
            entries: [0; MAX_MEMBERS],
        }
    }
}

impl Roster {
    #[inline]
    const fn entry(epoch: Epoch, live: bool) -> u64 {
        ((epoch as u64) << 1) | live as u64
    }

    /// Whether that incarnation is a member.
    #[inline]
    pub(crate) fn has(&self, member: MemberId, epoch: Epoch) -> bool {
        self.entries[member.index()] == Self::entry(epoch, true)
    }

    /// Whether that incarnation has been a member, or was refused, and can't
    /// become one any more.
    #[inline]
    pub(crate) fn has_ended(&self, member: MemberId, epoch: Epoch) -> bool {
        self.entries[member.index()] >= Self::entry(epoch, false) && !self.has(member, epoch)
    }

    /// Carries out a change by `author`; says whether it had an effect.
    ///
    /// An incarnation joins once: a Join that comes after the eviction of the
    /// same epoch is refused, as is one that the author makes for another.
    /// Only a member evicts.
    pub(crate) fn change(
        &mut self,
        author: (MemberId, Epoch),
        change: Change,
        member: MemberId,
        epoch: Epoch,
    ) -> bool {
        let author_is_member = self.has(author.0, author.1);
        let entry = &mut self.entries[member.index()];
        let ended = Self::entry(epoch, false);
        match change {
            Change::Joined if author == (member, epoch) && *entry < ended => {
                *entry = Self::entry(epoch, true);
                true
            }
            Change::Left if author == (member, epoch) && *entry == Self::entry(epoch, true) => {
                *entry = ended;
                true
            }
            Change::Evicted
                if author_is_member && (*entry < ended || *entry == Self::entry(epoch, true)) =>
            {
                *entry = ended;
                true
            }
            _ => false,
        }
    }

    pub(crate) const fn words(&self) -> &[u64; MAX_MEMBERS] {
        &self.entries
    }

    pub(crate) fn from_words(words: &[u64]) -> Self {
        let mut roster = Self::default();
        for (entry, word) in roster.entries.iter_mut().zip(words) {
            *entry = *word;
        }
        roster
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn id(index: usize) -> MemberId {
        MemberId::new(index).expect("small")
    }

    #[test]
    fn an_incarnation_joins_once_and_ends_once() {
        let mut roster = Roster::default();
        let (a, b) = (id(0), id(1));
        assert!(roster.change((a, 1), Change::Joined, a, 1));
        assert!(!roster.change((a, 1), Change::Joined, a, 1));
        assert!(roster.has(a, 1) && !roster.has_ended(a, 1));
        // Evicted before it could join: its Join comes too late.
        assert!(roster.change((a, 1), Change::Evicted, b, 1));
        assert!(!roster.change((b, 1), Change::Joined, b, 1));
        assert!(roster.has_ended(b, 1));
        // No member, no eviction.
        assert!(!roster.change((b, 1), Change::Evicted, a, 1));
        // The second of two evictors, and one that is behind the times.
        assert!(!roster.change((a, 1), Change::Evicted, b, 1));
        assert!(roster.change((b, 2), Change::Joined, b, 2));
        assert!(!roster.change((a, 1), Change::Evicted, b, 1));
        assert!(roster.has(b, 2));
        assert!(roster.change((b, 2), Change::Left, b, 2));
        assert!(!roster.has(b, 2) && roster.has_ended(b, 2));
        assert_eq!(Roster::from_words(roster.words()), roster);
    }
}
