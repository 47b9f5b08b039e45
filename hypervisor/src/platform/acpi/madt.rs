//! MADT: the interrupt controllers.

use acpi_tables::Aml;
use acpi_tables::madt::IoApic;
use acpi_tables::sdt::Sdt;
use alloc::vec::Vec;
use vmm_shared::addr::VcpuId;
use zerocopy::{Immutable, IntoBytes};

use super::table;
use crate::platform::layout::{GSI_SERIAL, IOAPIC_BASE, LAPIC_BASE};
use crate::platform::{PlatformConfig, Topology};

const REVISION: u8 = 6;
const ENABLED: u32 = 1;
/// Not there, but may come.
const ONLINE_CAPABLE: u32 = 1 << 1;
/// Active high, edge-triggered.
const EDGE_HIGH: u16 = 1 | 1 << 2;
/// ISA interrupts.
const ISA_BUS: u8 = 0;

/// A CPU by its x2APIC id, structure type 9.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct LocalX2Apic {
    kind: u8,
    len: u8,
    reserved: [u8; 2],
    apic_id: u32,
    flags: u32,
    uid: u32,
}

/// An ISA interrupt that differs from the default, structure type 2. The
/// interrupt number is in halves, because it isn't aligned.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct SourceOverride {
    kind: u8,
    len: u8,
    bus: u8,
    source: u8,
    gsi: [u16; 2],
    flags: u16,
}

pub(super) fn build(config: &PlatformConfig) -> Sdt {
    let mut body = Vec::new();
    body.extend_from_slice(&low_u32(LAPIC_BASE.0).to_le_bytes());
    // Flags: no dual 8259.
    body.extend_from_slice(&0_u32.to_le_bytes());
    for vcpu in config.topology.vcpu_ids() {
        let flags = match config.topology.is_present(vcpu) {
            true => ENABLED,
            false => ONLINE_CAPABLE,
        };
        body.extend_from_slice(entry(&config.topology, vcpu, flags).as_bytes());
    }
    IoApic::new(0, low_u32(IOAPIC_BASE.0), 0).to_aml_bytes(&mut body);
    // By default the serial port's interrupt would be what the bus says: the
    // same, but said explicitly, since the IOAPIC has no level logic.
    let [source, ..] = GSI_SERIAL.to_le_bytes();
    let serial = SourceOverride {
        kind: 2,
        len: 10,
        bus: ISA_BUS,
        source,
        gsi: [u16::from(source), 0],
        flags: EDGE_HIGH,
    };
    body.extend_from_slice(serial.as_bytes());
    table(*b"APIC", REVISION, &body)
}

/// The entry of a vCPU that is there: what its `_MAT` gives.
pub(super) fn processor(topology: &Topology, vcpu: VcpuId) -> Vec<u8> {
    entry(topology, vcpu, ENABLED).as_bytes().to_vec()
}

fn entry(topology: &Topology, vcpu: VcpuId, flags: u32) -> LocalX2Apic {
    LocalX2Apic {
        kind: 9,
        len: 16,
        reserved: [0; 2],
        apic_id: topology.apic_id(vcpu).0,
        flags,
        uid: vcpu.0.into(),
    }
}

/// A device address below 4 GiB.
fn low_u32(address: u64) -> u32 {
    u32::try_from(address).expect("the layout puts the controllers below 4 GiB")
}
