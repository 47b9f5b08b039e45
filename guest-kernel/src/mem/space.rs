//! A program's address space, as the kernel changes it under its lock.
//!
//! What faults need is in [`Pages`], which they use without the lock.

use alloc::sync::Arc;
use alloc::vec::Vec;

use vmm_shared::addr::PAGE_SIZE;

use super::frames::{For, Frame, Frames};
use super::pages::{Pages, owned};
use super::regions::{Access, Applied, Backing, Change, Prot, Region, Regions, Sharing};
use super::tables::{Leaf, Refused, USER_END};
use super::{PAGE, index, page_down, page_up};
use crate::errno::{Errno, Result};
use crate::fs::node::{Objects, Use};

/// End of the stack.
pub(crate) const STACK_TOP: u64 = USER_END;
/// Pages flushed one by one; above that, all are.
const MOST_FLUSHES: usize = 16;

/// Why memory can't be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing is mapped there.
    Unmapped,
    /// It is not allowed.
    Denied,
    /// A file that is shorter than its mapping.
    BeyondEnd,
    /// It was in the memory of a node that is lost.
    Lost,
    /// There is no memory.
    NoMemory,
}

/// What processors must forget before the program goes on: see
/// [`Kernel::run_next`](crate::Kernel::run_next).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Flush {
    /// Nothing.
    #[default]
    None,
    /// The translations of these pages.
    Pages(Vec<u64>),
    /// All translations of this address space.
    All,
}

impl Flush {
    fn page(&mut self, address: u64) {
        match self {
            Self::None => *self = Self::Pages(alloc::vec![address]),
            Self::Pages(pages) if pages.len() < MOST_FLUSHES => pages.push(address),
            _ => *self = Self::All,
        }
    }
}

/// An address space.
#[derive(Debug)]
pub(crate) struct Space {
    pages: Arc<Pages>,
    pub(crate) flush: Flush,
    /// Processes and threads that use it.
    pub(crate) uses: u32,
    /// No other processor can be using it: it is one thread's.
    pub(crate) alone: bool,
}

/// Does what a change means for files. Uses are taken before others are given
/// back, so that no file goes away in between.
fn settle_uses(objects: &mut Objects, done: &Applied) {
    for node in &done.held {
        objects.hold(*node);
    }
    for node in &done.released {
        objects.release(*node);
    }
}

impl Space {
    /// An empty address space with the kernel in it, as in `model`.
    pub(crate) fn new(frames: &Arc<Frames>, model: Frame, what: For) -> Result<Self> {
        Self::with(frames, model, what, Regions::default())
    }

    fn with(frames: &Arc<Frames>, model: Frame, what: For, regions: Regions) -> Result<Self> {
        Ok(Self {
            pages: Arc::new(Pages::new(frames, model, what, regions)?),
            flush: Flush::None,
            uses: 1,
            alone: true,
        })
    }

    /// What faults need of it.
    pub(crate) fn pages(&self) -> &Arc<Pages> {
        &self.pages
    }

    /// The region that holds an address, with its start.
    pub(crate) fn region(&self, address: u64) -> Option<(u64, Region)> {
        self.pages.read(|regions| regions.find(address))
    }

    /// The nearest region at or above an address.
    pub(crate) fn next_region(&self, address: u64) -> Option<(u64, Region)> {
        self.pages.read(|regions| regions.next(address))
    }

    /// All regions, with their starts.
    pub(crate) fn regions(&self) -> Vec<(u64, Region)> {
        self.pages.read(|regions| regions.iter().collect())
    }

    /// Bytes mapped.
    pub(crate) fn size(&self) -> u64 {
        self.pages.read(Regions::size)
    }

    /// Start and end of the heap.
    pub(crate) fn heap(&self) -> (u64, u64) {
        self.pages.read(Regions::heap)
    }

    /// A new heap, empty.
    pub(crate) fn set_heap(&mut self, start: u64) {
        let done = self.pages.change(Change::SetHeap(start, start));
        done.expect("a heap may be anywhere");
    }

    /// Maps `len` bytes, a multiple of a page: at `wanted` if that is free or
    /// nowhere special, replacing what is there if `fixed`. Takes over a use
    /// of the file.
    pub(crate) fn map(
        &mut self,
        objects: &mut Objects,
        wanted: Option<u64>,
        fixed: bool,
        len: u64,
        region: Region,
    ) -> Result<u64> {
        let change = Change::Map {
            wanted,
            fixed,
            len,
            region,
        };
        let done = match wanted {
            Some(start) if fixed => self.take_away(change, start, len)?,
            _ => self.pages.change(change)?,
        };
        settle_uses(objects, &done);
        Ok(done.at)
    }

    /// Unmaps whatever is in a range.
    pub(crate) fn unmap(&mut self, objects: &mut Objects, start: u64, len: u64) -> Result<()> {
        let done = self.take_away(Change::Unmap { start, len }, start, len)?;
        settle_uses(objects, &done);
        Ok(())
    }

    /// Makes a change by which nothing of before is left in a range.
    fn take_away(&mut self, change: Change, start: u64, len: u64) -> Result<Applied> {
        let exclusive = self.pages.close();
        let done = exclusive.change(change)?;
        let (flush, frames) = (&mut self.flush, self.pages.frames());
        exclusive.update(start, start + len, |address, leaf| {
            frames.release(leaf.frame);
            flush.page(address);
            None
        });
        Ok(done)
    }

    /// Forgets the pages in a range: private changes are lost.
    pub(crate) fn discard(&mut self, start: u64, end: u64) {
        let (flush, frames) = (&mut self.flush, self.pages.frames());
        self.pages.close().update(start, end, |address, leaf| {
            frames.release(leaf.frame);
            flush.page(address);
            None
        });
    }

    /// Changes what may be done with a range, all of which must be mapped.
    pub(crate) fn protect(
        &mut self,
        objects: &mut Objects,
        start: u64,
        len: u64,
        prot: Prot,
    ) -> Result<()> {
        let exclusive = self.pages.close();
        let done = exclusive.change(Change::Protect { start, len, prot })?;
        let (flush, frames) = (&mut self.flush, self.pages.frames());
        exclusive.update(start, start + len, |address, leaf| {
            let new = Leaf {
                readable: !prot.is_empty() && !frames.is_lost(leaf.frame),
                writable: leaf.writable && prot.contains(Prot::WRITE),
                executable: prot.contains(Prot::EXECUTE),
                ..leaf
            };
            if new != leaf {
                flush.page(address);
            }
            Some(new)
        });
        drop(exclusive);
        settle_uses(objects, &done);
        Ok(())
    }

    /// Makes a page accessible, if that is allowed.
    pub(crate) fn fault(
        &mut self,
        objects: &mut Objects,
        address: u64,
        access: Access,
    ) -> Result<Frame, Fault> {
        let here = objects.frames.here();
        if let Some(frame) = self.pages.fault(here, address, access) {
            return Ok(frame);
        }
        let page = page_down(address);
        let (start, region) = match self.region(address) {
            Some(found) => found,
            None => {
                let grown = self.pages.change(Change::Grow(address));
                let found = grown.ok().and_then(|_| self.region(address));
                found.ok_or(Fault::Unmapped)?
            }
        };
        if !region.allows(access) {
            return Err(Fault::Denied);
        }
        loop {
            let mapped = self.pages.get(page);
            if let Some(leaf) = mapped
                && leaf.allows(access)
            {
                return Ok(leaf.frame);
            }
            let what = self.pages.what();
            let mut leaf = make_page(objects, what, (start, region), page, access, mapped)?;
            let frame = leaf.frame;
            // It may have been copied from there, too. A file's page has come
            // anew if it could.
            let is_files = region.sharing == Sharing::Shared;
            if !is_files && mapped.is_some_and(|old| objects.frames.is_lost(old.frame)) {
                objects.frames.release(frame);
                return Err(Fault::Lost);
            }
            let moved = mapped.filter(|old| old.frame != frame);
            // Another processor may still read the old frame. Nobody writes
            // the new one before all have been told: it faults again then.
            leaf.writable &= moved.is_none() || self.alone;
            match self.pages.install(page, mapped, leaf) {
                Ok(()) => {
                    if let Some(old) = mapped {
                        objects.frames.release(old.frame);
                    }
                    // More rights to the same frame need no word to others:
                    // at worst they fault and look again.
                    if moved.is_some() {
                        self.flush.page(page);
                    }
                    return Ok(frame);
                }
                // A fault without the lock was faster.
                Err(Refused::Changed) => objects.frames.release(frame),
                Err(Refused::NoMemory) => {
                    objects.frames.release(frame);
                    return Err(Fault::NoMemory);
                }
            }
        }
    }

    /// A page of the program's, made accessible to the kernel as it is to the
    /// program.
    fn frame(&mut self, objects: &mut Objects, address: u64, access: Access) -> Result<Frame> {
        if address >= USER_END {
            return Err(Errno::EFAULT);
        }
        if let Some(leaf) = self.pages.get(page_down(address))
            && leaf.readable
            && (access == Access::Read || leaf.writable || self.owns(objects, address, leaf))
        {
            return Ok(leaf.frame);
        }
        self.fault(objects, address, access)
            .map_err(|_| Errno::EFAULT)
    }

    /// Whether a page that programs can't write yet is theirs all the same:
    /// see where [`Space::fault`] takes the right away.
    fn owns(&self, objects: &Objects, address: u64, leaf: Leaf) -> bool {
        let writes = |(_, region): (u64, Region)| {
            region.sharing == Sharing::Private && region.allows(Access::Write)
        };
        objects.frames.is_exclusive(leaf.frame) && self.region(address).is_some_and(writes)
    }

    /// The frame that the word of memory at an address is in.
    pub(crate) fn word(
        &mut self,
        objects: &mut Objects,
        address: u64,
        access: Access,
    ) -> Result<Frame> {
        if !address.is_multiple_of(4) {
            return Err(Errno::EINVAL);
        }
        self.frame(objects, address, access)
    }

    /// Copies a program's memory.
    pub(crate) fn read(
        &mut self,
        objects: &mut Objects,
        address: u64,
        into: &mut [u8],
    ) -> Result<()> {
        let mut done = 0;
        while done < into.len() {
            let at = address.checked_add(done as u64).ok_or(Errno::EFAULT)?;
            let frame = self.frame(objects, at, Access::Read)?;
            let within = index(at % PAGE_SIZE);
            let count = (PAGE - within).min(into.len() - done);
            objects
                .frames
                .page(frame)
                .read_bytes(within, &mut into[done..done + count])
                .expect("inside the page");
            if objects.frames.is_lost(frame) {
                return Err(Errno::EFAULT);
            }
            done += count;
        }
        Ok(())
    }

    /// Changes a program's memory.
    pub(crate) fn write(&mut self, objects: &mut Objects, address: u64, from: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < from.len() {
            let at = address.checked_add(done as u64).ok_or(Errno::EFAULT)?;
            let frame = self.frame(objects, at, Access::Write)?;
            let within = index(at % PAGE_SIZE);
            let count = (PAGE - within).min(from.len() - done);
            objects
                .frames
                .page(frame)
                .write_bytes(within, &from[done..done + count])
                .expect("inside the page");
            if objects.frames.is_lost(frame) {
                return Err(Errno::EFAULT);
            }
            done += count;
        }
        Ok(())
    }

    /// A copy for a child: private pages are shared until one side writes.
    pub(crate) fn fork(&mut self, objects: &mut Objects, model: Frame) -> Result<Self> {
        let regions = self.pages.read(Regions::clone);
        let child = Self::with(&objects.frames, model, For::Data, regions)?;
        let frames = objects.frames.clone();
        let mut short = false;
        let exclusive = self.pages.close();
        for (start, region) in child.regions() {
            if let Backing::File(node, _) = region.backing {
                objects.hold(node);
                if region.sharing == Sharing::Shared {
                    // The child finds these pages by the file.
                    continue;
                }
            }
            exclusive.update(start, region.end, |at, leaf| {
                let shared = Leaf {
                    writable: false,
                    ..leaf
                };
                frames.share(leaf.frame);
                if child.pages.install(at, None, shared).is_err() {
                    frames.release(leaf.frame);
                    short = true;
                }
                Some(shared)
            });
        }
        drop(exclusive);
        self.flush = Flush::All;
        if short {
            child.free(objects);
            return Err(Errno::ENOMEM);
        }
        Ok(child)
    }

    /// Moves a region's pages to another place that is mapped alike.
    pub(crate) fn move_pages(&mut self, from: u64, to: u64, len: u64) {
        let mut pages = Vec::new();
        let (flush, frames) = (&mut self.flush, self.pages.frames());
        let exclusive = self.pages.close();
        exclusive.update(from, from + len, |at, leaf| {
            pages.push((at, leaf));
            flush.page(at);
            None
        });
        for (at, leaf) in pages {
            match exclusive.set(to + (at - from), leaf) {
                Some(None) => {}
                // Touched before the program knew that it is there.
                Some(Some(old)) => {
                    frames.release(old.frame);
                    flush.page(to + (at - from));
                }
                None => frames.release(leaf.frame),
            }
        }
    }

    /// Whether the page at an address is lost.
    pub(crate) fn has_lost(&self, address: u64) -> bool {
        let mapped = self.pages.get(page_down(address));
        mapped.is_some_and(|leaf| self.pages.frames().is_lost(leaf.frame))
    }

    /// Takes in that nodes are lost.
    pub(crate) fn lose(&mut self) {
        if self.pages.lose() {
            self.flush = Flush::All;
        }
    }

    /// Gives everything back.
    pub(crate) fn free(mut self, objects: &mut Objects) {
        // Region by region: the holes between them are most of the range.
        for (start, region) in self.regions() {
            self.unmap(objects, start, region.end - start)
                .expect("a region is a legal range");
        }
        self.pages.free();
    }

    /// Moves the end of the heap; returns where it is then.
    pub(crate) fn set_heap_end(&mut self, objects: &mut Objects, end: u64) -> u64 {
        let (_, old) = self.heap();
        let change = Change::MoveHeap(end);
        let done = match (page_up(old), page_up(end)) {
            (Some(from), Some(to)) if to < from => self.take_away(change, to, from - to),
            _ => self.pages.change(change),
        };
        done.map_or(old, |done| {
            settle_uses(objects, &done);
            done.at
        })
    }
}

/// The page to map, with a use for the mapping.
fn make_page(
    objects: &mut Objects,
    what: For,
    (start, region): (u64, Region),
    page: u64,
    access: Access,
    mapped: Option<Leaf>,
) -> Result<Leaf, Fault> {
    let private_write = access == Access::Write && region.sharing == Sharing::Private;
    let owned = |frame| owned(region, frame);
    // A private page that was shared at a fork, or is still the file's.
    if private_write && let Some(old) = mapped {
        if objects.frames.is_exclusive(old.frame) {
            objects.frames.share(old.frame);
            return Ok(owned(old.frame));
        }
        let copy = objects.frames.alloc_copy(old.frame, what);
        return copy.map(owned).ok_or(Fault::NoMemory);
    }
    let (node, offset) = match region.from(start, page).backing {
        Backing::Zeros => {
            let frame = objects.frames.alloc_zeroed(what);
            return frame.map(owned).ok_or(Fault::NoMemory);
        }
        Backing::File(node, offset) => (node, offset),
    };
    if offset >= objects.node(node).size() {
        return Err(Fault::BeyondEnd);
    }
    let number = offset / PAGE_SIZE;
    if region.sharing == Sharing::Shared {
        let how = match access {
            Access::Write => Use::Write,
            Access::Read | Access::Execute => Use::Read,
        };
        let frame = objects.own_page(node, number, how);
        let frame = frame.map_err(|errno| match errno {
            Errno::EIO => Fault::Lost,
            _ => Fault::NoMemory,
        })?;
        objects.frames.share(frame);
        // The first write is to be noticed.
        return Ok(Leaf {
            writable: how == Use::Write,
            ..owned(frame)
        });
    }
    let file_page = objects.page(node, number);
    let frame = match (file_page, private_write) {
        (Some(frame), _) if objects.frames.is_lost(frame) => return Err(Fault::Lost),
        (Some(frame), false) => {
            objects.frames.share(frame);
            return Ok(Leaf {
                frame,
                readable: true,
                writable: false,
                executable: region.prot.contains(Prot::EXECUTE),
            });
        }
        (Some(frame), true) => objects.frames.alloc_copy(frame, what),
        (None, _) => objects.frames.alloc_zeroed(what),
    };
    frame.map(owned).ok_or(Fault::NoMemory)
}

#[cfg(test)]
mod tests {
    use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use super::super::frames::testing::frames_of_nodes;
    use super::super::regions::testing::zeros;
    use super::*;
    use crate::kernel::RESERVED_FRAMES;

    const RW: Prot = Prot::READ.union(Prot::WRITE);
    const PAGES: u64 = 64;
    const BYTES: u64 = PAGES * PAGE_SIZE;
    const AT: u64 = 0x4000_0000;
    /// Frames of each node.
    const EACH: usize = RESERVED_FRAMES + 2048;

    /// The kernel's side of two nodes with memory for all, and a model root.
    fn kernel(nodes: u32) -> (Objects, Frame) {
        let frames = frames_of_nodes(nodes, EACH);
        let model = frames.alloc_zeroed(For::Data).expect("some");
        (Objects::new(frames), model)
    }

    fn map(space: &mut Space, objects: &mut Objects, prot: Prot) {
        let mapped = space.map(objects, Some(AT), true, BYTES, zeros(prot));
        assert_eq!(mapped, Ok(AT));
    }

    #[test]
    fn a_fault_gives_what_the_region_allows() {
        let (mut objects, model) = kernel(1);
        let mut space = Space::new(&objects.frames, model, For::Data).expect("memory");
        map(&mut space, &mut objects, RW);
        let before = objects.frames.available();
        let pages = space.pages().clone();
        assert!(!pages.serve(0, AT - 1, Access::Read), "nothing is there");
        assert!(!pages.serve(0, AT + BYTES, Access::Read), "nor behind it");
        assert!(!pages.serve(0, USER_END, Access::Read), "nor in the kernel");
        assert!(!pages.serve(0, AT, Access::Execute));
        assert!(pages.serve(0, AT + 5, Access::Write));
        assert!(pages.serve(0, AT + 5, Access::Read), "it is there by now");
        // Three tables and a page.
        assert_eq!(before - objects.frames.available(), 4);
        let fault = |space: &mut Space, objects: &mut Objects, address, access| {
            space.fault(objects, address, access).map(|_| ())
        };
        let got = fault(&mut space, &mut objects, AT, Access::Execute);
        assert_eq!(got, Err(Fault::Denied));
        let got = fault(&mut space, &mut objects, AT - 1, Access::Read);
        assert_eq!(got, Err(Fault::Unmapped));
        space
            .protect(&mut objects, AT, BYTES, Prot::empty())
            .expect("mapped");
        assert!(!pages.serve(0, AT, Access::Read));
        space.protect(&mut objects, AT, BYTES, RW).expect("mapped");
        assert!(pages.serve(0, AT, Access::Write), "its page was kept");
        assert_eq!(before - objects.frames.available(), 4);
    }

    #[test]
    fn after_a_fork_each_side_writes_its_own() {
        let (mut objects, model) = kernel(1);
        let free = objects.frames.available();
        let mut parent = Space::new(&objects.frames, model, For::Data).expect("memory");
        map(&mut parent, &mut objects, RW);
        parent.write(&mut objects, AT, b"parent").expect("mapped");
        let mut child = parent.fork(&mut objects, model).expect("memory");
        assert_eq!(parent.flush, Flush::All);
        // The page is shared: a write takes the kernel's lock and a copy.
        assert!(!child.pages().serve(0, AT, Access::Write));
        child.write(&mut objects, AT, b"child!").expect("mapped");
        let mut seen = [0; 6];
        parent.read(&mut objects, AT, &mut seen).expect("mapped");
        assert_eq!(&seen, b"parent");
        // The child has let go of it: it is the parent's alone.
        assert!(parent.pages().serve(0, AT, Access::Write));
        child.free(&mut objects);
        parent.free(&mut objects);
        objects.frames.settle();
        assert_eq!(objects.frames.available(), free);
    }

    #[test]
    fn a_copy_made_while_others_run_is_writable_at_the_next_fault() {
        let (mut objects, model) = kernel(1);
        let mut parent = Space::new(&objects.frames, model, For::Data).expect("memory");
        map(&mut parent, &mut objects, RW);
        parent.write(&mut objects, AT, b"x").expect("mapped");
        let child = parent.fork(&mut objects, model).expect("memory");
        parent.alone = false;
        parent.flush = Flush::None;
        parent.write(&mut objects, AT, b"y").expect("mapped");
        assert_eq!(parent.flush, Flush::Pages(vec![AT]));
        let leaf = parent.pages().get(AT).expect("mapped");
        assert!(!leaf.writable, "others still read the old page");
        parent.write(&mut objects, AT, b"z").expect("mapped");
        assert_eq!(parent.pages().get(AT), Some(leaf));
        assert!(parent.pages().serve(0, AT, Access::Write));
        let now = parent.pages().get(AT).expect("mapped");
        assert_eq!((now.frame, now.writable), (leaf.frame, true));
        child.free(&mut objects);
    }

    #[test]
    fn nodes_have_tables_of_their_own_and_read_their_own_replicas() {
        let (mut objects, model) = kernel(2);
        let free = objects.frames.available();
        let mut space = Space::new(&objects.frames, model, For::Data).expect("memory");
        map(&mut space, &mut objects, RW);
        space.set_heap(AT + (1 << 30));
        let pages = space.pages().clone();
        let home = pages.root(0, false);
        assert_eq!(pages.root(1, false), home, "one thread uses one set");
        let far = pages.root(1, true);
        assert_ne!(far, home);
        assert_eq!(pages.root(1, false), far, "for good");
        assert_eq!(pages.root(0, true), home);
        assert_eq!(space.heap().0, AT + (1 << 30));
        let frame = pages.fault(0, AT, Access::Write).expect("served");
        assert_eq!(pages.fault(1, AT, Access::Read), Some(frame), "one page");
        space.unmap(&mut objects, AT, BYTES).expect("legal");
        for node in 0..2 {
            assert_eq!(pages.fault(node, AT, Access::Read), None);
        }
        // More changes than the log holds, none of them looked at by node 1.
        for round in 0..2000 {
            map(&mut space, &mut objects, RW);
            assert_eq!(space.size(), BYTES, "round {round}");
            space.unmap(&mut objects, AT, BYTES).expect("legal");
        }
        assert_eq!(pages.fault(1, AT, Access::Read), None);
        map(&mut space, &mut objects, Prot::READ);
        assert!(pages.fault(1, AT, Access::Read).is_some());
        let applied: Vec<_> = pages.applied().collect();
        assert_eq!(applied[0].1, applied[1].1, "both have seen all");
        space.free(&mut objects);
        drop(pages);
        objects.frames.settle();
        assert_eq!(objects.frames.available(), free);
    }

    /// A program on the kept node takes more memory than there is, and goes on
    /// with another's; page tables and process 1 don't.
    #[test]
    fn programs_leave_the_machine_its_reserve() {
        let (mut objects, model) = kernel(2);
        let pages = EACH as u64 * 4 / 3;
        let is_far = |frame: Frame| frame.0 >= EACH as u64 * PAGE_SIZE;
        let mut space = Space::new(&objects.frames, model, For::Data).expect("memory");
        let region = zeros(RW);
        let mapped = space.map(&mut objects, Some(AT), true, pages * PAGE_SIZE, region);
        assert_eq!(mapped, Ok(AT));
        let mut touch = |page| {
            let frame = space.fault(&mut objects, AT + page * PAGE_SIZE, Access::Write);
            frame.expect("there is other memory")
        };
        let frames: Vec<_> = (0..pages).map(&mut touch).collect();
        assert!(!is_far(frames[0]) && is_far(frames[pages as usize - 1]));
        let mut init = Space::new(&objects.frames, model, For::Machine).expect("memory");
        map(&mut init, &mut objects, RW);
        let frame = init.pages().fault(0, AT, Access::Read).expect("memory");
        assert!(!is_far(frame), "without the kernel's lock");
        let child = init.fork(&mut objects, model).expect("memory");
        let frame = init.fault(&mut objects, AT, Access::Write).expect("memory");
        assert!(!is_far(frame), "and with it");
        assert!(!child.pages().roots().any(|root| is_far(Frame(root))));
    }

    /// Threads on two nodes fault while one, as if it had the kernel's lock,
    /// maps, unmaps, protects and forks. Whenever nothing is mapped, nothing
    /// is there; in the end every frame is back.
    #[test]
    fn faults_and_changes_at_once_leave_nothing_behind() {
        let (mut objects, model) = kernel(2);
        let free = objects.frames.available();
        let mut space = Space::new(&objects.frames, model, For::Data).expect("memory");
        let pages = space.pages().clone();
        assert_ne!(pages.root(1, true), pages.root(0, true));
        let (stop, served) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let (pages, stop, served) = (pages.clone(), &stop, &served);
                scope.spawn(move || {
                    let mut at = thread;
                    while !stop.load(Ordering::Relaxed) {
                        at = (at * 29 + 7) % PAGES;
                        let access = match at % 2 {
                            0 => Access::Read,
                            _ => Access::Write,
                        };
                        let node = usize::from(thread % 2 == 1);
                        if pages.serve(node, AT + at * PAGE_SIZE, access) {
                            served.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
            for round in 0..60 {
                map(&mut space, &mut objects, RW);
                let enough = served.load(Ordering::Relaxed) + 20;
                while served.load(Ordering::Relaxed) < enough {
                    std::thread::yield_now();
                }
                let half = BYTES / 2;
                space
                    .protect(&mut objects, AT, half, Prot::READ)
                    .expect("mapped");
                for page in 0..PAGES / 2 {
                    let leaf = pages.get(AT + page * PAGE_SIZE);
                    assert!(leaf.is_none_or(|leaf| !leaf.writable), "round {round}");
                }
                let child = space.fork(&mut objects, model).expect("memory");
                space
                    .fault(&mut objects, AT + half, Access::Write)
                    .expect("mapped");
                child.free(&mut objects);
                space.unmap(&mut objects, AT, BYTES).expect("legal");
                for page in 0..PAGES {
                    let page = AT + page * PAGE_SIZE;
                    assert_eq!(pages.get(page), None, "round {round}");
                    assert_eq!(pages.copied(1, page), None, "round {round}");
                }
                objects.frames.settle();
            }
            stop.store(true, Ordering::Relaxed);
        });
        space.free(&mut objects);
        drop(pages);
        objects.frames.settle();
        assert_eq!(objects.frames.available(), free);
    }
}
