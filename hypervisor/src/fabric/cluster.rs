//! This node's part in the cluster: its replica of the tables, and its calls.
//!
//! Nothing of it is on the way of a guest's exit. The replica is looked after
//! where the node gives its signs of life and where it hears its doorbell; a
//! core that finds another at it goes on.

use alloc::boxed::Box;
use core::fmt;

use control_plane::cluster::Cluster;
use spin::Mutex;
use vmm_shared::addr::NodeId;
use vmm_shared::control::cluster::{ClusterLayout, MAX_PEERS, MEMBER};
use vmm_shared::control::{BootConfig, ControlRegion, LAUNCHER_PEER};
use vmm_shared::log::{Clock, Config, Log, MemberId, Replica, ReplicaError};
use vmm_shared::membership::{Life, Membership};
use vmm_shared::rpc::{Doorbell, Endpoint, Kind, Queue, Request};

use crate::arch::cpu;
use crate::arch::pci::{self, Window};
use crate::arch::time::Clocks;

/// How often a node tries to join before it goes on without. Each try may
/// take as long as [`MEMBER`] says.
const JOIN_TRIES: usize = 10;

/// Time and wake-ups as a node has them.
#[derive(Clone, Debug)]
pub struct NodeClock {
    tsc_khz: u32,
    log: Log,
    bells: NodeBells,
}

impl Clock for NodeClock {
    fn now_ns(&self) -> u64 {
        let ticks = u128::from(cpu::rdtsc());
        let ns = ticks * 1_000_000 / u128::from(self.tsc_khz.max(1));
        u64::try_from(ns).unwrap_or(u64::MAX)
    }

    fn nudge(&self, member: MemberId) {
        if let Ok(node) = u16::try_from(self.log.status(member).node) {
            self.bells.ring_peer(node);
        }
    }
}

/// Wakes nodes and the launcher.
#[derive(Clone, Debug)]
pub struct NodeBells {
    doorbell: Option<Window>,
    /// The launcher's number among the peers.
    launcher: usize,
}

impl NodeBells {
    /// By the id that the doorbell knows it by.
    fn ring_peer(&self, id: u16) {
        if let Some(doorbell) = &self.doorbell {
            pci::ring(doorbell, id, 0);
        }
    }
}

impl Doorbell for NodeBells {
    fn ring(&self, peer: usize) {
        if peer == self.launcher {
            self.ring_peer(LAUNCHER_PEER);
        } else if let Ok(node) = u16::try_from(peer) {
            self.ring_peer(node);
        }
    }

    /// Nodes never sleep for a message alone.
    fn sleep(&self, _: u64) {
        core::hint::spin_loop();
    }
}

/// A replica of the tables.
pub type Follower = Replica<Cluster, NodeClock>;
/// A node's side of its calls.
pub type Calls = Endpoint<NodeBells, MAX_PEERS, 4>;

/// What is used under one lock.
struct Parts {
    /// None before the node has joined, and if it can't.
    follower: Option<Box<Follower>>,
    /// Calls from the launcher and among nodes.
    calls: Calls,
    /// The log position of the tables that were published last.
    published: Option<u64>,
    /// Messages that were none, as far as they have been counted.
    garbage: u64,
}

/// One node's membership in the cluster.
pub struct ClusterMember {
    life: Life,
    membership: Membership,
    control: ControlRegion,
    clock: NodeClock,
    /// Peers that are nodes.
    nodes: usize,
    parts: Mutex<Parts>,
}

impl fmt::Debug for ClusterMember {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterMember").finish_non_exhaustive()
    }
}

impl ClusterMember {
    /// Finds the log and the inboxes. None if the node is alone, or if what is
    /// there is of no use: then the node goes on without.
    #[must_use]
    pub fn attach(
        life: Life,
        control: &ControlRegion,
        config: &BootConfig,
        clocks: &Clocks,
        doorbell: Option<&Window>,
    ) -> Option<Box<Self>> {
        if config.nodes < 2 {
            return None;
        }
        let member = Self::find(life, control, config, clocks, doorbell);
        if member.is_none() {
            log::error!("the cluster's log is damaged; this node goes on without");
        }
        member
    }

    fn find(
        life: Life,
        control: &ControlRegion,
        config: &BootConfig,
        clocks: &Clocks,
        doorbell: Option<&Window>,
    ) -> Option<Box<Self>> {
        let layout = ClusterLayout::new(usize::try_from(config.nodes).ok()?)?;
        let area = control.blob(config.cluster)?;
        let log = Log::attach(layout.log_window(&area)?).ok()?;
        let bells = NodeBells {
            doorbell: doorbell.cloned(),
            launcher: layout.launcher(),
        };
        let inbox = |peer| Queue::attach(layout.inbox_window(&area, peer)?).ok();
        let me = usize::from(life.node().0);
        let mut calls = Calls::new(inbox(me)?, epoch(life), bells.clone());
        for peer in 0..=layout.launcher() {
            calls.set_peer(peer, inbox(peer)?.producer(me).ok()).ok()?;
        }
        // Boxed: stacks are small.
        Some(Box::new(Self {
            life,
            membership: control.membership(),
            control: *control,
            clock: NodeClock {
                tsc_khz: clocks.tsc_khz,
                log,
                bells,
            },
            nodes: layout.launcher(),
            parts: Mutex::new(Parts {
                follower: None,
                calls,
                published: None,
                garbage: 0,
            }),
        }))
    }

    /// Which node this is.
    #[must_use]
    pub const fn node(&self) -> NodeId {
        self.life.node()
    }

    /// This node's clock.
    #[must_use]
    pub const fn clock(&self) -> &NodeClock {
        &self.clock
    }

    /// Whether a node takes part in the rack.
    #[must_use]
    pub fn is_alive(&self, node: NodeId) -> bool {
        self.membership.life(node).is_some()
    }

    /// Becomes a member of the log, and gets the tables. An earlier life of
    /// this node is over.
    pub fn join(&self) {
        let mut parts = self.parts.lock();
        self.clock.log.confirm_node_dead(self.node().0.into());
        for _ in 0..JOIN_TRIES {
            match self.try_join() {
                Ok(follower) => {
                    let member = follower.member().index();
                    log::info!("follows the cluster's log as member {member}");
                    parts.follower = Some(follower);
                    self.publish(&mut parts);
                    return;
                }
                Err(error) => log::warn!("cannot join the cluster's log: {error:?}"),
            }
            self.membership.beat(self.life);
        }
        log::error!("this node goes on without the cluster's log");
    }

    fn try_join(&self) -> Result<Box<Follower>, ReplicaError> {
        let config = Config {
            node: self.node().0.into(),
            ..MEMBER
        };
        let (log, clock) = (self.clock.log.clone(), self.clock.clone());
        Replica::join(log, Cluster::default(), clock, config).map(Box::new)
    }

    /// Keeps the membership, follows the log and says how far. To be called at
    /// every sign of life, and when the doorbell rings.
    pub fn tick(&self) {
        // Whoever has the lock is at it.
        let Some(mut parts) = self.parts.try_lock() else {
            return;
        };
        let Some(follower) = &parts.follower else {
            return;
        };
        match follower.tick() {
            Ok(()) => self.publish(&mut parts),
            Err(error) => {
                // Put out by mistake, as after a long sleep: what is new is
                // behind a snapshot.
                log::warn!("lost the cluster's log: {error:?}; joins again");
                parts.follower = self.try_join().ok();
            }
        }
    }

    /// Publishes a digest of the tables, if they have changed.
    fn publish(&self, parts: &mut Parts) {
        let Some(mut thread) = parts.follower.as_ref().and_then(|it| it.thread()) else {
            return;
        };
        let published = parts.published;
        let changed = thread
            .read_local(|cluster| (published != Some(cluster.end())).then(|| cluster.digest()));
        drop(thread);
        if let Ok(Some(digest)) = changed
            && let Some(record) = self.control.node(self.node())
        {
            record.digest().set(digest);
            parts.published = Some(digest.position);
        }
    }

    /// Puts a node that is lost out of the log, too.
    pub fn evict(&self, node: NodeId) {
        let parts = self.parts.lock();
        let Some(follower) = &parts.follower else {
            return;
        };
        let log = follower.log();
        for member in log.members() {
            let status = log.status(member);
            if status.node == u32::from(node.0)
                && let Err(error) = follower.evict(member, status.epoch)
            {
                log::warn!("cannot evict member {}: {error:?}", member.index());
            }
        }
    }

    /// Lets the control role work with the tables and the calls, if this node
    /// follows the log.
    pub fn with<R>(&self, work: impl FnOnce(&Follower, &mut Calls) -> R) -> Option<R> {
        let mut parts = self.parts.lock();
        let Parts {
            follower, calls, ..
        } = &mut *parts;
        let done = work(follower.as_deref()?, calls);
        let garbage = calls.dropped().garbage;
        let new = garbage - core::mem::replace(&mut parts.garbage, garbage);
        self.control.count_garbage(self.node(), new);
        self.publish(&mut parts);
        Some(done)
    }

    /// The next call for this node, from a peer that may make one.
    pub fn next_call(&self, calls: &mut Calls) -> Option<Request> {
        // Bounded: a peer that floods us must not keep us here for ever.
        for _ in 0..16 {
            let is_member = |peer: usize, number: u32| self.may_call(peer, number);
            match calls.poll(is_member) {
                Some((Kind::Request, request)) => return Some(request),
                // What is called is done at once, or not at all.
                Some(_) => {}
                // From here on the doorbell tells.
                None if calls.rest() => return None,
                None => {}
            }
        }
        None
    }

    fn may_call(&self, peer: usize, number: u32) -> bool {
        if peer == self.nodes {
            return number == vmm_shared::control::cluster::LAUNCHER_EPOCH;
        }
        let node = u16::try_from(peer).ok().map(NodeId);
        let life = node.and_then(|node| self.membership.life(node));
        life.is_some_and(|life| epoch(life) == number)
    }
}

/// A life's number as messages carry it.
fn epoch(life: Life) -> u32 {
    u32::try_from(life.number() & u64::from(u32::MAX)).expect("32 bits")
}
