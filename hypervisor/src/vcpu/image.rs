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

use vmm_shared::addr::{Hpa, VcpuId};
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

impl Vcpu {
    /// Writes a vCPU that is in no core to its image.
    pub(super) fn store(&self, to: &SharedMem) {
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
        to.write_bytes(0, image.as_bytes())
            .expect("an image fits into its room");
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
        let state = RunState::from_raw(image.state).filter(|_| image.magic == MAGIC);
        let state = state.ok_or(ImageError::Unknown)?;
        let mask = vm.cpuid.supported_xcr0();
        let mut area = XsaveArea::new_box_zeroed().expect("as above");
        area.as_mut_bytes().copy_from_slice(&image.xsave);
        area.check(mask).map_err(ImageError::Extended)?;
        if !super::handlers::is_legal_xcr0(image.xcr0, mask) {
            return Err(ImageError::Xcr0(image.xcr0));
        }
        let mut vmcb = Vmcb::new(maps, root, vm.tsc_offset);
        vmcb.save = image.save;
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
            lapic: Lapic::from_image(vm.apic_id(id), vm.tsc_khz, &image.lapic),
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
