//! Commands for clients of the process that holds a rack: the agent's
//! protocol, served on a client's connection and passed on to the guest.
//!
//! A client runs one command at a time on a connection. What it may send
//! ahead is bounded by the protocol's credit, and what it doesn't take is not
//! taken from the guest, so a slow or dead client costs nobody else anything.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use guest_linux_config::agent_client::{
    AgentClient, Control, Event, Events, ExecRequest, StdinWriter,
};
use vmm_shared::agent::{
    Channel, Exec, FailReason, Failure, Frame, Hello, INITIAL_WINDOW, MAX_EXEC_LEN, MAX_PAYLOAD,
    Message, PROTOCOL_VERSION, decode,
};

/// How soon a command is hung up on after its client has gone.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Serves a client until it hangs up or sends what it must not.
pub(crate) fn serve(client: UnixStream, agent: &AgentClient) -> io::Result<()> {
    let mut relay = Relay {
        to_client: Sender(Arc::new(Mutex::new(client.try_clone()?))),
        agent,
        request: Vec::new(),
        command: None,
    };
    let result = relay.read_frames(client);
    if let Some(command) = relay.command.take() {
        command.hang_up();
    }
    result
}

struct Relay<'a> {
    to_client: Sender,
    agent: &'a AgentClient,
    /// The pieces of a request so far.
    request: Vec<u8>,
    command: Option<Command>,
}

/// A command that runs for the client.
struct Command {
    stream: u32,
    control: Control,
    /// Dropped when there is no more input.
    stdin: Option<mpsc::Sender<Vec<u8>>>,
    shared: Arc<Shared>,
}

struct Shared {
    /// The client has no more interest.
    gone: AtomicBool,
    /// Bytes of standard output and error that the client still takes.
    window: Mutex<[u32; 2]>,
    widened: Condvar,
    /// The last event was sent.
    finished: AtomicBool,
    /// Bytes of input on their way to the guest.
    pending: Mutex<u32>,
}

impl Shared {
    fn new() -> Self {
        Self {
            gone: AtomicBool::new(false),
            window: Mutex::new([INITIAL_WINDOW; 2]),
            widened: Condvar::new(),
            finished: AtomicBool::new(false),
            pending: Mutex::new(0),
        }
    }

    /// The client takes so many bytes more.
    fn widen(&self, channel: Channel, bytes: u32) -> io::Result<()> {
        let which = usize::from(channel == Channel::Stderr);
        let mut window = lock(&self.window);
        window[which] = window[which].checked_add(bytes).ok_or_else(refuse)?;
        self.widened.notify_all();
        Ok(())
    }

    /// Waits until the client takes something, and returns how much of
    /// `wanted` it takes; 0 if it has gone.
    fn take_window(&self, channel: Channel, wanted: usize) -> usize {
        let which = usize::from(channel == Channel::Stderr);
        let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
        let mut window = lock(&self.window);
        // Relaxed: a mere flag, looked at again and again.
        while window[which] == 0 && !self.gone.load(Ordering::Relaxed) {
            let waited = self.widened.wait_timeout(window, LOOK_AGAIN);
            (window, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        let count = wanted.min(window[which]);
        window[which] -= count;
        usize::try_from(count).expect("at most what is wanted")
    }
}

impl Command {
    fn hang_up(&self) {
        // Relaxed: as above.
        self.shared.gone.store(true, Ordering::Relaxed);
    }
}

/// Our end of the connection, a frame at a time.
#[derive(Clone)]
struct Sender(Arc<Mutex<UnixStream>>);

impl Sender {
    fn send(&self, stream: u32, message: Message<'_>) -> io::Result<()> {
        let mut bytes = Vec::new();
        Frame { stream, message }.encode(&mut bytes);
        let mut client = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        client.write_all(&bytes)
    }

    /// Sends output as fast as the client takes it.
    fn output(
        &self,
        stream: u32,
        channel: Channel,
        mut bytes: &[u8],
        shared: &Shared,
    ) -> io::Result<()> {
        while !bytes.is_empty() {
            let count = shared.take_window(channel, bytes.len().min(MAX_PAYLOAD));
            let (piece, rest) = bytes.split_at(count);
            if piece.is_empty() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let message = match channel {
                Channel::Stderr => Message::Stderr(piece),
                _ => Message::Stdout(piece),
            };
            self.send(stream, message)?;
            bytes = rest;
        }
        Ok(())
    }
}

fn refuse() -> io::Error {
    io::ErrorKind::InvalidData.into()
}

impl Relay<'_> {
    fn read_frames(&mut self, mut client: UnixStream) -> io::Result<()> {
        let mut buffer = Vec::new();
        let mut chunk = vec![0; MAX_PAYLOAD];
        loop {
            match client.read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(count) => buffer.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            let mut used = 0;
            while let Some((frame, len)) = decode(&buffer[used..]).map_err(|_| refuse())? {
                self.take_frame(frame)?;
                used += len;
            }
            buffer.drain(..used);
        }
    }

    fn take_frame(&mut self, frame: Frame<'_>) -> io::Result<()> {
        let Frame { stream, message } = frame;
        match message {
            Message::Hello(hello) => {
                let answer = Hello {
                    version: PROTOCOL_VERSION,
                    nonce: hello.nonce,
                };
                return self.to_client.send(0, Message::Hello(answer));
            }
            Message::Ping(number) => return self.to_client.send(0, Message::Pong(number)),
            Message::ExecPart(part) => return self.collect(part),
            Message::Exec(last) => {
                self.collect(last)?;
                return self.start(stream);
            }
            _ => {}
        }
        // What comes late for a command that has ended means nothing.
        let Some(command) = self.command.as_mut().filter(|it| it.stream == stream) else {
            return Ok(());
        };
        match message {
            Message::Stdin(bytes) => command.feed(bytes),
            Message::StdinEof => {
                command.stdin = None;
                Ok(())
            }
            Message::Signal(signal) => {
                // Whether the guest can be reached, the events tell.
                let _ = command.control.signal(signal);
                Ok(())
            }
            Message::Resize(size) => {
                let _ = command.control.resize(size);
                Ok(())
            }
            Message::Close => {
                command.hang_up();
                Ok(())
            }
            Message::Credit(channel, bytes) => command.shared.widen(channel, bytes),
            _ => Err(refuse()),
        }
    }

    fn collect(&mut self, part: &[u8]) -> io::Result<()> {
        if self.request.len() + part.len() > MAX_EXEC_LEN {
            return Err(refuse());
        }
        self.request.extend_from_slice(part);
        Ok(())
    }

    fn start(&mut self, stream: u32) -> io::Result<()> {
        let bytes = std::mem::take(&mut self.request);
        // Relaxed: as above.
        let busy = |it: &Command| !it.shared.finished.load(Ordering::Relaxed);
        if self.command.as_ref().is_some_and(busy) {
            let failure = Failure {
                reason: FailReason::TooMany,
                errno: 0,
            };
            return self.to_client.send(stream, Message::Failed(failure));
        }
        let exec = Exec::decode(&bytes).map_err(|_| refuse())?;
        let request = ExecRequest {
            argv: exec.argv.map(<[u8]>::to_vec).collect(),
            env: exec.env.map(<[u8]>::to_vec).collect(),
            cwd: (!exec.cwd.is_empty()).then(|| exec.cwd.to_vec()),
            tty: exec.tty,
        };
        let session = self
            .agent
            .exec(&request)
            .map_err(|error| io::Error::new(io::ErrorKind::NotConnected, error))?;
        let shared = Arc::new(Shared::new());
        let (stdin, input) = mpsc::channel();
        let feeder = Feeder {
            stream,
            to_client: self.to_client.clone(),
            shared: Arc::clone(&shared),
        };
        thread::spawn(move || feeder.run(&input, session.stdin));
        let (to_client, flags) = (self.to_client.clone(), Arc::clone(&shared));
        thread::spawn(move || pass_events(stream, session.events, &to_client, &flags));
        self.command = Some(Command {
            stream,
            control: session.control,
            stdin: Some(stdin),
            shared,
        });
        Ok(())
    }
}

impl Command {
    /// Passes input on to the thread that may wait for the guest.
    fn feed(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(stdin) = &self.stdin else {
            return Err(refuse());
        };
        let count = u32::try_from(bytes.len()).map_err(|_| refuse())?;
        let mut pending = lock(&self.shared.pending);
        if *pending + count > INITIAL_WINDOW {
            return Err(refuse());
        }
        *pending += count;
        // The thread is gone only when the command reads no more.
        drop(stdin.send(bytes.to_vec()));
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The thread that brings input to the guest and credit to the client.
struct Feeder {
    stream: u32,
    to_client: Sender,
    shared: Arc<Shared>,
}

impl Feeder {
    fn run(&self, input: &mpsc::Receiver<Vec<u8>>, mut stdin: StdinWriter) {
        for bytes in input {
            let count = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            let answer = match stdin.write_all(&bytes) {
                Ok(()) => Message::Credit(Channel::Stdin, count),
                Err(_) => Message::StdinClosed,
            };
            let closed = answer == Message::StdinClosed;
            *lock(&self.shared.pending) -= count;
            if self.to_client.send(self.stream, answer).is_err() || closed {
                return;
            }
        }
    }
}

/// Brings a command's output and end to the client.
fn pass_events(stream: u32, mut events: Events, to_client: &Sender, shared: &Shared) {
    loop {
        let event = match events.next_within(LOOK_AGAIN) {
            Ok(event) => event,
            // Relaxed: a mere flag.
            Err(_) if shared.gone.load(Ordering::Relaxed) => return,
            Err(_) => continue,
        };
        let last = !matches!(
            event,
            Some(Event::Stdout(_) | Event::Stderr(_) | Event::StdoutEof | Event::StderrEof)
        );
        if last {
            shared.finished.store(true, Ordering::Relaxed);
        }
        let sent = match event {
            Some(Event::Stdout(bytes)) => to_client.output(stream, Channel::Stdout, &bytes, shared),
            Some(Event::Stderr(bytes)) => to_client.output(stream, Channel::Stderr, &bytes, shared),
            Some(Event::StdoutEof) => to_client.send(stream, Message::StdoutEof),
            Some(Event::StderrEof) => to_client.send(stream, Message::StderrEof),
            Some(Event::Exited(status)) => to_client.send(stream, Message::Exited(status)),
            Some(Event::Failed(failure)) => to_client.send(stream, Message::Failed(failure)),
            Some(Event::Lost(_)) | None => {
                let client = lock(&to_client.0);
                let _ = client.shutdown(std::net::Shutdown::Both);
                return;
            }
        };
        if last || sent.is_err() || shared.gone.load(Ordering::Relaxed) {
            return;
        }
    }
}
