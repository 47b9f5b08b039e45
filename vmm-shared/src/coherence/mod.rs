//! Instruction fetch kept coherent between nodes whose platform doesn't.
//!
//! # The problem
//!
//! Loads and stores are coherent between all nodes, and within one node
//! (one emulator process) instruction fetch is, too. But an emulator executes
//! *translations*, and drops those of a frame only when a store of its own
//! guest hits the frame: it never hears of another node's. The cure is to
//! store the frame's bytes over themselves on the node that is about to
//! execute them ([`refresh`](refresh())), while nobody else can write them.
//! Somebody has to know when that is necessary, and to hold writers off. That
//! is this module; it knows no page tables and no hardware. On platforms with
//! coherent fetch it is not used at all.
//!
//! # States
//!
//! Guest memory is a row of 4 KiB *frames*, 512 of them a *piece*. A piece has
//! one state until its nodes disagree about a frame; then it is split, for
//! good, and its frames have one each.
//!
//! ```text
//!                 first touch                         nobody else is left
//!    Unmapped ──────────────────▶ Private(n) ◀──────────────────────────┐
//!                                  │      │                             │
//!                   second node    │      │   second node               │
//!                   reads, writes  ▼      ▼   executes                  │
//!                              ┌─ Data ⇄ Code ─┐ ───────────────────────┘
//!     reads, writes: join      └───▲      ▲────┘      reads, executes: join
//!                                  │ flip │   a write fault, an execute fault
//!             4 flips in the last  │      │   7 moves without a fetch → Data,
//!             8 changes            ▼      ▼   without a write → Code
//!                                 Roaming(n) ──▶ Roaming(m)   any access
//! ```
//!
//! | state | who has rights | at most |
//! | --- | --- | --- |
//! | Unmapped | nobody | – |
//! | Data | a set of nodes | read, write |
//! | Code | a set of nodes | read, execute |
//! | Private | one node | all |
//! | Roaming | one node | all |
//! | Split (pieces) | ask the frames | – |
//!
//! Consequences worth knowing:
//! - What only one node uses is Private in 2 MiB pieces: a boot on one node
//!   sends no message, splits nothing and refreshes nothing.
//! - A piece changes as a whole when the second node comes. On the first
//!   disagreement after that it is split, and only the frame in question
//!   changes.
//! - A flip leaves the losers their right to read. So a frame that one node
//!   writes *and* executes flips as long as others have it mapped, until it
//!   roams; then the node has it alone and makes progress.
//! - The policy is one function without memory, `rules::decide`.
//!
//! # Who must refresh
//!
//! Two sets of nodes say it, exactly and without version numbers:
//! *translated* (per piece: who has ever had Execute) and *stale* (per entry).
//! Whenever a node is granted Write, all other translated nodes become stale.
//! A stale node that is granted Execute has to refresh, and is stale no more
//! when it has. Both happen under the entry's lock. Since Write and Execute
//! of different nodes exclude each other, nothing can be translated between a
//! writer's grant and its end that is not the writer's own. A stale node never
//! holds Execute; if it only reads, it is not given it.
//!
//! # The protocol
//!
//! ```text
//!   node A, faulting                        node B, with rights
//!   lock the entry                          …runs its guest…
//!   open a request: unit, keep, {B}
//!   hint B (inbox bit), doorbell  ────────▶ next_revocation
//!   poll: B has not answered                reduce page tables, flush TLBs
//!   …serves its own revocations…  ◀──────── acknowledge (sequence)
//!   poll: all have answered
//!   write mapped, stale, state
//!   Granted: refresh, install, flush
//!   complete: unlock
//! ```
//!
//! ```
//! # use vmm_shared::coherence::*;
//! # fn demo(map: &CoherenceMap, me: Member, frame: usize) -> Result<(), CoherenceError> {
//! let mut fault = map.fault(me, frame, Access::Write)?;
//! loop {
//!     match fault.poll()? {
//!         Step::Granted(grant) => {
//!             // Refresh if it must, install, flush if it must.
//!             fault.complete()?;
//!             break;
//!         }
//!         // Ring them once; after a time-out, ring what `nudge` returns.
//!         Step::Revoking(nodes) => {}
//!         Step::Busy => {}
//!     }
//!     // Waiting or not: serve the others, from this and every other core.
//!     while let Some(revocation) = map.next_revocation(me)? {
//!         // Reduce the page tables, flush the TLBs of all cores.
//!         map.acknowledge(me, &revocation);
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! An entry is written by the holder of its lock alone; a peer writes nothing
//! but its answer word in the request and its inbox. Requests can be lost only
//! as doorbells, and [`Fault::nudge`] repeats those.
//!
//! After a join in a split piece, [`CoherenceMap::join_around`] brings the
//! neighbours along for free.
//!
//! What the hypervisor itself writes into guest memory counts as the node's
//! writing: fault for Write, and store before a core of this node can answer a
//! revocation of it (under the lock of the node's page tables, say).
//!
//! # No deadlock
//!
//! 1. A fault holds at most one lock: splitting gives the piece's back before
//!    it tries the frame's.
//! 2. Who holds a lock waits only for answers (and, first, for a request slot
//!    of its own node, whose owners wait only for answers).
//! 3. Answering takes no lock and no slot, and every core does it while it
//!    waits for anything, at once or after a bounded time (see below). So
//!    answers come, or their node is fenced.
//! 4. Who waits for a lock holds nothing.
//!
//! # No livelock
//!
//! 1. A waiter puts itself down as the lock's successor, and the others leave
//!    the lock to it for a while, so nodes take turns.
//! 2. A core [`Hold`]s what its guest was granted until the guest has executed
//!    an instruction, for a bounded time that differs between nodes; until
//!    then revocations of that wait. Whoever serves passes them over
//!    ([`CoherenceMap::next_revocation_if`]), and the core serves when its
//!    hold ends. What is missed in between, the requester's nudge brings back.
//!
//! # Failures
//!
//! | who fails, when | then |
//! | --- | --- |
//! | holder, before it asks | whoever comes next takes the lock over once it is fenced; the entry is as before |
//! | holder, after asking | the same; the answers go unused; who gave a right up faults again |
//! | holder, while it writes the outcome | each word is stored so that entry and sets stay an upper bound of what nodes have: asking again is always right |
//! | holder, granted, not complete | the grant stands for a node that is dead: no member, so it counts for nothing |
//! | asked node, before it answers | fenced: the holder goes on without it |
//! | asked node, after it answered | nothing to do |
//! | a node that is fenced and comes back | new epoch: its old locks are void; old bits in the sets make others ask it for what it no longer has |
//! | a core serves a request twice, or late | the answer is for a sequence number that is past; at worst its guest faults again |
//! | a doorbell or a hint is lost | the requester nudges |
//! | a table word is garbage | an undefined control word, an impossible request or an answer from the future is a [`CoherenceError`]; garbage that looks valid may cost coherence or wait until the caller's time-out, never a panic, an access outside the table or an endless loop |
//!
//! Fencing is one word per node, checked where it matters; no sweep.
//!
//! # Costs
//!
//! 24 bytes per frame, 64 per piece: 0.59 % of guest memory. A fault that
//! asks nobody takes three or four locked instructions and about fifteen
//! loads. A request adds two locked instructions, and for each node asked one
//! here and four there. The split of a piece writes its 12 KiB of frame
//! entries, once.

mod counters;
mod entry;
mod fault;
mod hold;
mod layout;
mod map;
mod recall;
mod refresh;
mod requests;
mod rights;
mod rules;
mod words;

pub use counters::Counters;
pub use entry::{Member, State};
pub use fault::{Fault, Grant, Step};
pub use hold::{Hold, Place};
pub use layout::{Geometry, MAX_SLOTS};
pub use map::{CoherenceMap, View};
pub use recall::{Estrangement, Recall};
pub use refresh::refresh;
pub use requests::Revocation;
pub use rights::{Access, FRAMES_PER_PIECE, NodeSet, Rights, Unit};
pub use rules::{Change, FLIP_LIMIT, FLIP_WINDOW, MOVE_WINDOW};
pub use words::Words;

use crate::addr::NodeId;

/// How often an attempt that another core's progress can spoil is repeated
/// before it counts as spoilt by garbage.
const MAX_TRIES: usize = 128;

/// How many polls a free lock is left to the successor.
const PATIENCE: u32 = 32;

/// Why the map can't do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CoherenceError {
    /// Not a frame of this guest's memory.
    #[error("there is no frame {frame}")]
    NoSuchFrame {
        /// The frame's number.
        frame: usize,
    },
    /// Not a node of this rack, or an epoch of 0.
    #[error("there is no node {}", node.0)]
    NoSuchNode {
        /// The node's number.
        node: NodeId,
    },
    /// The node takes part already.
    #[error("node {} takes part already", node.0)]
    AlreadyIn {
        /// The node.
        node: NodeId,
    },
    /// This node has been fenced: it must stop running the guest.
    #[error("node {} has been put out", node.0)]
    Fenced {
        /// The node.
        node: NodeId,
    },
    /// The fault was completed before it was granted.
    #[error("a fault was completed before it was granted")]
    NotGranted,
    /// An entry that no node writes. The table is damaged: stop the VM.
    #[error("the table is damaged: the entry of {unit:?} is {found:#x}")]
    CorruptEntry {
        /// What the entry is about.
        unit: Unit,
        /// Its control word.
        found: u64,
    },
    /// A request that no node makes. The table is damaged: stop the VM.
    #[error("the table is damaged: node {} has made an impossible request", requester.0)]
    CorruptRequest {
        /// The node that seems to have made it.
        requester: NodeId,
    },
    /// An answer to a request that was never made. The table is damaged: stop
    /// the VM.
    #[error("the table is damaged: node {} has answered what nobody asked", node.0)]
    CorruptAnswer {
        /// The node that seems to have given it.
        node: NodeId,
    },
}

#[cfg(test)]
pub(crate) mod tests;
