//! Instructions that Rust has no words for.
#![expect(unsafe_code, reason = "privileged instructions")]

use core::arch::asm;
use core::arch::x86_64::_rdtsc;

use vmm_shared::pv::Hypercall;
use x86_64::instructions::tlb;
use x86_64::registers::control::Cr2;
use x86_64::registers::model_specific::{FsBase, KernelGsBase, Msr};
use x86_64::{PhysAddr, VirtAddr};

/// Ticks since the VM was made.
pub(super) fn ticks() -> u64 {
    // SAFETY: reading the counter has no effect.
    unsafe { _rdtsc() }
}

/// Writes a register of the processor.
pub(super) fn write_msr(register: u32, value: u64) {
    let mut msr = Msr::new(register);
    // SAFETY: only called for registers that exist in this VM and that change
    // nothing the compiler relies on: APIC, timer, paravirtual ones.
    unsafe { msr.write(value) };
}

/// Asks something of the hypervisor.
pub(super) fn hypercall(call: Hypercall) {
    // SAFETY: the call changes nothing of this VM's but RAX.
    unsafe {
        asm!("vmmcall", inout("rax") call as u64 => _, options(nostack));
    }
}

/// The same for a call that takes a number; the answer, and a second one.
pub(super) fn hypercall_with(call: Hypercall, number: u64) -> (u64, u64) {
    let (answer, second);
    // SAFETY: the call changes nothing of this VM's but RAX and RCX.
    unsafe {
        asm!("vmmcall", inout("rax") call as u64 => answer, inout("rcx") number => second,
            options(nostack));
    }
    (answer, second)
}

/// Does nothing any more.
pub(super) fn stop() -> ! {
    loop {
        x86_64::instructions::interrupts::disable();
        x86_64::instructions::hlt();
    }
}

/// Waits for an interrupt, lets it in, and returns.
pub(super) fn sleep() {
    x86_64::instructions::interrupts::enable_and_hlt();
    x86_64::instructions::interrupts::disable();
}

/// Switches to other page tables, and forgets all translations.
pub(super) fn load_tables(root: u64) {
    // SAFETY: all roots have the kernel in their upper half.
    unsafe {
        asm!("mov cr3, {}", in(reg) PhysAddr::new(root).as_u64(), options(nostack, preserves_flags));
    }
}

/// Forgets the translation of one page.
pub(super) fn forget_page(address: u64) {
    tlb::flush(VirtAddr::new_truncate(address));
}

/// The address of the last page fault.
pub(super) fn fault_address() -> u64 {
    Cr2::read_raw()
}

pub(super) fn set_fs_base(base: u64) {
    FsBase::write(VirtAddr::new_truncate(base));
}

/// The base that programs see: the two are swapped on the way out.
pub(super) fn set_user_gs_base(base: u64) {
    KernelGsBase::write(VirtAddr::new_truncate(base));
}

/// A random number, if the processor has one to give.
pub(super) fn random() -> Option<u64> {
    let has = raw_cpuid::CpuId::new()
        .get_feature_info()
        .is_some_and(|features| features.has_rdrand());
    if !has {
        return None;
    }
    (0..10).find_map(|_| {
        let (value, ok): (u64, u8);
        // SAFETY: the processor has the instruction.
        unsafe {
            asm!("rdrand {}", "setc {}", out(reg) value, out(reg_byte) ok, options(nostack, nomem));
        }
        (ok != 0).then_some(value)
    })
}
