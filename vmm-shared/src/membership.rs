//! Which nodes take part in the rack, and which have died.
//!
//! A node that takes part has a *life*: its number is odd, and the word goes to
//! the next even number when somebody *fences* it, puts it out for good. So
//! there is one order of events for each node, any node or the launcher may
//! fence another with one compare-and-swap, and a node that slept through its
//! own fencing finds out by comparing one word. The *epoch* of the whole rack
//! counts all joins and fences.
//!
//! Every node counts its *heartbeat* up each [`TICK_MS`]. An observer judges
//! others by its own ticks, not by a clock: when the whole host was asleep,
//! nobody is to blame.
//!
//! ```text
//!   0              epoch
//!   64 + 64 n      life of node n: 0 never joined, odd in, even out
//!   64 + 64 n + 8  heartbeat of node n; only it writes
//! ```
//!
//! Any word may be some peer's garbage. At worst it puts a node out.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::addr::{MAX_NODES, NodeId};
use crate::coherence::NodeSet;
use crate::shm::SharedMem;

/// Between two heartbeats of a node, in milliseconds.
pub const TICK_MS: u64 = 250;
/// After so many ticks without a heartbeat a node is dead. With the tick in
/// which it died and the one in which that is noticed: 2 s at most.
pub const SILENT_TICKS: u32 = 6;

const LINE: usize = 64;
const HEARTBEAT: usize = 8;

/// The shared record of who takes part.
#[derive(Clone, Copy, Debug)]
pub struct Membership(SharedMem);

/// A node between its joining and its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life {
    node: NodeId,
    number: u64,
}

impl Life {
    /// Whose life it is.
    #[must_use]
    pub const fn node(self) -> NodeId {
        self.node
    }

    /// The how-manieth word of that node's life it is; odd.
    #[must_use]
    pub const fn number(self) -> u64 {
        self.number
    }
}

/// Why a node can't join.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// There is no place for a node of this number.
    #[error("a rack has no place for a node {}", .0.0)]
    NoSuchNode(NodeId),
    /// A node of this number has joined already.
    #[error("a node {} has joined already; two hosts have been given the same number", .0.0)]
    JoinedAlready(NodeId),
}

impl Membership {
    /// Bytes of the record.
    pub const SIZE: usize = LINE * (1 + MAX_NODES);

    /// The record in `memory`, zeroed at first; `None` if it is too small.
    #[must_use]
    pub fn new(memory: SharedMem) -> Option<Self> {
        memory.window(0, Self::SIZE).map(Self)
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        self.0
            .atomic_u64(offset)
            .expect("`new` has checked the size")
    }

    fn line(&self, node: NodeId, offset: usize) -> Option<&AtomicU64> {
        let node = usize::from(node.0);
        (node < MAX_NODES).then(|| self.word(LINE * (1 + node) + offset))
    }

    /// Joins and fences so far.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        // Acquire: who sees the epoch sees the change that it counts.
        self.word(0).load(Ordering::Acquire)
    }

    fn changed(&self) {
        // Release: after the change that it counts.
        self.word(0).fetch_add(1, Ordering::Release);
    }

    /// Takes a node in.
    ///
    /// # Errors
    /// A node of this number is in already, or there can be none.
    pub fn join(&self, node: NodeId) -> Result<Life, JoinError> {
        let word = self.line(node, 0).ok_or(JoinError::NoSuchNode(node))?;
        let next = |life: u64| life.is_multiple_of(2).then(|| life.wrapping_add(1));
        // AcqRel: after the former life, and before all that this one does.
        let before = word
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, next)
            .map_err(|_| JoinError::JoinedAlready(node))?;
        self.changed();
        Ok(Life {
            node,
            number: before.wrapping_add(1),
        })
    }

    /// The life of a node that takes part.
    #[must_use]
    pub fn life(&self, node: NodeId) -> Option<Life> {
        // Acquire: what the node did before it joined is visible.
        let number = self.line(node, 0)?.load(Ordering::Acquire);
        (number % 2 == 1).then_some(Life { node, number })
    }

    /// Whether a node has taken part and has been put out since.
    #[must_use]
    pub fn is_out(&self, node: NodeId) -> bool {
        let life = self.line(node, 0).map(|word| word.load(Ordering::Acquire));
        life.is_some_and(|number| number != 0 && number % 2 == 0)
    }

    /// Whether this life goes on.
    #[must_use]
    pub fn is_in(&self, life: Life) -> bool {
        self.life(life.node) == Some(life)
    }

    /// Puts a node out; false if it was out already. Anybody may do this, any
    /// number of times.
    pub fn fence(&self, life: Life) -> bool {
        let Some(word) = self.line(life.node, 0) else {
            return false;
        };
        let out = life.number.wrapping_add(1);
        // AcqRel: the death comes before what anybody does because of it.
        let fenced = word
            .compare_exchange(life.number, out, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok();
        if fenced {
            self.changed();
        }
        fenced
    }

    /// Gives a sign of life.
    pub fn beat(&self, life: Life) {
        if let Some(word) = self.line(life.node, HEARTBEAT) {
            // One writer. Relaxed: it orders nothing.
            word.store(
                word.load(Ordering::Relaxed).wrapping_add(1),
                Ordering::Relaxed,
            );
        }
    }

    fn heartbeat(&self, node: NodeId) -> u64 {
        self.line(node, HEARTBEAT)
            .map_or(0, |word| word.load(Ordering::Relaxed))
    }
}

/// One observer's view of the others.
#[derive(Debug)]
pub struct Watch {
    membership: Membership,
    nodes: [Watched; MAX_NODES],
    lost: NodeSet,
}

#[derive(Clone, Copy, Debug)]
struct Watched {
    /// `None` if nobody is watched here.
    life: Option<Life>,
    heartbeat: u64,
    silent: u32,
}

impl Watch {
    /// Begins to watch these nodes. One that does not take part is lost from
    /// the start.
    #[must_use]
    pub fn new(membership: Membership, nodes: NodeSet) -> Self {
        let nobody = Watched {
            life: None,
            heartbeat: 0,
            silent: 0,
        };
        let mut watch = Self {
            membership,
            nodes: [nobody; MAX_NODES],
            lost: NodeSet::EMPTY,
        };
        for node in nodes {
            let life = membership.life(node);
            watch.nodes[usize::from(node.0)] = Watched {
                life,
                heartbeat: membership.heartbeat(node),
                silent: 0,
            };
            if life.is_none() {
                watch.lost = watch.lost.with(node);
            }
        }
        watch
    }

    /// Looks for nodes that others have put out; all that are lost so far.
    /// What is lost stays lost, whatever a peer writes.
    pub fn look(&mut self) -> NodeSet {
        for life in self.nodes.iter().filter_map(|watched| watched.life) {
            if !self.membership.is_in(life) {
                self.lost = self.lost.with(life.node);
            }
        }
        self.lost
    }

    /// The same, and puts out who has been silent for too long. To be called
    /// every [`TICK_MS`]. A node that was started anew counts as lost for ever,
    /// but its new life is watched like the first.
    pub fn tick(&mut self) -> NodeSet {
        for watched in &mut self.nodes {
            let Some(mut life) = watched.life else {
                continue;
            };
            if !self.membership.is_in(life) {
                self.lost = self.lost.with(life.node);
                match self.membership.life(life.node) {
                    Some(next) => life = next,
                    None => continue,
                }
                *watched = Watched {
                    life: Some(life),
                    heartbeat: self.membership.heartbeat(life.node),
                    silent: 0,
                };
                continue;
            }
            let heartbeat = self.membership.heartbeat(life.node);
            watched.silent = if heartbeat == watched.heartbeat {
                watched.silent.saturating_add(1)
            } else {
                0
            };
            watched.heartbeat = heartbeat;
            if watched.silent >= SILENT_TICKS {
                self.membership.fence(life);
            }
        }
        self.look()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::testing::leaked;
    use proptest::prelude::*;

    fn membership() -> Membership {
        Membership::new(leaked(Membership::SIZE / 64)).expect("large enough")
    }

    fn set(nodes: &[u16]) -> NodeSet {
        nodes
            .iter()
            .fold(NodeSet::EMPTY, |set, node| set.with(NodeId(*node)))
    }

    #[test]
    fn a_node_joins_once_and_a_fenced_life_never_counts_again() {
        let rack = membership();
        let life = rack.join(NodeId(3)).expect("free");
        assert_eq!(
            rack.join(NodeId(3)),
            Err(JoinError::JoinedAlready(NodeId(3)))
        );
        assert_eq!(
            rack.join(NodeId(64)),
            Err(JoinError::NoSuchNode(NodeId(64)))
        );
        assert!(rack.is_in(life) && !rack.is_out(NodeId(3)));
        assert!(rack.fence(life));
        assert!(!rack.fence(life), "out already");
        assert!(!rack.is_in(life) && rack.is_out(NodeId(3)));
        let next = rack.join(NodeId(3)).expect("a new life");
        assert!(rack.is_in(next) && !rack.is_in(life));
        assert!(!rack.fence(life), "not this life");
        assert_eq!(rack.epoch(), 3);
        assert!(!rack.is_out(NodeId(4)), "never was in");
    }

    #[test]
    fn of_many_that_join_or_fence_at_once_one_does() {
        for _ in 0..200 {
            let rack = membership();
            let tally = |act: &(dyn Fn() -> bool + Sync)| {
                std::thread::scope(|scope| {
                    let threads = [(); 3].map(|()| scope.spawn(act));
                    threads
                        .map(|thread| thread.join().expect("no panic"))
                        .iter()
                        .filter(|done| **done)
                        .count()
                })
            };
            assert_eq!(tally(&|| rack.join(NodeId(1)).is_ok()), 1);
            let life = rack.life(NodeId(1)).expect("in");
            assert_eq!(tally(&|| rack.fence(life)), 1);
            assert_eq!(rack.epoch(), 2);
        }
    }

    #[test]
    fn silence_is_counted_in_the_observers_ticks() {
        let rack = membership();
        let lives = [0, 1, 2].map(|node| rack.join(NodeId(node)).expect("free"));
        let mut watch = Watch::new(rack, set(&[0, 1, 2]));
        for tick in 1..SILENT_TICKS {
            rack.beat(lives[0]);
            assert_eq!(watch.tick(), NodeSet::EMPTY, "tick {tick}");
        }
        // The last moment for a sign of life.
        rack.beat(lives[0]);
        rack.beat(lives[2]);
        assert_eq!(watch.tick(), set(&[1]));
        assert!(rack.is_out(NodeId(1)));
        rack.beat(lives[1]);
        assert_eq!(watch.tick(), set(&[1]), "too late");
        assert!(watch.membership.is_in(lives[2]));
    }

    #[test]
    fn one_observers_verdict_is_everybodys() {
        let rack = membership();
        let lives = [0, 1].map(|node| rack.join(NodeId(node)).expect("free"));
        let mut watch = Watch::new(rack, set(&[1, 5]));
        assert_eq!(watch.look(), set(&[5]), "never joined");
        rack.fence(lives[1]);
        assert_eq!(watch.look(), set(&[1, 5]));
        assert!(rack.is_in(lives[0]));
        rack.join(NodeId(1)).expect("a new life");
        assert_eq!(watch.look(), set(&[1, 5]), "another life is another node");
    }

    #[test]
    fn a_new_life_is_watched_though_its_node_stays_lost() {
        let rack = membership();
        let lives = [0, 1].map(|node| rack.join(NodeId(node)).expect("free"));
        let mut watch = Watch::new(rack, set(&[1]));
        rack.fence(lives[1]);
        assert_eq!(watch.tick(), set(&[1]));
        let next = rack.join(NodeId(1)).expect("a new life");
        for _ in 0..10 {
            rack.beat(next);
            assert_eq!(watch.tick(), set(&[1]));
            assert!(rack.is_in(next));
        }
        for _ in 0..SILENT_TICKS {
            watch.tick();
        }
        assert!(!rack.is_in(next), "silent for too long");
    }

    proptest! {
        /// Whatever is in the record: no panic, nobody joins twice, nobody who
        /// was lost comes back, and a live node can be put out.
        #[test]
        fn garbage_never_brings_a_node_back(
            writes in proptest::collection::vec((0..Membership::SIZE / 8, any::<u64>()), 0..40),
            node in 0..80_u16,
        ) {
            let rack = membership();
            let all = (0..64).map(NodeId).fold(NodeSet::EMPTY, NodeSet::with);
            let mut watch = Watch::new(rack, all);
            let mut lost = watch.look();
            for (word, value) in writes {
                rack.word(word * 8).store(value, Ordering::Relaxed);
                let now = watch.tick();
                for node in lost {
                    prop_assert!(now.contains(node));
                }
                lost = now;
                let node = NodeId(node);
                if let Ok(life) = rack.join(node) {
                    prop_assert!(rack.join(node).is_err());
                    rack.beat(life);
                    prop_assert!(rack.is_in(life));
                    prop_assert!(rack.fence(life));
                    prop_assert!(rack.is_out(node) || life.number == u64::MAX);
                }
                let _ = rack.epoch();
            }
        }
    }
}
