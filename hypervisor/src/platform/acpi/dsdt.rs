//! DSDT: the devices that cannot be found by probing.

use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, MethodCall, Name,
    Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};
use alloc::boxed::Box;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

use super::memory::{self, Blocks};
use super::processors::{self, Processors};
use super::{nfit, table};
use crate::platform::layout::{
    COM_PORTS, COM1_PORT, GSI_GED, GSI_SERIAL, GSI_VIRTIO, VIRTIO_COUNT, VIRTIO_SIZE, virtio_window,
};
use crate::platform::{PlatformConfig, PmemInterface};

/// Integers in AML are 64 bits wide from this revision on.
const REVISION: u8 = 2;
/// What the sleep control register takes to switch off.
const SLEEP_TYPE_S5: u8 = 5;

pub(super) fn build(config: &PlatformConfig) -> Sdt {
    let mut devices: Vec<Box<dyn Aml + '_>> = vec![
        Box::new(Processors { config }),
        Box::new(Serial),
        Box::new(EventDevice { config }),
    ];
    if has_blocks(config) {
        let topology = &config.topology;
        devices.push(Box::new(Blocks { topology }));
    }
    for index in 0..VIRTIO_COUNT {
        devices.push(Box::new(Virtio { index }));
    }
    if config
        .image
        .is_some_and(|image| image.interface == PmemInterface::Nfit)
    {
        devices.push(Box::new(NvdimmRoot));
    }
    let devices = devices.iter().map(|device| &**device).collect();

    let mut body = Vec::new();
    Scope::new("_SB_".into(), devices).to_aml_bytes(&mut body);
    Name::new(
        Path::new("\\_S5_"),
        &Package::new(vec![&SLEEP_TYPE_S5, &0_u8, &0_u8, &0_u8]),
    )
    .to_aml_bytes(&mut body);
    table(*b"DSDT", REVISION, &body)
}

/// Whether memory may come and go.
fn has_blocks(config: &PlatformConfig) -> bool {
    config.machine.has_hotplug() && config.topology.blocks().next().is_some()
}

/// An edge-triggered, active-high interrupt of its own.
fn edge_interrupt(gsi: u32) -> Interrupt {
    let (consumer, edge, active_low, shared) = (true, true, false, false);
    Interrupt::new(consumer, edge, active_low, shared, gsi)
}

/// COM1.
struct Serial;

impl Aml for Serial {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let [ports, _] = COM_PORTS.to_le_bytes();
        let hid = Name::new("_HID".into(), &EISAName::new("PNP0501"));
        let uid = Name::new("_UID".into(), &0_u8);
        let ports = IO::new(COM1_PORT, COM1_PORT, 1, ports);
        let interrupt = edge_interrupt(GSI_SERIAL);
        let resources = ResourceTemplate::new(vec![&interrupt, &ports]);
        let crs = Name::new("_CRS".into(), &resources);
        Device::new("COM1".into(), vec![&hid, &uid, &crs]).to_aml_bytes(sink);
    }
}

/// The generic event device: its method runs when its interrupt comes. The
/// line stays up until all events have been seen.
struct EventDevice<'a> {
    config: &'a PlatformConfig,
}

impl Aml for EventDevice<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let hid = Name::new("_HID".into(), &"ACPI0013");
        let uid = Name::new("_UID".into(), &0_u8);
        let (consumer, edge, active_low, shared) = (true, false, false, false);
        let interrupt = Interrupt::new(consumer, edge, active_low, shared, GSI_GED);
        let crs = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt]));
        let is_ours = Equal::new(&Arg(0), &GSI_GED);
        let scan = |path: &'static str| MethodCall::new(path.into(), vec![]);
        let hot = self.config.machine.has_hotplug();
        let processors = hot.then(|| scan(processors::SCAN));
        let memory = has_blocks(self.config).then(|| scan(memory::SCAN));
        let scans = processors.iter().chain(&memory);
        let dispatch = If::new(&is_ours, scans.map(|scan| -> &dyn Aml { scan }).collect());
        let evt = Method::new("_EVT".into(), 1, true, vec![&dispatch]);
        Device::new("GED_".into(), vec![&hid, &uid, &crs, &evt]).to_aml_bytes(sink);
    }
}

/// A virtio device with its registers in memory.
struct Virtio {
    index: u32,
}

impl Aml for Virtio {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let below_4_gib = "the layout puts virtio windows below 4 GiB";
        let base = u32::try_from(virtio_window(self.index).0).expect(below_4_gib);
        let size = u32::try_from(VIRTIO_SIZE).expect(below_4_gib);
        let hid = Name::new("_HID".into(), &"LNRO0005");
        let uid = Name::new("_UID".into(), &self.index);
        // DMA is cache-coherent.
        let cca = Name::new("_CCA".into(), &1_u8);
        let window = Memory32Fixed::new(true, base, size);
        let interrupt = edge_interrupt(GSI_VIRTIO + self.index);
        let resources = ResourceTemplate::new(vec![&window, &interrupt]);
        let crs = Name::new("_CRS".into(), &resources);
        let name = format!("V{:03X}", self.index);
        Device::new(Path::new(&name), vec![&hid, &uid, &cca, &crs]).to_aml_bytes(sink);
    }
}

/// The NVDIMM root device with the one module of the NFIT.
struct NvdimmRoot;

impl Aml for NvdimmRoot {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let address = Name::new("_ADR".into(), &nfit::HANDLE);
        let module = Device::new("NV00".into(), vec![&address]);
        let hid = Name::new("_HID".into(), &"ACPI0012");
        Device::new("NVDR".into(), vec![&hid, &module]).to_aml_bytes(sink);
    }
}
