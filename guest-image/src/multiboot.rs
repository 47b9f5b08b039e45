//! The multiboot header.
//!
//! Source: Multiboot Specification 0.6.96, section 3.1.

use crate::{ByteSource, ImageError};

/// What EAX holds at entry.
pub const BOOTLOADER_MAGIC: u32 = 0x2bad_b002;
const MAGIC: u32 = 0x1bad_b002;
/// The header lies all within so many bytes.
const SEARCHED: u64 = 8192;
/// Magic number, flags, checksum.
const LEN: u64 = 12;

/// Modules on page boundaries: always so.
const PAGE_ALIGN: u32 = 1;
/// The amount of memory and its map: always given.
const MEMORY: u32 = 1 << 1;
/// Flags that must be understood. Bit 2, video, can't be satisfied.
const DEMANDS: u32 = 0xffff;

/// Whether there is a header; an error if it can't be satisfied.
pub(crate) fn find(file: &dyn ByteSource) -> Result<bool, ImageError> {
    let end = SEARCHED.min(file.len());
    let mut offset = 0;
    while offset + LEN <= end {
        let mut header = [0; 12];
        if file.read_at(offset, &mut header).is_none() {
            return Ok(false);
        }
        let (words, _) = header.as_chunks();
        let [magic, flags, checksum] = [0, 1, 2].map(|at: usize| u32::from_le_bytes(words[at]));
        if magic == MAGIC && magic.wrapping_add(flags).wrapping_add(checksum) == 0 {
            return match flags & DEMANDS & !(PAGE_ALIGN | MEMORY) {
                0 => Ok(true),
                _ => Err(ImageError::UnknownDemand { flags }),
            };
        }
        offset += 4;
    }
    Ok(false)
}
