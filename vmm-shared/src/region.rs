//! The header by which a shared region is recognised.
//!
//! Nodes see regions as PCI memory windows in no particular order; a region
//! is found by its header, never by its slot. The header fills the first
//! large page, so that what follows is 2 MiB-aligned on every node.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::LARGE_PAGE_SIZE;
use crate::shm::SharedMem;

/// "VIADUCT\0", read as a little-endian word.
pub const MAGIC: u64 = u64::from_le_bytes(*b"VIADUCT\0");
/// Version of the layouts in control and memory regions; a node refuses any
/// other.
pub const VERSION: u32 = 5;
/// Version of an image region, which is only a header and a file system: what
/// has been built stays good when other layouts change.
pub const IMAGE_VERSION: u32 = 1;
/// Where a region's contents start, in bytes.
pub const CONTENT_OFFSET: u64 = LARGE_PAGE_SIZE;

/// Bytes that a region with so much content fills: its header and the
/// content. `None` if there is no such number.
#[must_use]
pub const fn filled_len(content_len: u64) -> Option<u64> {
    CONTENT_OFFSET.checked_add(content_len)
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

impl RegionKind {
    /// The version of such a region that this build makes and takes.
    #[must_use]
    pub const fn version(self) -> u32 {
        match self {
            Self::Control | Self::Memory => VERSION,
            Self::Image => IMAGE_VERSION,
        }
    }
}

impl core::fmt::Display for RegionKind {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Control => "control region",
            Self::Memory => "memory region",
            Self::Image => "root image",
        })
    }
}

/// The first bytes of every region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegionHeader {
    /// [`MAGIC`].
    pub magic: u64,
    /// [`RegionKind::version`].
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegionError {
    /// No header: too small, or the magic is missing.
    #[error("a region has no header, or a damaged one")]
    NotARegion,
    /// Made by another build of Viaduct.
    #[error("the {kind} has version {found}, and this is version {}: all parts of a rack must be of one build", kind.version())]
    Version {
        /// What it is.
        kind: RegionKind,
        /// The version found.
        found: u32,
    },
    /// A kind that this build does not know.
    #[error("a region's header is damaged: it says kind {found}")]
    UnknownKind {
        /// The kind found.
        found: u32,
    },
    /// The header promises more bytes than the window has.
    #[error("a region's header promises {promised} bytes, there are {present}")]
    Truncated {
        /// Bytes that it should have, header included.
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
            version: kind.version(),
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
        let kind = match self.kind {
            1 => RegionKind::Control,
            2 => RegionKind::Memory,
            3 => RegionKind::Image,
            found => return Err(RegionError::UnknownKind { found }),
        };
        if self.version != kind.version() {
            return Err(RegionError::Version {
                kind,
                found: self.version,
            });
        }
        let promised = filled_len(self.content_len).unwrap_or(u64::MAX);
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
        let len = CONTENT_OFFSET + 4096;
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
            Err(RegionError::Version {
                kind: RegionKind::Memory,
                found: 9
            })
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
}
