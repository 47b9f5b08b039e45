//! How the other cores get from real mode to [`core_main`](super::core_main).
#![expect(unsafe_code, reason = "code that runs before there is any Rust")]

use core::arch::global_asm;
use core::ops::Range;
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use vmm_shared::addr::{Hpa, PAGE_SIZE};

/// The real-mode page at which cores start: low, and not used by firmware.
pub(super) const PAGE_NUMBER: u8 = 8;
const PAGE: usize = (PAGE_NUMBER as usize) << 12;
/// More cores than a node may have.
const MAX_CORES: usize = 256;

static STACKS: [AtomicU64; MAX_CORES] = [const { AtomicU64::new(0) }; MAX_CORES];
static NEXT: AtomicU32 = AtomicU32::new(0);
static STARTED: AtomicUsize = AtomicUsize::new(0);

unsafe extern "C" {
    static trampoline_start: u8;
    static trampoline_end: u8;
    static trampoline_cr3: u8;
}

/// The page that must be executable while cores start.
pub(super) fn page() -> Range<Hpa> {
    Hpa(PAGE as u64)..Hpa(PAGE as u64 + PAGE_SIZE)
}

/// Copies the code to its page. Boot page tables only: later the page is
/// read-only.
pub(super) fn install(root: Hpa) {
    let start = &raw const trampoline_start;
    let len = (&raw const trampoline_end).addr() - start.addr();
    let cr3 = (&raw const trampoline_cr3).addr() - start.addr();
    let root = u32::try_from(root.0).expect("the node's RAM lies below 4 GiB");
    let page = core::ptr::with_exposed_provenance_mut::<u8>(PAGE);
    // SAFETY: 1. the page is RAM that nobody uses; 2. it is mapped writable;
    // 3. source and destination are as long as the code.
    unsafe {
        core::ptr::copy_nonoverlapping(start, page, len);
        page.add(cr3).cast::<u32>().write_unaligned(root);
    }
}

/// One stack for each core that will start.
pub(super) fn give_stacks(tops: &[Hpa]) {
    for (slot, top) in STACKS.iter().zip(tops) {
        slot.store(top.0, Ordering::Relaxed);
    }
}

/// Cores that have arrived.
pub(super) fn started() -> usize {
    STARTED.load(Ordering::Acquire)
}

/// Called by each core on arrival.
pub(super) fn report_started() {
    STARTED.fetch_add(1, Ordering::Release);
}

global_asm!(
    r#"
    .section .rodata.boot, "a"
    .code16
    .balign 16
    .global trampoline_start
trampoline_start:
    cli
    cld
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl {page} + trampoline_gdt_pointer - trampoline_start
    movl $0x20, %eax              # PAE
    movl %eax, %cr4
    movl {page} + trampoline_cr3 - trampoline_start, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx        # EFER
    rdmsr
    orl $0x900, %eax              # LME, NXE
    wrmsr
    movl $0x80010011, %eax        # PG, WP, ET, PE
    movl %eax, %cr0
    ljmpl $0x08, ${page} + trampoline_64 - trampoline_start

    .code64
trampoline_64:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    movl $1, %eax
    lock xaddl %eax, {next}
    movq {stacks}(,%rax,8), %rsp
    xorl %ebp, %ebp
    movq ${core_main}, %rax
    call *%rax
    ud2

    .balign 8
trampoline_gdt:
    .quad 0
    .quad 0x00af9b000000ffff      # 64-bit code
    .quad 0x00cf93000000ffff      # data
trampoline_gdt_pointer:
    .word . - trampoline_gdt - 1
    .long {page} + trampoline_gdt - trampoline_start
    .global trampoline_cr3
trampoline_cr3:
    .long 0
    .global trampoline_end
trampoline_end:
    .text
    "#,
    page = const PAGE,
    next = sym NEXT,
    stacks = sym STACKS,
    core_main = sym super::core_main,
    options(att_syntax),
);
