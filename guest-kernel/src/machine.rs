//! What the kernel needs of the machine, and what it keeps of the processor
//! for each thread.

use alloc::boxed::Box;
use alloc::vec;

use crate::sched::CpuSet;

/// [`Registers::vector`] of a system call.
pub const CALL_VECTOR: u64 = 0x100;

/// A thread's registers while it does not run, as the processor and the entry
/// code store them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[expect(missing_docs, reason = "the registers' own names")]
pub struct Registers {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rbp: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rbx: u64,
    pub rax: u64,
    /// How the thread entered the kernel last: the vector, or [`CALL_VECTOR`].
    pub vector: u64,
    /// The exception's error code.
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// Flags that a program may change: carry, parity, adjust, zero, sign, trap,
/// direction, overflow, alignment check, identification.
pub const USER_FLAGS: u64 = 0x24_0dd5;
/// Flags that are always set: interrupts on, and the reserved one.
pub const FIXED_FLAGS: u64 = 0x202;
/// Selectors of programs' code and data, as Linux has them.
pub const USER_CODE: u64 = 0x33;
/// See [`USER_CODE`].
pub const USER_DATA: u64 = 0x2b;

impl Registers {
    /// Those of a new program.
    #[must_use]
    pub fn start(rip: u64, rsp: u64) -> Self {
        Self {
            rip,
            rsp,
            cs: USER_CODE,
            ss: USER_DATA,
            rflags: FIXED_FLAGS,
            ..Self::default()
        }
    }
}

/// 64 bytes, aligned as XSAVE wants them.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct FpuLine(pub [u8; 64]);

/// A thread's floating-point and vector registers: an XSAVE area.
#[derive(Clone, Debug)]
pub struct Fpu(pub Box<[FpuLine]>);

/// The legacy part of an XSAVE area, and its header.
pub const FPU_LEGACY: usize = 512;
/// Offset of MXCSR, and its bits that exist.
const MXCSR: usize = 24;
const MXCSR_MASK: u32 = 0xffff;

impl Fpu {
    /// The state after reset, in an area of `len` bytes.
    #[must_use]
    pub fn new(len: usize) -> Self {
        let mut lines = vec![FpuLine([0; 64]); len.div_ceil(64)].into_boxed_slice();
        // All exceptions masked.
        lines[0].0[0..2].copy_from_slice(&0x37f_u16.to_le_bytes());
        lines[0].0[MXCSR..MXCSR + 4].copy_from_slice(&0x1f80_u32.to_le_bytes());
        Self(lines)
    }

    /// Its bytes.
    pub fn bytes(&self) -> impl Iterator<Item = u8> + '_ {
        self.0.iter().flat_map(|line| line.0)
    }

    /// Takes bytes from a program, made such that the processor loads them:
    /// only components in `mask`, no reserved bit.
    pub fn restore(&mut self, bytes: &[u8], mask: u64) {
        for (line, chunk) in self.0.iter_mut().zip(bytes.chunks(64)) {
            line.0[..chunk.len()].copy_from_slice(chunk);
        }
        let mxcsr = &mut self.0[0].0[MXCSR..MXCSR + 4];
        let value = u32::from_le_bytes([mxcsr[0], mxcsr[1], mxcsr[2], mxcsr[3]]);
        mxcsr.copy_from_slice(&(value & MXCSR_MASK).to_le_bytes());
        // The header: which components there are, the standard format, zeros.
        if let Some(header) = self.0.get_mut(FPU_LEGACY / 64) {
            let mut word = [0; 8];
            word.copy_from_slice(&header.0[..8]);
            let present = u64::from_le_bytes(word) & mask;
            header.0 = [0; 64];
            header.0[..8].copy_from_slice(&present.to_le_bytes());
        }
    }
}

/// Nanoseconds of a tick, times 2^32.
#[must_use]
pub fn ns_per_tick(khz: u32) -> u64 {
    (1_000_000 << 32) / u64::from(khz.max(1))
}

/// The machine under the kernel.
pub trait Machine {
    /// Ticks since the VM was made.
    fn ticks(&self) -> u64;
    /// The same without the machine.
    fn clock(&self) -> fn() -> u64;
    /// Rate of the ticks in kHz.
    fn ticks_khz(&self) -> u32;
    /// A number that nobody can guess.
    fn random(&mut self) -> u64;
    /// Wakes the launcher.
    fn ring_launcher(&mut self);
    /// Bytes of an XSAVE area.
    fn fpu_len(&self) -> usize;
    /// The components in it.
    fn fpu_mask(&self) -> u64;
    /// The number of the processor that asks.
    fn cpu(&self) -> usize;
    /// Interrupts another processor, once this one has left the kernel.
    fn call(&mut self, cpu: usize);
    /// Makes other processors forget the translations of programs' addresses,
    /// `gone` leave programs' page tables besides. Afterwards they have done
    /// so, and none of `gone` runs a program.
    fn flush(&mut self, stale: CpuSet, gone: CpuSet);
    /// Brings `fpu` up to date if this processor holds the newer state of
    /// thread `tid`.
    fn save_fpu(&mut self, tid: u32, fpu: &mut Fpu);
    /// A processor is gone, with what it held and what was wanted of it.
    fn lose(&mut self, cpu: usize);
    /// Forgets what any processor holds for thread `tid`: its saved state has
    /// been changed, or it has ended.
    fn forget_fpu(&mut self, tid: u32);
    /// Page tables are about to be freed: no processor may use them any more.
    fn leave_tables(&mut self, roots: &[u64]);
    /// Capabilities of the processor for the auxiliary vector: CPUID 1, EDX.
    fn hardware(&self) -> u64;
    /// Kernel memory that is free, in bytes.
    fn heap_free(&self) -> usize;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_cannot_pass_state_that_faults_when_loaded() {
        let mut fpu = Fpu::new(832);
        fpu.restore(&[0xff; 832], 7);
        let bytes: Vec<u8> = fpu.bytes().collect();
        assert_eq!(bytes.len(), 832);
        assert_eq!(bytes[24..28], [0xff, 0xff, 0, 0]);
        assert_eq!(bytes[512..520], [7, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[520..576], [0; 56]);
        assert_eq!(bytes[576], 0xff);
        // A frame without the extended part: nothing of it is there.
        let mut fpu = Fpu::new(832);
        fpu.restore(&[0; 512], 7);
        assert_eq!(fpu.bytes().nth(512), Some(0));
    }
}
