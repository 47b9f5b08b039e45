//! The zero page: what a boot loader tells a Linux kernel.
//!
//! Source: Linux, Documentation/x86/zero-page.rst and boot.rst.

use vmm_shared::addr::Gpa;

use super::bzimage::{HEADER_START, SetupHeader, field};
use super::memory_map::MapEntry;

const SIZE: usize = 4096;
const RSDP: usize = 0x070;
const E820_ENTRIES: usize = 0x1e8;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY_SIZE: usize = 20;
/// A boot loader without a number of its own.
const LOADER_UNKNOWN: u8 = 0xff;

/// Where the initramfs is; 0 and 0 if there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Initramfs {
    pub(super) gpa: Gpa,
    pub(super) len: u64,
}

/// A zero page in the making.
pub(super) struct ZeroPage {
    bytes: [u8; SIZE],
    ranges: u8,
}

impl ZeroPage {
    /// With the kernel's header, and this loader's mark in it.
    pub(super) fn new(header: &SetupHeader) -> Self {
        let mut page = Self {
            bytes: [0; SIZE],
            ranges: 0,
        };
        page.put(HEADER_START, header.as_bytes());
        page.put(field::LOADER_TYPE, &[LOADER_UNKNOWN]);
        page.put(field::SETUP_DATA, &0_u64.to_le_bytes());
        page
    }

    pub(super) fn set_kernel(&mut self, load: Gpa) {
        self.put(field::CODE32_START, &low_u32(load.0).to_le_bytes());
    }

    pub(super) fn set_initramfs(&mut self, initramfs: Initramfs) {
        self.put(field::INITRAMFS, &low_u32(initramfs.gpa.0).to_le_bytes());
        self.put(field::INITRAMFS_SIZE, &low_u32(initramfs.len).to_le_bytes());
    }

    pub(super) fn set_command_line(&mut self, gpa: Gpa) {
        self.put(field::COMMAND_LINE, &low_u32(gpa.0).to_le_bytes());
    }

    pub(super) fn set_rsdp(&mut self, gpa: Gpa) {
        self.put(RSDP, &gpa.0.to_le_bytes());
    }

    /// E820, which has room for 128 entries.
    pub(super) fn set_memory_map(&mut self, map: &[MapEntry]) {
        for entry in map {
            let at = E820_TABLE + usize::from(self.ranges) * E820_ENTRY_SIZE;
            self.put(at, &entry.gpa.0.to_le_bytes());
            self.put(at + 8, &entry.len.to_le_bytes());
            self.put(at + 16, &(entry.kind as u32).to_le_bytes());
            self.ranges += 1;
        }
        self.put(E820_ENTRIES, &[self.ranges]);
    }

    pub(super) const fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

/// An address or size in low memory.
fn low_u32(value: u64) -> u32 {
    u32::try_from(value).expect("placed below 3 GiB")
}
