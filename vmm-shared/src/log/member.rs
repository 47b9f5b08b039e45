//! Member slots: who takes part in the log, and in which incarnation.
//!
//! ```text
//! line 0  heartbeat                      owner
//! line 1  applied: next position         owner
//! line 2  status, ended_at               anyone, by CAS, never back
//! line 3  want: snapshot asked for       owner, as joiner
//! line 4  staged: snapshot handed out    owner, as donor
//!
//!            claim              Join linked
//!   Free(e) ──────▶ Joining(e+1) ────────▶ Live(e+1) ──leave──▶ Free(e+1)
//!     ▲                 │                    │
//!     │                 └──── silent for a lease ──▶ Evicting(e+1)
//!     │ buried: its own last act,                       │ Evict linked
//!     └──────── or its death is confirmed ──────── Evicted(e+1)
//! ```
//!
//! An owner that gives up on its own (a join that takes too long) goes to
//! `Ending` instead; the others link its eviction and free the slot.
//!
//! A slot in `Evicted` is in **quarantine**. Its lane, stage and record belong
//! to an incarnation that may only be asleep, so nobody else writes there
//! until that incarnation has said that it is done ([`Replica`] does so when
//! it notices) or someone who knows vouches for its death
//! ([`Log::confirm_dead`]): the launcher that has reaped the process, or the
//! node itself after a reset.
//!
//! [`Replica`]: super::Replica

use crate::sync::{AtomicU64, Ordering};

use super::Log;
use super::layout::MAX_MEMBERS;

/// The number of a member slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberId(u8);

impl MemberId {
    /// The slot `index`, or `None` if no log can have so many.
    #[must_use]
    pub const fn new(index: usize) -> Option<Self> {
        if index < MAX_MEMBERS {
            Some(Self::from_low_bits(index as u64))
        } else {
            None
        }
    }

    /// The member that the low bits of a word name; higher bits are ignored.
    #[inline]
    pub(crate) const fn from_low_bits(bits: u64) -> Self {
        Self(bits.to_le_bytes()[0] & 63)
    }

    /// The number of the slot.
    #[must_use]
    #[inline]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    #[inline]
    pub(crate) const fn bits(self) -> u64 {
        self.0 as u64
    }
}

/// Which use of a member slot: 1 is the first. Never reused.
pub type Epoch = u32;

/// What a member slot is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Open to be claimed.
    Free,
    /// Claimed; its owner loads the state.
    Joining,
    /// Its owner appends and applies.
    Live,
    /// Found silent; its eviction is being linked.
    Evicting,
    /// Evicted, and in quarantine.
    Evicted,
    /// Its owner has stopped without a word in the log; its eviction is still
    /// to be linked, and no quarantine is needed.
    Ending,
}

/// A member slot's status word: node (24) | epoch (32) | state (8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// What it is at.
    pub state: State,
    /// The incarnation that this is about.
    pub epoch: Epoch,
    /// The node that claimed it, as given in [`Config`](super::Config).
    pub node: u32,
}

/// Most that a node's number can be.
pub(crate) const MAX_NODE: u32 = (1 << 24) - 1;

impl Status {
    #[inline]
    const fn word(self) -> u64 {
        ((self.node as u64) << 40) | ((self.epoch as u64) << 8) | self.state as u64
    }

    /// Garbage in the word reads as an incarnation in quarantine: nobody
    /// counts on it, nobody takes its slot.
    fn from_word(word: u64) -> Self {
        let state = match word & 0xff {
            0 => State::Free,
            1 => State::Joining,
            2 => State::Live,
            3 => State::Evicting,
            5 => State::Ending,
            _ => State::Evicted,
        };
        let field = |shift: u32, mask: u64| u32::try_from((word >> shift) & mask);
        Self {
            state,
            epoch: field(8, 0xffff_ffff).expect("32 bits"),
            node: field(40, 0xff_ffff).expect("24 bits"),
        }
    }

    pub(crate) const fn is(self, state: State, epoch: Epoch) -> bool {
        self.state as u8 == state as u8 && self.epoch == epoch
    }
}

pub(crate) const HEARTBEAT: usize = 0;
const APPLIED: usize = 1;
const STATUS: usize = 2;
pub(crate) const WANT: usize = 3;
pub(crate) const STAGED: usize = 4;

impl Log {
    #[inline]
    pub(crate) fn record(&self, member: MemberId, line: usize, index: usize) -> &AtomicU64 {
        self.layout.record(member, line, index)
    }

    /// All member slots of this log.
    pub fn members(&self) -> impl Iterator<Item = MemberId> + use<> {
        (0..self.layout.geometry().members).filter_map(MemberId::new)
    }

    /// What `member`'s slot is at. A member that this log does not have reads
    /// as evicted.
    #[must_use]
    pub fn status(&self, member: MemberId) -> Status {
        if member.index() >= self.layout.geometry().members {
            return Status::from_word(u64::MAX);
        }
        // Acquire: pairs with the AcqRel in `change_status`: who sees a
        // status sees what was done before it was set.
        Status::from_word(self.record(member, STATUS, 0).load(Ordering::Acquire))
    }

    /// Whether that incarnation holds its slot: it may write and link.
    #[inline]
    pub(crate) fn is_member(&self, member: MemberId, epoch: Epoch) -> bool {
        // Acquire: as in `status`.
        let word = self.record(member, STATUS, 0).load(Ordering::Acquire);
        [State::Live, State::Joining].into_iter().any(|state| {
            let node = 0;
            word & ((1 << 40) - 1) == Status { state, epoch, node }.word()
        })
    }

    /// Moves the status of that incarnation from one state to the next.
    pub(crate) fn change_status(
        &self,
        member: MemberId,
        epoch: Epoch,
        from: State,
        to: State,
    ) -> bool {
        let found = self.status(member);
        found.is(from, epoch) && self.replace_status(member, found, Status { state: to, ..found })
    }

    pub(crate) fn replace_status(&self, member: MemberId, from: Status, to: Status) -> bool {
        // AcqRel: Release pairs with `status`; Acquire, so that a claim sees
        // all of the incarnation that freed the slot.
        self.record(member, STATUS, 0)
            .compare_exchange(from.word(), to.word(), Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// The position after the last one at which an incarnation of this slot
    /// has ended.
    pub(crate) fn ended_at(&self, member: MemberId) -> u64 {
        // Relaxed: written before the status that makes it matter.
        self.record(member, STATUS, 1).load(Ordering::Relaxed)
    }

    pub(crate) fn note_end(&self, member: MemberId, position: u64) {
        // Relaxed: the status change that follows publishes it.
        self.record(member, STATUS, 1)
            .fetch_max(position, Ordering::Relaxed);
    }

    /// The next position that `member` will apply.
    pub(crate) fn applied(&self, member: MemberId) -> u64 {
        // Acquire: pairs with the Release in `set_applied`.
        self.record(member, APPLIED, 0).load(Ordering::Acquire)
    }

    #[inline]
    pub(crate) fn set_applied(&self, member: MemberId, position: u64) {
        // Release: the member's reads of all batches before `position` are
        // over before anyone may count it as past them.
        self.record(member, APPLIED, 0)
            .store(position, Ordering::Release);
    }

    /// Takes the caller's word that an incarnation can never run again: its
    /// slot leaves quarantine, or, if it is not evicted yet, will be evicted
    /// at the next tick of any member, without waiting for its lease. Returns
    /// whether it was still to be buried.
    ///
    /// Call it only with proof: the process was reaped, the node was reset,
    /// the fabric has cut the node off. A member confirmed dead that still
    /// runs can write into its successor's lane.
    pub fn confirm_dead(&self, member: MemberId, epoch: Epoch) -> bool {
        // In the order in which an evictor moves the status on, so that one
        // of the steps meets it.
        member.index() < self.layout.geometry().members
            && [
                (State::Joining, State::Ending),
                (State::Live, State::Ending),
                (State::Evicting, State::Ending),
                (State::Evicted, State::Free),
            ]
            .into_iter()
            .any(|(from, to)| self.change_status(member, epoch, from, to))
    }

    /// As [`confirm_dead`](Self::confirm_dead) for all incarnations that
    /// `node` has claimed. A node that was reset calls it before it joins.
    pub fn confirm_node_dead(&self, node: u32) {
        for member in self.members() {
            let status = self.status(member);
            if status.node == node && status.state != State::Free {
                self.confirm_dead(member, status.epoch);
            }
        }
    }

    /// The live members that hold the state: their replicas can still follow
    /// the log, and do not load a snapshot.
    pub fn holders(&self) -> impl Iterator<Item = MemberId> {
        let head = self.head();
        self.members().filter(move |&member| {
            self.status(member).state == State::Live
                && self.applied(member) >= head
                // After `applied`: one that has it above the frontier again
                // is either seen to load, or done.
                && self.wanted(member).is_none()
        })
    }

    /// The position up to which at least `copies` holders have applied, or
    /// all of them if there are fewer.
    pub(crate) fn applied_by(&self, copies: usize) -> u64 {
        let mut highest = [0; MAX_MEMBERS];
        let mut count = 0;
        for member in self.holders() {
            highest[count] = self.applied(member);
            count += 1;
        }
        let highest = &mut highest[..count];
        highest.sort_unstable_by(|a, b| b.cmp(a));
        let index = copies.min(count).saturating_sub(1);
        highest.get(index).copied().unwrap_or(u64::MAX)
    }

    /// The lowest position that a member in good standing still needs, if
    /// there is any such member. One that is behind the reclaim frontier is
    /// lost already, and needs a snapshot instead.
    pub(crate) fn lowest_needed(&self) -> Option<u64> {
        let head = self.head();
        self.members()
            .filter(|&member| matches!(self.status(member).state, State::Joining | State::Live))
            .map(|member| self.applied(member))
            .filter(|&applied| applied >= head)
            .min()
    }
}

impl Log {
    /// Whether a member that needs the batches at `position` is on the way to
    /// having the state: it joins, or loads a snapshot.
    pub(crate) fn is_needed_by_loader(&self, position: u64) -> bool {
        self.members().any(|member| {
            self.applied(member) == position
                && match self.status(member).state {
                    State::Joining => true,
                    State::Live => self.wanted(member).is_some(),
                    _ => false,
                }
        })
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn garbage_in_a_status_word_is_quarantine() {
        for word in [u64::MAX, 7, 0x1ff] {
            assert_eq!(Status::from_word(word).state, State::Evicted);
        }
        let status = Status {
            state: State::Live,
            epoch: 9,
            node: MAX_NODE,
        };
        assert_eq!(Status::from_word(status.word()), status);
    }
}
