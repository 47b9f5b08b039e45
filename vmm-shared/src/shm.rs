//! A window of memory that others write while we read it.
//!
//! No Rust reference to plain data is ever made into such memory: a peer may
//! change it at any time. All access is by atomics or by relaxed copies, and
//! every access is checked against the window.
#![expect(
    unsafe_code,
    reason = "the one place that touches shared memory by pointer"
)]

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A range of bytes shared with other nodes, processes or the guest.
///
/// Copying the handle copies the window, not the memory.
#[derive(Clone, Copy, Debug)]
pub struct SharedMem {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: all access goes through atomics, so threads may share the window;
// `new` obliges the creator to keep the memory mapped for all of them.
unsafe impl Send for SharedMem {}
// SAFETY: as for Send.
unsafe impl Sync for SharedMem {}

impl SharedMem {
    /// The window of `len` bytes at `base`.
    ///
    /// # Safety
    /// 1. The range is mapped readable and writable for as long as this value
    ///    or a copy of it lives.
    /// 2. `base` is aligned to 8 bytes.
    /// 3. Nothing in this program makes a plain reference into the range.
    #[must_use]
    pub const unsafe fn new(base: NonNull<u8>, len: usize) -> Self {
        Self { base, len }
    }

    /// Bytes in the window.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether the window holds no bytes.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the window starts in this program's address space.
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// The part of `len` bytes at `offset`, or `None` if it is not all inside
    /// the window or `offset` is not a multiple of 8.
    #[must_use]
    pub fn window(&self, offset: usize, len: usize) -> Option<Self> {
        let base = self.at(offset, len, 8)?;
        Some(Self { base, len })
    }

    fn at(&self, offset: usize, len: usize, align: usize) -> Option<NonNull<u8>> {
        if offset.checked_add(len)? > self.len || !offset.is_multiple_of(align) {
            return None;
        }
        // SAFETY: offset <= len, so the result stays inside the window.
        Some(unsafe { self.base.add(offset) })
    }

    /// The 32-bit word at `offset` (naturally aligned), if inside the window.
    #[must_use]
    pub fn atomic_u32(&self, offset: usize) -> Option<&AtomicU32> {
        let at = self.at(offset, 4, 4)?;
        // SAFETY: 1. in bounds and aligned by `at`; 2. mapped by `new`'s
        // contract; 3. only ever accessed atomically.
        Some(unsafe { AtomicU32::from_ptr(at.as_ptr().cast()) })
    }

    /// The 64-bit word at `offset` (naturally aligned), if inside the window.
    #[must_use]
    pub fn atomic_u64(&self, offset: usize) -> Option<&AtomicU64> {
        let at = self.at(offset, 8, 8)?;
        // SAFETY: as in `atomic_u32`.
        Some(unsafe { AtomicU64::from_ptr(at.as_ptr().cast()) })
    }

    /// `count` 64-bit words from `offset` on (naturally aligned), if all are
    /// inside the window.
    #[must_use]
    pub fn atomic_words(&self, offset: usize, count: usize) -> Option<&[AtomicU64]> {
        let base = self.at(offset, count.checked_mul(8)?, 8)?;
        // SAFETY: 1. in bounds and aligned by `at`; 2. mapped by `new`'s
        // contract; 3. only ever accessed atomically; 4. AtomicU64 has the
        // layout of a u64.
        Some(unsafe { core::slice::from_raw_parts(base.as_ptr().cast(), count) })
    }

    /// All whole words of the window, without the window's lifetime.
    ///
    /// # Safety
    /// The caller keeps this value, or a copy, for as long as it uses the
    /// words, and hands them to nobody who might keep them longer.
    #[cfg(not(loom))]
    #[must_use]
    pub(crate) const unsafe fn words_unbound(&self) -> &'static [AtomicU64] {
        // SAFETY: as in `atomic_words`, for the whole window, whose base is
        // aligned by `new`'s contract; the lifetime is the caller's promise.
        unsafe { core::slice::from_raw_parts(self.base.as_ptr().cast(), self.len / 8) }
    }

    /// Copies bytes out of the window; `None` if they are not all inside it.
    ///
    /// The copy is not atomic as a whole, unless it is a naturally aligned
    /// word of 2, 4 or 8 bytes: a peer may change the bytes while they are
    /// read. Check what was copied, not the source.
    #[must_use = "nothing was copied if this is None"]
    pub fn read_bytes(&self, offset: usize, into: &mut [u8]) -> Option<()> {
        let base = self.at(offset, into.len(), 1)?.as_ptr();
        // SAFETY: in bounds by `at`, and aligned by the guards.
        unsafe {
            match into.len() {
                2 if base.addr().is_multiple_of(2) => {
                    let word = AtomicU16::from_ptr(base.cast()).load(Ordering::Relaxed);
                    into.copy_from_slice(&word.to_ne_bytes());
                    return Some(());
                }
                4 if base.addr().is_multiple_of(4) => {
                    let word = AtomicU32::from_ptr(base.cast()).load(Ordering::Relaxed);
                    into.copy_from_slice(&word.to_ne_bytes());
                    return Some(());
                }
                _ => {}
            }
        }
        let head = base.align_offset(8).min(into.len());
        let (first, rest) = into.split_at_mut(head);
        let (words, last) = rest.as_chunks_mut::<8>();
        let mut at = base;
        // SAFETY: for all accesses below: 1. the sum of the pieces is
        // `into.len()`, which `at` has checked; 2. words start 8-aligned.
        unsafe {
            for byte in first {
                *byte = AtomicU8::from_ptr(at).load(Ordering::Relaxed);
                at = at.add(1);
            }
            for word in words {
                let value = AtomicU64::from_ptr(at.cast()).load(Ordering::Relaxed);
                *word = value.to_ne_bytes();
                at = at.add(8);
            }
            for byte in last {
                *byte = AtomicU8::from_ptr(at).load(Ordering::Relaxed);
                at = at.add(1);
            }
        }
        Some(())
    }

    /// Copies bytes into the window; `None` (and nothing written) if they do
    /// not all fit. Atomic as a whole where [`read_bytes`](Self::read_bytes)
    /// is.
    #[must_use = "nothing was copied if this is None"]
    pub fn write_bytes(&self, offset: usize, from: &[u8]) -> Option<()> {
        let base = self.at(offset, from.len(), 1)?.as_ptr();
        // SAFETY: in bounds by `at`, and aligned by the guards.
        unsafe {
            match *from {
                [a, b] if base.addr().is_multiple_of(2) => {
                    let word = u16::from_ne_bytes([a, b]);
                    AtomicU16::from_ptr(base.cast()).store(word, Ordering::Relaxed);
                    return Some(());
                }
                [a, b, c, d] if base.addr().is_multiple_of(4) => {
                    let word = u32::from_ne_bytes([a, b, c, d]);
                    AtomicU32::from_ptr(base.cast()).store(word, Ordering::Relaxed);
                    return Some(());
                }
                _ => {}
            }
        }
        let head = base.align_offset(8).min(from.len());
        let (first, rest) = from.split_at(head);
        let (words, last) = rest.as_chunks::<8>();
        let mut at = base;
        // SAFETY: as in `read_bytes`.
        unsafe {
            for byte in first {
                AtomicU8::from_ptr(at).store(*byte, Ordering::Relaxed);
                at = at.add(1);
            }
            for word in words {
                AtomicU64::from_ptr(at.cast()).store(u64::from_ne_bytes(*word), Ordering::Relaxed);
                at = at.add(8);
            }
            for byte in last {
                AtomicU8::from_ptr(at).store(*byte, Ordering::Relaxed);
                at = at.add(1);
            }
        }
        Some(())
    }

    /// Copies all whole words of an equally long window into this one; `None`
    /// (and nothing copied) if its length differs. The order is anybody's.
    #[must_use = "nothing was copied if this is None"]
    pub fn copy_from(&self, other: &Self) -> Option<()> {
        let count = self.len / 8;
        let (to, from) = (self.atomic_words(0, count)?, other.atomic_words(0, count)?);
        (self.len == other.len).then_some(())?;
        let (to, to_rest) = to.as_chunks::<8>();
        let (from, from_rest) = from.as_chunks::<8>();
        // A line at a time: nothing else unrolls a loop over atomics, and its
        // bookkeeping costs more than the copy.
        for (to, from) in to.iter().zip(from) {
            let line = from.each_ref().map(|word| word.load(Ordering::Relaxed));
            for (to, word) in to.iter().zip(line) {
                to.store(word, Ordering::Relaxed);
            }
        }
        for (to, from) in to_rest.iter().zip(from_rest) {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        Some(())
    }

    /// A copy of the fixed-layout value at `offset`, if inside the window.
    #[must_use]
    pub fn read<T: FromBytes + IntoBytes>(&self, offset: usize) -> Option<T> {
        let mut value = T::new_zeroed();
        self.read_bytes(offset, value.as_mut_bytes())?;
        Some(value)
    }

    /// Stores a fixed-layout value at `offset`; `None` if it does not fit.
    #[must_use = "nothing was stored if this is None"]
    pub fn write<T: IntoBytes + Immutable>(&self, offset: usize, value: &T) -> Option<()> {
        self.write_bytes(offset, value.as_bytes())
    }
}

/// A zeroed, 64-byte-aligned buffer that stands in for a region in tests.
#[cfg(test)]
pub(crate) mod testing {
    use super::SharedMem;
    use core::ptr::NonNull;

    #[repr(C, align(64))]
    #[derive(Clone, Copy)]
    struct Line([u8; 64]);

    /// A shared window of `lines` × 64 bytes, leaked on purpose.
    pub(crate) fn leaked(lines: usize) -> SharedMem {
        let memory = Box::leak(vec![Line([0; 64]); lines].into_boxed_slice());
        let len = core::mem::size_of_val(memory);
        let base = NonNull::new(memory.as_mut_ptr())
            .expect("a box is not null")
            .cast();
        // SAFETY: leaked, so mapped for ever; aligned by `Line`; the only
        // reference to it ends here.
        unsafe { SharedMem::new(base, len) }
    }
}

#[cfg(test)]
mod tests {
    use super::SharedMem;
    use super::testing::leaked;

    #[test]
    fn bytes_come_back_at_every_alignment() {
        let memory = leaked(4);
        let data: Vec<u8> = (1..=100).collect();
        for offset in 0..16 {
            memory.write_bytes(offset, &data).expect("fits");
            let mut back = vec![0; data.len()];
            memory.read_bytes(offset, &mut back).expect("fits");
            assert_eq!(back, data, "at offset {offset}");
        }
    }

    #[test]
    fn a_window_is_copied_as_a_whole_or_not_at_all() {
        let (one, other) = (leaked(2), leaked(2));
        let data: Vec<u8> = (0..128).collect();
        other.write_bytes(0, &data).expect("fits");
        // Also words that make no whole line.
        for len in [24, 72, 128] {
            let part = |of: &SharedMem| of.window(0, len).expect("inside");
            assert_eq!(part(&one).copy_from(&part(&other)), Some(()));
            let mut back = vec![0; 128];
            one.read_bytes(0, &mut back).expect("fits");
            assert_eq!(back[..len], data[..len]);
            assert!(back[len..].iter().all(|byte| *byte == 0), "beyond {len}");
        }
        assert_eq!(one.copy_from(&leaked(1)), None);
        assert_eq!(leaked(1).copy_from(&one), None);
    }

    #[test]
    fn an_aligned_word_is_never_seen_half_written() {
        let memory = leaked(1);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for _ in 0..50_000 {
                    memory.write_bytes(4, &[0xff; 4]).expect("fits");
                    memory.write_bytes(4, &[0; 4]).expect("fits");
                    memory.write_bytes(10, &[0xff; 2]).expect("fits");
                    memory.write_bytes(10, &[0; 2]).expect("fits");
                }
            });
            for _ in 0..100_000 {
                let word: u32 = memory.read(4).expect("fits");
                assert!(matches!(word, 0 | u32::MAX), "{word:#x}");
                let half: u16 = memory.read(10).expect("fits");
                assert!(matches!(half, 0 | u16::MAX), "{half:#x}");
            }
        });
    }

    #[test]
    fn nothing_outside_the_window_is_touched() {
        let memory = leaked(1);
        assert!(memory.write_bytes(60, &[1; 5]).is_none());
        assert!(memory.read_bytes(usize::MAX, &mut [0; 2]).is_none());
        assert!(memory.atomic_u64(60).is_none());
        assert!(memory.atomic_u32(2).is_none());
        assert!(memory.atomic_words(8, 8).is_none());
        assert!(memory.atomic_words(8, usize::MAX).is_none());
        assert_eq!(memory.atomic_words(8, 7).expect("fits").len(), 7);
        assert!(memory.window(8, 57).is_none());
        let mut all = [0xff; 64];
        memory.read_bytes(0, &mut all).expect("fits");
        assert_eq!(all, [0; 64]);
    }
}
