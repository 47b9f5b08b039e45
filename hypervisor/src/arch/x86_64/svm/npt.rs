//! Nested page tables: what the guest's physical memory is made of.
//!
//! Manual: vol. 2, 15.25. Every walk counts as a user access, so all entries
//! have the user bit. Entries change one at a time and atomically; who takes
//! rights away must also make every core that runs the guest flush.
#![expect(unsafe_code, reason = "builds tables that the processor walks")]

use core::sync::atomic::{AtomicU64, Ordering};

use vmm_shared::addr::{Gpa, Hpa, LARGE_PAGE_SIZE, PAGE_SIZE};
use vmm_shared::coherence::Rights;

use crate::arch::paging::zeroed_page;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const ENTRIES: u64 = 512;
/// Level of tables whose entries map small pages; one more maps large ones.
const SMALL: u32 = 0;
const LARGE_LEVEL: u32 = 1;
const TOP: u32 = 3;

/// Accessed and dirty from the start: nobody looks at them, and the processor
/// need not set them.
fn leaf(rights: Rights) -> u64 {
    let write = if rights.contains(Rights::WRITE) {
        WRITABLE
    } else {
        0
    };
    let execute = if rights.contains(Rights::EXECUTE) {
        0
    } else {
        NO_EXECUTE
    };
    PRESENT | USER | ACCESSED | DIRTY | write | execute
}

/// The rights that a leaf gives.
fn rights(leaf: u64) -> Rights {
    if leaf & PRESENT == 0 {
        return Rights::NONE;
    }
    let write = if leaf & WRITABLE == 0 {
        Rights::NONE
    } else {
        Rights::WRITE
    };
    let execute = if leaf & NO_EXECUTE == 0 {
        Rights::EXECUTE
    } else {
        Rights::NONE
    };
    Rights::READ | write | execute
}

/// A page of the guest's physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestPage {
    /// 4 KiB.
    Small(Gpa),
    /// 2 MiB.
    Large(Gpa),
}

/// Bytes that nested tables map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// By entries of 2 MiB.
    pub large: u64,
    /// By entries of 4 KiB.
    pub small: u64,
}

impl Mapped {
    /// All of it.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.large + self.small
    }
}

/// The tables of one VM on one node.
#[derive(Debug)]
pub struct NestedTables {
    root: Hpa,
    mapped: Mapped,
}

impl NestedTables {
    /// Tables that map nothing.
    #[must_use]
    pub fn new() -> Self {
        Self {
            root: zeroed_page(),
            mapped: Mapped { large: 0, small: 0 },
        }
    }

    /// How much is mapped, with whatever rights.
    #[must_use]
    pub fn mapped(&self) -> Mapped {
        self.mapped
    }

    /// The value for the VMCB's nested CR3.
    #[must_use]
    pub fn root(&self) -> Hpa {
        self.root
    }

    fn entry(table: Hpa, gpa: Gpa, level: u32) -> &'static AtomicU64 {
        let index = (gpa.0 >> (12 + 9 * level)) % ENTRIES;
        let at = usize::try_from(table.0 + index * 8).expect("64-bit");
        // SAFETY: 1. tables are whole pages of the heap, never given back;
        // 2. only ever accessed atomically, and walked by the processor.
        unsafe { AtomicU64::from_ptr(core::ptr::with_exposed_provenance_mut(at)) }
    }

    /// The entry for `gpa` at `level`, with the tables above it. A large page
    /// in the way is split into small ones of the same rights.
    fn make_entry(&mut self, gpa: Gpa, level: u32) -> &'static AtomicU64 {
        let mut table = self.root;
        for above in (level + 1..=TOP).rev() {
            let entry = Self::entry(table, gpa, above);
            let value = entry.load(Ordering::Relaxed);
            table = if value & PRESENT == 0 {
                Self::link(entry, zeroed_page())
            } else if value & LARGE != 0 {
                self.mapped.large -= LARGE_PAGE_SIZE;
                self.mapped.small += LARGE_PAGE_SIZE;
                Self::link(entry, split(value))
            } else {
                Hpa(value & ADDRESS)
            };
        }
        Self::entry(table, gpa, level)
    }

    fn link(entry: &AtomicU64, table: Hpa) -> Hpa {
        // Release: the table is filled before a walker can see it.
        entry.store(
            table.0 | PRESENT | WRITABLE | USER | ACCESSED,
            Ordering::Release,
        );
        table
    }

    /// Maps a page, whatever was there.
    ///
    /// # Panics
    /// If an address is not a multiple of the page's size.
    pub fn map(&mut self, page: GuestPage, hpa: Hpa, rights: Rights) {
        let (gpa, size, level, large) = match page {
            GuestPage::Small(gpa) => (gpa, PAGE_SIZE, SMALL, 0),
            GuestPage::Large(gpa) => (gpa, LARGE_PAGE_SIZE, LARGE_LEVEL, LARGE),
        };
        assert!(
            gpa.is_aligned(size) && hpa.is_aligned(size),
            "pages are aligned"
        );
        let entry = self.make_entry(gpa, level);
        let old = entry.load(Ordering::Relaxed);
        self.mapped.small -= match (page, old & (PRESENT | LARGE)) {
            (GuestPage::Small(_), PRESENT) => PAGE_SIZE,
            (GuestPage::Large(_), PRESENT) => {
                let present = |index: &u64| {
                    let small = Self::entry(Hpa(old & ADDRESS), Gpa(index * PAGE_SIZE), SMALL);
                    small.load(Ordering::Relaxed) & PRESENT != 0
                };
                (0..ENTRIES).filter(present).count() as u64 * PAGE_SIZE
            }
            _ => 0,
        };
        match page {
            GuestPage::Small(_) => self.mapped.small += PAGE_SIZE,
            GuestPage::Large(_) if old & LARGE == 0 => self.mapped.large += LARGE_PAGE_SIZE,
            GuestPage::Large(_) => {}
        }
        entry.store(hpa.0 | large | leaf(rights), Ordering::Release);
    }

    /// Maps `len` bytes, a multiple of 2 MiB, by large pages.
    ///
    /// # Panics
    /// If an address is not a multiple of 2 MiB.
    pub fn map_range(&mut self, gpa: Gpa, hpa: Hpa, len: u64, rights: Rights) {
        for number in 0..len / LARGE_PAGE_SIZE {
            let offset = number * LARGE_PAGE_SIZE;
            self.map(
                GuestPage::Large(Gpa(gpa.0 + offset)),
                Hpa(hpa.0 + offset),
                rights,
            );
        }
    }

    /// What the guest may do at an address.
    #[must_use]
    pub fn rights(&self, gpa: Gpa) -> Rights {
        let mut table = self.root;
        for level in (LARGE_LEVEL..=TOP).rev() {
            let value = Self::entry(table, gpa, level).load(Ordering::Relaxed);
            if value & PRESENT == 0 || value & LARGE != 0 {
                return rights(value);
            }
            table = Hpa(value & ADDRESS);
        }
        rights(Self::entry(table, gpa, SMALL).load(Ordering::Relaxed))
    }

    /// Leaves of a page's rights only those in `keep`. A small page of a large
    /// one splits it.
    pub fn restrict(&mut self, page: GuestPage, keep: Rights) {
        let entry = match page {
            GuestPage::Small(gpa) => self.make_entry(gpa, SMALL),
            GuestPage::Large(gpa) => self.make_entry(gpa, LARGE_LEVEL),
        };
        let value = entry.load(Ordering::Relaxed);
        match page {
            GuestPage::Large(_) if value & (PRESENT | LARGE) == PRESENT => {
                for index in 0..ENTRIES {
                    let small = Self::entry(Hpa(value & ADDRESS), Gpa(index * PAGE_SIZE), SMALL);
                    if restrict(small, keep) {
                        self.mapped.small -= PAGE_SIZE;
                    }
                }
            }
            GuestPage::Large(_) => {
                if restrict(entry, keep) {
                    self.mapped.large -= LARGE_PAGE_SIZE;
                }
            }
            GuestPage::Small(_) => {
                if restrict(entry, keep) {
                    self.mapped.small -= PAGE_SIZE;
                }
            }
        }
    }
}

/// Whether this takes the page out.
fn restrict(entry: &AtomicU64, keep: Rights) -> bool {
    let value = entry.load(Ordering::Relaxed);
    let kept = rights(value) & keep;
    // An address without rights is of no use, so nothing at all stays.
    let new = if kept.is_empty() {
        0
    } else {
        value & (ADDRESS | LARGE) | leaf(kept)
    };
    entry.store(new, Ordering::Release);
    value & PRESENT != 0 && new == 0
}

/// A table of small pages that shows what a large page showed.
fn split(large: u64) -> Hpa {
    let table = zeroed_page();
    let kept = large & !(ADDRESS | LARGE);
    for index in 0..ENTRIES {
        let small = (large & ADDRESS) + index * PAGE_SIZE;
        let gpa = Gpa(index * PAGE_SIZE);
        NestedTables::entry(table, gpa, SMALL).store(small | kept, Ordering::Relaxed);
    }
    table
}

impl Default for NestedTables {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a walk finds: the leaf and the address behind `gpa`.
    fn walk(tables: &NestedTables, gpa: u64) -> Option<(u64, u64)> {
        let mut table = tables.root();
        for level in (SMALL..=TOP).rev() {
            let value = NestedTables::entry(table, Gpa(gpa), level).load(Ordering::Relaxed);
            if value & PRESENT == 0 {
                return None;
            }
            if level == SMALL || value & LARGE != 0 {
                let size = 1 << (12 + 9 * level);
                let rights = value & !(ADDRESS | LARGE);
                return Some((rights, (value & ADDRESS & !(size - 1)) + gpa % size));
            }
            table = Hpa(value & ADDRESS);
        }
        None
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_large_page_splits_when_a_small_one_differs() {
        let mut tables = NestedTables::new();
        tables.map(
            GuestPage::Large(Gpa(4 * MIB)),
            Hpa(64 * MIB),
            Rights::READ_WRITE,
        );
        tables.map(
            GuestPage::Small(Gpa(5 * MIB)),
            Hpa(65 * MIB),
            Rights::READ_EXECUTE,
        );
        assert_eq!(
            walk(&tables, 5 * MIB + 8),
            Some((leaf(Rights::READ_EXECUTE), 65 * MIB + 8))
        );
        let neighbour = 5 * MIB + 0x1008;
        let theirs = 65 * MIB + 0x1008;
        assert_eq!(
            walk(&tables, neighbour),
            Some((leaf(Rights::READ_WRITE), theirs))
        );
        assert_eq!(walk(&tables, 6 * MIB), None);
    }

    #[test]
    fn taking_a_large_page_out_takes_its_small_ones() {
        let mut tables = NestedTables::new();
        tables.map(GuestPage::Large(Gpa(0)), Hpa(0), Rights::ALL);
        tables.restrict(GuestPage::Small(Gpa(0x3000)), Rights::NONE);
        assert_eq!(walk(&tables, 0x3000), None);
        assert_eq!(walk(&tables, 0x4000), Some((leaf(Rights::ALL), 0x4000)));
        tables.restrict(GuestPage::Large(Gpa(0)), Rights::READ);
        assert_eq!(tables.rights(Gpa(0x4000)), Rights::READ);
        assert_eq!(tables.rights(Gpa(0x3000)), Rights::NONE);
        tables.restrict(GuestPage::Large(Gpa(0)), Rights::NONE);
        assert_eq!(walk(&tables, 0x4000), None);
        assert_eq!(tables.mapped(), Mapped { large: 0, small: 0 });
        tables.map(GuestPage::Large(Gpa(0)), Hpa(2 * MIB), Rights::READ);
        assert_eq!(
            walk(&tables, 0x4000),
            Some((leaf(Rights::READ), 2 * MIB + 0x4000))
        );
    }

    #[test]
    fn it_is_counted_how_much_is_mapped() {
        let mut tables = NestedTables::new();
        let mapped = |large: u64, small: u64| Mapped {
            large: large * 2 * MIB,
            small: small * 4096,
        };
        let large = GuestPage::Large(Gpa(0));
        let small = GuestPage::Small(Gpa(0x3000));
        tables.map(large, Hpa(0), Rights::ALL);
        tables.map(large, Hpa(0), Rights::READ);
        assert_eq!(tables.mapped(), mapped(1, 0));
        tables.restrict(large, Rights::READ);
        assert_eq!(tables.mapped(), mapped(1, 0));
        tables.map(small, Hpa(0x3000), Rights::ALL);
        assert_eq!(tables.mapped(), mapped(0, 512));
        tables.restrict(small, Rights::NONE);
        tables.restrict(small, Rights::NONE);
        assert_eq!(tables.mapped(), mapped(0, 511));
        tables.map(small, Hpa(0x3000), Rights::READ);
        assert_eq!(tables.mapped(), mapped(0, 512));
        tables.restrict(small, Rights::NONE);
        tables.map(large, Hpa(0), Rights::ALL);
        assert_eq!(tables.mapped(), mapped(1, 0));
        tables.restrict(large, Rights::NONE);
        assert_eq!(tables.mapped(), mapped(0, 0));
    }
}
