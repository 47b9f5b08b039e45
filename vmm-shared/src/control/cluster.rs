//! The cluster's part of the control region: the log that all nodes and the
//! launcher follow, and an inbox for each of them.
//!
//! ```text
//!   0      the log               members: nodes, launcher, one to spare
//!   ..     inbox of node 0       each from all nodes and the launcher
//!   ..     …
//!   ..     inbox of the launcher
//! ```
//!
//! How large it is follows from the number of nodes alone. The launcher makes
//! it, before any node starts. A *peer* is a node, by its number, or the
//! launcher, whose number comes after the last node's.

use crate::log::{Config, Geometry};
use crate::membership::{SILENT_TICKS, TICK_MS};
use crate::rpc::QueueSizes;
use crate::shm::SharedMem;

/// The launcher's incarnation in messages: it lives as long as its rack.
pub const LAUNCHER_EPOCH: u32 = 1;

/// Bytes of a page.
const PAGE: usize = 4096;

/// The most peers of a node: what an emulated rack can have.
pub const MAX_PEERS: usize = 17;

/// How members take part in the log; each has its own number of a node.
///
/// A node that falls silent is put out by the rack's membership first, and its
/// member evicted because of that; the log's own lease is for the launcher.
/// Nobody waits so long for space that its own signs of life would fail.
pub const MEMBER: Config = Config {
    lease_ns: 2 * SILENT_TICKS as u64 * TICK_MS * 1_000_000,
    patience_ns: 10_000_000,
    copies: 2,
    wait_ns: 500_000_000,
    threads: 8,
    node: 0,
    part_bytes: 16 << 10,
};

/// Where the parts lie for so many nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterLayout {
    nodes: usize,
}

impl ClusterLayout {
    /// The layout for a rack of `nodes`; `None` if that is no rack.
    #[must_use]
    pub const fn new(nodes: usize) -> Option<Self> {
        if nodes == 0 || nodes >= MAX_PEERS {
            return None;
        }
        Some(Self { nodes })
    }

    /// The launcher's number among the peers.
    #[must_use]
    pub const fn launcher(&self) -> usize {
        self.nodes
    }

    /// The log's sizes. A batch holds 8 KiB: a plan for the largest VM.
    #[must_use]
    pub const fn log(&self) -> Geometry {
        Geometry {
            order_slots: 1 << 11,
            // One for the launcher, and one while another's is in quarantine.
            members: self.nodes + 2,
            lane_lines: 1 << 13,
            entry_bytes: 64,
            stage_lines: 1 << 8,
        }
    }

    /// The sizes of each inbox.
    #[must_use]
    pub const fn inbox(&self) -> QueueSizes {
        QueueSizes {
            slots: 64,
            producers: self.nodes + 1,
            cells: 8,
        }
    }

    const fn log_bytes(&self) -> usize {
        self.log().total_bytes().next_multiple_of(PAGE)
    }

    const fn inbox_bytes(&self) -> usize {
        self.inbox().total_bytes().next_multiple_of(64)
    }

    /// Bytes of all.
    #[must_use]
    pub const fn size(&self) -> usize {
        self.log_bytes() + (self.nodes + 1) * self.inbox_bytes()
    }

    /// The log's part of `area`, if it is as large as it should be.
    #[must_use]
    pub fn log_window(&self, area: &SharedMem) -> Option<SharedMem> {
        area.window(0, self.log_bytes())
    }

    /// A peer's inbox in `area`, if it is as large as it should be.
    #[must_use]
    pub fn inbox_window(&self, area: &SharedMem, peer: usize) -> Option<SharedMem> {
        (peer <= self.nodes).then_some(())?;
        let offset = self.log_bytes() + peer * self.inbox_bytes();
        area.window(offset, self.inbox_bytes())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::log::Log;
    use crate::rpc::Queue;
    use crate::shm::testing::leaked;

    #[test]
    fn every_part_fits_and_none_meets_another() {
        for nodes in 1..MAX_PEERS {
            let layout = ClusterLayout::new(nodes).expect("a rack");
            let area = leaked(layout.size().div_ceil(64));
            let log = layout.log_window(&area).expect("inside");
            Log::create(log, layout.log()).expect("fits");
            for peer in 0..=nodes {
                let inbox = layout.inbox_window(&area, peer).expect("inside");
                Queue::create(inbox, layout.inbox()).expect("fits");
            }
            Log::attach(log).expect("still there");
            for peer in 0..=nodes {
                let inbox = layout.inbox_window(&area, peer).expect("inside");
                Queue::attach(inbox).expect("still there");
            }
            assert!(layout.inbox_window(&area, nodes + 1).is_none());
        }
        assert_eq!(ClusterLayout::new(0), None);
        assert_eq!(ClusterLayout::new(MAX_PEERS), None);
    }
}
