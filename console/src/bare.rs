//! Guests that run without a kernel: how they end.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rack::Rack;

use crate::sample;

/// The exit status if a time limit ended the guest, as that of timeout(1).
pub(crate) const TIMED_OUT: u8 = 124;

/// What a process that is the machine exits with when its guest writes `value`
/// to the exit port: QEMU's rule, which bare-metal programs know.
pub(crate) fn exit_status(value: u32) -> u8 {
    let [status, ..] = (value << 1 | 1).to_le_bytes();
    status
}

/// Ends a rack that runs for too long.
#[derive(Debug)]
pub(crate) struct Watchdog {
    ended: mpsc::Sender<()>,
    thread: thread::JoinHandle<Option<String>>,
}

impl Watchdog {
    /// Ends `rack` after `limit`.
    pub(crate) fn start(rack: &Arc<Rack>, limit: Duration) -> Result<Self> {
        let rack = Arc::clone(rack);
        let (ended, heard) = mpsc::channel();
        let watch = move || match heard.recv_timeout(limit) {
            Err(RecvTimeoutError::Timeout) if rack.ended().is_none() => {
                let places = sample::vcpus(&rack);
                rack.kill();
                let seconds = limit.as_secs();
                Some(format!(
                    "the guest did not end within {seconds} s: {places}"
                ))
            }
            _ => None,
        };
        let thread = thread::Builder::new()
            .name("watchdog".into())
            .spawn(watch)
            .context("cannot start the watchdog")?;
        Ok(Self { ended, thread })
    }

    /// Ends the watch; where the guest was if it had to be ended.
    pub(crate) fn report(self) -> Option<String> {
        drop(self.ended);
        self.thread.join().ok().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::exit_status;

    #[test]
    fn exit_values_become_statuses_as_with_qemu() {
        assert_eq!(exit_status(0), 1);
        assert_eq!(exit_status(1), 3);
        assert_eq!(exit_status(0x10), 0x21);
        assert_eq!(exit_status(77), 155);
        assert_eq!(exit_status(0x80), 1);
        assert_eq!(exit_status(u32::MAX), 255);
    }
}
