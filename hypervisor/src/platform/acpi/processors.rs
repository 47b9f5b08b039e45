//! The DSDT's part about vCPUs: a container with a device for each, and where
//! vCPUs can come and go, the methods for that.
//!
//! They speak to the registers of [`cpu_hotplug`](crate::devices::cpu_hotplug).
//! In ASL:
//!
//! ```text
//!   Method (CSCN) {                      // an event has come
//!       Acquire (CLCK, 0xFFFF)
//!       Local0 = CSEL                    // the first vCPU with an event
//!       While (Local0 != 0xFFFFFFFF) {
//!           If (CINS) { CTFY (Local0, 1)  CINS = 1 }
//!           If (CREM) { CTFY (Local0, 3)  CREM = 1 }
//!           Local0 = CSEL
//!       }
//!       Release (CLCK)
//!   }
//! ```
//!
//! Source: ACPI specification 6.5, sections 5.6.6, 6.2.11, 6.3 and 8.4.

use acpi_tables::aml::{
    Acquire, Arg, BufferData, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, If, Local, Method, MethodCall, Mutex, Name, NotEqual, Notify,
    ONE, OpRegion, OpRegionSpace, Path, Release, Return, Store, While, ZERO,
};
use acpi_tables::{Aml, AmlSink};
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use vmm_shared::addr::VcpuId;

use super::madt;
use crate::devices::cpu_hotplug;
use crate::platform::layout::CPU_HOTPLUG_PORT;
use crate::platform::{Domain, PlatformConfig, Topology};

/// Present, enabled, shown, functioning.
const STATUS_ALL: u8 = 0xf;
/// What CSEL reads when there is no event.
const NO_EVENT: u32 = u32::MAX;
/// What to notify a device of.
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;
/// Waits for a mutex as long as it takes.
const FOR_EVER: u16 = 0xffff;

/// The path of the method that looks for events.
pub(super) const SCAN: &str = "\\_SB_.CPUS.CSCN";

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
        let hot = self.config.machine.has_cpu_hotplug();
        let hid = Name::new("_HID".into(), &"ACPI0010");
        let cid = Name::new("_CID".into(), &EISAName::new("PNP0A05"));
        let one_node = topology.nodes().len() == 1;
        let processor = |vcpu: VcpuId| Processor {
            vcpu,
            domain: (!one_node).then(|| topology.domain(vcpu)),
            entry: hot.then(|| madt::processor(topology, vcpu)),
        };
        let processors: Vec<Processor> = topology.vcpu_ids().map(processor).collect();
        let methods = HotplugMethods { topology };
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
        let methods = self.entry.clone().map(|entry| ProcessorMethods {
            number,
            entry: BufferData::new(entry),
        });
        children.extend(methods.iter().map(|methods| -> &dyn Aml { methods }));
        Device::new(Path::new(&device_name(self.vcpu)), children).to_aml_bytes(sink);
    }
}

/// What the guest asks of a vCPU that can come and go.
struct ProcessorMethods {
    number: u16,
    entry: BufferData,
}

impl Aml for ProcessorMethods {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let status = MethodCall::new("CSTA".into(), vec![&self.number]);
        let status = Return::new(&status);
        Method::new("_STA".into(), 0, false, vec![&status]).to_aml_bytes(sink);
        Name::new("_MAT".into(), &self.entry).to_aml_bytes(sink);
        let eject = MethodCall::new("CEJT".into(), vec![&self.number]);
        Method::new("_EJ0".into(), 1, false, vec![&eject]).to_aml_bytes(sink);
        let report = MethodCall::new("COST".into(), vec![&self.number, &Arg(0), &Arg(1)]);
        Method::new("_OST".into(), 3, false, vec![&report]).to_aml_bytes(sink);
    }
}

/// The registers and what is done with them.
struct HotplugMethods<'a> {
    topology: &'a Topology,
}

impl Aml for HotplugMethods<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        registers(sink);
        Mutex::new("CLCK".into(), 0).to_aml_bytes(sink);
        let (acquire, release) = (
            Acquire::new("CLCK".into(), FOR_EVER),
            Release::new("CLCK".into()),
        );
        let [select, present, eject, event, status] =
            ["CSEL", "CPRS", "CEJE", "CEVT", "COSS"].map(Path::new);
        let choose = Store::new(&select, &Arg(0));

        let is_present = Equal::new(&present, &ONE);
        let all = Store::new(&Local(0), &STATUS_ALL);
        Method::new(
            "CSTA".into(),
            1,
            true,
            vec![
                &acquire,
                &choose,
                &Store::new(&Local(0), &ZERO),
                &If::new(&is_present, vec![&all]),
                &release,
                &Return::new(&Local(0)),
            ],
        )
        .to_aml_bytes(sink);

        let eject = Store::new(&eject, &ONE);
        let body: Vec<&dyn Aml> = vec![&acquire, &choose, &eject, &release];
        Method::new("CEJT".into(), 1, true, body).to_aml_bytes(sink);

        let event = Store::new(&event, &Arg(1));
        let status = Store::new(&status, &Arg(2));
        let body: Vec<&dyn Aml> = vec![&acquire, &choose, &event, &status, &release];
        Method::new("COST".into(), 3, true, body).to_aml_bytes(sink);

        let notices: Vec<Notice> = self.topology.vcpu_ids().map(Notice).collect();
        let notices = notices.iter().map(|notice| -> &dyn Aml { notice });
        Method::new("CTFY".into(), 2, true, notices.collect()).to_aml_bytes(sink);

        let inserted = OnEvent("CINS", DEVICE_CHECK);
        let removing = OnEvent("CREM", EJECT_REQUEST);
        let next = Store::new(&Local(0), &select);
        let has_event = NotEqual::new(&Local(0), &NO_EVENT);
        let each = While::new(&has_event, vec![&inserted, &removing, &next]);
        let body: Vec<&dyn Aml> = vec![&acquire, &next, &each, &release];
        Method::new("CSCN".into(), 0, true, body).to_aml_bytes(sink);
    }
}

fn registers(sink: &mut dyn AmlSink) {
    let (port, len) = (CPU_HOTPLUG_PORT, cpu_hotplug::LEN);
    OpRegion::new("CREG".into(), OpRegionSpace::SystemIO, &port, &len).to_aml_bytes(sink);
    let field = |access, entries| {
        // A write of one flag leaves the others alone: they ignore zeros.
        let update = FieldUpdateRule::WriteAsZeroes;
        Field::new(
            "CREG".into(),
            access,
            FieldLockRule::NoLock,
            update,
            entries,
        )
    };
    field(
        FieldAccessType::DWord,
        vec![
            FieldEntry::Named(*b"CSEL", 32),
            FieldEntry::Reserved(32),
            FieldEntry::Named(*b"CEVT", 32),
            FieldEntry::Named(*b"COSS", 32),
        ],
    )
    .to_aml_bytes(sink);
    field(
        FieldAccessType::Byte,
        vec![
            FieldEntry::Reserved(32),
            FieldEntry::Named(*b"CPRS", 1),
            FieldEntry::Named(*b"CINS", 1),
            FieldEntry::Named(*b"CREM", 1),
            FieldEntry::Named(*b"CEJE", 1),
        ],
    )
    .to_aml_bytes(sink);
}

/// Notifies a vCPU's device if it is the one in Arg0.
struct Notice(VcpuId);

impl Aml for Notice {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let is_it = Equal::new(&Arg(0), &self.0.0);
        let device = Path::new(&device_name(self.0));
        let notify = Notify::new(&device, &Arg(1));
        If::new(&is_it, vec![&notify]).to_aml_bytes(sink);
    }
}

/// If this flag is set: notifies the vCPU in Local0, and clears it.
struct OnEvent(&'static str, u8);

impl Aml for OnEvent {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let flag = Path::new(self.0);
        let is_set = Equal::new(&flag, &ONE);
        let notify = MethodCall::new("CTFY".into(), vec![&Local(0), &self.1]);
        let clear = Store::new(&flag, &ONE);
        If::new(&is_set, vec![&notify, &clear]).to_aml_bytes(sink);
    }
}
