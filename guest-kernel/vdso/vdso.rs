//! The vDSO: what programs learn of time and place without a system call.
//!
//! It is a crate of its own, made a shared object by `build.rs` and `vdso.ld`,
//! and runs in programs: it has no data of its own but the [`Clock`] before
//! it. Names, versions and signatures are Linux's; what it can't answer goes
//! to the kernel.

#![no_std]

mod clock;

use core::arch::asm;
use core::arch::x86_64::{_mm_lfence, _rdtsc};
use core::sync::atomic::Ordering;

use clock::{CLOCK_PAGE, Clock, nanoseconds};

const NS: u64 = 1_000_000_000;
/// Linux's numbers of clocks: the wall clock's, and those of the clocks that
/// count from the start of the VM; see `calls/time.rs`.
const WALL: [u32; 2] = [0, 5];
const SINCE_BOOT: [u32; 4] = [1, 4, 6, 7];
const CLOCK_GETTIME: usize = 228;
const CLOCK_GETRES: usize = 229;
/// The segment whose limit says where the processor is, as on Linux.
const PLACE: u16 = 15 * 8 + 3;

unsafe extern "C" {
    /// The start of the shared object.
    static __ehdr_start: u8;
}

fn clock() -> &'static Clock {
    let start: *const u8;
    // SAFETY: takes an address. In words of Rust it would be one to relocate,
    // but nobody relocates a vDSO.
    unsafe {
        asm!("lea {}, [rip + {}]", out(reg) start, sym __ehdr_start,
            options(nomem, nostack, preserves_flags, pure));
    }
    // SAFETY: the kernel maps the page there. It is all atomics.
    unsafe { &*start.wrapping_sub(CLOCK_PAGE).cast() }
}

fn since_boot() -> u64 {
    // SAFETY: reading the counter has no effect. The fence keeps it behind
    // the loads before it, so that who has seen a time sees none earlier. An
    // emulator may not heed it: what is read on two of its processors, one
    // right behind a load, can then differ by as long as a cache miss takes.
    let ticks = unsafe {
        _mm_lfence();
        _rdtsc()
    };
    nanoseconds(ticks, clock().ns_per_tick.load(Ordering::Relaxed))
}

fn wall() -> u64 {
    let start = clock().boot_wall_ns.load(Ordering::Relaxed);
    start.saturating_add(since_boot())
}

/// Makes a system call with two arguments.
fn call(number: usize, first: usize, second: *mut [u64; 2]) -> i32 {
    let result: usize;
    // SAFETY: the program has asked for it.
    unsafe {
        asm!("syscall", inout("rax") number => result, in("rdi") first, in("rsi") second,
            out("rcx") _, out("r11") _, options(nostack));
    }
    result as i32
}

/// # Safety
/// `time` can be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn __vdso_clock_gettime(number: u32, time: *mut [u64; 2]) -> i32 {
    let now = if SINCE_BOOT.contains(&number) {
        since_boot()
    } else if WALL.contains(&number) {
        wall()
    } else {
        return call(CLOCK_GETTIME, number as usize, time);
    };
    // SAFETY: the caller's duty.
    unsafe { *time = [now / NS, now % NS] };
    0
}

/// # Safety
/// `resolution` is null or can be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn __vdso_clock_getres(number: u32, resolution: *mut [u64; 2]) -> i32 {
    if !SINCE_BOOT.contains(&number) && !WALL.contains(&number) {
        return call(CLOCK_GETRES, number as usize, resolution);
    }
    if !resolution.is_null() {
        // SAFETY: the caller's duty.
        unsafe { *resolution = [0, 1] };
    }
    0
}

/// # Safety
/// Each is null or can be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn __vdso_gettimeofday(time: *mut [u64; 2], zone: *mut [u32; 2]) -> i32 {
    if !time.is_null() {
        let now = wall();
        // SAFETY: the caller's duty.
        unsafe { *time = [now / NS, now % NS / 1000] };
    }
    if !zone.is_null() {
        // SAFETY: the caller's duty.
        unsafe { *zone = [0, 0] };
    }
    0
}

/// # Safety
/// `time` is null or can be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn __vdso_time(time: *mut u64) -> u64 {
    let now = wall() / NS;
    if !time.is_null() {
        // SAFETY: the caller's duty.
        unsafe { *time = now };
    }
    now
}

/// # Safety
/// `cpu` and `node` are null or can be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn __vdso_getcpu(cpu: *mut u32, node: *mut u32, _: usize) -> i32 {
    let place: u32;
    // SAFETY: reads the limit of a segment.
    unsafe {
        asm!("lsl {:e}, {:e}", out(reg) place, in(reg) u32::from(PLACE),
            options(nostack, nomem));
    }
    if !cpu.is_null() {
        // SAFETY: the caller's duty.
        unsafe { *cpu = place & 0xfff };
    }
    if !node.is_null() {
        // SAFETY: the caller's duty.
        unsafe { *node = place >> 12 };
    }
    0
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
