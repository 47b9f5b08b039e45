//! States that VMRUN must refuse.

use crate::lab::{CR0, Lab, Stop, exit};
use crate::suite::Suite;

const RESERVED_TYPE: u64 = 1 << 31 | 5 << 8 | 0x30;
const EXCEPTION_2: u64 = 1 << 31 | 3 << 8 | 2;
const EXCEPTION_32: u64 = 1 << 31 | 3 << 8 | 32;

pub(crate) fn add(suite: &mut Suite) {
    let mut refused = |name: &str, change: fn(&mut Lab)| {
        suite.case(alloc::format!("invalid/{name}"), "15.5.1", move |lab| {
            change(lab);
            lab.expect(Stop::Exit(exit::INVALID))
        });
    };
    refused("efer-svme-clear", |lab| lab.vmcb.save.efer &= !(1 << 12));
    refused("efer-reserved", |lab| lab.vmcb.save.efer |= 1 << 63);
    refused("cr0-nw-without-cd", |lab| lab.vmcb.save.cr0 = CR0 | 1 << 29);
    refused("cr0-reserved", |lab| lab.vmcb.save.cr0 |= 1 << 32);
    refused("cr3-reserved", |lab| lab.vmcb.save.cr3 |= 1 << 63);
    refused("cr4-reserved", |lab| lab.vmcb.save.cr4 |= 1 << 31);
    refused("cr4-high", |lab| lab.vmcb.save.cr4 |= 1 << 63);
    refused("dr6-high", |lab| lab.vmcb.save.dr6 |= 1 << 32);
    refused("dr7-high", |lab| lab.vmcb.save.dr7 |= 1 << 32);
    refused("long-mode-without-pae", |lab| {
        lab.vmcb.save.cr4 &= !(1 << 5)
    });
    refused("long-mode-without-protection", |lab| {
        lab.vmcb.save.cr0 &= !1
    });
    refused("code-64-and-32-bit", |lab| {
        lab.vmcb.save.cs.attributes |= 1 << 10
    });
    refused("vmrun-intercept-clear", |lab| {
        lab.vmcb.control.intercept_misc2 &= !1
    });
    refused("asid-0", |lab| lab.vmcb.control.asid = 0);
    refused("port-map-too-high", |lab| {
        lab.vmcb.control.iopm_base = 1 << 52
    });
    refused("msr-map-too-high", |lab| {
        lab.vmcb.control.msrpm_base = 1 << 52
    });
    refused("pat-type-2", |lab| lab.vmcb.save.g_pat = 2);
    refused("event-of-reserved-type", |lab| {
        lab.vmcb.control.event_injection = RESERVED_TYPE;
    });
    refused("event-exception-2", |lab| {
        lab.vmcb.control.event_injection = EXCEPTION_2;
    });
    refused("event-exception-32", |lab| {
        lab.vmcb.control.event_injection = EXCEPTION_32;
    });
    suite.case("invalid/sane-state-runs", "15.5.1", |lab| {
        lab.expect(Stop::End)
    });
}
