//! Debug registers, single steps and breakpoints.
#![expect(unsafe_code, reason = "assembled code of guests")]

use core::cell::Cell;

use crate::code::code;
use crate::host;
use crate::lab::{CODE, RFLAGS_RF, RFLAGS_TF, Stop, exit};
use crate::suite::{Suite, same};

const DB: u64 = exit::EXCEPTIONS + 1;
const STEP: u64 = 1 << 14;
const HIT_0: u64 = 1;
/// Breakpoint 0, by its local bit, on execution.
const ARMED_0: u64 = 0x401;

pub(crate) fn add(suite: &mut Suite) {
    suite.case("debug/single-step", "15.12.2", |lab| {
        lab.registers.rflags |= RFLAGS_TF;
        lab.code(code!("nop", "nop"));
        lab.intercept_exception(1);
        lab.expect(Stop::Exit(DB))?;
        same("exit at", CODE + 1, lab.registers.rip)?;
        same("step bit of DR6", STEP, lab.vmcb.save.dr6 & STEP)
    });
    suite.case("debug/single-step-in-the-guest", "15.12.2", |lab| {
        lab.registers.rflags |= RFLAGS_TF;
        lab.code(code!("nop", "nop"));
        lab.expect(Stop::Vector(1))?;
        same("return address", CODE + 1, lab.top_of_stack())
    });
    suite.case("debug/dr6-is-stored", "15.6", |lab| {
        lab.code(code!("mov eax, 0xffff0ff3", "mov dr6, rax"));
        lab.expect(Stop::End)?;
        same("DR6", 0xffff_0ff3, lab.vmcb.save.dr6)
    });
    suite.case("debug/dr6-is-loaded", "15.5.1", |lab| {
        lab.vmcb.save.dr6 = 0xffff_0ff5;
        lab.code(code!("mov rax, dr6"));
        lab.expect(Stop::End)?;
        same("DR6", 0xffff_0ff5, lab.registers.gpr[0])
    });
    suite.case("debug/dr7-is-stored", "15.6", |lab| {
        lab.code(code!("mov eax, 0x700", "mov dr7, rax"));
        lab.expect(Stop::End)?;
        same("DR7", 0x700, lab.vmcb.save.dr7)
    });
    suite.case("debug/dr7-is-the-host's-after", "15.6", |lab| {
        lab.vmcb.save.dr7 = 0x700;
        let after = Cell::new(0);
        lab.run_with(|_| {}, || after.set(host::dr7()));
        same("DR7", 0x400, after.get())
    });
    suite.case("debug/breakpoint-of-the-guest", "15.12.2", |lab| {
        lab.code(code!(
            "lea rax, [rip + 3f]",
            "mov dr0, rax",
            "mov eax, 0x401",
            "mov dr7, rax",
            "nop",
            "3: nop",
        ));
        lab.intercept_exception(1);
        lab.expect(Stop::Exit(DB))?;
        same("exit at", CODE + 19, lab.registers.rip)?;
        same("hits in DR6", HIT_0, lab.vmcb.save.dr6 & 0xf)
    });
    suite.case("debug/breakpoint-loaded-at-entry", "15.5.1", |lab| {
        lab.code(code!("nop", "nop", "nop"));
        lab.vmcb.save.dr7 = ARMED_0;
        lab.intercept_exception(1);
        let stop = lab.run_with(|_| host::set_breakpoint_address(CODE + 2), || {});
        crate::suite::equal(Stop::Exit(DB), stop)?;
        same("exit at", CODE + 2, lab.registers.rip)
    });
    suite.case("debug/resume-flag", "15.5.1", |lab| {
        lab.code(code!("nop", "nop"));
        lab.vmcb.save.dr7 = ARMED_0;
        lab.intercept_exception(1);
        lab.registers.rflags |= RFLAGS_RF;
        let stop = lab.run_with(|_| host::set_breakpoint_address(CODE), || {});
        crate::suite::equal(Stop::End, stop)
    });
    suite.case("debug/trap-flag-is-stored", "15.6", |lab| {
        lab.registers.rflags |= RFLAGS_TF;
        lab.code(code!("cpuid"));
        lab.vmcb.control.intercept_misc1 |= 1 << 18;
        lab.expect_exit_at_start(exit::CPUID)?;
        same("trap flag", RFLAGS_TF, lab.registers.rflags & RFLAGS_TF)
    });
}
