//! A vCPU's state in its VMCB: what reset, start-up and boot set, and what
//! the next entry delivers.

use alloc::boxed::Box;

use vmm_shared::addr::Hpa;
use zerocopy::FromZeros;

use super::bitmaps::PermissionMaps;
use super::vmcb::{
    Misc1, Misc2, NESTED_PAGING, SHADOW, Segment, TLB_FLUSH_ALL, V_TPR_MASK, VIntr, Vmcb,
};
use crate::arch::cpu;
use crate::loader::{BareEntry, CODE_SELECTOR, DATA_SELECTOR, LinuxEntry};
use crate::mem::walk::PagingState;
use crate::vcpu::decode::{Bitness, StringSegment};
use crate::vcpu::exit::Exception;
use crate::vcpu::registers::{Gpr, Registers};

/// Must be set while a guest runs; hidden from it.
pub const EFER_SVME: u64 = 1 << 12;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const CR0_RESET: u64 = 0x6000_0010;
const CR0_PROTECTED: u64 = 0x11;
const CR0_LONG_MODE: u64 = 0x8000_0011;
const CR4_PAE: u64 = 1 << 5;
const RFLAGS_RESET: u64 = 2;
const RFLAGS_IF: u64 = 1 << 9;
const DR6_RESET: u64 = 0xffff_0ff0;
const DR6_STEP: u64 = 1 << 14;
const DR7_RESET: u64 = 0x400;
const PAT_RESET: u64 = 0x0007_0406_0007_0406;

const V_PRIORITY_SHIFT: u32 = 16;
const V_VECTOR_SHIFT: u32 = 32;
/// What an offer doesn't change: V_TPR and the masking mode.
const V_INTR_KEPT: u64 = V_TPR_MASK | VIntr::V_INTR_MASKING.bits();

/// Writes of CR8.
const INTERCEPT_CR8_WRITE: u32 = 1 << 24;
/// Reads and writes of DR7.
const INTERCEPT_DR7: u32 = 1 << 7 | 1 << 23;

const EVENT_VALID: u64 = 1 << 31;
const EVENT_HAS_ERROR: u64 = 1 << 11;
const EVENT_NMI: u64 = 2 << 8;
const NMI_VECTOR: u64 = 2;
const EVENT_EXCEPTION: u64 = 3 << 8;
const EVENT_SOFTWARE: u64 = 4 << 8;
/// The first vector that is no exception's.
const FIRST_INTERRUPT: u8 = 32;
const EVENT_TYPE: u64 = 7 << 8;

/// #DB, #AC and #MC: a guest that made them recur without end would never let
/// go of the core, or they are the host's business.
const INTERCEPTED_EXCEPTIONS: u32 = 1 << 1 | 1 << 17 | 1 << 18;

/// What has become of an exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Injection {
    /// The next entry delivers it, or the double fault that it has led to.
    Done,
    /// It is one too many: the vCPU shuts down.
    TripleFault,
}

impl Vmcb {
    /// A block for a new vCPU, in the state after reset.
    #[must_use]
    pub fn new(maps: PermissionMaps, nested_root: Hpa, tsc_offset: u64) -> Box<Self> {
        let mut vmcb = Self::new_box_zeroed().expect("the node's memory suffices for its vCPUs");
        let control = &mut vmcb.control;
        control.intercept_exceptions = INTERCEPTED_EXCEPTIONS;
        if cpu::leaks_breakpoints() {
            control.intercept_dr = INTERCEPT_DR7;
        }
        control.intercept_misc1 = (Misc1::INTR
            | Misc1::NMI
            | Misc1::SMI
            | Misc1::INIT
            | Misc1::RDPMC
            | Misc1::CPUID
            | Misc1::RSM
            | Misc1::INVD
            | Misc1::HLT
            | Misc1::INVLPGA
            | Misc1::IOIO
            | Misc1::MSR
            | Misc1::SHUTDOWN)
            .bits();
        control.intercept_misc2 = (Misc2::VMRUN
            | Misc2::VMMCALL
            | Misc2::VMLOAD
            | Misc2::VMSAVE
            | Misc2::STGI
            | Misc2::CLGI
            | Misc2::SKINIT
            | Misc2::WBINVD
            | Misc2::MONITOR
            | Misc2::MWAIT
            | Misc2::MWAIT_ARMED
            | Misc2::XSETBV
            | Misc2::RDPRU)
            .bits();
        control.iopm_base = maps.io.0;
        control.msrpm_base = maps.msr.0;
        control.tsc_offset = tsc_offset;
        control.asid = 1;
        control.tlb_control = TLB_FLUSH_ALL;
        control.v_intr = VIntr::V_INTR_MASKING.bits();
        control.nested_control = NESTED_PAGING;
        control.nested_cr3 = nested_root.0;
        vmcb
    }

    /// The state after INIT, about to execute at real-mode page `page`.
    pub fn start_at_page(&mut self, registers: &mut Registers, page: u8) {
        *registers = Registers {
            rflags: RFLAGS_RESET,
            ..Registers::default()
        };
        let data = Segment {
            selector: 0,
            attributes: 0x93,
            limit: 0xffff,
            base: 0,
        };
        let table = Segment {
            selector: 0,
            attributes: 0,
            limit: 0xffff,
            base: 0,
        };
        let save = &mut self.save;
        save.cs = Segment {
            selector: u16::from(page) << 8,
            attributes: 0x9b,
            limit: 0xffff,
            base: u64::from(page) << 12,
        };
        (save.ds, save.es, save.fs, save.gs, save.ss) = (data, data, data, data, data);
        (save.gdtr, save.idtr) = (table, table);
        save.ldtr = Segment {
            attributes: 0x82,
            ..table
        };
        save.tr = Segment {
            attributes: 0x8b,
            ..table
        };
        save.cpl = 0;
        save.efer = EFER_SVME;
        (save.cr0, save.cr2, save.cr3, save.cr4) = (CR0_RESET, 0, 0, 0);
        (save.dr6, save.dr7) = (DR6_RESET, DR7_RESET);
        save.g_pat = PAT_RESET;
        self.control.interrupt_shadow = 0;
        self.control.event_injection = 0;
        self.control.exit_int_info = 0;
        self.withdraw_offer();
    }

    /// The state that Linux's 64-bit boot protocol asks for.
    pub fn start_linux(&mut self, registers: &mut Registers, entry: &LinuxEntry) {
        self.start_at_page(registers, 0);
        let data = Segment {
            selector: DATA_SELECTOR,
            attributes: 0xc93,
            limit: u32::MAX,
            base: 0,
        };
        let save = &mut self.save;
        save.cs = Segment {
            selector: CODE_SELECTOR,
            attributes: 0xa9b,
            limit: u32::MAX,
            base: 0,
        };
        (save.ds, save.es, save.fs, save.gs, save.ss) = (data, data, data, data, data);
        save.gdtr.base = entry.gdt.base;
        save.gdtr.limit = entry.gdt.limit.into();
        save.cr0 = CR0_LONG_MODE;
        save.cr3 = entry.cr3;
        save.cr4 = CR4_PAE;
        save.efer = EFER_SVME | EFER_LME | EFER_LMA;
        registers.rip = entry.rip;
        registers.set(Gpr::Rsi, entry.rsi);
        registers.set(Gpr::Rsp, entry.rsp);
    }

    /// The state that multiboot and PVH ask for. They leave GDTR and the
    /// selectors open.
    pub fn start_bare(&mut self, registers: &mut Registers, entry: &BareEntry) {
        self.start_at_page(registers, 0);
        let segment = |selector, attributes| Segment {
            selector,
            attributes,
            limit: u32::MAX,
            base: 0,
        };
        let data = segment(DATA_SELECTOR, 0xc93);
        let save = &mut self.save;
        save.cs = segment(CODE_SELECTOR, 0xc9b);
        (save.ds, save.es, save.fs, save.gs, save.ss) = (data, data, data, data, data);
        save.cr0 = CR0_PROTECTED;
        registers.rip = entry.eip.into();
        registers.set(Gpr::Rax, entry.eax.into());
        registers.set(Gpr::Rbx, entry.ebx.into());
    }

    /// How the guest's addresses are translated now.
    #[must_use]
    pub fn paging(&self, registers: &Registers) -> PagingState {
        PagingState {
            cr0: self.save.cr0,
            cr3: self.save.cr3,
            cr4: self.save.cr4,
            efer: self.save.efer & !EFER_SVME,
            rflags: registers.rflags,
        }
    }

    /// The size of the guest's code now.
    #[must_use]
    pub fn bitness(&self) -> Bitness {
        const LONG: u16 = 1 << 9;
        const DEFAULT_32: u16 = 1 << 10;
        match self.save.cs.attributes {
            attributes if self.save.efer & EFER_LMA != 0 && attributes & LONG != 0 => {
                Bitness::Bits64
            }
            attributes if attributes & DEFAULT_32 != 0 => Bitness::Bits32,
            _ => Bitness::Bits16,
        }
    }

    /// The linear address of the next instruction.
    #[must_use]
    pub fn linear_rip(&self, registers: &Registers) -> u64 {
        match self.bitness() {
            Bitness::Bits64 => registers.rip,
            // Segmented addresses wrap at 4 GiB.
            _ => self.save.cs.base.wrapping_add(registers.rip) & 0xffff_ffff,
        }
    }

    /// A segment that is not switched by VMLOAD.
    #[must_use]
    pub fn segment(&self, segment: StringSegment) -> Segment {
        match segment {
            StringSegment::Es => self.save.es,
            StringSegment::Cs => self.save.cs,
            StringSegment::Ss => self.save.ss,
            StringSegment::Ds => self.save.ds,
        }
    }

    /// The guest's privilege level, 0 to 3.
    #[must_use]
    pub fn cpl(&self) -> u8 {
        self.save.cpl
    }

    /// Whether the guest could take an interrupt right now.
    #[must_use]
    pub fn is_interruptible(&self, registers: &Registers) -> bool {
        registers.rflags & RFLAGS_IF != 0 && !self.is_in_shadow() && !self.has_event()
    }

    /// Where the instruction behind the one that exited starts, on processors
    /// that tell: others leave the field at 0.
    #[must_use]
    pub fn next_rip(&self) -> Option<u64> {
        Some(self.control.next_rip).filter(|next| *next != 0)
    }

    /// Whether the instruction before keeps interrupts away from the next.
    #[must_use]
    pub fn is_in_shadow(&self) -> bool {
        self.control.interrupt_shadow & SHADOW != 0
    }

    /// Delivers a non-maskable interrupt at the next entry.
    pub fn inject_nmi(&mut self) {
        self.control.event_injection = EVENT_VALID | EVENT_NMI | NMI_VECTOR;
    }

    /// Chooses whether IRET exits.
    pub fn intercept_iret(&mut self, exits: bool) {
        switch(&mut self.control.intercept_misc1, Misc1::IRET.bits(), exits);
    }

    /// Takes back the single step that DR6 tells of.
    pub fn forget_step(&mut self) {
        self.save.dr6 &= !DR6_STEP;
    }

    /// Makes the next entry forget all translations.
    pub fn drop_translations(&mut self) {
        self.control.tlb_control = TLB_FLUSH_ALL;
    }

    /// Lets the next entry use what it remembers.
    pub fn keep_translations(&mut self) {
        self.control.tlb_control = 0;
    }

    /// Keeps interrupts away from the next instruction.
    pub fn begin_shadow(&mut self) {
        self.control.interrupt_shadow |= SHADOW;
    }

    /// Ends the shadow of STI or MOV SS: an instruction has been completed.
    pub fn end_shadow(&mut self) {
        self.control.interrupt_shadow &= !SHADOW;
    }

    /// Puts back the event whose delivery the last exit interrupted. Software
    /// interrupts are not put back: RIP is still at their instruction.
    ///
    /// QEMU calls an interrupt that it was about to deliver itself an
    /// exception, and refuses to inject it as one.
    pub fn requeue_interrupted_event(&mut self) {
        let mut event = self.control.exit_int_info;
        let [vector, ..] = event.to_le_bytes();
        if event & EVENT_TYPE == EVENT_EXCEPTION && vector >= FIRST_INTERRUPT {
            event &= !EVENT_TYPE;
        }
        let kind = event & EVENT_TYPE;
        let software = kind == EVENT_SOFTWARE || kind == EVENT_EXCEPTION && matches!(vector, 3 | 4);
        self.control.event_injection = if event & EVENT_VALID != 0 && !software {
            event
        } else {
            0
        };
    }

    /// The interrupt that is to be delivered at the next entry, if one is.
    #[must_use]
    pub fn queued_interrupt(&self) -> Option<u8> {
        let event = self.control.event_injection;
        let [vector, ..] = event.to_le_bytes();
        (event & (EVENT_VALID | EVENT_TYPE) == EVENT_VALID).then_some(vector)
    }

    /// Takes it back.
    pub fn take_queued_interrupt(&mut self) -> Option<u8> {
        let vector = self.queued_interrupt()?;
        self.control.event_injection = 0;
        Some(vector)
    }

    /// Whether the next entry delivers something: what the last exit cut off
    /// in the middle of its delivery, before anything else is chosen.
    #[must_use]
    pub fn has_event(&self) -> bool {
        self.control.event_injection & EVENT_VALID != 0
    }

    /// Delivers an exception at the next entry. One that meets another
    /// becomes a double fault, and one that meets that a triple fault.
    pub fn inject_exception(&mut self, exception: Exception) -> Injection {
        let pending = self.control.event_injection;
        let [pending_vector, ..] = pending.to_le_bytes();
        let meets_exception = self.has_event() && pending & EVENT_TYPE == EVENT_EXCEPTION;
        let exception = match pending_vector {
            _ if !meets_exception => exception,
            vector if vector == Exception::DF.vector => return Injection::TripleFault,
            _ => Exception::DF,
        };
        let error = match exception.error {
            Some(error) => EVENT_HAS_ERROR | u64::from(error) << 32,
            None => 0,
        };
        self.control.event_injection =
            EVENT_VALID | EVENT_EXCEPTION | u64::from(exception.vector) | error;
        Injection::Done
    }

    /// Delivers an interrupt at the next entry.
    pub fn inject_interrupt(&mut self, vector: u8) {
        self.control.event_injection = EVENT_VALID | u64::from(vector);
    }

    /// Lets the processor deliver an interrupt as soon as the guest can take
    /// it, without an exit.
    pub fn offer_interrupt(&mut self, vector: u8) {
        let priority = u64::from(vector >> 4) << V_PRIORITY_SHIFT;
        let offer = VIntr::V_IRQ.bits() | priority | u64::from(vector) << V_VECTOR_SHIFT;
        self.control.v_intr = self.control.v_intr & V_INTR_KEPT | offer;
    }

    /// The same for one that no task priority holds back.
    pub fn offer_external(&mut self, vector: u8) {
        self.offer_interrupt(vector);
        self.control.v_intr |= VIntr::V_IGN_TPR.bits();
    }

    /// Takes the offer back.
    pub fn withdraw_offer(&mut self) {
        self.control.v_intr &= V_INTR_KEPT;
    }

    /// Whether what was offered has not been delivered yet.
    #[must_use]
    pub fn is_offer_open(&self) -> bool {
        self.control.v_intr & VIntr::V_IRQ.bits() != 0
    }

    /// Whether the guest's writes of CR8 end its run.
    pub fn intercept_cr8_writes(&mut self, intercept: bool) {
        switch(
            &mut self.control.intercept_cr,
            INTERCEPT_CR8_WRITE,
            intercept,
        );
    }

    /// CR8 as the guest left it.
    #[must_use]
    pub fn cr8(&self) -> u8 {
        let [tpr, ..] = (self.control.v_intr & V_TPR_MASK).to_le_bytes();
        tpr
    }

    /// Shows the guest another CR8.
    pub fn set_cr8(&mut self, cr8: u8) {
        self.control.v_intr = self.control.v_intr & !V_TPR_MASK | u64::from(cr8) & V_TPR_MASK;
    }
}

fn switch(word: &mut u32, bit: u32, on: bool) {
    *word = if on { *word | bit } else { *word & !bit };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exceptions_that_meet_become_a_double_and_then_a_triple_fault() {
        let mut vmcb = Vmcb::new_box_zeroed().expect("memory");
        assert_eq!(vmcb.inject_exception(Exception::UD), Injection::Done);
        assert_eq!(
            vmcb.control.event_injection,
            EVENT_VALID | EVENT_EXCEPTION | 6
        );
        assert_eq!(vmcb.inject_exception(Exception::GP), Injection::Done);
        let double = EVENT_VALID | EVENT_EXCEPTION | EVENT_HAS_ERROR | 8;
        assert_eq!(vmcb.control.event_injection, double);
        assert_eq!(vmcb.inject_exception(Exception::GP), Injection::TripleFault);
    }

    #[test]
    fn only_events_that_would_be_lost_are_put_back() {
        let mut vmcb = Vmcb::new_box_zeroed().expect("memory");
        for (interrupted, kept) in [
            (EVENT_VALID | 0x31, true),
            (EVENT_VALID | EVENT_EXCEPTION | 14, true),
            (EVENT_VALID | EVENT_EXCEPTION | 3, false),
            (EVENT_VALID | EVENT_SOFTWARE | 0x80, false),
            (0x31, false),
        ] {
            vmcb.control.exit_int_info = interrupted;
            vmcb.requeue_interrupted_event();
            assert_eq!(vmcb.has_event(), kept, "{interrupted:#x}");
        }
        for kind in [0, EVENT_EXCEPTION] {
            vmcb.control.exit_int_info = EVENT_VALID | kind | 0x31;
            vmcb.requeue_interrupted_event();
            assert_eq!(vmcb.take_queued_interrupt(), Some(0x31));
            assert!(!vmcb.has_event());
        }
    }

    #[test]
    fn an_offer_keeps_the_task_priority() {
        let mut vmcb = Vmcb::new_box_zeroed().expect("memory");
        vmcb.control.v_intr = VIntr::V_INTR_MASKING.bits();
        vmcb.set_cr8(5);
        vmcb.offer_interrupt(0xec);
        assert_eq!(vmcb.control.v_intr, 0xec_010e_0105);
        assert!(vmcb.is_offer_open());
        vmcb.withdraw_offer();
        assert_eq!((vmcb.control.v_intr, vmcb.cr8()), (0x0100_0005, 5));
    }
}
