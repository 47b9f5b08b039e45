//! Devices of the virtual platform, as register machines.
//!
//! A device here knows registers and nothing else: no vCPU, no lock, no
//! clock. An access returns its effects, and the run loop acts on them.

pub mod fw_cfg;
pub mod hotplug;
pub mod ioapic;
pub mod legacy;
pub mod pci_host;
pub mod pipe;
pub mod scratch;
pub mod uart;
pub mod virtio;

/// The level of an interrupt line between a device and the IOAPIC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IrqLevel {
    /// No interrupt is asked for.
    #[default]
    Deasserted,
    /// The device asks for an interrupt.
    Asserted,
}

/// How many bytes an access moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 1 byte.
    Byte,
    /// 2 bytes.
    Word,
    /// 4 bytes.
    Dword,
    /// 8 bytes.
    Qword,
}

impl Width {
    /// The width of `bytes` bytes, if there is one.
    #[must_use]
    pub const fn from_bytes(bytes: usize) -> Option<Self> {
        match bytes {
            1 => Some(Self::Byte),
            2 => Some(Self::Word),
            4 => Some(Self::Dword),
            8 => Some(Self::Qword),
            _ => None,
        }
    }

    /// Bytes that the access moves.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Byte => 1,
            Self::Word => 2,
            Self::Dword => 4,
            Self::Qword => 8,
        }
    }

    /// A value with every bit of the access set.
    #[must_use]
    pub const fn mask(self) -> u64 {
        u64::MAX >> (64 - 8 * self.bytes())
    }
}
