//! What guests are told of memory; the kinds are E820's.

use alloc::vec::Vec;

use vmm_shared::addr::{Gpa, PAGE_SIZE};

use crate::platform::layout::{self, ACPI_END, EXTENDED_MEMORY, LOW_MEMORY_END, RamRange};
use crate::platform::{PlatformConfig, PmemInterface};

/// What a range of memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum MemoryKind {
    Ram = 1,
    Reserved = 2,
    Acpi = 3,
    /// Persistent memory from before there was a standard for it.
    Pmem = 12,
}

/// A range of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MapEntry {
    pub(super) gpa: Gpa,
    pub(super) len: u64,
    pub(super) kind: MemoryKind,
}

/// RAM, the reserved hole below 1 MiB with the ACPI tables in it, and a root
/// image that is found this way.
pub(super) fn memory_map(platform: &PlatformConfig, acpi: RamRange) -> Vec<MapEntry> {
    let mut map = Vec::new();
    let mut add = |start: Gpa, end: Gpa, kind| {
        if start < end {
            let len = end.0 - start.0;
            map.push(MapEntry {
                gpa: start,
                len,
                kind,
            });
        }
    };
    let acpi_end = Gpa(acpi.end().0.next_multiple_of(PAGE_SIZE));
    add(Gpa(0), LOW_MEMORY_END, MemoryKind::Ram);
    add(LOW_MEMORY_END, acpi.gpa, MemoryKind::Reserved);
    add(acpi.gpa, acpi_end, MemoryKind::Acpi);
    add(acpi_end, ACPI_END, MemoryKind::Reserved);
    for ram in layout::ram_ranges(platform.topology.memory()) {
        add(ram.gpa.max(EXTENDED_MEMORY), ram.end(), MemoryKind::Ram);
    }
    if let Some(image) = platform.image
        && image.interface == PmemInterface::E820
    {
        let end = Gpa(image.gpa.0 + image.len);
        add(image.gpa, end, MemoryKind::Pmem);
    }
    map
}
