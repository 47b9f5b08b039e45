//! The header by which a shared region is recognised.
//!
//! Nodes see regions as PCI memory windows in no particular order; a region
//! is found by its header, never by its slot. The header fills the first
//! large page, so that what follows is 2 MiB-aligned on every node.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::{LARGE_PAGE_SIZE, PAGE_SIZE};
use crate::shm::SharedMem;

/// "VIADUCT\0", read as a little-endian word.
pub const MAGIC: u64 = u64::from_le_bytes(*b"VIADUCT\0");
/// Version of every layout in this crate; a node refuses any other.
pub const VERSION: u32 = 2;
/// Where a region's contents start, in bytes.
pub const CONTENT_OFFSET: u64 = LARGE_PAGE_SIZE;

/// Bytes of a coherence record: one for each small page of a memory region.
const PAGE_RECORD_SIZE: u64 = 32;

/// Where the coherence protocol's metadata starts in a memory region with so
/// much content, in bytes from the region's start: right behind the content.
/// It is never part of the guest's memory.
#[must_use]
pub const fn metadata_offset(content_len: u64) -> u64 {
    CONTENT_OFFSET.saturating_add(content_len)
}

/// Bytes of that metadata: a record for each small page, rounded up to large
/// pages, so that it is mapped like the content. Less than 1 % of it.
#[must_use]
pub const fn metadata_len(content_len: u64) -> u64 {
    let records = content_len.div_ceil(PAGE_SIZE) * PAGE_RECORD_SIZE;
    records.next_multiple_of(LARGE_PAGE_SIZE)
}

/// Bytes that a region with so much content fills: its header, the content,
/// and the metadata if it is a memory region. `None` if there is no such
/// number.
#[must_use]
pub const fn filled_len(kind: RegionKind, content_len: u64) -> Option<u64> {
    let metadata = match kind {
        RegionKind::Memory => metadata_len(content_len),
        RegionKind::Control | RegionKind::Image => 0,
    };
    match CONTENT_OFFSET.checked_add(content_len) {
        Some(end) => end.checked_add(metadata),
        None => None,
    }
}

/// What a region is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RegionKind {
    /// Membership, boot bundle, queues and counters: one per rack.
    Control = 1,
    /// Memory that one node gives to the VM.
    Memory = 2,
    /// A root file system, read-only, given to the guest as persistent memory.
    Image = 3,
}

/// The first bytes of every region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegionHeader {
    /// [`MAGIC`].
    pub magic: u64,
    /// [`VERSION`].
    pub version: u32,
    /// A [`RegionKind`] as a number.
    pub kind: u32,
    /// The rack this region belongs to; all zero for an image, which any
    /// number of racks may share.
    pub uuid: [u8; 16],
    /// The node that gives the memory; 0 where that has no meaning.
    pub owner: u32,
    /// Zero.
    pub reserved: u32,
    /// Bytes of content behind [`CONTENT_OFFSET`].
    pub content_len: u64,
}

const _: () = assert!(size_of::<RegionHeader>() == 48);

/// Why a window is not the region that it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionError {
    /// No header: too small, or the magic is missing.
    NotARegion,
    /// Made by another build of Viaduct.
    Version {
        /// The version found.
        found: u32,
    },
    /// A kind that this build does not know.
    UnknownKind {
        /// The kind found.
        found: u32,
    },
    /// The header promises more bytes than the window has.
    Truncated {
        /// Bytes that it should have, header and metadata included.
        promised: u64,
        /// Bytes that it has.
        present: u64,
    },
}

impl RegionHeader {
    /// A header for a region of this build.
    #[must_use]
    pub fn new(kind: RegionKind, uuid: [u8; 16], owner: u32, content_len: u64) -> Self {
        Self {
            magic: MAGIC,
            version: VERSION,
            kind: kind as u32,
            uuid,
            owner,
            reserved: 0,
            content_len,
        }
    }

    /// Reads and checks the header at the start of `memory`.
    ///
    /// # Errors
    /// Says why the window is no region that this build can use.
    pub fn check(memory: &SharedMem) -> Result<(RegionKind, Self), RegionError> {
        let header: Self = memory.read(0).ok_or(RegionError::NotARegion)?;
        let kind = header.kind_in(memory.len() as u64)?;
        Ok((kind, header))
    }

    /// What kind of region this is the header of, if it belongs to a window
    /// of `present` bytes.
    ///
    /// # Errors
    /// Says why the window is no region that this build can use.
    pub fn kind_in(&self, present: u64) -> Result<RegionKind, RegionError> {
        if self.magic != MAGIC {
            return Err(RegionError::NotARegion);
        }
        if self.version != VERSION {
            return Err(RegionError::Version {
                found: self.version,
            });
        }
        let kind = match self.kind {
            1 => RegionKind::Control,
            2 => RegionKind::Memory,
            3 => RegionKind::Image,
            found => return Err(RegionError::UnknownKind { found }),
        };
        let promised = filled_len(kind, self.content_len).unwrap_or(u64::MAX);
        if promised > present {
            return Err(RegionError::Truncated { promised, present });
        }
        Ok(kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::testing::leaked;

    #[test]
    fn a_header_is_recognised_and_a_damaged_one_refused() {
        let len = CONTENT_OFFSET + 4096 + LARGE_PAGE_SIZE;
        let memory = leaked(len as usize / 64);
        assert_eq!(RegionHeader::check(&memory), Err(RegionError::NotARegion));
        let good = RegionHeader::new(RegionKind::Memory, [7; 16], 3, 4096);
        memory.write(0, &good).expect("fits");
        assert_eq!(RegionHeader::check(&memory), Ok((RegionKind::Memory, good)));

        memory
            .write(0, &RegionHeader { version: 9, ..good })
            .expect("fits");
        assert_eq!(
            RegionHeader::check(&memory),
            Err(RegionError::Version { found: 9 })
        );
        memory
            .write(0, &RegionHeader { kind: 0, ..good })
            .expect("fits");
        assert_eq!(
            RegionHeader::check(&memory),
            Err(RegionError::UnknownKind { found: 0 })
        );
        memory
            .write(
                0,
                &RegionHeader {
                    content_len: 4097,
                    ..good
                },
            )
            .expect("fits");
        assert_eq!(
            RegionHeader::check(&memory),
            Err(RegionError::Truncated {
                promised: len + 1,
                present: len
            })
        );
    }

    #[test]
    fn metadata_is_less_than_a_hundredth_of_what_it_describes() {
        for content in [1 << 30, 37 << 30, 1 << 40] {
            assert!(metadata_len(content) * 100 <= content);
            assert_eq!(metadata_len(content), content / 128);
            assert_eq!(metadata_offset(content), CONTENT_OFFSET + content);
        }
        assert_eq!(metadata_len(LARGE_PAGE_SIZE), LARGE_PAGE_SIZE);
        assert_eq!(metadata_len(0), 0);
        assert_eq!(filled_len(RegionKind::Memory, u64::MAX), None);
        assert_eq!(filled_len(RegionKind::Control, 9), Some(CONTENT_OFFSET + 9));
    }
}
