//! Pipes: a bounded queue of bytes, and how many can still reach each end.

use alloc::collections::VecDeque;

/// Bytes that a pipe holds.
pub(crate) const CAPACITY: usize = 1 << 16;
/// Writes up to this many bytes are never mixed with others.
pub(crate) const ATOMIC: usize = 4096;

/// A pipe.
#[derive(Debug)]
pub(crate) struct Pipe {
    bytes: VecDeque<u8>,
    /// Lengths of the messages in it, if it keeps them apart.
    messages: Option<VecDeque<usize>>,
    pub(crate) readers: u32,
    pub(crate) writers: u32,
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
            messages: None,
            readers: 0,
            writers: 0,
            opened: (0, 0),
        }
    }

    /// A pipe that keeps messages apart, each of at most [`ATOMIC`] bytes.
    pub(crate) fn of_messages() -> Self {
        Self {
            messages: Some(VecDeque::new()),
            ..Self::new()
        }
    }

    pub(crate) fn keeps_messages(&self) -> bool {
        self.messages.is_some()
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn room(&self) -> usize {
        CAPACITY - self.bytes.len()
    }

    pub(crate) fn read(&mut self, into: &mut [u8]) -> Transfer {
        if self.bytes.is_empty() {
            return match self.writers {
                0 => Transfer::Closed,
                _ => Transfer::Wait,
            };
        }
        let messages = self.messages.as_ref();
        let most = messages.and_then(|messages| messages.front().copied());
        let len = into.len().min(most.unwrap_or(self.bytes.len()));
        let (first, second) = self.bytes.as_slices();
        let split = first.len().min(len);
        into[..split].copy_from_slice(&first[..split]);
        into[split..len].copy_from_slice(&second[..len - split]);
        let taken = self.messages.as_mut().map_or(len, |messages| {
            // What the reader has no room for is lost.
            messages.pop_front().unwrap_or(len)
        });
        self.bytes.drain(..taken);
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
        if let Some(messages) = &mut self.messages {
            messages.push_back(len);
        }
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
    fn messages_are_kept_apart() {
        let mut pipe = Pipe::of_messages();
        (pipe.readers, pipe.writers) = (1, 1);
        assert_eq!(pipe.write(b"hello", 5), Transfer::Moved(5));
        assert_eq!(pipe.write(b"you", 3), Transfer::Moved(3));
        let mut buffer = [0; 8];
        assert_eq!(pipe.read(&mut buffer[..2]), Transfer::Moved(2));
        assert_eq!(pipe.read(&mut buffer), Transfer::Moved(3));
        assert_eq!(&buffer[..3], b"you");
        assert_eq!(pipe.read(&mut buffer), Transfer::Wait);
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
    }
}
