//! What a multiboot loader tells the image.
//!
//! Source: Multiboot Specification 0.6.96, section 3.3.

use alloc::vec::Vec;

use vmm_shared::addr::Gpa;
use zerocopy::{Immutable, IntoBytes};

use super::LoadError;
use super::bare::{BootData, Tables, low_u32};
use crate::platform::layout::{EXTENDED_MEMORY, LOW_MEMORY_END};

const HAS_MEMORY: u32 = 1;
const HAS_COMMAND_LINE: u32 = 1 << 2;
const HAS_MODULES: u32 = 1 << 3;
const HAS_MAP: u32 = 1 << 6;
const HAS_NAME: u32 = 1 << 9;
const KIB: u64 = 1024;

/// The information structure up to the loader's name.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Info {
    flags: u32,
    /// KiB from 0 and from 1 MiB on.
    memory: [u32; 2],
    boot_device: u32,
    command_line: u32,
    /// Number and address.
    modules: [u32; 2],
    symbols: [u32; 4],
    /// Bytes and address.
    map: [u32; 2],
    drives: [u32; 2],
    config_table: u32,
    loader_name: u32,
}

/// Adds what the image expects; says where the information structure is.
pub(super) fn write(data: &mut BootData, tables: &Tables<'_>) -> Result<Gpa, LoadError> {
    let mut modules = Vec::new();
    for module in tables.modules {
        let fields = [module.start, module.end, module.words.0, 0].map(low_u32);
        modules.extend_from_slice(fields.as_bytes());
    }
    let mut map = Vec::new();
    for entry in tables.map {
        // The size doesn't count itself.
        map.extend_from_slice(&20_u32.to_le_bytes());
        map.extend_from_slice(&entry.gpa.0.to_le_bytes());
        map.extend_from_slice(&entry.len.to_le_bytes());
        map.extend_from_slice(&(entry.kind as u32).to_le_bytes());
    }
    let info = Info {
        flags: HAS_MEMORY | HAS_COMMAND_LINE | HAS_MODULES | HAS_MAP | HAS_NAME,
        memory: [
            low_u32(LOW_MEMORY_END.0 / KIB),
            low_u32(tables.low_end.saturating_sub(EXTENDED_MEMORY.0) / KIB),
        ],
        boot_device: 0,
        command_line: low_u32(tables.command_line.0),
        modules: [
            low_u32(tables.modules.len() as u64),
            low_u32(data.add(&modules)?.0),
        ],
        symbols: [0; 4],
        map: [low_u32(map.len() as u64), low_u32(data.add(&map)?.0)],
        drives: [0; 2],
        config_table: 0,
        loader_name: low_u32(data.add(b"Viaduct\0")?.0),
    };
    data.add(info.as_bytes())
}
