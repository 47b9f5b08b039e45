//! QEMU's firmware configuration, as much of it as bare-metal programs ask.
//!
//! A selector and a byte stream, read only, without DMA and without files.
//! Source: QEMU, docs/specs/fw_cfg.rst.

/// Keys that answer.
mod key {
    pub(super) const SIGNATURE: u16 = 0;
    pub(super) const FEATURES: u16 = 1;
    pub(super) const RAM_SIZE: u16 = 3;
    pub(super) const CPU_COUNT: u16 = 5;
    pub(super) const MAX_CPU_COUNT: u16 = 0xf;
}

/// The traditional interface, no DMA.
const FEATURES: [u8; 4] = [1, 0, 0, 0];

/// The interface's state and what it answers.
#[derive(Clone, Debug)]
pub struct FwCfg {
    vcpus: u16,
    memory: u64,
    selected: u16,
    offset: usize,
}

impl FwCfg {
    /// For a VM with so many vCPUs and bytes of RAM.
    #[must_use]
    pub const fn new(vcpus: u16, memory: u64) -> Self {
        Self {
            vcpus,
            memory,
            selected: key::SIGNATURE,
            offset: 0,
        }
    }

    /// Selects an item, from its start.
    pub const fn select(&mut self, item: u16) {
        self.selected = item;
        self.offset = 0;
    }

    /// The next byte of the selected item; zeros behind its end, and if there
    /// is no such item.
    pub fn read(&mut self) -> u8 {
        let memory = self.memory.to_le_bytes();
        let vcpus = self.vcpus.to_le_bytes();
        let item: &[u8] = match self.selected {
            key::SIGNATURE => b"QEMU",
            key::FEATURES => &FEATURES,
            key::RAM_SIZE => &memory,
            key::CPU_COUNT | key::MAX_CPU_COUNT => &vcpus,
            _ => &[],
        };
        let byte = item.get(self.offset).copied().unwrap_or(0);
        self.offset = self.offset.saturating_add(1);
        byte
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(key: u16, len: usize) -> Vec<u8> {
        let mut config = FwCfg::new(0x102, 128 << 20);
        config.select(key);
        (0..len).map(|_| config.read()).collect()
    }

    #[test]
    fn a_program_learns_of_cpus_and_memory() {
        assert_eq!(item(0, 4), *b"QEMU");
        assert_eq!(item(5, 2), [2, 1]);
        assert_eq!(item(15, 2), [2, 1]);
        assert_eq!(item(3, 8), (128_u64 << 20).to_le_bytes());
    }

    #[test]
    fn items_end_in_zeros_and_unknown_ones_are_empty() {
        assert_eq!(item(5, 4), [2, 1, 0, 0]);
        assert_eq!(item(0x19, 3), [0; 3]);
        assert_eq!(item(0xffff, 1), [0]);
    }
}
