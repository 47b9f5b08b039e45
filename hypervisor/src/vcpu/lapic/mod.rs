//! A vCPU's local APIC, in x2APIC mode from reset on.
//!
//! A register machine: writes return what is to be done, and only the run
//! loop does it. Time is the guest's TSC. Manual: AMD64 vol. 2, chapter 16.

use vmm_shared::addr::ApicId;

/// Ticks of the one-shot timer per second before division: 1 GHz.
const TIMER_HZ: u64 = 1_000_000_000;

const LVT_MASKED: u32 = 1 << 16;
const LVT_RESET: u32 = LVT_MASKED;
/// Integrated APIC, six local vector table entries.
const VERSION: u32 = 0x0005_0014;
const SOFTWARE_ENABLE: u32 = 1 << 8;
const SPURIOUS_RESET: u32 = 0xff;
const ERROR_ILLEGAL_VECTOR_SENT: u32 = 1 << 5;

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

/// Who an inter-processor interrupt is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// The one with this id.
    Physical(ApicId),
    /// Those of a cluster whose bits are set.
    Logical {
        /// Cluster: the id without its low four bits.
        cluster: u16,
        /// One bit per member.
        members: u16,
    },
    /// The sender.
    Myself,
    /// All, the sender too.
    All,
    /// All but the sender.
    Others,
}

impl Destination {
    /// Whether the APIC with this id is meant; `sender` sent it.
    #[must_use]
    pub fn includes(self, id: ApicId, sender: ApicId) -> bool {
        match self {
            Self::Physical(wanted) => wanted == id,
            Self::Logical { cluster, members } => {
                u32::from(cluster) == id.0 >> 4 && members & 1 << (id.0 & 15) != 0
            }
            Self::Myself => id == sender,
            Self::All => true,
            Self::Others => id != sender,
        }
    }
}

/// What an inter-processor interrupt does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// An interrupt, to everyone meant.
    Fixed(u8),
    /// An interrupt, to one of those meant.
    Lowest(u8),
    /// Reset.
    Init,
    /// Start-up at a real-mode page.
    StartUp(u8),
}

/// An inter-processor interrupt to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipi {
    /// Who it is for.
    pub destination: Destination,
    /// What it does.
    pub delivery: Delivery,
}

/// What is to be done after a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LapicEffect {
    /// Nothing.
    None,
    /// Send this.
    Send(Ipi),
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
    /// A local APIC after reset.
    #[must_use]
    pub fn new(id: ApicId, tsc_khz: u32) -> Self {
        Self {
            id,
            tsc_khz,
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
        }
    }

    /// This APIC's id.
    #[must_use]
    pub fn id(&self) -> ApicId {
        self.id
    }

    /// Back to the state after reset.
    pub fn reset(&mut self) {
        *self = Self::new(self.id, self.tsc_khz);
    }

    fn logical_id(&self) -> u32 {
        (self.id.0 >> 4) << 16 | 1 << (self.id.0 & 15)
    }

    /// Reads the register at MSR 0x800 + `register`; `now` is the guest's TSC.
    ///
    /// # Errors
    /// If there is no such register, or it can't be read.
    pub fn read(&self, register: u8, now: u64) -> Result<u64, IllegalAccess> {
        let value = match register {
            register::ID => self.id.0,
            register::VERSION => VERSION,
            register::TPR => self.tpr.into(),
            register::PPR => self.processor_priority().into(),
            register::LDR => self.logical_id(),
            register::SPURIOUS => self.spurious,
            register::ISR..=0x17 => self.isr.register(register - register::ISR),
            // Edge-triggered interrupts only: the trigger mode is never level.
            register::TMR..=0x1f => 0,
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

    /// Writes the register at MSR 0x800 + `register`; `now` is the guest's
    /// TSC.
    ///
    /// # Errors
    /// If there is no such register, it can't be written, or the value has
    /// bits that it doesn't have.
    pub fn write(
        &mut self,
        register: u8,
        value: u64,
        now: u64,
    ) -> Result<LapicEffect, IllegalAccess> {
        if register == register::ICR {
            return self.write_icr(value);
        }
        let value = u32::try_from(value).map_err(|_| IllegalAccess)?;
        match register {
            register::TPR => self.tpr = u8::try_from(value).map_err(|_| IllegalAccess)?,
            register::EOI if value == 0 => self.end_of_interrupt(),
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
        let before = self.timer_mode();
        let mask = if register == register::LVT_TIMER {
            0x0007_00ff
        } else {
            0x0001_a7ff
        };
        let masked = if self.is_enabled() { 0 } else { LVT_MASKED };
        self.lvt[usize::from(register - register::LVT_TIMER)] = value & mask | masked;
        if self.timer_mode() != before {
            self.count_end = None;
            self.deadline = 0;
        }
    }

    fn write_icr(&mut self, value: u64) -> Result<LapicEffect, IllegalAccess> {
        const LEVEL: u64 = 1 << 14;
        const LEVEL_TRIGGERED: u64 = 1 << 15;
        if value & 0xfff3_2000 != 0 {
            return Err(IllegalAccess);
        }
        self.icr = value;
        let [vector, ..] = value.to_le_bytes();
        let delivery = match value >> 8 & 7 {
            0 => Delivery::Fixed(vector),
            1 => Delivery::Lowest(vector),
            // INIT de-assert has no effect on any processor of this century.
            5 if value & LEVEL == 0 && value & LEVEL_TRIGGERED != 0 => {
                return Ok(LapicEffect::None);
            }
            5 => Delivery::Init,
            6 => Delivery::StartUp(vector),
            // SMI has no handler here, NMI no safe way in (no window exit).
            _ => return Ok(LapicEffect::None),
        };
        if matches!(delivery, Delivery::Fixed(0..=15) | Delivery::Lowest(0..=15)) {
            self.error_latched |= ERROR_ILLEGAL_VECTOR_SENT;
            return Ok(LapicEffect::None);
        }
        Ok(LapicEffect::Send(Ipi {
            destination: destination(value),
            delivery,
        }))
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
        self.isr.insert(vector);
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
    pub fn end_of_interrupt(&mut self) {
        if let Some(vector) = self.isr.highest() {
            self.isr.remove(vector);
        }
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

fn destination(icr: u64) -> Destination {
    const LOGICAL: u64 = 1 << 11;
    match icr >> 18 & 3 {
        1 => return Destination::Myself,
        2 => return Destination::All,
        3 => return Destination::Others,
        _ => {}
    }
    let [.., a, b, c, d] = icr.to_le_bytes();
    match u32::from_le_bytes([a, b, c, d]) {
        u32::MAX => Destination::All,
        _ if icr & LOGICAL != 0 => Destination::Logical {
            cluster: u16::from_le_bytes([c, d]),
            members: u16::from_le_bytes([a, b]),
        },
        id => Destination::Physical(ApicId(id)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KHZ: u32 = 2_000_000;

    fn enabled(id: u32) -> Lapic {
        let mut lapic = Lapic::new(ApicId(id), KHZ);
        lapic.write(register::SPURIOUS, 0x1ff, 0).expect("legal");
        lapic
    }

    #[test]
    fn a_disabled_apic_takes_no_interrupts() {
        let mut lapic = Lapic::new(ApicId(0), KHZ);
        lapic.request(0x40);
        lapic.request_all([0, 1, 0, 0]);
        assert_eq!(lapic.deliverable(), None);
    }

    #[test]
    fn a_higher_class_interrupts_and_a_lower_one_waits() {
        let mut lapic = enabled(0);
        lapic.request(0x31);
        lapic.request(0x45);
        assert_eq!(lapic.deliverable(), Some(0x45));
        lapic.accept(0x45);
        assert_eq!(lapic.deliverable(), None);
        lapic.request(0x4f);
        assert_eq!(lapic.deliverable(), None, "same class");
        lapic.request(0x51);
        assert_eq!(lapic.deliverable(), Some(0x51));
        lapic.accept(0x51);
        lapic.end_of_interrupt();
        lapic.end_of_interrupt();
        assert_eq!(lapic.deliverable(), Some(0x4f));
    }

    #[test]
    fn the_task_priority_holds_back_its_class_and_below() {
        let mut lapic = enabled(0);
        lapic.request(0x31);
        lapic.set_cr8(3);
        assert_eq!(lapic.read(register::TPR, 0), Ok(0x30));
        assert_eq!(lapic.deliverable(), None);
        lapic.set_cr8(2);
        assert_eq!(lapic.deliverable(), Some(0x31));
    }

    #[test]
    fn vectors_show_in_their_registers() {
        let mut lapic = enabled(0);
        lapic.request(0x31);
        lapic.request(0xef);
        assert_eq!(lapic.read(register::IRR + 1, 0), Ok(1 << 17));
        assert_eq!(lapic.read(register::IRR + 7, 0), Ok(1 << 15));
        lapic.accept(0xef);
        assert_eq!(lapic.read(register::ISR + 7, 0), Ok(1 << 15));
        assert_eq!(lapic.read(register::IRR + 7, 0), Ok(0));
    }

    #[test]
    fn the_deadline_timer_fires_once_at_its_time() {
        let mut lapic = enabled(0);
        lapic.write(register::LVT_TIMER, 0x400ec, 0).expect("legal");
        lapic.set_deadline(1000);
        lapic.run_timer(999);
        assert_eq!(lapic.deliverable(), None);
        assert_eq!(lapic.next_timer(), Some(1000));
        lapic.run_timer(1000);
        assert_eq!(lapic.deliverable(), Some(0xec));
        assert_eq!((lapic.deadline(), lapic.next_timer()), (0, None));
    }

    #[test]
    fn a_masked_timer_runs_out_silently() {
        let mut lapic = enabled(0);
        lapic.write(register::LVT_TIMER, 0x500ec, 0).expect("legal");
        lapic.set_deadline(1);
        lapic.run_timer(2);
        assert_eq!((lapic.deliverable(), lapic.next_timer()), (None, None));
    }

    #[test]
    fn the_counting_timer_keeps_its_period() {
        let mut lapic = enabled(0);
        lapic.write(register::LVT_TIMER, 0x200ec, 0).expect("legal");
        lapic.write(register::DIVIDE, 0b1011, 0).expect("legal");
        // 1,000 ticks of 1 ns are 2,000 TSC ticks at 2 GHz.
        lapic
            .write(register::INITIAL_COUNT, 1000, 500)
            .expect("legal");
        assert_eq!(lapic.next_timer(), Some(2500));
        assert_eq!(lapic.read(register::CURRENT_COUNT, 1500), Ok(500));
        lapic.run_timer(2600);
        assert_eq!(lapic.next_timer(), Some(4500));
        lapic.run_timer(9000);
        assert_eq!(
            lapic.next_timer(),
            Some(10_500),
            "missed periods are dropped"
        );
    }

    #[test]
    fn the_divider_slows_the_count() {
        let mut lapic = enabled(0);
        lapic.write(register::DIVIDE, 0b0011, 0).expect("legal");
        lapic.write(register::INITIAL_COUNT, 100, 0).expect("legal");
        assert_eq!(lapic.next_timer(), Some(3200), "divided by 16");
    }

    #[test]
    fn commands_name_their_destinations() {
        let mut lapic = enabled(1);
        let mut send = |icr| match lapic.write(register::ICR, icr, 0) {
            Ok(LapicEffect::Send(ipi)) => ipi,
            other => panic!("{icr:#x} gives {other:?}"),
        };
        let ipi = send(0x3_0000_00fd);
        assert_eq!(ipi.delivery, Delivery::Fixed(0xfd));
        assert!(ipi.destination.includes(ApicId(3), ApicId(1)));
        assert!(!ipi.destination.includes(ApicId(2), ApicId(1)));

        let logical = send(0x0001_0005_0000_08fd).destination;
        assert!(logical.includes(ApicId(16), ApicId(1)) && logical.includes(ApicId(18), ApicId(1)));
        assert!(
            !logical.includes(ApicId(17), ApicId(1)) && !logical.includes(ApicId(0), ApicId(1))
        );

        let others = send(0xc_00fd).destination;
        assert!(others.includes(ApicId(0), ApicId(1)) && !others.includes(ApicId(1), ApicId(1)));
        assert_eq!(send(0x2_0000_4500).delivery, Delivery::Init);
        assert_eq!(send(0x2_0000_4608).delivery, Delivery::StartUp(8));
    }

    #[test]
    fn illegal_accesses_fault() {
        let mut lapic = enabled(0);
        assert_eq!(lapic.write(register::ID, 1, 0), Err(IllegalAccess));
        assert_eq!(lapic.write(register::EOI, 1, 0), Err(IllegalAccess));
        assert_eq!(lapic.write(register::TPR, 0x100, 0), Err(IllegalAccess));
        assert_eq!(
            lapic.write(register::SPURIOUS, 1 << 32, 0),
            Err(IllegalAccess)
        );
        assert_eq!(lapic.write(0x7f, 0, 0), Err(IllegalAccess));
        assert_eq!(lapic.read(register::EOI, 0), Err(IllegalAccess));
        assert_eq!(lapic.read(register::SELF_IPI, 0), Err(IllegalAccess));
    }

    #[test]
    fn a_vector_below_16_is_an_error_and_is_not_sent() {
        let mut lapic = enabled(0);
        assert_eq!(lapic.write(register::ICR, 0x0f, 0), Ok(LapicEffect::None));
        lapic.write(register::ERROR_STATUS, 0, 0).expect("legal");
        assert_eq!(
            lapic.read(register::ERROR_STATUS, 0),
            Ok(ERROR_ILLEGAL_VECTOR_SENT.into())
        );
    }
}
