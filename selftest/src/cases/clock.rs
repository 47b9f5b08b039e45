//! The guest's time stamp counter.
#![expect(unsafe_code, reason = "assembled code of guests")]

use alloc::format;

use hypervisor::arch::cpu;
use hypervisor::arch::time::Clocks;

use crate::code::code;
use crate::lab::{Lab, Stop};
use crate::suite::{Suite, Verdict, holds};

/// The guest's reading must lie between two of the host's, by the offset.
fn reading(lab: &mut Lab, code: &[u8], offset: u64) -> Verdict {
    lab.code(code);
    lab.vmcb.control.tsc_offset = offset;
    let before = cpu::rdtsc().wrapping_add(offset);
    lab.expect(Stop::End)?;
    let after = cpu::rdtsc().wrapping_add(offset);
    let seen = lab.registers.gpr[2] << 32 | lab.registers.gpr[0];
    let within = seen.wrapping_sub(before) <= after.wrapping_sub(before);
    holds(within, || {
        (
            format!("a time within {before:#x}..={after:#x}"),
            format!("{seen:#x}"),
        )
    })
}

pub(crate) fn add(suite: &mut Suite, clocks: Clocks) {
    for (name, code) in [
        ("rdtsc", code!("rdtsc")),
        ("rdtscp", code!("rdtscp")),
        ("msr", code!("mov ecx, 0x10", "rdmsr")),
    ] {
        for (what, offset) in [
            ("unchanged", 0),
            ("ahead", 1 << 44),
            ("behind", 0_u64.wrapping_sub(1 << 44)),
        ] {
            suite.case(format!("clock/{name}-{what}"), "15.30.5", move |lab| {
                reading(lab, code, offset)
            });
        }
    }
    suite.case("clock/runs-in-the-guest", "15.30.5", move |lab| {
        // 200 µs by the host's clock, waited for by the guest's.
        let ticks = clocks.ticks(200);
        lab.registers.gpr[1] = ticks;
        lab.code(code!(
            "rdtsc",
            "shl rdx, 32",
            "lea rbx, [rdx + rax]",
            "2: rdtsc",
            "shl rdx, 32",
            "or rax, rdx",
            "sub rax, rbx",
            "cmp rax, rcx",
            "jb 2b",
        ));
        let before = cpu::rdtsc();
        lab.expect(Stop::End)?;
        let passed = cpu::rdtsc() - before;
        holds(passed >= ticks, || {
            (format!("at least {ticks} ticks"), format!("{passed}"))
        })
    });
    suite.case("clock/host-keeps-its-own", "15.6", |lab| {
        lab.vmcb.control.tsc_offset = 1 << 50;
        let before = cpu::rdtsc();
        lab.expect(Stop::End)?;
        let after = cpu::rdtsc();
        holds(after > before && after - before < 1 << 40, || {
            (format!("shortly after {before:#x}"), format!("{after:#x}"))
        })
    });
}
