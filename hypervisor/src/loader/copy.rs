//! Copying into guest memory.

use alloc::vec;

use guest_image::{ByteSource, Segment};
use vmm_shared::addr::Gpa;

use super::LoadError;
use crate::mem::GuestMemory;

/// Copied at once: large enough that the cost per piece does not matter.
const CHUNK: usize = 256 << 10;

/// Copies `len` bytes at `offset` of the file to `to` in guest memory.
pub(super) fn copy(
    memory: &impl GuestMemory,
    from: &dyn ByteSource,
    offset: u64,
    to: Gpa,
    len: u64,
) -> Result<(), LoadError> {
    let whole = usize::try_from(len).unwrap_or(CHUNK);
    let mut buffer = vec![0; whole.min(CHUNK)];
    let mut done = 0;
    while done < len {
        let rest = usize::try_from(len - done).unwrap_or(CHUNK);
        let size = rest.min(CHUNK);
        let piece = &mut buffer[..size];
        let unreadable = LoadError::Unreadable {
            offset: offset.saturating_add(done),
        };
        let at = offset.checked_add(done).ok_or(unreadable)?;
        from.read_at(at, piece).ok_or(unreadable)?;
        memory.write_bytes(Gpa(to.0 + done), piece)?;
        done += size as u64;
    }
    Ok(())
}

/// Copies a segment of an image to its place, and clears what the file does not
/// have of it.
pub(super) fn copy_segment(
    memory: &impl GuestMemory,
    from: &dyn ByteSource,
    segment: &Segment,
) -> Result<(), LoadError> {
    let file_len = segment.file_len;
    copy(memory, from, segment.file_offset, segment.gpa, file_len)?;
    let rest = Gpa(segment.gpa.0 + file_len);
    clear(memory, rest, segment.len - file_len)
}

/// Fills `len` bytes of guest memory with zeros.
fn clear(memory: &impl GuestMemory, mut to: Gpa, len: u64) -> Result<(), LoadError> {
    let zeros = vec![0; usize::try_from(len).unwrap_or(CHUNK).min(CHUNK)];
    let mut left = len;
    while left > 0 {
        let size = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        memory.write_bytes(to, &zeros[..size])?;
        to = Gpa(to.0 + size as u64);
        left -= size as u64;
    }
    Ok(())
}
