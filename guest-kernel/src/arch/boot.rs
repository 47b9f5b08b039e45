//! From the hypervisor's entry to the run loop.
//!
//! Address space: programs below; from `0xffff_8000_0000_0000` on all of
//! guest physical memory; in the last 2 GiB the kernel's image.
#![expect(unsafe_code, reason = "builds the world that safe code stands on")]

use alloc::boxed::Box;
use alloc::vec;
use core::arch::global_asm;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use talc::{ErrOnOom, Span, Talc, Talck};
use vmm_shared::control::MAX_COMMAND_LINE;
use vmm_shared::losses::LossRecord;
use vmm_shared::pv::{BOOT_MAGIC, BOOT_VERSION, BootInfo, Hypercall, Ram, Range};
use vmm_shared::ring::ByteRing;
use vmm_shared::shm::SharedMem;

use super::losses::HeapLock;
use super::machine::Hardware;
use super::{cpu, descriptors, entry, lock, losses, panic, run};
use crate::kernel::{Kernel, Start};
use crate::sched::MAX_CPUS;

/// Where all of guest physical memory is mapped.
const DIRECT: u64 = 0xffff_8000_0000_0000;
/// Where the kernel's image is linked, and its physical address subtracted.
const IMAGE: u64 = 0xffff_ffff_8000_0000;
/// What the boot code maps of guest physical memory.
const MAPPED_AT_BOOT: u64 = 4 << 30;
const LARGE_PAGE: u64 = 2 << 20;
const PAGE: u64 = 4096;
const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 1 << 7;
/// The kernel's own memory: an eighth of all, within these bounds.
const HEAP_LEAST: u64 = 16 << 20;
const HEAP_MOST: u64 = 256 << 20;
const STACK_LEN: usize = 256 << 10;

#[global_allocator]
static HEAP: Talck<HeapLock, ErrOnOom> = Talc::new(ErrOnOom).lock();

global_asm!(
    ".pushsection .text.boot, \"ax\"",
    ".global start_high",
    // Entered at its physical address, with that mapped to itself.
    "start_high:",
    "cli",
    "cld",
    "mov eax, 1",
    "lea rdi, [rip + boot_turn]",
    "lock xadd [rdi], eax",
    "test eax, eax",
    "jnz 4f",
    // 4 GiB of large pages.
    "lea rdi, [rip + boot_directories]",
    "mov ecx, 2048",
    "mov eax, 0x83",
    "2:",
    "mov [rdi], rax",
    "add rdi, 8",
    "add rax, 0x200000",
    "dec ecx",
    "jnz 2b",
    "lea rdi, [rip + boot_low]",
    "lea rax, [rip + boot_directories]",
    "or rax, 3",
    "mov ecx, 4",
    "3:",
    "mov [rdi], rax",
    "add rdi, 8",
    "add rax, 4096",
    "dec ecx",
    "jnz 3b",
    "lea rdi, [rip + boot_high]",
    "lea rax, [rip + boot_directories]",
    "or rax, 3",
    "mov [rdi + 510 * 8], rax",
    "lea rdi, [rip + boot_root]",
    "lea rax, [rip + boot_low]",
    "or rax, 3",
    "mov [rdi], rax",
    "mov [rdi + 256 * 8], rax",
    "lea rax, [rip + boot_high]",
    "or rax, 3",
    "mov [rdi + 511 * 8], rax",
    // The same for the others, which keeps the way in.
    "lea rdx, [rip + boot_others_root]",
    "mov [rdx + 511 * 8], rax",
    "mov rax, [rdi]",
    "mov [rdx], rax",
    "mov [rdx + 256 * 8], rax",
    "mov cr3, rdi",
    "movabs rsp, offset boot_stack_end",
    "movabs rax, offset boot_continue",
    "mov r12, rsi",
    "mov rsi, rdi",
    "mov rdi, r12",
    "xor ebp, ebp",
    "call rax",
    "ud2",
    // Any other processor: the tables are there, and so is a stack for each.
    "4:",
    "lea rdi, [rip + boot_others_root]",
    "mov cr3, rdi",
    "movabs rdi, offset {stacks}",
    "mov rsp, [rdi + rax * 8]",
    "movabs rax, offset boot_continue_other",
    "xor ebp, ebp",
    "call rax",
    "ud2",
    ".popsection",
    ".pushsection .bss.boot, \"aw\", @nobits",
    ".balign 4096",
    "boot_root: .skip 4096",
    "boot_others_root: .skip 4096",
    "boot_low: .skip 4096",
    "boot_high: .skip 4096",
    "boot_directories: .skip 16384",
    "boot_stack: .skip {stack}",
    "boot_stack_end:",
    "boot_turn: .skip 8",
    ".popsection",
    stack = const STACK_LEN,
    stacks = sym STACKS,
);

/// Where a guest physical address is mapped.
fn direct(gpa: u64) -> NonNull<u8> {
    let address = usize::try_from(DIRECT + gpa).expect("64-bit");
    NonNull::new(core::ptr::with_exposed_provenance_mut(address)).expect("not null")
}

/// The memory at a guest physical range.
///
/// # Safety
/// 1. It is mapped. 2. No Rust reference is made into it while this is used.
unsafe fn memory(range: Range) -> SharedMem {
    let len = usize::try_from(range.len).expect("64-bit");
    // SAFETY: the caller's duty; ranges start at whole pages.
    unsafe { SharedMem::new(direct(range.gpa), len) }
}

/// Free kernel memory in bytes.
pub(super) fn heap_free() -> usize {
    HEAP.lock().get_counters().available_bytes
}

/// The physical address of this processor's [`entry::end_of_interrupt_word`].
pub(super) fn end_of_interrupt_word() -> u64 {
    entry::end_of_interrupt_word().addr() as u64 - IMAGE
}

/// The ends of the other processors' stacks, by the order in which they come
/// up, from 1 on.
static STACKS: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

/// The machine, once others may come up.
static MACHINE: spin::Once<Hardware> = spin::Once::new();

/// Where another processor comes up, on its own stack.
#[unsafe(no_mangle)]
extern "C" fn boot_continue_other() -> ! {
    entry::come_up();
    let hardware = *MACHINE.get().expect("others are started after that");
    let id = raw_cpuid::CpuId::new()
        .get_extended_topology_info()
        .and_then(|mut levels| levels.next())
        .map_or(0, |level| level.x2apic_id());
    let (number, node) = hardware.place(id).expect("only those are started");
    descriptors::load(number, node);
    hardware.begin();
    run(hardware)
}

#[unsafe(no_mangle)]
extern "C" fn boot_continue(info: u64, root: u64) -> ! {
    entry::come_up();
    let boot_page = u8::try_from(info / PAGE).expect("a start-up page");
    let range = Range {
        gpa: info,
        len: size_of::<BootInfo>() as u64,
    };
    // SAFETY: low memory is mapped, and nothing else is there.
    let info: BootInfo = unsafe { memory(range) }.read(0).expect("all of it");
    if info.magic != BOOT_MAGIC || info.version != BOOT_VERSION {
        cpu::hypercall(Hypercall::Crash);
    }
    // SAFETY: the hypervisor has mapped the rings, which nobody refers to.
    let ring = |range| ByteRing::new(unsafe { memory(range) }).expect("rings have legal sizes");
    let console = ring(info.console_out);
    panic::CONSOLE.call_once(|| console);

    let count = usize::try_from(info.ram_count).expect("64-bit");
    let nodes = || info.ram[..count].iter().map(|ram| ram.node);
    let ram = || info.ram[..count].iter().map(|ram| ram.range);
    let ram_end = ram().map(|range| range.gpa + range.len).max().unwrap_or(0);
    let total: u64 = ram().map(|range| range.len).sum();
    let mut next = (info.init.gpa + info.init.len).next_multiple_of(PAGE);

    for range in [
        Range {
            gpa: 0,
            len: ram_end,
        },
        info.image,
    ] {
        map_direct(root, range, &mut next);
    }
    let (kept, room) = (kept_end(&info.ram[..count]), info.ram[0].range);
    let room = (room.gpa + room.len).saturating_sub(next) / 2;
    let heap = (total / 8).clamp(HEAP_LEAST, HEAP_MOST).min(room);
    let start = direct(next).as_ptr();
    let span = Span::from_base_size(start, usize::try_from(heap).expect("64-bit"));
    // SAFETY: mapped RAM behind all that is in use, given to the heap alone.
    let claimed = unsafe { HEAP.lock().claim(span) };
    claimed.expect("there is room for a heap");
    next += heap;

    let components = descriptors::load(0, info.cpu[0].node);

    // SAFETY: the root is ours; what it maps below programs' end is the boot
    // code's way in, which nothing uses any more.
    unsafe { direct(root).cast::<u64>().write(0) };
    cpu::load_tables(root);

    let mut init = vec![0; usize::try_from(info.init.len).expect("64-bit")];
    // SAFETY: the hypervisor has put the program there; it is only read.
    let copied = unsafe { memory(info.init) }.read_bytes(0, &mut init);
    copied.expect("all of it");
    let usable = ram().map(|range| {
        let start = range.gpa.max(next);
        start..(range.gpa + range.len).max(start)
    });
    let cpus = usize::try_from(info.vcpus).map_or(1, |count| count.clamp(1, MAX_CPUS));
    let cpus = &info.cpu[..cpus];
    let words = usize::try_from(info.command_line_len).map_or(0, |len| len.min(MAX_COMMAND_LINE));
    let start = Start {
        usable: usable.zip(nodes()).collect(),
        cpu_nodes: cpus.iter().map(|cpu| cpu.node).collect(),
        // SAFETY: all of RAM is mapped; only frames in `usable` are ever
        // touched by it, which hold no Rust object.
        ram: unsafe {
            memory(Range {
                gpa: 0,
                len: ram_end,
            })
        },
        // SAFETY: mapped above; never referred to.
        image: (info.image.len > 0).then(|| unsafe { memory(info.image) }),
        image_base: info.image.gpa,
        model: root,
        boot_wall_ns: info.boot_wall_ns,
        command_line: info.command_line[..words].to_vec(),
        init,
        console,
        // SAFETY: the hypervisor has mapped it, and nobody refers to it.
        losses: LossRecord::new(unsafe { memory(info.losses) })
            .and_then(|record| losses::survive(record, kept)),
        to_launcher: ring(info.agent_out),
        from_launcher: ring(info.agent_in),
    };
    let hardware = Hardware::new(info.tsc_khz, components, root, cpus);
    hardware.begin();
    match Kernel::new(start, Box::new(hardware)) {
        Ok(kernel) => {
            MACHINE.call_once(|| hardware);
            for place in &STACKS[1..cpus.len()] {
                let stack = vec![0_u128; STACK_LEN / 16].leak();
                let end = stack.as_ptr_range().end.addr() as u64;
                place.store(end, Ordering::Relaxed);
            }
            lock::install(kernel);
            hardware.start_others(boot_page);
            run(hardware)
        }
        Err(reason) => {
            panic::say(format_args!("viaduct: the guest can't come up: {reason}\n"));
            cpu::hypercall(Hypercall::RingLauncher);
            loop {
                cpu::hypercall(Hypercall::PowerOff);
            }
        }
    }
}

/// The end of the memory, from 0 up, of the node that gives the first of it.
fn kept_end(ram: &[Ram]) -> u64 {
    let first = ram.first().map(|ram| ram.node);
    let kept = ram.iter().take_while(|ram| Some(ram.node) == first);
    kept.map(|ram| ram.range.gpa + ram.range.len)
        .max()
        .unwrap_or(0)
}

/// Maps what the boot code has not, taking pages for tables at `next`.
fn map_direct(root: u64, range: Range, next: &mut u64) {
    let end = range.gpa + range.len;
    let mut at = range.gpa.max(MAPPED_AT_BOOT) & !(LARGE_PAGE - 1);
    while at < end {
        let virtual_address = DIRECT + at;
        let upper = table(root, virtual_address >> 39 & 511, next);
        let middle = table(upper, virtual_address >> 30 & 511, next);
        let entry = entry_of(middle, virtual_address >> 21 & 511);
        // SAFETY: a page table of ours, that nobody else writes.
        unsafe { entry.write(at | PRESENT_WRITABLE | LARGE) };
        at += LARGE_PAGE;
    }
}

fn entry_of(table: u64, index: u64) -> NonNull<u64> {
    direct(table + index * 8).cast()
}

/// The table below an entry, made if it is missing.
fn table(above: u64, index: u64, next: &mut u64) -> u64 {
    let entry = entry_of(above, index);
    // SAFETY: as in `map_direct`; new tables lie in RAM that is mapped at
    // boot and in use by nobody.
    unsafe {
        let value = entry.read();
        if value & 1 != 0 {
            return value & !0xfff;
        }
        let made = *next;
        *next += PAGE;
        direct(made).write_bytes(0, usize::try_from(PAGE).expect("64-bit"));
        entry.write(made | PRESENT_WRITABLE);
        made
    }
}
