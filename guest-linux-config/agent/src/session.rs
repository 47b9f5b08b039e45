//! One command that runs for the launcher: its streams and their credit.
//!
//! When the command itself has ended, what its pipes hold at that moment is
//! still sent, and then its exit. A descendant that keeps the output open in
//! the background does not delay that; what it prints later is thrown away,
//! but it is not killed by a closed pipe.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::{Errno, ioctl_fionread, read, retry_on_intr, write};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use rustix::termios::{LocalModes, SpecialCodeIndex, tcgetattr, tcsetwinsize};
use vmm_shared::agent::{Channel, ExitStatus, INITIAL_WINDOW, MAX_PAYLOAD, Message, WindowSize};

use crate::spawn::{Started, window};
use crate::wire::Outgoing;

/// How long a command has to end after its launcher hung up on it.
const HANG_UP_GRACE: Duration = Duration::from_secs(2);
/// More than a terminal can hold: where to stop if a descendant keeps
/// printing on it.
const TERMINAL_REST: u64 = 256 * 1024;

/// The launcher sent more than it had credit for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Overrun;

/// Our end of standard output or error.
#[derive(Debug)]
struct Output {
    fd: OwnedFd,
    channel: Channel,
    /// Bytes that the launcher takes now.
    credit: u32,
    /// Once the command has ended: bytes still to send.
    rest: Option<u64>,
}

/// Our end of standard input.
#[derive(Debug)]
struct Input {
    fd: OwnedFd,
    pending: Vec<u8>,
    written: usize,
    /// Bytes that the launcher may still send.
    window: u32,
    /// Bytes written since credit was last given.
    owed: u32,
    /// Nothing follows what is pending.
    eof: bool,
}

#[derive(Debug)]
pub(crate) struct Session {
    stream: u32,
    pid: Pid,
    terminal: bool,
    input: Option<Input>,
    outputs: [Option<Output>; 2],
    status: Option<ExitStatus>,
    kill_at: Option<Instant>,
}

impl Session {
    pub(crate) fn new(stream: u32, started: Started) -> Self {
        let output = |fd, channel| Output {
            fd,
            channel,
            credit: INITIAL_WINDOW,
            rest: None,
        };
        Self {
            stream,
            pid: started.pid,
            terminal: started.stderr.is_none(),
            input: Some(Input {
                fd: started.stdin,
                pending: Vec::new(),
                written: 0,
                window: INITIAL_WINDOW,
                owed: 0,
                eof: false,
            }),
            outputs: [
                Some(output(started.stdout, Channel::Stdout)),
                started.stderr.map(|fd| output(fd, Channel::Stderr)),
            ],
            status: None,
            kill_at: None,
        }
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// When this session wants to be looked at without any event.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.kill_at
    }

    /// Where to wait until input can be written on.
    pub(crate) fn wants_to_write(&self) -> Option<BorrowedFd<'_>> {
        let input = self.input.as_ref()?;
        (input.written < input.pending.len()).then(|| input.fd.as_fd())
    }

    /// Where to wait for output number `which`.
    pub(crate) fn wants_to_read(&self, which: usize) -> Option<BorrowedFd<'_>> {
        let output = self.outputs[which].as_ref()?;
        // After the end, `drain` reads without being told to.
        (output.credit > 0 && output.rest.is_none()).then(|| output.fd.as_fd())
    }

    /// Takes standard input from the launcher.
    pub(crate) fn take_stdin(&mut self, bytes: &[u8], out: &mut Outgoing) -> Result<(), Overrun> {
        let Some(input) = &mut self.input else {
            // The launcher has not heard yet that nobody reads.
            return Ok(());
        };
        let len = u32::try_from(bytes.len()).map_err(|_| Overrun)?;
        input.window = input.window.checked_sub(len).ok_or(Overrun)?;
        if !input.eof {
            input.pending.extend_from_slice(bytes);
        }
        self.write_stdin(out);
        Ok(())
    }

    /// The launcher has no more input.
    pub(crate) fn take_stdin_eof(&mut self, out: &mut Outgoing) {
        let Some(input) = &mut self.input else { return };
        if input.eof {
            return;
        }
        input.eof = true;
        if self.terminal {
            // A terminal has no end; the key for it does the same.
            let end = tcgetattr(&input.fd).ok().and_then(|modes| {
                let lines = modes.local_modes.contains(LocalModes::ICANON);
                lines.then(|| modes.special_codes[SpecialCodeIndex::VEOF])
            });
            input.pending.extend(end);
        }
        self.write_stdin(out);
    }

    /// Hands pending input to the command, as much as it takes.
    pub(crate) fn write_stdin(&mut self, out: &mut Outgoing) {
        let Some(input) = &mut self.input else { return };
        while input.written < input.pending.len() {
            match retry_on_intr(|| write(&input.fd, &input.pending[input.written..])) {
                Ok(len) => {
                    input.written += len;
                    input.owed = input
                        .owed
                        .saturating_add(u32::try_from(len).unwrap_or(u32::MAX));
                }
                Err(Errno::AGAIN) => break,
                Err(_) => {
                    out.send(self.stream, Message::StdinClosed);
                    self.input = None;
                    return;
                }
            }
        }
        if input.owed >= INITIAL_WINDOW / 4 && !input.eof {
            out.send(self.stream, Message::Credit(Channel::Stdin, input.owed));
            input.window = input.window.saturating_add(input.owed);
            input.owed = 0;
        }
        if input.written == input.pending.len() {
            input.pending.clear();
            input.written = 0;
            if input.eof && !self.terminal {
                self.input = None;
            }
        } else if input.written >= MAX_PAYLOAD {
            input.pending.drain(..input.written);
            input.written = 0;
        }
    }

    /// The launcher takes more of an output.
    pub(crate) fn take_credit(&mut self, channel: Channel, bytes: u32) {
        for output in self.outputs.iter_mut().flatten() {
            if output.channel == channel {
                output.credit = output.credit.saturating_add(bytes);
            }
        }
    }

    /// Sends what output number `which` holds, at most a frame.
    pub(crate) fn read_output(&mut self, which: usize, out: &mut Outgoing) {
        let Some(output) = &mut self.outputs[which] else {
            return;
        };
        let most = u64::from(output.credit).min(output.rest.unwrap_or(u64::MAX));
        let most = usize::try_from(most).map_or(MAX_PAYLOAD, |most| most.min(MAX_PAYLOAD));
        let mut chunk = [0; MAX_PAYLOAD];
        let chunk = &mut chunk[..most];
        match retry_on_intr(|| read(&output.fd, &mut *chunk)) {
            Ok(0) if most > 0 => self.output_ended(which, out),
            Ok(len) => {
                let message = match output.channel {
                    Channel::Stderr => Message::Stderr(&chunk[..len]),
                    _ => Message::Stdout(&chunk[..len]),
                };
                out.send(self.stream, message);
                let sent = u32::try_from(len).expect("at most MAX_PAYLOAD");
                output.credit -= sent;
                output.rest = output.rest.map(|rest| rest - u64::from(sent));
            }
            Err(Errno::AGAIN) => {
                // Nothing more of the command's can come.
                if output.rest.is_some() {
                    output.rest = Some(0);
                }
            }
            // A terminal that nobody has open any more says so by EIO.
            Err(_) => self.output_ended(which, out),
        }
    }

    fn output_ended(&mut self, which: usize, out: &mut Outgoing) {
        if let Some(output) = self.outputs[which].take() {
            let message = match output.channel {
                Channel::Stderr => Message::StderrEof,
                _ => Message::StdoutEof,
            };
            out.send(self.stream, message);
        }
    }

    /// The command has ended. What it had written is in its pipes by now.
    pub(crate) fn ended(&mut self, status: ExitStatus) {
        self.status = Some(status);
        self.input = None;
        for output in self.outputs.iter_mut().flatten() {
            output.rest = Some(if self.terminal {
                TERMINAL_REST
            } else {
                ioctl_fionread(&output.fd).unwrap_or(0)
            });
        }
    }

    /// After the end: sends what is left, as far as credit and room go. A
    /// descendant may hold the output open, so there is nothing to wait for.
    pub(crate) fn drain(&mut self, out: &mut Outgoing) {
        if self.status.is_none() {
            return;
        }
        for which in 0..2 {
            while out.has_room()
                && let Some(output) = &self.outputs[which]
                && output.credit > 0
                && output.rest != Some(0)
            {
                self.read_output(which, out);
            }
        }
    }

    /// Once all is sent: reports the exit, and returns what descendants may
    /// still hold open. The session is over then.
    pub(crate) fn finish(&mut self, out: &mut Outgoing) -> Option<Vec<OwnedFd>> {
        let status = self.status?;
        let done = |output: &Output| output.rest == Some(0);
        if !self.outputs.iter().flatten().all(done) {
            return None;
        }
        out.send(self.stream, Message::Exited(status));
        let left = self.outputs.iter_mut().filter_map(Option::take);
        let keep = !self.terminal && self.kill_at.is_none();
        Some(left.filter(|_| keep).map(|output| output.fd).collect())
    }

    /// Sends a signal to the command's process group.
    pub(crate) fn signal(&self, number: u8) {
        let signal = Signal::from_named_raw(i32::from(number));
        if let (Some(signal), None) = (signal, self.status) {
            // That there is nobody left to get it is no failure.
            let _ = kill_process_group(self.pid, signal);
        }
    }

    /// Gives the command's terminal a new size.
    pub(crate) fn resize(&self, size: WindowSize) {
        if let (true, Some(output)) = (self.terminal, &self.outputs[0]) {
            // On a terminal that was closed meanwhile it has no effect.
            let _ = tcsetwinsize(&output.fd, window(size));
        }
    }

    /// The launcher has left: hangs up on the command, and kills it if it
    /// does not end soon. Returns whether it still runs.
    pub(crate) fn hang_up(&mut self) -> bool {
        self.input = None;
        self.outputs = [None, None];
        if self.status.is_none() && self.kill_at.is_none() {
            let _ = kill_process_group(self.pid, Signal::HUP);
            let _ = kill_process_group(self.pid, Signal::CONT);
            self.kill_at = Some(Instant::now() + HANG_UP_GRACE);
        }
        self.status.is_none()
    }

    /// Kills a command whose time has run out.
    pub(crate) fn check_deadline(&mut self, now: Instant) {
        if self.kill_at.is_some_and(|at| at <= now) {
            let _ = kill_process(self.pid, Signal::KILL);
            self.kill_at = Some(now + HANG_UP_GRACE);
        }
    }
}
