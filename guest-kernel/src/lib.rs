//! The paravirtual guest kernel, all but its entry point.
//!
//! It runs unmodified Linux programs. A program's system call or fault is an
//! *exit*, as a guest's is in the hypervisor: [`arch`] runs a thread until it
//! exits, [`Kernel`] changes its state and says what to run next. A call that
//! must wait leaves nothing on a stack: its thread is put on wait queues, and
//! when it is woken the call is made again. So the state of every process is
//! plain data at any time, which is what replicating and moving it needs.
//!
//! Everything outside of [`arch`] is safe code that is tested on the host.
//! Programs' memory is reached through their page tables, never by their
//! addresses, so that no argument of theirs can make the kernel fault.

#![cfg_attr(not(test), no_std)]

extern crate alloc;

#[cfg(target_os = "none")]
pub mod arch;
mod calls;
mod errno;
mod fs;
mod futex;
pub mod holder;
pub mod kernel;
mod losses;
pub mod machine;
mod mem;
mod pi;
mod process;
pub mod running;
pub mod sched;
mod streams;
mod table;
#[cfg(test)]
mod testing;
mod timers;
mod user;
mod vdso;
mod wait;

pub use kernel::Kernel;

/// What the fuzz targets call: parsers of what a peer, an image or a program
/// says.
#[cfg(fuzzing)]
pub mod fuzzing {
    use vmm_shared::shm::SharedMem;

    /// Reads all that can be reached in what claims to be a root image.
    pub fn root_image(image: SharedMem) {
        crate::fs::ext4::walk_image(image);
    }

    /// Reads what a program passes to calls of sockets.
    pub fn sockets(bytes: &[u8]) {
        crate::calls::sockets::read_anything(bytes);
    }

    /// Applies what claims to be entries of a process's log of regions.
    pub fn regions(entries: &[u8]) {
        crate::mem::entry::apply_anything(entries);
    }
}
