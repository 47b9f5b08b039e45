//! What the guest printed on its console, kept for whoever looks later.

use std::collections::VecDeque;
use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::error::RackError;
use crate::stream::RingReader;

/// Bytes that are kept.
const SCROLLBACK: usize = 256 << 10;

/// What a guest that gives up says: the agent's words and the kernel's.
const VERDICTS: [&str; 2] = ["the guest can't come up", "Kernel panic"];

/// The guest's console output: its last part is kept, and any number of
/// readers follow it. A reader that is too slow misses bytes; it never holds
/// up the guest.
#[derive(Debug, Default)]
pub struct ConsoleLog {
    state: Mutex<State>,
    grown: Condvar,
}

#[derive(Debug, Default)]
struct State {
    bytes: VecDeque<u8>,
    /// Bytes ever printed.
    end: u64,
    closed: bool,
}

/// What a reader of the console found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConsoleRead {
    /// So many bytes.
    Bytes(usize),
    /// Nothing within the time given.
    Timeout,
    /// Nothing, and nothing will come: the VM has ended.
    Closed,
}

impl ConsoleLog {
    /// Starts the thread that keeps the console.
    pub(crate) fn start(mut from: RingReader) -> Result<Arc<Self>, RackError> {
        let log = Arc::new(Self::default());
        let kept = Arc::clone(&log);
        std::thread::Builder::new()
            .name("console".into())
            .spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(count @ 1..) = from.read(&mut buffer) {
                    kept.push(&buffer[..count]);
                }
                kept.close();
            })
            .map_err(RackError::host("start the console thread"))?;
        Ok(log)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, bytes: &[u8]) {
        let mut state = self.lock();
        state.bytes.extend(bytes);
        let excess = state.bytes.len().saturating_sub(SCROLLBACK);
        state.bytes.drain(..excess);
        state.end += bytes.len() as u64;
        self.grown.notify_all();
    }

    fn close(&self) {
        self.lock().closed = true;
        self.grown.notify_all();
    }

    /// Copies what was printed from position `*position` on, waiting up to
    /// `timeout` for something, and advances the position. Position 0 is the
    /// oldest byte still kept.
    pub fn read(&self, position: &mut u64, into: &mut [u8], timeout: Duration) -> ConsoleRead {
        let state = self.lock();
        let (state, _) = self
            .grown
            .wait_timeout_while(state, timeout, |state| {
                state.end <= *position && !state.closed
            })
            .unwrap_or_else(PoisonError::into_inner);
        let first = state.end - state.bytes.len() as u64;
        let from = (*position).clamp(first, state.end);
        let skip = usize::try_from(from - first).expect("at most what is kept");
        let mut count = 0;
        for (to, byte) in into.iter_mut().zip(state.bytes.iter().skip(skip)) {
            *to = *byte;
            count += 1;
        }
        *position = from + count as u64;
        match count {
            0 if state.closed => ConsoleRead::Closed,
            0 => ConsoleRead::Timeout,
            count => ConsoleRead::Bytes(count),
        }
    }

    /// Waits until all that the guest printed before its end is here.
    pub(crate) fn wait_closed(&self, timeout: Duration) {
        let state = self.lock();
        let open = |state: &mut State| !state.closed;
        drop(self.grown.wait_timeout_while(state, timeout, open));
    }

    /// The line that best says what became of the guest, without control
    /// characters: the last with one of [`VERDICTS`], else the last one.
    #[must_use]
    pub fn verdict(&self) -> Option<String> {
        let bytes: Vec<u8> = self.lock().bytes.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines = || text.lines().rev().filter(|line| !line.trim().is_empty());
        let telling = |line: &&str| VERDICTS.iter().any(|words| line.contains(words));
        let line = lines().find(telling).or_else(|| lines().next())?;
        Some(line.chars().filter(|c| !c.is_control()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;

    #[test]
    fn a_late_reader_gets_what_is_kept_and_then_follows() {
        let log = ConsoleLog::default();
        log.push(b"early ");
        log.push(b"bytes");
        let mut position = 0;
        let mut buffer = [0; 8];
        assert_eq!(
            log.read(&mut position, &mut buffer, NOW),
            ConsoleRead::Bytes(8)
        );
        assert_eq!(&buffer, b"early by");
        assert_eq!(
            log.read(&mut position, &mut buffer, NOW),
            ConsoleRead::Bytes(3)
        );
        assert_eq!(
            log.read(&mut position, &mut buffer, NOW),
            ConsoleRead::Timeout
        );
        log.push(b"!");
        assert_eq!(
            log.read(&mut position, &mut buffer, NOW),
            ConsoleRead::Bytes(1)
        );
        log.close();
        assert_eq!(
            log.read(&mut position, &mut buffer, NOW),
            ConsoleRead::Closed
        );
    }

    #[test]
    fn only_the_last_part_is_kept() {
        let log = ConsoleLog::default();
        for byte in 0..=255_u8 {
            log.push(&[byte; 4096]);
        }
        let mut position = 0;
        let mut buffer = vec![0; 2 << 20];
        assert_eq!(
            log.read(&mut position, &mut buffer, NOW),
            ConsoleRead::Bytes(SCROLLBACK)
        );
        assert_eq!(buffer[0], 192);
        assert_eq!(position, 1 << 20);
    }

    #[test]
    fn the_verdict_is_fit_to_quote() {
        let log = ConsoleLog::default();
        assert_eq!(log.verdict(), None);
        log.push(b"first\r\n\x1b[31mlast\r\n\r\n");
        assert_eq!(log.verdict().as_deref(), Some("[31mlast"));
        log.push(b"Kernel panic - not syncing\r\nRebooting\r\n");
        let verdict = log.verdict().expect("two lines");
        assert_eq!(verdict, "Kernel panic - not syncing");
    }
}
