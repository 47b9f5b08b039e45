//! The byte stream to the launcher: what came in and what is to go out.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, read, retry_on_intr, write};
use vmm_shared::agent::{Frame, FrameError, MAX_PAYLOAD, Message, decode, skip_to_hello};

/// Output of commands waits while so many bytes wait to be sent.
const OUT_LIMIT: usize = 4 * MAX_PAYLOAD;
/// Nothing is read while so many do: a launcher that only asks and never
/// reads answers must not fill our memory.
const ANSWER_LIMIT: usize = 16 * MAX_PAYLOAD;

/// What became of the stream when it was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WireState {
    /// It can be used again.
    Open,
    /// Nobody is at the other end, now or for good.
    Closed,
}

/// Both directions, without blocking.
#[derive(Debug)]
pub(crate) struct Wire {
    pub(crate) incoming: Incoming,
    pub(crate) outgoing: Outgoing,
}

/// What the launcher asks.
#[derive(Debug)]
pub(crate) struct Incoming {
    fd: OwnedFd,
    received: Vec<u8>,
    used: usize,
    /// Out of step until a Hello has been seen.
    in_step: bool,
}

/// What it is told.
#[derive(Debug)]
pub(crate) struct Outgoing {
    fd: OwnedFd,
    to_send: Vec<u8>,
    sent: usize,
}

pub(crate) fn set_nonblocking(fd: impl AsFd) -> rustix::io::Result<()> {
    let flags = fcntl_getfl(&fd)?;
    fcntl_setfl(&fd, flags | OFlags::NONBLOCK)
}

impl Wire {
    pub(crate) fn new(input: OwnedFd, output: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&input)?;
        set_nonblocking(&output)?;
        Ok(Self {
            incoming: Incoming {
                fd: input,
                received: Vec::new(),
                used: 0,
                in_step: false,
            },
            outgoing: Outgoing {
                fd: output,
                to_send: Vec::new(),
                sent: 0,
            },
        })
    }

    /// Goes on at the next Hello. What was begun to be sent is finished: the
    /// launcher must stay in step.
    pub(crate) fn resynchronise(&mut self) {
        self.incoming.in_step = false;
    }
}

impl Incoming {
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Reads what there is, up to a frame's length.
    pub(crate) fn receive(&mut self) -> io::Result<WireState> {
        self.received.drain(..self.used);
        self.used = 0;
        let mut chunk = [0; MAX_PAYLOAD];
        match retry_on_intr(|| read(&self.fd, &mut chunk)) {
            Ok(0) => Ok(WireState::Closed),
            Ok(len) => {
                self.received.extend_from_slice(&chunk[..len]);
                Ok(WireState::Open)
            }
            Err(Errno::AGAIN) => Ok(WireState::Open),
            Err(error) => Err(error.into()),
        }
    }

    /// The next frame that was received, if it is complete.
    pub(crate) fn next_frame(&mut self) -> Result<Option<Frame<'_>>, FrameError> {
        while !self.in_step {
            self.used += skip_to_hello(&self.received[self.used..]);
            match decode(&self.received[self.used..]) {
                Ok(None) => return Ok(None),
                Ok(Some(_)) => self.in_step = true,
                // Looks like a Hello and is none.
                Err(_) => self.used += 1,
            }
        }
        match decode(&self.received[self.used..])? {
            Some((frame, len)) => {
                self.used += len;
                Ok(Some(frame))
            }
            None => Ok(None),
        }
    }
}

impl Outgoing {
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn waiting(&self) -> usize {
        self.to_send.len() - self.sent
    }

    /// Whether something waits to be sent.
    pub(crate) fn is_waiting(&self) -> bool {
        self.waiting() > 0
    }

    /// Whether commands may add output.
    pub(crate) fn has_room(&self) -> bool {
        self.waiting() < OUT_LIMIT
    }

    /// Whether requests may be read: each may add an answer.
    pub(crate) fn wants_answers(&self) -> bool {
        self.waiting() < ANSWER_LIMIT
    }

    /// Queues a frame.
    pub(crate) fn send(&mut self, stream: u32, message: Message<'_>) {
        Frame { stream, message }.encode(&mut self.to_send);
    }

    /// Sends as much as the other side takes.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        while self.is_waiting() {
            match retry_on_intr(|| write(&self.fd, &self.to_send[self.sent..])) {
                Ok(len) => self.sent += len,
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        if self.sent == self.to_send.len() {
            self.to_send.clear();
            self.sent = 0;
        } else if self.sent >= OUT_LIMIT {
            self.to_send.drain(..self.sent);
            self.sent = 0;
        }
        Ok(())
    }
}
