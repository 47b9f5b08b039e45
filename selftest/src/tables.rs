//! Page tables that cases take apart: those of the guest and the nested ones.

use core::sync::atomic::{AtomicU64, Ordering};

use vmm_shared::addr::PAGE_SIZE;
use vmm_shared::shm::SharedMem;

pub(crate) mod bits {
    pub(crate) const PRESENT: u64 = 1 << 0;
    pub(crate) const WRITABLE: u64 = 1 << 1;
    pub(crate) const USER: u64 = 1 << 2;
    pub(crate) const ACCESSED: u64 = 1 << 5;
    pub(crate) const DIRTY: u64 = 1 << 6;
    pub(crate) const LARGE: u64 = 1 << 7;
    pub(crate) const NO_EXECUTE: u64 = 1 << 63;
}
use bits::{LARGE, PRESENT, USER, WRITABLE};

/// A level of the tables; the discriminant is its index from the bottom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    Small = 0,
    Large = 1,
    Huge = 2,
    Top = 3,
}

/// Bytes of tables: one of each level.
pub(crate) const SIZE: usize = 4 << 12;

/// Tables for the first 4 MiB of an address space: 2 MiB by small pages, then
/// one large page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tables {
    memory: SharedMem,
    /// The address at which a walker finds the tables.
    at: u64,
    /// What address 0 is mapped to.
    target: u64,
}

impl Tables {
    /// Tables in `memory`, which a walker sees at `at`.
    pub(crate) fn new(memory: SharedMem, at: u64, target: u64) -> Self {
        Self { memory, at, target }
    }

    /// Maps everything, with all rights and never used.
    pub(crate) fn reset(&self) {
        const ALL: u64 = PRESENT | WRITABLE | USER;
        for page in 0..512 {
            let at = page * PAGE_SIZE;
            self.entry(Level::Small, at)
                .store((self.target + at) | ALL, Ordering::Relaxed);
        }
        let large = 1 << 21;
        for (level, at, value) in [
            (Level::Top, 0, self.at + 0x1000),
            (Level::Huge, 0, self.at + 0x2000),
            (Level::Large, 0, self.at + 0x3000),
            (Level::Large, large, (self.target + large) | LARGE),
        ] {
            self.entry(level, at).store(value | ALL, Ordering::Relaxed);
        }
    }

    /// The entry for an address below 4 MiB.
    pub(crate) fn entry(&self, level: Level, address: u64) -> &AtomicU64 {
        let shift = 12 + 9 * level as u64;
        let index = usize::try_from(address >> shift & 511).expect("masked");
        let table = 3 - level as usize;
        self.memory
            .atomic_u64(table << 12 | index << 3)
            .expect("within the tables")
    }

    /// Sets and clears bits of an entry.
    pub(crate) fn change(&self, level: Level, address: u64, set: u64, clear: u64) {
        let entry = self.entry(level, address);
        entry.store(
            entry.load(Ordering::Relaxed) & !clear | set,
            Ordering::Relaxed,
        );
    }

    /// An entry's value.
    pub(crate) fn value(&self, level: Level, address: u64) -> u64 {
        self.entry(level, address).load(Ordering::Relaxed)
    }

    /// The address of the top table.
    pub(crate) fn root(&self) -> u64 {
        self.at
    }

    /// The address of an entry.
    pub(crate) fn entry_address(&self, level: Level, address: u64) -> u64 {
        let shift = 12 + 9 * level as u64;
        self.at + ((3 - level as u64) << 12) + ((address >> shift & 511) << 3)
    }
}
