//! The launcher's side of the agent protocol: runs commands in the guest.
//!
//! One [`AgentClient`] serves a guest. Its reader thread takes frames off
//! the stream, hands them to the sessions and never waits for anybody:
//! what a session has not taken yet is bounded by the credit that it gave.
//! All writing is done by the callers' threads, one frame at a time.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsStr;
use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use vmm_shared::agent::{
    Channel, ExitStatus, Failure, Frame, FrameError, Hello, INITIAL_WINDOW, MAX_PAYLOAD, Message,
    PROTOCOL_VERSION, WindowSize, decode, encode_exec, skip_to_hello,
};

/// Why the conversation with the agent can't go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// The agent has not said Hello in time.
    #[error("the guest's agent did not answer within {0:?}: look at the guest's console")]
    NoAnswer(Duration),
    /// The agent speaks another version of the protocol.
    #[error(
        "the guest's agent speaks protocol version {0}, this program {PROTOCOL_VERSION}: use an \
         initramfs of the same build"
    )]
    Version(u16),
    /// The agent sent something that it must not.
    #[error("the guest's agent sent {0}")]
    Protocol(FrameError),
    /// The agent sent more than it had credit for.
    #[error("the guest's agent sent more than it may on session {0}")]
    Overrun(u32),
    /// The stream has ended or failed.
    #[error("the connection to the guest's agent is lost: {0}")]
    Lost(Arc<str>),
    /// The command is too long, is empty or has a zero byte in it.
    #[error("the command can't be sent: it is empty, too long, or has a zero byte in it")]
    BadRequest,
}

/// A command to run in the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecRequest {
    /// The program (looked up in the guest's PATH) and its arguments, as bytes.
    pub argv: Vec<Vec<u8>>,
    /// `NAME=value` entries to add to the guest's environment.
    pub env: Vec<Vec<u8>>,
    /// The directory to run it in; the agent's default (/root) if `None`.
    pub cwd: Option<Vec<u8>>,
    /// Run it on a terminal of this size, on which standard error and output
    /// are one.
    pub tty: Option<WindowSize>,
}

impl ExecRequest {
    /// A command without a terminal, in the default directory.
    pub fn new(argv: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        Self {
            argv: argv
                .into_iter()
                .map(|argument| argument.as_ref().as_bytes().to_vec())
                .collect(),
            ..Self::default()
        }
    }

    /// The same command on a terminal.
    #[must_use]
    pub fn on_terminal(mut self, size: WindowSize) -> Self {
        self.tty = Some(size);
        self
    }

    /// The same command with `name` set to `value`.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        let mut entry = format!("{name}=").into_bytes();
        entry.extend(value.as_ref().as_bytes());
        self.env.push(entry);
        self
    }
}

/// What a session reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The command wrote this on standard output, or on its terminal.
    Stdout(Vec<u8>),
    /// The command wrote this on standard error.
    Stderr(Vec<u8>),
    /// Standard output was closed.
    StdoutEof,
    /// Standard error was closed.
    StderrEof,
    /// The command ended; all its output came before. The last event.
    Exited(ExitStatus),
    /// The command was not started. The last event.
    Failed(Failure),
    /// The agent is gone, and with it the command. The last event.
    Lost(ClientError),
}

/// A client of the agent in one guest. Clones share the connection.
#[derive(Clone)]
pub struct AgentClient {
    shared: Arc<Shared>,
}

struct Shared {
    nonce: u64,
    /// Held for one frame at a time. Taken last: no other lock is taken
    /// while it is held.
    writer: Mutex<Box<dyn Write + Send>>,
    state: Mutex<State>,
    /// Signalled when anything but the sessions changes in `state`.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The agent has answered our Hello.
    ready: bool,
    /// The agent has started and waits for our Hello.
    asked: bool,
    lost: Option<ClientError>,
    last_stream: u32,
    last_ping: u64,
    last_pong: u64,
    sessions: HashMap<u32, Arc<SessionShared>>,
}

struct SessionShared {
    inner: Mutex<Inner>,
    changed: Condvar,
}

struct Inner {
    events: VecDeque<Event>,
    /// Bytes that we may still send.
    stdin_credit: u32,
    /// The command no longer reads, or is gone.
    stdin_closed: bool,
    /// Bytes that the agent may still send, standard output and error.
    window: [u32; 2],
    /// The last event is in `events` or was taken.
    finished: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The workspace panics by aborting, and no invariant is broken half-way.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl AgentClient {
    /// Starts a client on a stream pair and says Hello. `reader` is read by
    /// a thread of its own until it ends or fails.
    ///
    /// Both may block; a failing `writer` ends all sessions.
    pub fn new(reader: impl Read + Send + 'static, writer: impl Write + Send + 'static) -> Self {
        let shared = Arc::new(Shared {
            // Random, and not 0, which is the agent's own.
            nonce: RandomState::new().build_hasher().finish() | 1,
            writer: Mutex::new(Box::new(writer)),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let for_thread = Arc::clone(&shared);
        thread::spawn(move || {
            let error = for_thread.read_frames(reader);
            for_thread.lose(error);
        });
        // The agent may not be there yet: it asks again when it starts.
        let _ = shared.send_hello();
        Self { shared }
    }

    /// Waits until the agent has answered.
    ///
    /// # Errors
    /// If it does not within `timeout`, or the stream ends.
    pub fn wait_hello(&self, timeout: Duration) -> Result<(), ClientError> {
        let deadline = Instant::now() + timeout;
        loop {
            let mut state = lock(&self.shared.state);
            loop {
                if let Some(error) = &state.lost {
                    return Err(error.clone());
                }
                if state.ready {
                    return Ok(());
                }
                if state.asked {
                    state.asked = false;
                    break;
                }
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(ClientError::NoAnswer(timeout));
                }
                state = wait(&self.shared.changed, state, Some(left));
            }
            drop(state);
            self.shared.send_hello()?;
        }
    }

    /// Starts a command. Whether it could be started is told by the
    /// session's events.
    ///
    /// # Errors
    /// If the request can't be sent, or the agent has not answered Hello yet.
    pub fn exec(&self, request: &ExecRequest) -> Result<Session, ClientError> {
        let mut bytes = Vec::new();
        let cwd = request.cwd.as_deref().unwrap_or_default();
        encode_exec(&mut bytes, request.tty, cwd, &request.argv, &request.env)
            .map_err(|_| ClientError::BadRequest)?;
        let session = Arc::new(SessionShared {
            inner: Mutex::new(Inner {
                events: VecDeque::new(),
                stdin_credit: INITIAL_WINDOW,
                stdin_closed: false,
                window: [INITIAL_WINDOW; 2],
                finished: false,
            }),
            changed: Condvar::new(),
        });
        let stream = {
            let mut state = lock(&self.shared.state);
            if let Some(error) = &state.lost {
                return Err(error.clone());
            }
            if !state.ready {
                return Err(ClientError::NoAnswer(Duration::ZERO));
            }
            state.last_stream += 1;
            let stream = state.last_stream;
            state.sessions.insert(stream, Arc::clone(&session));
            stream
        };
        let (parts, last) = bytes.split_at((bytes.len() - 1) / MAX_PAYLOAD * MAX_PAYLOAD);
        for part in parts.chunks(MAX_PAYLOAD) {
            self.shared.send(stream, Message::ExecPart(part))?;
        }
        self.shared.send(stream, Message::Exec(last))?;

        let control = Control {
            shared: Arc::clone(&self.shared),
            stream,
        };
        Ok(Session {
            stdin: StdinWriter {
                control: control.clone(),
                session: Arc::clone(&session),
            },
            events: Events {
                control: control.clone(),
                session,
                taken: [0; 2],
                last_seen: false,
            },
            control,
        })
    }

    /// Asks the agent to write everything back and switch the guest off.
    ///
    /// # Errors
    /// If the stream has failed.
    pub fn power_off(&self) -> Result<(), ClientError> {
        self.shared.send(0, Message::PowerOff)
    }

    /// Waits for a sign of life and returns how long it took.
    ///
    /// # Errors
    /// If there is none within `timeout`, or the stream has failed.
    pub fn ping(&self, timeout: Duration) -> Result<Duration, ClientError> {
        let start = Instant::now();
        let number = {
            let mut state = lock(&self.shared.state);
            state.last_ping += 1;
            state.last_ping
        };
        self.shared.send(0, Message::Ping(number))?;
        let mut state = lock(&self.shared.state);
        loop {
            if state.last_pong >= number {
                return Ok(start.elapsed());
            }
            if let Some(error) = &state.lost {
                return Err(error.clone());
            }
            let left = timeout.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(ClientError::NoAnswer(timeout));
            }
            state = wait(&self.shared.changed, state, Some(left));
        }
    }
}

impl fmt::Debug for AgentClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AgentClient").finish_non_exhaustive()
    }
}

/// Waits on `changed`, at most `timeout`; the caller checks its condition.
fn wait<'a, T>(
    changed: &Condvar,
    guard: MutexGuard<'a, T>,
    timeout: Option<Duration>,
) -> MutexGuard<'a, T> {
    match timeout {
        Some(timeout) => {
            changed
                .wait_timeout(guard, timeout)
                .unwrap_or_else(PoisonError::into_inner)
                .0
        }
        None => changed.wait(guard).unwrap_or_else(PoisonError::into_inner),
    }
}

impl Shared {
    fn send(&self, stream: u32, message: Message<'_>) -> Result<(), ClientError> {
        let mut bytes = Vec::new();
        Frame { stream, message }.encode(&mut bytes);
        let result = {
            let mut writer = lock(&self.writer);
            writer.write_all(&bytes).and_then(|()| writer.flush())
        };
        result.map_err(|error| {
            let error = lost(&error);
            self.lose(error.clone());
            error
        })
    }

    fn send_hello(&self) -> Result<(), ClientError> {
        let hello = Hello {
            version: PROTOCOL_VERSION,
            nonce: self.nonce,
        };
        self.send(0, Message::Hello(hello))
    }

    /// Ends everything that hangs on the connection.
    fn lose(&self, error: ClientError) {
        let sessions = {
            let mut state = lock(&self.state);
            if state.lost.is_none() {
                state.lost = Some(error.clone());
            }
            state.ready = false;
            std::mem::take(&mut state.sessions)
        };
        self.changed.notify_all();
        for session in sessions.into_values() {
            session.finish(Event::Lost(error.clone()));
        }
    }

    /// The reader thread: returns why it ended.
    fn read_frames(&self, mut reader: impl Read) -> ClientError {
        let mut buffer = Vec::new();
        let mut chunk = vec![0; MAX_PAYLOAD];
        let mut in_step = false;
        loop {
            let read = match reader.read(&mut chunk) {
                Ok(0) => return ClientError::Lost("it was closed".into()),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return lost(&error),
            };
            buffer.extend_from_slice(&chunk[..read]);
            let mut used = 0;
            loop {
                if !in_step {
                    // What an earlier launcher left in the stream is not ours.
                    used += skip_to_hello(&buffer[used..]);
                }
                match decode(&buffer[used..]) {
                    Ok(None) => break,
                    Ok(Some((frame, len))) => {
                        used += len;
                        if let Err(error) = self.take_frame(frame, &mut in_step) {
                            return error;
                        }
                    }
                    Err(_) if !in_step => used += 1,
                    Err(error) => return ClientError::Protocol(error),
                }
            }
            buffer.drain(..used);
        }
    }

    fn take_frame(&self, frame: Frame<'_>, in_step: &mut bool) -> Result<(), ClientError> {
        match frame.message {
            Message::Hello(hello) => return self.take_hello(hello, in_step),
            _ if !*in_step => return Ok(()),
            Message::Pong(number) => {
                lock(&self.state).last_pong = number;
                self.changed.notify_all();
                return Ok(());
            }
            Message::Ping(_) | Message::PowerOff => return Ok(()),
            _ => {}
        }
        let last = matches!(frame.message, Message::Exited(_) | Message::Failed(_));
        let session = {
            let mut state = lock(&self.state);
            if last {
                state.sessions.remove(&frame.stream)
            } else {
                state.sessions.get(&frame.stream).cloned()
            }
        };
        match session {
            Some(session) => session.take_message(frame.stream, frame.message),
            None => Ok(()),
        }
    }

    fn take_hello(&self, hello: Hello, in_step: &mut bool) -> Result<(), ClientError> {
        if hello.version != PROTOCOL_VERSION {
            return Err(ClientError::Version(hello.version));
        }
        let mut state = lock(&self.state);
        if hello.nonce == self.nonce {
            state.ready = true;
            *in_step = true;
        } else if hello.nonce == 0 {
            if state.ready {
                return Err(ClientError::Lost("the agent has started anew".into()));
            }
            // The reader never writes: whoever waits sends the answer.
            state.asked = true;
        }
        self.changed.notify_all();
        Ok(())
    }
}

fn lost(error: &io::Error) -> ClientError {
    ClientError::Lost(error.to_string().into())
}

impl SessionShared {
    fn take_message(&self, stream: u32, message: Message<'_>) -> Result<(), ClientError> {
        let mut inner = lock(&self.inner);
        match message {
            Message::Stdout(bytes) => inner.take_output(0, stream, bytes)?,
            Message::Stderr(bytes) => inner.take_output(1, stream, bytes)?,
            Message::StdoutEof => inner.events.push_back(Event::StdoutEof),
            Message::StderrEof => inner.events.push_back(Event::StderrEof),
            Message::StdinClosed => inner.stdin_closed = true,
            Message::Credit(Channel::Stdin, bytes) => {
                inner.stdin_credit = inner.stdin_credit.saturating_add(bytes);
            }
            Message::Exited(status) => inner.finish(Event::Exited(status)),
            Message::Failed(failure) => inner.finish(Event::Failed(failure)),
            // Nothing that an agent has to say on a session.
            _ => {}
        }
        drop(inner);
        self.changed.notify_all();
        Ok(())
    }

    fn finish(&self, event: Event) {
        lock(&self.inner).finish(event);
        self.changed.notify_all();
    }
}

impl Inner {
    fn take_output(&mut self, which: usize, stream: u32, bytes: &[u8]) -> Result<(), ClientError> {
        self.window[which] = u32::try_from(bytes.len())
            .ok()
            .and_then(|len| self.window[which].checked_sub(len))
            .ok_or(ClientError::Overrun(stream))?;
        // Small writes are joined, so that the queue's size is the window's.
        match (self.events.back_mut(), which) {
            (Some(Event::Stdout(queued)), 0) | (Some(Event::Stderr(queued)), 1)
                if queued.len() + bytes.len() <= MAX_PAYLOAD =>
            {
                queued.extend_from_slice(bytes);
            }
            (_, 0) => self.events.push_back(Event::Stdout(bytes.to_vec())),
            _ => self.events.push_back(Event::Stderr(bytes.to_vec())),
        }
        Ok(())
    }

    fn finish(&mut self, event: Event) {
        if !self.finished {
            self.finished = true;
            self.stdin_closed = true;
            self.events.push_back(event);
        }
    }
}

/// A command that runs in the guest. The three parts may go to different
/// threads.
#[derive(Debug)]
pub struct Session {
    /// Where its standard input goes.
    pub stdin: StdinWriter,
    /// What it prints and how it ends.
    pub events: Events,
    /// Signals and terminal size.
    pub control: Control,
}

/// Signals and terminal size of a command.
#[derive(Clone)]
pub struct Control {
    shared: Arc<Shared>,
    stream: u32,
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control")
            .field("stream", &self.stream)
            .finish_non_exhaustive()
    }
}

impl Control {
    /// Sends a signal (1 to 31) to the command's process group.
    ///
    /// # Errors
    /// If there is no such signal, or the connection is lost. That the
    /// command has already ended is no error.
    pub fn signal(&self, signal: u8) -> Result<(), ClientError> {
        if !(1..=31).contains(&signal) {
            return Err(ClientError::BadRequest);
        }
        self.shared.send(self.stream, Message::Signal(signal))
    }

    /// Tells the command that its terminal has a new size.
    ///
    /// # Errors
    /// If the connection is lost.
    pub fn resize(&self, size: WindowSize) -> Result<(), ClientError> {
        self.shared.send(self.stream, Message::Resize(size))
    }
}

/// Standard input of a command. Writing blocks while the command does not
/// read. Dropping it closes the command's standard input.
#[derive(Debug)]
pub struct StdinWriter {
    control: Control,
    session: Arc<SessionShared>,
}

impl fmt::Debug for SessionShared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionShared").finish_non_exhaustive()
    }
}

impl Write for StdinWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let now = {
            let mut inner = lock(&self.session.inner);
            loop {
                if inner.stdin_closed {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                if inner.stdin_credit > 0 {
                    break;
                }
                inner = wait(&self.session.changed, inner, None);
            }
            let most = bytes.len().min(MAX_PAYLOAD);
            let most = u32::try_from(most).expect("at most MAX_PAYLOAD");
            let now = most.min(inner.stdin_credit);
            inner.stdin_credit -= now;
            usize::try_from(now).expect("at most MAX_PAYLOAD")
        };
        self.control
            .shared
            .send(self.control.stream, Message::Stdin(&bytes[..now]))
            .map_err(|error| io::Error::new(io::ErrorKind::BrokenPipe, error))?;
        Ok(now)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for StdinWriter {
    fn drop(&mut self) {
        if !lock(&self.session.inner).stdin_closed {
            // If the connection is lost, so is the command.
            let _ = self
                .control
                .shared
                .send(self.control.stream, Message::StdinEof);
        }
    }
}

/// What a command prints and how it ends, in order. Taking output gives the
/// command credit to print more. Dropping it before the last event hangs up
/// on the command.
#[derive(Debug)]
pub struct Events {
    control: Control,
    session: Arc<SessionShared>,
    /// Bytes taken and not yet given back as credit.
    taken: [u32; 2],
    last_seen: bool,
}

/// There was no event in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no event in time")]
pub struct TimedOut;

impl Events {
    /// The next event, or `None` after the last one.
    ///
    /// # Errors
    /// If there is none within `timeout`.
    pub fn next_within(&mut self, timeout: Duration) -> Result<Option<Event>, TimedOut> {
        self.take(Some(Instant::now() + timeout))
    }

    fn take(&mut self, deadline: Option<Instant>) -> Result<Option<Event>, TimedOut> {
        if self.last_seen {
            return Ok(None);
        }
        let (event, credit) = {
            let mut inner = lock(&self.session.inner);
            let event = loop {
                if let Some(event) = inner.events.pop_front() {
                    break event;
                }
                let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
                if left.is_some_and(|left| left.is_zero()) {
                    return Err(TimedOut);
                }
                inner = wait(&self.session.changed, inner, left);
            };
            let credit = account(&mut self.taken, &event, &mut inner);
            (event, credit)
        };
        if let Some((channel, bytes)) = credit {
            // If it can't be sent, the loss is the next event.
            let _ = self
                .control
                .shared
                .send(self.control.stream, Message::Credit(channel, bytes));
        }
        self.last_seen = matches!(event, Event::Exited(_) | Event::Failed(_) | Event::Lost(_));
        Ok(Some(event))
    }
}

/// The credit to give for an event, in pieces worth a message. `taken` counts
/// the bytes for which none was given yet.
fn account(taken: &mut [u32; 2], event: &Event, inner: &mut Inner) -> Option<(Channel, u32)> {
    let (which, channel, bytes) = match event {
        Event::Stdout(bytes) => (0, Channel::Stdout, bytes),
        Event::Stderr(bytes) => (1, Channel::Stderr, bytes),
        _ => return None,
    };
    taken[which] += u32::try_from(bytes.len()).expect("at most the window");
    if inner.finished || taken[which] < INITIAL_WINDOW / 4 {
        return None;
    }
    let credit = std::mem::take(&mut taken[which]);
    inner.window[which] += credit;
    Some((channel, credit))
}

impl Iterator for Events {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        self.take(None).unwrap_or(None)
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        if !self.last_seen && !lock(&self.session.inner).finished {
            let _ = self
                .control
                .shared
                .send(self.control.stream, Message::Close);
        }
    }
}
