//! Bytes to load from, wherever they are.

use alloc::vec;

use vmm_shared::addr::Gpa;
use vmm_shared::shm::SharedMem;

use super::LoadError;
use crate::mem::GuestMemory;

/// Copied at once: large enough that the cost per piece does not matter.
const CHUNK: usize = 256 << 10;

/// A file to load.
pub trait ByteSource {
    /// Bytes in the file.
    fn len(&self) -> u64;

    /// Copies bytes out of the file; `None` if they are not all in it.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> Option<()>;

    /// Whether the file has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl ByteSource for SharedMem {
    fn len(&self) -> u64 {
        Self::len(self) as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Option<()> {
        self.read_bytes(usize::try_from(offset).ok()?, into)
    }
}

impl ByteSource for &[u8] {
    fn len(&self) -> u64 {
        <[u8]>::len(self) as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Option<()> {
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(into.len())?;
        into.copy_from_slice(self.get(start..end)?);
        Some(())
    }
}

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
