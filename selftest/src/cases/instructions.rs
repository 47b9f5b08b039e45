//! Instruction intercepts: each exits at its instruction when it is wanted,
//! and only then.
#![expect(unsafe_code, reason = "assembled code of guests")]

use core::arch::x86_64::__cpuid;

use hypervisor::arch::svm::vmcb::Misc2;

use crate::code::code;
use crate::lab::{CODE, DATA, KERNEL_CODE, KERNEL_DATA, Lab, Stop, exit};
use crate::suite::{Suite, Verdict, needs, same};

/// Which bit of which word switches an intercept on.
#[derive(Clone, Copy)]
enum Bit {
    Misc1(u32),
    Misc2(u32),
    Misc3(u32),
}

impl Bit {
    fn set(self, lab: &mut Lab) {
        let control = &mut lab.vmcb.control;
        match self {
            Self::Misc1(bit) => control.intercept_misc1 |= 1 << bit,
            Self::Misc2(bit) => control.intercept_misc2 |= 1 << bit,
            Self::Misc3(bit) => control.intercept_misc3 |= 1 << bit,
        }
    }
}

/// What comes of the instruction without its intercept.
#[derive(Clone, Copy)]
enum Otherwise {
    /// It runs.
    Runs,
    /// It leads to this vector.
    Vector(u8),
    /// It would not do here.
    Untried,
}

struct Row {
    name: &'static str,
    bit: Bit,
    exit: u64,
    code: &'static [u8],
    otherwise: Otherwise,
}

fn rows() -> [Row; 41] {
    use Bit::{Misc1, Misc2, Misc3};
    use Otherwise::{Runs, Untried, Vector};
    let row = |name, bit, exit, code, otherwise| Row {
        name,
        bit,
        exit,
        code,
        otherwise,
    };
    // RAX is 0, RBX points to data.
    [
        row("sidt", Misc1(6), 0x66, code!("sidt [rbx]"), Runs),
        row("sgdt", Misc1(7), 0x67, code!("sgdt [rbx]"), Runs),
        row("sldt", Misc1(8), 0x68, code!("sldt ecx"), Runs),
        row("str", Misc1(9), 0x69, code!("str ecx"), Runs),
        row("lidt", Misc1(10), 0x6a, code!("lidt [rbx]"), Runs),
        row("lgdt", Misc1(11), 0x6b, code!("lgdt [rbx]"), Runs),
        row("lldt", Misc1(12), 0x6c, code!("lldt ax"), Runs),
        row("ltr", Misc1(13), 0x6d, code!("ltr ax"), Untried),
        row("rdtsc", Misc1(14), 0x6e, code!("rdtsc"), Runs),
        row("rdpmc", Misc1(15), 0x6f, code!("rdpmc"), Untried),
        row("pushf", Misc1(16), 0x70, code!("pushfq"), Runs),
        row("popf", Misc1(17), 0x71, code!("popfq"), Runs),
        row("cpuid", Misc1(18), 0x72, code!("cpuid"), Runs),
        row("rsm", Misc1(19), 0x73, code!("rsm"), Vector(6)),
        row("iret", Misc1(20), 0x74, code!("iretq"), Vector(13)),
        row("int", Misc1(21), 0x75, code!("int 0x80"), Vector(0x80)),
        row("invd", Misc1(22), 0x76, code!("invd"), Untried),
        row("pause", Misc1(23), 0x77, code!("pause"), Runs),
        row("hlt", Misc1(24), 0x78, code!("hlt"), Untried),
        row("invlpg", Misc1(25), 0x79, code!("invlpg [rbx]"), Runs),
        row("invlpga", Misc1(26), 0x7a, code!("invlpga rax, ecx"), Runs),
        row("vmrun", Misc2(0), 0x80, code!("vmrun rax"), Untried),
        row("vmload", Misc2(2), 0x82, code!("vmload rax"), Untried),
        row("vmsave", Misc2(3), 0x83, code!("vmsave rax"), Untried),
        row("stgi", Misc2(4), 0x84, code!("stgi"), Runs),
        row("clgi", Misc2(5), 0x85, code!("clgi"), Untried),
        row("skinit", Misc2(6), 0x86, code!("skinit eax"), Untried),
        row("rdtscp", Misc2(7), 0x87, code!("rdtscp"), Runs),
        row("icebp", Misc2(8), 0x88, code!(".byte 0xf1"), Vector(1)),
        row("wbinvd", Misc2(9), 0x89, code!("wbinvd"), Runs),
        row("monitor", Misc2(10), 0x8a, code!("monitor"), Untried),
        row("mwait", Misc2(11), 0x8b, code!("mwait"), Untried),
        row("xsetbv", Misc2(13), 0x8d, code!("xsetbv"), Untried),
        row("rdpru", Misc2(14), 0x8e, code!("rdpru"), Untried),
        row("invlpgb", Misc3(0), 0xa0, &[0x0f, 0x01, 0xfe], Untried),
        row("invpcid", Misc3(2), 0xa2, code!("invpcid rax, [rbx]"), Runs),
        row(
            "mcommit",
            Misc3(3),
            0xa3,
            &[0xf3, 0x0f, 0x01, 0xfa],
            Untried,
        ),
        row("tlbsync", Misc3(4), 0xa4, &[0x0f, 0x01, 0xff], Untried),
        row("idle-hlt", Misc3(6), 0xa6, code!("hlt"), Untried),
        row("in", Misc1(27), 0x7b, code!("in al, 0x80"), Runs),
        row("rdmsr", Misc1(28), 0x7c, code!("rdmsr"), Runs),
    ]
}

/// A register that every processor has: SYSENTER_CS.
const ANY_MSR: u64 = 0x174;

fn prepare(lab: &mut Lab, row: &Row) {
    lab.registers.gpr[3] = DATA;
    lab.code(row.code);
    match row.name {
        "rdmsr" => lab.registers.gpr[1] = ANY_MSR,
        "xsetbv" => {
            // The state that every processor has.
            lab.registers.gpr[0] = 1;
            lab.vmcb.save.cr4 |= 1 << 18;
        }
        // Both are undefined unless the block or EFER lets the guest.
        "invlpgb" | "tlbsync" => lab.vmcb.control.nested_control |= 1 << 7,
        "mcommit" => lab.vmcb.save.efer |= 1 << 17,
        "popf" | "iret" => lab.registers.gpr[4] -= 64,
        "lidt" | "lgdt" => {
            // The table that is there anyhow.
            let save = &lab.vmcb.save;
            let table = if row.name == "lidt" {
                save.idtr
            } else {
                save.gdtr
            };
            lab.set(DATA, u64::from(table.limit) | table.base << 16);
        }
        _ => {}
    }
    if row.name == "popf" {
        lab.set(lab.registers.gpr[4], 2);
    }
}

/// Whether the processor has the instruction, or need not for the exit.
fn exists(name: &str) -> Verdict {
    let cpuid = raw_cpuid::CpuId::new();
    let features = cpuid.get_feature_info();
    let extended = cpuid.get_extended_processor_and_feature_identifiers();
    match name {
        "xsetbv" => needs(features.is_some_and(|it| it.has_xsave()), "no XSAVE"),
        "monitor" | "mwait" => needs(
            features.is_some_and(|it| it.has_monitor_mwait()),
            "no MONITOR",
        ),
        "skinit" => needs(extended.is_some_and(|it| it.has_skinit()), "no SKINIT"),
        "rdtscp" => needs(extended.is_some_and(|it| it.has_rdtscp()), "no RDTSCP"),
        "rdpru" => needs(sizes() & 1 << 4 != 0, "no RDPRU"),
        "invlpgb" | "tlbsync" => needs(sizes() & 1 << 3 != 0, "no INVLPGB"),
        "mcommit" => needs(sizes() & 1 << 8 != 0, "no MCOMMIT"),
        "invpcid" => {
            let features = cpuid.get_extended_feature_info();
            needs(features.is_some_and(|it| it.has_invpcid()), "no INVPCID")
        }
        "idle-hlt" => {
            const SVM_LEAF: u32 = 0x8000_000a;
            let has = __cpuid(SVM_LEAF).edx & 1 << 30 != 0;
            needs(has, "no intercept of idle HLT")
        }
        _ => Ok(()),
    }
}

/// CPUID's bits of some instructions, beside the sizes of addresses.
fn sizes() -> u32 {
    __cpuid(0x8000_0008).ebx
}

pub(crate) fn add(suite: &mut Suite) {
    for row in rows() {
        suite.case(
            alloc::format!("intercept/{}", row.name),
            "15.9",
            move |lab| {
                exists(row.name)?;
                if let Otherwise::Runs | Otherwise::Vector(_) = row.otherwise {
                    prepare(lab, &row);
                    lab.expect(match row.otherwise {
                        Otherwise::Vector(vector) => Stop::Vector(vector),
                        _ => Stop::End,
                    })?;
                    lab.reset();
                }
                prepare(lab, &row);
                row.bit.set(lab);
                set_all(&lab.ports);
                set_all(&lab.msrs);
                lab.expect_exit_at_start(row.exit)
            },
        );
    }
    suite.case("intercept/vmmcall", "15.18", |lab| {
        lab.code(code!("vmmcall", "nop"));
        lab.expect_exit_at_start(exit::VMMCALL)?;
        lab.reset();
        lab.code(code!("vmmcall"));
        lab.vmcb.control.intercept_misc2 &= !Misc2::VMMCALL.bits();
        lab.intercept_exception(6);
        lab.expect_exit_at_start(exit::EXCEPTIONS + 6)
    });
    suite.case("intercept/mwait-armed", "15.9", |lab| {
        exists("mwait")?;
        // What is pending wakes a guest that is not stopped.
        lab.offer_interrupt(5);
        lab.registers.gpr[0] = DATA;
        lab.code(code!("monitor", "xor eax, eax", "sti", "mwait"));
        Bit::Misc2(12).set(lab);
        lab.expect(Stop::Exit(0x8c))?;
        same("exit at", CODE + 6, lab.registers.rip)
    });
    suite.case("intercept/hlt-in-user-mode", "15.7", |lab| {
        lab.in_user_mode();
        lab.code(code!("hlt"));
        Bit::Misc1(24).set(lab);
        lab.expect(Stop::Vector(13))
    });
    suite.case("intercept/rdmsr-in-user-mode", "15.11", |lab| {
        lab.in_user_mode();
        lab.code(code!("rdmsr"));
        set_all(&lab.msrs);
        Bit::Misc1(28).set(lab);
        lab.expect(Stop::Vector(13))
    });
    suite.case("intercept/next-rip", "15.7.1", |lab| {
        let svm = raw_cpuid::CpuId::new().get_svm_info();
        needs(svm.is_some_and(|svm| svm.has_nrip()), "no next RIP")?;
        lab.code(code!("cpuid"));
        Bit::Misc1(18).set(lab);
        lab.expect(Stop::Exit(exit::CPUID))?;
        same("next RIP", CODE + 2, lab.vmcb.control.next_rip)
    });
    suite.case("intercept/shutdown", "15.14.3", |lab| {
        lab.code(code!("ud2"));
        lab.vmcb.save.idtr.limit = 0;
        lab.expect(Stop::Exit(exit::SHUTDOWN))
    });
    suite.case("intercept/task-switch", "15.14.1", task_switch);
    suite.case("intercept/ferr-freeze", "15.14.2", |lab| {
        lab.code(code!(
            "fninit",
            "mov word ptr [rbx], 0x37b", // zero divide unmasked
            "fldcw [rbx]",
            "fld1",
            "fldz",
            "fdivp st(1), st",
            "fwait",
        ));
        lab.registers.gpr[3] = DATA;
        lab.vmcb.save.cr0 &= !(1 << 5);
        Bit::Misc1(30).set(lab);
        lab.expect(Stop::Exit(exit::FERR_FREEZE))
    });
}

/// A far jump to a task, in 32-bit mode.
fn task_switch(lab: &mut Lab) -> Verdict {
    lab.in_32_bit_mode();
    // jmp 0x38:0, and a task there that goes on behind the jump.
    const JUMP: [u8; 7] = [0xea, 0, 0, 0, 0, 0x38, 0];
    lab.code(&JUMP);
    lab.set(0x1038, 0x0000_8902_0000_0067);
    let behind = CODE + JUMP.len() as u64;
    lab.set(DATA + 0x20, behind | 2 << 32);
    for selector in [0x48, 0x50, 0x54] {
        lab.set(DATA + selector, KERNEL_DATA.into());
    }
    lab.set(
        DATA + 0x4c,
        u64::from(KERNEL_CODE) | u64::from(KERNEL_DATA) << 32,
    );
    Bit::Misc1(29).set(lab);
    lab.expect_exit_at_start(exit::TASK_SWITCH)?;
    same("selector", 0x38, lab.vmcb.control.exit_info_1)
}

fn set_all(map: &vmm_shared::shm::SharedMem) {
    for at in (0..map.len()).step_by(8) {
        map.write(at, &u64::MAX).expect("within the map");
    }
}
