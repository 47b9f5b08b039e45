//! A PC's old devices, as the VM has them: their ports, their time, and the
//! interrupts that they send past the local APICs.
//!
//! All of it happens on the devices' node, which also runs vCPU 0, the one
//! that the interrupt controllers are wired to.

use vmm_shared::addr::VcpuId;

use super::{DOORBELL_VCPU, Vm};
use crate::devices::legacy::clock::Clock;
use crate::devices::legacy::pic::Pic;
use crate::devices::legacy::pit::Pit;
use crate::devices::legacy::pm_timer;
use crate::devices::{IrqLevel, Width};
use crate::platform::layout::GSI_TIMER;
use crate::platform::ports::PortRule;

/// Interrupt lines that the old controllers have.
const PIC_LINES: u32 = 16;
const TIMER_IRQ: u8 = 0;

/// The devices behind one lock.
#[derive(Clone, Debug, Default)]
pub(super) struct Legacy {
    pic: Pic,
    pit: Pit,
    clock: Clock,
}

impl Vm {
    /// Time since the guest's clock started, in ns.
    fn now_ns(&self) -> u64 {
        let ns = u128::from(self.guest_tsc()) * 1_000_000 / u128::from(self.tsc_khz);
        u64::try_from(ns).unwrap_or(u64::MAX)
    }

    /// Reads one of their ports; a wider access than a byte reads the byte,
    /// but for the ACPI timer's.
    pub(super) fn legacy_in(&self, rule: PortRule, width: Width) -> u64 {
        let now = self.now_ns();
        let mut devices = self.legacy.lock();
        let byte = match rule {
            PortRule::Pic(port) => devices.pic.read(port),
            PortRule::Pit(port) => devices.pit.read(port, now),
            PortRule::Clock(1) => devices.clock.read(self.boot_wall_ns.saturating_add(now)),
            PortRule::PmTimer => return u64::from(pm_timer(now)) & width.mask(),
            _ => 0xff,
        };
        byte.into()
    }

    /// Writes one of their ports.
    pub(super) fn legacy_out(&self, rule: PortRule, value: u8) {
        let now = self.now_ns();
        let mut devices = self.legacy.lock();
        let concerns_vcpu = match rule {
            PortRule::Pic(port) => {
                devices.pic.write(port, value);
                devices.pic.pending().is_some()
            }
            PortRule::Pit(port) => devices.pit.write(port, value, now),
            PortRule::Clock(0) => {
                devices.clock.select(value);
                false
            }
            PortRule::Clock(_) => {
                devices.clock.write(value);
                false
            }
            _ => false,
        };
        drop(devices);
        if concerns_vcpu {
            self.nudge(DOORBELL_VCPU);
        }
    }

    /// Passes the level of an interrupt line on to the old controllers.
    pub(super) fn set_legacy_line(&self, gsi: u32, level: IrqLevel) {
        if !self.machine.is_legacy() || gsi >= PIC_LINES {
            return;
        }
        let [irq, ..] = gsi.to_le_bytes();
        let mut devices = self.legacy.lock();
        devices.pic.set_line(irq, level);
        let pending = devices.pic.pending().is_some();
        drop(devices);
        if pending {
            self.nudge(DOORBELL_VCPU);
        }
    }

    /// When a device of `vcpu`'s has something to do, in guest TSC ticks.
    #[must_use]
    pub fn next_tick(&self, vcpu: VcpuId) -> Option<u64> {
        if !self.machine.is_legacy() || vcpu != DOORBELL_VCPU {
            return None;
        }
        let ns = self.legacy.lock().pit.next_tick()?;
        let ticks = (u128::from(ns) * u128::from(self.tsc_khz)).div_ceil(1_000_000);
        u64::try_from(ticks).ok()
    }

    /// Does what is due.
    pub fn run_ticks(&self, vcpu: VcpuId) {
        if !self.machine.is_legacy() || vcpu != DOORBELL_VCPU {
            return;
        }
        let now = self.now_ns();
        let mut devices = self.legacy.lock();
        if !devices.pit.take_tick(now) {
            return;
        }
        // An edge on both controllers, whatever the output looks like by now.
        devices.pic.set_line(TIMER_IRQ, IrqLevel::Deasserted);
        devices.pic.set_line(TIMER_IRQ, IrqLevel::Asserted);
        drop(devices);
        self.pulse(GSI_TIMER);
    }

    /// The vector that the old controllers have for `vcpu`, if they have one.
    #[must_use]
    pub fn external_interrupt(&self, vcpu: VcpuId) -> Option<u8> {
        if !self.machine.is_legacy() || vcpu != DOORBELL_VCPU {
            return None;
        }
        self.legacy.lock().pic.pending()
    }

    /// Tells them that it has been taken.
    pub fn acknowledge_external(&self) {
        self.legacy.lock().pic.acknowledge();
    }
}
