//! The host's local APIC, by its memory window.
//!
//! The window works on every host and emulator; x2APIC does not exist in
//! QEMU's TCG before 9. Manual: AMD64 vol. 2, chapter 16.
#![expect(unsafe_code, reason = "device registers behind a fixed address")]

use core::ptr;

use super::cpu;
use super::descriptors::{KICK_VECTOR, SPURIOUS_VECTOR, TIMER_VECTOR};

/// Where the window lies unless firmware moved it; we refuse to start if so.
pub const WINDOW: u64 = 0xfee0_0000;

const MSR_APIC_BASE: u32 = 0x1b;
const ID: usize = 0x20;
const EOI: usize = 0xb0;
const SPURIOUS: usize = 0xf0;
const ICR_LOW: usize = 0x300;
const ICR_HIGH: usize = 0x310;
const LVT_TIMER: usize = 0x320;
const INITIAL_COUNT: usize = 0x380;
const CURRENT_COUNT: usize = 0x390;
const DIVIDE: usize = 0x3e0;

const MASKED: u32 = 1 << 16;
const DIVIDE_BY_16: u32 = 0b0011;
const DELIVERY_PENDING: u32 = 1 << 12;
const INIT: u32 = 0x0000_4500;
const STARTUP: u32 = 0x0000_4600;
const FIXED: u32 = 0x0000_4000;
const ALL_BUT_SELF: u32 = 0b11 << 18;

fn read(register: usize) -> u32 {
    // SAFETY: the window is mapped uncached from the first page tables on;
    // reading these registers has no side effect.
    unsafe { ptr::with_exposed_provenance::<u32>(address(register)).read_volatile() }
}

fn write(register: usize, value: u32) {
    // SAFETY: as for `read`; the callers below write only values that are
    // legal for their register.
    unsafe { ptr::with_exposed_provenance_mut::<u32>(address(register)).write_volatile(value) };
}

const fn address(register: usize) -> usize {
    0xfee0_0000 + register
}

const _: () = assert!(WINDOW == 0xfee0_0000);

/// Switches this core's APIC on, timer silent.
///
/// # Errors
/// The window's address if it is not where it should be.
pub fn enable() -> Result<(), u64> {
    // SAFETY: every x86-64 processor has this register.
    let base = unsafe { cpu::rdmsr(MSR_APIC_BASE) };
    if base & 0xf_ffff_f000 != WINDOW {
        return Err(base & 0xf_ffff_f000);
    }
    write(SPURIOUS, 0x100 | u32::from(SPURIOUS_VECTOR));
    write(DIVIDE, DIVIDE_BY_16);
    write(LVT_TIMER, u32::from(TIMER_VECTOR));
    Ok(())
}

/// This core's APIC id.
#[must_use]
pub fn id() -> u8 {
    read(ID).to_be_bytes()[0]
}

/// Tells the APIC that the interrupt being handled is over.
pub fn end_of_interrupt() {
    write(EOI, 0);
}

/// Makes the core with this APIC id leave the guest or its sleep.
pub fn kick(apic_id: u8) {
    send(apic_id, FIXED | u32::from(KICK_VECTOR));
}

/// What one core can do to another besides interrupting it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Signal {
    /// A system management interrupt.
    Smi = 0x0000_4200,
    /// A non-maskable interrupt.
    Nmi = 0x0000_4400,
    /// A reset of the core.
    Init = INIT,
}

/// Sends a signal to the core with this APIC id.
pub fn signal(apic_id: u8, signal: Signal) {
    send(apic_id, signal as u32);
}

fn send(apic_id: u8, command: u32) {
    // The two halves are one operation: an interrupt in between may send too.
    x86_64::instructions::interrupts::without_interrupts(|| {
        while read(ICR_LOW) & DELIVERY_PENDING != 0 {
            core::hint::spin_loop();
        }
        write(ICR_HIGH, u32::from(apic_id) << 24);
        write(ICR_LOW, command);
    });
}

/// Starts all other cores of the node at the real-mode page `page`, by the
/// manual's INIT, start-up, start-up sequence (vol. 2, 15.27.8 and 16.5).
pub fn start_all_others(page: u8, wait_us: impl Fn(u32)) {
    write(ICR_LOW, INIT | ALL_BUT_SELF);
    wait_us(10_000);
    for _ in 0..2 {
        write(ICR_LOW, STARTUP | ALL_BUT_SELF | u32::from(page));
        wait_us(200);
    }
}

/// Makes the timer interrupt this core after `ticks` of its clock (already
/// divided by 16); 0 stops it.
pub fn set_timer(ticks: u32) {
    write(INITIAL_COUNT, ticks);
}

/// Runs the timer without interrupts for calibration and returns what
/// `during` returned and the ticks that passed.
pub fn count_ticks<T>(during: impl FnOnce() -> T) -> (T, u32) {
    write(LVT_TIMER, MASKED | u32::from(TIMER_VECTOR));
    write(INITIAL_COUNT, u32::MAX);
    let result = during();
    let passed = u32::MAX - read(CURRENT_COUNT);
    write(INITIAL_COUNT, 0);
    write(LVT_TIMER, u32::from(TIMER_VECTOR));
    (result, passed)
}
