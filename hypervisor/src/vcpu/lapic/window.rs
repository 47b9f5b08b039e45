//! The registers as xAPIC mode has them: in a window in memory, 32 bits each
//! at multiples of 16.
//!
//! Nothing faults there. Reserved bits are dropped, and a register that does
//! not exist is an error for the error status register.

use vmm_shared::addr::{Gpa, PAGE_SIZE};

use super::{
    Destination, ERROR_ILLEGAL_REGISTER, ICR_LOGICAL, ICR_RESERVED, Lapic, LapicEffect, Mode,
    register,
};

/// Registers that only xAPIC mode has, or has in another form.
mod xapic {
    pub(super) const ARBITRATION: u8 = 0x09;
    pub(super) const REMOTE_READ: u8 = 0x0c;
    pub(super) const DESTINATION_FORMAT: u8 = 0x0e;
    pub(super) const ICR_HIGH: u8 = 0x31;
}

/// The id's place in the id, LDR and ICR registers.
const ID_SHIFT: u32 = 24;
const LOW_HALF: u64 = 0xffff_ffff;

impl Lapic {
    /// Where in the window an address is, if the window is open.
    #[must_use]
    pub fn window_offset(&self, gpa: Gpa) -> Option<u64> {
        let offset = gpa.0.checked_sub(self.base.window().0)?;
        (self.base.mode() == Mode::XApic && offset < PAGE_SIZE).then_some(offset)
    }

    /// Reads 32 bits at an offset in the window; `now` is the guest's TSC.
    pub fn read_window(&mut self, offset: u64, now: u64) -> u32 {
        let Some(register) = register_at(offset) else {
            return 0;
        };
        let value = match register {
            register::ID => Ok(u64::from(self.id.0) << ID_SHIFT),
            xapic::ARBITRATION | xapic::REMOTE_READ | register::EOI => Ok(0),
            register::LDR => Ok(self.logical.into()),
            xapic::DESTINATION_FORMAT => Ok(self.model.into()),
            xapic::ICR_HIGH => Ok(self.icr >> 32),
            _ => self.read(register, now),
        };
        let value = value.unwrap_or_else(|_| {
            self.error_latched |= ERROR_ILLEGAL_REGISTER;
            0
        });
        u32::try_from(value & LOW_HALF).expect("masked")
    }

    /// Writes 32 bits at an offset in the window; `now` is the guest's TSC.
    pub fn write_window(&mut self, offset: u64, value: u32, now: u64) -> LapicEffect {
        let Some(register) = register_at(offset) else {
            return LapicEffect::None;
        };
        let wide = u64::from(value);
        let done = match register {
            // The id follows from the topology.
            register::ID => return LapicEffect::None,
            register::EOI => return self.write_eoi(),
            register::LDR => {
                self.logical = value & 0xff << ID_SHIFT;
                return LapicEffect::Addressed;
            }
            xapic::DESTINATION_FORMAT => {
                self.model = value | 0x0fff_ffff;
                return LapicEffect::Addressed;
            }
            xapic::ICR_HIGH => {
                self.icr = self.icr & LOW_HALF | wide << 32;
                return LapicEffect::None;
            }
            register::ICR => {
                let [.., destination] = self.icr.to_le_bytes();
                let logical = wide & ICR_LOGICAL != 0;
                let destination = Destination::eight_bits(destination, logical);
                let command = self.icr & !LOW_HALF | wide & !ICR_RESERVED;
                return self.command(command, destination);
            }
            register::TPR => self.write(register, wide & 0xff, now),
            register::ERROR_STATUS => self.write(register, 0, now),
            _ => self.write(register, wide, now),
        };
        done.unwrap_or_else(|_| {
            self.error_latched |= ERROR_ILLEGAL_REGISTER;
            LapicEffect::None
        })
    }
}

/// The register that starts at an offset, if it is one of xAPIC mode.
fn register_at(offset: u64) -> Option<u8> {
    let register = u8::try_from(offset >> 4).ok()?;
    (offset.is_multiple_of(16) && register < register::SELF_IPI).then_some(register)
}
