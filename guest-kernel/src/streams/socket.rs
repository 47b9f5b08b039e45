//! Sockets: who is connected to whom, and what is on its way between them.
//!
//! Each has a queue of what has been sent to it. All are on this machine: a
//! connection is a pair of sockets that know each other.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;

use super::address::{Address, Family, Kind, Next};
use crate::errno::{Errno, Result};
use crate::fs::node::NodeId;
use crate::process::files::FileId;
use crate::table::Table;

/// A socket by its number.
pub(crate) type SocketId = u32;

/// Bytes that a socket's queue holds.
pub(crate) const CAPACITY: usize = 208 << 10;
/// What a message costs besides its bytes, where messages are kept apart.
const MESSAGE_COST: usize = 512;

/// A process as the other side sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sender {
    pub(crate) pid: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// Bytes on their way, and what goes with them.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) bytes: Vec<u8>,
    /// Open files, each with a use held.
    pub(crate) files: Vec<FileId>,
    pub(crate) from: Option<Address>,
    pub(crate) sender: Sender,
    /// Bytes of it that have been read already.
    taken: usize,
}

/// What was taken out of a queue.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Taken {
    pub(crate) bytes: Vec<u8>,
    /// How many there were.
    pub(crate) whole: usize,
    pub(crate) files: Vec<FileId>,
    pub(crate) from: Option<Address>,
    pub(crate) sender: Sender,
}

/// A socket.
#[derive(Debug)]
pub(crate) struct Socket {
    pub(crate) family: Family,
    pub(crate) kind: Kind,
    inbox: VecDeque<Message>,
    queued: usize,
    pub(crate) local: Option<Address>,
    /// The file of that name, if it was bound to one.
    pub(crate) holds: Option<NodeId>,
    pub(crate) remote: Option<Address>,
    /// The other end.
    pub(crate) peer: Option<SocketId>,
    /// It has had one.
    pub(crate) connected: bool,
    /// It takes connections: most that may wait.
    pub(crate) backlog: Option<usize>,
    pub(crate) waiting: VecDeque<SocketId>,
    /// Nothing more will come, or can be sent.
    pub(crate) reads_over: bool,
    pub(crate) writes_over: bool,
    pub(crate) error: Option<Errno>,
    /// Who has made it, and the other end.
    pub(crate) owner: Sender,
    pub(crate) peer_owner: Sender,
    /// Options that are only remembered, by level and name.
    pub(crate) options: BTreeMap<(u32, u32), Box<[u8]>>,
    /// How long a call waits, in ns: to receive and to send.
    pub(crate) patience: [Option<u64>; 2],
}

impl Message {
    pub(crate) fn new(bytes: Vec<u8>, sender: Sender) -> Self {
        Self {
            bytes,
            files: Vec::new(),
            from: None,
            sender,
            taken: 0,
        }
    }
}

impl Socket {
    pub(crate) fn new(family: Family, kind: Kind, owner: Sender) -> Self {
        Self {
            family,
            kind,
            inbox: VecDeque::new(),
            queued: 0,
            local: None,
            holds: None,
            remote: None,
            peer: None,
            connected: false,
            backlog: None,
            waiting: VecDeque::new(),
            reads_over: false,
            writes_over: false,
            error: None,
            owner,
            peer_owner: Sender::default(),
            options: BTreeMap::new(),
            patience: [None; 2],
        }
    }

    /// Whether it has been told to do something.
    pub(crate) fn is_on(&self, level: u32, name: u32) -> bool {
        let value = self.options.get(&(level, name));
        value.is_some_and(|value| value.iter().any(|byte| *byte != 0))
    }

    pub(crate) fn room(&self) -> usize {
        CAPACITY.saturating_sub(self.queued)
    }

    /// Whether a message of this length can be queued.
    pub(crate) fn takes(&self, len: usize) -> bool {
        match self.kind {
            Kind::Stream => self.room() > 0,
            _ => self.queued == 0 || self.room() >= len + MESSAGE_COST,
        }
    }

    fn cost(&self, len: usize) -> usize {
        match self.kind {
            Kind::Stream => len,
            _ => len + MESSAGE_COST,
        }
    }

    /// Puts a message into the queue.
    pub(crate) fn push(&mut self, message: Message) {
        self.queued += self.cost(message.bytes.len());
        if self.kind == Kind::Stream
            && let Some(last) = self.inbox.back_mut()
            && message.files.is_empty()
            && last.sender == message.sender
            && last.bytes.len() < 4096
        {
            last.bytes.extend(message.bytes);
            return;
        }
        self.inbox.push_back(message);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.inbox.is_empty()
    }

    /// Bytes that one read can get: of all, or of the first message.
    pub(crate) fn available(&self) -> usize {
        let left = |message: &Message| message.bytes.len() - message.taken;
        match self.kind {
            Kind::Stream => self.inbox.iter().map(left).sum(),
            _ => self.inbox.front().map_or(0, left),
        }
    }

    /// What one read gets, which leaves it there if it only looks.
    pub(crate) fn take(&mut self, most: usize, look: bool) -> Option<Taken> {
        let first = self.inbox.front_mut()?;
        let mut taken = Taken {
            whole: first.bytes.len() - first.taken,
            from: first.from.clone(),
            sender: first.sender,
            files: match look {
                true => first.files.clone(),
                false => core::mem::take(&mut first.files),
            },
            bytes: Vec::new(),
        };
        if self.kind != Kind::Stream {
            let len = most.min(first.bytes.len());
            taken.bytes.extend_from_slice(&first.bytes[..len]);
            if !look && let Some(message) = self.inbox.pop_front() {
                self.queued -= self.cost(message.bytes.len());
            }
            return Some(taken);
        }
        for (number, message) in self.inbox.iter_mut().enumerate() {
            // Files come with the first byte that they were sent with, and
            // senders are told apart.
            let other = !message.files.is_empty() || message.sender != taken.sender;
            if number > 0 && other || taken.bytes.len() == most {
                break;
            }
            let rest = &message.bytes[message.taken..];
            let len = rest.len().min(most - taken.bytes.len());
            taken.bytes.extend_from_slice(&rest[..len]);
            if !look {
                message.taken += len;
            }
        }
        if !look {
            self.queued -= taken.bytes.len();
            let done = |message: &Message| message.taken == message.bytes.len();
            while self.inbox.front().is_some_and(done) {
                self.inbox.pop_front();
            }
        }
        Some(taken)
    }

    /// Open files that are in the queue.
    pub(crate) fn files(&self) -> impl Iterator<Item = FileId> {
        let messages = self.inbox.iter();
        messages.flat_map(|message| message.files.iter().copied())
    }

    /// Takes them out.
    pub(crate) fn take_files(&mut self) -> impl Iterator<Item = FileId> {
        let messages = self.inbox.iter_mut();
        messages.flat_map(|message| core::mem::take(&mut message.files))
    }
}

/// What the end of a socket leaves to be done.
#[derive(Debug, Default)]
pub(crate) struct Remains {
    /// To be closed.
    pub(crate) files: Vec<FileId>,
    pub(crate) sockets: Vec<SocketId>,
    /// To be released.
    pub(crate) node: Option<NodeId>,
    /// Whose other end it was.
    pub(crate) peers: Vec<SocketId>,
}

/// All sockets.
#[derive(Debug, Default)]
pub(crate) struct Sockets {
    table: Table<Socket>,
    pub(super) next: Next,
    /// A message may hold a socket: see [`super::flight`].
    pub(crate) fly: bool,
}

impl Sockets {
    pub(crate) fn insert(&mut self, socket: Socket) -> SocketId {
        self.table.insert(socket)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (SocketId, &Socket)> {
        self.table.iter()
    }

    pub(crate) fn get(&self, id: SocketId) -> Result<&Socket> {
        self.table.get(id).ok_or(Errno::EBADF)
    }

    pub(crate) fn get_mut(&mut self, id: SocketId) -> Result<&mut Socket> {
        self.table.get_mut(id).ok_or(Errno::EBADF)
    }

    /// Makes two sockets each other's end.
    pub(crate) fn join(&mut self, one: SocketId, two: SocketId) -> Result<()> {
        for (id, other) in [(one, two), (two, one)] {
            let (remote, owner) = {
                let other = self.get(other)?;
                (other.local.clone(), other.owner)
            };
            let socket = self.get_mut(id)?;
            socket.peer = Some(other);
            socket.connected = true;
            socket.remote = remote;
            socket.peer_owner = owner;
        }
        Ok(())
    }

    /// Ends a socket.
    pub(crate) fn remove(&mut self, id: SocketId) -> Remains {
        let Some(mut socket) = self.table.remove(id) else {
            return Remains::default();
        };
        let unread = !socket.is_empty();
        let peers: Vec<_> = match socket.kind {
            // Any number of them can be meant for one.
            Kind::Datagram => {
                let all = self.table.iter();
                all.filter(|(_, other)| other.peer == Some(id))
                    .map(|(other, _)| other)
                    .collect()
            }
            _ => socket.peer.into_iter().collect(),
        };
        for other in &peers {
            if let Some(peer) = self.table.get_mut(*other) {
                peer.peer = None;
                if peer.kind != Kind::Datagram {
                    peer.reads_over = true;
                    peer.error = unread.then_some(Errno::ECONNRESET).or(peer.error);
                }
            }
        }
        Remains {
            peers,
            node: socket.holds,
            sockets: socket.waiting.iter().copied().collect(),
            files: socket.take_files().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: Sender = Sender {
        pid: 1,
        uid: 0,
        gid: 0,
    };

    fn message(bytes: &[u8], files: &[FileId]) -> Message {
        Message {
            files: files.to_vec(),
            ..Message::new(bytes.to_vec(), ME)
        }
    }

    #[test]
    fn a_stream_is_bytes_and_files_come_where_they_were_sent() {
        let mut socket = Socket::new(Family::Unix, Kind::Stream, ME);
        socket.push(message(b"ab", &[]));
        socket.push(message(b"cd", &[]));
        socket.push(message(b"ef", &[7]));
        assert_eq!(socket.available(), 6);
        assert_eq!(socket.take(3, true).expect("there").bytes, b"abc");
        assert_eq!(socket.take(3, false).expect("there").bytes, b"abc");
        let taken = socket.take(9, false).expect("there");
        assert_eq!((taken.bytes.as_slice(), taken.files.len()), (&b"d"[..], 0));
        let taken = socket.take(1, false).expect("there");
        assert_eq!((taken.bytes.as_slice(), taken.files), (&b"e"[..], vec![7]));
        let taken = socket.take(9, false).expect("there");
        assert_eq!((taken.bytes.as_slice(), taken.files.len()), (&b"f"[..], 0));
        assert!(socket.take(9, false).is_none() && socket.room() == CAPACITY);
    }

    #[test]
    fn datagrams_are_whole_or_cut() {
        let mut socket = Socket::new(Family::Inet, Kind::Datagram, ME);
        socket.push(message(b"hello", &[]));
        socket.push(message(b"", &[]));
        let taken = socket.take(2, false).expect("there");
        assert_eq!((taken.bytes.as_slice(), taken.whole), (&b"he"[..], 5));
        assert_eq!(socket.take(2, false).expect("there").bytes, b"");
        assert!(socket.is_empty() && socket.room() == CAPACITY);
        let mut count = 0;
        while socket.takes(1) {
            socket.push(message(b"x", &[]));
            count += 1;
        }
        assert!((300..500).contains(&count), "{count}");
    }

    #[test]
    fn the_end_of_one_is_seen_by_the_other() {
        let mut sockets = Sockets::default();
        let new = || Socket::new(Family::Unix, Kind::Stream, ME);
        let (one, two) = (sockets.insert(new()), sockets.insert(new()));
        sockets.join(one, two).expect("both are there");
        sockets
            .get_mut(one)
            .expect("there")
            .push(message(b"unread", &[9]));
        let remains = sockets.remove(one);
        assert_eq!((remains.peers, remains.files), (vec![two], vec![9]));
        let two = sockets.get(two).expect("there");
        assert!(two.reads_over && two.peer.is_none());
        assert_eq!(two.error, Some(Errno::ECONNRESET));
    }
}
