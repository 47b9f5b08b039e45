//! Four bytes that read back what was written, in any part of them.
//!
//! Programs that test a hypervisor's port accesses want such a register; it is
//! that of QEMU's `pc-testdev`.

use super::Width;

/// The register.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scratch(u32);

impl Scratch {
    /// Reads from its byte `offset` (0 to 3) on; zeros behind its end.
    #[must_use]
    pub fn read(self, offset: u8, width: Width) -> u64 {
        u64::from(self.0) >> (u32::from(offset & 3) * 8) & width.mask()
    }

    /// Writes from its byte `offset` (0 to 3) on; what lies behind its end is
    /// dropped.
    pub fn write(&mut self, offset: u8, width: Width, value: u64) {
        let shift = u32::from(offset & 3) * 8;
        let mask = width.mask() << shift;
        let all = u64::from(self.0) & !mask | value << shift & mask;
        let [a, b, c, d, ..] = all.to_le_bytes();
        self.0 = u32::from_le_bytes([a, b, c, d]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_read_back() {
        let mut scratch = Scratch::default();
        scratch.write(0, Width::Dword, 0x1122_3344);
        scratch.write(1, Width::Byte, 0xaa);
        scratch.write(3, Width::Word, 0xbbcc);
        assert_eq!(scratch.read(0, Width::Dword), 0xcc22_aa44);
        assert_eq!(scratch.read(2, Width::Word), 0xcc22);
        assert_eq!(scratch.read(3, Width::Word), 0xcc);
    }
}
