//! The way into programs and back.
//!
//! [`enter`] loads a thread's registers and returns when it comes back, by a
//! system call, an exception or an interrupt: the processor is made to push
//! straight into the thread's [`Registers`].
#![expect(unsafe_code, reason = "the border to programs")]

use core::arch::global_asm;
use core::cell::UnsafeCell;
use core::mem::offset_of;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_shared::pv::DOORBELL_VECTOR;
use x86_64::VirtAddr;
use x86_64::structures::tss::TaskStateSegment;

use super::cpu;
use crate::machine::{CALL_VECTOR, Registers, USER_CODE, USER_DATA};

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
    padding: u32,
    pub(super) tss: TaskStateSegment,
}

#[repr(align(64))]
struct Cell(UnsafeCell<PerCpu>);

// SAFETY: touched only by the one processor's entry code and, before that
// runs, by its set-up.
unsafe impl Sync for Cell {}

static PER_CPU: Cell = Cell(UnsafeCell::new(PerCpu {
    frame_end: 0,
    kernel_stack: 0,
    user_stack: 0,
    padding: 0,
    tss: TaskStateSegment::new(),
}));

pub(super) fn per_cpu() -> *mut PerCpu {
    PER_CPU.0.get()
}

/// The launcher has rung.
pub(super) static DOORBELL: AtomicBool = AtomicBool::new(false);
/// Where the hypervisor lets us end interrupts: see KVM's `MSR_KVM_PV_EOI_EN`.
pub(super) static END_OF_INTERRUPT: AtomicU32 = AtomicU32::new(0);

/// The timer has run out since this was last looked at.
static TIMER: AtomicBool = AtomicBool::new(false);
pub(super) const TIMER_VECTOR: u8 = 0xf1;

/// Whether the timer has run out since the last time.
pub(super) fn take_timer() -> bool {
    TIMER.swap(false, Ordering::Relaxed)
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
pub(super) fn enter(registers: &mut Registers) {
    #[repr(C, align(16))]
    struct Aligned(Registers);
    let mut frame = Aligned(*registers);
    // SAFETY: 1. segments and flags of `Registers` are always a program's;
    // 2. its page tables hold the kernel; 3. interrupts are off.
    unsafe { enter_program(&raw mut frame.0) };
    *registers = frame.0;
}

/// Notes an interrupt and tells the interrupt controller that it has been
/// taken: without an exit if the hypervisor has allowed it.
pub(super) fn end_interrupt(vector: u8) {
    match vector {
        DOORBELL_VECTOR => DOORBELL.store(true, Ordering::Relaxed),
        TIMER_VECTOR => TIMER.store(true, Ordering::Relaxed),
        _ => {}
    }
    if END_OF_INTERRUPT.swap(0, Ordering::Relaxed) & 1 == 0 {
        cpu::write_msr(APIC_EOI, 0);
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
    let address = cpu::fault_address();
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
