//! Images that are entered in 32-bit protected mode: multiboot and PVH.
//!
//! ```text
//!   0x9b000   boot data: command lines, memory map, what the protocol wants;
//!             behind the image if a segment wants this place
//!   0xe0000   ACPI tables
//!   …         segments, where the image says
//!             modules, on pages behind the highest segment
//! ```

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use guest_image::{ByteSource, Image, Protocol};
use vmm_shared::addr::{Gpa, PAGE_SIZE};

use super::memory_map::{MapEntry, memory_map};
use super::{LoadError, check_no_zero, copy, multiboot, pvh, write_firmware};
use crate::mem::GuestMemory;
use crate::platform::PlatformConfig;
use crate::platform::layout::{self, ACPI_BASE, ACPI_END};

/// Where the boot data usually are: as high as they can be below 1 MiB, since
/// images build their tables and trampolines from the bottom.
const LOW_DATA: Gpa = Gpa(0x9_b000);
/// Room for them.
const DATA_ROOM: u64 = 0x4000;
const _: () = assert!(LOW_DATA.0 + DATA_ROOM <= layout::LOW_MEMORY_END.0);

/// A file that an image is booted with.
#[derive(Clone, Copy)]
pub struct Module<'a> {
    /// Its bytes.
    pub content: &'a dyn ByteSource,
    /// Its command line, without a terminator.
    pub words: &'a [u8],
}

/// What a bare-metal guest is started from.
#[derive(Clone, Copy)]
pub struct BareBoot<'a> {
    /// The machine.
    pub platform: &'a PlatformConfig,
    /// The image: ELF with a multiboot header or a PVH note.
    pub image: &'a dyn ByteSource,
    /// Files that it wants besides.
    pub modules: &'a [Module<'a>],
    /// Its command line, without a terminator.
    pub command_line: &'a [u8],
}

/// The state in which vCPU 0 enters the image: 32-bit protected mode with flat
/// segments, no paging, interrupts off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BareEntry {
    /// First instruction.
    pub eip: u32,
    /// The protocol's mark.
    pub eax: u32,
    /// Where the protocol's information is.
    pub ebx: u32,
}

/// Puts image, modules, boot data and ACPI tables into guest memory.
///
/// # Errors
/// What is wrong with the image, or what does not fit. Guest memory may have
/// been written then.
pub fn load_bare(memory: &impl GuestMemory, boot: &BareBoot<'_>) -> Result<BareEntry, LoadError> {
    let low_end = boot.platform.topology.memory().min(layout::LOW_RAM_LIMIT.0);
    let image = Image::read(boot.image)?;
    let acpi = write_firmware(memory, boot.platform)?;
    let firmware = ACPI_BASE..ACPI_END;
    for segment in image.segments() {
        if segment.end() > Gpa(low_end) || segment.overlaps(&firmware) {
            return Err(LoadError::Misplaced {
                start: segment.gpa,
                end: segment.end(),
                limit: low_end,
            });
        }
        copy::copy_segment(memory, boot.image, segment)?;
    }

    let (data, next) = place_data(&image);
    let mut data = BootData::new(data);
    let mut placed = Vec::new();
    let mut next = next;
    for module in boot.modules {
        let start = next.next_multiple_of(PAGE_SIZE);
        let end = start.saturating_add(module.content.len());
        if end > low_end {
            let limit = low_end;
            return Err(LoadError::ModulesDoNotFit { end, limit });
        }
        copy::copy(memory, module.content, 0, Gpa(start), module.content.len())?;
        next = end;
        placed.push(PlacedModule {
            start,
            end,
            words: data.words(module.words)?,
        });
    }
    let tables = Tables {
        command_line: data.words(boot.command_line)?,
        modules: &placed,
        map: &memory_map(boot.platform, acpi.range()),
        low_end,
        rsdp: acpi.rsdp,
    };
    let (eax, info) = match image.protocol {
        Protocol::Pvh => (0, pvh::write(&mut data, &tables)?),
        _ => (
            guest_image::BOOTLOADER_MAGIC,
            multiboot::write(&mut data, &tables)?,
        ),
    };
    if data.end() > Gpa(low_end) {
        return Err(LoadError::Misplaced {
            start: data.base,
            end: data.end(),
            limit: low_end,
        });
    }
    memory.write_bytes(data.base, &data.bytes)?;
    Ok(BareEntry {
        eip: image.entry,
        eax,
        ebx: low_u32(info.0),
    })
}

/// Where the boot data go, and from where on the modules may.
fn place_data(image: &Image) -> (Gpa, u64) {
    let low: Range<Gpa> = LOW_DATA..Gpa(LOW_DATA.0 + DATA_ROOM);
    let behind = image.end().0.max(layout::EXTENDED_MEMORY.0);
    let behind = behind.next_multiple_of(PAGE_SIZE);
    if image
        .segments()
        .iter()
        .any(|segment| segment.overlaps(&low))
    {
        return (Gpa(behind), behind + DATA_ROOM);
    }
    (low.start, behind)
}

/// A module in memory.
pub(super) struct PlacedModule {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) words: Gpa,
}

/// What both protocols tell an image, each in its own form.
pub(super) struct Tables<'a> {
    pub(super) command_line: Gpa,
    pub(super) modules: &'a [PlacedModule],
    pub(super) map: &'a [MapEntry],
    /// Where low memory ends.
    pub(super) low_end: u64,
    pub(super) rsdp: Gpa,
}

/// Boot data in the making.
pub(super) struct BootData {
    base: Gpa,
    bytes: Vec<u8>,
}

impl BootData {
    fn new(base: Gpa) -> Self {
        Self {
            base,
            bytes: vec![],
        }
    }

    fn end(&self) -> Gpa {
        Gpa(self.base.0 + self.bytes.len() as u64)
    }

    /// Adds bytes at a multiple of 8; says where they will be.
    pub(super) fn add(&mut self, bytes: &[u8]) -> Result<Gpa, LoadError> {
        let start = self.bytes.len().next_multiple_of(8);
        let end = start + bytes.len();
        if end as u64 > DATA_ROOM {
            return Err(LoadError::CommandLineTooLong {
                len: end,
                limit: usize::try_from(DATA_ROOM).expect("a small number"),
            });
        }
        self.bytes.resize(start, 0);
        self.bytes.extend_from_slice(bytes);
        Ok(Gpa(self.base.0 + start as u64))
    }

    /// Adds a command line with its terminator.
    fn words(&mut self, words: &[u8]) -> Result<Gpa, LoadError> {
        check_no_zero(words)?;
        let mut bytes = words.to_vec();
        bytes.push(0);
        self.add(&bytes)
    }
}

/// An address or size in low memory.
pub(super) fn low_u32(value: u64) -> u32 {
    u32::try_from(value).expect("placed below 3 GiB")
}
