//! All that is x86: entering the kernel and leaving it, interrupts, the
//! paravirtual machine.
//!
//! The kernel runs with interrupts off, on one stack; they are let in only
//! while a program runs or the processor sleeps.

mod boot;
mod cpu;
mod descriptors;
mod entry;
mod machine;
mod panic;

use core::sync::atomic::Ordering;

use vmm_shared::pv::Hypercall;

use crate::kernel::{Kernel, Next};
use machine::Hardware;

/// What of the last thread's state is in the processor.
#[derive(Debug, Default)]
struct Loaded {
    fs_base: Option<u64>,
    gs_base: Option<u64>,
}

/// Runs programs until the kernel switches off.
fn run(kernel: &mut Kernel, hardware: &Hardware) -> ! {
    let mut loaded = Loaded::default();
    loop {
        match kernel.run_next() {
            Next::Run(tid) => {
                hardware.set_timer(kernel.now(), kernel.interrupt_at());
                run_thread(kernel, hardware, tid, &mut loaded);
            }
            Next::Idle(until) => {
                hardware.set_timer(kernel.now(), until);
                cpu::sleep();
                kernel.slept();
            }
            Next::PowerOff => {
                cpu::hypercall(Hypercall::PowerOff);
            }
        }
        if entry::DOORBELL.swap(false, Ordering::Relaxed) {
            kernel.doorbell();
        }
    }
}

fn run_thread(kernel: &mut Kernel, hardware: &Hardware, tid: u32, loaded: &mut Loaded) {
    let context = kernel.context(tid);
    hardware.load_tables(context.root, &context.flush);
    if loaded.fs_base != Some(context.fs_base) {
        loaded.fs_base = Some(context.fs_base);
        cpu::set_fs_base(context.fs_base);
    }
    if loaded.gs_base != Some(context.gs_base) {
        loaded.gs_base = Some(context.gs_base);
        cpu::set_user_gs_base(context.gs_base);
    }
    hardware.load_fpu(tid, context.fpu);
    entry::enter(context.registers);
    let vector = context.registers.vector;
    let address = cpu::fault_address();
    if let Ok(vector @ 32..) = u8::try_from(vector) {
        entry::end_interrupt(vector);
    }
    kernel.exit(tid, address);
}
