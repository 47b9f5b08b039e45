//! Entering the guest and coming back.
//!
//! The hypervisor uses neither FS, GS nor the task register, and its
//! interrupt gates never switch stacks. So a vCPU's own FS, GS, TR, LDTR and
//! system-call registers stay loaded while its exits are handled; VMLOAD and
//! VMSAVE run only when a vCPU comes to a core or leaves it.
#![expect(unsafe_code, reason = "the world switch")]

use core::arch::{asm, naked_asm};
use core::mem::offset_of;

use vmm_shared::addr::Hpa;

use super::vmcb::Vmcb;
use crate::arch::cpu;
use crate::arch::paging::zeroed_page;
use crate::vcpu::registers::Registers;

const MSR_EFER: u32 = 0xc000_0080;
const EFER_SVME: u64 = 1 << 12;
const MSR_VM_CR: u32 = 0xc001_0114;
const VM_CR_SVM_DISABLED: u64 = 1 << 4;
const MSR_VM_HSAVE_PA: u32 = 0xc001_0117;

/// Why SVM can't be used on this core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SvmError {
    /// The processor has no SVM.
    #[error("the processor has no SVM")]
    Missing,
    /// Firmware has locked it.
    #[error("firmware has locked the processor's SVM; switch it on in its set-up")]
    Disabled,
    /// SVM without nested paging.
    #[error("the processor's SVM has no nested paging")]
    NoNestedPaging,
}

/// Switches SVM on for this core.
///
/// # Errors
/// Says what the processor lacks.
pub fn enable() -> Result<(), SvmError> {
    let cpuid = raw_cpuid::CpuId::new();
    let has_svm = cpuid
        .get_extended_processor_and_feature_identifiers()
        .is_some_and(|id| id.has_svm());
    if !has_svm {
        return Err(SvmError::Missing);
    }
    if !cpuid
        .get_svm_info()
        .is_some_and(|svm| svm.has_nested_paging())
    {
        return Err(SvmError::NoNestedPaging);
    }
    // SAFETY: the three registers exist where SVM does; the save page is
    // fresh and given to this core for ever.
    unsafe {
        if cpu::rdmsr(MSR_VM_CR) & VM_CR_SVM_DISABLED != 0 {
            return Err(SvmError::Disabled);
        }
        cpu::wrmsr(MSR_EFER, cpu::rdmsr(MSR_EFER) | EFER_SVME);
        cpu::wrmsr(MSR_VM_HSAVE_PA, zeroed_page().0);
    }
    Ok(())
}

/// Holds every interrupt back, NMIs too.
pub fn hold_interrupts() {
    // SAFETY: SVM is on wherever a vCPU runs.
    unsafe { asm!("clgi", options(nostack)) };
}

/// Lets held-back interrupts in.
pub fn release_interrupts() {
    // SAFETY: as above.
    unsafe { asm!("stgi", options(nostack)) };
}

/// The physical address of a block, which is its address.
fn physical(vmcb: *const Vmcb) -> Hpa {
    Hpa(vmcb.addr() as u64)
}

/// Loads the registers that stay in the core between exits.
pub fn load(vmcb: &Vmcb) {
    // SAFETY: the block is a valid one; what is loaded is used by the guest
    // only (see the module's head).
    unsafe { asm!("vmload rax", in("rax") physical(vmcb).0, options(nostack)) };
}

/// Stores them back into the block.
pub fn save(vmcb: &mut Vmcb) {
    // SAFETY: the block is exclusively ours.
    unsafe { asm!("vmsave rax", in("rax") physical(vmcb).0, options(nostack)) };
}

/// Runs the guest until its next exit. Interrupts must be held back before,
/// and are held back after.
///
/// # Safety
/// 1. The block passes VMRUN's checks or the exit says INVALID.
/// 2. Its nested page tables, permission maps and this node's memory outside
///    of them are such that the guest can't reach the hypervisor's memory.
pub unsafe fn run(vmcb: &mut Vmcb, registers: &mut Registers) {
    vmcb.save.rax = registers.gpr[0];
    vmcb.save.rsp = registers.gpr[4];
    vmcb.save.rip = registers.rip;
    vmcb.save.rflags = registers.rflags;
    // SAFETY: the caller's duty.
    unsafe { enter(physical(vmcb), registers) };
    registers.gpr[0] = vmcb.save.rax;
    registers.gpr[4] = vmcb.save.rsp;
    registers.rip = vmcb.save.rip;
    registers.rflags = vmcb.save.rflags;
}

const _: () = assert!(offset_of!(Registers, gpr) == 0);

#[unsafe(naked)]
unsafe extern "C" fn enter(vmcb: Hpa, registers: *mut Registers) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push rsi",
        "mov rax, rdi",
        "mov rcx, [rsi + 1 * 8]",
        "mov rdx, [rsi + 2 * 8]",
        "mov rbx, [rsi + 3 * 8]",
        "mov rbp, [rsi + 5 * 8]",
        "mov rdi, [rsi + 7 * 8]",
        "mov r8, [rsi + 8 * 8]",
        "mov r9, [rsi + 9 * 8]",
        "mov r10, [rsi + 10 * 8]",
        "mov r11, [rsi + 11 * 8]",
        "mov r12, [rsi + 12 * 8]",
        "mov r13, [rsi + 13 * 8]",
        "mov r14, [rsi + 14 * 8]",
        "mov r15, [rsi + 15 * 8]",
        "mov rsi, [rsi + 6 * 8]",
        "vmrun rax",
        // RAX and RSP are the hypervisor's again.
        "mov rax, [rsp]",
        "mov [rax + 1 * 8], rcx",
        "mov [rax + 2 * 8], rdx",
        "mov [rax + 3 * 8], rbx",
        "mov [rax + 5 * 8], rbp",
        "mov [rax + 6 * 8], rsi",
        "mov [rax + 7 * 8], rdi",
        "mov [rax + 8 * 8], r8",
        "mov [rax + 9 * 8], r9",
        "mov [rax + 10 * 8], r10",
        "mov [rax + 11 * 8], r11",
        "mov [rax + 12 * 8], r12",
        "mov [rax + 13 * 8], r13",
        "mov [rax + 14 * 8], r14",
        "mov [rax + 15 * 8], r15",
        "pop rsi",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
    )
}
