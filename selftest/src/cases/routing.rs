//! Physical interrupts, NMIs, SMIs and INITs that meet a guest: to whom they
//! go. INIT comes last, as many platforms reset the node.
#![expect(unsafe_code, reason = "assembled code of guests")]

use core::cell::Cell;

use hypervisor::arch::apic::{self, Signal};
use hypervisor::arch::cpu;
use hypervisor::arch::descriptors::KICK_VECTOR;
use hypervisor::arch::svm::vmcb::{Misc1, VIntr};

use crate::code::code;
use crate::host;
use crate::lab::{CODE, Lab, RFLAGS_IF, Stop, exit};
use crate::suite::{Suite, Verdict, equal, same};

const MASKING: u64 = VIntr::V_INTR_MASKING.bits();

/// An interrupt comes while the guest is about to run; how many the host has
/// taken before it opened up again, and after.
fn interrupted(lab: &mut Lab) -> (Stop, u64, u64) {
    let before = host::interrupts();
    let held = Cell::new(0);
    let stop = lab.run_with(apic::kick, || held.set(host::interrupts() - before));
    (stop, held.get(), host::interrupts() - before)
}

pub(crate) fn add(suite: &mut Suite) {
    suite.case("routing/interrupt-exits", "15.13.1", |lab| {
        lab.intercept(Misc1::INTR);
        lab.code(code!("nop"));
        let (stop, held, taken) = interrupted(lab);
        equal(Stop::Exit(exit::INTR), stop)?;
        same("exit at", CODE, lab.registers.rip)?;
        // It stays pending until the host lets it in.
        same("interrupts taken with GIF clear", 0, held)?;
        same("interrupts taken", 1, taken)
    });
    suite.case("routing/guest-if-masks", "15.21.1", |lab| {
        lab.intercept(Misc1::INTR);
        lab.vmcb.control.v_intr &= !MASKING;
        let (stop, _, taken) = interrupted(lab);
        equal(Stop::End, stop)?;
        same("interrupts taken", 1, taken)
    });
    suite.case("routing/guest-if-lets-in", "15.21.1", |lab| {
        lab.intercept(Misc1::INTR);
        lab.vmcb.control.v_intr &= !MASKING;
        lab.registers.rflags |= RFLAGS_IF;
        let (stop, ..) = interrupted(lab);
        equal(Stop::Exit(exit::INTR), stop)
    });
    suite.case("routing/host-if-masks", "15.21.1", |lab| {
        lab.intercept(Misc1::INTR);
        lab.registers.rflags |= RFLAGS_IF;
        cpu::interrupts_off();
        let (stop, ..) = interrupted(lab);
        cpu::interrupts_on();
        equal(Stop::End, stop)
    });
    suite.case("routing/interrupt-to-guest", "15.13.1", |lab| {
        lab.vmcb.control.v_intr &= !MASKING;
        lab.registers.rflags |= RFLAGS_IF;
        let (stop, _, taken) = interrupted(lab);
        apic::end_of_interrupt();
        equal(Stop::Vector(KICK_VECTOR), stop)?;
        same("interrupts taken by the host", 0, taken)
    });
    suite.case("routing/gif-holds-interrupts", "15.17", |lab| {
        let (stop, held, taken) = {
            lab.registers.rflags &= !RFLAGS_IF;
            lab.vmcb.control.v_intr &= !MASKING;
            interrupted(lab)
        };
        equal(Stop::End, stop)?;
        same("interrupts taken with GIF clear", 0, held)?;
        same("interrupts taken", 1, taken)
    });
    suite.case("routing/nmi-exits", "15.13.2", |lab| {
        lab.intercept(Misc1::NMI);
        let before = host::nmis();
        let held = Cell::new(0);
        let stop = lab.run_with(
            |id| apic::signal(id, Signal::Nmi),
            || held.set(host::nmis() - before),
        );
        equal(Stop::Exit(exit::NMI), stop)?;
        same("exit at", CODE, lab.registers.rip)?;
        same("NMIs taken with GIF clear", 0, held.get())?;
        same("NMIs taken", 1, host::nmis() - before)
    });
    suite.case("routing/nmi-to-guest", "15.13.2", |lab| {
        let before = host::nmis();
        let stop = lab.run_with(|id| apic::signal(id, Signal::Nmi), || {});
        equal(Stop::Vector(2), stop)?;
        // The guest's IRET lets the next one in.
        lab.go_on();
        lab.expect(Stop::End)?;
        same("NMIs taken by the host", 0, host::nmis() - before)
    });
    suite.case("routing/smi-exits", "15.13.3", |lab| {
        lab.intercept(Misc1::SMI);
        let stop = lab.run_with(|id| apic::signal(id, Signal::Smi), || {});
        equal(Stop::Exit(exit::SMI), stop)
    });
    suite.case("routing/init-exits", "15.13.4", init);
}

const MSR_VM_CR: u32 = 0xc001_0114;
const R_INIT: u64 = 1 << 1;

/// INIT, redirected to #SX so that the host outlives it.
fn init(lab: &mut Lab) -> Verdict {
    // SAFETY: the register exists where SVM does; the bit only turns INITs
    // into exceptions.
    unsafe { cpu::wrmsr(MSR_VM_CR, cpu::rdmsr(MSR_VM_CR) | R_INIT) };
    lab.intercept(Misc1::INIT);
    let exceptions = host::security_exceptions();
    let stop = lab.run_with(|id| apic::signal(id, Signal::Init), || {});
    equal(Stop::Exit(exit::INIT), stop)?;
    same("#SX taken", 1, host::security_exceptions() - exceptions)
}
