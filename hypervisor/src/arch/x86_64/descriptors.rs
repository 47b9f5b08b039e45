//! Segments and interrupt gates of a core.
//!
//! No gate switches stacks: while a vCPU's state is loaded the task register
//! is the guest's, and an interrupt must not look into it.
#![expect(
    unsafe_code,
    reason = "loads GDT, TSS and IDT; interrupt stubs are assembly"
)]

use alloc::boxed::Box;
use core::arch::naked_asm;
use core::sync::atomic::{AtomicBool, Ordering};

use x86_64::VirtAddr;
use x86_64::instructions::{segmentation::Segment, tables};
use x86_64::registers::segmentation::{CS, DS, ES, SS};
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable};
use x86_64::structures::idt::InterruptDescriptorTable;
use x86_64::structures::tss::TaskStateSegment;

use super::io::{self, NodeExit};
use super::{apic, cpu};

/// The core's timer has run out.
pub const TIMER_VECTOR: u8 = 0x40;
/// Another core wants this one to look at its posted interrupts.
pub const KICK_VECTOR: u8 = 0x41;
/// A peer rang this node's doorbell.
pub const DOORBELL_VECTOR: u8 = 0x42;
/// The APIC's answer when an interrupt went away.
pub const SPURIOUS_VECTOR: u8 = 0xff;

static DOORBELL: AtomicBool = AtomicBool::new(false);

/// By APIC id: the core's timer has run out and nobody has taken note yet.
static TIMER_RAN_OUT: [AtomicBool; 256] = [const { AtomicBool::new(false) }; 256];

/// Whether the timer of the core with this APIC id has run out since the last
/// [`forget_timer`]. Only that core may ask.
pub fn timer_ran_out(apic_id: u8) -> bool {
    // Relaxed: set by an interrupt of the core that reads it.
    TIMER_RAN_OUT[usize::from(apic_id)].load(Ordering::Relaxed)
}

/// Takes note of that: the timer is about to be set anew.
pub fn forget_timer(apic_id: u8) {
    TIMER_RAN_OUT[usize::from(apic_id)].store(false, Ordering::Relaxed);
}

/// Makes it look as if the timer had run out: it has been used for something
/// else, and whoever relies on it must set it anew.
pub fn let_timer_run_out(apic_id: u8) {
    TIMER_RAN_OUT[usize::from(apic_id)].store(true, Ordering::Relaxed);
}

/// Whether the doorbell has been rung since the last call.
pub fn take_doorbell() -> bool {
    // The plain load keeps the line shared while nobody rings. Acquire: what
    // the peer wrote before ringing is visible after a "yes".
    DOORBELL.load(Ordering::Relaxed) && DOORBELL.swap(false, Ordering::Acquire)
}

/// Whether the doorbell has been rung and nobody has taken it yet.
pub fn doorbell_rung() -> bool {
    DOORBELL.load(Ordering::Relaxed)
}

/// Marks the doorbell as rung, for peers of which it is not known whether
/// they rang it before this node could hear.
pub fn set_doorbell() {
    DOORBELL.store(true, Ordering::Release);
}

/// Gives this core its own segments and the common interrupt gates.
pub fn load() {
    let tss = Box::leak(Box::new(TaskStateSegment::new()));
    let gdt = Box::leak(Box::new(GlobalDescriptorTable::new()));
    let code = gdt.append(Descriptor::kernel_code_segment());
    let data = gdt.append(Descriptor::kernel_data_segment());
    let task = gdt.append(Descriptor::tss_segment(tss));
    gdt.load();
    // SAFETY: the selectors name the flat segments of the table just loaded,
    // which lives for ever.
    unsafe {
        CS::set_reg(code);
        SS::set_reg(data);
        DS::set_reg(data);
        ES::set_reg(data);
        tables::load_tss(task);
    }
    IDT.call_once(interrupt_gates).load();
}

static IDT: spin::Once<InterruptDescriptorTable> = spin::Once::new();

/// The gates that every core has: exceptions end the node, interrupts of the
/// vectors above are taken note of.
pub fn interrupt_gates() -> InterruptDescriptorTable {
    let mut idt = InterruptDescriptorTable::new();
    macro_rules! gate {
        ($entry:expr, $stub:ident) => {
            // SAFETY: the stub keeps to the frame that the gate's vector makes.
            unsafe { $entry.set_handler_addr(VirtAddr::new($stub as *const () as u64)) };
        };
    }
    gate!(idt.divide_error, exception_0);
    gate!(idt.debug, debug_exception);
    gate!(idt.non_maskable_interrupt, exception_2);
    gate!(idt.breakpoint, exception_3);
    gate!(idt.overflow, exception_4);
    gate!(idt.bound_range_exceeded, exception_5);
    gate!(idt.invalid_opcode, exception_6);
    gate!(idt.device_not_available, exception_7);
    gate!(idt.double_fault, exception_8);
    gate!(idt.invalid_tss, exception_10);
    gate!(idt.segment_not_present, exception_11);
    gate!(idt.stack_segment_fault, exception_12);
    gate!(idt.general_protection_fault, exception_13);
    gate!(idt.page_fault, exception_14);
    gate!(idt.x87_floating_point, exception_16);
    gate!(idt.alignment_check, exception_17);
    gate!(idt.machine_check, exception_18);
    gate!(idt.simd_floating_point, exception_19);
    gate!(idt[TIMER_VECTOR], timer_interrupt);
    gate!(idt[KICK_VECTOR], kick_interrupt);
    gate!(idt[DOORBELL_VECTOR], doorbell_interrupt);
    gate!(idt[SPURIOUS_VECTOR], spurious_interrupt);
    idt
}

/// What an exception leaves on the stack, error code included.
#[repr(C)]
struct ExceptionFrame {
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

macro_rules! exception_stub {
    ($name:ident, $vector:literal, $make_error:literal) => {
        #[unsafe(naked)]
        extern "C" fn $name() {
            naked_asm!(
                $make_error,
                concat!("push ", $vector),
                "mov rdi, rsp",
                "and rsp, -16",
                "call {handler}",
                "ud2",
                handler = sym on_exception,
            )
        }
    };
}

exception_stub!(exception_0, 0, "push 0");
exception_stub!(exception_2, 2, "push 0");
exception_stub!(exception_3, 3, "push 0");
exception_stub!(exception_4, 4, "push 0");
exception_stub!(exception_5, 5, "push 0");
exception_stub!(exception_6, 6, "push 0");
exception_stub!(exception_7, 7, "push 0");
exception_stub!(exception_8, 8, "");
exception_stub!(exception_10, 10, "");
exception_stub!(exception_11, 11, "");
exception_stub!(exception_12, 12, "");
exception_stub!(exception_13, 13, "");
exception_stub!(exception_14, 14, "");
exception_stub!(exception_16, 16, "push 0");
exception_stub!(exception_17, 17, "");
exception_stub!(exception_18, 18, "push 0");
exception_stub!(exception_19, 19, "push 0");

/// The hypervisor itself raises no exceptions: any is one of its own
/// invariants broken, and the node ends with the facts in its log.
extern "C" fn on_exception(frame: &ExceptionFrame) -> ! {
    cpu::interrupts_off();
    io::write_unlocked(format_args!(
        "PANIC: exception {} (error {:#x}) at {:#x}, rsp {:#x}, rflags {:#x}, cr2 {:#x}\n",
        frame.vector,
        frame.error,
        frame.rip,
        frame.rsp,
        frame.rflags,
        x86_64::registers::control::Cr2::read_raw(),
    ));
    let _ = (frame.cs, frame.ss);
    io::exit(NodeExit::Panic)
}

macro_rules! interrupt_stub {
    ($name:ident, $handler:ident) => {
        #[unsafe(naked)]
        extern "C" fn $name() {
            naked_asm!(
                "push rbp",
                "mov rbp, rsp",
                "push rax",
                "push rcx",
                "push rdx",
                "push rsi",
                "push rdi",
                "push r8",
                "push r9",
                "push r10",
                "push r11",
                "cld",
                "and rsp, -16",
                "call {handler}",
                "lea rsp, [rbp - 72]",
                "pop r11",
                "pop r10",
                "pop r9",
                "pop r8",
                "pop rdi",
                "pop rsi",
                "pop rdx",
                "pop rcx",
                "pop rax",
                "pop rbp",
                "iretq",
                handler = sym $handler,
            )
        }
    };
}

interrupt_stub!(debug_exception, on_debug);
interrupt_stub!(timer_interrupt, on_timer);
interrupt_stub!(kick_interrupt, on_wake);
interrupt_stub!(doorbell_interrupt, on_doorbell);
interrupt_stub!(spurious_interrupt, on_spurious);

/// The hypervisor sets no breakpoints. But emulators up to QEMU 8 leave the
/// guest's armed after an exit, and the guest may have aimed them at us.
extern "C" fn on_debug() {
    const DISARMED: u64 = 0x400;
    // SAFETY: no breakpoint is the hypervisor's own.
    unsafe { core::arch::asm!("mov dr7, {}", in(reg) DISARMED, options(nomem, nostack)) };
}

extern "C" fn on_timer() {
    TIMER_RAN_OUT[usize::from(apic::id())].store(true, Ordering::Relaxed);
    apic::end_of_interrupt();
}

/// A kick only ends a sleep or a stay in the guest: the run loop looks at
/// everything that could have happened before it goes back.
extern "C" fn on_wake() {
    apic::end_of_interrupt();
}

extern "C" fn on_doorbell() {
    set_doorbell();
    apic::end_of_interrupt();
}

extern "C" fn on_spurious() {}
