//! Shared memory regions as the launcher makes them.
//!
//! A region is a memfd: it has no name in any file system, so nothing is left
//! behind when the processes that use it are gone.
#![expect(unsafe_code, reason = "a mapping becomes a window of shared memory")]

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::ptr::NonNull;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use vmm_shared::region::{RegionError, RegionHeader, RegionKind, filled_len};
use vmm_shared::shm::SharedMem;
use zerocopy::{FromBytes, IntoBytes};

use crate::error::RackError;

/// A shared region, or a private view of a file in a region's format.
#[derive(Debug)]
pub(crate) struct Region {
    file: File,
    len: u64,
}

/// Bytes of a window for `content_len` bytes of content: PCI windows are
/// powers of two. `None` if there is no such number.
pub(crate) fn window_len(content_len: u64) -> Option<u64> {
    filled_len(content_len)?.checked_next_power_of_two()
}

impl Region {
    /// A zeroed region with room for `content_len` bytes. Pages that are
    /// never touched cost nothing.
    pub(crate) fn create(
        kind: RegionKind,
        uuid: [u8; 16],
        owner: u16,
        content_len: u64,
    ) -> Result<Self, RackError> {
        let what = RackError::host_errno("make a shared memory region");
        let too_large = || RackError::Host {
            doing: "make a shared memory region",
            error: std::io::ErrorKind::FileTooLarge.into(),
        };
        let len = window_len(content_len).ok_or_else(too_large)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("viaduct-region", flags)
            .and_then(|fd| {
                rustix::fs::ftruncate(&fd, len)?;
                // A node that shrank a region would kill every process that
                // has it mapped.
                let fixed = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
                rustix::fs::fcntl_add_seals(&fd, fixed)?;
                Ok(File::from(fd))
            })
            .map_err(what)?;
        let region = Self { file, len };
        region.set_header(&RegionHeader::new(
            kind,
            uuid,
            u32::from(owner),
            content_len,
        ))?;
        Ok(region)
    }

    fn set_header(&self, header: &RegionHeader) -> Result<(), RackError> {
        self.file
            .write_all_at(header.as_bytes(), 0)
            .map_err(RackError::host("write a shared memory region"))
    }

    /// The header as it is now; peers may have written there.
    pub(crate) fn header(&self) -> Result<RegionHeader, RackError> {
        let mut bytes = [0; size_of::<RegionHeader>()];
        self.file
            .read_exact_at(&mut bytes, 0)
            .map_err(RackError::host("read a shared memory region"))?;
        Ok(RegionHeader::read_from_bytes(&bytes).expect("exactly its size"))
    }

    /// Changes the header, to try what nodes do about it.
    pub(crate) fn change_header(
        &self,
        change: impl FnOnce(&mut RegionHeader),
    ) -> Result<(), RackError> {
        let mut header = self.header()?;
        change(&mut header);
        self.set_header(&header)
    }

    /// Whether the region is still what it was made as.
    pub(crate) fn check(&self, kind: RegionKind) -> Result<(), RegionError> {
        let header = self.header().map_err(|_| RegionError::NotARegion)?;
        match header.kind_in(self.len)? {
            found if found == kind => Ok(()),
            found => Err(RegionError::UnknownKind {
                found: found as u32,
            }),
        }
    }

    /// A region that is already in `file`, `len` bytes long.
    pub(crate) fn from_file(file: File, len: u64) -> Self {
        Self { file, len }
    }

    /// The file behind the region.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Bytes in all, a power of two.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Bytes of it that take memory: pages that somebody has touched.
    pub(crate) fn touched(&self) -> Result<u64, RackError> {
        let metadata = self.file.metadata();
        // In units of 512 bytes, whatever the file system's own.
        metadata
            .map(|metadata| metadata.blocks() * 512)
            .map_err(RackError::host("look at a shared memory region"))
    }

    /// Maps the region into this process, for as long as the process lives:
    /// windows are copied freely, so no one could tell when the last is gone.
    pub(crate) fn map(&self) -> Result<SharedMem, RackError> {
        let mapping = memmap2::MmapRaw::map_raw(&self.file)
            .map_err(RackError::host("map a shared memory region"))?;
        let mapping: &'static memmap2::MmapRaw = Box::leak(Box::new(mapping));
        let base = NonNull::new(mapping.as_mut_ptr()).expect("a mapping is never at null");
        // SAFETY: 1. leaked, so mapped for ever, and sealed, so never shorter;
        // 2. mappings are page-aligned; 3. `MmapRaw` makes no references.
        Ok(unsafe { SharedMem::new(base, mapping.len()) })
    }

    /// Gives the memory back although the region stays mapped.
    pub(crate) fn release(&self) {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // The memory then goes with the process: nothing to report.
        let _ = rustix::fs::fallocate(&self.file, punch, 0, self.len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_recognised_when_mapped() {
        let region = Region::create(RegionKind::Memory, [3; 16], 5, 10 << 20).expect("made");
        assert_eq!(region.len(), 16 << 20);
        let memory = region.map().expect("mapped");
        let (kind, header) = RegionHeader::check(&memory).expect("a region");
        assert_eq!(kind, RegionKind::Memory);
        assert_eq!((header.owner, header.content_len), (5, 10 << 20));
    }

    #[test]
    fn a_damaged_header_is_noticed() {
        let region = Region::create(RegionKind::Memory, [3; 16], 5, 10 << 20).expect("made");
        assert_eq!(region.check(RegionKind::Memory), Ok(()));
        assert!(region.check(RegionKind::Image).is_err());
        let longer = |header: &mut RegionHeader| header.content_len = 1 << 40;
        region.change_header(longer).expect("writable");
        assert!(matches!(
            region.check(RegionKind::Memory),
            Err(RegionError::Truncated { .. })
        ));
    }

    #[test]
    fn a_region_can_not_be_shrunk() {
        let region = Region::create(RegionKind::Memory, [0; 16], 0, 1).expect("made");
        assert!(region.file().set_len(4096).is_err());
    }

    #[test]
    fn released_memory_is_zero_and_still_mapped() {
        let region = Region::create(RegionKind::Memory, [0; 16], 0, 1).expect("made");
        let memory = region.map().expect("mapped");
        memory.write(64, &7_u64).expect("fits");
        region.release();
        assert_eq!(memory.read::<u64>(64), Some(0));
    }

    #[test]
    fn windows_are_powers_of_two() {
        assert_eq!(window_len(0), Some(2 << 20));
        assert_eq!(window_len(1 << 30), Some(2 << 30));
        assert_eq!(window_len((1 << 30) - (2 << 20)), Some(1 << 30));
        assert_eq!(window_len(u64::MAX), None);
    }
}
