//! What a PVH loader tells the image.
//!
//! Source: Xen, public/arch-x86/hvm/start_info.h.

use alloc::vec::Vec;

use vmm_shared::addr::Gpa;
use zerocopy::{Immutable, IntoBytes};

use super::LoadError;
use super::bare::{BootData, Tables, low_u32};

const MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const VERSION: u32 = 1;

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    module_count: u32,
    modules: u64,
    command_line: u64,
    rsdp: u64,
    map: u64,
    map_entries: u32,
    reserved: u32,
}

/// Adds what the image expects; says where the start information is.
pub(super) fn write(data: &mut BootData, tables: &Tables<'_>) -> Result<Gpa, LoadError> {
    let mut modules = Vec::new();
    for module in tables.modules {
        let fields = [module.start, module.end - module.start, module.words.0, 0];
        modules.extend_from_slice(fields.as_bytes());
    }
    let mut map = Vec::new();
    for entry in tables.map {
        map.extend_from_slice(&entry.gpa.0.to_le_bytes());
        map.extend_from_slice(&entry.len.to_le_bytes());
        map.extend_from_slice(&(entry.kind as u32).to_le_bytes());
        map.extend_from_slice(&[0; 4]);
    }
    let info = StartInfo {
        magic: MAGIC,
        version: VERSION,
        flags: 0,
        module_count: low_u32(tables.modules.len() as u64),
        modules: data.add(&modules)?.0,
        command_line: tables.command_line.0,
        rsdp: tables.rsdp.0,
        map: data.add(&map)?.0,
        map_entries: low_u32(tables.map.len() as u64),
        reserved: 0,
    };
    data.add(info.as_bytes())
}
