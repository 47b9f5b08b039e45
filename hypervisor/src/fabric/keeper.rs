//! This node's part in the membership: it gives signs of life, watches the
//! others, and knows when the VM must stand still.
//!
//! Every core that waits for anything, and every core before it enters the
//! guest, comes by here. What is due is done by the first to come; the node's
//! first core is also woken for it by its timer. So no wait can outlast the
//! node that it waits for.

use core::sync::atomic::{AtomicU64, Ordering};

use spin::Mutex;
use vmm_shared::addr::NodeId;
use vmm_shared::coherence::NodeSet;
use vmm_shared::membership::{Life, Membership, TICK_MS, Watch};

/// Why this node's vCPUs must not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// The VM has lost a node that it needs.
    Frozen,
    /// The others have put this node out. It may have slept for long, and the
    /// VM's memory may be somebody else's by now.
    Fenced,
}

/// Keeps one node's membership.
#[derive(Debug)]
pub struct Keeper {
    membership: Membership,
    life: Life,
    /// Of the nodes that have been lost, those that the VM did not need. A
    /// node that is lost never gets anything again.
    harmless: AtomicU64,
    /// TSC ticks between heartbeats.
    period: u64,
    /// The TSC at which the next heartbeat is due.
    next: AtomicU64,
    /// Bits of the nodes that have been lost.
    lost: AtomicU64,
    watch: Mutex<Option<Watch>>,
}

impl Keeper {
    /// Keeps `life`, from [`start`](Self::start) on.
    #[must_use]
    pub fn new(membership: Membership, life: Life, tsc_khz: u32) -> Self {
        Self {
            membership,
            life,
            harmless: AtomicU64::new(0),
            period: u64::from(tsc_khz) * TICK_MS,
            next: AtomicU64::new(u64::MAX),
            lost: AtomicU64::new(0),
            watch: Mutex::new(None),
        }
    }

    /// Begins to give signs of life and to watch `others`. A node that is
    /// alone does neither.
    pub fn start(&self, others: NodeSet, now: u64) {
        if others.is_empty() {
            return;
        }
        *self.watch.lock() = Some(Watch::new(self.membership, others));
        self.next.store(now, Ordering::Relaxed);
    }

    /// Does what is due at this TSC, if anything is; the nodes that have been
    /// found lost.
    pub fn attend(&self, now: u64) -> Option<NodeSet> {
        let due = self.next.load(Ordering::Relaxed);
        if due == u64::MAX || now < due {
            return None;
        }
        // Whoever holds the lock is doing it.
        let mut watch = self.watch.try_lock()?;
        if self.next.load(Ordering::Relaxed) != due {
            return None;
        }
        self.next
            .store(now.saturating_add(self.period), Ordering::Relaxed);
        self.membership.beat(self.life);
        let lost = watch.as_mut().map_or(NodeSet::EMPTY, Watch::tick);
        Some(self.note(lost))
    }

    /// Looks at once whether somebody has been put out, as when the doorbell
    /// has been rung; the nodes that have been found lost.
    pub fn look(&self) -> NodeSet {
        let lost = match self.watch.try_lock().as_deref_mut() {
            Some(Some(watch)) => watch.look(),
            _ => NodeSet::EMPTY,
        };
        self.note(lost)
    }

    fn note(&self, lost: NodeSet) -> NodeSet {
        // AcqRel: who sees the loss sees what is known of it.
        let before = NodeSet::from_bits(self.lost.fetch_or(lost.bits(), Ordering::AcqRel));
        lost.filter(|node| !before.contains(*node))
            .fold(NodeSet::EMPTY, NodeSet::with)
    }

    /// Nodes that have been lost so far.
    #[must_use]
    pub fn lost(&self) -> NodeSet {
        NodeSet::from_bits(self.lost.load(Ordering::Acquire))
    }

    /// Whether this node has been put out.
    #[must_use]
    pub fn is_out(&self) -> bool {
        !self.membership.is_in(self.life)
    }

    /// Whether this node's vCPUs must stay out of the guest, and why; `needs`
    /// says whether the VM can't go on without a node.
    #[must_use]
    pub fn held(&self, needs: impl Fn(NodeId) -> bool) -> Option<Held> {
        if self.is_out() {
            return Some(Held::Fenced);
        }
        // Relaxed: whoever does not see it yet finds out for itself.
        let harmless = self.harmless.load(Ordering::Relaxed);
        let doubtful = NodeSet::from_bits(self.lost().bits() & !harmless);
        if doubtful.is_empty() {
            return None;
        }
        if { doubtful }.any(needs) {
            return Some(Held::Frozen);
        }
        self.harmless.fetch_or(doubtful.bits(), Ordering::Relaxed);
        None
    }

    /// The TSC at which [`attend`](Self::attend) has something to do, if ever.
    #[must_use]
    pub fn next_due(&self) -> Option<u64> {
        Some(self.next.load(Ordering::Relaxed)).filter(|due| *due != u64::MAX)
    }
}

#[cfg(test)]
#[expect(unsafe_code, reason = "a leaked buffer as the record")]
mod tests {
    use super::*;
    use core::ptr::NonNull;
    use vmm_shared::membership::SILENT_TICKS;
    use vmm_shared::shm::SharedMem;

    const KHZ: u32 = 1000;
    const PERIOD: u64 = 1000 * TICK_MS;

    fn record() -> Membership {
        let memory = Box::leak(vec![0_u64; Membership::SIZE / 8].into_boxed_slice());
        let base = NonNull::new(memory.as_mut_ptr()).expect("not null").cast();
        // SAFETY: leaked, aligned, and reached through the window only.
        let memory = unsafe { SharedMem::new(base, Membership::SIZE) };
        Membership::new(memory).expect("large enough")
    }

    fn set(nodes: &[u16]) -> NodeSet {
        nodes
            .iter()
            .fold(NodeSet::EMPTY, |set, node| set.with(NodeId(*node)))
    }

    /// What the VM needs.
    fn needs(node: NodeId) -> bool {
        node != NodeId(2)
    }

    /// Keepers of nodes 0 to 2, of which the VM needs 0 and 1.
    fn rack() -> (Membership, [Keeper; 3]) {
        let record = record();
        let keepers = [0, 1, 2].map(|node| {
            let life = record.join(NodeId(node)).expect("free");
            Keeper::new(record, life, KHZ)
        });
        for (node, keeper) in (0..).zip(&keepers) {
            keeper.start(set(&[0, 1, 2]).without(NodeId(node)), 0);
        }
        (record, keepers)
    }

    #[test]
    fn a_needed_node_that_falls_silent_freezes_the_others() {
        let (_, [zero, one, two]) = rack();
        let mut found = None;
        let mut ticks = 0;
        one.attend(0);
        for tick in 0..=u64::from(SILENT_TICKS) {
            assert_eq!(zero.held(needs), None);
            two.attend(tick * PERIOD);
            found = zero.attend(tick * PERIOD);
            ticks = tick;
        }
        assert_eq!(found, Some(set(&[1])), "after {ticks} ticks");
        assert!(ticks * TICK_MS <= 2000);
        assert_eq!(zero.held(needs), Some(Held::Frozen));
        assert_eq!(two.lost(), set(&[1]));
        assert_eq!(two.look(), NodeSet::EMPTY, "told once");
        assert_eq!(two.held(needs), Some(Held::Frozen));
        assert_eq!(one.held(needs), Some(Held::Fenced), "when it wakes up");
    }

    #[test]
    fn the_vm_goes_on_without_a_node_that_it_does_not_need() {
        let (record, [zero, one, two]) = rack();
        record.fence(record.life(NodeId(2)).expect("in"));
        assert_eq!(zero.look(), set(&[2]));
        assert_eq!((zero.held(needs), one.held(needs)), (None, None));
        assert_eq!(zero.lost(), set(&[2]));
        assert_eq!(two.held(needs), Some(Held::Fenced));
    }

    #[test]
    fn what_is_due_is_done_once_and_a_node_alone_does_nothing() {
        let (record, [zero, one, _]) = rack();
        for now in [5, 6, PERIOD, PERIOD + 4] {
            zero.attend(now);
            assert_eq!(zero.next_due(), Some(5 + PERIOD));
        }
        for tick in 1..100 {
            zero.attend(tick * 2 * PERIOD);
            one.attend(tick * 2 * PERIOD);
        }
        assert!(record.is_in(one.life) && record.is_in(zero.life));
        let alone = Keeper::new(record, zero.life, KHZ);
        alone.start(NodeSet::EMPTY, 0);
        assert_eq!((alone.next_due(), alone.attend(u64::MAX)), (None, None));
    }
}
