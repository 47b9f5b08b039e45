//! Where each vCPU is, and what is asked for it.
//!
//! A vCPU is in one hand at a time, and its *place* says in whose. Only who has
//! it changes the place:
//!
//! ```text
//!   Absent ── the devices' node grants it ──> New(core) ── the core ──> At(core)
//!   At(core) ── its core saves it ──> Moving(other core) ── that core ──> At(other core)
//!   At(core) ── its core drops it, once the guest has given it up ──> Absent
//! ```
//!
//! Whoever wants something of a vCPU leaves an [`Order`] and tells the devices'
//! node. There is one order at a time; it stands until it has an [`Outcome`].
//! Order and outcome carry the [`Ticket`] of who has asked: who takes over from
//! that one finds in the record whether it has been asked already, and what
//! came of it.

use core::sync::atomic::{AtomicU64, Ordering};

use super::order::{Busy, KIND_SHIFT, ORDER_SIZE, OrderWords, Outcome, Ticket, low_half};
use crate::addr::{Location, NodeId};
use crate::shm::SharedMem;

/// Bytes of a record.
pub(super) const VCPU_RECORD_SIZE: usize = 128;

const PLACE: usize = 0;
const STARTED: usize = 8;
const MOVES: usize = 16;
const LEFT_AT: usize = 24;
const BLACKOUT: usize = 32;
const ORDER: usize = 64;

/// Where a vCPU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: the guest does not have it.
    Absent,
    /// Given to this core, which has not made it yet.
    New(Location),
    /// On this core.
    At(Location),
    /// Saved in its image, for this core.
    Moving(Location),
}

impl Place {
    /// The core that has it or is to get it.
    #[must_use]
    pub const fn location(self) -> Option<Location> {
        match self {
            Self::Absent => None,
            Self::New(at) | Self::At(at) | Self::Moving(at) => Some(at),
        }
    }

    const fn to_raw(self) -> u64 {
        match self {
            Self::Absent => 0,
            Self::New(at) => pack(1, at),
            Self::At(at) => pack(2, at),
            Self::Moving(at) => pack(3, at),
        }
    }

    const fn from_raw(raw: u64) -> Option<Self> {
        match unpack(raw) {
            (0, _) => Some(Self::Absent),
            (1, at) => Some(Self::New(at)),
            (2, at) => Some(Self::At(at)),
            (3, at) => Some(Self::Moving(at)),
            _ => None,
        }
    }
}

const fn pack(kind: u64, at: Location) -> u64 {
    kind << KIND_SHIFT | (at.node.0 as u64) << 16 | at.core as u64
}

const fn unpack(raw: u64) -> (u64, Location) {
    let [c0, c1, n0, n1, ..] = raw.to_le_bytes();
    let at = Location {
        node: NodeId(u16::from_le_bytes([n0, n1])),
        core: u16::from_le_bytes([c0, c1]),
    };
    (raw >> KIND_SHIFT, at)
}

/// What is asked for a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Give it to the guest, on this core.
    Grant(Location),
    /// Take it to this core.
    Move(Location),
    /// Ask the guest to give it up, and then take it away.
    Reclaim,
    /// The guest has given it up: take it away.
    Drop,
    /// The guest won't have it, for this reason: take it away.
    Withdraw(u32),
    /// It is wanted back, and the guest has not seen it: take it away.
    TakeBack,
}

impl Order {
    /// What has become of it when it is carried out.
    #[must_use]
    pub const fn outcome(self) -> Outcome {
        match self {
            Self::Withdraw(status) => Outcome::Refused(status),
            Self::TakeBack => Outcome::Recalled,
            Self::Grant(_) | Self::Move(_) | Self::Reclaim | Self::Drop => Outcome::Done,
        }
    }

    const fn to_raw(self) -> u64 {
        match self {
            Self::Grant(at) => pack(1, at),
            Self::Move(at) => pack(2, at),
            Self::Reclaim => 3 << KIND_SHIFT,
            Self::Drop => 4 << KIND_SHIFT,
            Self::Withdraw(status) => 5 << KIND_SHIFT | status as u64,
            Self::TakeBack => 6 << KIND_SHIFT,
        }
    }

    const fn from_raw(raw: u64) -> Option<Self> {
        match unpack(raw) {
            (1, at) => Some(Self::Grant(at)),
            (2, at) => Some(Self::Move(at)),
            (3, _) => Some(Self::Reclaim),
            (4, _) => Some(Self::Drop),
            (5, _) => Some(Self::Withdraw(low_half(raw))),
            (6, _) => Some(Self::TakeBack),
            _ => None,
        }
    }
}

/// The record of one vCPU.
///
/// ```text
///   0    place: kind, node, core                   who has it writes
///   8    whether the guest has started it           who has it writes
///   16   moves so far                               who has it writes
///   24   the guest's TSC when it left its last core who had it writes
///   32   TSC ticks from then to its new core's first step for it
///   64   order and ticket                           who asks; its outcome clears it
///   72   outcome of the last order, and its ticket
///   80   ticket of an order that is wanted back     who asks
///   88   ticket of one that the guest has seen      devices' node
/// ```
#[derive(Clone, Copy, Debug)]
pub struct VcpuRecord(SharedMem);

impl VcpuRecord {
    /// The record in `window`; `None` if it is too small for one.
    #[must_use]
    pub fn new(window: SharedMem) -> Option<Self> {
        (window.len() >= VCPU_RECORD_SIZE).then_some(Self(window))
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        self.0.atomic_u64(offset).expect("inside the record")
    }

    /// Where the vCPU is; `None` if somebody wrote nonsense.
    #[must_use]
    pub fn place(&self) -> Option<Place> {
        // Acquire: what its last holder wrote is visible to the next.
        Place::from_raw(self.word(PLACE).load(Ordering::Acquire))
    }

    /// Hands it on. Only for who has it.
    pub fn set_place(&self, place: Place) {
        // Release: see `place`.
        self.word(PLACE).store(place.to_raw(), Ordering::Release);
    }

    /// Whether the guest has started it since it was granted.
    #[must_use]
    pub fn has_started(&self) -> bool {
        self.word(STARTED).load(Ordering::Acquire) != 0
    }

    /// Notes whether the guest has started it. Only for who has it.
    pub fn set_started(&self, started: bool) {
        self.word(STARTED)
            .store(u64::from(started), Ordering::Release);
    }

    /// How often it has moved.
    #[must_use]
    pub fn moves(&self) -> u64 {
        self.word(MOVES).load(Ordering::Acquire)
    }

    /// TSC ticks for which its last move kept it from running.
    #[must_use]
    pub fn blackout(&self) -> u64 {
        self.word(BLACKOUT).load(Ordering::Relaxed)
    }

    /// It leaves its core at this TSC of the guest.
    pub fn leave(&self, guest_tsc: u64) {
        // Relaxed: handed on by `set_place`.
        self.word(LEFT_AT).store(guest_tsc, Ordering::Relaxed);
    }

    /// When it left its last core, by the guest's TSC.
    #[must_use]
    pub fn left_at(&self) -> u64 {
        self.word(LEFT_AT).load(Ordering::Relaxed)
    }

    /// It runs again after a move.
    pub fn arrive(&self, guest_tsc: u64) {
        let blackout = guest_tsc.wrapping_sub(self.left_at());
        self.word(BLACKOUT).store(blackout, Ordering::Relaxed);
        // One writer. Release: the blackout is visible with the count.
        let moves = self.word(MOVES).load(Ordering::Relaxed).wrapping_add(1);
        self.word(MOVES).store(moves, Ordering::Release);
    }

    /// The words of its order, to want it back.
    #[must_use]
    pub fn orders(&self) -> OrderWords {
        let words = self.0.window(ORDER, ORDER_SIZE);
        words.and_then(OrderWords::new).expect("inside the record")
    }

    /// Leaves an order. The devices' node must be told.
    ///
    /// # Errors
    /// If one stands.
    pub fn ask(&self, order: Order, ticket: Ticket) -> Result<(), Busy> {
        self.orders().ask(order.to_raw(), ticket)
    }

    /// The order that stands, if one does and makes sense.
    #[must_use]
    pub fn order(&self) -> Option<Order> {
        Order::from_raw(self.orders().order())
    }

    /// Whether an order stands, even one that makes no sense.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.orders().is_busy()
    }

    /// Turns what stands into another order. Only for the devices' node.
    pub fn replace_order(&self, order: Order) {
        self.orders().replace(order.to_raw());
    }

    /// Ends this order, unless another has taken its place.
    pub fn settle(&self, order: Order, outcome: Outcome) {
        self.orders().settle(order.to_raw(), outcome);
    }

    /// What has become of the order with this ticket; `None` if it was not the
    /// last, or still stands.
    #[must_use]
    pub fn outcome_of(&self, ticket: Ticket) -> Option<Outcome> {
        self.orders().outcome_of(ticket)
    }
}

#[cfg(test)]
#[expect(unsafe_code, reason = "a leaked buffer as the record")]
mod tests {
    use super::*;
    use core::ptr::NonNull;

    const HERE: Location = Location {
        node: NodeId(3),
        core: 0x201,
    };

    fn record() -> VcpuRecord {
        let memory = Box::leak(Box::new([0_u64; VCPU_RECORD_SIZE / 8]));
        // SAFETY: leaked, aligned, and reached through the window only.
        let window = unsafe { SharedMem::new(NonNull::from(memory).cast(), VCPU_RECORD_SIZE) };
        VcpuRecord::new(window).expect("large enough")
    }

    #[test]
    fn a_place_is_read_as_it_was_written() {
        let record = record();
        assert_eq!(record.place(), Some(Place::Absent));
        for place in [
            Place::New(HERE),
            Place::At(HERE),
            Place::Moving(HERE),
            Place::Absent,
        ] {
            record.set_place(place);
            assert_eq!(record.place(), Some(place));
        }
        record.word(PLACE).store(4 << 32, Ordering::Relaxed);
        assert_eq!(record.place(), None);
        record.word(PLACE).store(u64::MAX, Ordering::Relaxed);
        assert_eq!(record.place(), None);
    }

    const TICKET: Ticket = Ticket::new(0xab_cdef);

    #[test]
    fn an_outcome_is_that_of_one_ticket() {
        let record = record();
        assert_eq!(record.outcome_of(Ticket::new(0)), None);
        assert_eq!(record.ask(Order::Reclaim, TICKET), Ok(()));
        record.replace_order(Order::Drop);
        assert!(record.is_busy());
        record.settle(Order::Drop, Outcome::Done);
        assert!(!record.is_busy());
        assert_eq!(record.outcome_of(TICKET), Some(Outcome::Done));
        assert_eq!(record.outcome_of(Ticket::new(0xab_cdee)), None);
        record.word(ORDER).store(u64::MAX, Ordering::Relaxed);
        assert_eq!((record.order(), record.is_busy()), (None, true));
        assert_eq!(record.outcome_of(TICKET), None);
    }

    #[test]
    fn one_order_stands_until_it_has_an_outcome() {
        let record = record();
        for order in [
            Order::Grant(HERE),
            Order::Move(HERE),
            Order::Reclaim,
            Order::Drop,
            Order::Withdraw(0x80),
            Order::TakeBack,
        ] {
            assert_eq!(record.ask(order, TICKET), Ok(()));
            assert_eq!(record.order(), Some(order));
            assert_eq!(record.outcome_of(TICKET), None);
            assert_eq!(record.ask(Order::Reclaim, Ticket::new(7)), Err(Busy));
            record.settle(Order::Withdraw(1), Outcome::Done);
            assert_eq!(record.order(), Some(order), "that was another");
            record.settle(order, Outcome::Refused(0x82));
            assert_eq!(record.order(), None);
            assert_eq!(record.outcome_of(TICKET), Some(Outcome::Refused(0x82)));
        }
    }

    #[test]
    fn a_move_counts_for_how_long_the_vcpu_stood_still() {
        let record = record();
        record.leave(1000);
        record.arrive(1700);
        assert_eq!((record.moves(), record.blackout()), (1, 700));
    }
}
