//! Exceptions: delivered in the guest, or exits with their facts.
#![expect(unsafe_code, reason = "assembled code of guests")]

use alloc::format;

use crate::code::code;
use crate::lab::{CODE, DATA, Lab, SPARE, Stop, TSS, exit};
use crate::suite::{Suite, Verdict, same};
use crate::tables::Level;
use crate::tables::bits::PRESENT;

struct Row {
    name: &'static str,
    vector: u8,
    section: &'static str,
    prepare: fn(&mut Lab),
    /// Bytes of code that run before the one that faults.
    at: u64,
    error: u64,
}

const UNMAPPED: u64 = DATA + 0x1000;

/// Runs code that loads a segment which is not present, by its selector in AX.
fn load_absent(lab: &mut Lab, code: &[u8]) {
    lab.set(0x1038, 0x00cf_1300_0000_ffff);
    lab.registers.gpr[0] = SPARE.into();
    lab.code(code);
}

fn rows() -> [Row; 10] {
    let row = |name, vector, section, prepare, at, error| Row {
        name,
        vector,
        section,
        prepare,
        at,
        error,
    };
    [
        row("de", 0, "15.12.1", |lab| lab.code(code!("div ecx")), 0, 0),
        row("bp", 3, "15.12.4", |lab| lab.code(code!("int3")), 0, 0),
        row("ud", 6, "15.12.7", |lab| lab.code(code!("ud2")), 0, 0),
        row(
            "nm",
            7,
            "15.12.8",
            |lab| {
                lab.vmcb.save.cr0 |= 1 << 3;
                lab.code(code!("fninit"));
            },
            0,
            0,
        ),
        row(
            "np",
            11,
            "15.12.11",
            |lab| load_absent(lab, code!("mov es, ax")),
            0,
            SPARE.into(),
        ),
        row(
            "ss",
            12,
            "15.12.12",
            |lab| load_absent(lab, code!("mov ss, ax")),
            0,
            SPARE.into(),
        ),
        row(
            "gp",
            13,
            "15.12.13",
            |lab| {
                lab.registers.gpr[3] = 1 << 60;
                lab.code(code!("mov rax, [rbx]"));
            },
            0,
            0,
        ),
        row(
            "pf",
            14,
            "15.12.14",
            |lab| {
                lab.tables.change(Level::Small, UNMAPPED, 0, PRESENT);
                lab.registers.gpr[3] = UNMAPPED;
                lab.code(code!("mov [rbx], rax"));
            },
            0,
            2,
        ),
        row(
            "mf",
            16,
            "15.12.15",
            |lab| {
                lab.registers.gpr[3] = DATA;
                lab.set(DATA, 0x37b);
                lab.code(code!(
                    "fninit",
                    "fldcw [rbx]",
                    "fld1",
                    "fldz",
                    "fdivp st(1), st",
                    "fwait"
                ));
            },
            10,
            0,
        ),
        row(
            "xf",
            19,
            "15.12.18",
            |lab| {
                lab.registers.gpr[3] = DATA;
                lab.set(DATA, 0x1d80);
                lab.code(code!(
                    "ldmxcsr [rbx]",
                    "xorps xmm0, xmm0",
                    "divss xmm0, xmm0"
                ));
            },
            6,
            0,
        ),
    ]
}

pub(crate) fn add(suite: &mut Suite) {
    for row in rows() {
        suite.case(format!("exception/{}", row.name), row.section, move |lab| {
            (row.prepare)(lab);
            lab.expect(Stop::Vector(row.vector))?;
            lab.reset();
            (row.prepare)(lab);
            lab.intercept_exception(row.vector);
            lab.expect(Stop::Exit(exit::EXCEPTIONS + u64::from(row.vector)))?;
            same("exit at", CODE + row.at, lab.registers.rip)?;
            if matches!(row.vector, 8 | 10..=14 | 17) {
                same("error code", row.error, lab.vmcb.control.exit_info_1)?;
            }
            if row.vector == 14 {
                same("exit information 2", UNMAPPED, lab.vmcb.control.exit_info_2)?;
                // Not delivered, so CR2 stays.
                same("CR2", 0, lab.vmcb.save.cr2)?;
            }
            Ok(())
        });
    }
    suite.case("exception/pf-sets-cr2", "15.12.14", |lab| {
        lab.tables.change(Level::Small, UNMAPPED, 0, PRESENT);
        lab.registers.gpr[3] = UNMAPPED;
        lab.code(code!("mov rax, [rbx]"));
        lab.expect(Stop::Vector(14))?;
        same("CR2", UNMAPPED, lab.vmcb.save.cr2)?;
        same("error code", 0, lab.top_of_stack())
    });
    suite.case("exception/ac", "15.12.16", |lab| {
        let prepare = |lab: &mut Lab| {
            lab.in_user_mode();
            lab.vmcb.save.cr0 |= 1 << 18;
            lab.registers.rflags |= 1 << 18;
            lab.registers.gpr[3] = DATA + 1;
            lab.code(code!("mov eax, [rbx]"));
        };
        prepare(lab);
        lab.expect(Stop::Vector(17))?;
        lab.reset();
        prepare(lab);
        lab.intercept_exception(17);
        lab.expect_exit_at_start(exit::EXCEPTIONS + 17)
    });
    legacy(suite);
    suite.case("exception/df", "15.12.9", double_fault);
    suite.case("exception/intercept-comes-first", "15.12", |lab| {
        // The fault meets a broken table, but the exit comes before it.
        lab.code(code!("ud2"));
        lab.vmcb.save.idtr.limit = 0;
        lab.intercept_exception(6);
        lab.expect_exit_at_start(exit::EXCEPTIONS + 6)
    });
}

/// Those that 64-bit code can't raise. Without an intercept they would meet
/// 64-bit gates, so only the exits are tried.
fn legacy(suite: &mut Suite) {
    suite.case("exception/of", "15.12.5", |lab| {
        const OF: u64 = 1 << 11;
        lab.in_32_bit_mode();
        lab.registers.rflags |= OF;
        lab.code(&[0xce]); // INTO
        lab.intercept_exception(4);
        lab.expect(Stop::Exit(exit::EXCEPTIONS + 4))
    });
    suite.case("exception/br", "15.12.6", |lab| {
        lab.in_32_bit_mode();
        lab.set(DATA, 1 | 1 << 32);
        lab.registers.gpr[3] = DATA;
        lab.code(&[0x62, 0x03]); // BOUND EAX, [EBX]
        lab.intercept_exception(5);
        lab.expect_exit_at_start(exit::EXCEPTIONS + 5)
    });
    suite.case("exception/ts", "15.12.10", |lab| {
        const NT: u64 = 1 << 14;
        lab.in_32_bit_mode();
        // Back to a task that is none.
        lab.set(TSS, SPARE.into());
        lab.set(0x1038, 0x00cf_9300_0000_ffff);
        lab.registers.rflags |= NT;
        lab.code(code!("iret"));
        lab.intercept_exception(10);
        lab.expect_exit_at_start(exit::EXCEPTIONS + 10)?;
        same("error code", SPARE.into(), lab.vmcb.control.exit_info_1)
    });
}

/// #NP while #GP is delivered.
fn double_fault(lab: &mut Lab) -> Verdict {
    let prepare = |lab: &mut Lab| {
        const GATE: u64 = 0x2000 + 13 * 16;
        const GATE_PRESENT: u64 = 1 << 47;
        lab.set(GATE, lab.get(GATE) & !GATE_PRESENT);
        lab.registers.gpr[3] = 1 << 60;
        lab.code(code!("mov rax, [rbx]"));
    };
    prepare(lab);
    lab.expect(Stop::Vector(8))?;
    lab.reset();
    prepare(lab);
    lab.intercept_exception(8);
    lab.expect(Stop::Exit(exit::EXCEPTIONS + 8))?;
    same("error code", 0, lab.vmcb.control.exit_info_1)
}
