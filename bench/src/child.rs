//! A process whose guest is followed on its output, and that ends with this one.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::console::{Heard, Outcome, Watch};

/// A process that is killed when it is dropped, or when this one dies.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // It fails only if the process has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a program until its guest has told everything.
pub(crate) fn follow(
    program: &str,
    arguments: impl IntoIterator<Item = String>,
    input: Stdio,
    mut watch: Watch<'_>,
) -> Result<Outcome> {
    // setpriv: however this process ends, the program ends too.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--", program])
        .args(arguments)
        .stdin(input)
        .stdout(Stdio::piped());
    let child = command
        .spawn()
        .context("cannot start setpriv; install util-linux")?;
    let mut child = Guard(child);
    let output = child.0.stdout.take().context("stdout is piped")?;
    let pieces = read_in_thread(output);
    loop {
        match pieces.recv_timeout(Duration::from_secs(1)) {
            Ok(piece) => {
                if watch.feed(&piece)? == Heard::End {
                    return Ok(watch.finish());
                }
            }
            Err(RecvTimeoutError::Timeout) => watch.check_time()?,
            Err(RecvTimeoutError::Disconnected) => {
                let status = child.0.wait()?;
                bail!("{program} has ended ({status}); {}", watch.last_words());
            }
        }
    }
}

/// Reads in a thread, which ends with the writer or the receiver.
fn read_in_thread(mut from: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            if sender.send(buffer[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}
