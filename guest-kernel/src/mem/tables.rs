//! Page tables of one address space: those that all nodes agree on, or one
//! node's copy of them (see [`super::space`]).
//!
//! Pages and tables are added by compare-and-swap, by any number of processors
//! at once; tables stay until all are freed.
//!
//! Manual: AMD64 Architecture Programmer's Manual vol. 2, 5.3.

use core::sync::atomic::{AtomicU64, Ordering};

use vmm_shared::addr::PAGE_SIZE;

use super::frames::{For, Frame, Frames};
use super::regions::Access;
use super::{PAGE, index};

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
/// Not the processor's: a frame is kept here that nobody may access.
const HELD: u64 = 1 << 9;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const ENTRIES: usize = 512;
/// Entries of the highest table that are the same in all address spaces.
const KERNEL_HALF: usize = 256;
/// Address bits that one entry of a table at each level covers.
const SHIFT: [u32; 4] = [12, 21, 30, 39];
/// First address that is not a program's.
pub(crate) const USER_END: u64 = 0x7fff_ffff_f000;

/// What a program may do with a mapped page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leaf {
    pub(crate) frame: Frame,
    /// Otherwise it is kept for later, and every access faults.
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    pub(crate) executable: bool,
}

impl Leaf {
    /// Whether the processor lets a program do that.
    pub(crate) fn allows(self, access: Access) -> bool {
        self.readable
            && match access {
                Access::Read => true,
                Access::Write => self.writable,
                Access::Execute => self.executable,
            }
    }

    fn to_raw(self) -> u64 {
        let writable = if self.writable { WRITABLE } else { 0 };
        let execute = if self.executable { 0 } else { NO_EXECUTE };
        let present = if self.readable { PRESENT } else { HELD };
        self.frame.0 | present | USER | writable | execute
    }

    fn from_raw(raw: u64) -> Option<Self> {
        (raw & (PRESENT | HELD) != 0).then_some(Self {
            frame: Frame(raw & ADDRESS),
            readable: raw & PRESENT != 0,
            writable: raw & WRITABLE != 0,
            executable: raw & NO_EXECUTE == 0,
        })
    }
}

/// Why a page was not mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// There is something else than expected by now.
    Changed,
    /// Memory is short.
    NoMemory,
}

/// Where frames for tables that are missing come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Supply {
    /// None are made.
    None,
    /// From the tables' node alone: by its processors, without a lock.
    Own,
    /// From there, or else from the kept node: under the kernel's lock.
    Any,
}

/// The tables of one address space.
#[derive(Debug)]
pub(crate) struct Tables {
    root: Frame,
    /// The node that tables are taken from.
    node: usize,
}

fn entry(frames: &Frames, table: Frame, at: usize) -> &AtomicU64 {
    frames.word(table, at * 8)
}

fn position(address: u64, level: usize) -> usize {
    index(address >> SHIFT[level]) % ENTRIES
}

impl Tables {
    /// Tables on a node that map nothing but the kernel, which is taken from
    /// `model`.
    pub(crate) fn new(frames: &Frames, node: usize, model: Frame) -> Option<Self> {
        let root = frames.alloc_table(node)?;
        for at in KERNEL_HALF..ENTRIES {
            let value = entry(frames, model, at).load(Ordering::Relaxed);
            entry(frames, root, at).store(value, Ordering::Relaxed);
        }
        Some(Self { root, node })
    }

    /// The value for CR3.
    pub(crate) fn root(&self) -> Frame {
        self.root
    }

    /// What an entry points at; `None` for tables that are lost, which may
    /// say anything.
    fn below(&self, frames: &Frames, value: u64) -> Option<Frame> {
        (value & PRESENT != 0 && !self.is_lost(frames)).then_some(Frame(value & ADDRESS))
    }

    /// Whether they are in memory that is lost.
    pub(crate) fn is_lost(&self, frames: &Frames) -> bool {
        // After what has been read of them.
        core::sync::atomic::fence(Ordering::Acquire);
        self.node != frames.kept() && frames.places.losses.has_lost_node(self.node)
    }

    /// The table of pages for an address.
    fn leaf_table(&self, frames: &Frames, address: u64) -> Option<Frame> {
        let mut table = self.root;
        for level in [3, 2, 1] {
            // Acquire: with the Release of whoever has put the table there.
            let value = entry(frames, table, position(address, level)).load(Ordering::Acquire);
            table = self.below(frames, value)?;
        }
        Some(table)
    }

    /// What is mapped at an address.
    pub(crate) fn get(&self, frames: &Frames, address: u64) -> Option<Leaf> {
        let table = self.leaf_table(frames, address)?;
        Leaf::from_raw(entry(frames, table, position(address, 0)).load(Ordering::Relaxed))
    }

    /// The entry for an address, with the tables above it made.
    fn make_entry<'a>(
        &self,
        frames: &'a Frames,
        address: u64,
        supply: Supply,
    ) -> Option<&'a AtomicU64> {
        let mut table = self.root;
        for level in [3, 2, 1] {
            let word = entry(frames, table, position(address, level));
            // Acquire: a table that another has put there is empty, or more.
            let mut value = word.load(Ordering::Acquire);
            if value & PRESENT == 0 {
                let below = match supply {
                    Supply::None => None,
                    Supply::Own => frames.alloc_zeroed_on(self.node, For::Machine),
                    Supply::Any => frames.alloc_table(self.node),
                }?;
                let made = below.0 | PRESENT | WRITABLE | USER;
                // Release: the table is empty before anybody can see it.
                match word.compare_exchange(0, made, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => value = made,
                    Err(theirs) => {
                        frames.put_back(below);
                        value = theirs;
                    }
                }
            }
            table = self.below(frames, value)?;
        }
        Some(entry(frames, table, position(address, 0)))
    }

    /// Maps a page if what is there is as expected. The frame's use passes to
    /// the tables, and that of what was there to the caller.
    pub(crate) fn replace(
        &self,
        frames: &Frames,
        address: u64,
        expected: Option<Leaf>,
        leaf: Leaf,
        supply: Supply,
    ) -> Result<(), Refused> {
        let word = self.make_entry(frames, address, supply);
        let word = word.ok_or(Refused::NoMemory)?;
        let mut raw = word.load(Ordering::Relaxed);
        // Again if the processor has only noted that it used the page.
        while Leaf::from_raw(raw) == expected {
            // Release: the frame's contents before the frame. Acquire: what
            // has been done through what was there.
            match word.compare_exchange(raw, leaf.to_raw(), Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return Ok(()),
                Err(now) => raw = now,
            }
        }
        Err(Refused::Changed)
    }

    /// Maps a page, whatever is there, and returns that; `None` if memory is
    /// short.
    pub(crate) fn set(
        &self,
        frames: &Frames,
        address: u64,
        leaf: Leaf,
        supply: Supply,
    ) -> Option<Option<Leaf>> {
        let word = self.make_entry(frames, address, supply)?;
        Some(Leaf::from_raw(word.swap(leaf.to_raw(), Ordering::AcqRel)))
    }

    /// Calls `change` for each page mapped from `start` to `end`; what it
    /// returns is mapped instead. Nobody adds pages there meanwhile.
    pub(crate) fn update(
        &self,
        frames: &Frames,
        start: u64,
        end: u64,
        mut change: impl FnMut(u64, Leaf) -> Option<Leaf>,
    ) {
        let mut address = start;
        while address < end {
            let span = 1_u64 << SHIFT[1];
            let next = (address & !(span - 1)).saturating_add(span).min(end);
            let Some(table) = self.leaf_table(frames, address) else {
                address = self.skip(frames, address).min(end);
                continue;
            };
            while address < next {
                let at = position(address, 0);
                let raw = entry(frames, table, at).load(Ordering::Relaxed);
                if let Some(leaf) = Leaf::from_raw(raw) {
                    let new = change(address, leaf).map_or(0, Leaf::to_raw);
                    if new != raw {
                        entry(frames, table, at).store(new, Ordering::Release);
                    }
                }
                address += PAGE_SIZE;
            }
        }
    }

    /// The first address behind the largest hole at `address`.
    fn skip(&self, frames: &Frames, address: u64) -> u64 {
        let mut table = self.root;
        for level in [3, 2, 1] {
            let value = entry(frames, table, position(address, level)).load(Ordering::Relaxed);
            match self.below(frames, value) {
                Some(below) => table = below,
                None => {
                    let span = 1_u64 << SHIFT[level];
                    return (address & !(span - 1)).saturating_add(span);
                }
            }
        }
        address
    }

    /// Gives all tables back. Nothing may be mapped any more.
    pub(crate) fn free(&self, frames: &Frames) {
        self.free_below(frames, self.root, 3, KERNEL_HALF);
    }

    fn free_below(&self, frames: &Frames, table: Frame, level: usize, entries: usize) {
        if level > 0 {
            for at in 0..entries {
                let value = entry(frames, table, at).load(Ordering::Relaxed);
                if let Some(below) = self.below(frames, value) {
                    self.free_below(frames, below, level - 1, ENTRIES);
                }
            }
        }
        frames.release(table);
    }
}

const _: () = assert!(ENTRIES * 8 == PAGE);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::frames::testing::frames;

    fn leaf(frame: Frame) -> Leaf {
        Leaf {
            frame,
            readable: true,
            writable: true,
            executable: false,
        }
    }

    #[test]
    fn what_is_mapped_is_found_and_all_tables_come_back() {
        let frames = frames(64);
        let model = frames.alloc_zeroed(For::Data).expect("some");
        entry(&frames, model, 511).store(0x1003, Ordering::Relaxed);
        let before = frames.available();
        let tables = Tables::new(&frames, 0, model).expect("some");
        let word = entry(&frames, tables.root(), 511).load(Ordering::Relaxed);
        assert_eq!(word, 0x1003, "the kernel is in all of them");
        let places = [0x1000, 0x2000, 0x40_0000, 0x7f00_0000_0000, USER_END - 4096];
        for place in places {
            assert_eq!(tables.get(&frames, place), None);
            let frame = frames.alloc_zeroed(For::Data).expect("some");
            assert_eq!(
                tables.set(&frames, place, leaf(frame), Supply::Any),
                Some(None)
            );
            assert_eq!(tables.get(&frames, place), Some(leaf(frame)));
        }
        let mut seen = Vec::new();
        tables.update(&frames, 0, USER_END, |at, leaf| {
            seen.push(at);
            frames.release(leaf.frame);
            None
        });
        assert_eq!(seen, places);
        assert_eq!(tables.get(&frames, 0x1000), None);
        tables.free(&frames);
        frames.settle();
        assert_eq!(frames.available(), before);
    }

    #[test]
    fn of_those_who_map_a_page_at_once_one_wins() {
        let frames = frames(600);
        let model = frames.alloc_zeroed(For::Data).expect("some");
        let tables = Tables::new(&frames, 0, model).expect("some");
        let before = frames.available();
        let map = || {
            let mut won = 0_u64;
            for number in 0..64_u64 {
                let frame = frames.alloc_zeroed(For::Data).expect("some");
                // Each 2 MiB apart: tables are made at once, too.
                match tables.replace(&frames, number << 21, None, leaf(frame), Supply::Any) {
                    Ok(()) => won += 1,
                    Err(refused) => {
                        assert_eq!(refused, Refused::Changed);
                        frames.put_back(frame);
                    }
                }
            }
            won
        };
        let won: u64 = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(map)).collect();
            let won = threads.into_iter().map(|thread| thread.join());
            won.map(|won| won.expect("no panic")).sum()
        });
        assert_eq!(won, 64);
        // 64 pages, 64 tables of pages, and two above.
        assert_eq!(before - frames.available(), 64 + 64 + 2);
    }

    #[test]
    fn without_memory_nothing_is_mapped() {
        let frames = frames(3);
        let model = frames.alloc_zeroed(For::Data).expect("some");
        let tables = Tables::new(&frames, 0, model).expect("some");
        assert_eq!(tables.set(&frames, 0x1000, leaf(model), Supply::Any), None);
        assert_eq!(tables.get(&frames, 0x1000), None);
        tables.free(&frames);
    }
}
