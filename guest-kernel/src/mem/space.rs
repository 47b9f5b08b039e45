//! A program's address space: regions, and the page tables that cache them.
//!
//! Regions change only by the calls here, each a function of the regions and
//! its arguments alone, the choice of addresses included. Which frame backs a
//! page is no part of that: it is settled when the page is touched.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::Bound;

use bitflags::bitflags;
use vmm_shared::addr::PAGE_SIZE;
use vmm_shared::shm::SharedMem;

use super::frames::{Frame, Frames};
use super::tables::{Leaf, Tables, USER_END};
use super::{PAGE, index, page_down, page_up};
use crate::errno::{Errno, Result};
use crate::fs::node::{NodeId, Objects};

/// Lowest address that is ever mapped.
pub(crate) const USER_START: u64 = 0x1_0000;
/// Mappings are placed below this, from the top down; the stack lies above.
pub(crate) const MAP_TOP: u64 = 0x7fff_f000_0000;
/// End of the stack.
pub(crate) const STACK_TOP: u64 = USER_END;
/// How far the stack may grow down.
const STACK_LIMIT: u64 = 8 << 20;
/// Most regions of one address space.
const MOST_REGIONS: usize = 65_530;
/// Pages flushed one by one; above that, all are.
const MOST_FLUSHES: usize = 16;

bitflags! {
    /// What a program may do with memory.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Prot: u8 {
        const READ = 1;
        const WRITE = 2;
        const EXECUTE = 4;
    }
}

/// What a region shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// Zeros, until written.
    Zeros,
    /// A file, from this offset on.
    File(NodeId, u64),
}

/// What a region is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    Mapping,
    Heap,
    /// Grows down when touched below its start.
    Stack,
}

/// Who else sees what is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    Private,
    Shared,
}

/// Addresses that are mapped alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) end: u64,
    pub(crate) prot: Prot,
    pub(crate) sharing: Sharing,
    pub(crate) backing: Backing,
    pub(crate) purpose: Purpose,
}

impl Region {
    /// The part from `at` on, for a region that starts at `start`.
    fn from(self, start: u64, at: u64) -> Self {
        let backing = match self.backing {
            Backing::Zeros => Backing::Zeros,
            Backing::File(node, offset) => Backing::File(node, offset + (at - start)),
        };
        Self { backing, ..self }
    }
}

/// How memory is accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    Execute,
}

/// Why memory can't be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing is mapped there.
    Unmapped,
    /// It is not allowed.
    Denied,
    /// A file that is shorter than its mapping.
    BeyondEnd,
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
    tables: Tables,
    pub(crate) regions: BTreeMap<u64, Region>,
    /// Start and end of the heap.
    pub(crate) heap: (u64, u64),
    pub(crate) flush: Flush,
    /// Processes and threads that use it.
    pub(crate) uses: u32,
}

impl Space {
    /// An empty address space with the kernel in it, as in `model`.
    pub(crate) fn new(frames: &mut Frames, model: Frame) -> Result<Self> {
        Ok(Self {
            tables: Tables::new(frames, model).ok_or(Errno::ENOMEM)?,
            regions: BTreeMap::new(),
            heap: (0, 0),
            flush: Flush::None,
            uses: 1,
        })
    }

    /// The value for CR3.
    pub(crate) fn root(&self) -> Frame {
        self.tables.root()
    }

    /// The region that holds an address, with its start.
    pub(crate) fn region(&self, address: u64) -> Option<(u64, Region)> {
        let (start, region) = self.regions.range(..=address).next_back()?;
        (address < region.end).then_some((*start, *region))
    }

    /// Whether nothing is mapped from `start` to `end`.
    fn is_free(&self, start: u64, end: u64) -> bool {
        let before = self.regions.range(..end).next_back();
        before.is_none_or(|(_, region)| region.end <= start)
    }

    /// The highest place below the mappings' top that has room.
    fn place(&self, len: u64) -> Result<u64> {
        let mut end = MAP_TOP;
        loop {
            let start = end
                .checked_sub(len)
                .filter(|start| *start >= USER_START)
                .ok_or(Errno::ENOMEM)?;
            match self.regions.range(..end).next_back() {
                Some((below, region)) if region.end > start => end = *below,
                _ => return Ok(start),
            }
        }
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
        if self.regions.len() >= MOST_REGIONS {
            return Err(Errno::ENOMEM);
        }
        let fits = |start: &u64| {
            let end = start.checked_add(len);
            *start >= USER_START && end.is_some_and(|end| end <= USER_END)
        };
        let start = match wanted {
            Some(start) if fixed => {
                if !fits(&start) {
                    return Err(Errno::ENOMEM);
                }
                self.unmap(objects, start, len)?;
                start
            }
            Some(start) if fits(&start) && self.is_free(start, start + len) => start,
            _ => self.place(len)?,
        };
        let region = Region {
            end: start + len,
            ..region
        };
        self.insert(objects, start, region);
        Ok(start)
    }

    /// Puts a region in, joined with the one below if they are alike.
    fn insert(&mut self, objects: &mut Objects, start: u64, region: Region) {
        if let Some((below, before)) = self.regions.range_mut(..start).next_back()
            && before.end == start
            && before.prot == region.prot
            && before.sharing == region.sharing
            && before.purpose == region.purpose
            && before.from(*below, start).backing == region.backing
            && before.sharing == Sharing::Private
        {
            before.end = region.end;
            // One region, one use.
            if let Backing::File(node, _) = region.backing {
                objects.release(node);
            }
            return;
        }
        self.regions.insert(start, region);
    }

    /// Makes region boundaries at `start` and `end`.
    fn split(&mut self, objects: &mut Objects, start: u64, end: u64) {
        for at in [start, end] {
            let Some((below, region)) = self.region(at) else {
                continue;
            };
            if below < at {
                if let Backing::File(node, _) = region.backing {
                    objects.hold(node);
                }
                self.regions.insert(at, region.from(below, at));
                if let Some(first) = self.regions.get_mut(&below) {
                    first.end = at;
                }
            }
        }
    }

    /// Unmaps whatever is in a range.
    pub(crate) fn unmap(&mut self, objects: &mut Objects, start: u64, len: u64) -> Result<()> {
        let end = start.checked_add(len).filter(|end| *end <= USER_END);
        let end = end.ok_or(Errno::EINVAL)?;
        self.split(objects, start, end);
        while let Some((at, region)) = self.regions.range(start..end).next() {
            let (at, region) = (*at, *region);
            self.regions.remove(&at);
            self.discard(&mut objects.frames, at, region.end);
            if let Backing::File(node, _) = region.backing {
                objects.release(node);
            }
        }
        Ok(())
    }

    /// Forgets the pages in a range: private changes are lost.
    pub(crate) fn discard(&mut self, frames: &mut Frames, start: u64, end: u64) {
        let flush = &mut self.flush;
        self.tables
            .update(frames, start, end, |frames, address, leaf| {
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
        let end = start.checked_add(len).filter(|end| *end <= USER_END);
        let end = end.ok_or(Errno::ENOMEM)?;
        let mut at = start;
        while at < end {
            let (_, region) = self.region(at).ok_or(Errno::ENOMEM)?;
            at = region.end;
        }
        self.split(objects, start, end);
        for (_, region) in self.regions.range_mut(start..end) {
            region.prot = prot;
        }
        let flush = &mut self.flush;
        self.tables
            .update(&mut objects.frames, start, end, |_, address, leaf| {
                let new = Leaf {
                    readable: !prot.is_empty(),
                    writable: leaf.writable && prot.contains(Prot::WRITE),
                    executable: prot.contains(Prot::EXECUTE),
                    ..leaf
                };
                if new != leaf {
                    flush.page(address);
                }
                Some(new)
            });
        Ok(())
    }

    /// Makes a page accessible, if that is allowed.
    pub(crate) fn fault(
        &mut self,
        objects: &mut Objects,
        address: u64,
        access: Access,
    ) -> Result<Frame, Fault> {
        let page = page_down(address);
        let (start, region) = match self.region(address) {
            Some(found) => found,
            None => self.grow_stack(address).ok_or(Fault::Unmapped)?,
        };
        let needed = match access {
            Access::Read => Prot::READ,
            Access::Write => Prot::WRITE,
            Access::Execute => Prot::EXECUTE,
        };
        // Writable or executable memory can be read, as on the processor.
        let readable = access == Access::Read && !region.prot.is_empty();
        if !region.prot.contains(needed) && !readable {
            return Err(Fault::Denied);
        }
        let mapped = self.tables.get(&objects.frames, page);
        if let Some(leaf) = mapped
            && leaf.readable
            && (access != Access::Write || leaf.writable)
            && (access != Access::Execute || leaf.executable)
        {
            // Another thread was faster. A processor that is behind forgets
            // the translation when it faults.
            return Ok(leaf.frame);
        }
        let leaf = self.make_page(objects, start, region, page, access, mapped)?;
        let frame = leaf.frame;
        match self.tables.set(&mut objects.frames, page, leaf) {
            Some(Some(old)) => {
                objects.frames.release(old.frame);
                // More rights to the same frame need no word to others: at
                // worst they fault and look again.
                if old.frame != frame {
                    self.flush.page(page);
                }
            }
            Some(None) => {}
            None => {
                objects.frames.release(frame);
                return Err(Fault::NoMemory);
            }
        }
        Ok(frame)
    }

    /// The page to map, with a use for the mapping.
    fn make_page(
        &self,
        objects: &mut Objects,
        start: u64,
        region: Region,
        page: u64,
        access: Access,
        mapped: Option<Leaf>,
    ) -> Result<Leaf, Fault> {
        let write = access == Access::Write;
        let executable = region.prot.contains(Prot::EXECUTE);
        let private_write = write && region.sharing == Sharing::Private;
        let owned = |frame| Leaf {
            frame,
            readable: true,
            writable: region.prot.contains(Prot::WRITE),
            executable,
        };
        // A private page that was shared at a fork, or is still the file's.
        if private_write && let Some(old) = mapped {
            if objects.frames.is_exclusive(old.frame) {
                objects.frames.share(old.frame);
                return Ok(owned(old.frame));
            }
            let copy = objects.frames.alloc_copy(old.frame);
            return copy.map(owned).ok_or(Fault::NoMemory);
        }
        let (node, offset) = match region.backing {
            Backing::Zeros => {
                let frame = objects.frames.alloc_zeroed();
                return frame.map(owned).ok_or(Fault::NoMemory);
            }
            Backing::File(node, offset) => (node, offset + (page - start)),
        };
        if offset >= objects.node(node).size() {
            return Err(Fault::BeyondEnd);
        }
        let number = offset / PAGE_SIZE;
        if region.sharing == Sharing::Shared {
            let frame = objects.own_page(node, number);
            let frame = frame.map_err(|_| Fault::NoMemory)?;
            objects.frames.share(frame);
            return Ok(owned(frame));
        }
        let file_page = objects.page(node, number);
        let frame = match (file_page, private_write) {
            (Some(frame), false) => {
                objects.frames.share(frame);
                return Ok(Leaf {
                    frame,
                    readable: true,
                    writable: false,
                    executable,
                });
            }
            (Some(frame), true) => objects.frames.alloc_copy(frame),
            (None, _) => objects.frames.alloc_zeroed(),
        };
        frame.map(owned).ok_or(Fault::NoMemory)
    }

    /// Extends the stack down to an address, if it may grow so far.
    fn grow_stack(&mut self, address: u64) -> Option<(u64, Region)> {
        let (start, region) = self.regions.range(address..).next()?;
        let (start, region) = (*start, *region);
        let page = page_down(address);
        let fits = region.purpose == Purpose::Stack
            && region.end - page <= STACK_LIMIT
            && self.is_free(page, start);
        if !fits {
            return None;
        }
        self.regions.remove(&start);
        self.regions.insert(page, region);
        Some((page, region))
    }

    /// A page of the program's, made accessible to the kernel as it is to the
    /// program.
    fn frame(&mut self, objects: &mut Objects, address: u64, access: Access) -> Result<Frame> {
        if address >= USER_END {
            return Err(Errno::EFAULT);
        }
        let mapped = self.tables.get(&objects.frames, page_down(address));
        if let Some(leaf) = mapped
            && leaf.readable
            && (access == Access::Read || leaf.writable)
        {
            return Ok(leaf.frame);
        }
        self.fault(objects, address, access)
            .map_err(|_| Errno::EFAULT)
    }

    /// The word of memory at an address, and the frame that it is in.
    pub(crate) fn word(
        &mut self,
        objects: &mut Objects,
        address: u64,
        access: Access,
    ) -> Result<(Frame, SharedMem)> {
        if !address.is_multiple_of(4) {
            return Err(Errno::EINVAL);
        }
        let frame = self.frame(objects, address, access)?;
        Ok((frame, objects.frames.page(frame)))
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
            done += count;
        }
        Ok(())
    }

    /// A copy for a child: private pages are shared until one side writes.
    pub(crate) fn fork(&mut self, objects: &mut Objects, model: Frame) -> Result<Self> {
        let mut child = Self::new(&mut objects.frames, model)?;
        child.heap = self.heap;
        child.regions = self.regions.clone();
        let mut short = false;
        for (start, region) in &self.regions {
            if let Backing::File(node, _) = region.backing {
                objects.hold(node);
                if region.sharing == Sharing::Shared {
                    // The child finds these pages by the file.
                    continue;
                }
            }
            let tables = &mut child.tables;
            self.tables.update(
                &mut objects.frames,
                *start,
                region.end,
                |frames, at, leaf| {
                    let shared = Leaf {
                        writable: false,
                        ..leaf
                    };
                    frames.share(leaf.frame);
                    if tables.set(frames, at, shared).is_none() {
                        frames.release(leaf.frame);
                        short = true;
                    }
                    Some(shared)
                },
            );
        }
        self.flush = Flush::All;
        if short {
            child.free(objects);
            return Err(Errno::ENOMEM);
        }
        Ok(child)
    }

    /// Moves a region's pages to another place that is mapped alike.
    pub(crate) fn move_pages(&mut self, frames: &mut Frames, from: u64, to: u64, len: u64) {
        let mut pages = Vec::new();
        let flush = &mut self.flush;
        self.tables.update(frames, from, from + len, |_, at, leaf| {
            pages.push((at, leaf));
            flush.page(at);
            None
        });
        for (at, leaf) in pages {
            if self.tables.set(frames, to + (at - from), leaf).is_none() {
                frames.release(leaf.frame);
            }
        }
    }

    /// Bytes mapped.
    pub(crate) fn size(&self) -> u64 {
        self.regions
            .iter()
            .map(|(start, region)| region.end - start)
            .sum()
    }

    /// Gives everything back.
    pub(crate) fn free(mut self, objects: &mut Objects) {
        self.clear(objects);
        self.tables.free(&mut objects.frames);
    }

    /// Unmaps everything.
    pub(crate) fn clear(&mut self, objects: &mut Objects) {
        self.unmap(objects, 0, USER_END)
            .expect("the whole range is legal");
    }

    /// Moves the end of the heap; returns where it is then.
    pub(crate) fn set_heap_end(&mut self, objects: &mut Objects, end: u64) -> u64 {
        let (start, old) = self.heap;
        let (Some(from), Some(to)) = (page_up(old), page_up(end)) else {
            return old;
        };
        if end < start {
            return old;
        }
        if to < from {
            let done = self.unmap(objects, to, from - to);
            if done.is_err() {
                return old;
            }
        } else if to > from {
            if to > MAP_TOP || !self.is_free(from, to) {
                return old;
            }
            let region = Region {
                end: to,
                prot: Prot::READ | Prot::WRITE,
                sharing: Sharing::Private,
                backing: Backing::Zeros,
                purpose: Purpose::Heap,
            };
            self.insert(objects, from, region);
        }
        self.heap.1 = end;
        end
    }

    /// The nearest region at or above an address.
    pub(crate) fn next_region(&self, address: u64) -> Option<(u64, Region)> {
        let bounds = (Bound::Included(address), Bound::Unbounded);
        let (start, region) = self.regions.range(bounds).next()?;
        Some((*start, *region))
    }
}
