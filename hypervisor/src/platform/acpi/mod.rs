//! The firmware tables: RSDP, XSDT, FADT, MADT, DSDT; if there is more than one
//! node, SRAT, SLIT and HMAT, the first also if memory may come later; and if the root image is an NVDIMM, NFIT.
//!
//! Hardware-reduced ACPI: no PIC, PIT, PM timer or SCI; events come through
//! the generic event device. The tables stand behind each other in a fixed
//! order, so that equal configurations give equal bytes.
//!
//! Source: ACPI specification 6.5, chapters 5 and 9.

mod distance;
mod dsdt;
mod hotplug;
mod madt;
mod memory;
mod nfit;
mod processors;
mod srat;
#[cfg(test)]
mod tests;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use alloc::vec;
use alloc::vec::Vec;
use vmm_shared::addr::Gpa;

use super::layout::{ACPI_BASE, ACPI_END, PM_TIMER_PORT, RamRange, SLEEP_PORT, SLEEP_RESET};
use super::{Machine, PlatformConfig, PmemInterface};

const OEM_ID: [u8; 6] = *b"VIADCT";
const OEM_TABLE_ID: [u8; 8] = *b"VIADUCT1";
const OEM_REVISION: u32 = 1;
/// Bytes of the header that all tables but the RSDP start with.
const HEADER_LEN: u32 = 36;
/// Tables start at multiples of this.
const ALIGNMENT: usize = 64;

/// Boot architecture flags: no VGA and no CMOS clock to probe. Without the
/// latter a kernel polls an absent clock for seconds.
const NO_VGA: u16 = 1 << 2;
/// Ports of the ACPI timer.
const PM_TIMER_LEN: u8 = 4;
const NO_CMOS_RTC: u16 = 1 << 5;

/// The firmware tables, ready to be copied into guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiTables {
    /// Where the root pointer is.
    pub rsdp: Gpa,
    /// Where the first of [`bytes`](Self::bytes) belongs.
    pub base: Gpa,
    /// All tables.
    pub bytes: Vec<u8>,
}

impl AcpiTables {
    /// The guest memory that the tables take.
    #[must_use]
    pub fn range(&self) -> RamRange {
        RamRange {
            gpa: self.base,
            len: self.bytes.len() as u64,
        }
    }
}

/// The tables that describe this machine.
///
/// # Panics
/// If they outgrow the room below 1 MiB, which those of no [`PlatformConfig`]
/// do.
#[must_use]
pub fn build(config: &PlatformConfig) -> AcpiTables {
    let mut tables = Builder::new();
    let dsdt = tables.place(&dsdt::build(config));
    tables.add(&fadt(dsdt, config.machine));
    tables.add(&madt::build(config));
    let is_spread = config.topology.nodes().len() > 1;
    if is_spread || config.topology.windows().next().is_some() {
        tables.add(&srat::build(&config.topology));
    }
    if is_spread {
        tables.add(&distance::slit(&config.topology));
        tables.add(&distance::hmat(&config.topology));
    }
    if let Some(image) = config.image
        && image.interface == PmemInterface::Nfit
    {
        tables.add(&nfit::build(&image));
    }
    tables.finish()
}

/// Puts tables behind each other and collects what the XSDT lists.
struct Builder {
    bytes: Vec<u8>,
    listed: Vec<Gpa>,
}

impl Builder {
    /// Room for the RSDP first, which is known last.
    fn new() -> Self {
        Self {
            bytes: vec![0; Rsdp::len()],
            listed: Vec::new(),
        }
    }

    /// Appends a table; says where it is.
    fn place(&mut self, table: &dyn Aml) -> Gpa {
        let start = self.bytes.len().next_multiple_of(ALIGNMENT);
        self.bytes.resize(start, 0);
        table.to_aml_bytes(&mut self.bytes);
        let end = ACPI_BASE.0 + self.bytes.len() as u64;
        assert!(end <= ACPI_END.0, "firmware tables outgrow their room");
        Gpa(ACPI_BASE.0 + start as u64)
    }

    /// Appends a table that the XSDT lists.
    fn add(&mut self, table: &dyn Aml) {
        let gpa = self.place(table);
        self.listed.push(gpa);
    }

    fn finish(mut self) -> AcpiTables {
        let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        for table in &self.listed {
            xsdt.add_entry(table.0);
        }
        let xsdt = self.place(&xsdt);
        let mut rsdp = Vec::new();
        Rsdp::new(OEM_ID, xsdt.0).to_aml_bytes(&mut rsdp);
        self.bytes[..rsdp.len()].copy_from_slice(&rsdp);
        AcpiTables {
            rsdp: ACPI_BASE,
            base: ACPI_BASE,
            bytes: self.bytes,
        }
    }
}

/// A table with this signature and revision and `body` behind its header.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let mut table = Sdt::new(
        signature,
        HEADER_LEN,
        revision,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append_slice(body);
    table
}

fn fadt(dsdt: Gpa, machine: Machine) -> impl Aml {
    let register = GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(SLEEP_PORT),
    );
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt.0)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // Set: there are no fixed-feature buttons.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.reset_reg = register;
    fadt.reset_value = SLEEP_RESET;
    fadt.sleep_control_reg = register;
    fadt.sleep_status_reg = register;
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"Viaduct\0").into();
    if machine.is_legacy() {
        fadt.pm_tmr_blk = u32::from(PM_TIMER_PORT).into();
        fadt.pm_tmr_len = PM_TIMER_LEN;
    }
    fadt.finalize()
}
