//! Nested paging: rights, what faults tell, accessed and dirty bits, sizes.
#![expect(unsafe_code, reason = "assembled code of guests")]

use core::sync::atomic::Ordering;

use crate::code::code;
use crate::lab::{CODE, DATA, LARGE_PAGE, Lab, Stop, exit};
use crate::suite::{Suite, Verdict, holds, needs, same};
use crate::tables::Level;
use crate::tables::bits::{ACCESSED, DIRTY, LARGE, NO_EXECUTE, PRESENT, USER, WRITABLE};

const ERROR_PRESENT: u64 = 1 << 0;
const ERROR_WRITE: u64 = 1 << 1;
const ERROR_USER: u64 = 1 << 2;
const ERROR_RESERVED: u64 = 1 << 3;
const ERROR_FETCH: u64 = 1 << 4;
/// The fault is that of the guest's final address.
const FINAL: u64 = 1 << 32;
/// The fault is that of a table of the guest's.
const TABLE: u64 = 1 << 33;

fn reads(lab: &mut Lab, at: u64) {
    lab.registers.gpr[3] = at;
    lab.code(code!("mov rax, [rbx]"));
}

fn writes(lab: &mut Lab, at: u64) {
    lab.registers.gpr[3] = at;
    lab.code(code!("mov [rbx], rax"));
}

/// The guest must leave with a nested page fault like this.
fn faults(lab: &mut Lab, error: u64, gpa: u64) -> Verdict {
    lab.expect(Stop::Exit(exit::NPF))?;
    same("exit information 1", error, lab.vmcb.control.exit_info_1)?;
    same("exit information 2", gpa, lab.vmcb.control.exit_info_2)?;
    same("exit at", CODE, lab.registers.rip)
}

pub(crate) fn add(suite: &mut Suite) {
    suite.case("nested/missing-read", "15.25.6", |lab| {
        reads(lab, DATA + 0x123);
        lab.nested.change(Level::Small, DATA, 0, PRESENT);
        faults(lab, FINAL | ERROR_USER, DATA + 0x123)
    });
    suite.case("nested/missing-write", "15.25.6", |lab| {
        writes(lab, DATA + 8);
        lab.nested.change(Level::Small, DATA, 0, PRESENT);
        faults(lab, FINAL | ERROR_USER | ERROR_WRITE, DATA + 8)
    });
    suite.case("nested/missing-fetch", "15.25.6", |lab| {
        lab.nested.change(Level::Small, CODE, 0, PRESENT);
        faults(lab, FINAL | ERROR_USER | ERROR_FETCH, CODE)
    });
    suite.case("nested/read-only", "15.25.7", |lab| {
        writes(lab, DATA);
        lab.nested.change(Level::Small, DATA, 0, WRITABLE);
        faults(lab, FINAL | ERROR_USER | ERROR_WRITE | ERROR_PRESENT, DATA)?;
        lab.reset();
        reads(lab, DATA);
        lab.nested.change(Level::Small, DATA, 0, WRITABLE);
        lab.expect(Stop::End)
    });
    suite.case("nested/read-only-without-guest-wp", "15.25.5", |lab| {
        // The guest may write its own read-only page; the nested one stays.
        writes(lab, DATA);
        lab.tables.change(Level::Small, DATA, 0, WRITABLE);
        lab.nested.change(Level::Small, DATA, 0, WRITABLE);
        faults(lab, FINAL | ERROR_USER | ERROR_WRITE | ERROR_PRESENT, DATA)
    });
    suite.case("nested/no-execute", "15.25.7", |lab| {
        lab.nested.change(Level::Small, CODE, NO_EXECUTE, 0);
        faults(lab, FINAL | ERROR_USER | ERROR_FETCH | ERROR_PRESENT, CODE)
    });
    suite.case("nested/supervisor-page", "15.25.5", |lab| {
        // Every access of a guest is a user's to the nested tables.
        reads(lab, DATA);
        lab.nested.change(Level::Small, DATA, 0, USER);
        faults(lab, FINAL | ERROR_USER | ERROR_PRESENT, DATA)
    });
    suite.case("nested/rights-of-upper-levels", "15.25.7", |lab| {
        writes(lab, DATA);
        lab.nested.change(Level::Huge, DATA, 0, WRITABLE);
        lab.expect(Stop::Exit(exit::NPF))?;
        let error = lab.vmcb.control.exit_info_1 & 0x1f;
        same(
            "error code",
            ERROR_USER | ERROR_WRITE | ERROR_PRESENT,
            error,
        )
    });
    suite.case("nested/missing-guest-table", "15.25.6", |lab| {
        reads(lab, DATA);
        // Not the page of the top table, which the code's fetch needs too.
        let entry = lab.tables.entry_address(Level::Small, DATA);
        lab.nested.change(Level::Small, entry, 0, PRESENT);
        lab.expect(Stop::Exit(exit::NPF))?;
        let control = &lab.vmcb.control;
        // The first to use it is the fetch of the code.
        let entry = lab.tables.entry_address(Level::Small, CODE);
        same("exit information 2", entry, control.exit_info_2)?;
        same(
            "bits 33:32 of exit information 1",
            TABLE,
            control.exit_info_1 & (TABLE | FINAL),
        )?;
        same("user bit", ERROR_USER, control.exit_info_1 & ERROR_USER)
    });
    suite.case("nested/read-only-guest-table", "15.25.5", |lab| {
        // Accesses to the guest's tables are writes, for their own bits.
        let entry = lab.tables.entry_address(Level::Small, CODE);
        lab.nested.change(Level::Small, entry, 0, WRITABLE);
        lab.expect(Stop::Exit(exit::NPF))?;
        let error = ERROR_PRESENT | ERROR_WRITE | ERROR_USER;
        same(
            "exit information 1",
            TABLE | error,
            lab.vmcb.control.exit_info_1,
        )?;
        same("exit information 2", entry, lab.vmcb.control.exit_info_2)
    });
    suite.case("nested/guest-fault-comes-first", "15.25.6", |lab| {
        reads(lab, DATA);
        lab.tables.change(Level::Small, DATA, 0, PRESENT);
        lab.nested.change(Level::Small, DATA, 0, PRESENT);
        lab.expect(Stop::Vector(14))
    });
    suite.case("nested/guest-rights-stay-the-guest's", "15.25.7", |lab| {
        writes(lab, DATA);
        lab.tables.change(Level::Small, DATA, 0, WRITABLE);
        lab.vmcb.save.cr0 |= 1 << 16;
        lab.expect(Stop::Vector(14))?;
        same("error code", 3, lab.top_of_stack())
    });
    reserved(suite);
    used(suite);
    sizes(suite);
}

fn reserved(suite: &mut Suite) {
    suite.case("nested/reserved-address-bit", "15.25.6", |lab| {
        let widths = core::arch::x86_64::__cpuid(0x8000_0008).eax;
        let width = u64::from(widths & 0xff);
        needs(width < 52, "addresses have all 52 bits")?;
        reads(lab, DATA);
        lab.nested.change(Level::Small, DATA, 1 << 51, 0);
        faults(
            lab,
            FINAL | ERROR_USER | ERROR_PRESENT | ERROR_RESERVED,
            DATA,
        )
    });
    suite.case("nested/reserved-size-bit", "15.25.6", |lab| {
        reads(lab, DATA);
        lab.nested.change(Level::Top, DATA, LARGE, 0);
        lab.expect(Stop::Exit(exit::NPF))?;
        let error = lab.vmcb.control.exit_info_1 & 0x1f;
        same(
            "reserved bit of the error code",
            ERROR_RESERVED,
            error & ERROR_RESERVED,
        )
    });
    suite.case("nested/reserved-large-page-bit", "15.25.6", |lab| {
        reads(lab, LARGE_PAGE);
        lab.nested.change(Level::Large, LARGE_PAGE, 1 << 13, 0);
        faults(
            lab,
            FINAL | ERROR_USER | ERROR_PRESENT | ERROR_RESERVED,
            LARGE_PAGE,
        )
    });
}

/// Accessed and dirty bits.
fn used(suite: &mut Suite) {
    suite.case("nested/accessed", "15.25.5", |lab| {
        reads(lab, DATA);
        lab.expect(Stop::End)?;
        for level in [Level::Small, Level::Large, Level::Huge, Level::Top] {
            let bits = lab.nested.value(level, DATA) & ACCESSED;
            holds(bits == ACCESSED, || {
                (alloc::format!("accessed at level {level:?}"), "clear")
            })?;
        }
        same("dirty bit", 0, lab.nested.value(Level::Small, DATA) & DIRTY)?;
        let other = lab.nested.value(Level::Small, DATA + 0x1000);
        same("accessed bit of a page not used", 0, other & ACCESSED)
    });
    suite.case("nested/dirty", "15.25.5", |lab| {
        writes(lab, DATA);
        lab.expect(Stop::End)?;
        let bits = lab.nested.value(Level::Small, DATA);
        same("bits", ACCESSED | DIRTY, bits & (ACCESSED | DIRTY))
    });
    suite.case("nested/dirty-later", "15.25.5", |lab| {
        // A read first: the translation is there when the write comes.
        lab.registers.gpr[3] = DATA;
        lab.code(code!("mov rax, [rbx]", "mov [rbx], rax"));
        lab.expect(Stop::End)?;
        same(
            "dirty bit",
            DIRTY,
            lab.nested.value(Level::Small, DATA) & DIRTY,
        )
    });
    suite.case("nested/guest-accessed-and-dirty", "15.25.5", |lab| {
        writes(lab, DATA);
        lab.expect(Stop::End)?;
        let bits = lab.tables.value(Level::Small, DATA);
        same("bits", ACCESSED | DIRTY, bits & (ACCESSED | DIRTY))?;
        let table = lab.nested.value(Level::Small, lab.tables.root());
        same("dirty bit of the guest's table", DIRTY, table & DIRTY)
    });
    suite.case("nested/large-page-dirty", "15.25.5", |lab| {
        writes(lab, LARGE_PAGE + 0x1_2340);
        lab.expect(Stop::End)?;
        let bits = lab.nested.value(Level::Large, LARGE_PAGE);
        same("bits", ACCESSED | DIRTY, bits & (ACCESSED | DIRTY))
    });
}

fn sizes(suite: &mut Suite) {
    suite.case("nested/large-page", "15.25.9", |lab| {
        lab.set(LARGE_PAGE + 0x1f_fff8, 0x1234);
        reads(lab, LARGE_PAGE + 0x1f_fff8);
        lab.expect(Stop::End)?;
        same("RAX", 0x1234, lab.registers.gpr[0])
    });
    suite.case("nested/small-under-large", "15.25.9", |lab| {
        // A large page of the guest's over small nested ones, two swapped.
        const SECOND: u64 = DATA + 0x1000;
        lab.set(SECOND, 0x77);
        let frame = lab.nested.value(Level::Small, SECOND);
        lab.nested
            .entry(Level::Small, DATA)
            .store(frame, Ordering::Relaxed);
        lab.tables
            .entry(Level::Large, DATA)
            .store(PRESENT | WRITABLE | USER | LARGE, Ordering::Relaxed);
        reads(lab, DATA);
        lab.expect(Stop::End)?;
        same("RAX", 0x77, lab.registers.gpr[0])
    });
    suite.case("nested/huge-page", "15.25.9", |lab| {
        let features = raw_cpuid::CpuId::new().get_extended_processor_and_feature_identifiers();
        needs(
            features.is_some_and(|it| it.has_1gib_pages()),
            "no pages of 1 GiB",
        )?;
        // Guest addresses are then the node's, below 1 GiB.
        lab.set(DATA, 0x99);
        let at = lab.memory_at + DATA;
        needs(at < 1 << 30, "the lab's memory lies above 1 GiB")?;
        lab.nested
            .entry(Level::Huge, 1 << 30)
            .store(PRESENT | WRITABLE | USER | LARGE, Ordering::Relaxed);
        lab.tables.entry(Level::Huge, 1 << 30).store(
            1 << 30 | PRESENT | WRITABLE | USER | LARGE,
            Ordering::Relaxed,
        );
        reads(lab, (1 << 30) + at);
        lab.expect(Stop::End)?;
        same("RAX", 0x99, lab.registers.gpr[0])
    });
    suite.case("nested/off", "15.25.3", |lab| {
        // Without nested paging the guest's tables lead to the node's memory.
        lab.vmcb.control.nested_control = 0;
        lab.vmcb.save.cr3 = lab.nested.root();
        lab.code(code!("mov eax, 5"));
        lab.expect(Stop::End)?;
        same("RAX", 5, lab.registers.gpr[0])
    });
}
