//! A vCPU that is on its way from one core to another: all its state, in its
//! image in the control region.
//!
//! What belongs to a node is not in it: the addresses of its nested tables and
//! permission maps, the offset of its clock. A vCPU is saved between two
//! instructions of its guest, outside of the run loop's inner part, so nothing
//! is offered and nothing is being stepped.
//!
//! A peer may have written anything into an image. What it can do so to the
//! guest it can do to the guest's memory, too; but what a processor would
//! refuse is refused here.

use alloc::boxed::Box;

use vmm_shared::addr::{ApicId, Hpa, VcpuId};
use vmm_shared::control::VCPU_IMAGE_SIZE;
use vmm_shared::shm::SharedMem;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::lapic::Lapic;
use super::lapic::image::LapicImage;
use super::nmi::{NmiImage, NmiState};
use super::pv::PvState;
use super::registers::Registers;
use super::step::Step;
use super::{RunState, Vcpu};
use crate::arch::resident::{BadArea, Resident, XSAVE_SIZE, XsaveArea};
use crate::arch::svm::bitmaps::PermissionMaps;
use crate::arch::svm::vmcb::{Save, Vmcb};
use crate::platform::msr::StoredMsrs;
use crate::vm::Vm;

/// "VdVcpu" and the layout's version.
const MAGIC: u64 = u64::from_le_bytes(*b"VdVcpu\x02\0");

/// The image's layout.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Image {
    magic: u64,
    state: u32,
    unhalted: u32,
    gpr: [u64; 16],
    rip: u64,
    rflags: u64,
    dr7: u64,
    interrupt_shadow: u64,
    event_injection: u64,
    xcr0: u64,
    tsc_aux: u64,
    breakpoints: [u64; 4],
    nmi: NmiImage,
    pv: PvState,
    msrs: StoredMsrs,
    lapic: LapicImage,
    save: Save,
    xsave: [u8; XSAVE_SIZE],
}

const _: () = assert!(size_of::<Image>() <= VCPU_IMAGE_SIZE);

/// Why there can be no vCPU of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ImageError {
    /// It was not written by this version.
    #[error("it is no vCPU's image of this version")]
    Unknown,
    /// The processor would refuse it.
    #[error("{0}")]
    Extended(BadArea),
    /// The processor would refuse its XCR0.
    #[error("its XCR0 {0:#x} is illegal")]
    Xcr0(u64),
}

/// What is not in an image, since it is the VM's or the node's.
struct Surroundings {
    apic_id: ApicId,
    tsc_khz: u32,
    tsc_offset: u64,
    /// The extended state that the node's processors have.
    mask: u64,
    maps: PermissionMaps,
    root: Hpa,
}

impl Vcpu {
    /// Writes a vCPU that is in no core to its image.
    pub(super) fn store(&self, to: &SharedMem) {
        to.write_bytes(0, self.image().as_bytes())
            .expect("an image fits into its room");
    }

    fn image(&self) -> Box<Image> {
        let mut image = Image::new_box_zeroed().expect("the node's memory suffices for its vCPUs");
        image.magic = MAGIC;
        image.state = self.state as u32;
        image.unhalted = self.unhalted.into();
        image.gpr = self.registers.gpr;
        image.rip = self.registers.rip;
        image.rflags = self.registers.rflags;
        image.dr7 = self.dr7;
        image.interrupt_shadow = self.vmcb.control.interrupt_shadow;
        image.event_injection = self.vmcb.control.event_injection;
        image.xcr0 = self.resident.xcr0;
        image.tsc_aux = self.resident.tsc_aux.into();
        image.breakpoints = self.resident.breakpoints;
        image.nmi = self.nmi.image();
        image.pv = self.pv;
        image.msrs = self.msrs;
        image.lapic = self.lapic.image();
        image.save = self.vmcb.save.clone();
        image
            .xsave
            .copy_from_slice(self.resident.area.as_ref().as_bytes());
        image
    }

    /// The vCPU of an image, for a core of this node.
    pub(super) fn from_image(
        id: VcpuId,
        core: usize,
        vm: &Vm,
        (maps, root): (PermissionMaps, Hpa),
        from: &SharedMem,
    ) -> Result<Box<Self>, ImageError> {
        let mut image = Image::new_box_zeroed().expect("the node's memory suffices for its vCPUs");
        from.read_bytes(0, image.as_mut_bytes())
            .ok_or(ImageError::Unknown)?;
        let surroundings = Surroundings {
            apic_id: vm.apic_id(id),
            tsc_khz: vm.tsc_khz,
            tsc_offset: vm.tsc_offset,
            mask: vm.cpuid.supported_xcr0(),
            maps,
            root,
        };
        Self::of_image(id, core, &surroundings, &image)
    }

    fn of_image(
        id: VcpuId,
        core: usize,
        around: &Surroundings,
        image: &Image,
    ) -> Result<Box<Self>, ImageError> {
        let state = RunState::from_raw(image.state).filter(|_| image.magic == MAGIC);
        let state = state.ok_or(ImageError::Unknown)?;
        let mut area = XsaveArea::new_box_zeroed().expect("as above");
        area.as_mut_bytes().copy_from_slice(&image.xsave);
        area.check(around.mask).map_err(ImageError::Extended)?;
        if !super::handlers::is_legal_xcr0(image.xcr0, around.mask) {
            return Err(ImageError::Xcr0(image.xcr0));
        }
        let mut vmcb = Vmcb::new(around.maps, around.root, around.tsc_offset);
        vmcb.save = image.save.clone();
        vmcb.control.interrupt_shadow = image.interrupt_shadow;
        vmcb.control.event_injection = image.event_injection;
        let [tsc_aux, _] = [image.tsc_aux, image.tsc_aux >> 32]
            .map(|half| u32::try_from(half & 0xffff_ffff).expect("32 bits"));
        Ok(Box::new(Self {
            id,
            core,
            tables: 0,
            vmcb,
            registers: Registers {
                gpr: image.gpr,
                rip: image.rip,
                rflags: image.rflags,
            },
            lapic: Lapic::from_image(around.apic_id, around.tsc_khz, &image.lapic),
            pv: image.pv,
            msrs: image.msrs,
            resident: Resident {
                area,
                xcr0: image.xcr0,
                tsc_aux,
                breakpoints: image.breakpoints,
            },
            state,
            dr7: image.dr7,
            offered: None,
            must_load: true,
            unhalted: image.unhalted != 0,
            is_ordered: false,
            nmi: NmiState::from_image(&image.nmi),
            step: Step::default(),
        }))
    }
}

/// The image of the vCPU that these bytes are the image of, if they are one's.
#[cfg(any(test, feature = "testing"))]
#[must_use]
pub fn carry(bytes: &[u8]) -> Option<alloc::vec::Vec<u8>> {
    let image = Image::read_from_bytes(bytes).ok()?;
    let around = Surroundings {
        apic_id: ApicId(1),
        tsc_khz: 1_000_000,
        tsc_offset: 0,
        mask: 0xe7,
        maps: PermissionMaps {
            io: Hpa(0),
            msr: Hpa(0),
        },
        root: Hpa(0),
    };
    let vcpu = Vcpu::of_image(VcpuId(1), 0, &around, &image).ok()?;
    Some(vcpu.image().as_bytes().to_vec())
}

/// Bytes that are a vCPU's image, with `noise` where anything may stand.
#[cfg(any(test, feature = "testing"))]
#[must_use]
pub fn image_with(noise: &[u8]) -> alloc::vec::Vec<u8> {
    let mut image = Image::new_box_zeroed().expect("there is memory");
    let bytes = image.as_mut_bytes();
    let len = noise.len().min(bytes.len());
    bytes[..len].copy_from_slice(&noise[..len]);
    image.magic = MAGIC;
    image.state %= 3;
    image.xcr0 = 7;
    let area = Resident::default().area;
    image.xsave.copy_from_slice(area.as_ref().as_bytes());
    image.as_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    const LEN: usize = size_of::<Image>();

    /// All but the extended state, whose rules have their own test.
    const PLAIN: usize = LEN - XSAVE_SIZE;

    #[test]
    fn other_versions_and_other_lengths_are_no_images() {
        let image = image_with(&[]);
        assert!(carry(&image).is_some());
        assert_eq!(carry(&image[1..]), None);
        for byte in 0..8 {
            let mut other = image.clone();
            other[byte] ^= 1;
            assert_eq!(carry(&other), None, "byte {byte} of the magic");
        }
        let mut other = image;
        other[8] = 3;
        assert_eq!(carry(&other), None, "no state of a vCPU");
    }

    proptest! {
        #[test]
        fn what_was_carried_once_stays_as_it_is(noise in vec(any::<u8>(), PLAIN)) {
            let once = carry(&image_with(&noise)).expect("an image");
            prop_assert_eq!(carry(&once), Some(once));
        }

        #[test]
        fn registers_arrive_as_they_left(noise in vec(any::<u8>(), PLAIN)) {
            let left = Image::read_from_bytes(&image_with(&noise)).expect("its length");
            let arrived = carry(left.as_bytes()).expect("an image");
            let arrived = Image::read_from_bytes(&arrived).expect("its length");
            prop_assert_eq!(left.gpr, arrived.gpr);
            prop_assert_eq!((left.rip, left.rflags, left.dr7), (arrived.rip, arrived.rflags, arrived.dr7));
            prop_assert_eq!(left.event_injection, arrived.event_injection);
            prop_assert_eq!(left.interrupt_shadow, arrived.interrupt_shadow);
            prop_assert_eq!(left.breakpoints, arrived.breakpoints);
            prop_assert_eq!(left.pv.as_bytes(), arrived.pv.as_bytes());
            prop_assert_eq!(left.msrs, arrived.msrs);
            prop_assert_eq!(left.save.as_bytes(), arrived.save.as_bytes());
            prop_assert_eq!(&left.xsave[..], &arrived.xsave[..]);
        }

        #[test]
        fn flipped_bytes_lead_to_an_image_or_to_none(
            noise in vec(any::<u8>(), PLAIN),
            flips in vec((0..LEN, any::<u8>()), 0..8),
        ) {
            let mut bytes = image_with(&noise);
            for (at, byte) in flips {
                bytes[at] = byte;
            }
            if let Some(once) = carry(&bytes) {
                prop_assert_eq!(carry(&once), Some(once));
            }
        }
    }
}
