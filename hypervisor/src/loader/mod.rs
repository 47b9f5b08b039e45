//! Puts a kernel into guest memory, ready to be entered.
//!
//! What is loaded was made by others and may be broken in any way; so may the
//! memory it comes from, which another process may change meanwhile. Headers
//! are therefore copied once and then only the copy is used, and everything
//! in them is checked before it is acted on.
//!
//! Low memory while a Linux kernel takes over (it copies what it needs early;
//! for other images see [`load_bare`]):
//!
//! ```text
//!   0x01000  GDT
//!   0x08000  top of the stack
//!   0x09000  page tables: the first 4 GiB, mapped to themselves
//!   0x10000  zero page
//!   0x11000  command line
//!   0xe0000  ACPI tables
//! ```

mod bare;
#[cfg(test)]
mod bare_tests;
mod bzimage;
mod copy;
mod entry;
mod memory_map;
mod multiboot;
mod pv;
mod pvh;
#[cfg(test)]
mod tests;
mod zero_page;

pub use bare::{BareBoot, BareEntry, Module, load_bare};
pub use bzimage::SetupHeader;
pub use entry::{CODE_SELECTOR, DATA_SELECTOR, GdtRegister};
pub use guest_image::{ByteSource, ImageError, Protocol, protocol};
pub use pv::{PvBoot, load_pv, losses, rings, start_up};

use vmm_shared::addr::{Gpa, PAGE_SIZE};

use crate::mem::{GuestMemory, GuestMemoryError};
use crate::platform::acpi::AcpiTables;
use crate::platform::layout::{self, ACPI_BASE, ACPI_END};
use crate::platform::{PlatformConfig, acpi};
use memory_map::memory_map;
use zero_page::{Initramfs, ZeroPage};

const ZERO_PAGE: Gpa = Gpa(0x1_0000);
const COMMAND_LINE: Gpa = Gpa(0x1_1000);
/// Room for the command line with its terminator.
const COMMAND_LINE_ROOM: usize = 0x1000;

/// Where a processor starts after a reset, and where a kernel jumps in real
/// mode that knows no other way to restart.
const RESET_VECTOR: Gpa = Gpa(0xf_fff0);
/// `mov dx, SLEEP_PORT; mov al, SLEEP_RESET; out dx, al; hlt; jmp $-1`.
const RESET_CODE: [u8; 9] = {
    let [low, high] = layout::SLEEP_PORT.to_le_bytes();
    [
        0xba,
        low,
        high,
        0xb0,
        layout::SLEEP_RESET,
        0xee,
        0xf4,
        0xeb,
        0xfd,
    ]
};

/// What a Linux guest is started from.
#[derive(Clone, Copy)]
pub struct LinuxBoot<'a> {
    /// The machine.
    pub platform: &'a PlatformConfig,
    /// The kernel: a bzImage.
    pub kernel: &'a dyn ByteSource,
    /// The initial RAM file system; may be empty.
    pub initramfs: &'a dyn ByteSource,
    /// The kernel's command line, without a terminator.
    pub command_line: &'a [u8],
}

/// How vCPU 0 enters the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEntry {
    /// A Linux kernel, or the paravirtual guest's.
    Linux(LinuxEntry),
    /// A multiboot or PVH image.
    Bare(BareEntry),
}

/// The state in which vCPU 0 enters the kernel: 64-bit mode, interrupts off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinuxEntry {
    /// First instruction.
    pub rip: u64,
    /// Argument: the zero page, or the paravirtual guest's boot information.
    pub rsi: u64,
    /// Page tables that map the first 4 GiB to themselves.
    pub cr3: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Where the GDT with [`CODE_SELECTOR`] and [`DATA_SELECTOR`] is.
    pub gdt: GdtRegister,
}

/// Why a kernel could not be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// The kernel file ends before its header does.
    #[error("the kernel is truncated: {len} bytes are no bzImage")]
    TooShort {
        /// Bytes in the file.
        len: u64,
    },
    /// No boot signature or magic number: not a bzImage at all.
    #[error("the kernel is no bzImage")]
    NotBzImage,
    /// The boot protocol is older than 2.12.
    #[error("the kernel's boot protocol {}.{:02} is too old, 2.12 is needed", version >> 8, version & 0xff)]
    OldProtocol {
        /// Major version in the high byte, minor in the low one.
        version: u16,
    },
    /// The kernel insists on one address.
    #[error("the kernel insists on one address; use a relocatable one")]
    NotRelocatable,
    /// The kernel asks for an alignment that is no power of two from 4 KiB up.
    #[error(
        "the kernel asks for an alignment of {alignment} bytes, which is no power of two from 4096 on"
    )]
    BadAlignment {
        /// What it asks for, in bytes.
        alignment: u32,
    },
    /// The kernel cannot be entered in 64-bit mode.
    #[error("the kernel has no 64-bit entry point")]
    No64BitEntry,
    /// The kernel file ends before the kernel does.
    #[error("the kernel is truncated: it has {len} of {expected} bytes")]
    Truncated {
        /// Bytes there should be.
        expected: u64,
        /// Bytes in the file.
        len: u64,
    },
    /// The kernel is larger than low memory.
    #[error(
        "the kernel would end at {end:#x}, but low memory ends at {limit:#x}; give the VM more --memory"
    )]
    KernelDoesNotFit {
        /// Where it would have to end, at least.
        end: u64,
        /// Where low memory ends.
        limit: u64,
    },
    /// No room between the kernel and the end of low memory, or of what the
    /// kernel can reach.
    #[error(
        "the initramfs has {len} bytes, but there is room for {room}; give the VM more --memory"
    )]
    InitramfsDoesNotFit {
        /// Bytes of the initramfs.
        len: u64,
        /// Bytes of room for it.
        room: u64,
    },
    /// The paravirtual kernel takes all vCPUs to be there.
    #[error("the paravirtual guest can't get vCPUs later; leave --max-vcpus out")]
    AbsentVcpus,
    /// The command line is longer than this kernel takes.
    #[error("the command line has {len} bytes, but this kernel takes {limit}")]
    CommandLineTooLong {
        /// Bytes of the command line.
        len: usize,
        /// Bytes that the kernel takes.
        limit: usize,
    },
    /// The command line contains a zero byte, which would end it early.
    #[error("the command line has a zero byte at {at}")]
    CommandLineHasZero {
        /// Where.
        at: usize,
    },
    /// A source could not be read although it should be long enough.
    #[error("it cannot be read at {offset:#x}")]
    Unreadable {
        /// Where reading failed.
        offset: u64,
    },
    /// An image that can't be booted.
    #[error("the image cannot be booted: {0}")]
    Image(ImageError),
    /// A segment, or the boot data, that is not in low memory or where the
    /// firmware tables are.
    #[error(
        "a part of the image, or of its boot data, does not fit at {start} to {end}: the VM's low memory \
         ends at {limit:#x}, and its firmware has {ACPI_BASE} to {ACPI_END}"
    )]
    Misplaced {
        /// First address.
        start: Gpa,
        /// First address behind it.
        end: Gpa,
        /// Where low memory ends.
        limit: u64,
    },
    /// No room for the modules behind the image.
    #[error(
        "the modules would end at {end:#x}, but low memory ends at {limit:#x}; give the VM more --memory"
    )]
    ModulesDoNotFit {
        /// Where they would have to end.
        end: u64,
        /// Where low memory ends.
        limit: u64,
    },
    /// Guest memory is smaller than the platform says.
    #[error("guest memory is smaller than it should be: nothing at {}", .0.gpa)]
    GuestMemory(GuestMemoryError),
}

impl From<ImageError> for LoadError {
    fn from(error: ImageError) -> Self {
        Self::Image(error)
    }
}

impl From<GuestMemoryError> for LoadError {
    fn from(error: GuestMemoryError) -> Self {
        Self::GuestMemory(error)
    }
}

/// Puts kernel, initramfs, command line, ACPI tables, zero page and the state
/// for entering the kernel into guest memory.
///
/// # Errors
/// What is wrong with the kernel, or what does not fit. Guest memory may have
/// been written then.
pub fn load_linux(
    memory: &impl GuestMemory,
    boot: &LinuxBoot<'_>,
) -> Result<LinuxEntry, LoadError> {
    let platform = boot.platform;
    let low_end = platform.topology.memory().min(layout::LOW_RAM_LIMIT.0);

    let header = SetupHeader::read(boot.kernel)?;
    check_command_line(boot.command_line, &header)?;
    let kernel = header.place(low_end)?;
    let initramfs = place_initramfs(boot.initramfs.len(), &header, kernel.end, low_end)?;

    let from = kernel.file_offset;
    copy::copy(memory, boot.kernel, from, kernel.load, kernel.file_len)?;
    copy::copy(memory, boot.initramfs, 0, initramfs.gpa, initramfs.len)?;
    memory.write_bytes(COMMAND_LINE, boot.command_line)?;
    let terminator = Gpa(COMMAND_LINE.0 + boot.command_line.len() as u64);
    memory.write_bytes(terminator, &[0])?;

    let acpi = write_firmware(memory, platform)?;

    let mut zero_page = ZeroPage::new(&header);
    zero_page.set_kernel(kernel.load);
    zero_page.set_initramfs(initramfs);
    zero_page.set_command_line(COMMAND_LINE);
    zero_page.set_rsdp(acpi.rsdp);
    zero_page.set_memory_map(&memory_map(platform, acpi.range()));
    memory.write_bytes(ZERO_PAGE, zero_page.as_bytes())?;

    entry::write(memory, kernel.entry(), ZERO_PAGE)
}

/// ACPI tables and the reset vector.
fn write_firmware(
    memory: &impl GuestMemory,
    platform: &PlatformConfig,
) -> Result<AcpiTables, LoadError> {
    let acpi = acpi::build(platform);
    memory.write_bytes(acpi.base, &acpi.bytes)?;
    memory.write_bytes(RESET_VECTOR, &RESET_CODE)?;
    Ok(acpi)
}

fn check_command_line(command_line: &[u8], header: &SetupHeader) -> Result<(), LoadError> {
    let limit = (header.command_line_limit() as usize).min(COMMAND_LINE_ROOM - 1);
    let len = command_line.len();
    if len > limit {
        return Err(LoadError::CommandLineTooLong { len, limit });
    }
    check_no_zero(command_line)
}

fn check_no_zero(command_line: &[u8]) -> Result<(), LoadError> {
    match command_line.iter().position(|byte| *byte == 0) {
        Some(at) => Err(LoadError::CommandLineHasZero { at }),
        None => Ok(()),
    }
}

/// As high as it may be, out of the way of a kernel that moves itself.
fn place_initramfs(
    len: u64,
    header: &SetupHeader,
    kernel_end: Gpa,
    low_end: u64,
) -> Result<Initramfs, LoadError> {
    if len == 0 {
        return Ok(Initramfs { gpa: Gpa(0), len });
    }
    let limit = low_end.min(u64::from(header.initramfs_limit()) + 1);
    let room = limit.saturating_sub(kernel_end.0.next_multiple_of(PAGE_SIZE));
    let gpa = limit
        .checked_sub(len)
        .map(|start| Gpa(start).align_down(PAGE_SIZE))
        .filter(|start| *start >= kernel_end)
        .ok_or(LoadError::InitramfsDoesNotFit { len, room })?;
    Ok(Initramfs { gpa, len })
}
