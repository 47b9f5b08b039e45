//! The nodes of a rack as a whole, and what becomes of its VM when one ends.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::Signal;
use vmm_shared::addr::NodeId;
use vmm_shared::coherence::NodeSet;
use vmm_shared::control::{ControlRegion, VmState};
use vmm_shared::log::Log;
use vmm_shared::pieces::PieceMap;

use crate::doorbell::Doorbells;
use crate::node::NodeEnd;

/// How long nodes get to end by themselves once the first has, when their VM
/// has ended.
const GRACE: Duration = Duration::from_secs(1);

/// All nodes that have been started.
///
/// | a node ends, or is put out | then |
/// | --- | --- |
/// | before its VM runs | the rack ends: all others are ended, and it is to blame |
/// | in order, its VM has ended | the rack ends, after a grace |
/// | its VM runs and needs it | the VM is frozen: the others go on, and hold it |
/// | its VM runs without it | nothing |
#[derive(Debug, Default)]
pub(crate) struct Fleet {
    state: Mutex<State>,
    changed: Condvar,
    stake: Option<Stake>,
}

/// What is at stake when a node ends.
#[derive(Debug)]
pub(crate) struct Stake {
    pub control: ControlRegion,
    pub doorbells: Arc<Doorbells>,
    /// All nodes of the rack.
    pub nodes: NodeSet,
    /// Where the VM's memory is.
    pub pieces: PieceMap,
    /// What they all follow.
    pub log: Log,
}

#[derive(Debug, Default)]
struct State {
    first: Option<(NodeId, NodeEnd)>,
    frozen: bool,
    /// All nodes have been told to end.
    closing: bool,
    running: Vec<(NodeId, OwnedFd)>,
}

impl Fleet {
    pub(crate) fn new(stake: Stake) -> Self {
        Self {
            stake: Some(stake),
            ..Self::default()
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node that is to blame for the VM's end, and how it ended.
    pub(crate) fn first_end(&self) -> Option<(NodeId, NodeEnd)> {
        self.lock().first
    }

    /// Whether the VM stands still for good, though nodes of it still run.
    pub(crate) fn is_frozen(&self) -> bool {
        self.lock().frozen
    }

    /// A node has been started.
    pub(crate) fn started(&self, node: NodeId, pidfd: OwnedFd) {
        let mut state = self.lock();
        if state.first.is_some() {
            kill(pidfd.as_fd());
        }
        state.running.push((node, pidfd));
    }

    /// A node has ended.
    pub(crate) fn ended(&self, node: NodeId, end: NodeEnd) {
        let mut state = self.lock();
        if let Some(place) = state.running.iter().position(|(id, _)| *id == node) {
            state.running.swap_remove(place);
        }
        if let Some(stake) = &self.stake {
            // Its process has been reaped: it writes nothing any more.
            stake.log.confirm_node_dead(node.0.into());
        }
        self.lose(&mut state, node, end);
        self.changed.notify_all();
    }

    /// The nodes have put one out, though its process still runs.
    pub(crate) fn silent(&self, node: NodeId) {
        self.lose(&mut self.lock(), node, NodeEnd::Silent);
    }

    fn lose(&self, state: &mut State, node: NodeId, end: NodeEnd) {
        if state.first.is_some() {
            return;
        }
        match &self.stake {
            Some(stake) if stake.survives(end) && !state.closing => {
                if stake.put_out(node) {
                    state.first = Some((node, end));
                    state.frozen = true;
                }
            }
            _ => state.first = Some((node, end)),
        }
    }

    /// Ends the others if this node has ended the rack.
    pub(crate) fn follow(&self, node: NodeId, end: NodeEnd) {
        let state = self.lock();
        if state.first != Some((node, end)) || state.frozen {
            return;
        }
        let grace = match end {
            NodeEnd::Orderly => GRACE,
            _ => Duration::ZERO,
        };
        let state = self.wait_for_all(state, grace);
        for (_, pidfd) in &state.running {
            kill(pidfd.as_fd());
        }
    }

    fn wait_for_all<'a>(
        &self,
        state: MutexGuard<'a, State>,
        limit: Duration,
    ) -> MutexGuard<'a, State> {
        let some = |state: &mut State| !state.running.is_empty();
        self.changed
            .wait_timeout_while(state, limit, some)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    /// Ends all nodes at once. A rack's state is all in its regions, so there
    /// is nothing that QEMU would have to save.
    pub(crate) fn kill(&self) {
        let mut state = self.lock();
        state.closing = true;
        for (_, pidfd) in &state.running {
            kill(pidfd.as_fd());
        }
    }

    /// Waits up to `limit` for all nodes to have ended.
    pub(crate) fn wait_gone(&self, limit: Duration) {
        drop(self.wait_for_all(self.lock(), limit));
    }
}

impl Stake {
    /// Whether there is a VM to be kept when a node ends like this.
    fn survives(&self, end: NodeEnd) -> bool {
        // Acquire: pairs with the Release of the node that has set it.
        let raw = self
            .control
            .vm_state()
            .load(std::sync::atomic::Ordering::Acquire);
        let state = VmState::from_raw(raw);
        self.nodes.len() > 1
            && end != NodeEnd::Orderly
            && matches!(state, Some(VmState::Running | VmState::Frozen))
    }

    /// Puts a node out and tells the others; whether that freezes the VM.
    fn put_out(&self, node: NodeId) -> bool {
        let membership = self.control.membership();
        if let Some(life) = membership.life(node) {
            membership.fence(life);
        }
        let is_needed = self.control.needs(node, &self.pieces);
        if is_needed {
            self.control.freeze_vm();
        }
        for other in self.nodes.without(node) {
            self.doorbells.kick(other);
        }
        is_needed
    }
}

fn kill(pidfd: BorrowedFd<'_>) {
    // Fails only if the process is gone, which is what is wanted.
    let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
}
