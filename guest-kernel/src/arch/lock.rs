//! The lock around the kernel.
//!
//! Who waits for it does what the holder orders meanwhile (forget
//! translations): else the two would wait for each other. It is held by
//! whoever is in the kernel, and never across a program's run or sleep.
#![expect(unsafe_code, reason = "gives out a reference under the lock")]

use alloc::boxed::Box;
use core::cell::UnsafeCell;
use core::ops::{Deref, DerefMut};

use super::machine::Hardware;
use super::{cpu, entry, losses};
use crate::holder::{Attempt, Holder};
use crate::kernel::Kernel;

/// The kernel and its lock, which is held until there is a kernel.
struct Lock {
    holder: Holder,
    kernel: UnsafeCell<Option<Box<Kernel>>>,
}

// SAFETY: the kernel is only reached under the lock; nothing in it is bound to
// a processor but what the machine keeps for each.
unsafe impl Sync for Lock {}

static LOCK: Lock = Lock {
    holder: Holder::held(),
    kernel: UnsafeCell::new(None),
};

/// Puts the kernel in its place and opens the lock. Called once.
pub(super) fn install(kernel: Kernel) {
    // SAFETY: the lock is held from the start, and by the caller alone.
    unsafe { *LOCK.kernel.get() = Some(Box::new(kernel)) };
    LOCK.holder.release();
}

/// The kernel, as long as this is held.
pub(super) struct Guard(());

/// Waits for the kernel.
///
/// # Panics
/// If a processor is lost that has it: what it was changing is half-changed.
pub(super) fn lock(hardware: Hardware) -> Guard {
    let mine = entry::holder();
    loop {
        match LOCK.holder.try_take(mine, losses::has_lost) {
            Attempt::Taken => return Guard(()),
            Attempt::Busy => {}
            Attempt::Dead(holder) => panic!("processor {} was lost in the kernel", holder - 1),
            // The others go on.
            Attempt::PutOut => cpu::stop(),
        }
        hardware.serve();
        core::hint::spin_loop();
    }
}

impl Deref for Guard {
    type Target = Kernel;

    fn deref(&self) -> &Kernel {
        // SAFETY: the lock is held.
        let kernel = unsafe { &*LOCK.kernel.get() };
        kernel.as_deref().expect("there is one when the lock opens")
    }
}

impl DerefMut for Guard {
    fn deref_mut(&mut self) -> &mut Kernel {
        // SAFETY: the lock is held, and this is borrowed mutably.
        let kernel = unsafe { &mut *LOCK.kernel.get() };
        kernel
            .as_deref_mut()
            .expect("there is one when the lock opens")
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        LOCK.holder.release();
    }
}
