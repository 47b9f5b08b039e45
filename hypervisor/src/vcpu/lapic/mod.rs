//! A vCPU's local APIC, as xAPIC and as x2APIC.
//!
//! A register machine: writes return what is to be done, and only the run
//! loop does it. Time is the guest's TSC. Manual: AMD64 vol. 2, chapter 16.

mod base;
pub mod image;
mod ipi;
#[cfg(test)]
mod tests;
mod window;

pub use base::{ApicBase, Mode, Role};
pub use ipi::{Delivery, Destination, Ipi, LogicalAddress, Target};

use vmm_shared::addr::ApicId;

/// Ticks of the one-shot timer per second before division: 1 GHz.
const TIMER_HZ: u64 = 1_000_000_000;

const LVT_MASKED: u32 = 1 << 16;
const LVT_RESET: u32 = LVT_MASKED;
const LVT_MODE: u32 = 7 << 8;
/// Delivery mode of external interrupts, not masked.
const LVT_EXTERNAL: u32 = 7 << 8;
/// The local interrupt pin that they come in by.
const LINT0: usize = 3;
/// Integrated APIC, six local vector table entries.
const VERSION: u32 = 0x0005_0014;
const SOFTWARE_ENABLE: u32 = 1 << 8;
const SPURIOUS_RESET: u32 = 0xff;
const ERROR_ILLEGAL_VECTOR_SENT: u32 = 1 << 5;
const ERROR_ILLEGAL_REGISTER: u32 = 1 << 7;
/// Bits of the ICR that x2APIC mode doesn't have.
const ICR_RESERVED: u64 = 0xfff3_2000;
/// The destination is a logical one.
const ICR_LOGICAL: u64 = 1 << 11;
/// DFR: flat model.
const FLAT_MODEL: u32 = u32::MAX;

/// The interrupt command register's number.
pub const ICR: u8 = 0x30;

mod register {
    pub(super) const ID: u8 = 0x02;
    pub(super) const VERSION: u8 = 0x03;
    pub(super) const TPR: u8 = 0x08;
    pub(super) const PPR: u8 = 0x0a;
    pub(super) const EOI: u8 = 0x0b;
    pub(super) const LDR: u8 = 0x0d;
    pub(super) const SPURIOUS: u8 = 0x0f;
    pub(super) const ISR: u8 = 0x10;
    pub(super) const TMR: u8 = 0x18;
    pub(super) const IRR: u8 = 0x20;
    pub(super) const ERROR_STATUS: u8 = 0x28;
    pub(super) use super::ICR;
    pub(super) const LVT_TIMER: u8 = 0x32;
    pub(super) const LVT_LAST: u8 = 0x37;
    pub(super) const INITIAL_COUNT: u8 = 0x38;
    pub(super) const CURRENT_COUNT: u8 = 0x39;
    pub(super) const DIVIDE: u8 = 0x3e;
    pub(super) const SELF_IPI: u8 = 0x3f;
}

/// An access that raises #GP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IllegalAccess;

/// What is to be done after a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LapicEffect {
    /// Nothing.
    None,
    /// Send this.
    Send(Ipi),
    /// An interrupt with this vector has been ended.
    Ended(u8),
    /// The APIC has got another logical address.
    Addressed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TimerMode {
    OneShot,
    Periodic,
    Deadline,
}

/// The state of one local APIC.
#[derive(Clone, Debug)]
pub struct Lapic {
    id: ApicId,
    tsc_khz: u32,
    base: ApicBase,
    /// LDR and DFR of xAPIC mode.
    logical: u32,
    model: u32,
    tpr: u8,
    spurious: u32,
    error_status: u32,
    error_latched: u32,
    icr: u64,
    lvt: [u32; 6],
    divide: u32,
    initial_count: u32,
    /// When the counting timer runs out, in guest TSC ticks.
    count_end: Option<u64>,
    /// The deadline timer's MSR: guest TSC ticks, 0 if not set.
    deadline: u64,
    irr: VectorSet,
    isr: VectorSet,
    /// Those of the last of each vector that was level-triggered.
    tmr: VectorSet,
}

/// A set of interrupt vectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct VectorSet([u64; 4]);

impl VectorSet {
    fn insert(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] |= 1 << (vector & 63);
    }

    fn remove(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] &= !(1 << (vector & 63));
    }

    fn highest(&self) -> Option<u8> {
        (0_u8..4).rev().find_map(|word| {
            let bits = self.0[usize::from(word)];
            let top = bits.checked_ilog2()?;
            Some(word * 64 + u8::try_from(top).expect("below 64"))
        })
    }

    /// The 32 bits that an ISR, TMR or IRR register shows.
    fn register(&self, index: u8) -> u32 {
        let word = self.0[usize::from(index >> 1)];
        let [a, b, c, d, e, f, g, h] = word.to_le_bytes();
        match index & 1 {
            0 => u32::from_le_bytes([a, b, c, d]),
            _ => u32::from_le_bytes([e, f, g, h]),
        }
    }
}

impl Lapic {
    /// A local APIC after reset, with this in APIC_BASE.
    #[must_use]
    pub fn new(id: ApicId, tsc_khz: u32, base: ApicBase) -> Self {
        Self {
            id,
            tsc_khz,
            base,
            logical: 0,
            model: FLAT_MODEL,
            tpr: 0,
            spurious: SPURIOUS_RESET,
            error_status: 0,
            error_latched: 0,
            icr: 0,
            lvt: [LVT_RESET; 6],
            divide: 0,
            initial_count: 0,
            count_end: None,
            deadline: 0,
            irr: VectorSet::default(),
            isr: VectorSet::default(),
            tmr: VectorSet::default(),
        }
    }

    /// This APIC's id.
    #[must_use]
    pub fn id(&self) -> ApicId {
        self.id
    }

    /// Back to the state after reset; the mode stays.
    pub fn reset(&mut self) {
        *self = Self::new(self.id, self.tsc_khz, self.base);
    }

    /// APIC_BASE.
    #[must_use]
    pub const fn base(&self) -> ApicBase {
        self.base
    }

    /// Writes APIC_BASE. Switched off, the APIC forgets everything.
    ///
    /// # Errors
    /// As [`ApicBase::written`].
    pub fn set_base(&mut self, value: u64, physical_bits: u32) -> Result<(), IllegalAccess> {
        self.base = self.base.written(value, physical_bits)?;
        if self.base.mode() == Mode::Disabled {
            self.reset();
        }
        Ok(())
    }

    /// How the APIC understands logical destinations.
    #[must_use]
    pub const fn logical_address(&self) -> LogicalAddress {
        let [.., own] = self.logical.to_le_bytes();
        match self.base.mode() {
            Mode::Disabled => LogicalAddress::Off,
            Mode::X2Apic => LogicalAddress::FromId,
            Mode::XApic if self.model == FLAT_MODEL => LogicalAddress::Flat(own),
            Mode::XApic => LogicalAddress::Cluster(own),
        }
    }

    const fn logical_id(&self) -> u32 {
        (self.id.0 >> 4) << 16 | 1 << (self.id.0 & 15)
    }

    /// Reads MSR 0x800 + `register`; `now` is the guest's TSC.
    ///
    /// # Errors
    /// If the APIC is not in x2APIC mode, there is no such register, or it
    /// can't be read.
    pub fn read_msr(&self, register: u8, now: u64) -> Result<u64, IllegalAccess> {
        match self.base.mode() {
            Mode::X2Apic => self.read(register, now),
            _ => Err(IllegalAccess),
        }
    }

    /// Writes MSR 0x800 + `register`; `now` is the guest's TSC.
    ///
    /// # Errors
    /// If the APIC is not in x2APIC mode, there is no such register, it can't
    /// be written, or the value has bits that it doesn't have.
    pub fn write_msr(
        &mut self,
        register: u8,
        value: u64,
        now: u64,
    ) -> Result<LapicEffect, IllegalAccess> {
        match self.base.mode() {
            Mode::X2Apic => self.write(register, value, now),
            _ => Err(IllegalAccess),
        }
    }

    fn read(&self, register: u8, now: u64) -> Result<u64, IllegalAccess> {
        let value = match register {
            register::ID => self.id.0,
            register::VERSION => VERSION,
            register::TPR => self.tpr.into(),
            register::PPR => self.processor_priority().into(),
            register::LDR => self.logical_id(),
            register::SPURIOUS => self.spurious,
            register::ISR..=0x17 => self.isr.register(register - register::ISR),
            register::TMR..=0x1f => self.tmr.register(register - register::TMR),
            register::IRR..=0x27 => self.irr.register(register - register::IRR),
            register::ERROR_STATUS => self.error_status,
            register::ICR => return Ok(self.icr),
            register::LVT_TIMER..=register::LVT_LAST => {
                self.lvt[usize::from(register - register::LVT_TIMER)]
            }
            register::INITIAL_COUNT => self.initial_count,
            register::CURRENT_COUNT => self.current_count(now),
            register::DIVIDE => self.divide,
            _ => return Err(IllegalAccess),
        };
        Ok(value.into())
    }

    fn write(&mut self, register: u8, value: u64, now: u64) -> Result<LapicEffect, IllegalAccess> {
        if register == register::ICR {
            return self.write_icr(value);
        }
        let value = u32::try_from(value).map_err(|_| IllegalAccess)?;
        match register {
            register::TPR => self.tpr = u8::try_from(value).map_err(|_| IllegalAccess)?,
            register::EOI if value == 0 => return Ok(self.write_eoi()),
            register::SPURIOUS => {
                self.spurious = value & 0x1ff;
                if !self.is_enabled() {
                    self.lvt.iter_mut().for_each(|entry| *entry |= LVT_MASKED);
                }
            }
            register::ERROR_STATUS if value == 0 => {
                self.error_status = core::mem::take(&mut self.error_latched);
            }
            register::LVT_TIMER..=register::LVT_LAST => self.write_lvt(register, value),
            register::INITIAL_COUNT => {
                self.initial_count = value;
                self.count_end = match (value, self.timer_mode()) {
                    (0, _) | (_, TimerMode::Deadline) => None,
                    _ => Some(now.saturating_add(self.count_to_tsc(value))),
                };
            }
            register::DIVIDE => self.divide = value & 0b1011,
            register::SELF_IPI => {
                let vector = u8::try_from(value).map_err(|_| IllegalAccess)?;
                let destination = Destination::Myself;
                return Ok(LapicEffect::Send(Ipi {
                    destination,
                    delivery: Delivery::Fixed(vector),
                }));
            }
            _ => return Err(IllegalAccess),
        }
        Ok(LapicEffect::None)
    }

    fn write_lvt(&mut self, register: u8, value: u32) {
        let counts = |mode| mode != TimerMode::Deadline;
        let counted = counts(self.timer_mode());
        let mask = if register == register::LVT_TIMER {
            0x0007_00ff
        } else {
            0x0001_a7ff
        };
        let masked = if self.is_enabled() { 0 } else { LVT_MASKED };
        self.lvt[usize::from(register - register::LVT_TIMER)] = value & mask | masked;
        // Between one-shot and periodic the count goes on.
        if counts(self.timer_mode()) != counted {
            self.count_end = None;
            self.deadline = 0;
        }
    }

    fn write_icr(&mut self, value: u64) -> Result<LapicEffect, IllegalAccess> {
        if value & ICR_RESERVED != 0 {
            return Err(IllegalAccess);
        }
        let [.., a, b, c, d] = value.to_le_bytes();
        let high = u32::from_le_bytes([a, b, c, d]);
        let destination = Destination::x2apic(high, value & ICR_LOGICAL != 0);
        Ok(self.command(value, destination))
    }

    /// Carries out what has been written to the ICR.
    fn command(&mut self, value: u64, destination: Destination) -> LapicEffect {
        const LEVEL: u64 = 1 << 14;
        const LEVEL_TRIGGERED: u64 = 1 << 15;
        self.icr = value;
        let destination = match value >> 18 & 3 {
            1 => Destination::Myself,
            2 => Destination::All,
            3 => Destination::Others,
            _ => destination,
        };
        let [vector, ..] = value.to_le_bytes();
        let delivery = match value >> 8 & 7 {
            0 => Delivery::Fixed(vector),
            1 => Delivery::Lowest(vector),
            // INIT de-assert has no effect on any processor of this century.
            5 if value & LEVEL == 0 && value & LEVEL_TRIGGERED != 0 => {
                return LapicEffect::None;
            }
            4 => Delivery::Nmi,
            5 => Delivery::Init,
            6 => Delivery::StartUp(vector),
            // SMI has no handler here.
            _ => return LapicEffect::None,
        };
        if matches!(delivery, Delivery::Fixed(0..=15) | Delivery::Lowest(0..=15)) {
            self.error_latched |= ERROR_ILLEGAL_VECTOR_SENT;
            return LapicEffect::None;
        }
        LapicEffect::Send(Ipi {
            destination,
            delivery,
        })
    }

    fn write_eoi(&mut self) -> LapicEffect {
        match self.end_of_interrupt() {
            Some(vector) => LapicEffect::Ended(vector),
            None => LapicEffect::None,
        }
    }

    /// Whether the guest has switched the APIC on.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.spurious & SOFTWARE_ENABLE != 0
    }

    /// CR8: bits 7:4 of the task priority.
    #[must_use]
    pub fn cr8(&self) -> u8 {
        self.tpr >> 4
    }

    /// Takes over what the guest wrote to CR8.
    pub fn set_cr8(&mut self, cr8: u8) {
        if cr8 != self.cr8() {
            self.tpr = cr8 << 4;
        }
    }

    fn processor_priority(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= in_service {
            self.tpr
        } else {
            in_service
        }
    }

    /// Requests an interrupt.
    pub fn request(&mut self, vector: u8) {
        if self.is_enabled() && vector >= 16 {
            self.irr.insert(vector);
        }
    }

    /// Requests all interrupts of a bitmap.
    pub fn request_all(&mut self, vectors: [u64; 4]) {
        if vectors == [0; 4] || !self.is_enabled() {
            return;
        }
        for (word, more) in self.irr.0.iter_mut().zip(vectors) {
            *word |= more;
        }
        self.irr.0[0] &= !0xffff;
    }

    /// The interrupt to take now, if its priority allows.
    #[must_use]
    pub fn deliverable(&self) -> Option<u8> {
        let vector = self.irr.highest()?;
        (vector & 0xf0 > self.processor_priority() & 0xf0).then_some(vector)
    }

    /// Whether anything is requested that has not been accepted.
    #[must_use]
    pub fn has_requests(&self) -> bool {
        self.irr != VectorSet::default()
    }

    /// Moves an interrupt from requested to in service.
    pub fn accept(&mut self, vector: u8) {
        self.irr.remove(vector);
        self.tmr.remove(vector);
        self.isr.insert(vector);
    }

    /// As [`accept`](Self::accept), for one that a level-triggered pin sent.
    pub fn accept_level(&mut self, vector: u8) {
        self.accept(vector);
        self.tmr.insert(vector);
    }

    /// Lets the old interrupt controllers through, as firmware does.
    pub fn open_external(&mut self) {
        self.lvt[LINT0] = LVT_EXTERNAL;
    }

    /// Whether the old interrupt controllers' interrupts get through.
    #[must_use]
    pub fn passes_external(&self) -> bool {
        let open = self.lvt[LINT0] & (LVT_MASKED | LVT_MODE) == LVT_EXTERNAL;
        open || self.base.mode() == Mode::Disabled
    }

    /// Moves an accepted interrupt whose delivery failed back to requested.
    pub fn put_back(&mut self, vector: u8) {
        self.isr.remove(vector);
        self.irr.insert(vector);
    }

    /// Whether `vector` is all that is requested and nothing is in service, so
    /// that the guest may end it without telling.
    #[must_use]
    pub fn is_only(&self, vector: u8) -> bool {
        let mut others = self.irr;
        others.remove(vector);
        others == VectorSet::default() && self.isr == VectorSet::default()
    }

    /// Ends the interrupt in service with the highest priority.
    pub fn end_of_interrupt(&mut self) -> Option<u8> {
        let vector = self.isr.highest()?;
        self.isr.remove(vector);
        Some(vector)
    }

    fn timer_mode(&self) -> TimerMode {
        match self.lvt[0] >> 17 & 3 {
            0 => TimerMode::OneShot,
            1 => TimerMode::Periodic,
            _ => TimerMode::Deadline,
        }
    }

    fn divisor_shift(&self) -> u32 {
        let code = self.divide & 3 | self.divide >> 1 & 4;
        (code + 1) & 7
    }

    fn count_to_tsc(&self, count: u32) -> u64 {
        let ticks = u128::from(count) << self.divisor_shift();
        let tsc = ticks * u128::from(self.tsc_khz) * 1000 / u128::from(TIMER_HZ);
        u64::try_from(tsc).unwrap_or(u64::MAX).max(1)
    }

    fn current_count(&self, now: u64) -> u32 {
        let Some(end) = self.count_end else { return 0 };
        let left = u128::from(end.saturating_sub(now)) * u128::from(TIMER_HZ)
            / (u128::from(self.tsc_khz) * 1000);
        u32::try_from(left >> self.divisor_shift()).unwrap_or(u32::MAX)
    }

    /// The deadline MSR as the guest reads it.
    #[must_use]
    pub fn deadline(&self) -> u64 {
        self.deadline
    }

    /// Writes the deadline MSR: guest TSC ticks, 0 disarms. Has no effect in
    /// another timer mode.
    pub fn set_deadline(&mut self, deadline: u64) {
        if self.timer_mode() == TimerMode::Deadline {
            self.deadline = deadline;
        }
    }

    /// When the timer will fire next, in guest TSC ticks.
    #[must_use]
    pub fn next_timer(&self) -> Option<u64> {
        match self.timer_mode() {
            TimerMode::Deadline => (self.deadline != 0).then_some(self.deadline),
            _ => self.count_end,
        }
    }

    /// Requests the timer's interrupt if its time has come.
    pub fn run_timer(&mut self, now: u64) {
        if self.next_timer().is_none_or(|due| due > now) {
            return;
        }
        match self.timer_mode() {
            TimerMode::Deadline => self.deadline = 0,
            TimerMode::OneShot => self.count_end = None,
            TimerMode::Periodic => {
                // Periods that were missed are not made up for.
                let period = self.count_to_tsc(self.initial_count);
                let due = self.count_end.unwrap_or(now);
                let missed = (now - due) / period;
                self.count_end = Some(due + (missed + 1) * period);
            }
        }
        let [vector, ..] = self.lvt[0].to_le_bytes();
        if self.lvt[0] & LVT_MASKED == 0 {
            self.request(vector);
        }
    }
}
