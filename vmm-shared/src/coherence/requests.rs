//! Asking nodes to give up rights, and answering.
//!
//! A request lives in a slot of the node that asks. It names the unit, the
//! rights that may be kept and the nodes asked, under a sequence number that
//! is odd while the request is open. A node answers by raising its own word in
//! the slot to that number: twice is as good as once, and an answer that comes
//! late, when the slot serves another request, is below the new number and
//! counts for nothing. So any number of cores of a node may serve the same
//! request, and none of them needs a lock for it.
//!
//! A node finds requests by its inbox, a set of the nodes that asked. It
//! clears a bit first and looks at that node's slots afterwards; who asks opens
//! the request first and sets the bit afterwards. Hence a bit can get lost only
//! by somebody's garbage, and [`Fault::nudge`](super::Fault::nudge) sets it
//! again.

use core::sync::atomic::Ordering;

use super::CoherenceError;
use super::entry::Member;
use super::layout::{Layout, RequestAt};
use super::map::CoherenceMap;
use super::rights::{NodeSet, Rights, Unit};
use super::words::Words;
use crate::addr::NodeId;

/// An open request, in the hands of the node that made it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ticket {
    slot: usize,
    sequence: u64,
}

/// Something that this node has to give up.
///
/// Serve it in this order: reduce the nested page tables, flush the TLBs of
/// all cores, [`acknowledge`](CoherenceMap::acknowledge).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a node waits for this"]
pub struct Revocation {
    /// What it is about. A frame may be part of a large page: split that.
    pub unit: Unit,
    /// The rights that may stay. Rights that the node doesn't have are not
    /// given by this.
    pub keep: Rights,
    /// The node that waits.
    pub requester: NodeId,
    slot: usize,
    sequence: u64,
}

const KEEP_BITS: u32 = 3;
const IS_FRAME: u64 = 1 << KEEP_BITS;
const NUMBER: u32 = KEEP_BITS + 1;

fn encode(unit: Unit, keep: Rights) -> u64 {
    let (kind, number) = match unit {
        Unit::Piece(piece) => (0, piece),
        Unit::Frame(frame) => (IS_FRAME, frame),
    };
    (number as u64) << NUMBER | kind | u64::from(keep.bits())
}

impl<W: Words> CoherenceMap<W> {
    fn decode(&self, what: u64) -> Option<(Unit, Rights)> {
        let keep = Rights::from_bits(u8::try_from(what & (IS_FRAME - 1)).ok()?)?;
        let number = usize::try_from(what >> NUMBER).ok()?;
        let unit = if what & IS_FRAME == 0 {
            Unit::Piece(number)
        } else {
            Unit::Frame(number)
        };
        self.layout.has(unit).then_some((unit, keep))
    }

    /// Asks `targets` to keep no more than `keep` of `unit`; `None` if all
    /// slots of this node are in use.
    pub(super) fn ask(
        &self,
        member: Member,
        unit: Unit,
        keep: Rights,
        targets: NodeSet,
    ) -> Result<Option<Ticket>, CoherenceError> {
        let Some(slot) = self.take_slot(member.node) else {
            return Ok(None);
        };
        let at = self.layout.request(member.node, slot);
        // Relaxed: only this node writes it, under the slot's bit.
        let last = self.words.load(at.sequence, Ordering::Relaxed);
        // Odd only if somebody scribbled here: skip the number.
        let sequence = (last | 1)
            .checked_add(2 * (last & 1))
            .filter(|sequence| *sequence < u64::MAX)
            .ok_or(CoherenceError::CorruptRequest {
                requester: member.node,
            })?;
        // Relaxed, both: who sees the new sequence sees them. Who has seen the
        // last one only may see them, too: see `look`.
        self.words
            .store(at.what, encode(unit, keep), Ordering::Relaxed);
        self.words.store(at.targets, targets.0, Ordering::Relaxed);
        // Release: the request is complete before it is open.
        self.words.store(at.sequence, sequence, Ordering::Release);
        self.hint(member.node, targets);
        Ok(Some(Ticket { slot, sequence }))
    }

    /// Tells `targets` that `node` has asked them for something.
    pub(super) fn hint(&self, node: NodeId, targets: NodeSet) {
        for target in targets {
            // Release: the request is open before the hint can be seen.
            self.words.fetch_or(
                Layout::inbox(target),
                NodeSet::only(node).0,
                Ordering::Release,
            );
        }
    }

    /// Whether `node` has answered this request.
    pub(super) fn answered(
        &self,
        member: Member,
        ticket: Ticket,
        node: NodeId,
    ) -> Result<bool, CoherenceError> {
        let at = self.layout.request(member.node, ticket.slot);
        // Acquire: what the node's guest did to the memory before it lost the
        // right comes before what is done here next. Pairs with `acknowledge`.
        let answer = self.words.load(at.answer(node), Ordering::Acquire);
        if answer > ticket.sequence {
            return Err(CoherenceError::CorruptAnswer { node });
        }
        Ok(answer == ticket.sequence)
    }

    /// Closes a request and gives its slot back.
    pub(super) fn close(&self, member: Member, ticket: Ticket) {
        let at = self.layout.request(member.node, ticket.slot);
        // Relaxed: who sees it late serves once more.
        self.words
            .store(at.sequence, ticket.sequence + 1, Ordering::Relaxed);
        // Release: closed before another core of this node takes the slot.
        self.words.fetch_and(
            Layout::slots(member.node),
            !(1 << ticket.slot),
            Ordering::Release,
        );
    }

    fn take_slot(&self, node: NodeId) -> Option<usize> {
        let at = Layout::slots(node);
        let mut used = self.words.load(at, Ordering::Relaxed);
        // Each failure means that another core of this node got on.
        for _ in 0..super::MAX_TRIES {
            let slot = usize::try_from((!used).trailing_zeros()).ok()?;
            if slot >= self.layout.geometry.slots {
                return None;
            }
            // Acquire: pairs with the Release in `close`.
            match self
                .words
                .compare_exchange(at, used, used | 1 << slot, Ordering::Acquire)
            {
                Ok(_) => return Some(slot),
                Err(now) => used = now,
            }
        }
        None
    }

    /// Whether somebody may wait for this node: one load, for the run loop.
    #[must_use]
    pub fn has_revocations(&self, member: Member) -> bool {
        // Relaxed: only a hint; `next_revocation` orders.
        self.words
            .load(Layout::inbox(member.node), Ordering::Relaxed)
            != 0
    }

    /// Something that this node has to give up, if any. Until it is
    /// acknowledged, it will be returned again, to any core that asks.
    ///
    /// Takes no lock and never waits.
    ///
    /// # Errors
    /// [`CoherenceError::CorruptRequest`] if a peer asks for nonsense.
    pub fn next_revocation(&self, member: Member) -> Result<Option<Revocation>, CoherenceError> {
        self.next_revocation_if(member, |_| true)
    }

    /// As [`next_revocation`](Self::next_revocation), but passes over those
    /// that `may_serve` says must wait.
    ///
    /// # Errors
    /// As there.
    pub fn next_revocation_if(
        &self,
        member: Member,
        mut may_serve: impl FnMut(&Revocation) -> bool,
    ) -> Result<Option<Revocation>, CoherenceError> {
        let inbox = Layout::inbox(member.node);
        let waiting = NodeSet(self.words.load(inbox, Ordering::Relaxed));
        for requester in waiting {
            let bit = NodeSet::only(requester).0;
            // Acquire: what was opened before the hint is seen below. The bit
            // goes first, so that a hint set from now on stays.
            self.words.fetch_and(inbox, !bit, Ordering::Acquire);
            if usize::from(requester.0) >= self.layout.geometry.nodes || !self.is_member(requester)
            {
                continue;
            }
            for slot in 0..self.layout.geometry.slots {
                if let Some(found) = self.look(member, requester, slot)? {
                    // It waits, or there may be more in later slots. Relaxed:
                    // cores of this node only tell each other to look again.
                    self.words.fetch_or(inbox, bit, Ordering::Relaxed);
                    if may_serve(&found) {
                        return Ok(Some(found));
                    }
                }
            }
        }
        Ok(None)
    }

    fn look(
        &self,
        member: Member,
        requester: NodeId,
        slot: usize,
    ) -> Result<Option<Revocation>, CoherenceError> {
        let at = self.layout.request(requester, slot);
        // Acquire: the words of the request are there when it is open.
        let sequence = self.words.load(at.sequence, Ordering::Acquire);
        if sequence.is_multiple_of(2) || self.done(member, at, sequence) {
            return Ok(None);
        }
        // Relaxed: they belong to this request, or to a later one in the slot.
        // Then this one is closed, and nobody waits for the answer to it; what
        // the later one wants, or a mixture, only costs this guest a fault.
        let what = self.words.load(at.what, Ordering::Relaxed);
        let targets = NodeSet(self.words.load(at.targets, Ordering::Relaxed));
        if !targets.contains(member.node) {
            return Ok(None);
        }
        let (unit, keep) = self
            .decode(what)
            .ok_or(CoherenceError::CorruptRequest { requester })?;
        Ok(Some(Revocation {
            unit,
            keep,
            requester,
            slot,
            sequence,
        }))
    }

    fn done(&self, member: Member, at: RequestAt, sequence: u64) -> bool {
        // Relaxed: written by this node's cores only; seeing an old value
        // means serving once more.
        self.words.load(at.answer(member.node), Ordering::Relaxed) >= sequence
    }

    /// Tells the requester that the rights are gone from the page tables and
    /// the TLBs of this node.
    ///
    /// Takes no lock and never waits. More than once does no harm.
    pub fn acknowledge(&self, member: Member, revocation: &Revocation) {
        let at = self.layout.request(revocation.requester, revocation.slot);
        // Release: everything the guest did here under the rights comes first.
        // Pairs with `answered`.
        self.words.fetch_max(
            at.answer(member.node),
            revocation.sequence,
            Ordering::Release,
        );
    }
}
