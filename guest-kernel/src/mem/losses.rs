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

use vmm_shared::addr::{LARGE_PAGE_SIZE, MAX_NODES};
use vmm_shared::losses::LossRecord;

use super::index;
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

    /// Whether a node's processors are gone; never for one without any.
    ///
    /// # Panics
    /// If some of them are: they had been moved away, or there. Who asks may
    /// wait for just those.
    pub(crate) fn has_lost_node(&self, node: usize) -> bool {
        let gone = |sources: Sources| CpuSet(sources.record.first_vcpus());
        let cpus = self.processors[node % MAX_NODES];
        let gone = self.sources.map_or(CpuSet::NONE, gone).and(cpus);
        let in_part = gone != CpuSet::NONE && gone != cpus;
        assert!(!in_part, "some processors of node {node} are lost");
        gone != CpuSet::NONE
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
        let (record, of_cpus, of_memory) = loop {
            let record = sources.record.nodes();
            let has_lost = |node: &usize| self.has_lost_node(*node);
            let of_cpus = bits((0..MAX_NODES).filter(has_lost));
            let of_memory = bits(lost_pieces(sources).filter_map(&node_of));
            // Of a node that is lost meanwhile, its memory alone may have been
            // seen.
            if sources.record.nodes_by_now() == record {
                break (record, of_cpus, of_memory);
            }
        };
        let has_processors = |node: &usize| self.processors[*node] != CpuSet::NONE;
        let left = of_memory & bits((0..MAX_NODES).filter(has_processors)) & !of_cpus;
        let node = left.trailing_zeros();
        assert!(left == 0, "memory of node {node} is lost, which goes on");
        let lost = of_cpus | of_memory;
        let before = self.lost.fetch_or(lost, Ordering::Relaxed);
        self.taken.store(record.bits(), Ordering::Relaxed);
        let new = lost & !before;
        (0..MAX_NODES).filter(|node| new >> node & 1 != 0).collect()
    }
}

/// A set of nodes.
fn bits(nodes: impl Iterator<Item = usize>) -> u64 {
    nodes.fold(0, |set, node| set | 1 << node)
}

/// The addresses of all large pages that are lost.
fn lost_pieces(sources: Sources) -> impl Iterator<Item = u64> {
    let next = move |last: &Range<u64>| (sources.next)(last.end);
    let ranges = core::iter::successors((sources.next)(0), next);
    ranges.flat_map(|range| range.step_by(index(LARGE_PAGE_SIZE)))
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
    use spin::Once;
    use vmm_shared::addr::{NodeId, VcpuId};

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

    /// Node 2 is lost just as somebody looks for what node 1 had.
    #[test]
    fn two_nodes_are_lost_one_after_the_other() {
        static RECORD: Once<LossRecord> = Once::new();
        let next = |at: u64| {
            let record = RECORD.get().expect("made below");
            record.note(NodeId(2), core::iter::once(VcpuId(2)));
            (at < MEMORY.end).then_some(MEMORY)
        };
        let sources = sources(next);
        let record = RECORD.call_once(|| sources.record);
        let losses = Losses::new(&[0, 1, 2], Some(sources));
        record.note(NodeId(1), core::iter::once(VcpuId(1)));
        let node_of = |at: u64| Some(if at < 2 * LARGE_PAGE_SIZE { 1 } else { 2 });
        assert_eq!(*losses.take(node_of), [1, 2]);
        assert!(!losses.has_news());
    }

    /// A page fault there would be waited for in vain.
    #[test]
    #[should_panic(expected = "some processors of node 1")]
    fn nobody_waits_for_part_of_a_node() {
        let sources = sources(next);
        let losses = Losses::new(&[0, 1, 1], Some(sources));
        sources.record.note(NodeId(1), core::iter::once(VcpuId(2)));
        losses.has_lost_node(1);
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
