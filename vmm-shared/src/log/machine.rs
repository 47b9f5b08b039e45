//! What is replicated: a deterministic state machine.

use alloc::vec::Vec;

use zerocopy::{Immutable, IntoBytes, KnownLayout, TryFromBytes};

use super::member::MemberId;
use super::roster::MemberChange;

/// Where an operation stands in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// The position of the operation's batch.
    pub position: u64,
    /// The member that appended it.
    pub member: MemberId,
}

/// A part of a snapshot was not what [`StateMachine::save`] writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadSnapshot;

/// A state that is a function of the operations applied to it, in order.
///
/// All replicas apply the same operations in the same order and have to come
/// to equal states and answers: no clock, no address, no random number, no
/// iteration order of a hash map with a random seed may have a part in it.
/// Peers wrote the operations: whatever their bytes, applying one must not
/// panic.
///
/// # Snapshots
/// A state is copied to a joining replica **in parts, while writers go on**.
/// Part by part the state is cut at *bounds* that the machine chooses, say
/// keys: `save(b)` writes what lies from bound `b` up to a next bound. The
/// donor applies operations between two parts, so the parts are of different
/// log positions; the joiner brings what it has got already up to date with
/// [`apply_below`](Self::apply_below) before it loads the next. A small or
/// uncuttable state is saved whole, as one part from bound 0.
pub trait StateMachine: Send {
    /// An operation: fixed layout, any size. Bytes that are none are refused
    /// before they get here.
    type Op: TryFromBytes + IntoBytes + Immutable + KnownLayout + Copy + Send;
    /// What an operation tells the thread that issued it.
    type Answer: Send;

    /// Applies an operation. `payload` is what came with it beyond its fixed
    /// layout.
    fn apply(&mut self, op: &Self::Op, payload: &[u8], at: At) -> Self::Answer;

    /// A member came or went, at that position of the log.
    fn member_changed(&mut self, change: &MemberChange) {
        let _ = change;
    }

    /// Back to the state before the first operation.
    fn reset(&mut self);

    /// Appends the part of the state from bound `from` (0: the start) to
    /// `out`, about `budget` bytes, and returns the bound where the next part
    /// starts, which must be larger; `None` after the last.
    fn save(&self, from: u64, budget: usize, out: &mut Vec<u8>) -> Option<u64>;

    /// Takes in a part that [`save`](Self::save) wrote from bound `from`.
    ///
    /// # Errors
    /// If the bytes are none; the copy is then started anew.
    fn load(&mut self, from: u64, part: &[u8]) -> Result<(), BadSnapshot>;

    /// Applies an operation to that part of the state alone which lies below
    /// `bound`; what is above has it already. Never called on a machine that
    /// saves its state whole.
    fn apply_below(&mut self, bound: u64, op: &Self::Op, payload: &[u8], at: At) {
        let _ = (bound, op, payload, at);
    }
}
