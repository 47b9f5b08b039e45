//! The guest physical map and the platform's fixed numbers.
//!
//! ```text
//!   0x00_0000_0000  RAM; 0x9fc00..1 MiB reserved in E820 but RAM-backed,
//!                   ACPI tables from 0xe0000
//!   0x00_c000_0000  end of low RAM (3 GiB), at most
//!   0x00_d000_0000  virtio-mmio windows, 4 KiB each
//!   0x00_d100_0000  rings of the paravirtual guest, 4 MiB
//!   0x00_fec0_0000  IOAPIC
//!   0x00_fee0_0000  local APIC (only x2APIC mode, so nothing answers here)
//!   0x01_0000_0000  high RAM (4 GiB)
//!   behind it        room for memory that comes while the VM runs, 128 MiB each
//!   0x40_0000_0000  root image as persistent memory (256 GiB)
//! ```
//!
//! Each node's RAM lies behind that of the node before it, around the hole.
//! All of it lies under 40 physical address bits, the least that a host
//! with nested paging offers.

use vmm_shared::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE};
use vmm_shared::control::{RAM_GAP, first_block_address};

use super::Domain;
use crate::devices::hotplug;

/// First byte that is no longer usable conventional memory.
pub const LOW_MEMORY_END: Gpa = Gpa(0x9_fc00);
/// First byte of the firmware tables.
pub const ACPI_BASE: Gpa = Gpa(0xe_0000);
/// First byte behind the room for firmware tables.
pub const ACPI_END: Gpa = Gpa(0x10_0000);
/// First byte of the RAM above the legacy hole.
pub const EXTENDED_MEMORY: Gpa = Gpa(0x10_0000);
/// Low RAM ends here or earlier; devices live between this and 4 GiB.
pub const LOW_RAM_LIMIT: Gpa = Gpa(RAM_GAP.start);
/// RAM that does not fit below [`LOW_RAM_LIMIT`] goes on here.
pub const HIGH_RAM_BASE: Gpa = Gpa(RAM_GAP.end);

/// First virtio-mmio window.
pub const VIRTIO_BASE: Gpa = Gpa(0xd000_0000);
/// Bytes of each virtio-mmio window.
pub const VIRTIO_SIZE: u64 = PAGE_SIZE;
/// Number of virtio-mmio devices: the channel to the agent.
pub const VIRTIO_COUNT: u32 = 1;

/// Where the paravirtual guest's rings are.
pub const PV_RINGS: Gpa = Gpa(0xd100_0000);
/// Bytes of room for them.
pub const PV_RINGS_SIZE: u64 = 4 << 20;

/// The IOAPIC's register window.
pub const IOAPIC_BASE: Gpa = Gpa(0xfec0_0000);
/// Bytes of the IOAPIC's window.
pub const IOAPIC_SIZE: u64 = PAGE_SIZE;
/// Interrupt inputs of the IOAPIC, from GSI 0.
pub const IOAPIC_PINS: u32 = 24;
/// Where a local APIC in xAPIC mode would be; APIC_BASE reports it.
pub const LAPIC_BASE: Gpa = Gpa(0xfee0_0000);

/// Where the root image appears as persistent memory.
pub const PMEM_BASE: Gpa = Gpa(256 << 30);
/// First address that the narrowest supported host cannot map.
pub const ADDRESS_LIMIT: Gpa = Gpa(1 << 40);

/// Interrupt of the interval timer, in a machine that has one.
pub const GSI_TIMER: u32 = 2;
/// Interrupt of the first serial port.
pub const GSI_SERIAL: u32 = 4;
/// Interrupt of the generic event device.
pub const GSI_GED: u32 = 5;
/// Interrupt of the first virtio device; the others follow.
pub const GSI_VIRTIO: u32 = 16;

/// First port of COM1.
pub const COM1_PORT: u16 = 0x3f8;
/// Ports of one serial controller.
pub const COM_PORTS: u16 = 8;
/// Sleep control, sleep status and reset register in one. Before it sleeps, a
/// guest writes 0x80 here to clear the wake status: no effect.
pub const SLEEP_PORT: u16 = 0x600;
/// First port of the register block for vCPUs that come and go.
pub const CPU_HOTPLUG_PORT: u16 = 0x620;
/// First port of the register block for memory that comes and goes.
pub const MEMORY_HOTPLUG_PORT: u16 = CPU_HOTPLUG_PORT + hotplug::LEN;
/// First of the four ports of the ACPI timer, in a machine that has one.
pub const PM_TIMER_PORT: u16 = 0x608;
/// Written to [`SLEEP_PORT`]: switch off (SLP_EN with sleep type 5).
pub const SLEEP_S5: u8 = 0x34;
/// Written to [`SLEEP_PORT`]: reset.
pub const SLEEP_RESET: u8 = 0x01;

/// The least RAM that a stock kernel and its initramfs unpack in.
pub const MIN_MEMORY: u64 = 128 << 20;
/// The most RAM there is room for below [`PMEM_BASE`].
pub const MAX_MEMORY: u64 = LOW_RAM_LIMIT.0 + (PMEM_BASE.0 - HIGH_RAM_BASE.0);

const _: () = assert!(PMEM_BASE.is_aligned(LARGE_PAGE_SIZE));
const _: () = assert!(VIRTIO_BASE.0 + VIRTIO_COUNT as u64 * VIRTIO_SIZE <= PV_RINGS.0);
const _: () = assert!(PV_RINGS.0 + PV_RINGS_SIZE <= IOAPIC_BASE.0);
const _: () = assert!(GSI_VIRTIO + VIRTIO_COUNT <= IOAPIC_PINS);

/// A contiguous piece of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// First byte.
    pub gpa: Gpa,
    /// Bytes.
    pub len: u64,
}

impl RamRange {
    /// First byte behind the range.
    #[must_use]
    pub const fn end(self) -> Gpa {
        Gpa(self.gpa.0 + self.len)
    }
}

/// A memory size that the map has no place for, or that a kernel cannot use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemorySizeError {
    /// Less than [`MIN_MEMORY`].
    #[error("{bytes} bytes of memory are too few")]
    TooSmall {
        /// Bytes asked for.
        bytes: u64,
    },
    /// More than [`MAX_MEMORY`].
    #[error("{bytes} bytes of memory are too many")]
    TooLarge {
        /// Bytes asked for.
        bytes: u64,
    },
    /// Not a multiple of 2 MiB.
    #[error("{bytes} bytes of memory are not a multiple of 2 MiB")]
    Uneven {
        /// Bytes asked for.
        bytes: u64,
    },
}

/// Whether a VM may have this much RAM.
///
/// # Errors
/// What is wrong with `bytes`.
pub const fn check_memory_size(bytes: u64) -> Result<(), MemorySizeError> {
    if bytes < MIN_MEMORY {
        return Err(MemorySizeError::TooSmall { bytes });
    }
    if bytes > MAX_MEMORY {
        return Err(MemorySizeError::TooLarge { bytes });
    }
    if !bytes.is_multiple_of(LARGE_PAGE_SIZE) {
        return Err(MemorySizeError::Uneven { bytes });
    }
    Ok(())
}

/// The pieces of RAM of a VM with `memory` bytes, lowest first; at most two.
pub fn ram_ranges(memory: u64) -> impl Iterator<Item = RamRange> + Clone {
    part_of_ram(0, memory)
}

/// The pieces of RAM of a VM whose nodes give `memory` bytes each, lowest
/// first, and whose each is. They fill the map one node after the other; the
/// sum is at most [`MAX_MEMORY`].
pub fn node_ranges<I>(memory: I) -> impl Iterator<Item = (Domain, RamRange)> + Clone
where
    I: Iterator<Item = u64> + Clone,
{
    let starts = memory.clone().scan(0, |next, len| {
        let start = *next;
        *next += len;
        Some(start)
    });
    (0..)
        .map(Domain)
        .zip(starts.zip(memory))
        .flat_map(|(domain, (start, len))| {
            part_of_ram(start, len).map(move |range| (domain, range))
        })
}

/// Where the `len` bytes of RAM are that have `start` bytes of it below them;
/// at most two pieces.
fn part_of_ram(start: u64, len: u64) -> impl Iterator<Item = RamRange> + Clone {
    let end = start + len;
    let split = LOW_RAM_LIMIT.0.clamp(start, end);
    let hole = HIGH_RAM_BASE.0 - LOW_RAM_LIMIT.0;
    [
        RamRange {
            gpa: Gpa(start),
            len: split - start,
        },
        RamRange {
            gpa: Gpa(split + hole),
            len: end - split,
        },
    ]
    .into_iter()
    .filter(|range| range.len > 0)
}

/// Where the memory that comes later begins: behind a VM's `memory` bytes, and
/// where a guest takes it as whole blocks.
#[must_use]
pub const fn first_block(memory: u64) -> Gpa {
    Gpa(first_block_address(memory))
}

/// The window of one virtio device; `index` is below [`VIRTIO_COUNT`].
#[must_use]
pub const fn virtio_window(index: u32) -> Gpa {
    Gpa(VIRTIO_BASE.0 + index as u64 * VIRTIO_SIZE)
}

/// Which virtio device an address belongs to and the offset in its window.
#[must_use]
pub fn virtio_at(gpa: Gpa) -> Option<(u32, u64)> {
    let offset = gpa.0.checked_sub(VIRTIO_BASE.0)?;
    let index = u32::try_from(offset / VIRTIO_SIZE).ok()?;
    (index < VIRTIO_COUNT).then_some((index, offset % VIRTIO_SIZE))
}

#[cfg(test)]
mod tests {
    use vmm_shared::control::BLOCK_SIZE;

    use super::*;

    #[test]
    fn memory_up_to_the_hole_is_one_range() {
        let ranges: Vec<_> = ram_ranges(3 << 30).collect();
        assert_eq!(
            ranges,
            [RamRange {
                gpa: Gpa(0),
                len: 3 << 30
            }]
        );
    }

    #[test]
    fn memory_beyond_the_hole_goes_on_at_four_gib() {
        let ranges: Vec<_> = ram_ranges((3 << 30) + (2 << 20)).collect();
        assert_eq!(ranges.len(), 2);
        assert_eq!(ranges[1].gpa, HIGH_RAM_BASE);
        assert_eq!(ranges[1].len, 2 << 20);
    }

    #[test]
    fn nodes_fill_the_map_in_order() {
        let gib = |count: u64| count << 30;
        let range = |domain, start, end| {
            let (gpa, len) = (Gpa(gib(start)), gib(end - start));
            (Domain(domain), RamRange { gpa, len })
        };
        let ranges = |nodes: &[u64]| {
            let nodes = nodes.iter().map(|count| gib(*count));
            node_ranges(nodes).collect::<Vec<_>>()
        };
        assert_eq!(ranges(&[1, 2]), [range(0, 0, 1), range(1, 1, 3)]);
        assert_eq!(ranges(&[3, 1]), [range(0, 0, 3), range(1, 4, 5)]);
        // The second node's memory lies on both sides of the hole.
        assert_eq!(
            ranges(&[2, 2, 0, 1]),
            [
                range(0, 0, 2),
                range(1, 2, 3),
                range(1, 4, 5),
                range(3, 5, 6)
            ]
        );
    }

    #[test]
    fn the_nodes_ranges_tile_ram() {
        // Sizes around the hole's, and a stride that has no factor with it.
        let sizes = (0..)
            .map(|step| step * 37 * LARGE_PAGE_SIZE)
            .take_while(|size| *size < 5 << 30);
        for first in sizes {
            for second in [0, LARGE_PAGE_SIZE, 768 << 20, LOW_RAM_LIMIT.0, 4 << 30] {
                let nodes = [first, second, 6 << 20];
                let mut whole = ram_ranges(nodes.iter().sum());
                let mut left = whole.next().expect("there is RAM");
                let mut sums = [0; 3];
                for (domain, range) in node_ranges(nodes.into_iter()) {
                    assert!(range.gpa.is_aligned(LARGE_PAGE_SIZE));
                    if left.len == 0 {
                        left = whole.next().expect("not more than there is");
                    }
                    assert_eq!(range.gpa, left.gpa);
                    left = RamRange {
                        gpa: range.end(),
                        len: left.len - range.len,
                    };
                    sums[usize::from(domain.0)] += range.len;
                }
                assert_eq!((left.len, whole.next()), (0, None));
                assert_eq!(sums, nodes);
            }
        }
    }

    #[test]
    fn blocks_begin_behind_all_memory() {
        let mib = |count: u64| count << 20;
        assert_eq!(first_block(mib(512)), HIGH_RAM_BASE);
        assert_eq!(first_block(mib(3072)), HIGH_RAM_BASE);
        assert_eq!(first_block(mib(3074)), Gpa(HIGH_RAM_BASE.0 + BLOCK_SIZE));
        assert_eq!(first_block(mib(3200)), Gpa(HIGH_RAM_BASE.0 + BLOCK_SIZE));
    }

    #[test]
    fn the_largest_memory_ends_where_the_image_starts() {
        let last = ram_ranges(MAX_MEMORY).last().expect("two ranges");
        assert_eq!(last.end(), PMEM_BASE);
    }

    #[test]
    fn sizes_are_refused_with_their_reason() {
        assert_eq!(check_memory_size(MIN_MEMORY), Ok(()));
        assert_eq!(check_memory_size(MAX_MEMORY), Ok(()));
        assert_eq!(
            check_memory_size(0),
            Err(MemorySizeError::TooSmall { bytes: 0 })
        );
        let uneven = MIN_MEMORY + 4096;
        assert_eq!(
            check_memory_size(uneven),
            Err(MemorySizeError::Uneven { bytes: uneven })
        );
        assert_eq!(
            check_memory_size(u64::MAX),
            Err(MemorySizeError::TooLarge { bytes: u64::MAX })
        );
    }

    #[test]
    fn virtio_windows_are_found_by_address() {
        assert_eq!(virtio_at(virtio_window(0)), Some((0, 0)));
        assert_eq!(virtio_at(Gpa(VIRTIO_BASE.0 + 0x50)), Some((0, 0x50)));
        assert_eq!(virtio_at(Gpa(VIRTIO_BASE.0 - 1)), None);
        assert_eq!(virtio_at(virtio_window(VIRTIO_COUNT)), None);
        assert_eq!(virtio_at(Gpa(u64::MAX)), None);
    }
}
