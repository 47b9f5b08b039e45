//! The way into programs and back.
//!
//! [`enter`] loads a thread's registers and returns when it comes back, by a
//! system call, an exception or an interrupt: the processor is made to push
//! straight into the thread's [`Registers`].
#![expect(unsafe_code, reason = "the border to programs")]

use core::arch::{asm, global_asm};
use core::mem::offset_of;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_shared::pv::DOORBELL_VECTOR;
use x86_64::VirtAddr;
use x86_64::registers::model_specific::GsBase;
use x86_64::structures::tss::TaskStateSegment;

use super::cpu as processor;
use crate::machine::{CALL_VECTOR, Registers, USER_CODE, USER_DATA};
use crate::sched::MAX_CPUS;

/// What the entry code finds by GS.
#[derive(Debug)]
#[repr(C)]
pub(super) struct PerCpu {
    /// The end of the running thread's registers.
    frame_end: u64,
    /// The kernel's stack pointer when it left.
    kernel_stack: u64,
    /// The program's, for a moment.
    user_stack: u64,
    /// The processor's number.
    cpu: u32,
    pub(super) tss: TaskStateSegment,
}

impl PerCpu {
    pub(super) fn new(cpu: usize) -> Self {
        Self {
            frame_end: 0,
            kernel_stack: 0,
            user_stack: 0,
            cpu: u32::try_from(cpu).expect("there are few"),
            tss: TaskStateSegment::new(),
        }
    }
}

/// For GS while a processor comes up: it has no number yet.
static COMING_UP: PerCpu = PerCpu {
    frame_end: 0,
    kernel_stack: 0,
    user_stack: 0,
    cpu: u32::MAX - 1,
    tss: TaskStateSegment::new(),
};

/// The first thing that a processor does in Rust.
pub(super) fn come_up() {
    GsBase::write(VirtAddr::from_ptr(&raw const COMING_UP));
}

/// The number of the processor that asks.
pub(super) fn cpu() -> usize {
    let number: u32;
    // SAFETY: in the kernel GS is the processor's own, or `COMING_UP`.
    unsafe {
        asm!("mov {:e}, gs:[{}]", out(reg) number, const offset_of!(PerCpu, cpu),
            options(nostack, readonly, preserves_flags));
    }
    usize::try_from(number).expect("64-bit")
}

/// What the processor that asks goes by as a lock's holder.
pub(super) fn holder() -> u32 {
    u32::try_from(cpu() + 1).expect("a number of 32 bits, and not the last")
}

/// What a processor's interrupts leave for it.
#[derive(Debug)]
#[repr(align(64))]
struct Noted {
    /// Where the hypervisor lets us end interrupts: see KVM's
    /// `MSR_KVM_PV_EOI_EN`.
    end: AtomicU32,
    /// The timer has run out since this was last looked at.
    timer: AtomicBool,
}

static NOTED: [Noted; MAX_CPUS] = [const {
    Noted {
        end: AtomicU32::new(0),
        timer: AtomicBool::new(false),
    }
}; MAX_CPUS];

/// The launcher has rung.
pub(super) static DOORBELL: AtomicBool = AtomicBool::new(false);

pub(super) const TIMER_VECTOR: u8 = 0xf1;
/// From another processor, which wants this one to look.
pub(super) const CALL_VECTOR_OF_CPUS: u8 = 0xf2;

/// Where the hypervisor lets this processor end interrupts.
pub(super) fn end_of_interrupt_word() -> *const AtomicU32 {
    &raw const NOTED[cpu()].end
}

/// Whether this processor's timer has run out since the last time.
pub(super) fn take_timer() -> bool {
    NOTED[cpu()].timer.swap(false, Ordering::Relaxed)
}

const APIC_EOI: u32 = 0x80b;

/// The processor pushes SS at `FRAME_END - 8` and so on; the stack at the
/// time must be aligned to 16, as 176 is.
const _: () = assert!(size_of::<Registers>() == 22 * 8);
const _: () = assert!(offset_of!(Registers, vector) == 15 * 8);
/// The task state is packed, its first stack 4 bytes in.
const TSS_STACK: usize = offset_of!(PerCpu, tss) + 4;

unsafe extern "C" {
    fn enter_program(registers: *mut Registers);
    fn call_entry_stub();
    static interrupt_stubs: [u8; 0];
}

/// Bytes of each interrupt's stub.
const STUB: u64 = 16;

/// Where interrupts enter, by their vectors.
pub(super) fn stubs() -> impl Iterator<Item = VirtAddr> {
    let first = VirtAddr::from_ptr(&raw const interrupt_stubs);
    (0..256).map(move |vector| first + vector * STUB)
}

/// Where system calls enter.
pub(super) fn call_entry() -> VirtAddr {
    VirtAddr::from_ptr(call_entry_stub as *const ())
}

/// Runs a thread until it comes back.
pub(super) fn enter(registers: Registers) -> Registers {
    #[repr(C, align(16))]
    struct Aligned(Registers);
    let mut frame = Aligned(registers);
    // SAFETY: 1. segments and flags of `Registers` are always a program's;
    // 2. its page tables hold the kernel; 3. interrupts are off.
    unsafe { enter_program(&raw mut frame.0) };
    frame.0
}

/// Notes an interrupt and tells the interrupt controller that it has been
/// taken: without an exit if the hypervisor has allowed it.
pub(super) fn end_interrupt(vector: u8) {
    match vector {
        DOORBELL_VECTOR => DOORBELL.store(true, Ordering::Relaxed),
        TIMER_VECTOR => NOTED[cpu()].timer.store(true, Ordering::Relaxed),
        _ => {}
    }
    if NOTED[cpu()].end.swap(0, Ordering::Relaxed) & 1 == 0 {
        processor::write_msr(APIC_EOI, 0);
    }
}

/// An interrupt while the processor slept.
#[unsafe(no_mangle)]
extern "C" fn interrupt_in_kernel(vector: u64) {
    if let Ok(vector) = u8::try_from(vector) {
        end_interrupt(vector);
    }
}

/// An exception in the kernel. `frame`: vector, error code, RIP, CS, flags.
#[unsafe(no_mangle)]
extern "C" fn exception_in_kernel(frame: *const [u64; 5]) -> ! {
    // SAFETY: the stub has just pushed it.
    let [vector, error, rip, ..] = unsafe { *frame };
    let address = processor::fault_address();
    panic!("exception {vector} at {rip:#x}, error {error:#x}, address {address:#x}");
}

global_asm!(
    ".balign 16",
    "interrupt_stubs:",
    ".set vector, 0",
    ".rept 256",
    ".balign 16",
    ".if (vector != 8) && (vector != 10) && (vector != 11) && (vector != 12) && (vector != 13) && (vector != 14) && (vector != 17)",
    "pushq $0",
    ".endif",
    "pushq $vector",
    "jmp interrupt_entry",
    ".set vector, vector + 1",
    ".endr",
    options(att_syntax)
);

global_asm!(
    // On the stack: vector, error code, RIP, CS, flags, RSP, SS.
    "interrupt_entry:",
    "test byte ptr [rsp + 24], 3",
    "jz 2f",
    "swapgs",
    "jmp save_registers",
    // In the kernel: asleep, or a bug.
    "2:",
    "cmp qword ptr [rsp], 32",
    "jb 3f",
    "push rax",
    "push rcx",
    "push rdx",
    "push rsi",
    "push rdi",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "mov rdi, [rsp + 72]",
    "cld",
    "call interrupt_in_kernel",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rdi",
    "pop rsi",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "add rsp, 16",
    "iretq",
    "3:",
    "mov rdi, rsp",
    "and rsp, -16",
    "cld",
    "call exception_in_kernel",
    "ud2",

    "call_entry_stub:",
    "swapgs",
    "mov gs:[{user_stack}], rsp",
    "mov rsp, gs:[{frame_end}]",
    "push {user_data}",
    "push qword ptr gs:[{user_stack}]",
    "push r11",
    "push {user_code}",
    "push rcx",
    "push 0",
    "push {call_vector}",

    "save_registers:",
    "push rax",
    "push rbx",
    "push rcx",
    "push rdx",
    "push rsi",
    "push rdi",
    "push rbp",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "cld",
    "mov rsp, gs:[{kernel_stack}]",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",

    "enter_program:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov gs:[{kernel_stack}], rsp",
    "lea rax, [rdi + {frame_len}]",
    "mov gs:[{frame_end}], rax",
    "mov gs:[{tss_stack}], rax",
    "mov rsp, rdi",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rbp",
    "pop rdi",
    "pop rsi",
    "pop rdx",
    "pop rcx",
    "pop rbx",
    "pop rax",
    "cmp dword ptr [rsp], {call_vector}",
    "jne 4f",
    // SYSRET is cheaper, and takes RIP and flags from where SYSCALL left them.
    "mov rcx, [rsp + 16]",
    "mov r11, [rsp + 32]",
    "mov rsp, [rsp + 40]",
    "swapgs",
    "sysretq",
    "4:",
    "swapgs",
    "add rsp, 16",
    "iretq",
    user_stack = const offset_of!(PerCpu, user_stack),
    frame_end = const offset_of!(PerCpu, frame_end),
    kernel_stack = const offset_of!(PerCpu, kernel_stack),
    tss_stack = const TSS_STACK,
    frame_len = const size_of::<Registers>(),
    user_data = const USER_DATA,
    user_code = const USER_CODE,
    call_vector = const CALL_VECTOR,
);
