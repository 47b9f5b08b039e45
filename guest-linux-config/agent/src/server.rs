//! The loop: waits for the launcher, for commands and for children that end.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, read};
use rustix::process::{WaitOptions, WaitStatus, wait};
use signal_hook::consts::SIGCHLD;
use vmm_shared::agent::{
    Exec, ExitStatus, FailReason, Failure, Frame, Hello, MAX_EXEC_LEN, MAX_PAYLOAD, Message,
    PORT_NAME, PROTOCOL_VERSION,
};

use crate::console::Console;
use crate::processors::Processors;
use crate::session::{Overrun, Session};
use crate::spawn;
use crate::wire::{Outgoing, Wire, WireState};

/// Commands that may run at a time.
const MAX_SESSIONS: usize = 256;
/// Requests that may arrive in pieces at a time.
const MAX_PARTIAL: usize = 4;
/// How often to look for the port while the kernel sets it up, and how often
/// to look whether a launcher has come back.
const SOON: Duration = Duration::from_millis(20);

/// Why the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The launcher asked to switch off.
    PowerOff,
    /// The stream given at the start has ended.
    Closed,
}

/// What a descriptor in the poll set stands for.
#[derive(Clone, Copy, Debug)]
enum Token {
    Children,
    WireIn,
    WireOut,
    Console,
    Processors,
    Stdin(u32),
    Output(u32, usize),
    Leftover(u64),
}

/// What a frame asks for that the loop itself must do.
enum Asked {
    Nothing,
    PowerOff,
    /// The launcher broke the protocol.
    Reset,
}

#[derive(Debug)]
pub(crate) struct Server {
    children: UnixStream,
    wire: Option<Wire>,
    /// The wire is a device that is found again, not given once.
    port: bool,
    /// No use in looking at the wire before.
    quiet_until: Option<Instant>,
    nonce: u64,
    sessions: BTreeMap<u32, Session>,
    /// Pieces of requests.
    partial: BTreeMap<u32, Vec<u8>>,
    /// Sessions of a launcher that has gone.
    orphaned: Vec<Session>,
    /// Outputs that descendants of ended commands hold open.
    leftovers: BTreeMap<u64, OwnedFd>,
    last_leftover: u64,
    console: Option<Console>,
    processors: Option<Processors>,
}

impl Server {
    /// Serves on `wire`, or on the guest's port if there is none.
    pub(crate) fn new(
        wire: Option<Wire>,
        console: Option<Console>,
        processors: Option<Processors>,
    ) -> io::Result<Self> {
        let (children, signalled) = UnixStream::pair()?;
        children.set_nonblocking(true)?;
        signal_hook::low_level::pipe::register(SIGCHLD, signalled)?;
        let mut server = Self {
            children,
            port: wire.is_none(),
            wire,
            quiet_until: None,
            nonce: 0,
            sessions: BTreeMap::new(),
            partial: BTreeMap::new(),
            orphaned: Vec::new(),
            leftovers: BTreeMap::new(),
            last_leftover: 0,
            console,
            processors,
        };
        if let Some(wire) = &mut server.wire {
            announce(&mut wire.outgoing, 0);
        }
        Ok(server)
    }

    /// Runs until the launcher wants the end.
    pub(crate) fn run(&mut self) -> io::Result<Stop> {
        loop {
            self.find_port();
            let ready = self.wait()?;
            for token in ready {
                if let Some(stop) = self.handle(token)? {
                    return Ok(stop);
                }
            }
            self.settle();
            if self.wire.is_none() && !self.port {
                // Nobody will ever hear of anything again.
                return Ok(Stop::Closed);
            }
        }
    }

    fn find_port(&mut self) {
        if self.wire.is_some() || !self.port || self.is_quiet() {
            return;
        }
        match open_port() {
            Some(mut wire) => {
                announce(&mut wire.outgoing, 0);
                self.wire = Some(wire);
                self.quiet_until = None;
            }
            None => self.quiet_until = Some(Instant::now() + SOON),
        }
    }

    fn is_quiet(&self) -> bool {
        self.quiet_until.is_some_and(|until| until > Instant::now())
    }

    /// Waits for something to do.
    fn wait(&self) -> io::Result<Vec<Token>> {
        let mut set = PollSet::default();
        set.add(Token::Children, self.children.as_fd(), PollFlags::IN);
        let mut room = true;
        if let Some(wire) = &self.wire {
            room = wire.outgoing.has_room();
            if wire.outgoing.wants_answers() && !self.is_quiet() {
                set.add(Token::WireIn, wire.incoming.fd(), PollFlags::IN);
            }
            if wire.outgoing.is_waiting() && !self.is_quiet() {
                set.add(Token::WireOut, wire.outgoing.fd(), PollFlags::OUT);
            }
        }
        if let Some(tty) = self.console.as_ref().and_then(Console::wants_to_read) {
            set.add(Token::Console, tty, PollFlags::IN);
        }
        if let Some(processors) = &self.processors {
            set.add(Token::Processors, processors.fd(), PollFlags::IN);
        }
        for (stream, session) in &self.sessions {
            if let Some(fd) = session.wants_to_write() {
                set.add(Token::Stdin(*stream), fd, PollFlags::OUT);
            }
            for which in (0..2).filter(|_| room) {
                if let Some(fd) = session.wants_to_read(which) {
                    set.add(Token::Output(*stream, which), fd, PollFlags::IN);
                }
            }
        }
        for (index, fd) in &self.leftovers {
            set.add(Token::Leftover(*index), fd.as_fd(), PollFlags::IN);
        }
        set.wait(self.deadline())
    }

    /// When something is due without any event.
    fn deadline(&self) -> Option<Instant> {
        let sessions = self.sessions.values().chain(&self.orphaned);
        let kill = sessions.filter_map(Session::deadline).min();
        let quiet = self.quiet_until.filter(|until| *until > Instant::now());
        [kill, quiet].into_iter().flatten().min()
    }

    fn handle(&mut self, token: Token) -> io::Result<Option<Stop>> {
        match token {
            Token::Children => self.reap(),
            Token::WireIn => return self.receive(),
            Token::WireOut => self.flush(),
            Token::Console => {
                if let Some(console) = &mut self.console {
                    console.start_shell();
                }
            }
            Token::Processors => {
                if let Some(processors) = &self.processors {
                    processors.take();
                }
            }
            Token::Stdin(stream) => {
                if let (Some(session), Some(wire)) =
                    (self.sessions.get_mut(&stream), &mut self.wire)
                {
                    session.write_stdin(&mut wire.outgoing);
                }
            }
            Token::Output(stream, which) => {
                if let (Some(session), Some(wire)) =
                    (self.sessions.get_mut(&stream), &mut self.wire)
                    && wire.outgoing.has_room()
                {
                    session.read_output(which, &mut wire.outgoing);
                }
            }
            Token::Leftover(index) => self.discard(index),
        }
        Ok(None)
    }

    /// Throws away what a descendant of an ended command prints.
    fn discard(&mut self, index: u64) {
        let mut chunk = [0; MAX_PAYLOAD];
        let result = self.leftovers.get(&index).map(|fd| read(fd, &mut chunk));
        if !matches!(result, Some(Ok(1..) | Err(Errno::AGAIN | Errno::INTR))) {
            self.leftovers.remove(&index);
        }
    }

    /// Collects the children that have ended, ours and adopted ones.
    fn reap(&mut self) {
        let mut signals = [0; 64];
        while matches!(read(&self.children, &mut signals), Ok(64)) {}
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let Some(status) = exit_status(status) else {
                continue;
            };
            if let Some(console) = &mut self.console {
                console.child_ended(pid);
            }
            self.orphaned.retain(|session| session.pid() != pid);
            let ours = self
                .sessions
                .values_mut()
                .find(|session| session.pid() == pid);
            if let Some(session) = ours {
                session.ended(status);
            }
        }
    }

    /// What is due in every round.
    fn settle(&mut self) {
        let now = Instant::now();
        for session in self.sessions.values_mut().chain(&mut self.orphaned) {
            session.check_deadline(now);
        }
        let Some(wire) = &mut self.wire else { return };
        let mut open_outputs = Vec::new();
        self.sessions.retain(|_, session| {
            session.drain(&mut wire.outgoing);
            match session.finish(&mut wire.outgoing) {
                Some(open) => {
                    open_outputs.extend(open);
                    false
                }
                None => true,
            }
        });
        for fd in open_outputs {
            self.last_leftover += 1;
            self.leftovers.insert(self.last_leftover, fd);
        }
        if !self.is_quiet() {
            self.flush();
        }
    }

    fn flush(&mut self) {
        let Some(wire) = &mut self.wire else { return };
        if wire.outgoing.flush().is_err() {
            self.lose_wire();
        }
    }

    fn receive(&mut self) -> io::Result<Option<Stop>> {
        let Some(wire) = &mut self.wire else {
            return Ok(None);
        };
        match wire.incoming.receive() {
            Ok(WireState::Open) => {}
            Ok(WireState::Closed) if self.port => {
                // Nobody has the other end open just now.
                self.quiet_until = Some(Instant::now() + SOON);
                return Ok(None);
            }
            Ok(WireState::Closed) => {
                self.end_sessions();
                return Ok(Some(Stop::Closed));
            }
            Err(error) if !self.port => return Err(error),
            Err(_) => {
                self.lose_wire();
                return Ok(None);
            }
        }
        // Taken out, so that a frame may borrow it while it is carried out.
        let Some(mut wire) = self.wire.take() else {
            return Ok(None);
        };
        let stop = self.take_frames(&mut wire);
        self.wire = Some(wire);
        Ok(stop)
    }

    fn take_frames(&mut self, wire: &mut Wire) -> Option<Stop> {
        loop {
            let asked = match wire.incoming.next_frame() {
                Ok(None) => return None,
                Ok(Some(frame)) => self.take_frame(frame, &mut wire.outgoing),
                Err(_) => Asked::Reset,
            };
            match asked {
                Asked::Nothing => {}
                Asked::PowerOff => {
                    self.end_sessions();
                    return Some(Stop::PowerOff);
                }
                Asked::Reset => {
                    self.end_sessions();
                    self.nonce = 0;
                    wire.resynchronise();
                    announce(&mut wire.outgoing, 0);
                }
            }
        }
    }

    fn take_frame(&mut self, frame: Frame<'_>, out: &mut Outgoing) -> Asked {
        let stream = frame.stream;
        match frame.message {
            Message::Hello(hello) => {
                if hello.nonce != self.nonce {
                    self.end_sessions();
                    self.nonce = hello.nonce;
                }
                // A launcher of another version learns ours and gives up.
                announce(out, hello.nonce);
            }
            Message::Ping(number) => out.send(0, Message::Pong(number)),
            Message::PowerOff => return Asked::PowerOff,
            Message::ExecPart(bytes) => return self.take_part(stream, bytes),
            Message::Exec(bytes) => return self.take_exec(stream, bytes, out),
            message => {
                // Requests on a session that is over cross its last frame.
                if let Some(session) = self.sessions.get_mut(&stream) {
                    return session_request(session, message, out);
                }
            }
        }
        Asked::Nothing
    }

    fn take_part(&mut self, stream: u32, bytes: &[u8]) -> Asked {
        if self.partial.len() >= MAX_PARTIAL && !self.partial.contains_key(&stream) {
            return Asked::Reset;
        }
        let parts = self.partial.entry(stream).or_default();
        parts.extend_from_slice(bytes);
        if parts.len() > MAX_EXEC_LEN {
            return Asked::Reset;
        }
        Asked::Nothing
    }

    fn take_exec(&mut self, stream: u32, last: &[u8], out: &mut Outgoing) -> Asked {
        let mut whole = self.partial.remove(&stream).unwrap_or_default();
        whole.extend_from_slice(last);
        let Ok(exec) = Exec::decode(&whole) else {
            return Asked::Reset;
        };
        if self.sessions.contains_key(&stream) {
            return Asked::Reset;
        }
        let started = if self.sessions.len() < MAX_SESSIONS {
            spawn::start(&exec)
        } else {
            Err(Failure {
                reason: FailReason::TooMany,
                errno: Errno::AGAIN.raw_os_error(),
            })
        };
        match started {
            Ok(started) => {
                self.sessions.insert(stream, Session::new(stream, started));
            }
            Err(failure) => out.send(stream, Message::Failed(failure)),
        }
        Asked::Nothing
    }

    /// The wire is gone or broken. A port is looked for again.
    fn lose_wire(&mut self) {
        self.end_sessions();
        self.wire = None;
        self.nonce = 0;
        self.quiet_until = Some(Instant::now() + SOON);
    }

    /// Hangs up on all commands of the launcher.
    fn end_sessions(&mut self) {
        self.partial.clear();
        for (_, mut session) in std::mem::take(&mut self.sessions) {
            if session.hang_up() {
                self.orphaned.push(session);
            }
        }
    }
}

fn session_request(session: &mut Session, message: Message<'_>, out: &mut Outgoing) -> Asked {
    match message {
        Message::Stdin(bytes) => {
            return match session.take_stdin(bytes, out) {
                Ok(()) => Asked::Nothing,
                Err(Overrun) => Asked::Reset,
            };
        }
        Message::StdinEof => session.take_stdin_eof(out),
        Message::Signal(number) => session.signal(number),
        Message::Resize(size) => session.resize(size),
        Message::Credit(channel, bytes) => session.take_credit(channel, bytes),
        Message::Close => {
            session.hang_up();
        }
        // Nothing that a launcher has to say on a session.
        _ => {}
    }
    Asked::Nothing
}

fn announce(out: &mut Outgoing, nonce: u64) {
    let version = PROTOCOL_VERSION;
    out.send(0, Message::Hello(Hello { version, nonce }));
}

fn exit_status(status: WaitStatus) -> Option<ExitStatus> {
    if let Some(code) = status.exit_status() {
        return u8::try_from(code).ok().map(ExitStatus::Code);
    }
    let signal = status.terminating_signal()?;
    u8::try_from(signal).ok().map(ExitStatus::Signal)
}

/// Opens the agent's virtio-serial port, if the kernel has found it by now.
/// There is no udev to name it: its name stands in sysfs.
fn open_port() -> Option<Wire> {
    let ports = fs::read_dir("/sys/class/virtio-ports").ok()?;
    let port = ports.flatten().find(|port| {
        fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim_end() == PORT_NAME)
    })?;
    let device = PathBuf::from("/dev").join(port.file_name());
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(device)
        .ok()?;
    let output = OwnedFd::from(file);
    Wire::new(output.try_clone().ok()?, output).ok()
}

/// Descriptors to wait on and what they stand for.
#[derive(Default)]
struct PollSet<'a> {
    tokens: Vec<Token>,
    fds: Vec<PollFd<'a>>,
}

impl<'a> PollSet<'a> {
    fn add(&mut self, token: Token, fd: BorrowedFd<'a>, flags: PollFlags) {
        self.tokens.push(token);
        self.fds.push(PollFd::from_borrowed_fd(fd, flags));
    }

    fn wait(mut self, deadline: Option<Instant>) -> io::Result<Vec<Token>> {
        let timeout = deadline.map(|at| {
            let left = at.saturating_duration_since(Instant::now());
            Timespec::try_from(left).unwrap_or(Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            })
        });
        match poll(&mut self.fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = |(token, fd): (Token, PollFd<'_>)| (!fd.revents().is_empty()).then_some(token);
        Ok(self
            .tokens
            .into_iter()
            .zip(self.fds)
            .filter_map(ready)
            .collect())
    }
}
