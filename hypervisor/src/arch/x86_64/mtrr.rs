//! How the processor caches a range of memory.
//!
//! Our page tables ask for write-back (PAT entry 0) except for device
//! registers, and the memory type range registers may ask for less (AMD64
//! manual, vol. 2, 7.7 and 7.8). Firmware makes all PCI windows uncached by
//! them, and a shared region is one. So each core leaves all to its page
//! tables, and each node proves that it worked.
#![expect(unsafe_code, reason = "model-specific registers and the cache")]

use core::arch::asm;
use core::ops::Range;

use vmm_shared::addr::Hpa;
use x86_64::instructions::tlb;
use x86_64::registers::control::{Cr0, Cr0Flags};

use super::cpu;

const CAPABILITIES: u32 = 0xfe;
const PAGE_ATTRIBUTES: u32 = 0x277;
const DEFAULT: u32 = 0x2ff;
const VARIABLE: u32 = 0x200;

const ENABLED: u64 = 1 << 11;
const VALID: u64 = 1 << 11;
const WRITE_BACK: u8 = 6;
const PAGE_MASK: u64 = !0xfff;

/// A variable range: base and mask registers.
type Variable = (u64, u64);

/// The registers as far as they matter above 1 MiB.
#[derive(Clone, Debug)]
struct Registers<I> {
    attributes: u64,
    default: u64,
    variable: I,
}

impl<I: Iterator<Item = Variable> + Clone> Registers<I> {
    /// Whether all of the range, whole pages above 1 MiB, is write-back.
    fn are_write_back(&self, range: &Range<Hpa>) -> bool {
        let [attribute, ..] = self.attributes.to_le_bytes();
        let [default, ..] = self.default.to_le_bytes();
        if attribute & 7 != WRITE_BACK || self.default & ENABLED == 0 {
            return false;
        }
        let mut is_covered = default == WRITE_BACK;
        for (base, mask) in self.variable.clone().filter(|(_, mask)| mask & VALID != 0) {
            let [kind, ..] = base.to_le_bytes();
            let mask = mask & PAGE_MASK;
            // Contiguous masks alone are in use: the range begins at `start`
            // and is as long as the mask's lowest bit says.
            let start = base & mask;
            let end = start.saturating_add(1_u64.checked_shl(mask.trailing_zeros()).unwrap_or(0));
            if range.start.0 >= end || start >= range.end.0 {
                continue;
            }
            if kind != WRITE_BACK {
                return false;
            }
            is_covered |= start <= range.start.0 && range.end.0 <= end;
        }
        is_covered
    }
}

fn has_ranges() -> bool {
    raw_cpuid::CpuId::new()
        .get_feature_info()
        .is_some_and(|features| features.has_mtrr())
}

/// Makes this core cache everything as its page tables say.
///
/// # Safety
/// Interrupts are off, and whatever must not be cached is mapped so.
pub unsafe fn leave_to_page_tables() {
    if !has_ranges() {
        return;
    }
    // The manual's sequence (vol. 2, 7.6.5): no caching while types change.
    let cr0 = Cr0::read();
    let uncached = (cr0 - Cr0Flags::NOT_WRITE_THROUGH) | Cr0Flags::CACHE_DISABLE;
    // SAFETY: 1. neither bit changes what memory holds; 2. the registers exist
    // where the feature does; 3. the rest is the caller's duty.
    unsafe {
        Cr0::write(uncached);
        asm!("wbinvd", options(nostack, preserves_flags));
        tlb::flush_all();
        cpu::wrmsr(DEFAULT, ENABLED | u64::from(WRITE_BACK));
        let [count, ..] = cpu::rdmsr(CAPABILITIES).to_le_bytes();
        for index in 0..u32::from(count) {
            cpu::wrmsr(VARIABLE + 2 * index + 1, 0);
        }
        asm!("wbinvd", options(nostack, preserves_flags));
        tlb::flush_all();
        Cr0::write(cr0);
    }
}

/// Whether accesses to the range, mapped as data, are write-back.
#[must_use]
pub fn is_write_back(range: &Range<Hpa>) -> bool {
    if !has_ranges() {
        // The page tables alone decide.
        return true;
    }
    // SAFETY: both exist where the feature does, and reading has no effect.
    let read = |register| unsafe { cpu::rdmsr(register) };
    let [count, ..] = read(CAPABILITIES).to_le_bytes();
    let variable = (0..u32::from(count)).map(|index| {
        let at = VARIABLE + 2 * index;
        (read(at), read(at + 1))
    });
    let registers = Registers {
        attributes: read(PAGE_ATTRIBUTES),
        default: read(DEFAULT),
        variable,
    };
    registers.are_write_back(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    /// Bits of physical addresses in the masks below.
    const WIDTH: u64 = (1 << 40) - 1;

    fn check(attributes: u64, default: u64, variable: &[(u64, u64, u64)]) -> bool {
        let variable = variable
            .iter()
            .map(|(kind, start, len)| (start | kind, WIDTH & !(len - 1) | VALID));
        let registers = Registers {
            attributes,
            default,
            variable,
        };
        registers.are_write_back(&(Hpa(8 * GIB)..Hpa(9 * GIB)))
    }

    const USUAL: u64 = 0x0007_0406_0007_0406;

    #[test]
    fn the_default_counts_where_no_range_does() {
        assert!(check(USUAL, ENABLED | 6, &[(0, 3 * GIB, GIB)]));
        assert!(!check(USUAL, ENABLED, &[(6, 0, 4 * GIB)]));
        assert!(!check(USUAL, 6, &[]), "switched off, all is uncached");
        assert!(!check(0, ENABLED | 6, &[]), "by the page attributes");
    }

    #[test]
    fn any_other_range_in_it_spoils_it() {
        let mib = 1 << 20;
        assert!(!check(USUAL, ENABLED | 6, &[(0, 8 * GIB + 512 * mib, mib)]));
        assert!(!check(USUAL, ENABLED | 6, &[(4, 8 * GIB, 8 * GIB)]));
        assert!(check(USUAL, ENABLED, &[(6, 8 * GIB, 8 * GIB)]));
        assert!(!check(USUAL, ENABLED, &[(6, 8 * GIB, GIB / 2)]), "half");
        assert!(check(USUAL, ENABLED | 6, &[(0, 9 * GIB, GIB)]), "beside it");
    }
}
