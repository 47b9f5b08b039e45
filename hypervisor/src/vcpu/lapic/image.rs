//! A local APIC as it is kept in a vCPU's image.

use vmm_shared::addr::ApicId;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{ApicBase, Lapic, VectorSet};

/// All of it that the guest can change.
#[derive(Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LapicImage {
    base: u64,
    icr: u64,
    deadline: u64,
    /// When the counting timer runs out, if it does.
    count_end: u64,
    counts: u32,
    logical: u32,
    model: u32,
    tpr: u32,
    spurious: u32,
    error_status: u32,
    error_latched: u32,
    divide: u32,
    initial_count: u32,
    lvt: [u32; 6],
    reserved: u32,
    irr: [u64; 4],
    isr: [u64; 4],
    tmr: [u64; 4],
}

impl Lapic {
    /// Its image.
    #[must_use]
    pub fn image(&self) -> LapicImage {
        LapicImage {
            base: self.base.value(),
            icr: self.icr,
            deadline: self.deadline,
            count_end: self.count_end.unwrap_or(0),
            counts: self.count_end.is_some().into(),
            logical: self.logical,
            model: self.model,
            tpr: self.tpr.into(),
            spurious: self.spurious,
            error_status: self.error_status,
            error_latched: self.error_latched,
            divide: self.divide,
            initial_count: self.initial_count,
            lvt: self.lvt,
            reserved: 0,
            irr: self.irr.0,
            isr: self.isr.0,
            tmr: self.tmr.0,
        }
    }

    /// The APIC of an image. Whatever the image holds, the APIC is one.
    #[must_use]
    pub fn from_image(id: ApicId, tsc_khz: u32, image: &LapicImage) -> Self {
        let [tpr, ..] = image.tpr.to_le_bytes();
        Self {
            id,
            tsc_khz,
            base: ApicBase(image.base),
            logical: image.logical,
            model: image.model,
            tpr,
            spurious: image.spurious,
            error_status: image.error_status,
            error_latched: image.error_latched,
            icr: image.icr,
            lvt: image.lvt,
            divide: image.divide,
            initial_count: image.initial_count,
            count_end: (image.counts != 0).then_some(image.count_end),
            deadline: image.deadline,
            irr: VectorSet(image.irr),
            isr: VectorSet(image.isr),
            tmr: VectorSet(image.tmr),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Mode, Role};
    use super::*;

    #[test]
    fn an_apic_comes_back_as_it_was() {
        let base = ApicBase::new(Role::Application, Mode::X2Apic);
        let mut apic = Lapic::new(ApicId(5), 1_000_000, base);
        for (register, value) in [
            (0x0f, 0x1ff),
            (0x08, 0x20),
            (0x32, 0x2_00ef),
            (0x3e, 0xb),
            (0x38, 5000),
        ] {
            apic.write_msr(register, value, 10).expect("legal");
        }
        apic.request_all([0, 1 << 40, 0, 1 << 20]);
        apic.accept(212);
        let there = Lapic::from_image(ApicId(5), 1_000_000, &apic.image());
        assert_eq!(there.image(), apic.image());
        assert_eq!(format!("{there:?}"), format!("{apic:?}"));
        apic.set_deadline(77);
        let there = Lapic::from_image(ApicId(5), 1_000_000, &apic.image());
        assert_eq!(there.next_timer(), apic.next_timer());
    }
}
