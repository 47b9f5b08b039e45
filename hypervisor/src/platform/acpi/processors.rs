//! The DSDT's part about vCPUs: a container with a device for each, and where
//! vCPUs can come and go, the methods for that.
//!
//! Source: ACPI specification 6.5, sections 6.2.11, 6.3 and 8.4.

use acpi_tables::aml::{BufferData, Device, EISAName, Name, Path};
use acpi_tables::{Aml, AmlSink};
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use vmm_shared::addr::VcpuId;

use super::hotplug::{Hotpluggable, Methods};
use super::madt;
use crate::platform::layout::CPU_HOTPLUG_PORT;
use crate::platform::{Domain, PlatformConfig};

/// The path of the method that looks for events.
pub(super) const SCAN: &str = "\\_SB_.CPUS.CSCN";
/// What the names of the methods begin with.
const LETTER: u8 = b'C';

fn device_name(vcpu: VcpuId) -> String {
    format!("C{:03X}", vcpu.0)
}

/// The container of all vCPUs.
pub(super) struct Processors<'a> {
    pub config: &'a PlatformConfig,
}

impl Aml for Processors<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let topology = &self.config.topology;
        let hot = self.config.machine.has_hotplug();
        let hid = Name::new("_HID".into(), &"ACPI0010");
        let cid = Name::new("_CID".into(), &EISAName::new("PNP0A05"));
        let one_node = topology.nodes().len() == 1;
        let processor = |vcpu: VcpuId| Processor {
            vcpu,
            domain: (!one_node).then(|| topology.domain(vcpu)),
            entry: hot.then(|| madt::processor(topology, vcpu)),
        };
        let processors: Vec<Processor> = topology.vcpu_ids().map(processor).collect();
        let methods = Methods {
            letter: LETTER,
            port: CPU_HOTPLUG_PORT,
            devices: topology.vcpu_ids().map(device_name).collect(),
        };
        let mut children: Vec<&dyn Aml> = vec![&hid, &cid];
        if hot {
            children.push(&methods);
        }
        children.extend(processors.iter().map(|processor| -> &dyn Aml { processor }));
        Device::new("CPUS".into(), children).to_aml_bytes(sink);
    }
}

/// One vCPU; its number is that of its MADT entry.
struct Processor {
    vcpu: VcpuId,
    /// Its proximity domain, if there is more than one.
    domain: Option<Domain>,
    /// Its MADT entry, if it can come and go.
    entry: Option<Vec<u8>>,
}

impl Aml for Processor {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let number = self.vcpu.0;
        let hid = Name::new("_HID".into(), &"ACPI0007");
        let uid = Name::new("_UID".into(), &u32::from(number));
        let domain = self.domain.map(|domain| u32::from(domain.0));
        let pxm = domain.map(|domain| Name::new("_PXM".into(), &domain));
        let mut children: Vec<&dyn Aml> = vec![&hid, &uid];
        children.extend(pxm.iter().map(|pxm| -> &dyn Aml { pxm }));
        let entry = self.entry.clone().map(BufferData::new);
        let entry = entry.as_ref().map(|entry| Name::new("_MAT".into(), entry));
        children.extend(entry.iter().map(|entry| -> &dyn Aml { entry }));
        let methods = self.entry.is_some().then_some(Hotpluggable {
            letter: LETTER,
            number,
        });
        children.extend(methods.iter().map(|methods| -> &dyn Aml { methods }));
        Device::new(Path::new(&device_name(self.vcpu)), children).to_aml_bytes(sink);
    }
}
