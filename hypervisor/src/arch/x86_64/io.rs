//! Port I/O, and what the launcher expects at two ports: the log and the end.
#![expect(unsafe_code, reason = "IN and OUT are privileged instructions")]

use core::arch::asm;
use core::fmt::{self, Write};

/// Every byte written here is a byte of this node's log.
const LOG_PORT: u16 = 0xe9;
/// A value written here ends the node with exit status `(value << 1) | 1`.
const EXIT_PORT: u16 = 0xf4;

/// How a node ends; the launcher reads it from the process's exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum NodeExit {
    /// In order: the VM has stopped, and its state says why.
    Done = 0x10,
    /// The node could not come up; its last log line says why.
    BootFailure = 0x11,
    /// The hypervisor found one of its own invariants broken.
    Panic = 0x12,
    /// The others had put the node out.
    Fenced = 0x13,
}

/// Writes a byte to a port.
///
/// # Safety
/// The device behind the port must not be made to break memory safety.
pub unsafe fn outb(port: u16, value: u8) {
    // SAFETY: the caller's duty.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags))
    };
}

/// Writes a doubleword to a port.
///
/// # Safety
/// As for [`outb`].
pub unsafe fn outl(port: u16, value: u32) {
    // SAFETY: the caller's duty.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags))
    };
}

/// Reads a doubleword from a port.
///
/// # Safety
/// The port's device must tolerate the read.
#[must_use]
pub unsafe fn inl(port: u16) -> u32 {
    let value;
    // SAFETY: the caller's duty.
    unsafe {
        asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags))
    };
    value
}

/// Ends this node.
pub fn exit(how: NodeExit) -> ! {
    // SAFETY: the port stops the machine; nothing runs afterwards.
    unsafe { outl(EXIT_PORT, how as u32) };
    loop {
        // SAFETY: without the exit device (real hardware) the core just stops.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

/// Silences the legacy interrupt controllers, which firmware leaves with the
/// interval timer unmasked.
pub fn mask_legacy_interrupts() {
    for data_port in [0x21, 0xa1] {
        // SAFETY: masking all inputs only keeps interrupts away.
        unsafe { outb(data_port, 0xff) };
    }
}

struct LogPort;

impl Write for LogPort {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // SAFETY: the log port only collects bytes.
            unsafe { outb(LOG_PORT, byte) };
        }
        Ok(())
    }
}

struct Logger;

/// One line at a time, whichever core writes it.
static LOG: spin::Mutex<LogPort> = spin::Mutex::new(LogPort);

impl log::Log for Logger {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let mut port = LOG.lock();
        // Writing to the port cannot fail; a `Display` that does is cut short.
        let _ = writeln!(port, "{}: {}", record.level(), record.args());
    }

    fn flush(&self) {}
}

/// Sends the log of this node to its port.
pub fn init_log() {
    static LOGGER: Logger = Logger;
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(log::LevelFilter::Info);
    }
}

/// Writes a last message even if this core was interrupted while logging.
pub fn write_unlocked(args: fmt::Arguments<'_>) {
    let _ = LogPort.write_fmt(args);
}
