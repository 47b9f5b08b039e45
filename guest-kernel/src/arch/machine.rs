//! The paravirtual machine as the kernel knows it.
#![expect(unsafe_code, reason = "saves and loads extended state")]

use alloc::rc::Rc;
use core::arch::x86_64::{_xrstor64, _xsave64};
use core::cell::Cell;

use vmm_shared::pv::Hypercall;

use super::{boot, cpu, entry};
use crate::machine::{Fpu, Machine, ns_per_tick};
use crate::mem::space::Flush;

const APIC_SPURIOUS: u32 = 0x80f;
const APIC_TIMER: u32 = 0x832;
const TSC_DEADLINE: u32 = 0x6e0;
const PV_END_OF_INTERRUPT: u32 = 0x4b56_4d04;
/// The controller is on, and its spurious interrupts have this vector.
const APIC_ON: u64 = 0x1ff;
/// The timer runs to a time of the TSC; its vector.
const TIMER_MODE: u64 = 2 << 17;
const TIMER_VECTOR: u64 = entry::TIMER_VECTOR as u64;

/// State of the one processor.
#[derive(Debug)]
struct State {
    tsc_khz: u32,
    components: u64,
    fpu_len: usize,
    /// The kernel's own page tables, and those that are loaded.
    model: u64,
    root: Cell<u64>,
    /// Whose extended state is loaded.
    owner: Cell<Option<u32>>,
    /// When the timer will interrupt, in ns.
    timer: Cell<Option<u64>>,
    /// State of the generator that helps out where the processor has none.
    seed: Cell<u64>,
}

/// The processor, shared by the kernel and the loop that runs it.
#[derive(Clone, Debug)]
pub(super) struct Hardware(Rc<State>);

impl Hardware {
    /// Switches on interrupt controller and timer.
    pub(super) fn new(tsc_khz: u32, components: u64, model: u64) -> Self {
        let len = raw_cpuid::CpuId::new()
            .get_extended_state_info()
            .map_or(576, |state| state.xsave_area_size_enabled_features());
        cpu::write_msr(APIC_SPURIOUS, APIC_ON);
        cpu::write_msr(APIC_TIMER, TIMER_MODE | TIMER_VECTOR);
        cpu::write_msr(PV_END_OF_INTERRUPT, boot::end_of_interrupt_word() | 1);
        Self(Rc::new(State {
            tsc_khz,
            components,
            fpu_len: usize::try_from(len).expect("64-bit").next_multiple_of(64),
            model,
            root: Cell::new(model),
            owner: Cell::new(None),
            timer: Cell::new(None),
            seed: Cell::new(cpu::ticks()),
        }))
    }

    /// Has the processor interrupted at a time in ns; a timer that would do
    /// so earlier is left alone, as each change costs an exit.
    pub(super) fn set_timer(&self, now: u64, at: Option<u64>) {
        let Some(at) = at else { return };
        if entry::take_timer() {
            self.0.timer.set(None);
        }
        let pending = self.0.timer.get().filter(|armed| *armed > now);
        if pending.is_some_and(|armed| armed <= at) {
            return;
        }
        // By the kernel's own scale, so that its clock has reached the time.
        let ticks = (u128::from(at) << 32) / u128::from(ns_per_tick(self.0.tsc_khz));
        let ticks = u64::try_from(ticks).unwrap_or(u64::MAX).saturating_add(2);
        self.0.timer.set(Some(at));
        cpu::write_msr(TSC_DEADLINE, ticks);
    }

    /// Loads page tables, unless they are loaded and need no flush.
    pub(super) fn load_tables(&self, root: u64, flush: &Flush) {
        if self.0.root.replace(root) != root || *flush == Flush::All {
            cpu::load_tables(root);
        } else if let Flush::Pages(pages) = flush {
            pages.iter().copied().for_each(cpu::forget_page);
        }
    }

    /// Loads a thread's extended state, if another's is loaded.
    pub(super) fn load_fpu(&self, tid: u32, fpu: &mut Fpu) {
        if self.0.owner.get() == Some(tid) {
            return;
        }
        // The owner's state was saved when it was last looked at.
        self.0.owner.set(Some(tid));
        // SAFETY: the area is aligned and has room for all components; its
        // header is as the processor or `Fpu::restore` has left it.
        unsafe { _xrstor64(fpu.0.as_ptr().cast(), self.0.components) };
    }
}

impl Machine for Hardware {
    fn ticks(&self) -> u64 {
        cpu::ticks()
    }

    fn ticks_khz(&self) -> u32 {
        self.0.tsc_khz
    }

    fn random(&mut self) -> u64 {
        cpu::random().unwrap_or_else(|| {
            // SplitMix64, stirred with the time.
            let state = &self.0.seed;
            state.set(state.get().wrapping_add(0x9e37_79b9_7f4a_7c15) ^ cpu::ticks());
            let mut word = state.get();
            word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            word ^ word >> 31
        })
    }

    fn ring_launcher(&mut self) {
        cpu::hypercall(Hypercall::RingLauncher);
    }

    fn fpu_len(&self) -> usize {
        self.0.fpu_len
    }

    fn fpu_mask(&self) -> u64 {
        self.0.components
    }

    fn save_fpu(&mut self, tid: u32, fpu: &mut Fpu) {
        if self.0.owner.get() == Some(tid) && fpu.0.len() * 64 >= self.0.fpu_len {
            // SAFETY: the area is aligned and has room for all components.
            unsafe { _xsave64(fpu.0.as_mut_ptr().cast(), self.0.components) };
        }
    }

    fn forget_fpu(&mut self, tid: u32) {
        if self.0.owner.get() == Some(tid) {
            self.0.owner.set(None);
        }
    }

    fn leave_tables(&mut self, root: u64) {
        if self.0.root.get() == root {
            self.0.root.set(self.0.model);
            cpu::load_tables(self.0.model);
        }
    }

    fn fpu_owner(&self) -> Option<u32> {
        self.0.owner.get()
    }

    fn hardware(&self) -> u64 {
        // SAFETY: every processor of this kind has CPUID.
        u64::from(core::arch::x86_64::__cpuid(1).edx)
    }

    fn heap_free(&self) -> usize {
        boot::heap_free()
    }
}
