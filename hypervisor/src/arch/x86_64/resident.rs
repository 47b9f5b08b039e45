//! The part of a vCPU's state that stays in the core's own registers while its
//! exits are handled, and in no VMCB: it is saved only when another vCPU comes
//! to the core, or this one leaves it.
#![expect(unsafe_code, reason = "saves and loads extended state")]

use alloc::boxed::Box;
use core::arch::asm;

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::cpu;

/// Bytes of an XSAVE area: the standard format up to AVX-512.
pub const XSAVE_SIZE: usize = 2688;
const MXCSR: usize = 24;
const MXCSR_MASK: usize = 28;
const XSTATE_BV: usize = 512;
const XSTATE_HEADER_END: usize = 576;
const MXCSR_RESET: u32 = 0x1f80;
/// The bits of MXCSR that every processor has.
const MXCSR_DEFAULT_MASK: u32 = 0xffbf;
const XCR0_RESET: u64 = 1;

/// x87 to AVX-512, as XSAVE stores it.
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(64))]
pub struct XsaveArea([u8; XSAVE_SIZE]);

/// What XRSTOR would refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no extended state that a processor could have saved")]
pub struct BadArea;

impl XsaveArea {
    /// Everything as after reset.
    fn initial() -> Box<Self> {
        let mut area = Self::new_box_zeroed().expect("the node's memory suffices for its vCPUs");
        area.0[MXCSR..MXCSR + 4].copy_from_slice(&MXCSR_RESET.to_le_bytes());
        area
    }

    fn u32_at(&self, at: usize) -> u32 {
        let bytes = self.0[at..at + 4].try_into();
        u32::from_le_bytes(bytes.expect("four bytes"))
    }

    fn u64_at(&self, at: usize) -> u64 {
        let bytes = self.0[at..at + 8].try_into();
        u64::from_le_bytes(bytes.expect("eight bytes"))
    }

    /// Whether XRSTOR of the components `mask` takes it (manual vol. 2,
    /// 11.5.9): a peer may have written anything.
    ///
    /// # Errors
    /// It would raise #GP.
    pub fn check(&self, mask: u64) -> Result<(), BadArea> {
        let known = match self.u32_at(MXCSR_MASK) {
            0 => MXCSR_DEFAULT_MASK,
            known => known & (MXCSR_DEFAULT_MASK | 1 << 17),
        };
        let header = XSTATE_BV + 8..XSTATE_HEADER_END;
        let legal = self.u32_at(MXCSR) & !known == 0
            && self.u64_at(XSTATE_BV) & !mask == 0
            && self.0[header].iter().all(|byte| *byte == 0);
        legal.then_some(()).ok_or(BadArea)
    }
}

/// The state of one vCPU, while it is not in a core.
#[derive(Clone, Debug)]
pub struct Resident {
    /// x87, SSE, AVX.
    pub area: Box<XsaveArea>,
    /// XCR0.
    pub xcr0: u64,
    /// TSC_AUX.
    pub tsc_aux: u32,
    /// DR0 to DR3.
    pub breakpoints: [u64; 4],
}

impl Default for Resident {
    fn default() -> Self {
        Self {
            area: XsaveArea::initial(),
            xcr0: XCR0_RESET,
            tsc_aux: 0,
            breakpoints: [0; 4],
        }
    }
}

impl Resident {
    /// Loads it into this core. The extended state consists of the components
    /// `mask`, which the processor has; the area and XCR0 must be legal.
    pub fn load(&self, mask: u64) {
        let [low, high] = halves(mask);
        cpu::set_guest_xcr0(mask);
        // SAFETY: 1. the area is aligned, large enough for all of `mask`, and
        // checked where it is not this hypervisor's own; 2. the hypervisor
        // uses no extended state.
        unsafe {
            asm!("xrstor64 [{}]", in(reg) &raw const *self.area, in("eax") low, in("edx") high, options(nostack, readonly));
        }
        cpu::set_guest_xcr0(self.xcr0);
        cpu::set_tsc_aux(self.tsc_aux);
        let [a, b, c, d] = self.breakpoints;
        // SAFETY: DR7 arms none of them while the hypervisor runs.
        unsafe {
            asm!("mov dr0, {}", "mov dr1, {}", "mov dr2, {}", "mov dr3, {}",
                in(reg) a, in(reg) b, in(reg) c, in(reg) d, options(nomem, nostack));
        }
    }

    /// Takes it out of this core; `mask` as in [`load`](Self::load).
    pub fn save(&mut self, mask: u64) {
        let [low, high] = halves(mask);
        self.xcr0 = cpu::xgetbv0();
        cpu::set_guest_xcr0(mask);
        // SAFETY: as in `load`; the area is exclusively ours.
        unsafe {
            asm!("xsave64 [{}]", in(reg) &raw mut *self.area, in("eax") low, in("edx") high, options(nostack));
        }
        [self.tsc_aux, _] = halves(cpu::tsc_aux());
        let (a, b, c, d): (u64, u64, u64, u64);
        // SAFETY: reading has no effect.
        unsafe {
            asm!("mov {}, dr0", "mov {}, dr1", "mov {}, dr2", "mov {}, dr3",
                out(reg) a, out(reg) b, out(reg) c, out(reg) d, options(nomem, nostack));
        }
        self.breakpoints = [a, b, c, d];
    }
}

fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_xrstor_would_refuse_is_found_before() {
        let mask = 7;
        let changed = |at: usize, value: u8| {
            let mut area = XsaveArea::initial();
            area.0[at] = value;
            area.check(mask)
        };
        assert_eq!(XsaveArea::initial().check(mask), Ok(()));
        assert_eq!(changed(XSTATE_BV, 7), Ok(()));
        assert_eq!(changed(XSTATE_BV, 8), Err(BadArea), "hidden component");
        assert_eq!(changed(XSTATE_BV + 15, 0x80), Err(BadArea), "compact");
        assert_eq!(changed(XSTATE_HEADER_END - 1, 1), Err(BadArea));
        assert_eq!(changed(MXCSR + 2, 1), Err(BadArea));
        assert_eq!(changed(600, 0xff), Ok(()));
    }
}
