//! A PCI bus with nothing on it but its own host bridge.
//!
//! No guest device is a PCI device. But Linux enters persistent memory of its
//! E820 map into its resource tree only while it sets up PCI, and it does
//! that only if configuration space answers. Mechanism: PCI Local Bus 3.0,
//! 3.2.2.3.2.

use super::Width;

const ENABLE: u32 = 1 << 31;
/// Bus, device and function.
const TARGET: u32 = 0x00ff_ff00;
/// A generic host bridge.
const IDENTITY: u32 = 0x0008_1b36;
const CLASS: u32 = 0x0600_0000;

/// The address register and what it selects.
#[derive(Clone, Debug, Default)]
pub struct PciHost {
    address: u32,
}

impl PciHost {
    /// The bridge after reset.
    #[must_use]
    pub const fn new() -> Self {
        Self { address: 0 }
    }

    /// What the address register holds.
    #[must_use]
    pub const fn address(&self) -> u32 {
        self.address
    }

    /// Selects a register of configuration space.
    pub const fn set_address(&mut self, address: u32) {
        // The low bits and those above the bus number read as zero.
        self.address = address & (ENABLE | TARGET | 0xfc);
    }

    /// Reads the selected register from its byte `offset` (0 to 3) on; ones
    /// if there is no such function. Writes have no effect.
    #[must_use]
    pub fn data(&self, offset: u8, width: Width) -> u64 {
        if self.address & ENABLE == 0 || self.address & TARGET != 0 {
            return width.mask();
        }
        let register = match self.address & 0xfc {
            0x00 => IDENTITY,
            0x08 => CLASS,
            _ => 0,
        };
        u64::from(register) >> (u32::from(offset) * 8) & width.mask()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_finds_the_mechanism_and_the_bridge() {
        let mut host = PciHost::new();
        host.set_address(0x8000_0000);
        assert_eq!(host.address(), 0x8000_0000);
        assert_eq!(host.data(0, Width::Dword), 0x0008_1b36);
        host.set_address(0x8000_0008);
        assert_eq!(host.data(2, Width::Word), 0x0600, "class: host bridge");
    }

    #[test]
    fn nothing_else_is_on_the_bus() {
        let mut host = PciHost::new();
        for address in [0x8000_0800, 0x8000_0100, 0x8001_0000, 0x0000_0000] {
            host.set_address(address);
            assert_eq!(host.data(0, Width::Dword), 0xffff_ffff, "{address:#x}");
            assert_eq!(host.data(3, Width::Byte), 0xff);
        }
    }
}
