//! The guest's own XCR0: which values XSETBV takes, and that the host gets
//! them. Entries and exits don't switch the register.
#![expect(unsafe_code, reason = "assembled code of guests")]

use hypervisor::arch::cpu;

use crate::code::code;
use crate::lab::{CR4, Lab, Stop};
use crate::suite::{Suite, Verdict, needs, same};

const CR4_OSXSAVE: u64 = 1 << 18;
const X87: u64 = 1 << 0;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;
const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;

/// XSETBV with this value, in a guest that may use it.
fn writes(lab: &mut Lab, value: u64) -> Verdict {
    let features = raw_cpuid::CpuId::new().get_feature_info();
    needs(features.is_some_and(|it| it.has_xsave()), "no XSAVE")?;
    lab.vmcb.save.cr4 = CR4 | CR4_OSXSAVE;
    lab.registers.gpr[RAX] = value & 0xffff_ffff;
    lab.registers.gpr[RDX] = value >> 32;
    lab.code(code!("xsetbv"));
    Ok(())
}

pub(crate) fn add(suite: &mut Suite) {
    suite.case("xsetbv/sets-the-only-xcr0", "15.5.1", |lab| {
        writes(lab, X87 | SSE)?;
        let before = cpu::xgetbv0();
        cpu::set_guest_xcr0(X87);
        let stop = lab.run();
        let after = cpu::xgetbv0();
        cpu::set_guest_xcr0(before);
        crate::suite::equal(Stop::End, stop)?;
        same("XCR0", X87 | SSE, after)
    });
    for (name, value) in [
        ("without-x87", SSE),
        ("avx-without-sse", X87 | AVX),
        ("reserved-bit", X87 | 1 << 62),
    ] {
        let name = alloc::format!("xsetbv/{name}");
        suite.case(name, "11.5.2", move |lab| {
            writes(lab, value)?;
            lab.expect(Stop::Vector(13))
        });
    }
    suite.case("xsetbv/other-register", "11.5.2", |lab| {
        writes(lab, X87)?;
        lab.registers.gpr[RCX] = 5;
        lab.expect(Stop::Vector(13))
    });
    suite.case("xsetbv/in-user-mode", "11.5.2", |lab| {
        lab.in_user_mode();
        writes(lab, X87)?;
        lab.expect(Stop::Vector(13))
    });
    suite.case("xsetbv/without-osxsave", "11.5.2", |lab| {
        writes(lab, X87)?;
        lab.vmcb.save.cr4 = CR4;
        lab.expect(Stop::Vector(6))
    });
}
