//! The protocol between the launcher and the agent that runs commands in the
//! guest: frames over one reliable byte stream in each direction.
//!
//! ```text
//!   0   len      u32   payload bytes, at most MAX_PAYLOAD
//!   4   stream   u32   the session; 0 for what belongs to no session
//!   8   kind     u16   a Kind
//!   10  zero     u16
//!   12  magic    u32   FRAME_MAGIC
//!   16  payload
//! ```
//!
//! All numbers are little-endian. A session begins with [`Message::Exec`]
//! from the launcher, which picks an unused stream number, and ends with
//! [`Message::Exited`] or [`Message::Failed`] from the agent: the last frame
//! of that stream. Standard input, output and error are each under flow
//! control of their own: a sender starts with [`INITIAL_WINDOW`] bytes of
//! credit and gets more by [`Message::Credit`], so one reader that is slow
//! neither blocks other sessions nor makes its peer buffer without bound.
//!
//! The launcher opens with a [`Hello`] that carries a nonce; the agent
//! answers with the same nonce. The agent also says Hello with nonce 0 when
//! it starts, to which a launcher that is waiting repeats its own. A Hello
//! with a new nonce ends all sessions of the launcher before it.
//!
//! Neither side trusts the other: [`decode`] takes any bytes, and what it
//! returns has been checked.

use core::fmt;

/// Version of this protocol; both sides must have the same.
pub const PROTOCOL_VERSION: u16 = 1;
/// Bytes of a frame's header.
pub const HEADER_LEN: usize = 16;
/// Most bytes of payload in a frame.
pub const MAX_PAYLOAD: usize = 64 * 1024;
/// Bytes that may be sent on a new stream, in each direction, without credit.
pub const INITIAL_WINDOW: u32 = 256 * 1024;
/// Longest encoded [`Exec`] request: what Linux takes for arguments and
/// environment together, and some room.
pub const MAX_EXEC_LEN: usize = 4 * 1024 * 1024;
/// The name of the virtio-serial port that carries the protocol.
pub const PORT_NAME: &str = "viaduct.agent";

/// "VdA1", read as a little-endian word.
pub const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"VdA1");

/// What a frame says, as numbered in its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
enum Kind {
    Hello = 1,
    ExecPart = 2,
    Exec = 3,
    Stdin = 4,
    StdinEof = 5,
    StdinClosed = 6,
    Signal = 7,
    Resize = 8,
    Credit = 9,
    Stdout = 10,
    StdoutEof = 11,
    Stderr = 12,
    StderrEof = 13,
    Exited = 14,
    Failed = 15,
    Close = 16,
    PowerOff = 17,
    Ping = 18,
    Pong = 19,
}

impl Kind {
    const ALL: [Self; 19] = [
        Self::Hello,
        Self::ExecPart,
        Self::Exec,
        Self::Stdin,
        Self::StdinEof,
        Self::StdinClosed,
        Self::Signal,
        Self::Resize,
        Self::Credit,
        Self::Stdout,
        Self::StdoutEof,
        Self::Stderr,
        Self::StderrEof,
        Self::Exited,
        Self::Failed,
        Self::Close,
        Self::PowerOff,
        Self::Ping,
        Self::Pong,
    ];

    fn from_raw(raw: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u16 == raw)
    }
}

/// The first message of each side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`] of the sender.
    pub version: u16,
    /// Picked by the launcher, not 0; repeated by the agent.
    pub nonce: u64,
}

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub cols: u16,
}

/// One of the three byte streams of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Channel {
    /// Launcher to agent.
    Stdin = 0,
    /// Agent to launcher.
    Stdout = 1,
    /// Agent to launcher.
    Stderr = 2,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    /// It exited with this status.
    Code(u8),
    /// This signal killed it.
    Signal(u8),
}

impl ExitStatus {
    /// The status as a shell reports it: signals count from 128.
    #[must_use]
    pub const fn shell_status(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128_u8.saturating_add(signal),
        }
    }
}

/// Why a command was not started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum FailReason {
    /// There is no such program.
    NotFound = 1,
    /// The program is there and can't be run.
    CannotRun = 2,
    /// The working directory can't be entered.
    BadDirectory = 3,
    /// The agent runs as many commands as it may.
    TooMany = 4,
    /// The agent lacks what a command needs: processes, pipes, terminals.
    NoResources = 5,
}

/// That a command was not started, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The kind of failure.
    pub reason: FailReason,
    /// The guest's error number; 0 if none fits.
    pub errno: i32,
}

impl Failure {
    /// The exit status that `run` and `exec` report for it.
    #[must_use]
    pub const fn shell_status(self) -> u8 {
        match self.reason {
            FailReason::NotFound => 127,
            FailReason::CannotRun | FailReason::BadDirectory => 126,
            FailReason::TooMany | FailReason::NoResources => 125,
        }
    }
}

/// A message, borrowed from the buffer that it was decoded from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// Opens the conversation. Stream 0.
    Hello(Hello),
    /// A piece of an encoded [`Exec`] request that is too long for one frame.
    ExecPart(&'a [u8]),
    /// The request, or its last piece: start the command.
    Exec(&'a [u8]),
    /// Standard input for the command.
    Stdin(&'a [u8]),
    /// There will be no more standard input.
    StdinEof,
    /// The command no longer reads its input: what was sent is lost.
    StdinClosed,
    /// Send this signal (1 to 31) to the command's process group.
    Signal(u8),
    /// The terminal has a new size.
    Resize(WindowSize),
    /// The peer may send so many bytes more.
    Credit(Channel, u32),
    /// Standard output, or a terminal's output.
    Stdout(&'a [u8]),
    /// Standard output was closed.
    StdoutEof,
    /// Standard error.
    Stderr(&'a [u8]),
    /// Standard error was closed.
    StderrEof,
    /// The command ended; all it had written was sent before.
    Exited(ExitStatus),
    /// The command was not started.
    Failed(Failure),
    /// The launcher wants no more of this session: hang up on it.
    Close,
    /// Write everything back and switch the machine off. Stream 0.
    PowerOff,
    /// Answer with Pong and the same number. Stream 0.
    Ping(u64),
    /// Answer to Ping. Stream 0.
    Pong(u64),
}

/// A message and the session that it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The session, or 0.
    pub stream: u32,
    /// What is said.
    pub message: Message<'a>,
}

/// Why bytes are no frame of this protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// The header has no [`FRAME_MAGIC`] or its zero field is not zero.
    NotAFrame,
    /// A kind that this version does not know.
    UnknownKind(u16),
    /// More payload than a frame may have, or not what its kind has.
    BadLength {
        /// The kind's number.
        kind: u16,
        /// The length found.
        len: u32,
    },
    /// A value in the payload is out of its range.
    BadValue {
        /// The kind's number.
        kind: u16,
    },
    /// The frame needs a session and names none, or the other way round.
    BadStream {
        /// The kind's number.
        kind: u16,
        /// The stream found.
        stream: u32,
    },
    /// An encoded command is damaged or longer than allowed.
    BadExec,
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAFrame => write!(f, "bytes that are no frame"),
            Self::UnknownKind(kind) => write!(f, "a frame of unknown kind {kind}"),
            Self::BadLength { kind, len } => {
                write!(f, "a frame of kind {kind} with {len} bytes of payload")
            }
            Self::BadValue { kind } => write!(f, "a frame of kind {kind} with a value not allowed"),
            Self::BadStream { kind, stream } => {
                write!(f, "a frame of kind {kind} on stream {stream}")
            }
            Self::BadExec => write!(f, "a damaged request to run a command"),
        }
    }
}

impl core::error::Error for FrameError {}

impl<'a> Message<'a> {
    fn kind(&self) -> Kind {
        match self {
            Self::Hello(_) => Kind::Hello,
            Self::ExecPart(_) => Kind::ExecPart,
            Self::Exec(_) => Kind::Exec,
            Self::Stdin(_) => Kind::Stdin,
            Self::StdinEof => Kind::StdinEof,
            Self::StdinClosed => Kind::StdinClosed,
            Self::Signal(_) => Kind::Signal,
            Self::Resize(_) => Kind::Resize,
            Self::Credit(..) => Kind::Credit,
            Self::Stdout(_) => Kind::Stdout,
            Self::StdoutEof => Kind::StdoutEof,
            Self::Stderr(_) => Kind::Stderr,
            Self::StderrEof => Kind::StderrEof,
            Self::Exited(_) => Kind::Exited,
            Self::Failed(_) => Kind::Failed,
            Self::Close => Kind::Close,
            Self::PowerOff => Kind::PowerOff,
            Self::Ping(_) => Kind::Ping,
            Self::Pong(_) => Kind::Pong,
        }
    }

    fn parse(kind: Kind, payload: &'a [u8]) -> Result<Self, FrameError> {
        let bad_length = || FrameError::BadLength {
            kind: kind as u16,
            len: u32::try_from(payload.len()).unwrap_or(u32::MAX),
        };
        let bad_value = FrameError::BadValue { kind: kind as u16 };
        let pair = || -> Result<(u32, u32), FrameError> {
            let [a, b, c, d, e, f, g, h] = *payload else {
                return Err(bad_length());
            };
            Ok((
                u32::from_le_bytes([a, b, c, d]),
                u32::from_le_bytes([e, f, g, h]),
            ))
        };
        let number = || -> Result<u64, FrameError> {
            let bytes = payload.try_into().map_err(|_| bad_length())?;
            Ok(u64::from_le_bytes(bytes))
        };
        let empty = |message| {
            if payload.is_empty() {
                Ok(message)
            } else {
                Err(bad_length())
            }
        };
        match kind {
            Kind::Hello => {
                let (version, nonce) = payload.split_at_checked(2).ok_or_else(bad_length)?;
                Ok(Self::Hello(Hello {
                    version: u16::from_le_bytes(version.try_into().map_err(|_| bad_length())?),
                    nonce: u64::from_le_bytes(nonce.try_into().map_err(|_| bad_length())?),
                }))
            }
            Kind::ExecPart => Ok(Self::ExecPart(payload)),
            Kind::Exec => Ok(Self::Exec(payload)),
            Kind::Stdin => Ok(Self::Stdin(payload)),
            Kind::StdinEof => empty(Self::StdinEof),
            Kind::StdinClosed => empty(Self::StdinClosed),
            Kind::Signal => match *payload {
                [signal @ 1..=31] => Ok(Self::Signal(signal)),
                [_] => Err(bad_value),
                _ => Err(bad_length()),
            },
            Kind::Resize => {
                let [a, b, c, d] = *payload else {
                    return Err(bad_length());
                };
                Ok(Self::Resize(WindowSize {
                    rows: u16::from_le_bytes([a, b]),
                    cols: u16::from_le_bytes([c, d]),
                }))
            }
            Kind::Credit => {
                let (channel, bytes) = pair()?;
                let channel = match channel {
                    0 => Channel::Stdin,
                    1 => Channel::Stdout,
                    2 => Channel::Stderr,
                    _ => return Err(bad_value),
                };
                Ok(Self::Credit(channel, bytes))
            }
            Kind::Stdout => Ok(Self::Stdout(payload)),
            Kind::StdoutEof => empty(Self::StdoutEof),
            Kind::Stderr => Ok(Self::Stderr(payload)),
            Kind::StderrEof => empty(Self::StderrEof),
            Kind::Exited => match *payload {
                [0, code] => Ok(Self::Exited(ExitStatus::Code(code))),
                [1, signal @ 1..=127] => Ok(Self::Exited(ExitStatus::Signal(signal))),
                [_, _] => Err(bad_value),
                _ => Err(bad_length()),
            },
            Kind::Failed => {
                let (reason, errno) = pair()?;
                let reason = match reason {
                    1 => FailReason::NotFound,
                    2 => FailReason::CannotRun,
                    3 => FailReason::BadDirectory,
                    4 => FailReason::TooMany,
                    5 => FailReason::NoResources,
                    _ => return Err(bad_value),
                };
                let errno = i32::try_from(errno).map_err(|_| bad_value)?;
                Ok(Self::Failed(Failure { reason, errno }))
            }
            Kind::Close => empty(Self::Close),
            Kind::PowerOff => empty(Self::PowerOff),
            Kind::Ping => Ok(Self::Ping(number()?)),
            Kind::Pong => Ok(Self::Pong(number()?)),
        }
    }

    /// Hands the payload to `emit`, in one piece.
    fn with_payload<R>(&self, emit: impl FnOnce(&[u8]) -> R) -> R {
        let pair = |a: u32, b: u32| {
            let mut bytes = [0; 8];
            bytes[..4].copy_from_slice(&a.to_le_bytes());
            bytes[4..].copy_from_slice(&b.to_le_bytes());
            bytes
        };
        match self {
            Self::Hello(hello) => {
                let mut bytes = [0; 10];
                bytes[..2].copy_from_slice(&hello.version.to_le_bytes());
                bytes[2..].copy_from_slice(&hello.nonce.to_le_bytes());
                emit(&bytes)
            }
            Self::ExecPart(bytes)
            | Self::Exec(bytes)
            | Self::Stdin(bytes)
            | Self::Stdout(bytes)
            | Self::Stderr(bytes) => emit(bytes),
            Self::StdinEof
            | Self::StdinClosed
            | Self::StdoutEof
            | Self::StderrEof
            | Self::Close
            | Self::PowerOff => emit(&[]),
            Self::Signal(signal) => emit(&[*signal]),
            Self::Resize(size) => {
                let [a, b] = size.rows.to_le_bytes();
                let [c, d] = size.cols.to_le_bytes();
                emit(&[a, b, c, d])
            }
            Self::Credit(channel, bytes) => emit(&pair(*channel as u32, *bytes)),
            Self::Exited(ExitStatus::Code(code)) => emit(&[0, *code]),
            Self::Exited(ExitStatus::Signal(signal)) => emit(&[1, *signal]),
            Self::Failed(failure) => emit(&pair(
                failure.reason as u32,
                u32::try_from(failure.errno).unwrap_or(0),
            )),
            Self::Ping(number) | Self::Pong(number) => emit(&number.to_le_bytes()),
        }
    }
}

impl Frame<'_> {
    /// Appends the frame's bytes to `sink`.
    ///
    /// # Panics
    /// If a payload is longer than [`MAX_PAYLOAD`]: senders cut their data.
    pub fn encode(&self, sink: &mut impl Extend<u8>) {
        self.message.with_payload(|payload| {
            assert!(payload.len() <= MAX_PAYLOAD, "senders cut their data");
            let len = u32::try_from(payload.len()).expect("at most MAX_PAYLOAD");
            let mut header = [0; HEADER_LEN];
            header[0..4].copy_from_slice(&len.to_le_bytes());
            header[4..8].copy_from_slice(&self.stream.to_le_bytes());
            header[8..10].copy_from_slice(&(self.message.kind() as u16).to_le_bytes());
            header[12..16].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
            sink.extend(header);
            sink.extend(payload.iter().copied());
        });
    }
}

struct Header {
    len: usize,
    stream: u32,
    kind: Kind,
}

fn parse_header(bytes: &[u8; HEADER_LEN]) -> Result<Header, FrameError> {
    let word =
        |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    if word(12) != FRAME_MAGIC || bytes[10..12] != [0, 0] {
        return Err(FrameError::NotAFrame);
    }
    let raw = u16::from_le_bytes([bytes[8], bytes[9]]);
    let kind = Kind::from_raw(raw).ok_or(FrameError::UnknownKind(raw))?;
    let (len, stream) = (word(0), word(4));
    let bad_length = FrameError::BadLength { kind: raw, len };
    let len = usize::try_from(len).map_err(|_| bad_length)?;
    if len > MAX_PAYLOAD {
        return Err(bad_length);
    }
    let global = matches!(kind, Kind::Hello | Kind::PowerOff | Kind::Ping | Kind::Pong);
    if global != (stream == 0) {
        return Err(FrameError::BadStream { kind: raw, stream });
    }
    Ok(Header { len, stream, kind })
}

/// The frame at the start of `bytes` and how many bytes it takes, or `None`
/// if more bytes are needed to tell.
///
/// # Errors
/// Says why the bytes are no frame. The header is judged as soon as it is
/// there, so a peer can't make the reader wait for an absurd length.
pub fn decode(bytes: &[u8]) -> Result<Option<(Frame<'_>, usize)>, FrameError> {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_LEN>() else {
        return Ok(None);
    };
    let header = parse_header(header)?;
    let Some(payload) = rest.get(..header.len) else {
        return Ok(None);
    };
    let message = Message::parse(header.kind, payload)?;
    let frame = Frame {
        stream: header.stream,
        message,
    };
    Ok(Some((frame, HEADER_LEN + header.len)))
}

/// How many bytes to drop from a stream that is out of step: up to where a
/// [`Hello`] may start, or up to where the next bytes may complete one.
#[must_use]
pub fn skip_to_hello(bytes: &[u8]) -> usize {
    for (at, window) in bytes.windows(HEADER_LEN).enumerate() {
        let Ok(header) = window.try_into().map(parse_header) else {
            continue;
        };
        if header.is_ok_and(|header| header.kind == Kind::Hello && header.len == 10) {
            return at;
        }
    }
    bytes.len().saturating_sub(HEADER_LEN - 1)
}

/// A request to run a command, borrowed from its encoded form:
///
/// ```text
///   0   tty u16 (0 or 1), rows u16, cols u16, zero u16
///   8   arguments u32, environment entries u32
///   16  strings: working directory, arguments, entries; each len u32 + bytes
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exec<'a> {
    /// Run it on a terminal of this size.
    pub tty: Option<WindowSize>,
    /// The directory to run it in; empty for the agent's default.
    pub cwd: &'a [u8],
    /// The program and its arguments; at least one.
    pub argv: Strings<'a>,
    /// `NAME=value` entries to add to the agent's default environment.
    pub env: Strings<'a>,
}

/// Byte strings, one after the other. Yields them in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strings<'a> {
    encoded: &'a [u8],
    count: u32,
}

impl<'a> Strings<'a> {
    /// Takes `count` checked strings off the front of `bytes`.
    fn take(bytes: &mut &'a [u8], count: u32) -> Result<Self, FrameError> {
        let whole = *bytes;
        for _ in 0..count {
            let string = take_string(bytes).ok_or(FrameError::BadExec)?;
            // execve takes C strings: a zero byte would cut one short.
            if string.contains(&0) {
                return Err(FrameError::BadExec);
            }
        }
        Ok(Self {
            encoded: &whole[..whole.len() - bytes.len()],
            count,
        })
    }
}

impl<'a> Iterator for Strings<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        self.count = self.count.checked_sub(1)?;
        take_string(&mut self.encoded)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let count = usize::try_from(self.count).unwrap_or(usize::MAX);
        (count, Some(count))
    }
}

fn take_string<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (len, rest) = bytes.split_first_chunk()?;
    let len = usize::try_from(u32::from_le_bytes(*len)).ok()?;
    let (string, rest) = rest.split_at_checked(len)?;
    *bytes = rest;
    Some(string)
}

impl<'a> Exec<'a> {
    /// Reads an encoded request.
    ///
    /// # Errors
    /// [`FrameError::BadExec`] if it is damaged, longer than
    /// [`MAX_EXEC_LEN`], names no program, or has a zero byte in a string.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, FrameError> {
        if bytes.len() > MAX_EXEC_LEN {
            return Err(FrameError::BadExec);
        }
        let (head, mut rest) = bytes.split_first_chunk::<16>().ok_or(FrameError::BadExec)?;
        let half = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        let tty = match (half(0), half(6)) {
            (0, 0) => None,
            (1, 0) => Some(WindowSize {
                rows: half(2),
                cols: half(4),
            }),
            _ => return Err(FrameError::BadExec),
        };
        let mut cwd = Strings::take(&mut rest, 1)?;
        let argv = Strings::take(&mut rest, word(8))?;
        let env = Strings::take(&mut rest, word(12))?;
        if argv.count == 0 || !rest.is_empty() {
            return Err(FrameError::BadExec);
        }
        Ok(Self {
            tty,
            cwd: cwd.next().unwrap_or_default(),
            argv,
            env,
        })
    }
}

/// Appends an encoded [`Exec`] request to `sink`.
///
/// # Errors
/// [`FrameError::BadExec`] if the request would be refused by
/// [`Exec::decode`]; `sink` may then hold a part of it.
pub fn encode_exec<S: AsRef<[u8]>>(
    sink: &mut impl Extend<u8>,
    tty: Option<WindowSize>,
    cwd: &[u8],
    argv: &[S],
    env: &[S],
) -> Result<(), FrameError> {
    let count = |strings: &[S]| u32::try_from(strings.len()).map_err(|_| FrameError::BadExec);
    let size = tty.unwrap_or(WindowSize { rows: 0, cols: 0 });
    if argv.is_empty() {
        return Err(FrameError::BadExec);
    }
    for half in [u16::from(tty.is_some()), size.rows, size.cols, 0] {
        sink.extend(half.to_le_bytes());
    }
    sink.extend(count(argv)?.to_le_bytes());
    sink.extend(count(env)?.to_le_bytes());
    let mut total = 16;
    let strings = argv.iter().chain(env).map(AsRef::as_ref);
    for string in core::iter::once(cwd).chain(strings) {
        total += 4 + string.len();
        if total > MAX_EXEC_LEN || string.contains(&0) {
            return Err(FrameError::BadExec);
        }
        let len = u32::try_from(string.len()).map_err(|_| FrameError::BadExec)?;
        sink.extend(len.to_le_bytes());
        sink.extend(string.iter().copied());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: WindowSize = WindowSize { rows: 25, cols: 80 };

    fn every_message() -> Vec<Message<'static>> {
        vec![
            Message::Hello(Hello {
                version: 1,
                nonce: 0x0123_4567_89ab_cdef,
            }),
            Message::ExecPart(b"part"),
            Message::Exec(b"last"),
            Message::Stdin(b"in"),
            Message::StdinEof,
            Message::StdinClosed,
            Message::Signal(15),
            Message::Resize(SIZE),
            Message::Credit(Channel::Stderr, 4096),
            Message::Stdout(&[0; MAX_PAYLOAD]),
            Message::StdoutEof,
            Message::Stderr(b""),
            Message::StderrEof,
            Message::Exited(ExitStatus::Code(7)),
            Message::Exited(ExitStatus::Signal(9)),
            Message::Failed(Failure {
                reason: FailReason::CannotRun,
                errno: 13,
            }),
            Message::Close,
            Message::PowerOff,
            Message::Ping(u64::MAX),
            Message::Pong(1),
        ]
    }

    fn frame_of(message: Message<'static>) -> Frame<'static> {
        let global = matches!(
            message,
            Message::Hello(_) | Message::PowerOff | Message::Ping(_) | Message::Pong(_)
        );
        Frame {
            stream: if global { 0 } else { 0xdead_beef },
            message,
        }
    }

    fn encoded(frame: Frame<'_>) -> Vec<u8> {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        bytes
    }

    #[test]
    fn every_message_comes_back() {
        for message in every_message() {
            let frame = frame_of(message);
            let mut bytes = encoded(frame);
            let len = bytes.len();
            bytes.push(0xaa);
            assert_eq!(decode(&bytes), Ok(Some((frame, len))));
        }
    }

    #[test]
    fn a_frame_cut_anywhere_is_waited_for() {
        for message in every_message() {
            let bytes = encoded(frame_of(message));
            for cut in (0..bytes.len()).step_by(1 + bytes.len() / 100) {
                assert_eq!(decode(&bytes[..cut]), Ok(None), "{message:?} at {cut}");
            }
        }
    }

    #[test]
    fn garbage_is_refused_and_never_panics() {
        let good = encoded(frame_of(Message::Credit(Channel::Stdout, 1)));
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                // Only that it returns: some flips give other valid frames.
                let _ = decode(&bad);
                if (10..16).contains(&at) {
                    assert_eq!(decode(&bad), Err(FrameError::NotAFrame));
                }
            }
        }
        let mut long = good.clone();
        long[..4].copy_from_slice(&(MAX_PAYLOAD as u32 + 1).to_le_bytes());
        assert!(matches!(decode(&long), Err(FrameError::BadLength { .. })));
        let mut channel = good;
        channel[HEADER_LEN] = 3;
        assert_eq!(decode(&channel), Err(FrameError::BadValue { kind: 9 }));
    }

    #[test]
    fn a_session_message_without_a_session_is_refused() {
        let bytes = encoded(Frame {
            stream: 0,
            message: Message::Stdin(b"x"),
        });
        assert!(matches!(decode(&bytes), Err(FrameError::BadStream { .. })));
        let bytes = encoded(Frame {
            stream: 1,
            message: Message::PowerOff,
        });
        assert!(matches!(decode(&bytes), Err(FrameError::BadStream { .. })));
    }

    #[test]
    fn a_hello_is_found_behind_garbage() {
        let hello = encoded(frame_of(every_message()[0]));
        let mut bytes = vec![0x56; 1000];
        bytes.extend(&hello);
        assert_eq!(skip_to_hello(&bytes), 1000);
        assert_eq!(skip_to_hello(&bytes[..1010]), 995);
        assert_eq!(skip_to_hello(&bytes[..3]), 0);
        // An Exec that is cut off is no place to go on from.
        assert_eq!(skip_to_hello(&encoded(frame_of(Message::Close))), 1);
    }

    #[test]
    fn a_request_comes_back_byte_for_byte() {
        let argv: [&[u8]; 5] = [b"printf", b"%s", b"", b" a\"b'\n", &[0xff, 0xfe, 1]];
        let env: [&[u8]; 2] = [b"A=1", b"B="];
        let mut bytes = Vec::new();
        encode_exec(&mut bytes, Some(SIZE), b"/tmp", &argv, &env).expect("valid");
        let exec = Exec::decode(&bytes).expect("valid");
        assert_eq!((exec.tty, exec.cwd), (Some(SIZE), &b"/tmp"[..]));
        assert_eq!(exec.argv.collect::<Vec<_>>(), argv);
        assert_eq!(exec.env.collect::<Vec<_>>(), env);
    }

    #[test]
    fn damaged_requests_are_refused() {
        let mut bytes = Vec::new();
        encode_exec(&mut bytes, None, b"", &["true", "x"], &["A=b"]).expect("valid");
        for cut in 0..bytes.len() {
            assert_eq!(Exec::decode(&bytes[..cut]), Err(FrameError::BadExec));
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert_eq!(Exec::decode(&longer), Err(FrameError::BadExec));
        // Counts that promise more strings than there are bytes.
        bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Exec::decode(&bytes), Err(FrameError::BadExec));

        let none: [&str; 0] = [];
        assert!(encode_exec(&mut Vec::new(), None, b"", &none, &none).is_err());
        assert!(encode_exec(&mut Vec::new(), None, b"", &["a\0b"], &none).is_err());
        let long = "x".repeat(MAX_EXEC_LEN);
        assert!(encode_exec(&mut Vec::new(), None, b"", &[long.as_str()], &none).is_err());
    }

    #[test]
    fn statuses_are_those_of_a_shell() {
        assert_eq!(ExitStatus::Code(7).shell_status(), 7);
        assert_eq!(ExitStatus::Signal(9).shell_status(), 137);
        let failed = |reason| Failure { reason, errno: 0 }.shell_status();
        assert_eq!(failed(FailReason::NotFound), 127);
        assert_eq!(failed(FailReason::CannotRun), 126);
        assert_eq!(failed(FailReason::NoResources), 125);
    }
}
