//! A buffer that the driver has made available: a chain of descriptors.

use alloc::vec::Vec;

use vmm_shared::addr::Gpa;

use crate::mem::GuestMemory;

use super::queue::QueueError;

/// A piece of guest memory, as the driver describes it. Its end is an address,
/// but need not be in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    gpa: Gpa,
    len: u32,
}

/// Segments and how far into them we are.
#[derive(Clone, Debug, Default)]
struct Stream {
    segments: Vec<Segment>,
    /// The segment that the next byte is in.
    segment: usize,
    /// Bytes of that segment that are done.
    done: u32,
}

impl Stream {
    fn clear(&mut self) {
        self.segments.clear();
        self.segment = 0;
        self.done = 0;
    }

    fn add(&mut self, gpa: Gpa, len: u32) -> Result<(), QueueError> {
        gpa.checked_add(u64::from(len))
            .ok_or(QueueError::OutsideMemory { gpa })?;
        self.segments.push(Segment { gpa, len });
        Ok(())
    }

    /// The next piece of at most `limit` bytes, none of them empty.
    fn next(&mut self, limit: usize) -> Option<(Gpa, usize)> {
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        while let Some(segment) = self.segments.get(self.segment) {
            let left = segment.len - self.done;
            if left == 0 {
                self.segment += 1;
                self.done = 0;
                continue;
            }
            let count = left.min(limit);
            if count == 0 {
                return None;
            }
            let gpa = Gpa(segment.gpa.0 + u64::from(self.done));
            self.done += count;
            return Some((gpa, usize::try_from(count).expect("at most `limit`")));
        }
        None
    }

    fn left(&self) -> u64 {
        let all: u64 = self.segments[self.segment.min(self.segments.len())..]
            .iter()
            .map(|segment| u64::from(segment.len))
            .sum();
        all.saturating_sub(u64::from(self.done))
    }
}

/// One buffer, taken off the available ring.
///
/// The descriptors were read once; what the driver does to them afterwards
/// has no effect.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    head: u16,
    readable: Stream,
    writable: Stream,
    written: u32,
}

impl Chain {
    pub(super) fn start(&mut self, head: u16) {
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        self.written = 0;
    }

    pub(super) fn add_readable(&mut self, gpa: Gpa, len: u32) -> Result<(), QueueError> {
        self.readable.add(gpa, len)
    }

    pub(super) fn add_writable(&mut self, gpa: Gpa, len: u32) -> Result<(), QueueError> {
        self.writable.add(gpa, len)
    }

    pub(super) fn has_writable(&self) -> bool {
        !self.writable.segments.is_empty()
    }

    /// The descriptor that the chain starts with, by which it is given back.
    #[must_use]
    pub const fn head(&self) -> u16 {
        self.head
    }

    /// Bytes written so far.
    #[must_use]
    pub const fn written(&self) -> u32 {
        self.written
    }

    /// Bytes from the driver that have not been read.
    #[must_use]
    pub fn readable_left(&self) -> u64 {
        self.readable.left()
    }

    /// Room for bytes to the driver that has not been written.
    #[must_use]
    pub fn writable_left(&self) -> u64 {
        self.writable.left()
    }

    /// Reads on into `into`; returns how much, which is less than asked for
    /// only at the end of the chain.
    ///
    /// # Errors
    /// If the driver's addresses are not in guest memory.
    pub fn read(
        &mut self,
        memory: &impl GuestMemory,
        into: &mut [u8],
    ) -> Result<usize, QueueError> {
        let mut at = 0;
        while let Some((gpa, count)) = self.readable.next(into.len() - at) {
            memory.read_bytes(gpa, &mut into[at..at + count])?;
            at += count;
        }
        Ok(at)
    }

    /// Writes on from `from`; returns how much, which is less than given only
    /// at the end of the chain.
    ///
    /// # Errors
    /// If the driver's addresses are not in guest memory.
    pub fn write(&mut self, memory: &impl GuestMemory, from: &[u8]) -> Result<usize, QueueError> {
        let mut at = 0;
        while let Some((gpa, count)) = self.writable.next(from.len() - at) {
            memory.write_bytes(gpa, &from[at..at + count])?;
            at += count;
        }
        // Saturating: the sum of the lengths may pass 4 GiB.
        self.written = self
            .written
            .saturating_add(u32::try_from(at).unwrap_or(u32::MAX));
        Ok(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::sparse::SparseMemory;

    #[test]
    fn reads_gather_over_segments_and_empty_ones() {
        let ram = SparseMemory::new(0x1000);
        ram.write_bytes(Gpa(0x100), b"abc").expect("inside");
        ram.write_bytes(Gpa(0x200), b"defg").expect("inside");
        let mut chain = Chain::default();
        chain.start(3);
        for (gpa, len) in [(0x100, 3), (0xdead_0000, 0), (0x200, 4)] {
            chain.add_readable(Gpa(gpa), len).expect("an address");
        }
        assert_eq!(chain.readable_left(), 7);
        let mut into = [0; 5];
        assert_eq!(chain.read(&ram, &mut into), Ok(5));
        assert_eq!(&into, b"abcde");
        assert_eq!(chain.readable_left(), 2);
        assert_eq!(chain.read(&ram, &mut into), Ok(2));
        assert_eq!(&into[..2], b"fg");
        assert_eq!(chain.read(&ram, &mut into), Ok(0));
        assert_eq!(chain.readable_left(), 0);
    }

    #[test]
    fn writes_scatter_and_are_counted() {
        let ram = SparseMemory::new(0x1000);
        let mut chain = Chain::default();
        chain.start(0);
        chain.add_writable(Gpa(0x10), 2).expect("an address");
        chain.add_writable(Gpa(0x20), 2).expect("an address");
        assert_eq!(chain.write(&ram, b"abc"), Ok(3));
        assert_eq!((chain.written(), chain.writable_left()), (3, 1));
        assert_eq!(chain.write(&ram, b"de"), Ok(1));
        assert_eq!(chain.written(), 4);
        let mut into = [0; 0x12];
        ram.read_bytes(Gpa(0x10), &mut into).expect("inside");
        assert_eq!((&into[..2], &into[0x10..]), (&b"ab"[..], &b"cd"[..]));
    }

    #[test]
    fn lengths_and_addresses_at_the_limits_are_errors_not_overflows() {
        let ram = SparseMemory::new(0x1000);
        let mut chain = Chain::default();
        chain.start(0);
        let top = Gpa(u64::MAX - u64::from(u32::MAX));
        chain.add_readable(top, u32::MAX).expect("an address");
        chain.add_readable(top, u32::MAX).expect("an address");
        assert_eq!(chain.readable_left(), 2 * u64::from(u32::MAX));
        let beyond = Gpa(top.0 + 1);
        let error = QueueError::OutsideMemory { gpa: beyond };
        assert_eq!(chain.add_readable(beyond, u32::MAX), Err(error));
        assert_eq!(chain.add_writable(beyond, u32::MAX), Err(error));
        let mut into = [0; 16];
        assert!(chain.read(&ram, &mut into).is_err());
        assert!(chain.read(&ram, &mut into).is_err());
    }
}
