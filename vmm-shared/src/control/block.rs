//! Memory that comes and goes while the guest runs, in blocks.
//!
//! The devices' node, which speaks to the guest's ACPI code, changes a block's
//! *state*:
//!
//! ```text
//!   Absent ── granted ──> Offered ── the guest takes it into use ──> Used
//!   Offered, Used ── the guest ejects it ──> Leaving ── no node maps it ──> Absent
//! ```
//!
//! Whoever wants something of a block leaves a [`BlockOrder`] and tells the
//! devices' node. There is one order at a time; it stands until it has an
//! [`Outcome`]. Where its memory is, the map of pieces says.

use core::sync::atomic::{AtomicU64, Ordering};

use super::order::{Busy, KIND_SHIFT, ORDER_SIZE, OrderWords, Outcome, Ticket, low_half};
use crate::addr::{LARGE_PAGE_SIZE, NodeId};
use crate::shm::SharedMem;

/// Bytes of a block: the unit in which Linux brings x86 memory into use, as
/// long as it has booted with less than 64 GiB.
pub const BLOCK_SIZE: u64 = 128 << 20;
/// The most blocks of a VM.
pub const MAX_BLOCKS: usize = 256;

/// Pieces of 2 MiB in a block.
pub const PIECES_PER_BLOCK: usize = 64;

const _: () = assert!(BLOCK_SIZE == PIECES_PER_BLOCK as u64 * LARGE_PAGE_SIZE);

/// Bytes of a record.
pub(super) const BLOCK_RECORD_SIZE: usize = 64;

const STATE: usize = 0;
const ORDER: usize = 8;

const _: () = assert!(ORDER + ORDER_SIZE <= BLOCK_RECORD_SIZE);

/// A block: its number among those of all nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u16);

/// Whether the guest has a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// The guest does not have it, and no node maps it.
    Absent,
    /// The guest may touch it, and has been told so.
    Offered,
    /// The guest has taken it into use.
    Used,
    /// The guest has ejected it; nodes may still map it.
    Leaving,
}

impl BlockState {
    /// Whether it is guest memory.
    #[must_use]
    pub const fn is_present(self) -> bool {
        matches!(self, Self::Offered | Self::Used)
    }

    const fn to_raw(self) -> u64 {
        match self {
            Self::Absent => 0,
            Self::Offered => 1,
            Self::Used => 2,
            Self::Leaving => 3,
        }
    }

    const fn from_raw(raw: u64) -> Option<Self> {
        match raw {
            0 => Some(Self::Absent),
            1 => Some(Self::Offered),
            2 => Some(Self::Used),
            3 => Some(Self::Leaving),
            _ => None,
        }
    }
}

/// What is asked for a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockOrder {
    /// Give it to the guest, out of this node's memory.
    Grant(NodeId),
    /// Ask the guest to give it up, and then take it away.
    Reclaim,
    /// The guest has given it up: take it away.
    Drop,
    /// The guest won't have it, for this reason: take it away.
    Withdraw(u32),
    /// It is wanted back, and the guest has not seen it: take it away.
    TakeBack,
}

impl BlockOrder {
    /// What has become of it when it is carried out.
    #[must_use]
    pub const fn outcome(self) -> Outcome {
        match self {
            Self::Withdraw(status) => Outcome::Refused(status),
            Self::TakeBack => Outcome::Recalled,
            Self::Grant(_) | Self::Reclaim | Self::Drop => Outcome::Done,
        }
    }

    const fn to_raw(self) -> u64 {
        match self {
            Self::Grant(node) => 1 << KIND_SHIFT | node.0 as u64,
            Self::Reclaim => 2 << KIND_SHIFT,
            Self::Drop => 3 << KIND_SHIFT,
            Self::Withdraw(status) => 4 << KIND_SHIFT | status as u64,
            Self::TakeBack => 5 << KIND_SHIFT,
        }
    }

    fn from_raw(raw: u64) -> Option<Self> {
        match raw >> KIND_SHIFT {
            1 => Some(Self::Grant(NodeId(u16::try_from(low_half(raw)).ok()?))),
            2 => Some(Self::Reclaim),
            3 => Some(Self::Drop),
            4 => Some(Self::Withdraw(low_half(raw))),
            5 => Some(Self::TakeBack),
            _ => None,
        }
    }
}

/// The record of one block.
///
/// ```text
///   0    state                                 devices' node
///   8    order and ticket                      who asks; its outcome clears it
///   16   outcome of the last order, and its ticket
///   24   ticket of an order that is wanted back who asks
///   32   ticket of one that the guest has seen  devices' node
/// ```
#[derive(Clone, Copy, Debug)]
pub struct BlockRecord(SharedMem);

impl BlockRecord {
    /// The record in `window`; `None` if it is too small for one.
    #[must_use]
    pub fn new(window: SharedMem) -> Option<Self> {
        (window.len() >= BLOCK_RECORD_SIZE).then_some(Self(window))
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        self.0.atomic_u64(offset).expect("inside the record")
    }

    /// Whether the guest has it; `None` if somebody wrote nonsense.
    #[must_use]
    pub fn state(&self) -> Option<BlockState> {
        // Acquire: what was done before is visible.
        BlockState::from_raw(self.word(STATE).load(Ordering::Acquire))
    }

    /// Whether it is guest memory.
    #[must_use]
    pub fn is_present(&self) -> bool {
        self.state().is_some_and(BlockState::is_present)
    }

    /// Changes its state. Only for the devices' node.
    pub fn set_state(&self, state: BlockState) {
        // Release: see `state`.
        self.word(STATE).store(state.to_raw(), Ordering::Release);
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
    pub fn ask(&self, order: BlockOrder, ticket: Ticket) -> Result<(), Busy> {
        self.orders().ask(order.to_raw(), ticket)
    }

    /// The order that stands, if one does and makes sense.
    #[must_use]
    pub fn order(&self) -> Option<BlockOrder> {
        BlockOrder::from_raw(self.orders().order())
    }

    /// Whether an order stands, even one that makes no sense.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.orders().is_busy()
    }

    /// Turns what stands into another order. Only for the devices' node.
    pub fn replace_order(&self, order: BlockOrder) {
        self.orders().replace(order.to_raw());
    }

    /// Ends this order, unless another has taken its place.
    pub fn settle(&self, order: BlockOrder, outcome: Outcome) {
        self.orders().settle(order.to_raw(), outcome);
    }

    /// What has become of the last order.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        self.orders().outcome()
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

    fn record() -> BlockRecord {
        let memory = Box::leak(Box::new([0_u64; BLOCK_RECORD_SIZE / 8]));
        // SAFETY: leaked, aligned, and reached through the window only.
        let window = unsafe { SharedMem::new(NonNull::from(memory).cast(), BLOCK_RECORD_SIZE) };
        BlockRecord::new(window).expect("large enough")
    }

    #[test]
    fn a_state_is_read_as_it_was_written() {
        let record = record();
        assert_eq!(record.state(), Some(BlockState::Absent));
        for (state, is_present) in [
            (BlockState::Offered, true),
            (BlockState::Used, true),
            (BlockState::Leaving, false),
            (BlockState::Absent, false),
        ] {
            record.set_state(state);
            assert_eq!(record.state(), Some(state));
            assert_eq!(record.is_present(), is_present);
        }
        for nonsense in [4, 1 << 32, u64::MAX] {
            record.word(STATE).store(nonsense, Ordering::Relaxed);
            assert_eq!(record.state(), None, "{nonsense:#x}");
            assert!(!record.is_present());
        }
    }

    const TICKET: Ticket = Ticket::new(0xab_cdef);

    #[test]
    fn one_order_stands_until_it_has_an_outcome() {
        let record = record();
        for order in [
            BlockOrder::Grant(NodeId(63)),
            BlockOrder::Reclaim,
            BlockOrder::Drop,
            BlockOrder::Withdraw(0x80),
            BlockOrder::TakeBack,
        ] {
            assert_eq!(record.ask(order, TICKET), Ok(()));
            assert_eq!((record.order(), record.is_busy()), (Some(order), true));
            assert_eq!(record.outcome(), Outcome::Pending);
            assert_eq!(record.outcome_of(TICKET), None);
            assert_eq!(record.ask(BlockOrder::Reclaim, TICKET), Err(Busy));
            record.settle(BlockOrder::Withdraw(1), Outcome::Done);
            assert_eq!(record.order(), Some(order), "that was another");
            record.settle(order, Outcome::Refused(0x82));
            assert_eq!(record.order(), None);
            assert_eq!(record.outcome(), Outcome::Refused(0x82));
            assert_eq!(record.outcome_of(TICKET), Some(Outcome::Refused(0x82)));
            assert_eq!(record.outcome_of(Ticket::NO_JOB), None);
        }
        let beyond = 1 << KIND_SHIFT | 0x1_0000;
        record.orders().ask(beyond, TICKET).expect("free");
        assert_eq!((record.order(), record.is_busy()), (None, true));
    }
}
