//! What the PVH loader says about the machine.
//!
//! Layout: Xen public header `start_info.h`, version 1.
#![expect(
    unsafe_code,
    reason = "reads structures that the loader left in memory"
)]

use alloc::vec::Vec;
use core::ops::Range;
use core::ptr::NonNull;

use acpi::madt::{Madt, MadtEntry};
use acpi::{AcpiHandler, AcpiTables, PhysicalMapping};
use vmm_shared::addr::{Hpa, NodeId};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

const MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Raw {
    magic: u32,
    version: u32,
    flags: u32,
    module_count: u32,
    modules: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct MemoryMapEntry {
    start: u64,
    len: u64,
    kind: u32,
    reserved: u32,
}

const MAX_ENTRIES: usize = 32;
const MAX_COMMAND_LINE: usize = 128;

/// The loader's structures, copied.
pub(super) struct StartInfo {
    map: [MemoryMapEntry; MAX_ENTRIES],
    rsdp: u64,
    command_line: [u8; MAX_COMMAND_LINE],
}

fn copy<T: FromBytes>(address: u64) -> Option<T> {
    let address = usize::try_from(address)
        .ok()
        .filter(|at| *at != 0 && *at < 1 << 32)?;
    // SAFETY: 1. the boot page tables map everything below 4 GiB; 2. any
    // bytes make a T; 3. the loader has stopped writing.
    Some(unsafe { core::ptr::with_exposed_provenance::<T>(address).read_unaligned() })
}

impl StartInfo {
    /// Copies everything out of the loader's memory, which may be reused.
    pub(super) fn read(address: u32) -> Option<Self> {
        let raw: Raw = copy(address.into())?;
        if raw.magic != MAGIC || raw.version < 1 {
            return None;
        }
        let mut map = [MemoryMapEntry {
            start: 0,
            len: 0,
            kind: 0,
            reserved: 0,
        }; MAX_ENTRIES];
        let count = usize::try_from(raw.memory_map_entries)
            .ok()?
            .min(MAX_ENTRIES);
        for (index, entry) in map.iter_mut().enumerate().take(count) {
            *entry = copy(raw.memory_map + index as u64 * size_of::<MemoryMapEntry>() as u64)?;
        }
        let mut command_line = [0; MAX_COMMAND_LINE];
        for (index, byte) in command_line.iter_mut().enumerate() {
            *byte = copy(raw.command_line + index as u64)?;
            if *byte == 0 {
                break;
            }
        }
        Some(Self {
            map,
            rsdp: raw.rsdp,
            command_line,
        })
    }

    /// The RAM range that holds `address`.
    pub(super) fn ram_range_at(&self, address: Hpa) -> Option<Range<Hpa>> {
        self.map
            .iter()
            .filter(|entry| entry.kind == RAM)
            .map(|entry| Hpa(entry.start)..Hpa(entry.start.saturating_add(entry.len)))
            .find(|range| range.contains(&address))
    }

    /// Which node of the rack this is: `node=N` on the command line.
    pub(super) fn node(&self) -> NodeId {
        let number = self
            .words()
            .find_map(|word| word.strip_prefix("node=")?.parse().ok());
        NodeId(number.unwrap_or(0))
    }

    /// Whether the boot core is one more than the node's: `spare` on the command
    /// line.
    ///
    /// QEMU 7.2's TCG changes the first processor's flags from
    /// whichever one loads x87 state (`cpu_clear_ignne`), by a plain read and
    /// write. What the first one does to them at the same time is undone: that
    /// it holds its interrupts, or that its guest is under nested paging.
    pub(super) fn has_spare_core(&self) -> bool {
        self.words().any(|word| word == "spare")
    }

    fn words(&self) -> impl Iterator<Item = &str> {
        let text = self
            .command_line
            .split(|byte| *byte == 0)
            .next()
            .unwrap_or_default();
        core::str::from_utf8(text)
            .unwrap_or_default()
            .split_ascii_whitespace()
    }

    /// APIC ids of the usable cores, by the firmware's interrupt controller
    /// table, in its order.
    pub(super) fn cores(&self) -> Option<Vec<u8>> {
        let rsdp = usize::try_from(self.rsdp).ok()?;
        // SAFETY: the loader points to the firmware's tables, which stay in
        // memory below 4 GiB, where everything is mapped.
        let tables = unsafe { AcpiTables::from_rsdp(Identity, rsdp) }.ok()?;
        let madt = tables.find_table::<Madt>().ok()?;
        let usable = |entry: &MadtEntry<'_>| match entry {
            MadtEntry::LocalApic(core) if core.flags & 1 != 0 => Some(core.apic_id),
            MadtEntry::LocalX2Apic(core) if core.flags & 1 != 0 => {
                u8::try_from(core.x2apic_id).ok()
            }
            _ => None,
        };
        let ids = madt
            .get()
            .entries()
            .filter_map(|entry| usable(&entry))
            .collect();
        Some(ids)
    }
}

#[derive(Clone)]
struct Identity;

impl AcpiHandler for Identity {
    unsafe fn map_physical_region<T>(
        &self,
        physical_address: usize,
        size: usize,
    ) -> PhysicalMapping<Self, T> {
        let start = NonNull::new(core::ptr::with_exposed_provenance_mut::<T>(
            physical_address,
        ))
        .expect("no table lies at address 0");
        // SAFETY: everything below 4 GiB is mapped one to one.
        unsafe { PhysicalMapping::new(physical_address, start, size, size, Self) }
    }

    fn unmap_physical_region<T>(_region: &PhysicalMapping<Self, T>) {}
}
