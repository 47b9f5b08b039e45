//! Guests that run without a kernel: how they end.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rack::Rack;

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
                let report = where_it_is(&rack, limit);
                rack.kill();
                Some(report)
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

/// One line: each vCPU's last RIP, and what its last second's exits were.
pub(crate) fn where_it_is(rack: &Rack, limit: Duration) -> String {
    const SAMPLE: Duration = Duration::from_millis(500);
    let before = rack.counters();
    thread::sleep(SAMPLE);
    let mut line = format!("the guest did not end within {} s:", limit.as_secs());
    for (then, now) in before.iter().zip(&rack.counters()) {
        let more = |index: usize| now.values[index].1.saturating_sub(then.values[index].1);
        let _ = write!(line, " vCPU {} was at {:#x}", now.id.0, now.rip);
        let recent: Vec<_> = (0..now.values.len())
            .filter(|index| more(*index) > 0)
            .map(|index| format!("{} {}", more(index), now.values[index].0))
            .collect();
        let _ = match recent.is_empty() {
            true => write!(line, " and makes no exits;"),
            false => write!(line, " with {} in 500 ms;", recent.join(", ")),
        };
    }
    line.trim_end_matches(';').to_owned()
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
