//! Bytes to load from, wherever they are.

use vmm_shared::shm::SharedMem;

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
