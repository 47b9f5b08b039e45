//! The end, if the kernel itself is wrong.

use core::fmt::Write;
use core::panic::PanicInfo;

use spin::Once;
use vmm_shared::pv::Hypercall;
use vmm_shared::ring::ByteRing;

use super::{cpu, entry, losses};
use crate::holder::{Attempt, Holder};

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

/// Who says why the kernel has failed: what one has seen, others have, and
/// the console is for one at a time.
static SPEAKER: Holder = Holder::free();

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let mine = entry::holder();
    // Else it has failed again.
    while !SPEAKER.is(mine) {
        match SPEAKER.try_take(mine, losses::has_lost) {
            Attempt::Taken | Attempt::Dead(_) => {
                say(format_args!(
                    "viaduct: the guest kernel has failed: {info}\n"
                ));
                break;
            }
            Attempt::Busy => core::hint::spin_loop(),
            Attempt::PutOut => cpu::stop(),
        }
    }
    cpu::hypercall(Hypercall::RingLauncher);
    loop {
        cpu::hypercall(Hypercall::Crash);
    }
}
