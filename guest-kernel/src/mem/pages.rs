//! The pages of an address space, and how a fault finds one without the
//! kernel's lock.
//!
//! ```text
//!  regions        what is mapped: one list, or a replica on every node
//!  tables         which frame backs a page: one for all nodes. They are what
//!                 the processors of the home node use.
//!  copies         what another node's processors use: pages copied from the
//!                 tables as they fault there
//! ```
//!
//! **A fault only adds**, and is one stay behind its node's gate: it looks up
//! the region, installs a frame in the tables by compare-and-swap if there is
//! none, and copies the entry. **What takes away** (unmap, fewer rights, another
//! frame in the place of one, fork) closes all gates, changes regions and
//! tables, and clears copies. So:
//!
//! 1. No page outlives its region: a fault behind the gate before it closed
//!    was seen by who cleared the tables; one that comes later reads regions
//!    without it, as the change has been answered by then.
//! 2. A copy never allows more than the tables, or another frame: both only
//!    get less while the gates are closed, and the copies are cleared then.
//! 3. What a processor remembers of the tables is forgotten before a frame is
//!    used again: who has closed the gates has a round of orders made before
//!    he gives up the kernel's lock (see `Kernel::tell_others`). A fault that
//!    comes between the two finds the new tables.
//!
//! Gates are never closed for long: who closes them waits for nothing but the
//! faults that are inside. They are `vmm_shared::gate`, whose models under
//! loom are points 1 and 2.
//!
//! Home is the kept node (see [`Frames`]). When another is lost, so are its
//! copies, which nobody needs, and its replica; who was inside its gate is
//! not waited for. Frames that were its stay in the tables, out of reach, so
//! that a later access finds that they are lost.

use alloc::boxed::Box;
use alloc::sync::Arc;

use spin::Once;
use vmm_shared::gate::{Closed, Gates};

use super::frames::{For, Frame, Frames};
use super::list::List;
use super::page_down;
use super::places::Counts;
use super::regions::{Access, Applied, Backing, Change, Prot, Region, Regions, Sharing};
use super::tables::{Leaf, Refused, Supply, Tables, USER_END};
use crate::errno::{Errno, Result};
use crate::kernel::RESERVED_FRAMES;

/// The pages of an address space: what all processors share.
#[derive(Debug)]
pub struct Pages {
    frames: Arc<Frames>,
    /// What they are for.
    what: For,
    /// A root with the kernel in it.
    model: Frame,
    home: usize,
    gates: Gates,
    list: List,
    tables: Tables,
    /// By nodes; the home node needs none.
    copies: Box<[Once<Tables>]>,
}

impl Pages {
    /// Pages of some regions, none there yet.
    pub(crate) fn new(
        frames: &Arc<Frames>,
        model: Frame,
        what: For,
        regions: Regions,
    ) -> Result<Self> {
        let home = frames.kept();
        let nodes = frames.places.slots();
        Ok(Self {
            tables: Tables::new(frames, home, model).ok_or(Errno::ENOMEM)?,
            frames: frames.clone(),
            what,
            model,
            home,
            gates: Gates::new(nodes),
            list: List::new(regions),
            copies: (0..nodes).map(|_| Once::new()).collect(),
        })
    }

    /// Settles a fault on a node, if that takes neither a file nor a copy:
    /// the page is there, or of zeros, or has become the caller's alone.
    /// Returns the frame; `None` says nothing.
    pub(crate) fn fault(&self, node: usize, address: u64, access: Access) -> Option<Frame> {
        if address >= USER_END || self.frames.available() <= RESERVED_FRAMES / 2 {
            return None;
        }
        let page = page_down(address);
        let _inside = self.gates.enter(node);
        // One that has been put out would not be waited for. It stops at the
        // kernel's lock.
        if self.frames.places.losses.has_lost_node(node) {
            return None;
        }
        let found = self.list.read(node, |regions| regions.find(address))?;
        let (_, region) = found?;
        if !region.allows(access) {
            return None;
        }
        let leaf = self.find(node, page, region, access)?;
        let copied = self.copy(node, page, leaf, Supply::Own);
        copied.then_some(leaf.frame)
    }

    /// The same for a fault of the processor's.
    pub fn serve(&self, node: usize, address: u64, access: Access) -> bool {
        let served = self.fault(node, address, access).is_some();
        if served {
            self.count(node, |counts| &counts.alone);
        }
        served
    }

    /// Notes something that this node has done.
    pub(crate) fn count(
        &self,
        node: usize,
        which: impl Fn(&Counts) -> &core::sync::atomic::AtomicU64,
    ) {
        self.frames.places.count(node, which, 1);
    }

    /// The page in the tables, installed if need be. Behind a gate.
    fn find(&self, node: usize, page: u64, region: Region, access: Access) -> Option<Leaf> {
        let supply = match node == self.home {
            true => Supply::Own,
            false => Supply::None,
        };
        loop {
            let found = self.tables.get(&self.frames, page);
            let owned = |frame| owned(region, frame);
            let (leaf, fresh) = match found {
                Some(leaf) if leaf.allows(access) => return Some(leaf),
                // It was shared at a fork; the others have let go of it.
                Some(leaf)
                    if access == Access::Write
                        && region.sharing == Sharing::Private
                        && self.frames.is_exclusive(leaf.frame)
                        && !self.frames.is_lost(leaf.frame) =>
                {
                    (owned(leaf.frame), None)
                }
                None if region.backing == Backing::Zeros => {
                    let frame = self.frames.alloc_zeroed_on(node, self.what)?;
                    (owned(frame), Some(frame))
                }
                _ => return None,
            };
            let tables = &self.tables;
            let replaced = tables.replace(&self.frames, page, found, leaf, supply);
            if let (Err(_), Some(frame)) = (replaced, fresh) {
                self.frames.put_back(frame);
            }
            match replaced {
                Ok(()) => return Some(leaf),
                // Another was faster: with the same, or with more.
                Err(Refused::Changed) => {}
                Err(Refused::NoMemory) => return None,
            }
        }
    }

    /// Lets a node's processors use a page of the tables. Behind a gate.
    /// Whether there is memory for it.
    fn copy(&self, node: usize, page: u64, leaf: Leaf, supply: Supply) -> bool {
        let copy = self.copies[node].get();
        copy.is_none_or(|copy| copy.set(&self.frames, page, leaf, supply).is_some())
    }

    /// Installs a page that was made under the kernel's lock, in the place of
    /// what was `expected`; whether that was still there. The frame's use
    /// passes to the tables.
    pub(crate) fn install(
        &self,
        page: u64,
        expected: Option<Leaf>,
        leaf: Leaf,
    ) -> Result<(), Refused> {
        let node = self.frames.here();
        if expected.is_none_or(|old| old.frame == leaf.frame) {
            let _inside = self.gates.enter(node);
            let tables = &self.tables;
            tables.replace(&self.frames, page, expected, leaf, Supply::Any)?;
            // Without memory for it the processor faults again, and memory is
            // short for more than that.
            self.copy(node, page, leaf, Supply::Any);
            return Ok(());
        }
        let _closed = self.close_gates();
        let tables = &self.tables;
        tables.replace(&self.frames, page, expected, leaf, Supply::Any)?;
        self.clear_copies(page, page + 1);
        self.copy(node, page, leaf, Supply::Any);
        Ok(())
    }

    /// What its frames are for.
    pub(crate) fn what(&self) -> For {
        self.what
    }

    /// Where they come from.
    pub(crate) fn frames(&self) -> &Arc<Frames> {
        &self.frames
    }

    /// What is mapped at a page.
    pub(crate) fn get(&self, page: u64) -> Option<Leaf> {
        self.tables.get(&self.frames, page)
    }

    /// What a node's processors find at a page, if the node has tables of its
    /// own.
    #[cfg(test)]
    pub(crate) fn copied(&self, node: usize, page: u64) -> Option<Leaf> {
        self.copies[node].get()?.get(&self.frames, page)
    }

    /// A processor faults on a node, and is asleep behind the gate while it
    /// reads the regions.
    #[cfg(test)]
    pub(crate) fn sleep_inside(&self, node: usize, sleep: impl FnOnce()) {
        let _inside = self.gates.enter(node);
        self.list.read(node, |_| sleep());
    }

    /// Reads the regions.
    pub(crate) fn read<R>(&self, query: impl FnOnce(&Regions) -> R) -> R {
        let seen = self.list.read(self.frames.here(), query);
        seen.expect("who has the kernel's lock is not lost")
    }

    /// Makes a change that takes nothing away.
    pub(crate) fn change(&self, change: Change) -> Result<Applied> {
        let done = self.list.apply(self.frames.here(), change);
        done.unwrap_or_else(|| self.close().change(change))
    }

    /// Closes the gates: see [`Exclusive`].
    pub(crate) fn close(&self) -> Exclusive<'_> {
        Exclusive {
            pages: self,
            _closed: self.close_gates(),
        }
    }

    fn close_gates(&self) -> Closed<'_> {
        let losses = &self.frames.places.losses;
        self.gates.close(|node| losses.has_lost_node(node))
    }

    /// Takes in that nodes are lost; whether frames of this space are. Under
    /// the kernel's lock, which the nodes' processors don't have.
    pub(crate) fn lose(&self) -> bool {
        let exclusive = self.close();
        self.list.part_from_lost(&self.frames);
        let mut found = false;
        exclusive.update(0, USER_END, |_, leaf| {
            let is_lost = self.frames.is_lost(leaf.frame);
            found |= is_lost;
            Some(Leaf {
                readable: leaf.readable && !is_lost,
                ..leaf
            })
        });
        found
    }

    /// Those that are not lost.
    fn live_copies(&self) -> impl Iterator<Item = &Tables> {
        let copies = self.copies.iter().filter_map(Once::get);
        copies.filter(|copy| !copy.is_lost(&self.frames))
    }

    fn clear_copies(&self, start: u64, end: u64) {
        for copy in self.live_copies() {
            copy.update(&self.frames, start, end, |_, _| None);
        }
    }

    /// The page tables for a processor on a node. `spreads` says that threads
    /// on several nodes use them: then each has its own, and its replica of
    /// the regions.
    pub(crate) fn root(&self, node: usize, spreads: bool) -> Frame {
        if node == self.home || !(spreads || self.list.is_replicated()) {
            return self.tables.root();
        }
        if !self.list.is_replicated() {
            let _closed = self.close_gates();
            // Without memory for it, one list serves all.
            if !self.list.replicate(&self.frames) {
                return self.tables.root();
            }
        }
        if self.copies[node].get().is_none() {
            // The kernel's lock is held: nobody else makes one.
            let Some(copy) = Tables::new(&self.frames, node, self.model) else {
                return self.tables.root();
            };
            self.copies[node].call_once(|| copy);
        }
        let copy = self.copies[node].get();
        copy.map_or(self.tables.root(), Tables::root)
    }

    /// All page tables that processors may have loaded.
    pub(crate) fn roots(&self) -> impl Iterator<Item = u64> {
        let copies = self.copies.iter().filter_map(Once::get);
        [&self.tables]
            .into_iter()
            .chain(copies)
            .map(|tables| tables.root().0)
    }

    /// Changes that each node's replica of the regions has applied.
    pub(crate) fn applied(&self) -> impl Iterator<Item = (usize, u64)> {
        self.list.applied()
    }

    /// Gives all tables back. The log goes with the last who knows these
    /// pages. Nothing is mapped any more, and no
    /// processor has the tables loaded or is in [`Pages::serve`].
    pub(crate) fn free(&self) {
        self.tables.free(&self.frames);
        for copy in self.live_copies() {
            copy.free(&self.frames);
        }
    }
}

/// A page of the region's own.
pub(crate) fn owned(region: Region, frame: Frame) -> Leaf {
    Leaf {
        frame,
        readable: true,
        writable: region.prot.contains(Prot::WRITE),
        executable: region.prot.contains(Prot::EXECUTE),
    }
}

/// The pages with all gates closed.
pub(crate) struct Exclusive<'a> {
    pages: &'a Pages,
    _closed: Closed<'a>,
}

impl Exclusive<'_> {
    /// Makes a change.
    pub(crate) fn change(&self, change: Change) -> Result<Applied> {
        self.pages.list.apply_alone(&self.pages.frames, change)
    }

    /// Calls `change` for each page from `start` to `end`; what it returns is
    /// mapped instead.
    pub(crate) fn update(
        &self,
        start: u64,
        end: u64,
        change: impl FnMut(u64, Leaf) -> Option<Leaf>,
    ) {
        let pages = self.pages;
        pages.tables.update(&pages.frames, start, end, change);
        pages.clear_copies(start, end);
    }

    /// Maps a page; returns what was there, whose use is the caller's; `None`
    /// if memory is short.
    pub(crate) fn set(&self, page: u64, leaf: Leaf) -> Option<Option<Leaf>> {
        self.pages.clear_copies(page, page + 1);
        let tables = &self.pages.tables;
        tables.set(&self.pages.frames, page, leaf, Supply::Any)
    }
}
