//! The virtual machine control block.
//!
//! Layout: AMD64 Architecture Programmer's Manual vol. 2, appendix B.

use core::mem::offset_of;

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// A segment register with its hidden part.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Descriptor bits 55:52 and 47:40.
    pub attributes: u16,
    /// Limit in bytes, already scaled.
    pub limit: u32,
    /// Base.
    pub base: u64,
}

/// The control area: what to intercept, what to inject, why the guest exited.
#[derive(Debug, FromZeros)]
#[repr(C)]
#[expect(missing_docs, reason = "the fields are the manual's")]
pub struct Control {
    pub intercept_cr: u32,
    pub intercept_dr: u32,
    pub intercept_exceptions: u32,
    pub intercept_misc1: u32,
    pub intercept_misc2: u32,
    pub intercept_misc3: u32,
    reserved_018: [u8; 0x24],
    pub pause_filter_threshold: u16,
    pub pause_filter_count: u16,
    pub iopm_base: u64,
    pub msrpm_base: u64,
    pub tsc_offset: u64,
    pub asid: u32,
    pub tlb_control: u32,
    pub v_intr: u64,
    pub interrupt_shadow: u64,
    pub exit_code: u64,
    pub exit_info_1: u64,
    pub exit_info_2: u64,
    pub exit_int_info: u64,
    pub nested_control: u64,
    reserved_098: [u8; 0x10],
    pub event_injection: u64,
    pub nested_cr3: u64,
    pub lbr_control: u64,
    pub clean_bits: u64,
    pub next_rip: u64,
    pub fetched_len: u8,
    pub fetched: [u8; 15],
    reserved_0e0: [u8; 0x320],
}

/// The state save area.
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[expect(missing_docs, reason = "the fields are the manual's")]
pub struct Save {
    pub es: Segment,
    pub cs: Segment,
    pub ss: Segment,
    pub ds: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub gdtr: Segment,
    pub ldtr: Segment,
    pub idtr: Segment,
    pub tr: Segment,
    reserved_0a0: [u8; 0x2b],
    pub cpl: u8,
    reserved_0cc: [u8; 4],
    pub efer: u64,
    reserved_0d8: [u8; 0x70],
    pub cr4: u64,
    pub cr3: u64,
    pub cr0: u64,
    pub dr7: u64,
    pub dr6: u64,
    pub rflags: u64,
    pub rip: u64,
    reserved_180: [u8; 0x58],
    pub rsp: u64,
    pub s_cet: u64,
    pub ssp: u64,
    pub isst_addr: u64,
    pub rax: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub cr2: u64,
    reserved_248: [u8; 0x20],
    pub g_pat: u64,
    pub dbgctl: u64,
    reserved_278: [u8; 0x988],
}

/// One page that describes a vCPU to the processor.
#[derive(Debug, FromZeros)]
#[repr(C, align(4096))]
pub struct Vmcb {
    /// Control area.
    pub control: Control,
    /// State save area.
    pub save: Save,
}

const _: () = assert!(size_of::<Vmcb>() == 4096);
const _: () = assert!(offset_of!(Control, iopm_base) == 0x40);
const _: () = assert!(offset_of!(Control, v_intr) == 0x60);
const _: () = assert!(offset_of!(Control, exit_code) == 0x70);
const _: () = assert!(offset_of!(Control, event_injection) == 0xa8);
const _: () = assert!(offset_of!(Control, next_rip) == 0xc8);
const _: () = assert!(offset_of!(Vmcb, save) == 0x400);
const _: () = assert!(offset_of!(Save, cpl) == 0xcb);
const _: () = assert!(offset_of!(Save, efer) == 0xd0);
const _: () = assert!(offset_of!(Save, cr4) == 0x148);
const _: () = assert!(offset_of!(Save, rip) == 0x178);
const _: () = assert!(offset_of!(Save, rsp) == 0x1d8);
const _: () = assert!(offset_of!(Save, rax) == 0x1f8);
const _: () = assert!(offset_of!(Save, cr2) == 0x240);
const _: () = assert!(offset_of!(Save, g_pat) == 0x268);

pub use self::bits::{Misc1, Misc2, VIntr};

#[expect(missing_docs, reason = "the names are the manual's")]
mod bits {
    bitflags::bitflags! {
        /// Intercepts of the word at offset 0x0c.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct Misc1: u32 {
            const INTR = 1 << 0;
            const NMI = 1 << 1;
            const SMI = 1 << 2;
            const INIT = 1 << 3;
            const RDPMC = 1 << 15;
            const IRET = 1 << 20;
            const CPUID = 1 << 18;
            const RSM = 1 << 19;
            const INVD = 1 << 22;
            const PAUSE = 1 << 23;
            const HLT = 1 << 24;
            const INVLPGA = 1 << 26;
            const IOIO = 1 << 27;
            const MSR = 1 << 28;
            const TASK_SWITCH = 1 << 29;
            const FERR_FREEZE = 1 << 30;
            const SHUTDOWN = 1 << 31;
        }

        /// Intercepts of the word at offset 0x10.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct Misc2: u32 {
            const VMRUN = 1 << 0;
            const VMMCALL = 1 << 1;
            const VMLOAD = 1 << 2;
            const VMSAVE = 1 << 3;
            const STGI = 1 << 4;
            const CLGI = 1 << 5;
            const SKINIT = 1 << 6;
            const ICEBP = 1 << 8;
            const WBINVD = 1 << 9;
            const MONITOR = 1 << 10;
            const MWAIT = 1 << 11;
            const MWAIT_ARMED = 1 << 12;
            const XSETBV = 1 << 13;
            const RDPRU = 1 << 14;
        }

        /// The virtual interrupt word at offset 0x60, without V_TPR.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct VIntr: u64 {
            const V_IRQ = 1 << 8;
            const V_IGN_TPR = 1 << 20;
            const V_INTR_MASKING = 1 << 24;
        }
    }
}

/// V_TPR within the virtual interrupt word: bits 3:0 are CR8.
pub const V_TPR_MASK: u64 = 0xf;

/// Flush everything on the next VMRUN.
pub const TLB_FLUSH_ALL: u32 = 1;
/// Nested paging on.
pub const NESTED_PAGING: u64 = 1;
/// The guest may not take an interrupt yet: STI or MOV SS came last.
pub const SHADOW: u64 = 1;
