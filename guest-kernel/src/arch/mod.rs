//! All that is x86: entering the kernel and leaving it, interrupts, the
//! paravirtual machine.
//!
//! The kernel runs with interrupts off, on one stack per processor and on one
//! processor at a time (see [`lock`]); interrupts are let in only while a
//! program runs or the processor sleeps.

mod boot;
mod cpu;
mod descriptors;
mod entry;
mod lock;
mod losses;
mod machine;
mod panic;

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use vmm_shared::pv::Hypercall;

use crate::machine::CALL_VECTOR;
use crate::mem::pages::Pages;
use crate::running::{Next, settles};
use lock::Guard;
use machine::Hardware;

/// What of the last thread's state is in the processor.
#[derive(Debug, Default)]
struct Loaded {
    fs_base: Option<u64>,
    gs_base: Option<u64>,
    pages: Option<Arc<Pages>>,
}

/// Runs programs on this processor until the kernel switches off.
fn run(hardware: Hardware) -> ! {
    let mut loaded = Loaded::default();
    let mut kernel = lock::lock(hardware);
    kernel.slept();
    loop {
        kernel.begin();
        if entry::DOORBELL.swap(false, Ordering::Relaxed) {
            kernel.doorbell();
        }
        kernel = match kernel.run_next() {
            Next::Run(tid) => run_thread(kernel, hardware, tid, &mut loaded),
            Next::Idle => {
                hardware.leave_program();
                loaded.pages = None;
                let (now, until) = (kernel.now(), kernel.interrupt_at());
                drop(kernel);
                hardware.send_calls();
                hardware.set_timer(now, until);
                cpu::sleep();
                let mut kernel = lock::lock(hardware);
                kernel.slept();
                kernel
            }
            Next::PowerOff => loop {
                hardware.send_calls();
                cpu::hypercall(Hypercall::PowerOff);
            },
        }
    }
}

/// Runs a thread until it comes back. The lock is free meanwhile.
fn run_thread(mut kernel: Guard, hardware: Hardware, tid: u32, loaded: &mut Loaded) -> Guard {
    let (now, until) = (kernel.now(), kernel.interrupt_at());
    let context = kernel.context(tid);
    let root = context.root;
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
    let (mut registers, node) = (*context.registers, context.node);
    let same = loaded
        .pages
        .take()
        .filter(|pages| Arc::ptr_eq(pages, context.pages));
    let pages = loaded
        .pages
        .insert(same.unwrap_or_else(|| context.pages.clone()));
    drop(kernel);
    hardware.send_calls();
    hardware.set_timer(now, until);
    loop {
        registers = entry::enter(registers);
        if registers.vector == CALL_VECTOR {
            let mut kernel = lock::lock(hardware);
            // While it waited for the lock it may have had to leave the tables.
            if hardware.has_loaded(root) {
                match kernel.call(tid, &registers) {
                    Some(result) => registers.rax = result,
                    None => return kernel,
                }
            } else {
                kernel.exit(tid, &registers, 0);
                return kernel;
            }
            continue;
        }
        let address = cpu::fault_address();
        if settles(pages, node, &registers, address) {
            continue;
        }
        if let Ok(vector @ 32..) = u8::try_from(registers.vector) {
            entry::end_interrupt(vector);
        }
        let mut kernel = lock::lock(hardware);
        kernel.exit(tid, &registers, address);
        return kernel;
    }
}
