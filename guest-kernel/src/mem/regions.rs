//! What is mapped where: a deterministic state machine.
//!
//! It changes by [`Change`]s alone, and what one does is a function of the
//! regions and its arguments, the choice of addresses included. So replicas
//! that are given the same changes in the same order are equal; see
//! [`super::list`]. Which frame backs a page is no part of it.
//!
//! What a change means for others (uses of files) is not done here: it is in
//! the answer, for the one that has asked for the change.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::Bound;

use bitflags::bitflags;
use vmm_shared::addr::PAGE_SIZE;

use super::tables::USER_END;
use super::{page_down, page_up};
use crate::errno::{Errno, Result};
use crate::fs::node::NodeId;

/// Lowest address that is ever mapped.
const USER_START: u64 = 0x1_0000;
/// Mappings are placed below this, from the top down; the stack lies above.
const MAP_TOP: u64 = 0x7fff_f000_0000;
/// How far the stack may grow down.
const STACK_LIMIT: u64 = 8 << 20;
/// Most regions of one address space.
const MOST_REGIONS: usize = 65_530;

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

/// How memory is accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A load.
    Read,
    /// A store, or a load with one.
    Write,
    /// An instruction.
    Execute,
}

impl Region {
    /// The part from `at` on, for a region that starts at `start`.
    pub(crate) fn from(self, start: u64, at: u64) -> Self {
        let backing = match self.backing {
            Backing::Zeros => Backing::Zeros,
            Backing::File(node, offset) => {
                Backing::File(node, offset.wrapping_add(at.wrapping_sub(start)))
            }
        };
        Self { backing, ..self }
    }

    /// Whether a program may do that here.
    pub(crate) fn allows(&self, access: Access) -> bool {
        match access {
            // Writable or executable memory can be read, as on the processor.
            Access::Read => !self.prot.is_empty(),
            Access::Write => self.prot.contains(Prot::WRITE),
            Access::Execute => self.prot.contains(Prot::EXECUTE),
        }
    }
}

/// A change of the regions. Addresses and lengths are multiples of a page, or
/// it is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Map `len` bytes: at `wanted` if that is free or nowhere special,
    /// replacing what is there if `fixed`.
    Map {
        wanted: Option<u64>,
        fixed: bool,
        len: u64,
        region: Region,
    },
    /// Unmap whatever is in a range.
    Unmap { start: u64, len: u64 },
    /// Change what may be done with a range, all of which must be mapped.
    Protect { start: u64, len: u64, prot: Prot },
    /// A new heap, start and end.
    SetHeap(u64, u64),
    /// Move the end of the heap.
    MoveHeap(u64),
    /// Extend the stack down to an address.
    Grow(u64),
    /// A region as it is: into a list that is being copied.
    Put(u64, Region),
}

impl Change {
    /// Whether its numbers can be meant: of those that come from a log that
    /// cannot be said.
    fn is_sound(&self) -> bool {
        let whole = |all: &[u64]| all.iter().all(|number| number.is_multiple_of(PAGE_SIZE));
        match *self {
            Self::Map { wanted, len, .. } => len > 0 && whole(&[wanted.unwrap_or(0), len]),
            Self::Unmap { start, len } | Self::Protect { start, len, .. } => whole(&[start, len]),
            Self::SetHeap(start, end) => start <= end && end <= USER_END,
            Self::Put(start, region) => {
                start < region.end && region.end <= USER_END && whole(&[start, region.end])
            }
            Self::MoveHeap(_) | Self::Grow(_) => true,
        }
    }
}

/// What a change has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Applied {
    /// Where the mapping is; the end of the heap.
    pub(crate) at: u64,
    /// Files that have one use more.
    pub(crate) held: Vec<NodeId>,
    /// Files that have one use less.
    pub(crate) released: Vec<NodeId>,
}

/// The regions of an address space, by where they start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Regions {
    map: BTreeMap<u64, Region>,
    /// Start and end of the heap.
    heap: (u64, u64),
}

impl Regions {
    /// The region that holds an address, with its start.
    pub(crate) fn find(&self, address: u64) -> Option<(u64, Region)> {
        let (start, region) = self.map.range(..=address).next_back()?;
        (address < region.end).then_some((*start, *region))
    }

    /// The nearest region at or above an address.
    pub(crate) fn next(&self, address: u64) -> Option<(u64, Region)> {
        let bounds = (Bound::Included(address), Bound::Unbounded);
        let (start, region) = self.map.range(bounds).next()?;
        Some((*start, *region))
    }

    /// All, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, Region)> {
        self.map.iter().map(|(start, region)| (*start, *region))
    }

    /// Start and end of the heap.
    pub(crate) fn heap(&self) -> (u64, u64) {
        self.heap
    }

    /// Bytes mapped.
    pub(crate) fn size(&self) -> u64 {
        self.iter().map(|(start, region)| region.end - start).sum()
    }

    /// Makes a change, or leaves all as it is.
    pub(crate) fn apply(&mut self, change: Change) -> Result<Applied> {
        if !change.is_sound() {
            return Err(Errno::EINVAL);
        }
        let mut done = Applied::default();
        match change {
            Change::Map {
                wanted,
                fixed,
                len,
                region,
            } => done.at = self.map(&mut done, wanted, fixed, len, region)?,
            Change::Unmap { start, len } => self.unmap(&mut done, start, len)?,
            Change::Protect { start, len, prot } => self.protect(&mut done, start, len, prot)?,
            Change::SetHeap(start, end) => self.heap = (start, end),
            Change::MoveHeap(end) => done.at = self.move_heap(&mut done, end)?,
            Change::Grow(address) => self.grow(address)?,
            Change::Put(start, region) => {
                if !self.is_free(start, region.end) {
                    return Err(Errno::EINVAL);
                }
                self.map.insert(start, region);
            }
        }
        Ok(done)
    }

    /// Whether nothing is mapped from `start` to `end`.
    fn is_free(&self, start: u64, end: u64) -> bool {
        let before = self.map.range(..end).next_back();
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
            match self.map.range(..end).next_back() {
                Some((below, region)) if region.end > start => end = *below,
                _ => return Ok(start),
            }
        }
    }

    fn map(
        &mut self,
        done: &mut Applied,
        wanted: Option<u64>,
        fixed: bool,
        len: u64,
        region: Region,
    ) -> Result<u64> {
        if self.map.len() >= MOST_REGIONS {
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
                self.unmap(done, start, len)?;
                start
            }
            Some(start) if fits(&start) && self.is_free(start, start + len) => start,
            _ => self.place(len)?,
        };
        let region = Region {
            end: start + len,
            ..region
        };
        self.insert(done, start, region);
        Ok(start)
    }

    /// Puts a region in, joined with the one below if they are alike.
    fn insert(&mut self, done: &mut Applied, start: u64, region: Region) {
        if let Some((below, before)) = self.map.range_mut(..start).next_back()
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
                done.released.push(node);
            }
            return;
        }
        self.map.insert(start, region);
    }

    /// Makes region boundaries at `start` and `end`.
    fn split(&mut self, done: &mut Applied, start: u64, end: u64) {
        for at in [start, end] {
            let Some((below, region)) = self.find(at) else {
                continue;
            };
            if below < at {
                if let Backing::File(node, _) = region.backing {
                    done.held.push(node);
                }
                self.map.insert(at, region.from(below, at));
                if let Some(first) = self.map.get_mut(&below) {
                    first.end = at;
                }
            }
        }
    }

    fn unmap(&mut self, done: &mut Applied, start: u64, len: u64) -> Result<()> {
        let end = start.checked_add(len).filter(|end| *end <= USER_END);
        let end = end.ok_or(Errno::EINVAL)?;
        self.split(done, start, end);
        while let Some((at, region)) = self.map.range(start..end).next() {
            let (at, region) = (*at, *region);
            self.map.remove(&at);
            if let Backing::File(node, _) = region.backing {
                done.released.push(node);
            }
        }
        Ok(())
    }

    fn protect(&mut self, done: &mut Applied, start: u64, len: u64, prot: Prot) -> Result<()> {
        let end = start.checked_add(len).filter(|end| *end <= USER_END);
        let end = end.ok_or(Errno::ENOMEM)?;
        let mut at = start;
        while at < end {
            let (_, region) = self.find(at).ok_or(Errno::ENOMEM)?;
            at = region.end;
        }
        self.split(done, start, end);
        for (_, region) in self.map.range_mut(start..end) {
            region.prot = prot;
        }
        Ok(())
    }

    /// Moves the end of the heap; returns where it is then.
    fn move_heap(&mut self, done: &mut Applied, end: u64) -> Result<u64> {
        let (start, old) = self.heap;
        let from = page_up(old).ok_or(Errno::ENOMEM)?;
        let to = page_up(end).ok_or(Errno::ENOMEM)?;
        if end < start {
            return Err(Errno::EINVAL);
        }
        if to < from {
            self.unmap(done, to, from - to)?;
        } else if to > from {
            if to > MAP_TOP || !self.is_free(from, to) {
                return Err(Errno::ENOMEM);
            }
            let region = Region {
                end: to,
                prot: Prot::READ | Prot::WRITE,
                sharing: Sharing::Private,
                backing: Backing::Zeros,
                purpose: Purpose::Heap,
            };
            self.insert(done, from, region);
        }
        self.heap.1 = end;
        Ok(end)
    }

    /// Extends the stack down to an address, if it may grow so far.
    fn grow(&mut self, address: u64) -> Result<()> {
        let (start, region) = self.next(address).ok_or(Errno::EFAULT)?;
        let page = page_down(address);
        let fits = region.purpose == Purpose::Stack
            && region.end - page <= STACK_LIMIT
            && page >= USER_START
            && self.is_free(page, start);
        if !fits {
            return Err(Errno::EFAULT);
        }
        self.map.remove(&start);
        self.map.insert(page, region);
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// Private memory with these rights.
    pub(crate) fn zeros(prot: Prot) -> Region {
        Region {
            end: 0,
            prot,
            sharing: Sharing::Private,
            backing: Backing::Zeros,
            purpose: Purpose::Mapping,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::zeros;
    use super::*;

    const RW: Prot = Prot::READ.union(Prot::WRITE);
    const PAGE: u64 = 4096;

    fn map(at: u64, pages: u64, region: Region) -> Change {
        Change::Map {
            wanted: Some(at),
            fixed: true,
            len: pages * PAGE,
            region,
        }
    }

    fn list(regions: &Regions) -> Vec<(u64, u64, Prot)> {
        let row = |(start, region): (u64, Region)| (start, region.end, region.prot);
        regions.iter().map(row).collect()
    }

    #[test]
    fn a_hole_splits_a_region_and_neighbours_that_are_alike_join() {
        let mut regions = Regions::default();
        let at = 0x10_0000;
        regions.apply(map(at, 4, zeros(RW))).expect("free");
        let hole = Change::Unmap {
            start: at + PAGE,
            len: PAGE,
        };
        regions.apply(hole).expect("legal");
        let two = [(at, at + PAGE, RW), (at + 2 * PAGE, at + 4 * PAGE, RW)];
        assert_eq!(list(&regions), two);
        assert_eq!(regions.find(at + PAGE), None);
        regions.apply(map(at + PAGE, 1, zeros(RW))).expect("free");
        assert_eq!(regions.find(at).expect("mapped").1.end, at + 2 * PAGE);
        assert_eq!(regions.size(), 4 * PAGE);
    }

    #[test]
    fn each_region_of_a_file_is_one_use_of_it() {
        let mut regions = Regions::default();
        let at = 0x10_0000;
        let file = Region {
            backing: Backing::File(7, 0),
            ..zeros(Prot::READ)
        };
        assert_eq!(regions.apply(map(at, 4, file)).expect("free").held, []);
        let middle = Change::Protect {
            start: at + PAGE,
            len: PAGE,
            prot: RW,
        };
        let done = regions.apply(middle).expect("mapped");
        assert_eq!((done.held, done.released), (vec![7, 7], vec![]));
        let last = regions.find(at + 3 * PAGE).expect("mapped");
        assert_eq!(last.1.backing, Backing::File(7, 2 * PAGE));
        let all = Change::Unmap {
            start: 0,
            len: USER_END,
        };
        let done = regions.apply(all).expect("legal");
        assert_eq!((done.held, done.released), (vec![], vec![7, 7, 7]));
        assert_eq!(regions.size(), 0);
    }

    #[test]
    fn what_is_refused_changes_nothing() {
        let mut regions = Regions::default();
        let at = 0x10_0000;
        regions.apply(map(at, 2, zeros(RW))).expect("free");
        regions
            .apply(Change::SetHeap(at - PAGE, at - PAGE))
            .expect("any");
        let before = regions.clone();
        for change in [
            map(0, 1, zeros(RW)),
            map(USER_END, 1, zeros(RW)),
            Change::Unmap {
                start: USER_END,
                len: PAGE,
            },
            Change::Protect {
                start: at,
                len: 3 * PAGE,
                prot: Prot::READ,
            },
            // Into what is mapped, below its start, beyond all.
            Change::MoveHeap(at + 1),
            Change::MoveHeap(0),
            Change::MoveHeap(u64::MAX),
            Change::Grow(at - PAGE),
            // Not whole pages, nothing, over what is there.
            map(at + 1, 1, zeros(RW)),
            map(at, 0, zeros(RW)),
            Change::SetHeap(1, 0),
            Change::Put(
                at,
                Region {
                    end: at + PAGE,
                    ..zeros(RW)
                },
            ),
        ] {
            assert!(regions.apply(change).is_err(), "{change:?}");
            assert_eq!(regions, before, "{change:?}");
        }
    }

    #[test]
    fn the_heap_grows_and_shrinks_by_bytes_and_the_stack_to_its_limit() {
        let mut regions = Regions::default();
        let at = 0x10_0000;
        regions.apply(Change::SetHeap(at, at)).expect("any");
        let mut end = |end| regions.apply(Change::MoveHeap(end)).map(|done| done.at);
        assert_eq!(end(at + 10), Ok(at + 10));
        assert_eq!(end(at + PAGE + 1), Ok(at + PAGE + 1));
        assert_eq!(regions.find(at).expect("mapped").1.end, at + 2 * PAGE);
        let mut end = |end| regions.apply(Change::MoveHeap(end)).map(|done| done.at);
        assert_eq!(end(at), Ok(at));
        assert_eq!(regions.size(), 0);

        let top = 0x7000_0000;
        let stack = Region {
            purpose: Purpose::Stack,
            ..zeros(RW)
        };
        regions.apply(map(top - PAGE, 1, stack)).expect("free");
        regions
            .apply(Change::Grow(top - STACK_LIMIT))
            .expect("room");
        assert_eq!(regions.size(), STACK_LIMIT);
        let more = regions.apply(Change::Grow(top - STACK_LIMIT - 1));
        assert_eq!(more, Err(Errno::EFAULT));
    }
}
