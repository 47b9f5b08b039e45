//! The GDT, page tables and stack that a 64-bit kernel is entered with.

use alloc::vec::Vec;

use vmm_shared::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE};
use zerocopy::IntoBytes;

use super::{LinuxEntry, LoadError};
use crate::mem::GuestMemory;

const GDT: Gpa = Gpa(0x1000);
const STACK_TOP: Gpa = Gpa(0x8000);
const PAGE_TABLES: Gpa = Gpa(0x9000);

/// Code segment that the boot protocol asks for: 64-bit, flat.
pub const CODE_SELECTOR: u16 = 0x10;
/// Data segment that the boot protocol asks for: flat.
pub const DATA_SELECTOR: u16 = 0x18;

/// Flat 64-bit code, present, accessed.
const CODE_DESCRIPTOR: u64 = 0x00af_9b00_0000_ffff;
/// Flat data, writable, present, accessed.
const DATA_DESCRIPTOR: u64 = 0x00cf_9300_0000_ffff;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;
const ENTRIES: u64 = 512;
/// One page directory for each GiB.
const DIRECTORIES: u64 = 4;

/// The contents of GDTR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GdtRegister {
    /// Address of the first descriptor.
    pub base: u64,
    /// Bytes in the table, less one.
    pub limit: u16,
}

/// Writes the tables; gives the state that uses them.
pub(super) fn write(
    memory: &impl GuestMemory,
    rip: u64,
    zero_page: Gpa,
) -> Result<LinuxEntry, LoadError> {
    let gdt = [0, 0, CODE_DESCRIPTOR, DATA_DESCRIPTOR];
    memory.write_bytes(GDT, gdt.as_bytes())?;
    write_page_tables(memory)?;
    Ok(state(rip, zero_page))
}

/// The state that uses the tables.
pub(super) const fn state(rip: u64, zero_page: Gpa) -> LinuxEntry {
    LinuxEntry {
        rip,
        rsi: zero_page.0,
        cr3: PAGE_TABLES.0,
        rsp: STACK_TOP.0,
        gdt: GdtRegister {
            base: GDT.0,
            limit: 31,
        },
    }
}

/// The first 4 GiB mapped to themselves with 2 MiB pages: one table of each
/// upper level, then the directories.
fn write_page_tables(memory: &impl GuestMemory) -> Result<(), LoadError> {
    let level3 = PAGE_TABLES.0 + PAGE_SIZE;
    let level2 = level3 + PAGE_SIZE;
    memory.write_bytes(PAGE_TABLES, table(level3, 1, PAGE_SIZE, 0).as_bytes())?;
    memory.write_bytes(
        Gpa(level3),
        table(level2, DIRECTORIES, PAGE_SIZE, 0).as_bytes(),
    )?;
    for directory in 0..DIRECTORIES {
        let first = directory * ENTRIES * LARGE_PAGE_SIZE;
        memory.write_bytes(
            Gpa(level2 + directory * PAGE_SIZE),
            table(first, ENTRIES, LARGE_PAGE_SIZE, LARGE).as_bytes(),
        )?;
    }
    Ok(())
}

/// A table whose first `count` entries point at `first`, `first + step`, ….
fn table(first: u64, count: u64, step: u64, flags: u64) -> Vec<u64> {
    (0..ENTRIES)
        .map(|index| {
            if index < count {
                (first + index * step) | PRESENT | WRITABLE | flags
            } else {
                0
            }
        })
        .collect()
}
