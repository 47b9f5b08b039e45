//! Events that an entry injects, and deliveries that exits interrupt.
#![expect(unsafe_code, reason = "assembled code of guests")]

use hypervisor::arch::svm::vmcb::Misc1;

use crate::code::code;
use crate::lab::{CODE, HANDLERS, Lab, RFLAGS_IF, RFLAGS_TF, STACK, Stop, exit};
use crate::suite::{Suite, Verdict, same};
use crate::tables::Level;
use crate::tables::bits::PRESENT;

const VALID: u64 = 1 << 31;
const WITH_ERROR: u64 = 1 << 11;
const INTERRUPT: u64 = 0;
const NMI: u64 = 2 << 8;
const EXCEPTION: u64 = 3 << 8;
const SOFTWARE: u64 = 4 << 8;

fn inject(lab: &mut Lab, event: u64) {
    lab.vmcb.control.event_injection = VALID | event;
}

/// RIP in the frame that a delivery without an error code left.
fn returns_to(lab: &Lab, rip: u64) -> Verdict {
    same("return address", rip, lab.top_of_stack())?;
    same("RSP", STACK - 40, lab.registers.gpr[4])
}

pub(crate) fn add(suite: &mut Suite) {
    suite.case("event/interrupt", "15.20", |lab| {
        inject(lab, INTERRUPT | 0x31);
        lab.registers.rflags |= RFLAGS_IF;
        lab.expect(Stop::Vector(0x31))?;
        returns_to(lab, CODE)
    });
    suite.case("event/interrupt-ignores-if", "15.20", |lab| {
        inject(lab, INTERRUPT | 0x31);
        lab.expect(Stop::Vector(0x31))
    });
    suite.case("event/nmi", "15.20", |lab| {
        inject(lab, NMI | 2);
        lab.expect(Stop::Vector(2))?;
        returns_to(lab, CODE)
    });
    suite.case("event/nmi-ignores-vector", "15.20", |lab| {
        inject(lab, NMI | 0x77);
        lab.expect(Stop::Vector(2))
    });
    suite.case("event/exception", "15.20", |lab| {
        inject(lab, EXCEPTION | 6);
        lab.expect(Stop::Vector(6))?;
        returns_to(lab, CODE)
    });
    suite.case("event/exception-with-error", "15.20", |lab| {
        inject(lab, EXCEPTION | WITH_ERROR | 13 | 0x1238 << 32);
        lab.expect(Stop::Vector(13))?;
        same("error code", 0x1238, lab.top_of_stack())?;
        same("RSP", STACK - 48, lab.registers.gpr[4])
    });
    suite.case("event/error-bit-decides", "15.20", |lab| {
        inject(lab, EXCEPTION | 13);
        lab.expect(Stop::Vector(13))?;
        returns_to(lab, CODE)
    });
    suite.case("event/page-fault-leaves-cr2", "15.20", |lab| {
        inject(lab, EXCEPTION | WITH_ERROR | 14 | 2 << 32);
        lab.vmcb.save.cr2 = 0x4567;
        lab.expect(Stop::Vector(14))?;
        same("CR2", 0x4567, lab.vmcb.save.cr2)
    });
    suite.case("event/exception-is-not-intercepted", "15.20", |lab| {
        inject(lab, EXCEPTION | 6);
        lab.intercept_exception(6);
        lab.expect(Stop::Vector(6))
    });
    suite.case("event/software", "15.20", |lab| {
        inject(lab, SOFTWARE | 0x80);
        lab.expect(Stop::Vector(0x80))?;
        returns_to(lab, CODE)
    });
    suite.case("event/software-is-not-intercepted", "15.20", |lab| {
        inject(lab, SOFTWARE | 0x80);
        lab.vmcb.control.intercept_misc1 |= 1 << 21;
        lab.expect(Stop::Vector(0x80))
    });
    suite.case("event/to-user-mode", "15.20", |lab| {
        const PRIVILEGED_STACK: u64 = 0x11000;
        lab.in_user_mode();
        inject(lab, INTERRUPT | 0x31);
        lab.expect(Stop::Vector(0x31))?;
        same("RSP", PRIVILEGED_STACK - 40, lab.registers.gpr[4])?;
        same("CPL", 0, lab.vmcb.save.cpl)
    });
    suite.case("event/returns", "15.20", |lab| {
        inject(lab, INTERRUPT | 0x31);
        lab.code(code!("inc rax"));
        lab.expect(Stop::Vector(0x31))?;
        lab.go_on();
        lab.expect(Stop::End)?;
        same("RAX", 1, lab.registers.gpr[0])
    });
    suite.case("event/interrupt-clears-trap-flag", "15.20", |lab| {
        // Delivery clears TF, so the handler is not stepped through.
        lab.registers.rflags |= RFLAGS_TF | RFLAGS_IF;
        inject(lab, INTERRUPT | 0x31);
        lab.expect(Stop::Vector(0x31))?;
        same("trap flag", 0, lab.registers.rflags & RFLAGS_TF)
    });
    interrupted(suite);
}

const HANDLER_PAGE: u64 = HANDLERS;

fn interrupted(suite: &mut Suite) {
    for (name, event) in [
        ("interrupt", VALID | 0x31),
        ("nmi", VALID | NMI | 2),
        (
            "exception",
            VALID | EXCEPTION | WITH_ERROR | 13 | 0x77 << 32,
        ),
    ] {
        suite.case(
            alloc::format!("event/interrupted-{name}"),
            "15.7.2",
            move |lab| {
                // The stack is missing from the nested tables.
                lab.nested.change(Level::Small, STACK - 8, 0, PRESENT);
                lab.vmcb.control.event_injection = event;
                lab.expect(Stop::Exit(exit::NPF))?;
                same("EXITINTINFO", event, lab.vmcb.control.exit_int_info)?;
                same("RIP", CODE, lab.registers.rip)
            },
        );
    }
    suite.case("event/interrupted-software", "15.7.2", |lab| {
        lab.nested.change(Level::Small, STACK - 8, 0, PRESENT);
        lab.code(code!("int 0x80"));
        lab.expect(Stop::Exit(exit::NPF))?;
        let event = VALID | SOFTWARE | 0x80;
        same("EXITINTINFO", event, lab.vmcb.control.exit_int_info)
    });
    suite.case("event/uninterrupted", "15.7.2", |lab| {
        // Delivered whole: the exit is the handler's.
        inject(lab, INTERRUPT | 0x31);
        lab.nested.change(Level::Small, HANDLER_PAGE, 0, PRESENT);
        lab.expect(Stop::Exit(exit::NPF))?;
        same(
            "valid bit of EXITINTINFO",
            0,
            lab.vmcb.control.exit_int_info & VALID,
        )?;
        same("RIP", HANDLERS + 0x310, lab.registers.rip)
    });
    suite.case("event/no-event", "15.7.2", |lab| {
        lab.code(code!("hlt"));
        lab.intercept(Misc1::HLT);
        lab.expect(Stop::Exit(exit::HLT))?;
        same(
            "valid bit of EXITINTINFO",
            0,
            lab.vmcb.control.exit_int_info & VALID,
        )
    });
}
