//! Instructions of the host processor that Rust has no words for.
#![expect(unsafe_code, reason = "privileged instructions")]

use core::arch::asm;
use core::arch::x86_64::{__cpuid_count, _rdtsc};

use crate::platform::cpuid::{CpuidResult, HostCpuid};

/// Reads a model-specific register.
///
/// # Safety
/// The register must exist on this processor.
#[must_use]
pub unsafe fn rdmsr(register: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller's duty.
    unsafe {
        asm!("rdmsr", in("ecx") register, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register.
///
/// # Safety
/// The register must exist, and the value must not break the hypervisor's
/// own execution.
pub unsafe fn wrmsr(register: u32, value: u64) {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    let (low, high) = (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    );
    // SAFETY: the caller's duty.
    unsafe {
        asm!("wrmsr", in("ecx") register, in("eax") low, in("edx") high, options(nostack, preserves_flags));
    }
}

/// The processor's time stamp counter.
#[must_use]
pub fn rdtsc() -> u64 {
    // SAFETY: reading the counter has no effect.
    unsafe { _rdtsc() }
}

/// The guest's XCR0: the hypervisor uses no extended state, so a vCPU's value
/// stays loaded while its exits are handled.
#[must_use]
pub fn xgetbv0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: CR4.OSXSAVE is set on every core that supports it, at start.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Loads the guest's XCR0, which the caller has checked: a value that the
/// processor refuses ends this node.
pub fn set_guest_xcr0(value: u64) {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    let (low, high) = (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    );
    // SAFETY: the hypervisor uses no extended state; a refused value raises
    // #GP, which is reported like any broken invariant.
    unsafe {
        asm!("xsetbv", in("ecx") 0, in("eax") low, in("edx") high, options(nomem, nostack, preserves_flags))
    };
}

const MSR_TSC_AUX: u32 = 0xc000_0103;

/// The guest's TSC_AUX, which stays loaded: the hypervisor has no use for it.
#[must_use]
pub fn tsc_aux() -> u64 {
    // SAFETY: every processor with SVM and RDTSCP has it, and an emulator
    // without reads 0.
    unsafe { rdmsr(MSR_TSC_AUX) }
}

/// Loads the guest's TSC_AUX.
pub fn set_tsc_aux(value: u32) {
    // SAFETY: any 32-bit value is legal.
    unsafe { wrmsr(MSR_TSC_AUX, value.into()) };
}

/// Keeps this core from being interrupted outside the guest.
pub fn interrupts_off() {
    // SAFETY: delaying interrupts harms nothing.
    unsafe { asm!("cli", options(nostack)) };
}

/// Lets interrupts in.
pub fn interrupts_on() {
    // SAFETY: every vector has a handler from `descriptors::load` on.
    unsafe { asm!("sti", options(nostack)) };
}

/// Sleeps until the next interrupt; call with interrupts off. The shadow of
/// STI closes the gap in which a wake-up could be lost. Interrupts are off
/// again afterwards.
pub fn sleep_until_interrupt() {
    // SAFETY: as in `interrupts_on`.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) };
}

/// Sleeps for good.
pub fn park() -> ! {
    loop {
        interrupts_off();
        sleep_until_interrupt();
    }
}

/// Makes this core fetch anew what it executes next.
pub fn serialize() {
    let _ = __cpuid_count(0, 0);
}

/// Whether instruction fetches should see what other hosts have written, as
/// real processors and KVM guarantee. QEMU's TCG runs what it has translated
/// before, and says by its hypervisor signature who it is.
#[must_use]
pub fn fetches_coherently() -> bool {
    const HYPERVISOR_PRESENT: u32 = 1 << 31;
    const SIGNATURE: u32 = 0x4000_0000;
    if __cpuid_count(1, 0).ecx & HYPERVISOR_PRESENT == 0 {
        return true;
    }
    let found = __cpuid_count(SIGNATURE, 0);
    let tcg = [*b"TCGT", *b"CGTC", *b"GTCG"].map(u32::from_le_bytes);
    [found.ebx, found.ecx, found.edx] != tcg
}

/// Whether breakpoints that a guest arms stay armed after an exit: QEMU's TCG
/// up to version 8 does not switch DR7.
#[must_use]
pub fn leaks_breakpoints() -> bool {
    !fetches_coherently()
}

/// The CPUID instruction of this core.
#[derive(Clone, Copy, Debug)]
pub struct Cpuid;

impl HostCpuid for Cpuid {
    fn leaf(&self, leaf: u32, subleaf: u32) -> CpuidResult {
        let found = __cpuid_count(leaf, subleaf);
        CpuidResult {
            eax: found.eax,
            ebx: found.ebx,
            ecx: found.ecx,
            edx: found.edx,
        }
    }
}
