//! The end, if the kernel itself is wrong.

use core::fmt::Write;
use core::panic::PanicInfo;

use spin::Once;
use vmm_shared::pv::Hypercall;
use vmm_shared::ring::ByteRing;

use super::cpu;

/// Where last words go.
pub(super) static CONSOLE: Once<ByteRing> = Once::new();

struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        if let Some(ring) = CONSOLE.get() {
            ring.write(text.as_bytes());
        }
        Ok(())
    }
}

/// Prints on the console.
pub(super) fn say(text: core::fmt::Arguments<'_>) {
    // A console that nobody reads loses what is printed.
    let _ = Console.write_fmt(text);
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say(format_args!(
        "viaduct: the guest kernel has failed: {info}\n"
    ));
    cpu::hypercall(Hypercall::RingLauncher);
    loop {
        cpu::hypercall(Hypercall::Crash);
    }
}
