//! APIC_BASE: which mode the local APIC is in, and where its window is.
//!
//! Manual: AMD64 vol. 2, 16.3.1 and 16.9.

use vmm_shared::addr::Gpa;

use super::IllegalAccess;
use crate::platform::layout::LAPIC_BASE;

const BOOT_CPU: u64 = 1 << 8;
const X2APIC: u64 = 1 << 10;
const ENABLE: u64 = 1 << 11;
const RESERVED: u64 = 0xff | 1 << 9;
const ADDRESS: u64 = !0xfff;

/// How the local APIC is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Not at all.
    Disabled,
    /// Through a window in memory.
    XApic,
    /// Through MSRs.
    X2Apic,
}

/// Which of the VM's processors this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The one that boots.
    Boot,
    /// One that is started by another.
    Application,
}

/// The contents of APIC_BASE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApicBase(pub(super) u64);

impl ApicBase {
    /// In this mode, with the window at its usual place.
    #[must_use]
    pub const fn new(role: Role, mode: Mode) -> Self {
        let role = match role {
            Role::Boot => BOOT_CPU,
            Role::Application => 0,
        };
        let mode = match mode {
            Mode::Disabled => 0,
            Mode::XApic => ENABLE,
            Mode::X2Apic => ENABLE | X2APIC,
        };
        Self(LAPIC_BASE.0 | role | mode)
    }

    /// What a read of the MSR gives.
    #[must_use]
    pub const fn value(self) -> u64 {
        self.0
    }

    /// The mode.
    #[must_use]
    pub const fn mode(self) -> Mode {
        match (self.0 & ENABLE != 0, self.0 & X2APIC != 0) {
            (false, _) => Mode::Disabled,
            (true, false) => Mode::XApic,
            (true, true) => Mode::X2Apic,
        }
    }

    /// Which processor this is.
    #[must_use]
    pub const fn role(self) -> Role {
        match self.0 & BOOT_CPU {
            0 => Role::Application,
            _ => Role::Boot,
        }
    }

    /// Where the window starts.
    #[must_use]
    pub const fn window(self) -> Gpa {
        Gpa(self.0 & ADDRESS)
    }

    /// The contents after a write; `physical_bits` is the width of physical
    /// addresses.
    ///
    /// # Errors
    /// Reserved bits are set, it says who else boots, or the mode can't follow the present one.
    pub const fn written(self, value: u64, physical_bits: u32) -> Result<Self, IllegalAccess> {
        let role_changes = (value ^ self.0) & BOOT_CPU != 0;
        if value & RESERVED != 0 || value >> physical_bits != 0 || role_changes {
            return Err(IllegalAccess);
        }
        let new = Self(value);
        if value & X2APIC != 0 && value & ENABLE == 0 {
            return Err(IllegalAccess);
        }
        match (self.mode(), new.mode()) {
            (Mode::Disabled, Mode::X2Apic) | (Mode::X2Apic, Mode::XApic) => Err(IllegalAccess),
            _ => Ok(new),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BITS: u32 = 40;

    #[test]
    fn modes_follow_each_other_as_the_manual_says() {
        let modes = [Mode::Disabled, Mode::XApic, Mode::X2Apic];
        let forbidden = [(Mode::Disabled, Mode::X2Apic), (Mode::X2Apic, Mode::XApic)];
        for from in modes {
            for to in modes {
                let base = ApicBase::new(Role::Boot, from);
                let wanted = ApicBase::new(Role::Boot, to);
                let result = base.written(wanted.value(), BITS);
                let legal = !forbidden.contains(&(from, to));
                assert_eq!(result.is_ok(), legal, "{from:?} to {to:?}");
            }
        }
    }

    #[test]
    fn reserved_bits_and_x2apic_alone_fault() {
        let base = ApicBase::new(Role::Application, Mode::XApic);
        for bits in [1, 0x80, BOOT_CPU, 1 << 9, 1 << BITS, 1 << 63] {
            assert_eq!(base.written(base.value() | bits, BITS), Err(IllegalAccess));
        }
        assert_eq!(base.written(0xfee0_0400, BITS), Err(IllegalAccess));
    }

    #[test]
    fn the_window_moves_and_the_role_does_not() {
        let base = ApicBase::new(Role::Application, Mode::XApic);
        let moved = base.written(0xfed4_0800, BITS).expect("legal");
        assert_eq!(moved.window(), Gpa(0xfed4_0000));
        assert_eq!(
            (moved.role(), moved.mode()),
            (Role::Application, Mode::XApic)
        );
    }
}
