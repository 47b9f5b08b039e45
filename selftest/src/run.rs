//! From the start of the image to its last record.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use core::fmt;

use hypervisor::arch::boot::Machine;
use hypervisor::arch::io::{self, NodeExit};
use hypervisor::arch::svm::switch;
use hypervisor::arch::{cpu, pci};
use hypervisor::fabric::{self, Regions};
use vmm_shared::addr::NodeId;
use vmm_shared::control::MAX_COMMAND_LINE;
use vmm_shared::selftest::{Record, Verdict};

use crate::cases::{self, nodes};
use crate::host;
use crate::lab::Lab;
use crate::suite::{Finding, Suite};

/// What the launcher wants.
#[derive(Default)]
struct Wishes {
    /// The first case to try.
    first: u32,
    /// Only cases with this in their name.
    only: String,
}

impl Wishes {
    /// `first=N only=WORD`.
    fn read(words: &str) -> Self {
        let mut wishes = Self::default();
        for word in words.split_ascii_whitespace() {
            if let Some(number) = word.strip_prefix("first=") {
                wishes.first = number.parse().unwrap_or(0);
            }
            if let Some(only) = word.strip_prefix("only=") {
                wishes.only = only.into();
            }
        }
        wishes
    }
}

/// The boot core's life.
pub(crate) fn main(machine: Machine) -> ! {
    let regions = match prepare(&machine.windows) {
        Ok(regions) => regions,
        Err(why) => {
            say(format_args!("this node cannot start: {why}"));
            io::exit(NodeExit::BootFailure)
        }
    };
    if machine.node != NodeId(0) {
        nodes::help(&regions, machine.node)
    }
    let config = regions.control.boot_config();
    let len = usize::try_from(config.command_line_len).unwrap_or(0);
    let words = &config.command_line[..len.min(MAX_COMMAND_LINE)];
    let wishes = Wishes::read(core::str::from_utf8(words).unwrap_or_default());
    facts(&machine);

    let mut suite = Suite::default();
    cases::add(&mut suite, machine.clocks);
    if config.nodes > 1 {
        nodes::add(&mut suite, &regions, machine.clocks);
    }
    suite.0.retain(|case| case.name.contains(&wishes.only));
    run(&suite, wishes.first);
    record(Record::End);
    io::exit(NodeExit::Done)
}

fn prepare(windows: &[pci::Window]) -> Result<Regions, String> {
    switch::enable().map_err(|why| format!("{why}"))?;
    let regions = fabric::find_regions(windows).map_err(|why| format!("{why}"))?;
    host::load_gates();
    cpu::interrupts_on();
    Ok(regions)
}

fn run(suite: &Suite, first: u32) {
    let count = u32::try_from(suite.0.len()).expect("few");
    record(Record::Plan {
        first,
        last: count.saturating_sub(1),
    });
    let mut lab = Lab::new();
    let cases = (0..).zip(&suite.0);
    for (number, case) in cases.filter(|(number, _)| *number >= first) {
        record(Record::Case {
            number,
            name: &case.name,
            section: case.section,
        });
        lab.reset();
        let verdict = (case.test)(&mut lab);
        let verdict = match &verdict {
            Ok(()) => Verdict::Pass,
            Err(Finding::Wrong { expected, seen }) => Verdict::Fail { expected, seen },
            Err(Finding::Missing(what)) => Verdict::Skip(what),
        };
        record(Record::Ended { number, verdict });
    }
}

/// What the processor says of itself.
fn facts(machine: &Machine) {
    let cpuid = raw_cpuid::CpuId::new();
    let fact = |name, value: &str| record(Record::Fact { name, value });
    let vendor = cpuid.get_vendor_info();
    let family = cpuid.get_feature_info();
    if let (Some(vendor), Some(family)) = (vendor, family) {
        let (family, model) = (family.family_id(), family.model_id());
        let text = format!("{}, family {family}, model {model}", vendor.as_str());
        fact("processor", &text);
    }
    let hypervisor = cpuid.get_hypervisor_info().map_or_else(
        || String::from("none"),
        |info| format!("{:?}", info.identify()),
    );
    fact("hypervisor", &hypervisor);
    let mut features = vec![];
    if let Some(svm) = cpuid.get_svm_info() {
        for (name, has) in [
            ("NP", svm.has_nested_paging()),
            ("LbrVirt", svm.has_lbr_virtualization()),
            ("SVML", svm.has_svm_lock()),
            ("NRIPS", svm.has_nrip()),
            ("TscRateMsr", svm.has_tsc_rate_msr()),
            ("VmcbClean", svm.has_vmcb_clean_bits()),
            ("FlushByAsid", svm.has_flush_by_asid()),
            ("DecodeAssists", svm.has_decode_assists()),
            ("PauseFilter", svm.has_pause_filter()),
            ("AVIC", svm.has_avic()),
            ("VGIF", svm.has_gif()),
        ] {
            if has {
                features.push(name);
            }
        }
        fact("ASIDs", &format!("{}", svm.supported_asids()));
    }
    fact("SVM features", &features.join(" "));
    fact("TSC", &format!("{} kHz", machine.clocks.tsc_khz));
}

fn record(record: Record<'_>) {
    say(format_args!("{record}"));
}

/// A line of the node's log, by its only core.
pub(crate) fn say(line: fmt::Arguments<'_>) {
    io::write_unlocked(format_args!("{line}\n"));
}
