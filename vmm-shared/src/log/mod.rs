//! The replicated log: one mechanism for all state that members share.
//!
//! A deterministic [`StateMachine`] has a replica on every member (a node, or
//! a process). All replicas apply the same operations in the same order: the
//! order of a log in shared memory. Reads are local; updates cost one
//! compare-and-swap on shared memory per batch. Members come and go while the
//! others work, and any of them may stop at any instruction.
//!
//! Allocation is used for a replica's private buffers alone; what is shared
//! has a fixed size and place.
//!
//! # The picture
//!
//! ```text
//!                     head                              end
//!                      v                                 v
//! order ring    | .. | B3 | A7 | A8 | C1 | B4 | A9 | C2 | free | free | .. |
//!                 one word each: lap, author, line in the author's lane
//!
//! lane of A     | free        | A7 | A8: entries + arena | A9 | free      |
//! lane of B     | free   | B3 | B4 |                            free      |
//! lane of C     | C2 | free                                       | C1    |
//!                 each written by its one member, in lines of 64 bytes
//!
//! applied of A  ────────────────────────────────────────▶|
//! applied of B  ─────────────────▶|    head is never past the lowest of
//! applied of C  ──────▶|               those that still can follow
//! ```
//!
//! * The **order ring** has one word per position: lap, author, and where in
//!   the author's lane the batch lies. It is all that members compete for.
//! * A **lane** belongs to one member, which alone writes it: batches of
//!   entries, each entry with its payload inline, or in the batch's arena. It
//!   is used in segments, of the free ones the last used first.
//! * **Cursors** are apart from both: each member's `applied` position, and the
//!   common reclaim frontier `head`. What is before `head` may be overwritten.
//!
//! There is no tail: the end of the log is the first word whose lap is old.
//!
//! # The life of a batch
//!
//! 1. *Collected.* A thread becomes its node's combiner (one lock, private to
//!    the node) and takes the requests that wait in the other threads' seats.
//! 2. *Reserved.* It reserves lines in its own lane, for the whole batch.
//! 3. *Written.* Plain relaxed stores. Nobody else can see them.
//! 4. *Linked.* It looks from the last known end on for the first free word,
//!    and swaps it for its own: **the one step that decides everything.** If
//!    somebody was faster it goes on at the next word.
//! 5. *Applied* by each replica at its own pace; the author applies up to its
//!    batch at once and hands out the answers. Its own it has at hand, the
//!    others' it copies from their lanes.
//! 6. *Reclaimed.* When all members in good standing have applied it, `head`
//!    goes past it, and its lines and its word are used again.
//!
//! # Reads
//!
//! [`Thread::read`] is linearizable. Under the reader's side of the node's lock
//! it looks at the word at its replica's `applied` position. If that is free,
//! the replica has all there is. Else it brings the replica to the end of the
//! log as it is by then, and reads: an operation answered before the read
//! began was linked before that. [`Thread::read_local`] skips the look: it
//! sees all that its own node was answered and never goes back, but may miss
//! what others did lately.
//!
//! # What it costs
//!
//! A read that finds nothing new is one locked instruction, on the thread's own
//! line, and two loads of words that stay in its cache while nobody writes. An
//! update that meets nobody is two: the node's lock, which is taken with
//! readers already kept out, and the link. It touches the author's own lines
//! and one word of the ring.
//!
//! Between members every batch moves lines from cache to cache: the word, which
//! its author had to take from whoever looked at it last, and the batch.
//! Where two append by turns nothing else counts. So a member that finds
//! another's batches twice within microseconds *gives way*: it waits for one
//! microsecond, fetches what came in the meantime in one go, and then has
//! its own run until it is met again. Members that append now and then never
//! wait. Threads of one node do the same before the lock: a thread tries
//! for it some times, each time later, before it leaves its request in its
//! seat for another's next batch.
//!
//! # Fencing
//!
//! Suspicion of death can be wrong, and a member may sleep for any time
//! between two instructions. So nothing relies on its being dead:
//!
//! * **An eviction is an entry.** Its place in the order decides which of the
//!   victim's batches count: those before it, on every replica, exactly once;
//!   those after it on none. A late one is a *tombstone* that all skip.
//! * **A link can't come late.** The compare-and-swap expects the word of the
//!   lap before. Once the position is taken, by the eviction or anything else,
//!   that word never comes back, since laps only grow and end before they
//!   wrap. So a sleeper that had found the end before its eviction fails. If
//!   it looks for the new end, it has acquired the eviction, sees its own
//!   status changed and stops; had it not looked, it would link a tombstone.
//! * **A sleeper has nothing of others' to write to.** It writes payload only
//!   into its own lane, stage and record, and those stay in quarantine until it
//!   has said that it is done or somebody vouches for its death
//!   ([`Log::confirm_dead`]). So no check of a payload is needed, at any
//!   time, against a writer that should have stopped.
//! * Its other writes are harmless at any time: raising `head` to a position
//!   that some member had applied, and moving a status on by compare-and-swap
//!   on the epoch. Readers check for themselves whether `head` has passed them.
//!
//! # Memory ordering
//!
//! | a store | then seen by | so that |
//! | --- | --- | --- |
//! | link: Release | look: Acquire | the whole batch is seen, and all its author saw |
//! | `applied`: Release | reclaim: Acquire | the member's copies are over before |
//! | `head`: AcqRel | the lane's owner: Acquire | … the space is written again |
//! | lane writes after a Release fence | a late copy, then an Acquire fence and a look at `head` | a copy of reused lines is never believed |
//! | status: AcqRel | status: Acquire | a claim sees all of the last incarnation |
//! | a reader's flag, the lock's word: SeqCst | each other | one of the two steps back |
//! | `staged`: Release, after a Release fence | Acquire, copy, fence, look again | a snapshot piece is whole |
//!
//! Nothing here rests on x86's order; the models under loom explore what the
//! language's memory model allows.
//!
//! # Every place to stop
//!
//! | a member stops | what the others see |
//! | --- | --- |
//! | while it collects or writes a batch | nothing: it is not linked |
//! | between finding the end and the link | nothing; the next writer takes the word |
//! | after the link, before it applies | a whole batch: applied everywhere, once |
//! | after it applied, before it answers | the same; its threads are gone with it |
//! | while it combines for its other threads | as above; its node's lock is its own |
//! | while it writes `applied`, or waits for room | it stands still, is passed when `copies` others hold the state, and evicted after its lease |
//! | while it reads | nothing |
//! | while it raises `head` | one atomic step: done or not |
//! | between marking another as evicted and the entry | any member finishes that |
//! | between the entry and the final status | the same; the second entry has no effect |
//! | while it claims a slot or loads a snapshot | the claim is evicted after its lease |
//! | after its Join, before it is `Live` | as any member |
//! | while it hands out a snapshot | the joiner starts over with another donor |
//! | after its Leave, before its slot is free | evicted from the slot; no further effect |
//! | all members at once | what is in the log since `head`; the state is lost unless `head` is 0 |
//!
//! A replica that is passed loads a snapshot, as one that joins does; its own
//! operation in flight then ends with [`ReplicaError::OutcomeUnknown`].
//!
//! # What is trusted
//!
//! Members follow the protocol until they stop. A peer that writes garbage
//! can make replicas differ or the log stop, but every index and length read
//! from the region is checked against the geometry that was read once, every
//! loop is bounded or timed, and nothing it writes makes a replica panic or
//! leave the region.

pub mod clock;
mod layout;
mod member;
mod order;
mod roster;

mod apply;
mod batch;
mod combine;
mod combining;
mod lane;
mod lease;
mod machine;
mod replica;
mod snapshot;

#[cfg(not(loom))]
use crate::shm::SharedMem;
use crate::sync::Words;

pub use clock::Clock;
pub use layout::{Geometry, MAGIC, MAX_MEMBERS, VERSION};
pub use machine::{At, BadSnapshot, StateMachine};
pub use member::{Epoch, MemberId, State, Status};
pub use replica::{Config, Counters, Replica, ReplicaError, Thread};
pub use roster::{Change, MemberChange};

use layout::Layout;

/// Why a window is not the log that it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogError {
    /// No magic: nothing was created there.
    NotALog,
    /// Made by another version of the protocol.
    Version {
        /// The version found.
        found: u64,
    },
    /// Sizes that [`Geometry::is_legal`] refuses.
    BadGeometry,
    /// The window is smaller than the sizes need.
    TooSmall {
        /// Bytes needed.
        needs: usize,
        /// Bytes present.
        has: usize,
    },
}

/// A log in a shared region: what all members see of it.
///
/// Copying the handle copies the view, not the log. To take part, make a
/// [`Replica`] of it.
#[derive(Clone, Debug)]
pub struct Log {
    layout: Layout,
}

#[cfg(not(loom))]
impl Log {
    /// Makes an empty log in `memory`. Nobody may be using what is there.
    ///
    /// # Errors
    /// If the sizes are not legal or the memory is too small.
    pub fn create(memory: SharedMem, geometry: Geometry) -> Result<Self, LogError> {
        Self::create_in(&Words::new(memory), geometry)
    }

    /// The log that was created in `memory`.
    ///
    /// # Errors
    /// If there is none that this build can use.
    pub fn attach(memory: SharedMem) -> Result<Self, LogError> {
        Layout::attach(&Words::new(memory)).map(|layout| Self { layout })
    }
}

impl Log {
    pub(crate) fn create_in(words: &Words, geometry: Geometry) -> Result<Self, LogError> {
        Layout::create(words, geometry).map(|layout| Self { layout })
    }

    /// The sizes it was created with.
    #[must_use]
    pub const fn geometry(&self) -> &Geometry {
        self.layout.geometry()
    }
}

#[cfg(all(test, loom))]
mod models;
#[cfg(test)]
mod testing;
#[cfg(all(test, not(loom)))]
mod tests;
