//! What translations may be remembered, and for whom.
#![expect(unsafe_code, reason = "assembled code of guests")]

use core::sync::atomic::Ordering;

use hypervisor::arch::svm::vmcb::TLB_FLUSH_ALL;

use crate::code::code;
use crate::host;
use crate::lab::{DATA, Lab, Stop};
use crate::suite::{Suite, Verdict, needs, same};
use crate::tables::Level;

const SECOND: u64 = DATA + 0x1000;
const FLUSH_GUEST: u32 = 3;
const FLUSH_GUEST_NON_GLOBAL: u32 = 7;

fn prepare(lab: &mut Lab) {
    lab.set(DATA, 1);
    lab.set(SECOND, 2);
    lab.registers.gpr[3] = DATA;
    lab.code(code!("mov rax, [rbx]"));
}

fn again(lab: &mut Lab) -> Verdict {
    lab.registers.rip = crate::lab::CODE;
    lab.expect(Stop::End)
}

/// Makes the nested tables lead from the first page to the second.
fn swap(lab: &Lab) {
    let frame = lab.nested.value(Level::Small, SECOND);
    lab.nested
        .entry(Level::Small, DATA)
        .store(frame, Ordering::Relaxed);
}

pub(crate) fn add(suite: &mut Suite) {
    suite.case("tlb/flush-all", "15.16.1", |lab| {
        prepare(lab);
        lab.expect(Stop::End)?;
        swap(lab);
        lab.vmcb.control.tlb_control = TLB_FLUSH_ALL;
        again(lab)?;
        same("RAX", 2, lab.registers.gpr[0])
    });
    for (name, control) in [
        ("flush-this-guest", FLUSH_GUEST),
        ("flush-what-is-not-global", FLUSH_GUEST_NON_GLOBAL),
    ] {
        suite.case(alloc::format!("tlb/{name}"), "15.16.2", move |lab| {
            let svm = raw_cpuid::CpuId::new().get_svm_info();
            needs(
                svm.is_some_and(|svm| svm.has_flush_by_asid()),
                "no flush by ASID",
            )?;
            prepare(lab);
            lab.expect(Stop::End)?;
            swap(lab);
            lab.vmcb.control.tlb_control = control;
            again(lab)?;
            same("RAX", 2, lab.registers.gpr[0])
        });
    }
    suite.case("tlb/asids-apart", "15.16", |lab| {
        let svm = raw_cpuid::CpuId::new().get_svm_info();
        let asids = svm.map_or(0, |svm| svm.supported_asids());
        needs(asids > 2, "one ASID only")?;
        prepare(lab);
        lab.expect(Stop::End)?;
        // Another guest, to which the same address means another page.
        swap(lab);
        (lab.vmcb.control.asid, lab.vmcb.control.tlb_control) = (2, TLB_FLUSH_ALL);
        again(lab)?;
        same("RAX of ASID 2", 2, lab.registers.gpr[0])?;
        lab.nested.reset();
        (lab.vmcb.control.asid, lab.vmcb.control.tlb_control) = (1, 0);
        again(lab)?;
        same("RAX of ASID 1", 1, lab.registers.gpr[0])
    });
    suite.case("tlb/invlpga", "15.16.4", |lab| {
        prepare(lab);
        lab.expect(Stop::End)?;
        let entry = lab.tables.value(Level::Small, SECOND);
        lab.tables
            .entry(Level::Small, DATA)
            .store(entry, Ordering::Relaxed);
        host::invlpga(DATA, 1);
        lab.vmcb.control.tlb_control = 0;
        again(lab)?;
        same("RAX", 2, lab.registers.gpr[0])
    });
    suite.case("tlb/invlpg-in-the-guest", "15.16", |lab| {
        const ENTRY_FIELD: u64 = 0x3000 + 0x3000 + (DATA >> 12) * 8;
        prepare(lab);
        lab.registers.gpr[2] = ENTRY_FIELD;
        lab.registers.gpr[1] = lab.tables.value(Level::Small, SECOND);
        lab.code(code!(
            "mov rax, [rbx]",
            "mov [rdx], rcx",
            "invlpg [rbx]",
            "mov rax, [rbx]",
        ));
        lab.expect(Stop::End)?;
        same("RAX", 2, lab.registers.gpr[0])
    });
}
