//! The firmware tables: golden files, and what must hold for any machine.

use super::*;
use crate::platform::layout::PMEM_BASE;
use crate::platform::{PmemRange, Topology, golden};
use vmm_shared::addr::MAX_VCPUS;

fn config(vcpus: u16, image: Option<PmemInterface>) -> PlatformConfig {
    PlatformConfig {
        topology: Topology::one_node(vcpus, 512 << 20).expect("possible"),
        image: image.map(|interface| PmemRange {
            gpa: PMEM_BASE,
            len: 1 << 30,
            interface,
        }),
    }
}

/// A table that the XSDT lists, or the DSDT.
struct Found<'a> {
    signature: &'a [u8],
    bytes: &'a [u8],
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("eight bytes"))
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The table at a guest address, its checksum verified.
fn table_at(tables: &AcpiTables, gpa: u64) -> Found<'_> {
    let start = usize::try_from(gpa - tables.base.0).expect("in the tables");
    let len = u32_at(&tables.bytes, start + 4) as usize;
    let bytes = &tables.bytes[start..start + len];
    assert_eq!(sum(bytes), 0, "checksum of {:?}", &bytes[..4]);
    Found {
        signature: &bytes[..4],
        bytes,
    }
}

/// Walks the tables as a kernel does: root pointer, XSDT, FADT, DSDT.
fn walk(tables: &AcpiTables) -> Vec<Found<'_>> {
    let rsdp = &tables.bytes[usize::try_from(tables.rsdp.0 - tables.base.0).expect("small")..];
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!(sum(&rsdp[..20]), 0);
    assert_eq!(sum(&rsdp[..36]), 0);
    let xsdt = table_at(tables, u64_at(rsdp, 24));
    assert_eq!(xsdt.signature, b"XSDT");
    let mut found: Vec<_> = xsdt.bytes[36..]
        .chunks_exact(8)
        .map(|entry| table_at(tables, u64_at(entry, 0)))
        .collect();
    let dsdt = u64_at(found[0].bytes, 140);
    found.push(table_at(tables, dsdt));
    found
}

#[test]
fn tables_of_a_small_machine() {
    let tables = build(&config(2, Some(PmemInterface::E820)));
    golden::check("acpi-2-vcpus.bin", &tables.bytes);
}

#[test]
fn tables_of_a_machine_with_an_nvdimm() {
    let tables = build(&config(1, Some(PmemInterface::Nfit)));
    golden::check("acpi-1-vcpu-nvdimm.bin", &tables.bytes);
}

#[test]
fn a_kernel_finds_all_tables() {
    let tables = build(&config(4, Some(PmemInterface::Nfit)));
    let names: Vec<_> = walk(&tables)
        .iter()
        .map(|table| table.signature.to_vec())
        .collect();
    assert_eq!(names, [b"FACP", b"APIC", b"NFIT", b"DSDT"]);
    let without = build(&config(4, Some(PmemInterface::E820)));
    assert_eq!(walk(&without).len(), 3);
}

#[test]
fn the_fadt_says_what_is_absent() {
    let tables = build(&config(1, None));
    let found = walk(&tables);
    let fadt = found[0].bytes;
    assert_eq!(fadt.len(), 276);
    assert_eq!(fadt[8], 6, "major revision");
    let flags = u32_at(fadt, 112);
    assert_eq!(flags >> 20 & 1, 1, "hardware-reduced");
    assert_eq!(flags >> 10 & 1, 1, "reset register");
    let boot_arch = u16::from_le_bytes([fadt[109], fadt[110]]);
    assert_eq!(boot_arch, 1 << 2 | 1 << 5);
    // Reset, sleep control, sleep status: a byte-wide port each.
    for offset in [116, 244, 256] {
        assert_eq!(fadt[offset..offset + 4], [1, 8, 0, 1]);
        assert_eq!(u64_at(fadt, offset + 4), 0x600);
    }
    assert_eq!(fadt[128], 1, "reset value");
}

#[test]
fn the_madt_lists_every_vcpu_by_its_x2apic_id() {
    let tables = build(&config(3, None));
    let found = walk(&tables);
    let mut entries = &found[1].bytes[44..];
    let mut seen = Vec::new();
    while let [kind, len, ..] = *entries {
        if kind == 9 {
            assert_eq!(u32_at(entries, 8), 1, "enabled");
            assert_eq!(u32_at(entries, 4), u32_at(entries, 12), "id and number");
            seen.push(u32_at(entries, 4));
        }
        entries = &entries[usize::from(len)..];
    }
    assert!(entries.is_empty());
    assert_eq!(seen, [0, 1, 2]);
}

#[test]
fn the_largest_machine_fits() {
    let vcpus = u16::try_from(MAX_VCPUS).expect("fits");
    let tables = build(&config(vcpus, Some(PmemInterface::Nfit)));
    assert!(tables.range().end() <= ACPI_END);
    assert_eq!(walk(&tables).len(), 4);
}
