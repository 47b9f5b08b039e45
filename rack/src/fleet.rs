//! The nodes of a rack as a whole, and what becomes of it when one ends.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::Signal;
use vmm_shared::addr::NodeId;

use crate::node::NodeEnd;

/// How long nodes get to end by themselves once the first has, when their VM
/// has ended.
const GRACE: Duration = Duration::from_secs(1);

/// All nodes that have been started.
///
/// A VM needs each of its nodes: when one ends, in whatever way, the others
/// are ended, too, and the first is to blame.
#[derive(Debug, Default)]
pub(crate) struct Fleet {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    first: Option<(NodeId, NodeEnd)>,
    running: Vec<(NodeId, OwnedFd)>,
}

impl Fleet {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node that ended first, and how.
    pub(crate) fn first_end(&self) -> Option<(NodeId, NodeEnd)> {
        self.lock().first
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
        state.running.retain(|(id, _)| *id != node);
        state.first.get_or_insert((node, end));
        self.changed.notify_all();
    }

    /// Ends the others if this node was the first to end.
    pub(crate) fn follow(&self, node: NodeId, end: NodeEnd) {
        let state = self.lock();
        if state.first != Some((node, end)) {
            return;
        }
        let grace = match end {
            NodeEnd::Orderly => GRACE,
            _ => Duration::ZERO,
        };
        let some = |state: &mut State| !state.running.is_empty();
        let (state, _) = self
            .changed
            .wait_timeout_while(state, grace, some)
            .unwrap_or_else(PoisonError::into_inner);
        for (_, pidfd) in &state.running {
            kill(pidfd.as_fd());
        }
    }

    /// Ends all nodes at once. A rack's state is all in its regions, so there
    /// is nothing that QEMU would have to save.
    pub(crate) fn kill(&self) {
        for (_, pidfd) in &self.lock().running {
            kill(pidfd.as_fd());
        }
    }
}

fn kill(pidfd: BorrowedFd<'_>) {
    // Fails only if the process is gone, which is what is wanted.
    let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
}
