//! The DSDT's part about memory that comes and goes: a container with a device
//! for each block.
//!
//! The guest adds and removes a device as a whole, so that it can give back
//! one block and keep the next.
//!
//! Source: ACPI specification 6.5, sections 6.2 and 9.11.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, Name, Path, ResourceTemplate,
};
use acpi_tables::{Aml, AmlSink};
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use vmm_shared::control::BlockId;

use super::hotplug::{Hotpluggable, Methods};
use crate::platform::layout::MEMORY_HOTPLUG_PORT;
use crate::platform::{Domain, RamRange, Topology};

/// The path of the method that looks for events.
pub(super) const SCAN: &str = "\\_SB_.MEMS.MSCN";
/// What the names of the methods begin with.
const LETTER: u8 = b'M';

/// The container of all blocks.
pub(super) struct Blocks<'a> {
    pub topology: &'a Topology,
}

impl Aml for Blocks<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let hid = Name::new("_HID".into(), &EISAName::new("PNP0A05"));
        let block = |(block, domain)| Block {
            block,
            domain,
            range: self.topology.block_range(block),
        };
        let blocks: Vec<Block> = self.topology.blocks().map(block).collect();
        let methods = Methods {
            letter: LETTER,
            port: MEMORY_HOTPLUG_PORT,
            devices: blocks.iter().map(Block::name).collect(),
        };
        let mut children: Vec<&dyn Aml> = vec![&hid, &methods];
        children.extend(blocks.iter().map(|block| -> &dyn Aml { block }));
        Device::new("MEMS".into(), children).to_aml_bytes(sink);
    }
}

struct Block {
    block: BlockId,
    domain: Domain,
    range: RamRange,
}

impl Block {
    fn name(&self) -> String {
        format!("M{:03X}", self.block.0)
    }
}

impl Aml for Block {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let number = self.block.0;
        let hid = Name::new("_HID".into(), &EISAName::new("PNP0C80"));
        let uid = Name::new("_UID".into(), &u32::from(number));
        let pxm = Name::new("_PXM".into(), &u32::from(self.domain.0));
        let (first, last) = (self.range.gpa.0, self.range.end().0 - 1);
        let cacheable = AddressSpaceCacheable::Cacheable;
        let memory = AddressSpace::new_memory(cacheable, true, first, last, None);
        let crs = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&memory]));
        let methods = Hotpluggable {
            letter: LETTER,
            number,
        };
        let children: Vec<&dyn Aml> = vec![&hid, &uid, &pxm, &crs, &methods];
        Device::new(Path::new(&self.name()), children).to_aml_bytes(sink);
    }
}
