//! What has been lost with nodes: processors, and memory.
//!
//! The hypervisor's record says at once which nodes and processors are gone;
//! the kernel *takes a loss in* (see [`crate::losses`]) soon afterwards, under
//! its lock. In between, lost memory reads as anything. So who has read from
//! memory that may be lost asks [`Losses::is_lost`] before it uses what it has
//! read, and who waits for another processor asks whether that is gone.

use alloc::boxed::Box;
use alloc::vec;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};

use vmm_shared::addr::{MAX_NODES, VcpuId};
use vmm_shared::losses::LossRecord;

use crate::sched::CpuSet;

/// How the machine tells what has been lost.
#[derive(Clone, Copy, Debug)]
pub struct Sources {
    /// Which processors.
    pub record: LossRecord,
    /// The first lost memory at or above an address.
    pub next: fn(u64) -> Option<Range<u64>>,
}

/// What has been lost.
#[derive(Debug)]
pub(crate) struct Losses {
    /// None if nothing can be lost.
    sources: Option<Sources>,
    /// The processors of each node.
    processors: Box<[CpuSet]>,
    /// Nodes of the record that the kernel has taken in.
    taken: AtomicU64,
    /// Nodes of the VM that are lost, as far as that has been taken in.
    lost: AtomicU64,
}

impl Losses {
    /// From the node of each processor.
    pub(crate) fn new(processors: &[u32], sources: Option<Sources>) -> Self {
        let mut sets = vec![CpuSet::NONE; MAX_NODES].into_boxed_slice();
        for (cpu, node) in processors.iter().enumerate() {
            sets[*node as usize % MAX_NODES].add(cpu);
        }
        Self {
            sources,
            processors: sets,
            taken: AtomicU64::new(0),
            lost: AtomicU64::new(0),
        }
    }

    /// Whether there are losses that have not been taken in.
    pub(crate) fn has_news(&self) -> bool {
        // Relaxed: changed under the kernel's lock.
        let taken = self.taken.load(Ordering::Relaxed);
        self.sources
            .is_some_and(|sources| sources.record.nodes_by_now().bits() != taken)
    }

    /// Whether a processor is gone.
    pub(crate) fn has_lost_cpu(&self, cpu: usize) -> bool {
        let vcpu = u16::try_from(cpu).map(VcpuId);
        self.sources
            .is_some_and(|sources| vcpu.is_ok_and(|vcpu| sources.record.has_lost(vcpu)))
    }

    /// Whether a node's processors are gone; never for one without any.
    pub(crate) fn has_lost_node(&self, node: usize) -> bool {
        let any = |sources: Sources| !sources.record.nodes().is_empty();
        let cpus = self.processors[node % MAX_NODES];
        self.sources.is_some_and(any)
            && cpus != CpuSet::NONE
            && cpus.iter().all(|cpu| self.has_lost_cpu(cpu))
    }

    /// Whether a node of the VM has been taken in as lost.
    pub(crate) fn has_taken(&self, node: usize) -> bool {
        // Relaxed: changed under the kernel's lock.
        self.lost.load(Ordering::Relaxed) >> (node % MAX_NODES) & 1 != 0
    }

    /// Whether memory of a node is lost.
    pub(crate) fn is_lost(&self, node: usize, address: u64) -> bool {
        self.has_taken(node)
            || self.has_news() && self.next(address).is_some_and(|next| next.start <= address)
    }

    fn next(&self, address: u64) -> Option<Range<u64>> {
        self.sources.and_then(|sources| (sources.next)(address))
    }

    /// Takes in what has been lost. `node_of` says whose memory is at an
    /// address. Under the kernel's lock. The nodes that are newly lost.
    ///
    /// # Panics
    /// If a node is lost in part: its processors or memory had been moved away
    /// from it, or to it.
    pub(crate) fn take(&self, node_of: impl Fn(u64) -> Option<usize>) -> Box<[usize]> {
        let Some(sources) = self.sources else {
            return Box::default();
        };
        // What comes later is another loss.
        let record = sources.record.nodes().bits();
        let mut lost = 0;
        for (node, cpus) in self.processors.iter().enumerate() {
            if self.has_lost_node(node) {
                lost |= 1 << node;
            } else {
                let any = cpus.iter().any(|cpu| self.has_lost_cpu(cpu));
                assert!(!any, "some processors of node {node} are lost");
            }
        }
        let mut at = 0;
        while let Some(range) = (sources.next)(at) {
            let mut piece = range.start;
            while piece < range.end {
                if let Some(node) = node_of(piece) {
                    let is_left = self.processors[node] != CpuSet::NONE && lost >> node & 1 == 0;
                    assert!(!is_left, "memory of node {node} is lost, which goes on");
                    lost |= 1 << node;
                }
                piece += vmm_shared::addr::LARGE_PAGE_SIZE;
            }
            at = range.end;
        }
        let before = self.lost.fetch_or(lost, Ordering::Relaxed);
        self.taken.store(record, Ordering::Relaxed);
        let new = lost & !before;
        (0..MAX_NODES).filter(|node| new >> node & 1 != 0).collect()
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use crate::mem::PAGE;
    use crate::mem::frames::testing::memory_of;

    /// A record in which nothing is lost, of a machine whose node 1 has the
    /// memory that the test says.
    pub(crate) fn sources(next: fn(u64) -> Option<Range<u64>>) -> Sources {
        let record = LossRecord::new(memory_of(&[0; PAGE])).expect("a page is enough");
        Sources { record, next }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::sources;
    use super::*;
    use vmm_shared::addr::{LARGE_PAGE_SIZE, NodeId};

    const MEMORY: Range<u64> = LARGE_PAGE_SIZE..3 * LARGE_PAGE_SIZE;

    fn next(at: u64) -> Option<Range<u64>> {
        (at < MEMORY.end).then_some(MEMORY)
    }

    fn node_of(at: u64) -> Option<usize> {
        Some(usize::from(at >= MEMORY.start))
    }

    #[test]
    fn a_loss_shows_at_once_and_is_taken_in_once() {
        let sources = sources(next);
        let losses = Losses::new(&[0, 1, 1], Some(sources));
        assert!(!losses.has_news() && !losses.has_lost_node(1));
        assert!(!losses.is_lost(1, MEMORY.start));
        let gone = [1, 2].into_iter().map(VcpuId);
        sources.record.note(NodeId(1), gone);
        assert!(losses.has_news() && losses.has_lost_node(1) && !losses.has_taken(1));
        assert!(losses.is_lost(1, MEMORY.start + 5));
        assert!(!losses.is_lost(0, MEMORY.start - 1));
        assert_eq!(*losses.take(node_of), [1]);
        assert!(!losses.has_news() && losses.has_taken(1));
        assert!(losses.is_lost(1, MEMORY.start) && !losses.is_lost(0, 0));
        assert!(losses.take(node_of).is_empty());
        assert!(!losses.has_lost_node(5), "it has no processors");
    }

    #[test]
    #[should_panic(expected = "some processors of node 1")]
    fn a_node_is_lost_as_a_whole() {
        let sources = sources(next);
        let losses = Losses::new(&[0, 1, 1], Some(sources));
        sources.record.note(NodeId(1), core::iter::once(VcpuId(2)));
        losses.take(node_of);
    }

    #[test]
    #[should_panic(expected = "memory of node 1 is lost")]
    fn so_is_its_memory() {
        let sources = sources(next);
        let losses = Losses::new(&[0, 1], Some(sources));
        sources.record.note(NodeId(3), core::iter::empty());
        losses.take(node_of);
    }
}
