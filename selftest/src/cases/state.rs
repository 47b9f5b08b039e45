//! What entries load and exits store.
#![expect(unsafe_code, reason = "assembled code of guests")]

use hypervisor::arch::svm::switch;
use hypervisor::arch::svm::vmcb::{Misc1, Segment, Vmcb};
use zerocopy::FromZeros;

use crate::code::code;
use crate::host;
use crate::lab::{CODE, CR0, CR4, DATA, EFER, Lab, STACK, Stop, USER_CODE, exit};
use crate::suite::{Suite, Verdict, holds, same};

pub(crate) fn add(suite: &mut Suite) {
    suite.case("state/general-registers", "15.6", |lab| {
        for (index, register) in lab.registers.gpr.iter_mut().enumerate() {
            if index != 4 {
                *register = 0x1111_0000 + index as u64;
            }
        }
        lab.code(code!("inc rax", "inc r15", "sub rsp, 8", "stc"));
        lab.expect(Stop::End)?;
        let seen = &lab.registers;
        same("RAX", 0x1111_0001, seen.gpr[0])?;
        same("RSI", 0x1111_0006, seen.gpr[6])?;
        same("R15", 0x1111_0010, seen.gpr[15])?;
        same("RSP", STACK - 8, seen.gpr[4])?;
        same("carry flag", 1, seen.rflags & 1)
    });
    suite.case("state/control-registers", "15.6", |lab| {
        const TS: u64 = 1 << 3;
        lab.code(code!(
            "mov rax, cr0",
            "or rax, 8",
            "mov cr0, rax",
            "mov rax, cr4",
            "or rax, 4", // TSD
            "mov cr4, rax",
            "mov eax, 0x5678",
            "mov cr2, rax",
        ));
        lab.expect(Stop::End)?;
        let save = &lab.vmcb.save;
        same("CR0", CR0 | TS, save.cr0)?;
        same("CR2", 0x5678, save.cr2)?;
        same("CR3", lab.tables.root(), save.cr3)?;
        same("CR4", CR4 | 4, save.cr4)?;
        same("EFER", EFER, save.efer)
    });
    suite.case("state/segments", "15.6", |lab| {
        lab.code(code!(
            "mov ax, 0x23",
            "mov ds, ax",
            "xor eax, eax",
            "mov es, ax"
        ));
        lab.expect(Stop::End)?;
        let save = &lab.vmcb.save;
        same("DS selector", 0x23, save.ds.selector)?;
        same("DS attributes", 0xcf3, save.ds.attributes)?;
        same("ES selector", 0, save.es.selector)?;
        same("CS selector", 8, save.cs.selector)?;
        same("IDTR limit", 0xfff, save.idtr.limit)
    });
    suite.case("state/host-comes-back", "15.6", |lab| {
        let before = host::state();
        lab.code(code!(
            "mov rax, cr4",
            "or rax, 4",
            "mov cr4, rax",
            "std",
            "cli"
        ));
        lab.expect(Stop::End)?;
        let after = host::state();
        same("CR0", before.cr0, after.cr0)?;
        same("CR3", before.cr3, after.cr3)?;
        same("CR4", before.cr4, after.cr4)?;
        same("EFER", before.efer, after.efer)?;
        same("RFLAGS", before.rflags, after.rflags)?;
        same("CS", before.code, after.code)?;
        same("SS", before.stack, after.stack)
    });
    suite.case("state/user-mode", "15.5.1", |lab| {
        lab.in_user_mode();
        lab.intercept_exception(6);
        lab.code(code!("mov eax, cs", "ud2"));
        lab.expect(Stop::Exit(exit::EXCEPTIONS + 6))?;
        same("CS", u64::from(USER_CODE), lab.registers.gpr[0])?;
        same("CPL", 3, lab.vmcb.save.cpl)
    });
    suite.case("state/cpl-is-the-block's", "15.5.1", |lab| {
        // The stack segment says 0: the privilege level counts.
        lab.vmcb.save.cpl = 3;
        lab.intercept_exception(13);
        lab.code(code!("clts"));
        lab.expect_exit_at_start(exit::EXCEPTIONS + 13)
    });
    suite.case("state/real-mode", "15.5.1", |lab| {
        lab.in_real_mode();
        lab.intercept(Misc1::HLT);
        lab.vmcb.save.cs.base = 0x1_0000;
        lab.put(
            0x1_0000 + CODE,
            code!(".code16", "mov ax, cs", "mov bx, 0x1234", "hlt", ".code64"),
        );
        lab.expect(Stop::Exit(exit::HLT))?;
        same("RIP", CODE + 5, lab.registers.rip)?;
        same("RBX", 0x1234, lab.registers.gpr[3])
    });
    suite.case("state/legacy-mode", "15.5.1", |lab| {
        lab.in_32_bit_mode();
        lab.code(code!(".code32", "mov eax, 7", "inc eax", ".code64"));
        lab.expect(Stop::End)?;
        same("RAX", 8, lab.registers.gpr[0])
    });
    suite.case("state/vmload-vmsave", "15.5.2", vmload_vmsave);
    suite.case("state/exit-code-has-64-bits", "15.6", |lab| {
        lab.vmcb.control.asid = 0;
        lab.run();
        same("exit", exit::INVALID, lab.vmcb.control.exit_code)
    });
    suite.case("state/vmload-of-an-odd-address", "15.5.2", |lab| {
        lab.registers.gpr[0] = DATA + 1;
        lab.code(code!("vmload rax"));
        lab.expect(Stop::Vector(13))
    });
    suite.case("state/clgi-in-user-mode", "15.4", |lab| {
        lab.in_user_mode();
        lab.code(code!("clgi"));
        lab.expect(Stop::Vector(13))
    });
    suite.case("state/event-injection-is-cleared", "15.6", |lab| {
        lab.vmcb.control.event_injection = 1 << 31 | 0x30;
        lab.expect(Stop::Vector(0x30))?;
        same(
            "valid bit of EVENTINJ",
            0,
            lab.vmcb.control.event_injection & 1 << 31,
        )
    });
    suite.case("state/guest-pat", "15.25.4", |lab| {
        const OTHER: u64 = 0x0606_0606_0606_0606;
        lab.vmcb.save.g_pat = OTHER;
        lab.registers.gpr[1] = 0x277;
        lab.code(code!("rdmsr"));
        lab.expect(Stop::End)?;
        same(
            "PAT",
            OTHER,
            lab.registers.gpr[2] << 32 | lab.registers.gpr[0],
        )
    });
    suite.case("state/xcr0-is-shared", "15.5.1", |lab| {
        let has = raw_cpuid::CpuId::new().get_feature_info();
        crate::suite::needs(has.is_some_and(|it| it.has_xsave()), "no XSAVE")?;
        lab.vmcb.save.cr4 |= 1 << 18;
        lab.code(code!("xor ecx, ecx", "xgetbv"));
        lab.expect(Stop::End)?;
        same(
            "XCR0",
            hypervisor::arch::cpu::xgetbv0(),
            lab.registers.gpr[0],
        )
    });
}

/// What VMLOAD loads is what VMSAVE stores.
fn vmload_vmsave(_: &mut Lab) -> Verdict {
    let segment = |selector, base| Segment {
        selector,
        attributes: 0xc93,
        limit: u32::MAX,
        base,
    };
    let mut from = Vmcb::new_box_zeroed().expect("memory");
    let save = &mut from.save;
    save.fs = segment(0x23, 0x7fff_1234_5000);
    save.gs = segment(0x2b, 0xffff_8000_0000_1000);
    save.tr = Segment {
        attributes: 0x8b,
        limit: 0x67,
        ..segment(0x28, 0x1800)
    };
    save.ldtr = Segment {
        attributes: 0x82,
        limit: 0xff,
        ..segment(0x30, 0x1900)
    };
    save.kernel_gs_base = 0xffff_8000_0000_2000;
    (save.star, save.lstar, save.cstar, save.sfmask) = (0x23_0008_0000_0000, 0x1000, 0x2000, 0x700);
    (save.sysenter_cs, save.sysenter_esp, save.sysenter_eip) = (8, 0x3000, 0x4000);
    let mut to = Vmcb::new_box_zeroed().expect("memory");
    switch::load(&from);
    switch::save(&mut to);
    for (name, from, to) in [
        ("FS", from.save.fs, to.save.fs),
        ("GS", from.save.gs, to.save.gs),
        ("TR", from.save.tr, to.save.tr),
        ("LDTR", from.save.ldtr, to.save.ldtr),
    ] {
        holds(from == to, || {
            (
                alloc::format!("{name} {from:x?}"),
                alloc::format!("{to:x?}"),
            )
        })?;
    }
    let (from, to) = (&from.save, &to.save);
    same("KernelGsBase", from.kernel_gs_base, to.kernel_gs_base)?;
    same("STAR", from.star, to.star)?;
    same("LSTAR", from.lstar, to.lstar)?;
    same("CSTAR", from.cstar, to.cstar)?;
    same("SFMASK", from.sfmask, to.sfmask)?;
    same("SYSENTER_CS", from.sysenter_cs, to.sysenter_cs)?;
    same("SYSENTER_ESP", from.sysenter_esp, to.sysenter_esp)?;
    same("SYSENTER_EIP", from.sysenter_eip, to.sysenter_eip)
}
