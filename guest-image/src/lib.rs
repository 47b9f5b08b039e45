//! What a guest image is and where its parts go.
//!
//! The launcher asks before it starts anything, to refuse a broken image in
//! one line; the hypervisor asks again, because what it loads from lies in
//! memory that others can write. Both use this crate, so that they agree.
//!
//! Images are made by others and may be broken in any way. Headers are copied
//! once and then only the copy is used; everything in them is checked.

#![cfg_attr(not(test), no_std)]

mod elf_file;
mod error;
mod multiboot;
mod source;
#[cfg(test)]
mod tests;

pub use elf_file::{Image, Segment};
pub use error::ImageError;
pub use multiboot::BOOTLOADER_MAGIC;
pub use source::ByteSource;

/// The boot sector's mark and a bzImage's own, with their places.
const BOOT_FLAG: (u64, [u8; 2]) = (0x1fe, [0x55, 0xaa]);
const LINUX_MAGIC: (u64, [u8; 4]) = (0x202, *b"HdrS");

/// A boot protocol. An image's headers declare it, except for the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Linux: a bzImage.
    Linux,
    /// Multiboot 1, as ELF.
    Multiboot,
    /// PVH: an ELF file with a note that gives its 32-bit entry point.
    Pvh,
    /// Our own, for the paravirtual guest: a 64-bit ELF file, entered where
    /// its header says. Who starts it has to ask for it.
    Paravirtual,
}

/// The protocol by which an image wants to be booted. An ELF file that can be
/// booted by two is booted by multiboot.
///
/// # Errors
/// It is none of those, or an ELF file that is broken or for another machine.
pub fn protocol(file: &dyn ByteSource) -> Result<Protocol, ImageError> {
    if holds(file, BOOT_FLAG) && holds(file, LINUX_MAGIC) {
        return Ok(Protocol::Linux);
    }
    Image::read(file).map(|image| image.protocol)
}

fn holds<const N: usize>(file: &dyn ByteSource, (offset, bytes): (u64, [u8; N])) -> bool {
    let mut found = [0; N];
    file.read_at(offset, &mut found).is_some() && found == bytes
}
