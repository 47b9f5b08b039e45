//! The paravirtual machine as the kernel knows it.
#![expect(unsafe_code, reason = "saves and loads extended state")]

use alloc::boxed::Box;
use core::arch::x86_64::{_xrstor64, _xsave64};
use core::cell::Cell;
use core::sync::atomic::{AtomicU32, Ordering};

use vmm_shared::pv::{self, Hypercall};

use super::{boot, cpu, entry, losses};
use crate::machine::{Fpu, Machine, ns_per_tick};
use crate::mem::space::Flush;
use crate::sched::CpuSet;

const APIC_SPURIOUS: u32 = 0x80f;
const APIC_TIMER: u32 = 0x832;
const APIC_COMMAND: u32 = 0x830;
const TSC_DEADLINE: u32 = 0x6e0;
const PV_END_OF_INTERRUPT: u32 = 0x4b56_4d04;
/// The controller is on, and its spurious interrupts have this vector.
const APIC_ON: u64 = 0x1ff;
/// The timer runs to a time of the TSC; its vector.
const TIMER_MODE: u64 = 2 << 17;
const TIMER_VECTOR: u64 = entry::TIMER_VECTOR as u64;

/// What a processor is told to do by the one that holds the lock.
mod order {
    pub(super) const NONE: u32 = 0;
    /// Forget programs' translations.
    pub(super) const FORGET: u32 = 1;
    /// Leave the program's page tables.
    pub(super) const LEAVE: u32 = 2;
}

/// A processor. Who holds the kernel's lock has the cells of all, but for
/// `timer` and `calls`, which are the processor's own.
#[derive(Debug)]
struct Processor {
    is: pv::Cpu,
    /// The page tables that are loaded.
    root: Cell<u64>,
    /// Whose extended state is loaded, and the newest: at most one processor
    /// has a thread's.
    owner: Cell<Option<u32>>,
    /// When the timer will interrupt, in ns.
    timer: Cell<Option<u64>>,
    /// Whom to interrupt when the lock is free.
    calls: Cell<u64>,
    /// See [`order`]; back to none when it is done.
    order: AtomicU32,
}

/// What all processors have in common.
#[derive(Debug)]
struct State {
    tsc_khz: u32,
    components: u64,
    fpu_len: usize,
    /// The kernel's own page tables.
    model: u64,
    processors: Box<[Processor]>,
    /// State of the generator that helps out where the processor has none.
    seed: Cell<u64>,
}

/// The machine, shared by the kernel and the loops that run it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hardware(&'static State);

// SAFETY: the cells are only used by who holds the kernel's lock, or by the
// processor that they belong to.
unsafe impl Send for Hardware {}
// SAFETY: as above.
unsafe impl Sync for Hardware {}

impl Hardware {
    /// The machine with these processors. The first one asks.
    pub(super) fn new(tsc_khz: u32, components: u64, model: u64, cpus: &[pv::Cpu]) -> Self {
        let len = raw_cpuid::CpuId::new()
            .get_extended_state_info()
            .map_or(576, |state| state.xsave_area_size_enabled_features());
        let processor = |is: &pv::Cpu| Processor {
            is: *is,
            root: Cell::new(model),
            owner: Cell::new(None),
            timer: Cell::new(None),
            calls: Cell::new(0),
            order: AtomicU32::new(order::NONE),
        };
        Self(Box::leak(Box::new(State {
            tsc_khz,
            components,
            fpu_len: usize::try_from(len).expect("64-bit").next_multiple_of(64),
            model,
            processors: cpus.iter().map(processor).collect(),
            seed: Cell::new(cpu::ticks()),
        })))
    }

    /// Loads the kernel's page tables and switches on this processor's
    /// interrupt controller and timer.
    pub(super) fn begin(self) {
        cpu::load_tables(self.0.model);
        cpu::write_msr(APIC_SPURIOUS, APIC_ON);
        cpu::write_msr(APIC_TIMER, TIMER_MODE | TIMER_VECTOR);
        cpu::write_msr(PV_END_OF_INTERRUPT, boot::end_of_interrupt_word() | 1);
    }

    /// The number and the node of the processor with an APIC id.
    pub(super) fn place(self, apic_id: u32) -> Option<(usize, u32)> {
        let mut processors = self.0.processors.iter().enumerate();
        let (number, found) = processors.find(|(_, other)| other.is.apic_id == apic_id)?;
        Some((number, found.is.node))
    }

    /// Lets the other processors begin at a page.
    pub(super) fn start_others(self, page: u8) {
        const START_UP: u64 = 0x4600;
        for processor in &self.0.processors[1..] {
            let to = u64::from(processor.is.apic_id) << 32;
            cpu::write_msr(APIC_COMMAND, to | START_UP | u64::from(page));
        }
    }

    fn mine(self) -> &'static Processor {
        &self.0.processors[entry::cpu()]
    }

    /// Does what this processor has been told to. Called while it waits for
    /// the lock, as who holds that may be waiting for this.
    pub(super) fn serve(self) {
        let mine = self.mine();
        // Acquire: what has been changed in the tables is seen behind it.
        match mine.order.load(Ordering::Acquire) {
            order::NONE => return,
            // The cell is the lock's holder's, who waits for this.
            order::FORGET => cpu::load_tables(mine.root.get()),
            _ => cpu::load_tables(self.0.model),
        }
        // Release: the translations are gone when this is seen.
        mine.order.store(order::NONE, Ordering::Release);
    }

    fn interrupt(processor: &Processor) {
        let to = u64::from(processor.is.apic_id) << 32;
        cpu::write_msr(APIC_COMMAND, to | u64::from(entry::CALL_VECTOR_OF_CPUS));
    }

    /// Gives other processors an order and waits until they have done it, or
    /// are lost.
    fn command(self, orders: impl Iterator<Item = (usize, u32)> + Clone) {
        for (number, order) in orders.clone() {
            let processor = &self.0.processors[number];
            if order == order::LEAVE {
                processor.root.set(self.0.model);
            }
            // Release: the tables have been changed before.
            processor.order.store(order, Ordering::Release);
            Self::interrupt(processor);
        }
        for (number, _) in orders {
            let holder = u32::try_from(number + 1).expect("there are few");
            // Acquire: it has done it.
            while self.0.processors[number].order.load(Ordering::Acquire) != order::NONE
                && !losses::has_lost(holder)
            {
                core::hint::spin_loop();
            }
        }
    }

    /// Interrupts those that were called while the lock was held.
    pub(super) fn send_calls(self) {
        let calls = self.mine().calls.take();
        for (number, processor) in self.0.processors.iter().enumerate() {
            if calls >> number & 1 != 0 {
                Self::interrupt(processor);
            }
        }
    }

    /// Leaves programs' page tables before this processor sleeps.
    pub(super) fn leave_program(self) {
        if self.mine().root.replace(self.0.model) != self.0.model {
            cpu::load_tables(self.0.model);
        }
    }

    /// Has the processor interrupted at a time in ns; a timer that would do
    /// so earlier is left alone, as each change costs an exit.
    pub(super) fn set_timer(self, now: u64, at: Option<u64>) {
        let Some(at) = at else { return };
        if entry::take_timer() {
            self.mine().timer.set(None);
        }
        let pending = self.mine().timer.get().filter(|armed| *armed > now);
        if pending.is_some_and(|armed| armed <= at) {
            return;
        }
        // By the kernel's own scale, so that its clock has reached the time.
        let ticks = (u128::from(at) << 32) / u128::from(ns_per_tick(self.0.tsc_khz));
        let ticks = u64::try_from(ticks).unwrap_or(u64::MAX).saturating_add(2);
        self.mine().timer.set(Some(at));
        cpu::write_msr(TSC_DEADLINE, ticks);
    }

    /// Whether these page tables are the ones that this processor uses.
    pub(super) fn has_loaded(self, root: u64) -> bool {
        self.mine().root.get() == root
    }

    /// Loads page tables, unless they are loaded and need no flush.
    pub(super) fn load_tables(self, root: u64, flush: &Flush) {
        if self.mine().root.replace(root) != root || *flush == Flush::All {
            cpu::load_tables(root);
        } else if let Flush::Pages(pages) = flush {
            pages.iter().copied().for_each(cpu::forget_page);
        }
    }

    /// Loads a thread's extended state, if another's is loaded.
    pub(super) fn load_fpu(self, tid: u32, fpu: &mut Fpu) {
        let mine = self.mine();
        if mine.owner.get() == Some(tid) {
            return;
        }
        // Whose state was loaded has been saved when it stopped running.
        self.forget_owner(tid);
        mine.owner.set(Some(tid));
        // SAFETY: the area is aligned and has room for all components; its
        // header is as the processor or `Fpu::restore` has left it.
        unsafe { _xrstor64(fpu.0.as_ptr().cast(), self.0.components) };
    }

    fn forget_owner(self, tid: u32) {
        for processor in &self.0.processors {
            if processor.owner.get() == Some(tid) {
                processor.owner.set(None);
            }
        }
    }
}

impl Machine for Hardware {
    fn cpu(&self) -> usize {
        entry::cpu()
    }

    fn call(&mut self, cpu: usize) {
        let calls = &self.mine().calls;
        calls.set(calls.get() | 1 << cpu);
    }

    fn flush(&mut self, stale: CpuSet, gone: CpuSet) {
        let orders = (0..self.0.processors.len()).filter_map(|cpu| {
            if gone.has(cpu) {
                Some((cpu, order::LEAVE))
            } else {
                stale.has(cpu).then_some((cpu, order::FORGET))
            }
        });
        self.command(orders);
    }

    fn ticks(&self) -> u64 {
        cpu::ticks()
    }

    fn clock(&self) -> fn() -> u64 {
        cpu::ticks
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

    fn lose(&mut self, cpu: usize) {
        let processor = &self.0.processors[cpu];
        processor.root.set(self.0.model);
        processor.owner.set(None);
        processor.order.store(order::NONE, Ordering::Relaxed);
    }

    fn save_fpu(&mut self, tid: u32, fpu: &mut Fpu) {
        if self.mine().owner.get() == Some(tid) && fpu.0.len() * 64 >= self.0.fpu_len {
            // SAFETY: the area is aligned and has room for all components.
            unsafe { _xsave64(fpu.0.as_mut_ptr().cast(), self.0.components) };
        }
    }

    fn forget_fpu(&mut self, tid: u32) {
        self.forget_owner(tid);
    }

    fn leave_tables(&mut self, roots: &[u64]) {
        let here = entry::cpu();
        let processors = &self.0.processors;
        let others = (0..processors.len())
            .filter(|cpu| *cpu != here && roots.contains(&processors[*cpu].root.get()));
        self.command(others.map(|cpu| (cpu, order::LEAVE)));
        if roots.contains(&self.mine().root.get()) {
            self.leave_program();
        }
    }

    fn hardware(&self) -> u64 {
        // SAFETY: every processor of this kind has CPUID.
        u64::from(core::arch::x86_64::__cpuid(1).edx)
    }

    fn heap_free(&self) -> usize {
        boot::heap_free()
    }
}
