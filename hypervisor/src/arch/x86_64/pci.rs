//! Finding the shared regions among the node's PCI devices.
//!
//! A region is the memory window of an `ivshmem` device (QEMU
//! docs/specs/ivshmem-spec); the one with interrupt vectors is the doorbell
//! too. What a window is for, its header says, not its place here.
#![expect(unsafe_code, reason = "configuration space and device registers")]

use alloc::vec::Vec;
use core::ops::Range;

use pci_types::capability::PciCapability;
use pci_types::{Bar, CommandRegister, ConfigRegionAccess, EndpointHeader, PciAddress, PciHeader};
use vmm_shared::addr::{Hpa, PAGE_SIZE};

use super::paging::Use;
use super::{apic, io};

const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
const IVSHMEM: (u16, u16) = (0x1af4, 0x1110);

/// Offset of the doorbell register and of this peer's id.
const REGISTER_POSITION: u64 = 8;
const REGISTER_DOORBELL: u64 = 12;

/// A mapped range that belongs to a device.
#[derive(Clone, Debug)]
pub struct Window {
    /// Where it lies.
    pub range: Range<Hpa>,
    /// How it is to be mapped.
    pub purpose: Use,
    /// What it is.
    pub kind: WindowKind,
}

/// What a window shows.
#[derive(Clone, Debug)]
pub enum WindowKind {
    /// A shared region.
    Region,
    /// A doorbell's registers.
    Doorbell,
    /// The interrupt table of the doorbell.
    InterruptTable {
        /// Offset of its first entry.
        offset: u64,
        /// The device, to switch the table on.
        device: PciAddress,
    },
}

struct Ports;

impl ConfigRegionAccess for Ports {
    unsafe fn read(&self, address: PciAddress, offset: u16) -> u32 {
        // SAFETY: the two ports are the configuration mechanism of every PC;
        // during boot only one core uses them.
        unsafe {
            io::outl(CONFIG_ADDRESS, select(address, offset));
            io::inl(CONFIG_DATA)
        }
    }

    unsafe fn write(&self, address: PciAddress, offset: u16, value: u32) {
        // SAFETY: as for `read`; what is written is the caller's duty.
        unsafe {
            io::outl(CONFIG_ADDRESS, select(address, offset));
            io::outl(CONFIG_DATA, value);
        }
    }
}

fn select(address: PciAddress, offset: u16) -> u32 {
    1 << 31
        | u32::from(address.bus()) << 16
        | u32::from(address.device()) << 11
        | u32::from(address.function()) << 8
        | u32::from(offset & 0xfc)
}

/// All windows of all ivshmem devices on bus 0, switched on.
#[must_use]
pub fn find_windows() -> Vec<Window> {
    let mut windows = Vec::new();
    for device in 0..32 {
        for function in 0..8 {
            let address = PciAddress::new(0, 0, device, function);
            let header = PciHeader::new(address);
            let present = header.id(Ports).0 != 0xffff;
            let alone = function == 0 && !(present && header.has_multiple_functions(Ports));
            if header.id(Ports) == IVSHMEM {
                add_windows(header, &mut windows);
            }
            if alone {
                break;
            }
        }
    }
    windows
}

fn memory(bar: Option<Bar>) -> Option<Range<Hpa>> {
    let (address, size) = match bar? {
        Bar::Memory32 { address, size, .. } => (u64::from(address), u64::from(size)),
        Bar::Memory64 { address, size, .. } => (address, size),
        Bar::Io { .. } => return None,
    };
    // pci_types 0.10 sign-extends a size of exactly 2 GiB; sizes are powers of
    // two, so the lowest bit says it all.
    let size = 1_u64.checked_shl(size.trailing_zeros())?;
    // Small register windows share pages with nothing: BARs that firmware
    // places are at least page-aligned on QEMU.
    let end = address.checked_add(size.max(PAGE_SIZE))?;
    Hpa(address)
        .is_aligned(PAGE_SIZE)
        .then_some(Hpa(address)..Hpa(end))
}

fn add_windows(header: PciHeader, windows: &mut Vec<Window>) {
    let Some(mut endpoint) = EndpointHeader::from_header(header, Ports) else {
        return;
    };
    endpoint.update_command(Ports, |command| {
        command | CommandRegister::MEMORY_ENABLE | CommandRegister::BUS_MASTER_ENABLE
    });
    let mut add = |bar, purpose, kind| {
        if let Some(range) = memory(endpoint.bar(bar, Ports)) {
            windows.push(Window {
                range,
                purpose,
                kind,
            });
        }
    };
    add(2, Use::Data, WindowKind::Region);
    let msix = endpoint
        .capabilities(Ports)
        .find_map(|capability| match capability {
            PciCapability::MsiX(msix) => Some(msix),
            _ => None,
        });
    if let Some(msix) = msix {
        add(0, Use::Device, WindowKind::Doorbell);
        let kind = WindowKind::InterruptTable {
            offset: msix.table_offset().into(),
            device: endpoint.header().address(),
        };
        add(msix.table_bar(), Use::Device, kind);
    }
}

/// Directs the doorbell's vectors to cores: the first to the first of `cores`
/// (APIC ids) as interrupt `first`, the others as `rest`.
pub fn enable_interrupts(window: &Window, first: u8, rest: u8, cores: &[u8]) {
    let WindowKind::InterruptTable { offset, device } = window.kind else {
        return;
    };
    let Some(endpoint) = EndpointHeader::from_header(PciHeader::new(device), Ports) else {
        return;
    };
    for capability in endpoint.capabilities(Ports) {
        let PciCapability::MsiX(mut msix) = capability else {
            continue;
        };
        let vectors = usize::from(msix.table_size());
        for (index, apic_id) in (0_u64..).zip(cores.iter().take(vectors)) {
            let entry = window.range.start.0 + offset + index * 16;
            let base = u32::try_from(apic::WINDOW).expect("below 4 GiB");
            let vector = if index == 0 { first } else { rest };
            write_register(entry, base | u32::from(*apic_id) << 12);
            write_register(entry + 4, 0);
            write_register(entry + 8, u32::from(vector));
            write_register(entry + 12, 0); // unmasked
        }
        msix.set_enabled(true, Ports);
    }
}

/// The id that the doorbell server gave this node.
#[must_use]
pub fn peer_id(doorbell: &Window) -> u32 {
    let at = usize::try_from(doorbell.range.start.0 + REGISTER_POSITION).expect("64-bit");
    // SAFETY: a doorbell window maps these registers; reading has no effect.
    unsafe { core::ptr::with_exposed_provenance::<u32>(at).read_volatile() }
}

/// Rings a doorbell of `peer`.
pub fn ring(doorbell: &Window, peer: u16, vector: u16) {
    let value = u32::from(peer) << 16 | u32::from(vector);
    write_register(doorbell.range.start.0 + REGISTER_DOORBELL, value);
}

fn write_register(at: u64, value: u32) {
    let at = usize::try_from(at).expect("64-bit");
    // SAFETY: callers pass addresses inside windows mapped as device
    // registers; their only effect is an interrupt.
    unsafe { core::ptr::with_exposed_provenance_mut::<u32>(at).write_volatile(value) };
}
