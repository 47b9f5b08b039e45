//! Where the regions of an address space are kept.
//!
//! As long as its threads are on one node that is a list behind a lock. When
//! a second node takes part it becomes a replicated log with a replica on
//! every node; from then on that is all there is, and each node reads its own.
//! A process that stays on one node has no log.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};

use spin::{Once, RwLock};
use vmm_shared::log::{Clock, Config, Geometry, Log, Replica, ReplicaError};

use super::entry::Entry;
use super::frames::{Frames, Run};
use super::regions::{Applied, Change, Regions};
use crate::errno::Result;

/// Changes between two moments at which all replicas are brought up to date.
/// The log has room for more, so that nobody ever waits for room.
const CATCH_UP: u64 = 64;

/// A batch for each change, of two lines: see [`CATCH_UP`].
const ORDER_SLOTS: usize = 256;
const LANE_LINES: usize = 256;
const STAGE_LINES: usize = 16;

/// Time as a log sees it.
#[derive(Clone, Debug)]
struct Ticks(fn() -> u64);

impl Clock for Ticks {
    fn now_ns(&self) -> u64 {
        (self.0)()
    }
}

/// The regions in a log.
struct Replicated {
    /// By nodes; `None` where the VM had no processor when this was made.
    replicas: Box<[Option<Replica<Regions, Ticks>>]>,
    /// Where the log is.
    memory: Option<Run>,
    frames: Arc<Frames>,
    /// Changes since all replicas were up to date.
    behind: AtomicU64,
}

/// The regions of an address space.
pub(crate) struct List {
    local: RwLock<Regions>,
    replicated: Once<Replicated>,
}

impl core::fmt::Debug for List {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("List")
            .field("replicated", &self.is_replicated())
            .finish_non_exhaustive()
    }
}

impl List {
    pub(crate) fn new(regions: Regions) -> Self {
        Self {
            local: RwLock::new(regions),
            replicated: Once::new(),
        }
    }

    /// Changes that each node's replica has applied.
    pub(crate) fn applied(&self) -> impl Iterator<Item = (usize, u64)> {
        self.replicated
            .get()
            .into_iter()
            .flat_map(Replicated::applied)
    }

    /// Whether there is a replica on every node.
    pub(crate) fn is_replicated(&self) -> bool {
        self.replicated.is_completed()
    }

    /// Reads the regions as they are: on `node`, its own replica. `None` if
    /// the node is lost.
    pub(crate) fn read<R>(&self, node: usize, query: impl FnOnce(&Regions) -> R) -> Option<R> {
        match self.replicated.get() {
            None => Some(query(&self.local.read())),
            Some(replicated) => replicated.read(node, query),
        }
    }

    /// Makes a change, from `node`. When this returns every read on every
    /// node sees it. `None`, and no change, if it may have to wait for
    /// readers, of whom one may be lost: see [`List::apply_alone`].
    pub(crate) fn apply(&self, node: usize, change: Change) -> Option<Result<Applied>> {
        match self.replicated.get() {
            None => Some(self.local.try_write()?.apply(change)),
            Some(replicated) if replicated.is_due() => None,
            Some(replicated) => Some(replicated.append(node, change)),
        }
    }

    /// The same, with all gates closed.
    pub(crate) fn apply_alone(&self, frames: &Arc<Frames>, change: Change) -> Result<Applied> {
        let again = || {
            self.part_from_lost(frames);
            self.apply(frames.here(), change)
        };
        let done = self.apply(frames.here(), change).or_else(again);
        done.expect("nobody reads any more")
    }

    /// Brings all replicas up to date, and sees to it that nobody ever waits
    /// for who is lost. With all gates closed, so that who still reads is.
    pub(crate) fn part_from_lost(&self, frames: &Arc<Frames>) {
        match self.replicated.get() {
            Some(replicated) => replicated.catch_up(frames.here()),
            None if self.local.try_write().is_none() => {
                let replicated = self.replicate(frames);
                assert!(replicated, "no memory to leave a lost reader's list");
            }
            None => {}
        }
    }

    /// Puts the regions in a log, with a replica on each node. Nobody reads
    /// or changes them meanwhile: the caller sees to that. Whether there is
    /// memory for it.
    pub(crate) fn replicate(&self, frames: &Arc<Frames>) -> bool {
        let node = frames.here();
        let Some(replicated) = Replicated::new(frames) else {
            return false;
        };
        let regions = match self.local.try_write() {
            Some(mut local) => core::mem::take(&mut *local),
            // Who was lost as a reader stays one.
            None => self.local.read().clone(),
        };
        let (start, end) = regions.heap();
        let heap = [Change::SetHeap(start, end)];
        let all = regions
            .iter()
            .map(|(start, region)| Change::Put(start, region));
        for change in heap.into_iter().chain(all) {
            let done = replicated.append(node, change);
            done.expect("a region is put anywhere");
            if replicated.is_due() {
                replicated.catch_up(node);
            }
        }
        self.replicated.call_once(|| replicated);
        true
    }
}

impl Replicated {
    fn new(frames: &Arc<Frames>) -> Option<Self> {
        let places = &frames.places;
        let geometry = Geometry {
            order_slots: ORDER_SLOTS,
            members: places.running().count(),
            lane_lines: LANE_LINES,
            entry_bytes: (8 + size_of::<Entry>()).next_multiple_of(8),
            stage_lines: STAGE_LINES,
        };
        let memory = frames.alloc_run(geometry.total_bytes())?;
        let log = Log::create(frames.run(&memory), geometry);
        let log = log.expect("the run is as large as the geometry says");
        // Who is lost is evicted by who has closed the gates, so nobody is
        // suspected and nobody gives up.
        let config = |node: usize| Config {
            lease_ns: u64::MAX,
            patience_ns: u64::MAX,
            wait_ns: u64::MAX,
            copies: 1,
            threads: places.processors,
            node: u32::try_from(node).expect("there are few"),
            part_bytes: 4096,
        };
        let join = |node: usize| {
            let clock = Ticks(places.clock);
            let replica = Replica::join(log.clone(), Regions::default(), clock, config(node));
            replica.expect("the log goes back to its start and has a place for each")
        };
        let replicas = (0..places.slots())
            .map(|node| places.running().any(|it| it == node).then(|| join(node)));
        Some(Self {
            replicas: replicas.collect(),
            memory: Some(memory),
            frames: frames.clone(),
            behind: AtomicU64::new(0),
        })
    }

    fn replica(&self, node: usize) -> &Replica<Regions, Ticks> {
        let replica = self.replicas.get(node).and_then(Option::as_ref);
        replica.expect("who changes regions is not lost")
    }

    /// `None` if the node is no member any more.
    fn read<R>(&self, node: usize, query: impl FnOnce(&Regions) -> R) -> Option<R> {
        let replica = self.replicas.get(node)?.as_ref()?;
        let mut thread = replica.thread().expect("a seat for each processor");
        match thread.read(query) {
            Err(ReplicaError::Ended) => None,
            seen => Some(seen.expect("nobody gives up")),
        }
    }

    /// Whether the replicas are to be brought up to date before the next
    /// change.
    fn is_due(&self) -> bool {
        // Relaxed: changed under the kernel's lock.
        self.behind.load(Ordering::Relaxed) >= CATCH_UP
    }

    fn append(&self, node: usize, change: Change) -> Result<Applied> {
        let replica = self.replica(node);
        let mut thread = replica.thread().expect("a seat for each processor");
        let done = thread.update(change.into()).expect("no member stops");
        let places = &self.frames.places;
        places.count(node, |counts| &counts.appended, 1);
        self.behind.fetch_add(1, Ordering::Relaxed);
        done
    }

    /// Changes that each node's replica has applied.
    fn applied(&self) -> impl Iterator<Item = (usize, u64)> {
        let of = |(node, replica): (usize, &Option<Replica<_, _>>)| {
            let counters = replica.as_ref()?.counters()?;
            Some((node, counters.operations))
        };
        self.replicas.iter().enumerate().filter_map(of)
    }

    /// Brings all replicas up to date but those of nodes that are lost, which
    /// are no members from then on: a reader or an appender of theirs may be
    /// one for ever. With all gates closed.
    fn catch_up(&self, here: usize) {
        let losses = &self.frames.places.losses;
        for (node, replica) in self.replicas.iter().enumerate() {
            let Some(replica) = replica else { continue };
            let done = match losses.has_lost_node(node) {
                true => self.replica(here).evict(replica.member(), replica.epoch()),
                false => replica.tick(),
            };
            done.expect("no member stops");
        }
        self.behind.store(0, Ordering::Relaxed);
    }
}

impl Drop for Replicated {
    fn drop(&mut self) {
        for (node, applied) in self.applied() {
            let places = &self.frames.places;
            places.count(node, |counts| &counts.applied, applied);
        }
        // They look into the memory.
        self.replicas = Box::default();
        if let Some(memory) = self.memory.take() {
            self.frames.release_run(memory);
        }
    }
}
