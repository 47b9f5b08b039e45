//! Pages from the kernel, to be protected, moved and executed.
#![expect(unsafe_code, reason = "maps memory and calls what is written there")]

use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU32, Ordering};

pub(crate) use libc::{PROT_EXEC, PROT_NONE, PROT_READ, PROT_WRITE};

/// Bytes in a page.
pub(crate) const PAGE: usize = 4096;

/// A file in memory, of some pages.
#[derive(Debug)]
pub(crate) struct Pages(libc::c_int);

impl Pages {
    /// A file of so many pages of zeros.
    pub(crate) fn new(count: usize) -> Self {
        let len = libc::off_t::try_from(count * PAGE).expect("small");
        // SAFETY: the name is a C string; the descriptor is ours.
        let file = unsafe {
            let file = libc::memfd_create(c"litmus".as_ptr(), 0);
            assert!(file >= 0, "no memory file");
            assert_eq!(libc::ftruncate(file, len), 0, "no room");
            file
        };
        Self(file)
    }

    /// Maps one of the pages: anywhere, or in the place of another mapping.
    pub(crate) fn map(&self, page: usize, rights: libc::c_int, place: Option<&Mapped>) -> Mapped {
        let offset = libc::off_t::try_from(page * PAGE).expect("small");
        let (at, fixed) = match place {
            Some(mapped) => (mapped.0.as_ptr().cast(), libc::MAP_FIXED),
            None => (null_mut(), 0),
        };
        // SAFETY: a new mapping, or one in the place of ours, of which nothing
        // but atomics and code of this program's own is ever used.
        let found =
            unsafe { libc::mmap(at, PAGE, rights, libc::MAP_SHARED | fixed, self.0, offset) };
        assert_ne!(found, libc::MAP_FAILED, "no mapping");
        Mapped(NonNull::new(found.cast()).expect("not at address 0"))
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the descriptor is ours.
        unsafe { libc::close(self.0) };
    }
}

/// A mapped page. Stays mapped: a program maps a few and ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapped(NonNull<AtomicU32>);

// SAFETY: only atomics are accessed, and code that atomics have written.
unsafe impl Send for Mapped {}
// SAFETY: as for Send.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// One of the page's words.
    pub(crate) fn word(&self, index: usize) -> &AtomicU32 {
        assert!(index < PAGE / 4, "inside the page");
        // SAFETY: inside the page, aligned; an access that faults is repeated
        // when the page is back (see `shootdown`).
        unsafe { self.0.add(index).as_ref() }
    }

    /// Changes the page's rights.
    pub(crate) fn protect(&self, rights: libc::c_int) {
        // SAFETY: the page is ours; who accesses it meanwhile waits.
        let done = unsafe { libc::mprotect(self.0.as_ptr().cast(), PAGE, rights) };
        assert_eq!(done, 0, "no protection");
    }

    /// Takes the page out.
    pub(crate) fn unmap(&self) {
        // SAFETY: as in `protect`.
        let done = unsafe { libc::munmap(self.0.as_ptr().cast(), PAGE) };
        assert_eq!(done, 0, "no unmapping");
    }

    /// Writes a function that returns `value`, at a multiple of 8 bytes:
    /// `mov eax, value; ret`. By two stores: who runs it has to wait until
    /// both are done.
    pub(crate) fn write_function(&self, slot: usize, value: u32) {
        let [a, b, c, d] = value.to_le_bytes();
        // The value's bytes 1 to 4 of the instruction lie in both words.
        let (first, second) = (
            u32::from_le_bytes([0xb8, a, b, c]),
            u32::from_le_bytes([d, 0xc3, 0xcc, 0xcc]),
        );
        self.word(slot * 2 + 1).store(second, Ordering::Relaxed);
        self.word(slot * 2).store(first, Ordering::Release);
    }

    /// Calls it, after an instruction that makes this CPU forget what it has
    /// fetched, as the architecture demands of who runs what others wrote
    /// (AMD64 manual, vol. 2, 7.6.1).
    pub(crate) fn call_function(&self, slot: usize) -> u32 {
        let _ = std::arch::x86_64::__cpuid(0);
        let at = std::ptr::from_ref(self.word(slot * 2));
        // SAFETY: `write_function` has been here, and everybody has waited for
        // that; the page is executable.
        let function: extern "C" fn() -> u32 = unsafe { std::mem::transmute(at) };
        function()
    }
}
