//! What answers on an I/O port.
//!
//! A kernel without a PC's old controllers still pokes at some of them. All
//! such ports read as ones and swallow writes; [`PortRule::Unknown`] does
//! the same but is counted, so that a guest that looks for a device that we
//! do not know of can be noticed.

use super::Machine;
use super::layout::{
    COM_PORTS, COM1_PORT, CPU_HOTPLUG_PORT, MEMORY_HOTPLUG_PORT, PM_TIMER_PORT, SLEEP_PORT,
};
use crate::devices::hotplug;

/// What an access to a port means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortRule {
    /// A register of COM1, by its offset (0 to 7).
    Serial(u8),
    /// Sleep control, sleep status and reset: see
    /// [`SLEEP_S5`](super::layout::SLEEP_S5) and
    /// [`SLEEP_RESET`](super::layout::SLEEP_RESET); reads as 0.
    SleepReset,
    /// The keyboard controller's command port: writing
    /// [`KEYBOARD_RESET`] resets, other writes are dropped. Reads as 0,
    /// "ready for a command", because a kernel about to reset polls it.
    KeyboardReset,
    /// The address register of PCI configuration space.
    PciAddress,
    /// A byte of its data register, by its offset (0 to 3).
    PciData(u8),
    /// Writing ends the VM; the value becomes its exit status.
    Exit,
    /// Which item of `fw_cfg` is read.
    FwCfgSelect,
    /// The next byte of that item.
    FwCfgData,
    /// Four bytes that read back, from this one on.
    Scratch(u8),
    /// The level of an interrupt line.
    Line(u8),
    /// A register of the interrupt controllers.
    Pic(u16),
    /// A register of the interval timer.
    Pit(u16),
    /// A register of the clock: 0 selects, 1 is what was selected.
    Clock(u8),
    /// The ACPI timer.
    PmTimer,
    /// A register of the block for vCPUs that come and go, by its offset.
    CpuHotplug(u16),
    /// A register of the block for memory that comes and goes.
    MemoryHotplug(u16),
    /// A device of old PCs that is absent: reads all-ones, writes dropped.
    Legacy,
    /// Nothing we know of: as [`Legacy`](Self::Legacy), and counted.
    Unknown,
}

/// The keyboard controller command that pulses the reset line.
pub const KEYBOARD_RESET: u8 = 0xfe;

const KEYBOARD_COMMAND: u16 = 0x64;
const PCI_ADDRESS: u16 = 0xcf8;
const PCI_DATA: u16 = 0xcfc;
const COM1_LAST: u16 = COM1_PORT + COM_PORTS - 1;

/// Where a bare-metal program leaves its exit value, as for QEMU's
/// `isa-debug-exit` at the place where kvm-unit-tests have it.
pub const EXIT_PORT: u16 = 0xf4;
const EXIT_LAST: u16 = EXIT_PORT + 3;
const FW_CFG_SELECT: u16 = 0x510;
const FW_CFG_DATA: u16 = 0x511;
/// QEMU's `pc-testdev`.
const SCRATCH: u16 = 0xe0;
const SCRATCH_LAST: u16 = 0xe3;
const LINES: u16 = 0x2000;
const LINES_LAST: u16 = 0x2017;
const PM_TIMER_LAST: u16 = PM_TIMER_PORT + 3;

/// The rule for a port.
#[must_use]
pub const fn rule(port: u16, machine: Machine) -> PortRule {
    let special = match (machine.is_bare(), machine.is_legacy()) {
        (true, _) if let Some(rule) = bare(port) => Some(rule),
        (_, true) => legacy(port),
        _ => None,
    };
    match special {
        Some(rule) => rule,
        None if machine.has_hotplug() && is_in_block(port, CPU_HOTPLUG_PORT) => {
            PortRule::CpuHotplug(port - CPU_HOTPLUG_PORT)
        }
        None if machine.has_hotplug() && is_in_block(port, MEMORY_HOTPLUG_PORT) => {
            PortRule::MemoryHotplug(port - MEMORY_HOTPLUG_PORT)
        }
        None => common(port),
    }
}

const fn is_in_block(port: u16, first: u16) -> bool {
    port >= first && port - first < hotplug::LEN
}

/// What bare-metal programs expect.
const fn bare(port: u16) -> Option<PortRule> {
    Some(match port {
        EXIT_PORT..=EXIT_LAST => PortRule::Exit,
        FW_CFG_SELECT => PortRule::FwCfgSelect,
        FW_CFG_DATA => PortRule::FwCfgData,
        SCRATCH..=SCRATCH_LAST => PortRule::Scratch(port.to_le_bytes()[0] & 3),
        LINES..=LINES_LAST => PortRule::Line(port.to_le_bytes()[0]),
        _ => return None,
    })
}

/// A PC's old devices.
const fn legacy(port: u16) -> Option<PortRule> {
    Some(match port {
        0x20..=0x21 | 0xa0..=0xa1 | 0x4d0..=0x4d1 => PortRule::Pic(port),
        0x40..=0x43 | 0x61 => PortRule::Pit(port),
        0x70..=0x71 => PortRule::Clock(port.to_le_bytes()[0] & 1),
        PM_TIMER_PORT..=PM_TIMER_LAST => PortRule::PmTimer,
        _ => return None,
    })
}

const fn common(port: u16) -> PortRule {
    match port {
        COM1_PORT..=COM1_LAST => PortRule::Serial(port.to_le_bytes()[0] & 7),
        SLEEP_PORT => PortRule::SleepReset,
        KEYBOARD_COMMAND => PortRule::KeyboardReset,
        // DMA controllers and their page registers (0x80 also takes
        // power-on codes and serves as a delay).
        0x00..=0x0f | 0x80..=0x91 | 0x93..=0x9f | 0xc0..=0xdf => PortRule::Legacy,
        // Interrupt controllers, their mode switch and edge/level control.
        0x20..=0x23 | 0xa0..=0xa1 | 0x4d0..=0x4d1 => PortRule::Legacy,
        // Interval timer, speaker gate, keyboard data, fast A20 gate.
        0x40..=0x43 | 0x60..=0x61 | 0x92 => PortRule::Legacy,
        // CMOS memory and its clock.
        0x70..=0x77 => PortRule::Legacy,
        // The delay port that some code takes instead of 0x80.
        0xed => PortRule::Legacy,
        // Numeric coprocessor: clear busy, reset.
        0xf0..=0xf1 => PortRule::Legacy,
        // COM2, COM3, COM4.
        0x2f8..=0x2ff | 0x3e8..=0x3ef | 0x2e8..=0x2ef => PortRule::Legacy,
        // VGA.
        0x3b0..=0x3df => PortRule::Legacy,
        PCI_ADDRESS => PortRule::PciAddress,
        // Parts of the address register are other registers, of which we
        // have none.
        0xcf9..=0xcfb => PortRule::Legacy,
        PCI_DATA..=0xcff => PortRule::PciData(port.to_le_bytes()[0] & 3),
        _ => PortRule::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_image::Protocol;
    use vmm_shared::control::Platform;

    fn rule(port: u16) -> PortRule {
        super::rule(port, Machine::LINUX)
    }

    #[test]
    fn serial_registers_are_numbered_from_their_base() {
        assert_eq!(rule(0x3f8), PortRule::Serial(0));
        assert_eq!(rule(0x3fd), PortRule::Serial(5));
        assert_eq!(rule(0x3ff), PortRule::Serial(7));
        assert_ne!(rule(0x3f7), PortRule::Serial(7));
        assert_ne!(rule(0x400), PortRule::Serial(0));
    }

    #[test]
    fn ways_out_are_recognised() {
        assert_eq!(rule(0x600), PortRule::SleepReset);
        assert_eq!(rule(0x64), PortRule::KeyboardReset);
    }

    #[test]
    fn ports_of_a_stock_boot_are_not_counted() {
        // The ports that a stock kernel was seen to touch, without firmware.
        let seen = [
            0x21, 0xa1, 0x70, 0x71, 0x80, 0x3d4, 0x3d5, 0xf0, 0xf1, 0x2f9, 0x3e9, 0x2e9, 0xcfa,
            0xcfb,
        ];
        for port in seen {
            assert_eq!(rule(port), PortRule::Legacy, "port {port:#x}");
        }
    }

    #[test]
    fn most_ports_are_unknown() {
        for port in [0x601, 0x5ff, 0x510, 0x5658, 0x1f0, 0xffff] {
            assert_eq!(rule(port), PortRule::Unknown, "port {port:#x}");
        }
    }

    #[test]
    fn machines_have_what_they_are_for() {
        let bare = Machine {
            protocol: Protocol::Multiboot,
            ..Machine::LINUX
        };
        let legacy = Machine {
            platform: Platform::Legacy,
            ..bare
        };
        let both = [
            (0xf4, PortRule::Exit),
            (0x511, PortRule::FwCfgData),
            (0xe2, PortRule::Scratch(2)),
            (0x2017, PortRule::Line(23)),
            (0x3f8, PortRule::Serial(0)),
        ];
        for (port, expected) in both {
            assert_eq!(super::rule(port, bare), expected, "port {port:#x}");
            assert_eq!(super::rule(port, legacy), expected, "port {port:#x}");
        }
        for port in [0x20, 0xa1, 0x43, 0x61, 0x70] {
            assert_eq!(super::rule(port, bare), PortRule::Legacy, "port {port:#x}");
            assert_ne!(
                super::rule(port, legacy),
                PortRule::Legacy,
                "port {port:#x}"
            );
        }
        for (port, offset) in [(0x620, 0), (0x62f, 15)] {
            assert_eq!(rule(port), PortRule::CpuHotplug(offset));
            assert_eq!(super::rule(port, bare), PortRule::Unknown);
        }
        for (port, offset) in [(0x630, 0), (0x63f, 15)] {
            assert_eq!(rule(port), PortRule::MemoryHotplug(offset));
            assert_eq!(super::rule(port, bare), PortRule::Unknown);
        }
        assert_eq!(rule(0x640), PortRule::Unknown);
        assert_eq!(super::rule(PM_TIMER_PORT, bare), PortRule::Unknown);
        assert_eq!(super::rule(PM_TIMER_PORT, legacy), PortRule::PmTimer);
        assert_eq!(rule(0xf4), PortRule::Unknown);
    }
}
