//! Memory of a running VM: more, less, on this node or that.
//!
//! The hypervisors do it; here is left what is wanted, and waited for what
//! becomes of it. See [`vmm_shared::control::BlockRecord`].

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use control_plane::cluster::{Job, Reason, Step};
use vmm_shared::addr::NodeId;
use vmm_shared::control::{
    BLOCK_SIZE, BlockId, BlockOrder, BlockPlace, BlockRecord, BlockState, Busy, Outcome,
    PIECES_PER_BLOCK, Ticket, blocks,
};

use crate::rack::Rack;
use crate::size::Size;

/// Why the memory is not as it was asked to be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// Not a number of whole blocks.
    #[error(
        "memory comes and goes in blocks of {}; use {below} or {above} instead of {asked}",
        Size(BLOCK_SIZE)
    )]
    NotWhole {
        /// What was asked for.
        asked: Size,
        /// The nearest possible sizes.
        below: Size,
        /// Above it.
        above: Size,
    },
    /// There is no such node.
    #[error("there is no node {} in the rack, or it is lost; viaduct nodes shows them", .0.0)]
    NoNode(NodeId),
    /// The node has less to give.
    #[error(
        "node {} has {free} left to give, and {asked} were asked of it; use less, or start the \
         rack with --node-memory",
        .node.0
    )]
    NoRoom {
        /// Which.
        node: NodeId,
        /// What was asked for.
        asked: Size,
        /// What it has.
        free: Size,
    },
    /// The VM has got less from that node since it booted.
    #[error(
        "the VM has got {added} from node {} since it was started, and {asked} were to go; what \
         it was started with stays",
        .node.0
    )]
    NotAdded {
        /// Which.
        node: NodeId,
        /// What was to go.
        asked: Size,
        /// What could.
        added: Size,
    },
    /// Somebody else is changing it.
    #[error("the memory of node {} is being changed by somebody else; try again later", .0.0)]
    Busy(NodeId),
    /// The guest has no driver for that.
    #[error("the memory of this guest can't be changed while it runs")]
    Unable,
    /// The guest has refused part of it.
    #[error("{done} of {asked} done: the guest {what} {refused} on node {}: {}", .node.0, ost(*status))]
    Refused {
        /// Which.
        node: NodeId,
        /// What was asked for.
        asked: Size,
        /// What has been done of it.
        done: Size,
        /// "keeps" or "won't have".
        what: &'static str,
        /// What the guest has refused.
        refused: Size,
        /// The status of the last `_OST`.
        status: u32,
    },
    /// Not done in time; it may still be.
    #[error(
        "the guest has not answered within {seconds} s; {done} of {asked} done, the rest may follow"
    )]
    Late {
        /// The time given.
        seconds: u64,
        /// What was asked for.
        asked: Size,
        /// What has been done of it.
        done: Size,
    },
    /// The VM has ended.
    #[error("the VM has ended")]
    Ended,
}

/// What a status of `_OST` means (ACPI 6.5, tables 6.14 to 6.16).
fn ost(status: u32) -> String {
    match status {
        1 => "it failed, its log says why".into(),
        0x80 => "it can't do without it".into(),
        0x81 | 0x82 => "something in it can't be moved elsewhere".into(),
        0x83 => "something that depends on it is in use".into(),
        other => format!("ACPI status {other:#x}"),
    }
}

/// Memory that comes and goes, of one node, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HotMemory {
    /// What the guest may touch.
    pub granted: u64,
    /// What it has taken into use of that.
    pub seen: u64,
    /// What else could come: the node has room for it.
    pub free: u64,
}

impl Rack {
    /// The blocks that the guest takes to be near a node, with their records.
    fn blocks(&self, node: NodeId) -> impl Iterator<Item = BlockRecord> {
        blocks(self.shares())
            .filter(move |block| block.home == node)
            .filter_map(|block| self.control().block(block.id))
    }

    /// What a node has of memory that comes and goes.
    #[must_use]
    pub fn hot_memory(&self, node: NodeId) -> HotMemory {
        let mut sums = HotMemory::default();
        for record in self.blocks(node) {
            match record.state() {
                Some(BlockState::Absent) => sums.free += BLOCK_SIZE,
                Some(BlockState::Used) => {
                    sums.granted += BLOCK_SIZE;
                    sums.seen += BLOCK_SIZE;
                }
                Some(BlockState::Offered) => sums.granted += BLOCK_SIZE,
                Some(BlockState::Leaving) | None => {}
            }
        }
        let room = self.pieces().free(node) / PIECES_PER_BLOCK;
        sums.free = sums.free.min(room as u64 * BLOCK_SIZE);
        sums
    }

    /// The blocks for which the guest has not answered yet, and what it has
    /// been asked.
    #[must_use]
    pub fn asked_blocks(&self) -> Vec<(BlockId, BlockOrder)> {
        let order = |block: BlockPlace| {
            let order = self.control().block(block.id)?.order()?;
            Some((block.id, order))
        };
        blocks(self.shares()).filter_map(order).collect()
    }

    /// The blocks that the guest has refused to take, or to give up, when this
    /// job asked, and why; of those for which nobody has asked again.
    #[must_use]
    pub fn refused_blocks(&self, job: &Job) -> Vec<(BlockPlace, Reason)> {
        let refusal = |record: BlockRecord, index: u32, step: &Step| {
            let outcome = record.outcome_of(job.block_ticket(index, false))?;
            let Outcome::Refused(status) = outcome else {
                return None;
            };
            Some(Reason::refused(step.kind, status))
        };
        let refused = |block: BlockPlace| {
            let record = self.control().block(block.id)?;
            let mut steps = (0..).zip(job.steps());
            let why = steps.find_map(|(index, step)| refusal(record, index, step))?;
            Some((block, why))
        };
        blocks(self.shares()).filter_map(refused).collect()
    }

    fn order(&self, record: BlockRecord, order: BlockOrder) -> Result<(), Busy> {
        record.ask(order, Ticket::NO_JOB)?;
        // Release: the order is visible to who sees the count.
        self.control().vm().count_order();
        self.ring_devices();
        Ok(())
    }

    /// Orders the same of some blocks of a node, and waits for the outcomes.
    /// An order that can't be left because of another has none.
    fn order_all(
        &self,
        blocks: &[BlockRecord],
        order: BlockOrder,
        deadline: Instant,
    ) -> Result<Vec<Option<Outcome>>, MemoryError> {
        let asked: Vec<_> = blocks
            .iter()
            .map(|record| self.order(*record, order).is_ok())
            .collect();
        loop {
            let rings = self.rings();
            let outcomes: Vec<_> = blocks
                .iter()
                .zip(&asked)
                .map(|(record, asked)| asked.then(|| record.outcome()))
                .collect();
            let left = deadline.saturating_duration_since(Instant::now());
            if !outcomes.contains(&Some(Outcome::Pending)) || left.is_zero() {
                return Ok(outcomes);
            }
            if self.ended().is_some() {
                return Err(MemoryError::Ended);
            }
            self.wait_ring(rings, left);
        }
    }

    /// Notes how much memory the operator wants, by what is granted now.
    fn want(&self, change: impl FnOnce(u64) -> u64) {
        let wanted = change(self.status().memory.granted);
        let desired = self.control().vm();
        desired.desired_memory().store(wanted, Ordering::Relaxed);
    }

    /// Checks an amount for a node and returns how many blocks it is.
    fn in_blocks(&self, node: NodeId, asked: Size) -> Result<usize, MemoryError> {
        let Size(bytes) = asked;
        let whole = bytes / BLOCK_SIZE;
        if !bytes.is_multiple_of(BLOCK_SIZE) || whole == 0 {
            let below = Size(whole.max(1) * BLOCK_SIZE);
            let above = Size((whole + 1).max(2).saturating_mul(BLOCK_SIZE));
            return Err(MemoryError::NotWhole {
                asked,
                below,
                above,
            });
        }
        let config = self.control().boot_config();
        let is_out = self.control().membership().is_out(node);
        if !config.data_nodes().contains(node) || is_out {
            return Err(MemoryError::NoNode(node));
        }
        Ok(usize::try_from(whole).unwrap_or(usize::MAX))
    }

    /// The records of a node's blocks that are so, in order.
    fn records(&self, node: NodeId, is_so: impl Fn(&BlockRecord) -> bool) -> Vec<BlockRecord> {
        self.blocks(node).filter(is_so).collect()
    }

    /// Gives the guest so much more memory of a node, and waits until it has
    /// taken it into use.
    ///
    /// # Errors
    /// What went wrong; what was not refused may still come.
    pub fn add_memory(
        &self,
        node: NodeId,
        asked: Size,
        limit: Duration,
    ) -> Result<(), MemoryError> {
        let count = self.in_blocks(node, asked)?;
        let mut absent = self.records(node, |record| record.state() == Some(BlockState::Absent));
        absent.truncate(count);
        let free = Size(self.hot_memory(node).free);
        if free < asked {
            return Err(MemoryError::NoRoom { node, asked, free });
        }
        self.want(|granted| granted.saturating_add(asked.0));
        let change = Change::new(node, asked, limit, BlockOrder::Grant(node));
        let outcomes = self.order_all(&absent, change.order, change.deadline)?;
        change.result(&outcomes)
    }

    /// Asks the guest for so much memory of a node back that it has got since
    /// it was started, and waits until that is free. Of blocks that the guest
    /// keeps others take the place, if there are any.
    ///
    /// # Errors
    /// What went wrong, and how much is free nevertheless.
    pub fn remove_memory(
        &self,
        node: NodeId,
        asked: Size,
        limit: Duration,
    ) -> Result<(), MemoryError> {
        let count = self.in_blocks(node, asked)?;
        let mut present = self.records(node, BlockRecord::is_present);
        if present.len() < count {
            let added = Size(self.hot_memory(node).granted);
            return Err(MemoryError::NotAdded { node, asked, added });
        }
        self.want(|granted| granted.saturating_sub(asked.0));
        let change = Change::new(node, asked, limit, BlockOrder::Reclaim);
        let mut outcomes: Vec<Option<Outcome>> = Vec::new();
        loop {
            let is_done = |outcome: &&Option<Outcome>| **outcome == Some(Outcome::Done);
            let missing = count - outcomes.iter().filter(is_done).count();
            // The last first: so what is left lies together.
            let next = present.split_off(present.len().saturating_sub(missing));
            if next.is_empty() {
                return change.result(&outcomes);
            }
            let more = self.order_all(&next, BlockOrder::Reclaim, change.deadline)?;
            let is_late = more.contains(&Some(Outcome::Pending));
            outcomes.extend(more);
            if is_late {
                return change.result(&outcomes);
            }
        }
    }
}

/// A change of a node's memory.
#[derive(Clone, Copy, Debug)]
struct Change {
    node: NodeId,
    asked: Size,
    limit: Duration,
    deadline: Instant,
    order: BlockOrder,
}

impl Change {
    fn new(node: NodeId, asked: Size, limit: Duration, order: BlockOrder) -> Self {
        Self {
            node,
            asked,
            limit,
            deadline: Instant::now() + limit,
            order,
        }
    }

    /// What has become of it, by the outcomes of all that was ordered for it.
    fn result(&self, outcomes: &[Option<Outcome>]) -> Result<(), MemoryError> {
        let (node, asked) = (self.node, self.asked);
        let count = |is_it: fn(&Option<Outcome>) -> bool| {
            let blocks = outcomes.iter().filter(|outcome| is_it(outcome)).count();
            Size(blocks as u64 * BLOCK_SIZE)
        };
        let done = count(|outcome| *outcome == Some(Outcome::Done));
        if done == asked {
            return Ok(());
        }
        if outcomes.contains(&Some(Outcome::Pending)) {
            let seconds = self.limit.as_secs();
            return Err(MemoryError::Late {
                seconds,
                asked,
                done,
            });
        }
        let mut refusals = outcomes.iter().filter_map(|outcome| match outcome {
            Some(Outcome::Refused(status)) => Some(*status),
            _ => None,
        });
        if let Some(status) = refusals.next_back() {
            return Err(MemoryError::Refused {
                node,
                asked,
                done,
                what: match self.order {
                    BlockOrder::Reclaim => "keeps",
                    _ => "won't have",
                },
                refused: count(|outcome| matches!(outcome, Some(Outcome::Refused(_)))),
                status,
            });
        }
        Err(match outcomes {
            _ if outcomes.contains(&Some(Outcome::NoSuchCore)) => MemoryError::NoNode(node),
            _ if outcomes.contains(&Some(Outcome::Unable)) => MemoryError::Unable,
            // Something has moved there meanwhile.
            _ if outcomes.contains(&Some(Outcome::NoRoom)) => {
                let free = Size(0);
                MemoryError::NoRoom { node, asked, free }
            }
            // Another's order stood, or has just been carried out.
            _ => MemoryError::Busy(node),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(order: BlockOrder) -> Change {
        let asked = Size(2 * BLOCK_SIZE);
        Change::new(NodeId(1), asked, Duration::from_secs(9), order)
    }

    #[test]
    fn what_is_done_and_what_is_not_is_said() {
        let reclaim = change(BlockOrder::Reclaim);
        let done = Some(Outcome::Done);
        assert_eq!(reclaim.result(&[done, done]), Ok(()));
        let refused = Some(Outcome::Refused(0x82));
        assert_eq!(reclaim.result(&[refused, done, done]), Ok(()));
        let said = |outcomes: &[_]| reclaim.result(outcomes).expect_err("short").to_string();
        let partly = said(&[done, refused, refused]);
        let expected = "128M of 256M done: the guest keeps 256M on node 1: \
                        something in it can't be moved elsewhere";
        assert_eq!(partly, expected);
        let late = said(&[done, Some(Outcome::Pending), refused]);
        assert!(late.contains("within 9 s; 128M of 256M done"), "{late}");
        assert!(said(&[done, None]).contains("by somebody else"));
        assert!(said(&[Some(Outcome::Unable); 2]).contains("while it runs"));
        let lost = said(&[Some(Outcome::NoSuchCore); 2]);
        assert!(lost.contains("no node 1"), "{lost}");
        let grant = change(BlockOrder::Grant(NodeId(1))).result(&[refused, refused]);
        let grant = grant.expect_err("refused").to_string();
        assert!(grant.contains("won't have 256M"), "{grant}");
    }
}
