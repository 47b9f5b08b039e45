//! Standard output and error without buffers or line endings of our own.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};

/// A byte-exact copy of one of our output streams.
#[derive(Debug)]
pub(crate) struct Output(File);

impl Output {
    pub(crate) fn stdout() -> Result<Self> {
        Self::new(io::stdout().as_fd())
    }

    pub(crate) fn stderr() -> Result<Self> {
        Self::new(io::stderr().as_fd())
    }

    fn new(stream: BorrowedFd<'_>) -> Result<Self> {
        let own = stream.try_clone_to_owned();
        Ok(Self(own.context("cannot use standard output")?.into()))
    }

    /// Writes everything, also where whoever gave us the stream has made it
    /// non-blocking.
    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.0.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let _ = poll(&mut [PollFd::new(&self.0, PollFlags::OUT)], None);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Writes to standard output; a reader that has seen enough is no failure.
pub(crate) fn print(text: &str) -> Result<()> {
    match Output::stdout()?.write(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("cannot write"),
    }
}
