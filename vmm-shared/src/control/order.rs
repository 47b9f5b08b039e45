//! An order that somebody leaves for the devices' node, and its outcome.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::shm::SharedMem;

/// Where the order is in its words.
const ORDER: usize = 0;
const OUTCOME: usize = 8;
const RECALL: usize = 16;
/// Bytes of all.
pub(super) const ORDER_SIZE: usize = 24;

/// Orders and outcomes with a fact have their kind above it, in 8 bits; and
/// above that the ticket of who has asked, if there may be several.
pub(super) const KIND_SHIFT: u32 = 32;
pub(super) const TICKET_SHIFT: u32 = KIND_SHIFT + 8;

/// Beside the ticket of an order that is wanted back.
const WANTED: u64 = 1;

/// A word's ticket alone.
const fn mark(raw: u64) -> u64 {
    raw >> TICKET_SHIFT << TICKET_SHIFT
}

/// A word without its ticket.
const fn plain(raw: u64) -> u64 {
    raw & ((1 << TICKET_SHIFT) - 1)
}

/// What an order was left for: nobody leaves two for one vCPU or block with the
/// same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u32);

impl Ticket {
    /// Of who asks for no job.
    pub const NO_JOB: Self = Self(0);

    /// The ticket with this number, of which 24 bits count.
    #[must_use]
    pub const fn new(number: u32) -> Self {
        Self(number & 0xff_ffff)
    }

    const fn mark(self) -> u64 {
        (self.0 as u64) << TICKET_SHIFT
    }
}

/// What has become of an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It stands.
    Pending,
    /// It has been carried out.
    Done,
    /// Nothing can be done: the vCPU or the memory is not where such an order
    /// makes sense.
    Misplaced,
    /// There is no such core in the rack, or the node has been lost.
    NoSuchCore,
    /// The machine that the guest has cannot do that.
    Unable,
    /// The node has no room for it.
    NoRoom,
    /// The guest refused, with this status of its `_OST`.
    Refused(u32),
    /// Who has left it wanted it back, and the guest had not looked at it.
    Recalled,
}

impl Outcome {
    const fn to_raw(self) -> u64 {
        match self {
            Self::Pending => 0,
            Self::Done => 1,
            Self::Misplaced => 2,
            Self::NoSuchCore => 3,
            Self::Unable => 4,
            Self::NoRoom => 6,
            Self::Recalled => 7,
            Self::Refused(status) => 5 << KIND_SHIFT | status as u64,
        }
    }

    fn from_raw(raw: u64) -> Self {
        match raw {
            0 => Self::Pending,
            1 => Self::Done,
            2 => Self::Misplaced,
            3 => Self::NoSuchCore,
            6 => Self::NoRoom,
            7 => Self::Recalled,
            // Garbage means the same: nothing has been done.
            _ if raw >> KIND_SHIFT != 5 => Self::Unable,
            _ => Self::Refused(low_half(raw)),
        }
    }
}

pub(super) const fn low_half(raw: u64) -> u32 {
    let [a, b, c, d, ..] = raw.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// Another order stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("another order is being carried out")]
pub struct Busy;

/// The words of an order, which is any number but 0.
///
/// ```text
///   0   order                       who asks; its outcome clears it
///   8   outcome of the last order
///   16  which order is wanted back  who asks
/// ```
#[derive(Clone, Copy, Debug)]
pub(super) struct OrderWords(SharedMem);

impl OrderWords {
    pub(super) fn new(window: SharedMem) -> Option<Self> {
        (window.len() >= ORDER_SIZE).then_some(Self(window))
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        self.0.atomic_u64(offset).expect("inside the words")
    }

    pub(super) fn ask(&self, order: u64, ticket: Ticket) -> Result<(), Busy> {
        // AcqRel: the outcome of the order before has been seen.
        self.word(ORDER)
            .compare_exchange(
                0,
                ticket.mark() | order,
                Ordering::AcqRel,
                Ordering::Relaxed,
            )
            .map(drop)
            .map_err(|_| Busy)
    }

    fn standing(&self) -> u64 {
        self.word(ORDER).load(Ordering::Acquire)
    }

    /// The order that stands; 0 if none does.
    pub(super) fn order(&self) -> u64 {
        plain(self.standing())
    }

    /// Whether any stands, even one that makes no sense.
    pub(super) fn is_busy(&self) -> bool {
        self.standing() != 0
    }

    /// Puts another in the place of the one that stands, for the same who asked.
    pub(super) fn replace(&self, order: u64) {
        let ticket = mark(self.standing());
        self.word(ORDER).store(ticket | order, Ordering::Release);
    }

    /// Wants the order with this ticket back, if it still stands.
    pub(super) fn recall(&self, ticket: Ticket) {
        // Relaxed: the count of orders makes the devices' node look.
        self.word(RECALL)
            .store(ticket.mark() | WANTED, Ordering::Relaxed);
    }

    /// Whether the order that stands is wanted back.
    pub(super) fn is_recalled(&self) -> bool {
        let standing = self.standing();
        let wanted = self.word(RECALL).load(Ordering::Relaxed);
        standing != 0 && wanted == mark(standing) | WANTED
    }

    /// Ends this order, unless another has taken its place.
    pub(super) fn settle(&self, order: u64, outcome: Outcome) {
        let standing = self.standing();
        if plain(standing) != order {
            return;
        }
        self.word(OUTCOME)
            .store(mark(standing) | outcome.to_raw(), Ordering::Relaxed);
        // Release: the outcome is visible to who sees that no order stands.
        let _ =
            self.word(ORDER)
                .compare_exchange(standing, 0, Ordering::Release, Ordering::Relaxed);
    }

    /// What has become of the last order.
    pub(super) fn outcome(&self) -> Outcome {
        match self.standing() {
            0 => Outcome::from_raw(plain(self.word(OUTCOME).load(Ordering::Relaxed))),
            _ => Outcome::Pending,
        }
    }

    /// What has become of the order with this ticket; `None` if it was not the
    /// last, or still stands.
    pub(super) fn outcome_of(&self, ticket: Ticket) -> Option<Outcome> {
        let stands = self.is_busy();
        let raw = self.word(OUTCOME).load(Ordering::Relaxed);
        let is_its = !stands && mark(raw) == ticket.mark();
        let outcome = is_its.then(|| Outcome::from_raw(plain(raw)))?;
        (outcome != Outcome::Pending).then_some(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_read_as_they_were_written() {
        for outcome in [
            Outcome::Done,
            Outcome::Misplaced,
            Outcome::NoSuchCore,
            Outcome::NoRoom,
            Outcome::Recalled,
            Outcome::Unable,
            Outcome::Refused(0),
            Outcome::Refused(u32::MAX),
        ] {
            assert_eq!(Outcome::from_raw(outcome.to_raw()), outcome);
        }
        assert_eq!(Outcome::from_raw(99), Outcome::Unable);
    }
}
