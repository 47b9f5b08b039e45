//! Memory of a running VM that moves from one node to another.
//!
//! The node that is to have it does it; here is left what is wanted, and
//! waited for what becomes of it. See [`vmm_shared::pieces`].

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vmm_shared::addr::{LARGE_PAGE_SIZE, NodeId};
use vmm_shared::control::NodeShare;
use vmm_shared::pieces::{Ended, HostPiece, Pull, PullId, Pulling, Seen};

use crate::rack::Rack;
use crate::status::NodeMemory;

/// Ids below this are those of jobs.
const FIRST_ID: u32 = 1 << 31;

/// Why memory has not moved, or not all of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SliceError {
    /// There is no such node, or it gives no memory.
    #[error("there is no node {} that gives memory, or it is lost; viaduct nodes shows them", .0.0)]
    NoNode(NodeId),
    /// From a node to itself.
    #[error("memory of node {} is there already", .0.0)]
    SameNode(NodeId),
    /// Somebody else has asked for something there.
    #[error("node {} takes memory over already; try again later", .0.0)]
    Busy(NodeId),
    /// The node is full.
    #[error(
        "node {} has no room for more: {taken} of {asked} pieces of 2 MiB have moved; start the \
         rack with a bigger --node-memory", .node.0
    )]
    NoRoom {
        /// The node that was to have them.
        node: NodeId,
        /// Pieces that it has now.
        taken: u32,
        /// What was asked for.
        asked: u32,
    },
    /// What the nodes share is damaged.
    #[error("node {} can't take memory over; its log says why", .0.0)]
    Damaged(NodeId),
    /// Not done in time; it goes on.
    #[error("{taken} of {asked} pieces of 2 MiB have moved within {seconds} s; the rest follows")]
    Late {
        /// Pieces that have moved.
        taken: u32,
        /// What was asked for.
        asked: u32,
        /// The time given.
        seconds: u64,
    },
    /// The VM has ended.
    #[error("the VM has ended")]
    Ended,
}

impl Rack {
    /// Moves so many pieces of the VM's memory, as far as there are so many,
    /// from one node to another, and waits until they are there; how many.
    ///
    /// # Errors
    /// Why they have not moved, or not all of them.
    pub fn move_memory(
        &self,
        (from, to): (NodeId, NodeId),
        count: u32,
        limit: Duration,
    ) -> Result<u32, SliceError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        for node in [from, to] {
            let data = self.control().boot_config().data_nodes();
            if !data.contains(node) || self.control().membership().is_out(node) {
                return Err(SliceError::NoNode(node));
            }
        }
        if from == to {
            return Err(SliceError::SameNode(to));
        }
        let record = self.pieces().pull(to).ok_or(SliceError::NoNode(to))?;
        let id = PullId(FIRST_ID | NEXT.fetch_add(1, Ordering::Relaxed));
        // What the record holds.
        let count = count.min((1 << 25) - 1);
        let pull = Pull { id, from, count };
        record.ask(pull).map_err(|Pulling| SliceError::Busy(to))?;
        self.ring(to);
        let deadline = Instant::now() + limit;
        loop {
            let rings = self.rings();
            let progress = record.progress(id).ok_or(SliceError::Busy(to))?;
            let taken = progress.taken;
            match progress.ended {
                Some(Ended::Done) => return Ok(taken),
                Some(Ended::NoRoom) => {
                    let (node, asked) = (to, count);
                    return Err(SliceError::NoRoom { node, taken, asked });
                }
                Some(Ended::Damaged) => return Err(SliceError::Damaged(to)),
                None if self.control().membership().is_out(to) => {
                    return Err(SliceError::NoNode(to));
                }
                None => {}
            }
            if self.ended().is_some() {
                return Err(SliceError::Ended);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(SliceError::Late {
                    taken,
                    asked: count,
                    seconds: limit.as_secs(),
                });
            }
            self.wait_ring(rings, left);
        }
    }
}

/// A run of the VM's memory, in the order of its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRun {
    /// Bytes.
    pub len: u64,
    /// The node that the guest takes it to be near.
    pub home: NodeId,
    /// The node that gives it now.
    pub node: NodeId,
}

impl Rack {
    /// Which node gives which part of the VM's memory, in order: what it was
    /// started with, then what has come since.
    #[must_use]
    pub fn memory_runs(&self) -> Vec<MemoryRun> {
        let shares = || (0..).map(NodeId).zip(self.shares());
        let first = shares().map(|(home, share)| (home, share.memory / LARGE_PAGE_SIZE));
        let later = |(home, share): (NodeId, &NodeShare)| {
            (home, (share.home() - share.memory) / LARGE_PAGE_SIZE)
        };
        let pieces = first.chain(shares().map(later));
        let homes = pieces.flat_map(|(home, count)| (0..count).map(move |_| home));
        let mut runs: Vec<MemoryRun> = Vec::new();
        for (piece, home) in (0..).zip(homes) {
            let seen = self.pieces().look(piece).ok();
            let Some(HostPiece { node, .. }) = seen.and_then(Seen::host) else {
                continue;
            };
            match runs.last_mut() {
                Some(last) if (last.home, last.node) == (home, node) => {
                    last.len += LARGE_PAGE_SIZE;
                }
                _ => runs.push(MemoryRun {
                    len: LARGE_PAGE_SIZE,
                    home,
                    node,
                }),
            }
        }
        runs
    }

    /// The memory of each node, in order.
    pub(crate) fn memory_status(&self) -> Vec<NodeMemory> {
        let khz = self.control().vm().tsc_khz().load(Ordering::Relaxed);
        let us = |ticks: u64| ticks.saturating_mul(1000).checked_div(khz).unwrap_or(0);
        let mut nodes = vec![NodeMemory::default(); self.shares().len()];
        let mut offset = 0;
        for (index, share) in self.shares().iter().enumerate() {
            let own = &mut nodes[index];
            own.home_offset = offset;
            own.home = share.memory;
            own.room = share.room();
            offset += share.memory;
            let node = NodeId(u16::try_from(index).expect("few nodes"));
            if let Some(record) = self.pieces().pull(node) {
                own.taken = record.all_taken().saturating_mul(LARGE_PAGE_SIZE);
                own.copying_us = us(record.copying());
                own.longest_us = us(record.longest());
            }
        }
        for run in self.memory_runs() {
            nodes[usize::from(run.node.0)].gives += run.len;
            if run.node != run.home {
                nodes[usize::from(run.home.0)].away += run.len;
            }
        }
        nodes
    }
}
