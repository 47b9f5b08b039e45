//! NFIT: the root image as one NVDIMM.
//!
//! The module is marked as not armed, "writes may not persist", and a kernel
//! therefore refuses to write to it. It needs a control region, because the
//! kernel identifies a range by the serial numbers of its modules, and a device
//! of its own below the root device in the DSDT.
//!
//! Source: ACPI specification 6.5, section 5.2.26.

use acpi_tables::sdt::Sdt;
use alloc::vec::Vec;
use zerocopy::{Immutable, IntoBytes};

use super::table;
use crate::platform::PmemRange;

const REVISION: u8 = 1;
/// The range's index and that of the module's control region.
const INDEX: u16 = 1;
/// The module's handle; its device's address in the DSDT is the same.
pub(super) const HANDLE: u32 = 1;
/// Byte-addressable persistent memory, as a GUID in its mixed byte order:
/// 66f0d379-b4f3-4074-ac43-0d3318b78cdb.
const PERSISTENT_MEMORY: [u8; 16] = [
    0x79, 0xd3, 0xf0, 0x66, 0xf3, 0xb4, 0x74, 0x40, 0xac, 0x43, 0x0d, 0x33, 0x18, 0xb7, 0x8c, 0xdb,
];
/// Write-back, non-volatile.
const MEMORY_ATTRIBUTES: u64 = 0x8 | 0x8000;
const NOT_ARMED: u16 = 1 << 3;
/// Interface code: byte-addressable, energy-backed.
const BYTE_ADDRESSABLE: u16 = 0x0301;

/// A range of physical addresses, structure type 0.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct AddressRange {
    kind: u16,
    len: u16,
    index: u16,
    flags: u16,
    reserved: u32,
    proximity_domain: u32,
    guid: [u8; 16],
    base: u64,
    size: u64,
    attributes: u64,
}

/// Which part of a module is in which range, structure type 1.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct MemoryMap {
    kind: u16,
    len: u16,
    handle: u32,
    physical_id: u16,
    region_id: u16,
    range_index: u16,
    control_index: u16,
    size: u64,
    offset: u64,
    module_address: u64,
    interleave_index: u16,
    interleave_ways: u16,
    flags: u16,
    reserved: u16,
}

/// What a module is, structure type 4, without block windows.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct ControlRegion {
    kind: u16,
    len: u16,
    index: u16,
    vendor: u16,
    device: u16,
    revision: u16,
    subsystem_vendor: u16,
    subsystem_device: u16,
    subsystem_revision: u16,
    valid_fields: u8,
    manufacturing_location: u8,
    manufacturing_date: u16,
    reserved: u16,
    serial: u32,
    interface: u16,
    windows: u16,
}

const _: () = assert!(size_of::<AddressRange>() == 56);
const _: () = assert!(size_of::<MemoryMap>() == 48);
const _: () = assert!(size_of::<ControlRegion>() == 32);

pub(super) fn build(image: &PmemRange) -> Sdt {
    let range = AddressRange {
        kind: 0,
        len: 56,
        index: INDEX,
        flags: 0,
        reserved: 0,
        proximity_domain: 0,
        guid: PERSISTENT_MEMORY,
        base: image.gpa.0,
        size: image.len,
        attributes: MEMORY_ATTRIBUTES,
    };
    let map = MemoryMap {
        kind: 1,
        len: 48,
        handle: HANDLE,
        physical_id: 0,
        region_id: 0,
        range_index: INDEX,
        control_index: INDEX,
        size: image.len,
        offset: 0,
        module_address: 0,
        interleave_index: 0,
        interleave_ways: 1,
        flags: NOT_ARMED,
        reserved: 0,
    };
    let control = ControlRegion {
        kind: 4,
        len: 32,
        index: INDEX,
        vendor: 0,
        device: 0,
        revision: 0,
        subsystem_vendor: 0,
        subsystem_device: 0,
        subsystem_revision: 0,
        valid_fields: 0,
        manufacturing_location: 0,
        manufacturing_date: 0,
        reserved: 0,
        serial: 1,
        interface: BYTE_ADDRESSABLE,
        windows: 0,
    };
    let mut body = Vec::from(0_u32.to_le_bytes());
    body.extend_from_slice(range.as_bytes());
    body.extend_from_slice(map.as_bytes());
    body.extend_from_slice(control.as_bytes());
    table(*b"NFIT", REVISION, &body)
}
