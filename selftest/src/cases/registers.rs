//! Intercepts of control and debug registers.
#![expect(unsafe_code, reason = "assembled code of guests")]

use alloc::format;
use alloc::vec::Vec;
use core::arch::x86_64::__cpuid;

use crate::code::code;
use crate::lab::{CODE, CR0, CR4, Lab, Stop, exit};
use crate::suite::{Suite, Verdict, needs, same};

/// MOV between a register by number and RCX: opcode 0F `op` /number, with
/// REX.R for the upper eight.
fn mov(op: u8, number: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    if number >= 8 {
        bytes.push(0x44);
    }
    bytes.extend([0x0f, op, 0xc1 | (number & 7) << 3]);
    bytes
}

const READ_CR: u8 = 0x20;
const READ_DR: u8 = 0x21;
const WRITE_CR: u8 = 0x22;
const WRITE_DR: u8 = 0x23;
const RCX: usize = 1;

fn control_register(lab: &mut Lab, number: u8, op: u8) -> Verdict {
    let prepare = |lab: &mut Lab| {
        lab.code(&mov(op, number));
        lab.registers.gpr[RCX] = match number {
            0 => CR0,
            3 => lab.tables.root(),
            4 => CR4,
            _ => 0,
        };
    };
    prepare(lab);
    lab.expect(Stop::End)?;
    lab.reset();
    prepare(lab);
    let write = op == WRITE_CR;
    lab.vmcb.control.intercept_cr = 1 << (number + if write { 16 } else { 0 });
    let code = u64::from(number) + if write { 0x10 } else { 0 };
    lab.expect_exit_at_start(code)?;
    let svm = raw_cpuid::CpuId::new().get_svm_info();
    if svm.is_some_and(|svm| svm.has_decode_assists()) {
        const IS_MOV: u64 = 1 << 63;
        same(
            "exit information 1",
            IS_MOV | RCX as u64,
            lab.vmcb.control.exit_info_1,
        )?;
    }
    Ok(())
}

fn debug_register(lab: &mut Lab, number: u8, op: u8) -> Verdict {
    let prepare = |lab: &mut Lab| {
        lab.code(&mov(op, number));
        lab.registers.gpr[RCX] = match number {
            6 => 0xffff_0ff0,
            7 => 0x400,
            _ => 0,
        };
    };
    prepare(lab);
    lab.expect(Stop::End)?;
    lab.reset();
    prepare(lab);
    let write = op == WRITE_DR;
    lab.vmcb.control.intercept_dr = 1 << (number + if write { 16 } else { 0 });
    lab.expect_exit_at_start(0x20 + u64::from(number) + if write { 0x10 } else { 0 })
}

pub(crate) fn add(suite: &mut Suite) {
    for (op, what) in [(READ_CR, "read"), (WRITE_CR, "write")] {
        for number in [0, 2, 3, 4, 8] {
            suite.case(
                format!("register/{what}-cr{number}"),
                "15.8.1",
                move |lab| control_register(lab, number, op),
            );
        }
    }
    for (op, what) in [(READ_DR, "read"), (WRITE_DR, "write")] {
        for number in [0, 1, 2, 3, 6, 7] {
            suite.case(
                format!("register/{what}-dr{number}"),
                "15.8.1",
                move |lab| debug_register(lab, number, op),
            );
        }
    }
    suite.case("register/cr0-selective", "15.9", |lab| {
        const SELECTIVE: u32 = 1 << 5;
        const TS: u64 = 1 << 3;
        const WP: u64 = 1 << 16;
        let write = |lab: &mut Lab, value| {
            lab.reset();
            lab.code(&mov(WRITE_CR, 0));
            lab.registers.gpr[RCX] = value;
            lab.vmcb.control.intercept_misc1 |= SELECTIVE;
        };
        // TS and MP may change without an exit.
        write(lab, CR0 | TS);
        lab.expect(Stop::End)?;
        write(lab, CR0 | WP);
        lab.expect_exit_at_start(exit::CR0_SELECTIVE)
    });
    suite.case("register/lmsw", "15.9", |lab| {
        lab.code(code!("lmsw cx"));
        lab.registers.gpr[RCX] = CR0;
        lab.vmcb.control.intercept_cr = 1 << 16;
        lab.expect_exit_at_start(0x10)
    });
    suite.case("register/clts", "15.9", |lab| {
        lab.code(code!("clts"));
        lab.vmcb.control.intercept_cr = 1 << 16;
        lab.expect_exit_at_start(0x10)
    });
    suite.case("register/smsw", "15.9", |lab| {
        lab.code(code!("smsw ecx"));
        lab.vmcb.control.intercept_cr = 1;
        lab.expect_exit_at_start(0)
    });
    for number in [0_u8, 4, 8] {
        suite.case(
            format!("register/cr{number}-write-trap"),
            "15.9",
            move |lab| {
                const LAST: u32 = 0x8000_0000;
                const ENCRYPTION: u32 = 0x8000_001f;
                // For guests with encrypted state, whose registers can't be
                // changed at a plain intercept.
                let has = __cpuid(LAST).eax >= ENCRYPTION && __cpuid(ENCRYPTION).eax & 1 << 3 != 0;
                needs(has, "no write traps")?;
                let code = mov(WRITE_CR, number);
                lab.code(&code);
                lab.registers.gpr[RCX] = match number {
                    0 => CR0,
                    4 => CR4,
                    _ => 0,
                };
                lab.vmcb.control.intercept_misc2 |= 1 << (16 + number);
                lab.expect(Stop::Exit(0x90 + u64::from(number)))?;
                same("exit at", CODE + code.len() as u64, lab.registers.rip)
            },
        );
    }
    suite.case("register/efer-write-trap", "15.9", |lab| {
        const LEAF: u32 = 0x8000_000a;
        // CPUID has no bit for it; processors with AVIC or later have it.
        let edx = __cpuid(LEAF).edx;
        needs(edx & 1 << 13 != 0, "no write traps")?;
        lab.code(code!("wrmsr"));
        lab.registers.gpr[RCX] = 0xc000_0080;
        lab.registers.gpr[0] = crate::lab::EFER;
        lab.vmcb.control.intercept_misc2 |= 1 << 15;
        lab.expect(Stop::Exit(0x8f))
    });
}
