//! SRAT: which vCPUs and which memory belong together.
//!
//! Source: ACPI specification 6.5, section 5.2.16.

use acpi_tables::sdt::Sdt;
use alloc::vec::Vec;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use super::table;
use crate::platform::{Domain, RamRange, Topology};

const REVISION: u8 = 3;
/// Always 1, for old readers; then eight bytes without a meaning.
const RESERVED: [u8; 12] = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// In both structures: the entry counts.
const ENABLED: u32 = 1;
/// Of memory: it may come and go.
const HOT_PLUGGABLE: u32 = 2;

/// A CPU's domain, structure type 2.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct X2ApicAffinity {
    kind: u8,
    len: u8,
    reserved: U16,
    domain: U32,
    apic_id: U32,
    flags: U32,
    clock_domain: U32,
    reserved_2: U32,
}

/// A memory range's domain, structure type 1.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct MemoryAffinity {
    kind: u8,
    len: u8,
    domain: U32,
    reserved: U16,
    base: U64,
    size: U64,
    reserved_2: U32,
    flags: U32,
    reserved_3: U64,
}

const _: () = assert!(size_of::<X2ApicAffinity>() == 24);
const _: () = assert!(size_of::<MemoryAffinity>() == 40);

pub(super) fn build(topology: &Topology) -> Sdt {
    let mut body = Vec::from(RESERVED);
    for vcpu in topology.vcpu_ids() {
        let cpu = X2ApicAffinity {
            kind: 2,
            len: 24,
            reserved: U16::ZERO,
            domain: u32::from(topology.domain(vcpu).0).into(),
            apic_id: topology.apic_id(vcpu).0.into(),
            flags: ENABLED.into(),
            // All vCPUs have the same clock.
            clock_domain: U32::ZERO,
            reserved_2: U32::ZERO,
        };
        body.extend_from_slice(cpu.as_bytes());
    }
    // The RAM that is there from the start.
    for (domain, range) in topology.ram_ranges() {
        body.extend_from_slice(memory(domain, range, ENABLED).as_bytes());
    }
    // Where more may come; E820 says nothing of that.
    for (domain, range) in topology.windows() {
        let entry = memory(domain, range, ENABLED | HOT_PLUGGABLE);
        body.extend_from_slice(entry.as_bytes());
    }
    table(*b"SRAT", REVISION, &body)
}

fn memory(domain: Domain, range: RamRange, flags: u32) -> MemoryAffinity {
    MemoryAffinity {
        kind: 1,
        len: 40,
        domain: u32::from(domain.0).into(),
        reserved: U16::ZERO,
        base: range.gpa.0.into(),
        size: range.len.into(),
        reserved_2: U32::ZERO,
        flags: flags.into(),
        reserved_3: U64::ZERO,
    }
}
