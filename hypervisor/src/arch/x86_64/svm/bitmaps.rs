//! The permission maps: which ports and MSRs the guest may use directly.
#![expect(unsafe_code, reason = "fills pages that the processor reads")]

use vmm_shared::addr::{Hpa, PAGE_SIZE};

use crate::arch::paging::zeroed_pages;

/// Pages of the I/O map; the third only guards accesses that wrap.
const IO_PAGES: usize = 3;
const MSR_PAGES: usize = 2;

/// Maps shared by all vCPUs of a node.
#[derive(Clone, Copy, Debug)]
pub struct PermissionMaps {
    /// I/O ports.
    pub io: Hpa,
    /// Model-specific registers.
    pub msr: Hpa,
}

fn filled_pages(count: usize) -> (Hpa, &'static mut [u8]) {
    let pages = zeroed_pages(count);
    let start =
        core::ptr::with_exposed_provenance_mut::<u8>(usize::try_from(pages.0).expect("64-bit"));
    let len = count * usize::try_from(PAGE_SIZE).expect("a small number");
    // SAFETY: fresh pages of the heap that are never given back, and no guest
    // runs yet; the slice is not used after the maps are built.
    let bytes = unsafe { core::slice::from_raw_parts_mut(start, len) };
    bytes.fill(0xff);
    (pages, bytes)
}

impl PermissionMaps {
    /// Maps that intercept everything but the given MSRs.
    #[must_use]
    pub fn new(pass_through: impl Iterator<Item = u32>) -> Self {
        let (io, _) = filled_pages(IO_PAGES);
        let (msr, bytes) = filled_pages(MSR_PAGES);
        for register in pass_through {
            let (byte, mask) = msr_bits(register).expect("only mapped MSRs can pass through");
            bytes[byte] &= !mask;
        }
        Self { io, msr }
    }
}

/// Byte and bits (read and write) of a register in the MSR map, if it has any.
/// Manual: vol. 2, 15.11.
fn msr_bits(register: u32) -> Option<(usize, u8)> {
    let base = match register {
        0..=0x1fff => 0,
        0xc000_0000..=0xc000_1fff => 0x800,
        0xc001_0000..=0xc001_1fff => 0x1000,
        _ => return None,
    };
    let index = usize::try_from(register & 0x1fff).ok()?;
    Some((base + index / 4, 0b11 << (index % 4 * 2)))
}

#[cfg(test)]
mod tests {
    use super::msr_bits;

    #[test]
    fn registers_lie_where_the_manual_says() {
        assert_eq!(msr_bits(0), Some((0, 0b11)));
        assert_eq!(msr_bits(0x176), Some((0x5d, 0b11 << 4)));
        assert_eq!(msr_bits(0xc000_0080), Some((0x820, 0b11)));
        assert_eq!(msr_bits(0xc001_1fff), Some((0x17ff, 0b11 << 6)));
        assert_eq!(msr_bits(0x4b56_4d00), None);
    }
}
