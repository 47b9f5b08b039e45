//! The nodes that the kernel runs on, and what memory has done on each.

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU64, Ordering};

use vmm_shared::addr::MAX_NODES;

use super::losses::{Losses, Sources};

/// What a node has done for programs' memory, each on lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Counts {
    /// Page faults settled without the kernel's lock.
    pub(crate) alone: AtomicU64,
    /// Page faults settled under it.
    pub(crate) locked: AtomicU64,
    /// Changes of regions that it has put into logs.
    pub(crate) appended: AtomicU64,
    /// Changes that its replicas have applied, of logs that have ended.
    pub(crate) applied: AtomicU64,
}

/// The nodes of the VM.
#[derive(Debug)]
pub(crate) struct Places {
    /// By their numbers.
    counts: Box<[Counts]>,
    with_processors: u64,
    /// Processors of all.
    pub(crate) processors: usize,
    /// Ticks, for waits of a moment.
    pub(crate) clock: fn() -> u64,
    /// Which of them are gone.
    pub(crate) losses: Losses,
}

const _: () = assert!(MAX_NODES <= 64, "one bit for each node");

impl Places {
    /// From the node of each processor.
    pub(crate) fn new(processors: &[u32], clock: fn() -> u64, losses: Option<Sources>) -> Self {
        let nodes = || processors.iter().map(|node| *node as usize % MAX_NODES);
        let slots = nodes().max().unwrap_or(0) + 1;
        Self {
            counts: (0..slots).map(|_| Counts::default()).collect(),
            with_processors: nodes().fold(0, |set, node| set | 1 << node),
            processors: processors.len(),
            clock,
            losses: Losses::new(processors, losses),
        }
    }

    /// Numbers of nodes, from 0 on.
    pub(crate) fn slots(&self) -> usize {
        self.counts.len()
    }

    /// Whether the kernel has been running there.
    pub(crate) fn has_processors(&self, node: usize) -> bool {
        node < self.slots() && self.with_processors >> node & 1 != 0
    }

    /// Nodes that the kernel runs on, and that are not lost.
    pub(crate) fn running(&self) -> impl Iterator<Item = usize> + Clone + '_ {
        (0..self.slots())
            .filter(|node| self.has_processors(*node) && !self.losses.has_lost_node(*node))
    }

    /// A node's counts.
    pub(crate) fn counts(&self, node: usize) -> &Counts {
        &self.counts[node]
    }

    /// Adds to a count.
    pub(crate) fn count(&self, node: usize, which: impl Fn(&Counts) -> &AtomicU64, by: u64) {
        // Relaxed: for people to read.
        which(&self.counts[node]).fetch_add(by, Ordering::Relaxed);
    }
}
