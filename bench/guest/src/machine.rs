//! What both programs need of the machine: a line to the host, and the end.

use std::io::{self, Write};
use std::thread;
use std::time::Duration;

use rustix::system::{RebootCommand, reboot};

/// Prints one line for the host and waits until the serial port has taken it.
pub(crate) fn tell(line: &str) {
    // With nobody to tell, there is nothing left to do.
    let _ = io::stdout().write_all(format!("@bench {line}\n").as_bytes());
    let _ = rustix::termios::tcdrain(rustix::stdio::stdout());
}

/// Switches the machine off. The host doesn't wait for it: the last line has
/// been printed before.
pub(crate) fn power_off() -> ! {
    loop {
        // It returns only if the machine has no way to switch itself off.
        let _ = reboot(RebootCommand::PowerOff);
        let _ = reboot(RebootCommand::Halt);
        thread::sleep(Duration::from_secs(1));
    }
}
