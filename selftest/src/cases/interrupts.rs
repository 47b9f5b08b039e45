//! Virtual interrupts, their masks and windows, and the shadow.
#![expect(unsafe_code, reason = "assembled code of guests")]

use alloc::format;

use hypervisor::arch::svm::vmcb::{Misc1, Misc2, SHADOW, VIntr};

use crate::code::code;
use crate::lab::{CODE, Lab, RFLAGS_IF, Stop, VECTOR, exit};
use crate::suite::{Suite, Verdict, needs, same};

const VINTR: u32 = 1 << 4;
const V_GIF: u64 = 1 << 9;
const V_GIF_ENABLE: u64 = 1 << 25;

fn pending(lab: &Lab) -> u64 {
    lab.vmcb.control.v_intr & VIntr::V_IRQ.bits()
}

pub(crate) fn add(suite: &mut Suite) {
    suite.case("virtual-interrupt/delivered", "15.21.4", |lab| {
        lab.offer_interrupt(5);
        lab.registers.rflags |= RFLAGS_IF;
        lab.expect(Stop::Vector(VECTOR))?;
        same("V_IRQ", 0, pending(lab))?;
        same("return address", CODE, lab.top_of_stack())
    });
    suite.case("virtual-interrupt/waits-for-if", "15.21.4", |lab| {
        lab.offer_interrupt(5);
        lab.code(code!("nop"));
        lab.expect(Stop::End)?;
        same("V_IRQ", VIntr::V_IRQ.bits(), pending(lab))
    });
    suite.case("virtual-interrupt/sti-opens", "15.21.5", |lab| {
        lab.offer_interrupt(5);
        lab.code(code!("sti", "nop", "nop"));
        lab.expect(Stop::Vector(VECTOR))?;
        // One instruction behind STI comes first.
        same("return address", CODE + 2, lab.top_of_stack())
    });
    suite.case("virtual-interrupt/mov-ss-holds-back", "15.21.5", |lab| {
        lab.offer_interrupt(5);
        lab.code(code!("mov eax, ss", "push 0x202", "popfq", "nop"));
        lab.expect(Stop::Vector(VECTOR))?;
        same("return address", CODE + 8, lab.top_of_stack())
    });
    for (name, priority) in [("equal-to-tpr", 5), ("below-tpr", 6)] {
        let name = format!("virtual-interrupt/priority-{name}");
        suite.case(name, "15.21.2", move |lab| {
            lab.offer_interrupt(5);
            lab.vmcb.control.v_intr |= priority;
            lab.registers.rflags |= RFLAGS_IF;
            lab.expect(Stop::End)?;
            same("V_IRQ", VIntr::V_IRQ.bits(), pending(lab))
        });
    }
    suite.case("virtual-interrupt/priority-above-tpr", "15.21.2", |lab| {
        lab.offer_interrupt(5);
        lab.vmcb.control.v_intr |= 4;
        lab.registers.rflags |= RFLAGS_IF;
        lab.expect(Stop::Vector(VECTOR))
    });
    suite.case("virtual-interrupt/ignores-tpr-if-told", "15.21.4", |lab| {
        lab.offer_interrupt(5);
        lab.vmcb.control.v_intr |= 15 | VIntr::V_IGN_TPR.bits();
        lab.registers.rflags |= RFLAGS_IF;
        lab.expect(Stop::Vector(VECTOR))
    });
    suite.case("virtual-interrupt/lower-tpr-opens", "15.21.2", |lab| {
        lab.offer_interrupt(5);
        lab.vmcb.control.v_intr |= 9;
        lab.registers.rflags |= RFLAGS_IF;
        lab.code(code!("nop", "xor eax, eax", "mov cr8, rax", "nop"));
        lab.expect(Stop::Vector(VECTOR))?;
        same("return address", CODE + 7, lab.top_of_stack())
    });
    suite.case("virtual-interrupt/cr8-is-v-tpr", "15.21.2", |lab| {
        lab.vmcb.control.v_intr |= 3;
        lab.code(code!("mov rbx, cr8", "mov eax, 7", "mov cr8, rax"));
        lab.expect(Stop::End)?;
        same("CR8 read", 3, lab.registers.gpr[3])?;
        same("V_TPR", 7, lab.vmcb.control.v_intr & 0xff)
    });
    suite.case("virtual-interrupt/window", "15.21.6", |lab| {
        lab.offer_interrupt(5);
        lab.vmcb.control.intercept_misc1 |= VINTR;
        lab.code(code!("sti", "nop", "nop"));
        lab.expect(Stop::Exit(exit::VINTR))?;
        same("exit at", CODE + 2, lab.registers.rip)?;
        same("V_IRQ", VIntr::V_IRQ.bits(), pending(lab))
    });
    suite.case("virtual-interrupt/wakes-from-hlt", "15.21.4", |lab| {
        lab.offer_interrupt(5);
        lab.code(code!("sti", "hlt", "nop"));
        lab.expect(Stop::Vector(VECTOR))?;
        same("return address", CODE + 2, lab.top_of_stack())
    });
    shadow(suite);
    global_flag(suite);
}

/// Runs until HLT exits, with this shadow.
fn stored_at_halt(lab: &mut Lab, shadow: u64) -> Verdict {
    lab.intercept(Misc1::HLT);
    lab.expect(Stop::Exit(exit::HLT))?;
    let stored = lab.vmcb.control.interrupt_shadow & SHADOW;
    same("interrupt shadow", shadow, stored)
}

fn shadow(suite: &mut Suite) {
    suite.case("shadow/stored-behind-sti", "15.21.5", |lab| {
        lab.code(code!("sti", "hlt"));
        stored_at_halt(lab, SHADOW)
    });
    suite.case("shadow/stored-behind-mov-ss", "15.21.5", |lab| {
        lab.code(code!("mov eax, ss", "mov ss, eax", "hlt"));
        stored_at_halt(lab, SHADOW)
    });
    suite.case("shadow/clear-later", "15.21.5", |lab| {
        lab.code(code!("sti", "nop", "hlt"));
        stored_at_halt(lab, 0)
    });
    suite.case("shadow/loaded-at-entry", "15.21.5", |lab| {
        lab.offer_interrupt(5);
        lab.registers.rflags |= RFLAGS_IF;
        lab.vmcb.control.interrupt_shadow = SHADOW;
        lab.code(code!("nop", "nop"));
        lab.expect(Stop::Vector(VECTOR))?;
        same("return address", CODE + 1, lab.top_of_stack())
    });
    suite.case("shadow/none-of-the-host's", "15.21.5", |lab| {
        // The lab enters without STI right before VMRUN.
        lab.offer_interrupt(5);
        lab.registers.rflags |= RFLAGS_IF;
        lab.code(code!("nop"));
        lab.expect(Stop::Vector(VECTOR))?;
        same("return address", CODE, lab.top_of_stack())
    });
}

fn global_flag(suite: &mut Suite) {
    suite.case("gif/virtual-clgi", "15.33.2", |lab| {
        virtual_gif()?;
        lab.vmcb.control.v_intr |= V_GIF | V_GIF_ENABLE;
        lab.code(code!("clgi"));
        lab.expect(Stop::End)?;
        same("V_GIF", 0, lab.vmcb.control.v_intr & V_GIF)
    });
    suite.case("gif/virtual-stgi", "15.33.2", |lab| {
        virtual_gif()?;
        lab.vmcb.control.v_intr |= V_GIF_ENABLE;
        lab.code(code!("stgi"));
        lab.expect(Stop::End)?;
        same("V_GIF", V_GIF, lab.vmcb.control.v_intr & V_GIF)
    });
    suite.case("gif/virtual-holds-virtual-interrupts", "15.33.2", |lab| {
        virtual_gif()?;
        lab.vmcb.control.v_intr |= V_GIF_ENABLE;
        lab.offer_interrupt(5);
        lab.registers.rflags |= RFLAGS_IF;
        lab.code(code!("nop", "stgi", "nop"));
        lab.expect(Stop::Vector(VECTOR))?;
        same("return address", CODE + 4, lab.top_of_stack())
    });
    suite.case("gif/intercept-beats-virtual", "15.33.2", |lab| {
        virtual_gif()?;
        lab.vmcb.control.v_intr |= V_GIF | V_GIF_ENABLE;
        lab.vmcb.control.intercept_misc2 |= Misc2::CLGI.bits();
        lab.code(code!("clgi"));
        lab.expect_exit_at_start(0x85)
    });
}

fn virtual_gif() -> crate::suite::Verdict {
    let svm = raw_cpuid::CpuId::new().get_svm_info();
    needs(svm.is_some_and(|svm| svm.has_gif()), "no virtual GIF")
}
