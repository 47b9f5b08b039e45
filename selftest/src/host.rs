//! This core while no guest runs: what interrupts it, and what it can do.
#![expect(unsafe_code, reason = "interrupt stubs and privileged instructions")]

use alloc::boxed::Box;
use core::arch::{asm, naked_asm};
use core::sync::atomic::{AtomicU64, Ordering};

use hypervisor::arch::descriptors::{self, KICK_VECTOR};
use x86_64::VirtAddr;

static INTERRUPTS: AtomicU64 = AtomicU64::new(0);
static SECURITY_EXCEPTIONS: AtomicU64 = AtomicU64::new(0);
static NMIS: AtomicU64 = AtomicU64::new(0);

/// Interrupts that the core has sent to itself and taken here.
pub(crate) fn interrupts() -> u64 {
    INTERRUPTS.load(Ordering::Relaxed)
}

/// Non-maskable interrupts taken here.
pub(crate) fn nmis() -> u64 {
    NMIS.load(Ordering::Relaxed)
}

/// #SX taken here: INITs that have been redirected.
pub(crate) fn security_exceptions() -> u64 {
    SECURITY_EXCEPTIONS.load(Ordering::Relaxed)
}

#[unsafe(naked)]
extern "C" fn count_interrupt() {
    naked_asm!(
        "lock inc qword ptr [{count}]",
        "push rax",
        "mov eax, 0xfee000b0", // end of interrupt
        "mov dword ptr [rax], 0",
        "pop rax",
        "iretq",
        count = sym INTERRUPTS,
    )
}

#[unsafe(naked)]
extern "C" fn count_nmi() {
    naked_asm!("lock inc qword ptr [{count}]", "iretq", count = sym NMIS)
}

#[unsafe(naked)]
extern "C" fn count_security_exception() {
    naked_asm!(
        "lock inc qword ptr [{count}]",
        "add rsp, 8", // error code
        "iretq",
        count = sym SECURITY_EXCEPTIONS,
    )
}

/// Gives this core gates that count what it sends to itself.
pub(crate) fn load_gates() {
    let gates = Box::leak(Box::new(descriptors::interrupt_gates()));
    let address = |stub: extern "C" fn()| VirtAddr::new(stub as *const () as u64);
    // SAFETY: the stubs keep every register, and end with IRET.
    unsafe {
        gates[KICK_VECTOR].set_handler_addr(address(count_interrupt));
        gates
            .security_exception
            .set_handler_addr(address(count_security_exception));
        gates
            .non_maskable_interrupt
            .set_handler_addr(address(count_nmi));
    }
    gates.load();
}

/// Disarms breakpoints that a guest may have left. Emulators that don't switch
/// DR7 take breakpoints out only if it changes.
pub(crate) fn disarm() {
    // SAFETY: neither value arms a breakpoint of ours.
    unsafe { asm!("mov dr7, {}", in(reg) 0x400_u64, options(nomem, nostack)) };
}

/// Sets the address of breakpoint 0, which exits and entries don't switch.
pub(crate) fn set_breakpoint_address(address: u64) {
    // SAFETY: DR7 arms no breakpoint here.
    unsafe { asm!("mov dr0, {}", in(reg) address, options(nomem, nostack)) };
}

/// DR7.
pub(crate) fn dr7() -> u64 {
    let value;
    // SAFETY: reading changes nothing.
    unsafe { asm!("mov {}, dr7", out(reg) value, options(nomem, nostack)) };
    value
}

/// Drops the translation of a guest's address.
pub(crate) fn invlpga(address: u64, asid: u32) {
    // SAFETY: SVM is on, and dropping a translation harms nothing.
    unsafe { asm!("invlpga rax, ecx", in("rax") address, in("ecx") asid, options(nostack)) };
}

/// What an exit must bring back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostState {
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub rflags: u64,
    pub code: u16,
    pub stack: u16,
}

/// The core's state now.
pub(crate) fn state() -> HostState {
    use x86_64::instructions::segmentation::{CS, SS, Segment};
    use x86_64::registers::control::{Cr0, Cr3, Cr4, Efer};
    use x86_64::registers::rflags;
    // Arithmetic flags are whatever came last.
    const KEPT: u64 = !0x8d5;
    HostState {
        cr0: Cr0::read_raw(),
        cr3: Cr3::read_raw().0.start_address().as_u64(),
        cr4: Cr4::read_raw(),
        efer: Efer::read_raw(),
        rflags: rflags::read_raw() & KEPT,
        code: CS::get_reg().0,
        stack: SS::get_reg().0,
    }
}
