//! The setup header of a bzImage.
//!
//! Source: Linux, Documentation/x86/boot.rst (protocol 2.12 and later).

use vmm_shared::addr::{Gpa, PAGE_SIZE};

use guest_image::ByteSource;

use super::LoadError;
use crate::platform::layout::EXTENDED_MEMORY;

/// Where the header starts, in the file as in the zero page.
pub(super) const HEADER_START: usize = 0x1f1;
/// Where the header's last field that we use ends.
const HEADER_NEEDED: usize = 0x264;
/// Where the zero page's room for the header ends.
const HEADER_MAX: usize = 0x290;
const OLDEST_PROTOCOL: u16 = 0x020c;
const SECTOR: u64 = 512;
/// Setup sectors if the header says 0.
const DEFAULT_SETUP_SECTORS: u8 = 4;
/// The kernel's own link address, if the header gives none.
const DEFAULT_ADDRESS: u64 = 16 << 20;
/// `loadflags`: the protected-mode part goes above 1 MiB.
const LOADED_HIGH: u8 = 1;
/// `xloadflags`: there is a 64-bit entry point at 0x200.
const KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;

/// Offsets of fields in the file.
pub(super) mod field {
    pub(in super::super) const SETUP_SECTORS: usize = 0x1f1;
    pub(in super::super) const SYSTEM_SIZE: usize = 0x1f4;
    pub(in super::super) const BOOT_FLAG: usize = 0x1fe;
    pub(in super::super) const JUMP_OFFSET: usize = 0x201;
    pub(in super::super) const MAGIC: usize = 0x202;
    pub(in super::super) const VERSION: usize = 0x206;
    pub(in super::super) const LOADER_TYPE: usize = 0x210;
    pub(in super::super) const LOAD_FLAGS: usize = 0x211;
    pub(in super::super) const CODE32_START: usize = 0x214;
    pub(in super::super) const INITRAMFS: usize = 0x218;
    pub(in super::super) const INITRAMFS_SIZE: usize = 0x21c;
    pub(in super::super) const COMMAND_LINE: usize = 0x228;
    pub(in super::super) const INITRAMFS_MAX: usize = 0x22c;
    pub(in super::super) const ALIGNMENT: usize = 0x230;
    pub(in super::super) const RELOCATABLE: usize = 0x234;
    pub(in super::super) const EXTRA_LOAD_FLAGS: usize = 0x236;
    pub(in super::super) const COMMAND_LINE_SIZE: usize = 0x238;
    pub(in super::super) const SETUP_DATA: usize = 0x250;
    pub(in super::super) const PREFERRED_ADDRESS: usize = 0x258;
    pub(in super::super) const INIT_SIZE: usize = 0x260;
}

/// A copy of a kernel's setup header that has been found usable.
#[derive(Clone, Debug)]
pub struct SetupHeader {
    /// The file's start up to the longest header; zeros behind the actual one.
    bytes: [u8; HEADER_MAX],
    file_len: u64,
}

/// Where a kernel goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Placement {
    /// Where in the file the part to load is.
    pub(super) file_offset: u64,
    /// Bytes to load.
    pub(super) file_len: u64,
    /// Where to load them.
    pub(super) load: Gpa,
    /// First byte that the kernel does not use before it knows its memory.
    pub(super) end: Gpa,
}

impl Placement {
    /// The first instruction.
    pub(super) const fn entry(self) -> u64 {
        self.load.0 + ENTRY_64
    }
}

impl SetupHeader {
    /// Reads and checks the header of a kernel file.
    ///
    /// # Errors
    /// Why this is no kernel that can be started.
    pub fn read(file: &dyn ByteSource) -> Result<Self, LoadError> {
        let file_len = file.len();
        let too_short = LoadError::TooShort { len: file_len };
        let mut bytes = [0; HEADER_MAX];
        file.read_at(0, &mut bytes[..HEADER_NEEDED])
            .ok_or(too_short)?;
        let mut header = Self { bytes, file_len };
        if header.u16(field::BOOT_FLAG) != 0xaa55 || header.u32(field::MAGIC) != HDRS {
            return Err(LoadError::NotBzImage);
        }
        let version = header.u16(field::VERSION);
        if version < OLDEST_PROTOCOL {
            return Err(LoadError::OldProtocol { version });
        }
        // The jump over the header says where it ends.
        let end = field::MAGIC + usize::from(header.bytes[field::JUMP_OFFSET]);
        if end < HEADER_NEEDED {
            return Err(LoadError::TooShort { len: end as u64 });
        }
        let rest = HEADER_NEEDED..end.min(HEADER_MAX);
        file.read_at(HEADER_NEEDED as u64, &mut header.bytes[rest])
            .ok_or(too_short)?;
        if header.bytes[field::LOAD_FLAGS] & LOADED_HIGH == 0 {
            return Err(LoadError::NotBzImage);
        }
        if header.bytes[field::RELOCATABLE] == 0 {
            return Err(LoadError::NotRelocatable);
        }
        if header.u16(field::EXTRA_LOAD_FLAGS) & KERNEL_64 == 0 {
            return Err(LoadError::No64BitEntry);
        }
        let alignment = header.u32(field::ALIGNMENT);
        if !alignment.is_power_of_two() || u64::from(alignment) < PAGE_SIZE {
            return Err(LoadError::BadAlignment { alignment });
        }
        Ok(header)
    }

    /// Longest command line that the kernel takes, without its terminator.
    #[must_use]
    pub fn command_line_limit(&self) -> u32 {
        self.u32(field::COMMAND_LINE_SIZE)
    }

    /// Highest address that the initramfs may occupy.
    #[must_use]
    pub fn initramfs_limit(&self) -> u32 {
        self.u32(field::INITRAMFS_MAX)
    }

    /// The header's bytes, from [`HEADER_START`] on.
    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.bytes[HEADER_START..]
    }

    /// Where the kernel goes in memory that ends at `low_end`.
    pub(super) fn place(&self, low_end: u64) -> Result<Placement, LoadError> {
        let setup_sectors = match self.bytes[field::SETUP_SECTORS] {
            0 => DEFAULT_SETUP_SECTORS,
            sectors => sectors,
        };
        let file_offset = (u64::from(setup_sectors) + 1) * SECTOR;
        let file_len = u64::from(self.u32(field::SYSTEM_SIZE)) * 16;
        // At least up to the entry point.
        let expected = file_offset + file_len.max(ENTRY_64 + 1);
        if self.file_len < expected || file_len <= ENTRY_64 {
            return Err(LoadError::Truncated {
                expected,
                len: self.file_len,
            });
        }

        let preferred = match self.u64(field::PREFERRED_ADDRESS) {
            address if address < EXTENDED_MEMORY.0 => DEFAULT_ADDRESS,
            address => address,
        };
        let alignment = u64::from(self.u32(field::ALIGNMENT));
        let size = file_len.max(u64::from(self.u32(field::INIT_SIZE)));
        let does_not_fit = |end| LoadError::KernelDoesNotFit {
            end,
            limit: low_end,
        };
        let load = preferred
            .checked_next_multiple_of(alignment)
            .ok_or(does_not_fit(u64::MAX))?;
        let end = load.checked_add(size).ok_or(does_not_fit(u64::MAX))?;
        if end > low_end {
            return Err(does_not_fit(end));
        }
        Ok(Placement {
            file_offset,
            file_len,
            load: Gpa(load),
            end: Gpa(end),
        })
    }

    fn array<const N: usize>(&self, offset: usize) -> [u8; N] {
        *self.bytes[offset..]
            .first_chunk()
            .expect("all fields are inside the header")
    }

    fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.array(offset))
    }

    fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.array(offset))
    }

    fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.array(offset))
    }
}

/// The magic number as a little-endian word.
const HDRS: u32 = u32::from_le_bytes(*b"HdrS");
