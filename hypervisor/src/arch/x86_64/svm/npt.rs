//! Nested page tables: what the guest's physical memory is made of.
//!
//! Manual: vol. 2, 15.25. Every walk counts as a user access, so all entries
//! have the user bit.
#![expect(unsafe_code, reason = "builds tables that the processor walks")]

use core::sync::atomic::{AtomicU64, Ordering};

use vmm_shared::addr::{Gpa, Hpa, LARGE_PAGE_SIZE};

use crate::arch::paging::zeroed_page;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED_DIRTY: u64 = 1 << 5 | 1 << 6;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// What the guest may do with a range of its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Everything: RAM.
    All,
    /// Reading and executing: a root image.
    ReadExecute,
}

/// The tables of one VM on one node.
#[derive(Debug)]
pub struct NestedTables {
    root: Hpa,
}

impl NestedTables {
    /// Tables that map nothing.
    #[must_use]
    pub fn new() -> Self {
        Self {
            root: zeroed_page(),
        }
    }

    /// The value for the VMCB's nested CR3.
    #[must_use]
    pub fn root(&self) -> Hpa {
        self.root
    }

    fn entry(table: Hpa, gpa: Gpa, level: u32) -> &'static AtomicU64 {
        let index = (gpa.0 >> (12 + 9 * level)) & 511;
        let at = usize::try_from(table.0 + index * 8).expect("64-bit");
        // SAFETY: 1. tables are whole pages of the heap, never given back;
        // 2. only ever accessed atomically, and walked by the processor.
        unsafe { AtomicU64::from_ptr(core::ptr::with_exposed_provenance_mut(at)) }
    }

    /// Maps a large page.
    ///
    /// # Panics
    /// If an address is not a multiple of 2 MiB.
    pub fn map_large(&mut self, gpa: Gpa, hpa: Hpa, rights: Rights) {
        assert!(
            gpa.is_aligned(LARGE_PAGE_SIZE) && hpa.is_aligned(LARGE_PAGE_SIZE),
            "large pages"
        );
        let mut table = self.root;
        for level in [3, 2] {
            let entry = Self::entry(table, gpa, level);
            let mut value = entry.load(Ordering::Relaxed);
            if value & PRESENT == 0 {
                value = zeroed_page().0 | PRESENT | WRITABLE | USER | 1 << 5;
                // Release: the table is zeroed before a walker can see it.
                entry.store(value, Ordering::Release);
            }
            table = Hpa(value & ADDRESS);
        }
        let rights = match rights {
            Rights::All => WRITABLE,
            Rights::ReadExecute => 0,
        };
        let leaf = hpa.0 | PRESENT | USER | ACCESSED_DIRTY | LARGE | rights;
        Self::entry(table, gpa, 1).store(leaf, Ordering::Release);
    }
}

impl Default for NestedTables {
    fn default() -> Self {
        Self::new()
    }
}
