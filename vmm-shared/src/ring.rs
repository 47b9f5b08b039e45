//! A bounded byte queue with one producer and one consumer, in shared memory.
//!
//! ```text
//!   0      head: bytes ever written   (producer's line)
//!   64     tail: bytes ever read      (consumer's line)
//!   128    who sleeps: consumer, producer
//!   192    data, a power of two of bytes
//! ```
//!
//! Both cursors only grow; their difference is the fill. A peer that writes
//! garbage into its cursor makes the queue look empty or full, or the data
//! wrong, but never makes this side leave the window.
//!
//! A side that has nothing to do arms itself and sleeps; the other side takes
//! the arm after its next move and then owes a doorbell. Both write one word
//! and read the other, sequentially consistent, so a wake-up can only be lost
//! with the doorbell itself: who sleeps also has a time-out.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use crate::shm::SharedMem;

const HEAD: usize = 0;
const TAIL: usize = 64;
const CONSUMER_SLEEPS: usize = 128;
const PRODUCER_SLEEPS: usize = 132;
const DATA: usize = 192;

/// Bytes that a ring with `capacity` bytes of data occupies.
#[must_use]
pub const fn ring_size(capacity: usize) -> usize {
    DATA + capacity
}

/// One end, or a mere observer, of a byte ring.
#[derive(Clone, Copy, Debug)]
pub struct ByteRing {
    memory: SharedMem,
    capacity: u64,
}

impl ByteRing {
    /// The ring in `memory`, or `None` unless its data part is a power of two
    /// of at least 64 bytes. Zeroed memory is an empty ring.
    #[must_use]
    pub fn new(memory: SharedMem) -> Option<Self> {
        let capacity = memory.len().checked_sub(DATA)?;
        (capacity.is_power_of_two() && capacity >= 64).then_some(Self {
            memory,
            capacity: capacity as u64,
        })
    }

    fn cursor(&self, offset: usize) -> &AtomicU64 {
        self.memory
            .atomic_u64(offset)
            .expect("`new` has checked the size")
    }

    /// Bytes that wait to be read. More than the capacity can't wait: a
    /// cursor that says so is a peer's garbage, and is read as "none".
    #[must_use]
    pub fn len(&self) -> usize {
        // Acquire: pairs with the producer's Release of head, so that the
        // bytes counted here are visible.
        let head = self.cursor(HEAD).load(Ordering::Acquire);
        let tail = self.cursor(TAIL).load(Ordering::Acquire);
        let fill = head.wrapping_sub(tail);
        if fill > self.capacity {
            0
        } else {
            usize::try_from(fill).expect("at most the capacity")
        }
    }

    /// Whether nothing waits to be read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that can be written now.
    #[must_use]
    pub fn space(&self) -> usize {
        let head = self.cursor(HEAD).load(Ordering::Acquire);
        // Acquire: pairs with the consumer's Release of tail, so that it has
        // finished with the bytes about to be overwritten.
        let tail = self.cursor(TAIL).load(Ordering::Acquire);
        let fill = head.wrapping_sub(tail);
        usize::try_from(self.capacity.saturating_sub(fill)).expect("at most the capacity")
    }

    fn index(&self, cursor: u64) -> usize {
        usize::try_from(cursor & (self.capacity - 1)).expect("at most the capacity")
    }

    /// Appends as much of `bytes` as fits; returns how much. Producer only.
    pub fn write(&self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(self.space());
        let head = self.cursor(HEAD).load(Ordering::Relaxed);
        let at = self.index(head);
        let (first, second) = bytes[..count].split_at(count.min(self.index(u64::MAX) + 1 - at));
        self.memory
            .write_bytes(DATA + at, first)
            .expect("inside the ring");
        self.memory
            .write_bytes(DATA, second)
            .expect("inside the ring");
        // Release: the bytes are visible before the cursor that covers them.
        self.cursor(HEAD)
            .store(head.wrapping_add(count as u64), Ordering::Release);
        count
    }

    /// Takes as much as is there, up to `into.len()`; returns how much.
    /// Consumer only.
    pub fn read(&self, into: &mut [u8]) -> usize {
        let tail = self.cursor(TAIL).load(Ordering::Relaxed);
        let count = self.copy_from(tail, into);
        // Release: the copy above is done before the space is given back.
        self.cursor(TAIL)
            .store(tail.wrapping_add(count as u64), Ordering::Release);
        count
    }

    fn sleeper(&self, offset: usize) -> &AtomicU32 {
        self.memory
            .atomic_u32(offset)
            .expect("`new` has checked the size")
    }

    /// Announces that the consumer is about to sleep; false if there is
    /// something to read after all.
    #[must_use]
    pub fn arm_consumer(&self) -> bool {
        self.sleeper(CONSUMER_SLEEPS).store(1, Ordering::SeqCst);
        // SeqCst: the arm is visible before the cursors are looked at.
        fence(Ordering::SeqCst);
        self.is_empty()
    }

    /// Announces that the producer is about to sleep; false if there is space
    /// after all.
    #[must_use]
    pub fn arm_producer(&self) -> bool {
        self.sleeper(PRODUCER_SLEEPS).store(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.space() == 0
    }

    /// Whether the consumer sleeps and must be woken, now that bytes were
    /// written. True once per sleep.
    #[must_use]
    pub fn must_wake_consumer(&self) -> bool {
        Self::take(self.sleeper(CONSUMER_SLEEPS))
    }

    /// Whether the producer sleeps and must be woken, now that bytes were
    /// read. True once per sleep.
    #[must_use]
    pub fn must_wake_producer(&self) -> bool {
        Self::take(self.sleeper(PRODUCER_SLEEPS))
    }

    fn take(sleeper: &AtomicU32) -> bool {
        // SeqCst: our cursor is visible before the arm is looked at.
        fence(Ordering::SeqCst);
        sleeper.load(Ordering::SeqCst) != 0 && sleeper.swap(0, Ordering::SeqCst) != 0
    }

    fn copy_from(&self, tail: u64, into: &mut [u8]) -> usize {
        let count = into.len().min(self.len());
        let at = self.index(tail);
        let (first, second) = into[..count].split_at_mut(count.min(self.index(u64::MAX) + 1 - at));
        self.memory
            .read_bytes(DATA + at, first)
            .expect("inside the ring");
        self.memory
            .read_bytes(DATA, second)
            .expect("inside the ring");
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::testing::leaked;

    fn ring(capacity: usize) -> ByteRing {
        ByteRing::new(leaked(ring_size(capacity) / 64)).expect("a legal size")
    }

    #[test]
    fn bytes_come_out_in_order_across_many_wraps() {
        let ring = ring(64);
        let mut next_in = 0_u8;
        let mut next_out = 0_u8;
        for step in 1..500_usize {
            let chunk: Vec<u8> = (0..step % 71)
                .map(|i| next_in.wrapping_add(i as u8))
                .collect();
            let written = ring.write(&chunk);
            next_in = next_in.wrapping_add(written as u8);
            let mut back = vec![0; (step * 7) % 67];
            let read = ring.read(&mut back);
            for byte in &back[..read] {
                assert_eq!(*byte, next_out);
                next_out = next_out.wrapping_add(1);
            }
        }
        assert_eq!(usize::from(next_in.wrapping_sub(next_out)), ring.len());
    }

    #[test]
    fn a_full_ring_takes_nothing_and_an_empty_one_gives_nothing() {
        let ring = ring(64);
        assert_eq!(ring.read(&mut [0; 8]), 0);
        assert_eq!(ring.write(&[1; 100]), 64);
        assert_eq!(ring.space(), 0);
        assert_eq!(ring.write(&[1]), 0);
    }

    #[test]
    fn a_garbage_cursor_gives_no_bytes_and_takes_none() {
        let ring = ring(64);
        ring.cursor(HEAD).store(u64::MAX / 2, Ordering::Relaxed);
        assert_eq!(ring.len(), 0);
        assert_eq!(ring.read(&mut [0; 8]), 0);
        assert_eq!(ring.write(&[1]), 0);
    }

    #[test]
    fn a_sleeper_is_woken_once_and_only_if_it_sleeps() {
        let ring = ring(64);
        assert_eq!(ring.write(&[1]), 1);
        assert!(!ring.must_wake_consumer(), "nobody sleeps");
        assert!(!ring.arm_consumer(), "there is something to read");
        assert_eq!(ring.read(&mut [0; 8]), 1);
        assert!(ring.arm_consumer());
        assert!(ring.must_wake_consumer());
        assert!(!ring.must_wake_consumer(), "one wake-up per sleep");
        assert!(!ring.arm_producer(), "there is space");
        assert_eq!(ring.write(&[1; 64]), 64);
        assert!(ring.arm_producer());
        assert!(ring.must_wake_producer());
    }

    #[test]
    fn odd_sizes_are_refused() {
        assert!(ByteRing::new(leaked(1)).is_none());
        assert!(ByteRing::new(leaked(3)).is_none());
        assert!(ByteRing::new(leaked(6)).is_none());
        assert!(ByteRing::new(leaked(4)).is_some());
    }

    #[test]
    fn two_threads_agree_on_every_byte() {
        let ring = ring(256);
        const TOTAL: usize = 200_000;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut sent = 0;
                while sent < TOTAL {
                    let chunk: Vec<u8> = (sent..TOTAL.min(sent + 100))
                        .map(|i| (i % 251) as u8)
                        .collect();
                    let written = ring.write(&chunk);
                    sent += written;
                    if written == 0 {
                        std::thread::yield_now();
                    }
                }
            });
            let mut seen = 0;
            let mut buffer = [0; 61];
            while seen < TOTAL {
                let count = ring.read(&mut buffer);
                for byte in &buffer[..count] {
                    assert_eq!(usize::from(*byte), seen % 251);
                    seen += 1;
                }
                if count == 0 {
                    std::thread::yield_now();
                }
            }
        });
    }
}
