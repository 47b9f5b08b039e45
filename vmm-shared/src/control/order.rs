//! An order that somebody leaves for the devices' node, and its outcome.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::shm::SharedMem;

/// Where the order is in its words.
const ORDER: usize = 0;
const OUTCOME: usize = 8;
const RECALL: usize = 16;
const SEEN: usize = 24;
/// Bytes of all.
pub(super) const ORDER_SIZE: usize = 32;

/// Orders and outcomes with a fact have their kind above it, in 8 bits; and
/// above that the ticket of who has asked, if there may be several.
pub(super) const KIND_SHIFT: u32 = 32;
pub(super) const TICKET_SHIFT: u32 = KIND_SHIFT + 8;

/// Beside a ticket, in words that are 0 without one.
const SET: u64 = 1;

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

/// How an order stands, for who may have left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// None does.
    Nothing,
    /// Somebody else's does.
    Others,
    /// Its own does.
    Own,
    /// Its own does, was wanted back, and the guest is at it: only the guest's
    /// answer ends it.
    Seen,
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
///   24  which of these the guest has seen, so that it stands
/// ```
#[derive(Clone, Copy, Debug)]
pub struct OrderWords(SharedMem);

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
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.standing() != 0
    }

    /// Puts another in the place of the one that stands, for the same who asked.
    /// The guest has answered, or need not.
    pub(super) fn replace(&self, order: u64) {
        let ticket = mark(self.standing());
        self.word(SEEN).store(0, Ordering::Relaxed);
        // Release: who sees this order sees that.
        self.word(ORDER).store(ticket | order, Ordering::Release);
    }

    /// Wants the order with this ticket back, if it stands: it ends unless the
    /// guest has seen it. The devices' node must be told.
    pub fn recall(&self, ticket: Ticket) {
        if self.is_busy() && mark(self.standing()) == ticket.mark() {
            // Relaxed: the count of orders makes the devices' node look.
            self.word(RECALL)
                .store(ticket.mark() | SET, Ordering::Relaxed);
        }
    }

    /// Whether the order that stands is wanted back, and nothing has been said
    /// to that.
    #[must_use]
    pub fn is_recalled(&self) -> bool {
        self.is_standing_in(RECALL) && !self.is_standing_in(SEEN)
    }

    /// Lets the order stand that is wanted back: the guest has seen it. Only for
    /// the devices' node.
    pub fn refuse_recall(&self) {
        let standing = self.standing();
        // Release: who sees it has seen the order.
        self.word(SEEN)
            .store(mark(standing) | SET, Ordering::Release);
    }

    /// How an order stands for one who has left any with these tickets.
    #[must_use]
    pub fn standing_for(&self, tickets: [Ticket; 2]) -> Standing {
        match self.standing() {
            0 => Standing::Nothing,
            other if !tickets.iter().any(|own| own.mark() == mark(other)) => Standing::Others,
            _ if self.is_standing_in(SEEN) => Standing::Seen,
            _ => Standing::Own,
        }
    }

    /// Whether a word has the ticket of the order that stands.
    fn is_standing_in(&self, word: usize) -> bool {
        let standing = self.standing();
        // Acquire: see `refuse_recall`.
        standing != 0 && self.word(word).load(Ordering::Acquire) == mark(standing) | SET
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
#[expect(unsafe_code, reason = "a leaked buffer as the words")]
mod tests {
    use super::*;
    use core::ptr::NonNull;

    fn words() -> OrderWords {
        let memory = Box::leak(Box::new([0_u64; ORDER_SIZE / 8]));
        // SAFETY: leaked, aligned, and reached through the window only.
        let window = unsafe { SharedMem::new(NonNull::from(memory).cast(), ORDER_SIZE) };
        OrderWords::new(window).expect("large enough")
    }

    #[test]
    fn only_the_order_with_that_ticket_is_wanted_back() {
        let words = words();
        let other = Ticket::new(7);
        for own in [Ticket::new(8), Ticket::NO_JOB] {
            words.recall(own);
            assert!(!words.is_recalled(), "none stands");
            assert_eq!(words.standing_for([own, other]), Standing::Nothing);
            words.ask(3, own).expect("free");
            words.recall(other);
            assert!(!words.is_recalled());
            assert_eq!(words.standing_for([other; 2]), Standing::Others);
            assert_eq!(words.standing_for([other, own]), Standing::Own);
            words.recall(own);
            assert!(words.is_recalled());
            words.settle(3, Outcome::Recalled);
            assert_eq!(words.outcome_of(own), Some(Outcome::Recalled));
        }
    }

    #[test]
    fn one_that_the_guest_has_seen_stands_until_it_answers() {
        let words = words();
        let own = Ticket::new(8);
        words.ask(3, own).expect("free");
        words.recall(own);
        assert_eq!(words.standing_for([own; 2]), Standing::Own, "not decided");
        words.refuse_recall();
        assert!(!words.is_recalled(), "once");
        assert_eq!(words.standing_for([own; 2]), Standing::Seen);
        words.replace(4);
        assert_eq!(
            words.standing_for([own; 2]),
            Standing::Own,
            "nodes are at it"
        );
        words.settle(4, Outcome::Done);
        words.ask(3, Ticket::new(9)).expect("free");
        assert_eq!(words.standing_for([Ticket::new(9); 2]), Standing::Own);
    }

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
