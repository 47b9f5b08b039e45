//! The layout of a message.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::queue::{MESSAGE_BYTES, MESSAGE_WORDS, Message};

/// Version of the messages; any other is refused.
pub const PROTOCOL: u16 = 1;

/// Bytes of a message that its method can use.
pub const BODY_BYTES: usize = MESSAGE_BYTES - size_of::<Header>();

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// A call.
    Request = 1,
    /// Its answer.
    Reply = 2,
    /// The callee does not carry it out; `status` says why.
    Refusal = 3,
    /// The caller no longer waits for it.
    Cancel = 4,
}

impl Kind {
    /// The kind with this number, if there is one.
    #[must_use]
    pub const fn from_number(number: u16) -> Option<Self> {
        match number {
            1 => Some(Self::Request),
            2 => Some(Self::Reply),
            3 => Some(Self::Refusal),
            4 => Some(Self::Cancel),
            _ => None,
        }
    }
}

/// The first bytes of every message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// [`PROTOCOL`].
    pub version: u16,
    /// A [`Kind`] as a number.
    pub kind: u16,
    /// The sender's incarnation, as in the membership of the log.
    pub epoch: u32,
    /// The caller's number for the call.
    pub call: u64,
    /// What is called.
    pub method: u32,
    /// Bytes of the body.
    pub len: u32,
    /// Of a refusal: why.
    pub status: u32,
    /// Zero.
    pub reserved: u32,
}

const _: () = assert!(size_of::<Header>() == 32);
const HEADER_WORDS: usize = size_of::<Header>() / 8;

/// A call that a peer has made.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// The peer that calls.
    pub peer: usize,
    /// The message's header; `method` says what is called.
    pub header: Header,
    body: [u8; BODY_BYTES],
}

impl Request {
    /// The call's arguments.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        &self.body[..body_len(&self.header).unwrap_or(0)]
    }
}

/// The length of the body, if it is possible.
pub(crate) fn body_len(header: &Header) -> Option<usize> {
    usize::try_from(header.len)
        .ok()
        .filter(|len| *len <= BODY_BYTES)
}

/// Puts a message together; `None` if the body is too long.
pub(crate) fn encode(header: &Header, body: &[u8]) -> Option<Message> {
    let mut message = [0; MESSAGE_WORDS];
    let header = Header {
        len: u32::try_from(body.len()).ok()?,
        ..*header
    };
    let (head, rest) = message.as_mut_slice().split_at_mut(HEADER_WORDS);
    head.as_mut_bytes().copy_from_slice(header.as_bytes());
    rest.as_mut_bytes()
        .get_mut(..body.len())?
        .copy_from_slice(body);
    Some(message)
}

/// Takes a message apart; `None` if it is of another version or impossible.
pub(crate) fn decode(peer: usize, message: &Message) -> Option<(Kind, Request)> {
    let (head, rest) = message.as_slice().split_at(HEADER_WORDS);
    let header = Header::read_from_bytes(head.as_bytes()).ok()?;
    if header.version != PROTOCOL {
        return None;
    }
    body_len(&header)?;
    let kind = Kind::from_number(header.kind)?;
    let mut body = [0; BODY_BYTES];
    body.copy_from_slice(rest.as_bytes());
    Some((kind, Request { peer, header, body }))
}
