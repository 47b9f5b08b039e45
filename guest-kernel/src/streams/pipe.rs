//! Pipes: a bounded queue of bytes, and how many can still reach each end.

use alloc::collections::VecDeque;

use crate::errno::{Errno, Result};
use crate::fs::node::NodeId;

/// Bytes that a new pipe holds.
const CAPACITY: usize = 1 << 16;
/// Most bytes that one can be made to hold.
const LARGEST: usize = 1 << 20;
/// Writes up to this many bytes are never mixed with others.
pub(crate) const ATOMIC: usize = 4096;

/// A pipe.
#[derive(Debug)]
pub(crate) struct Pipe {
    bytes: VecDeque<u8>,
    capacity: usize,
    pub(crate) readers: u32,
    pub(crate) writers: u32,
    /// The named pipe that it belongs to.
    pub(crate) node: Option<NodeId>,
    /// How often it has been opened for reading and writing: who opens one
    /// end of a named pipe waits for the other to change.
    pub(crate) opened: (u64, u64),
}

/// What becomes of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transfer {
    /// So many bytes were moved.
    Moved(usize),
    /// Nothing can be moved now.
    Wait,
    /// The other end is closed.
    Closed,
}

impl Pipe {
    pub(crate) fn new() -> Self {
        Self {
            bytes: VecDeque::new(),
            capacity: CAPACITY,
            readers: 0,
            writers: 0,
            node: None,
            opened: (0, 0),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn room(&self) -> usize {
        self.capacity - self.bytes.len()
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Makes it hold at least so many bytes.
    pub(crate) fn resize(&mut self, wanted: usize) -> Result<usize> {
        let capacity = wanted.max(ATOMIC).checked_next_power_of_two();
        let capacity = capacity.ok_or(Errno::EINVAL)?;
        if capacity > LARGEST {
            return Err(Errno::EPERM);
        }
        if capacity < self.bytes.len() {
            return Err(Errno::EBUSY);
        }
        self.capacity = capacity;
        Ok(capacity)
    }

    pub(crate) fn read(&mut self, into: &mut [u8]) -> Transfer {
        if self.bytes.is_empty() {
            return match self.writers {
                0 => Transfer::Closed,
                _ => Transfer::Wait,
            };
        }
        let len = into.len().min(self.bytes.len());
        let (first, second) = self.bytes.as_slices();
        let split = first.len().min(len);
        into[..split].copy_from_slice(&first[..split]);
        into[split..len].copy_from_slice(&second[..len - split]);
        self.bytes.drain(..len);
        Transfer::Moved(len)
    }

    /// Writes what there is room for, of which `left` bytes in all are to be
    /// written; few bytes all or none.
    pub(crate) fn write(&mut self, from: &[u8], left: usize) -> Transfer {
        if self.readers == 0 {
            return Transfer::Closed;
        }
        let room = self.room();
        if room == 0 || left <= ATOMIC && room < left {
            return Transfer::Wait;
        }
        let len = from.len().min(room);
        self.bytes.extend(&from[..len]);
        Transfer::Moved(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_in_order_and_ends_are_seen() {
        let mut pipe = Pipe::new();
        (pipe.readers, pipe.writers) = (1, 1);
        let mut buffer = [0; 8];
        assert_eq!(pipe.read(&mut buffer), Transfer::Wait);
        assert_eq!(pipe.write(b"hello", 5), Transfer::Moved(5));
        assert_eq!(pipe.read(&mut buffer[..2]), Transfer::Moved(2));
        assert_eq!(pipe.read(&mut buffer[2..]), Transfer::Moved(3));
        assert_eq!(&buffer[..5], b"hello");
        pipe.writers = 0;
        assert_eq!(pipe.read(&mut buffer), Transfer::Closed);
        pipe.readers = 0;
        assert_eq!(pipe.write(b"x", 1), Transfer::Closed);
    }

    #[test]
    fn short_writes_are_whole_and_long_ones_fill_the_pipe() {
        let mut pipe = Pipe::new();
        (pipe.readers, pipe.writers) = (1, 1);
        let long = [1; CAPACITY];
        assert_eq!(
            pipe.write(&long[10..], CAPACITY),
            Transfer::Moved(CAPACITY - 10)
        );
        assert_eq!(pipe.write(&long[..11], 11), Transfer::Wait);
        assert_eq!(pipe.write(&long[..10], 10), Transfer::Moved(10));
        assert_eq!(pipe.write(&long[..10], 10_000), Transfer::Wait);
        let mut one = [0];
        assert_eq!(pipe.read(&mut one), Transfer::Moved(1));
        assert_eq!(pipe.write(&long[..10], 10_000), Transfer::Moved(1));
        assert_eq!(pipe.resize(5000), Err(Errno::EBUSY));
        assert_eq!((pipe.resize(70_000), pipe.room()), (Ok(1 << 17), 1 << 16));
        assert_eq!(pipe.resize(2 << 20), Err(Errno::EPERM));
    }
}
