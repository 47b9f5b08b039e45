//! Sockets: making, naming and connecting them. There is no network but the
//! loopback interface.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use linux_raw_sys::general::{O_CLOEXEC, O_NONBLOCK, O_RDWR};

use crate::errno::{Errno, Outcome, Result};
use crate::fs::Place;
use crate::fs::names;
use crate::fs::node::Kind as NodeKind;
use crate::fs::walk::{Last, may, right};
use crate::kernel::Kernel;
use crate::mem::index;
use crate::process::files::{FileId, Object, OpenFile};
use crate::streams::socket::{Address, CAPACITY, Family, Kind, Remains, Sender, Socket, SocketId};
use crate::wait::{Key, Tid};

const AF_UNIX: u16 = 1;
const AF_INET: u16 = 2;
const IPPROTO_TCP: u32 = 6;
const IPPROTO_UDP: u32 = 17;
/// The part of a socket's type that is none of its flags, which are `open`'s.
const TYPE: u32 = 0xf;
/// Longest path of an address.
const LONGEST_NAME: usize = 108;
/// Most connections that may wait.
const MOST_WAITING: usize = 4096;
/// What a socket is bound to that is bound to every address.
const ANY: u32 = 0;
pub(super) const LOOPBACK: u32 = 0x7f00_0001;

/// Levels and names of options.
mod option {
    pub(super) const SOCKET: u32 = 1;
    pub(super) const REUSE: u32 = 2;
    pub(super) const TYPE: u32 = 3;
    pub(super) const ERROR: u32 = 4;
    pub(super) const SEND_BUFFER: u32 = 7;
    pub(super) const RECEIVE_BUFFER: u32 = 8;
    pub(super) const PEER: u32 = 17;
    pub(super) const RECEIVE_TIME: u32 = 20;
    pub(super) const SEND_TIME: u32 = 21;
    pub(super) const LISTENS: u32 = 30;
    pub(super) const PROTOCOL: u32 = 38;
    pub(super) const DOMAIN: u32 = 39;
    /// Those that are remembered and change nothing here.
    pub(super) fn is_remembered(level: u32, name: u32) -> bool {
        match level {
            SOCKET => matches!(name, 2 | 5..=10 | 12 | 13 | 15 | 16 | 18 | 19 | 29 | 35),
            0 => matches!(name, 1..=4 | 8 | 10..=13 | 32..=34),
            6 => matches!(name, 1..=6 | 8..=10 | 12 | 18 | 23),
            _ => false,
        }
    }
}

fn is_local(ip: u32) -> bool {
    ip == ANY || ip >> 24 == 127
}

impl Kernel {
    fn sender(&mut self, tid: Tid) -> Sender {
        let pid = self.pid_of(tid);
        let owner = &self.process_of(tid).owner;
        Sender {
            pid,
            uid: owner.user.effective,
            gid: owner.group.effective,
        }
    }

    /// Who sends for a thread.
    pub(super) fn sender_of(&mut self, tid: Tid) -> Sender {
        self.sender(tid)
    }

    fn new_socket(&mut self, tid: Tid, domain: u32, kind: u32, protocol: u32) -> Result<Socket> {
        let family = match u16::try_from(domain) {
            Ok(AF_UNIX) => Family::Unix,
            Ok(AF_INET) => Family::Inet,
            _ => return Err(Errno::EAFNOSUPPORT),
        };
        if kind & !(TYPE | O_CLOEXEC | O_NONBLOCK) != 0 {
            return Err(Errno::EINVAL);
        }
        let kind = match (kind & TYPE, family) {
            (1, _) => Kind::Stream,
            (2, _) => Kind::Datagram,
            (5, Family::Unix) => Kind::Packets,
            _ => return Err(Errno::ESOCKTNOSUPPORT),
        };
        let own = match (family, kind) {
            (Family::Unix, _) => 1,
            (_, Kind::Stream) => IPPROTO_TCP,
            _ => IPPROTO_UDP,
        };
        if ![0, own].contains(&protocol) {
            return Err(Errno::EPROTONOSUPPORT);
        }
        self.check_memory()?;
        let owner = self.sender(tid);
        Ok(Socket::new(family, kind, owner))
    }

    fn socket_file(id: SocketId, kind: u32) -> OpenFile {
        OpenFile::new(Object::Socket(id), None, O_RDWR | kind & O_NONBLOCK)
    }

    pub(crate) fn socket(&mut self, tid: Tid, domain: u32, kind: u32, protocol: u32) -> Outcome {
        let socket = self.new_socket(tid, domain, kind, protocol)?;
        let id = self.sockets.insert(socket);
        Ok(self
            .add_file(tid, Self::socket_file(id, kind), kind)?
            .into())
    }

    pub(crate) fn socketpair(
        &mut self,
        tid: Tid,
        domain: u32,
        kind: u32,
        protocol: u32,
        address: u64,
    ) -> Outcome {
        let mut end = || self.new_socket(tid, domain, kind, protocol);
        let (one, two) = (end()?, end()?);
        if one.family != Family::Unix {
            return Err(Errno::EOPNOTSUPP.into());
        }
        let (one, two) = (self.sockets.insert(one), self.sockets.insert(two));
        self.sockets.join(one, two)?;
        let (first, second) = (Self::socket_file(one, kind), Self::socket_file(two, kind));
        self.add_pair(tid, address, first, second, kind & O_CLOEXEC)
    }

    /// The socket behind a descriptor.
    pub(super) fn socket_at(&mut self, tid: Tid, number: u32) -> Result<(FileId, SocketId)> {
        let id = self.file_id(tid, number)?;
        match self.file(id).object {
            Object::Socket(socket) => Ok((id, socket)),
            _ => Err(Errno::ENOTSOCK),
        }
    }

    /// Ends a socket that nobody has open any more.
    pub(crate) fn close_socket(&mut self, id: SocketId) {
        let Remains {
            files,
            sockets,
            node,
            peers,
        } = self.sockets.remove(id);
        self.wake(Key::Socket(id));
        for peer in peers {
            self.wake(Key::Socket(peer));
        }
        for file in files {
            self.release_file(file);
        }
        for socket in sockets {
            self.close_socket(socket);
        }
        if let Some(node) = node {
            self.objects.release(node);
        }
    }

    /// An address in a program's memory, which must be one of `family`.
    /// A name of a file that must exist is looked up.
    pub(super) fn read_address(
        &mut self,
        tid: Tid,
        family: Family,
        address: u64,
        len: u32,
    ) -> Result<Wanted> {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if !(2..=128).contains(&len) {
            return Err(Errno::EINVAL);
        }
        let bytes = self.bytes(tid, address, len)?;
        let own = match family {
            Family::Unix => AF_UNIX,
            Family::Inet => AF_INET,
        };
        parse_address(own, &bytes)
    }

    /// The name of the file at a path, for who wants to send there.
    pub(super) fn find_name(&mut self, tid: Tid, wanted: Wanted) -> Result<Address> {
        match wanted {
            Wanted::Name(name) => Ok(name),
            Wanted::Unnamed => Err(Errno::EINVAL),
            Wanted::Path(path) => {
                let slot = self.resolve(tid, &path, Last::Follow)?;
                let Place::Node(node) = slot.found.ok_or(Errno::ENOENT)? else {
                    return Err(Errno::ECONNREFUSED);
                };
                let viewer = self.viewer(tid);
                if !may(&self.objects, node, &viewer, right::WRITE) {
                    return Err(Errno::EACCES);
                }
                match self.objects.node(node).kind {
                    NodeKind::Socket => Ok(Address::Path(node, path.into())),
                    _ => Err(Errno::ECONNREFUSED),
                }
            }
        }
    }

    pub(crate) fn bind(&mut self, tid: Tid, number: u32, address: u64, len: u32) -> Outcome {
        let (_, id) = self.socket_at(tid, number)?;
        let socket = self.sockets.get(id)?;
        let (family, kind) = (socket.family, socket.kind);
        let bound = socket.local.is_some();
        let shares = socket.options.get(&(option::SOCKET, option::REUSE));
        let shares = shares.is_some_and(|value| value.iter().any(|byte| *byte != 0));
        let wanted = self.read_address(tid, family, address, len)?;
        if bound {
            return Err(Errno::EINVAL.into());
        }
        let (name, node) = match wanted {
            Wanted::Unnamed => (self.sockets.free_name(), None),
            Wanted::Path(path) => {
                let slot = self.resolve(tid, &path, Last::Keep)?;
                if slot.found.is_some() {
                    return Err(Errno::EADDRINUSE.into());
                }
                let (viewer, maker) = (self.viewer(tid), self.maker(tid));
                let mode = 0o777 & !self.process_of(tid).umask;
                let kind = NodeKind::Socket;
                names::create(&mut self.objects, &slot, &viewer, kind, mode, maker)?;
                let made = self.resolve(tid, &path, Last::Keep)?.found;
                let Some(Place::Node(node)) = made else {
                    return Err(Errno::EIO.into());
                };
                self.objects.hold(node);
                (Address::Path(node, path.into()), Some(node))
            }
            Wanted::Name(Address::Inet(ip, port)) => {
                if !is_local(ip) {
                    return Err(Errno::EADDRNOTAVAIL.into());
                }
                if (1..1024).contains(&port) && !self.process_of(tid).owner.is_privileged() {
                    return Err(Errno::EACCES.into());
                }
                let port = match port {
                    0 => self.sockets.free_port(kind, ip)?,
                    port => port,
                };
                (Address::Inet(ip, port), None)
            }
            Wanted::Name(name) => (name, None),
        };
        if self.sockets.is_taken(kind, &name, shares) {
            return Err(Errno::EADDRINUSE.into());
        }
        let socket = self.sockets.get_mut(id)?;
        (socket.local, socket.holds) = (Some(name), node);
        Ok(0)
    }

    /// Gives an IPv4 socket without a name one.
    pub(super) fn name_inet(&mut self, id: SocketId, ip: u32) -> Result<()> {
        let socket = self.sockets.get(id)?;
        let kind = socket.kind;
        if socket.family == Family::Inet && socket.local.is_none() {
            let port = self.sockets.free_port(kind, ip)?;
            self.sockets.get_mut(id)?.local = Some(Address::Inet(ip, port));
        }
        Ok(())
    }

    pub(crate) fn listen(&mut self, tid: Tid, number: u32, backlog: u32) -> Outcome {
        let (_, id) = self.socket_at(tid, number)?;
        self.name_inet(id, ANY)?;
        let owner = self.sender(tid);
        let socket = self.sockets.get_mut(id)?;
        if socket.kind == Kind::Datagram {
            return Err(Errno::EOPNOTSUPP.into());
        }
        if socket.connected || socket.local.is_none() {
            return Err(Errno::EINVAL.into());
        }
        let backlog = usize::try_from(backlog).unwrap_or(usize::MAX);
        socket.backlog = Some(backlog.min(MOST_WAITING));
        socket.owner = owner;
        Ok(0)
    }

    pub(crate) fn accept(
        &mut self,
        tid: Tid,
        number: u32,
        address: u64,
        len: u64,
        flags: u32,
    ) -> Outcome {
        let (file, id) = self.socket_at(tid, number)?;
        if flags & !(O_CLOEXEC | O_NONBLOCK) != 0 {
            return Err(Errno::EINVAL.into());
        }
        let socket = self.sockets.get_mut(id)?;
        if socket.kind == Kind::Datagram {
            return Err(Errno::EOPNOTSUPP.into());
        }
        if socket.backlog.is_none() {
            return Err(Errno::EINVAL.into());
        }
        let patience = socket.patience[0];
        let Some(new) = socket.waiting.pop_front() else {
            return self.wait_at_socket(tid, file, id, patience);
        };
        // Whoever waits to connect has room now.
        self.wake(Key::Socket(id));
        let remote = self.sockets.get(new)?.remote.clone();
        let family = self.sockets.get(new)?.family;
        let number = self.add_file(tid, Self::socket_file(new, flags), flags)?;
        if address != 0
            && let Err(errno) = self.put_address(tid, family, remote.as_ref(), address, len)
        {
            let _ = self.close(tid, number);
            return Err(errno.into());
        }
        Ok(number.into())
    }

    /// Waits for something to happen to a socket, as long as it may.
    pub(super) fn wait_at_socket(
        &mut self,
        tid: Tid,
        file: FileId,
        id: SocketId,
        patience: Option<u64>,
    ) -> Outcome {
        if self.file(file).is_nonblocking() {
            return Err(Errno::EAGAIN.into());
        }
        let deadline = self.deadline(tid, patience);
        if deadline.is_some_and(|at| at <= self.now()) {
            return Err(Errno::EAGAIN.into());
        }
        Err(self.block(tid, &[Key::Socket(id)], deadline))
    }

    pub(crate) fn connect(&mut self, tid: Tid, number: u32, address: u64, len: u32) -> Outcome {
        let (file, id) = self.socket_at(tid, number)?;
        let socket = self.sockets.get(id)?;
        let (family, kind) = (socket.family, socket.kind);
        let patience = socket.patience[1];
        if kind == Kind::Datagram {
            let family_word: u16 = self.get(tid, address)?;
            if family_word == 0 {
                let socket = self.sockets.get_mut(id)?;
                (socket.remote, socket.peer, socket.connected) = (None, None, false);
                return Ok(0);
            }
        }
        let wanted = self.read_address(tid, family, address, len)?;
        let socket = self.sockets.get_mut(id)?;
        if socket.backlog.is_some() {
            return Err(Errno::EINVAL.into());
        }
        if let Some(errno) = socket.error.take() {
            return Err(errno.into());
        }
        if kind != Kind::Datagram && socket.connected {
            // A connection that was still being made is told of once.
            return match socket.options.remove(&IN_PROGRESS) {
                Some(_) => Ok(0),
                None => Err(Errno::EISCONN.into()),
            };
        }
        let mut name = self.find_name(tid, wanted)?;
        if let Address::Inet(ip, port) = &mut name {
            if *ip == ANY {
                *ip = LOOPBACK;
            }
            if !is_local(*ip) {
                return Err(Errno::ENETUNREACH.into());
            }
            let ip = *ip;
            if *port == 0 && kind == Kind::Stream {
                return Err(Errno::ECONNREFUSED.into());
            }
            self.name_inet(id, ip)?;
            if let Some(Address::Inet(own, _)) = &mut self.sockets.get_mut(id)?.local
                && *own == ANY
            {
                *own = ip;
            }
        }
        let target = self.sockets.find(kind, &name);
        if kind == Kind::Datagram {
            if family == Family::Unix && target.is_none() {
                return Err(Errno::ECONNREFUSED.into());
            }
            let socket = self.sockets.get_mut(id)?;
            (socket.remote, socket.peer, socket.connected) = (Some(name), target, true);
            return Ok(0);
        }
        let later = family == Family::Inet && self.file(file).is_nonblocking();
        let Some(target) = target else {
            if later {
                let socket = self.sockets.get_mut(id)?;
                socket.error = Some(Errno::ECONNREFUSED);
                self.wake(Key::Socket(id));
                return Err(Errno::EINPROGRESS.into());
            }
            return Err(Errno::ECONNREFUSED.into());
        };
        let listener = self.sockets.get(target)?;
        if listener.waiting.len() > listener.backlog.unwrap_or(0) {
            return self.wait_at_socket(tid, file, target, patience);
        }
        let mut end = Socket::new(family, kind, listener.owner);
        end.local = match family {
            Family::Inet => Some(name),
            Family::Unix => listener.local.clone(),
        };
        let owner = self.sender(tid);
        self.sockets.get_mut(id)?.owner = owner;
        let end = self.sockets.insert(end);
        self.sockets.join(id, end)?;
        self.sockets.get_mut(target)?.waiting.push_back(end);
        self.wake(Key::Socket(target));
        self.wake(Key::Socket(id));
        if later {
            let socket = self.sockets.get_mut(id)?;
            socket.options.insert(IN_PROGRESS, Box::default());
            return Err(Errno::EINPROGRESS.into());
        }
        Ok(0)
    }

    pub(crate) fn shutdown(&mut self, tid: Tid, number: u32, how: u32) -> Outcome {
        let (_, id) = self.socket_at(tid, number)?;
        if how > 2 {
            return Err(Errno::EINVAL.into());
        }
        let socket = self.sockets.get_mut(id)?;
        if !socket.connected && socket.backlog.is_none() {
            return Err(Errno::ENOTCONN.into());
        }
        let (peer, pair) = (socket.peer, socket.kind != Kind::Datagram);
        socket.reads_over |= how != 1;
        socket.writes_over |= how != 0;
        if how != 1 {
            socket.backlog = None;
        }
        if let Some(peer) = peer.filter(|_| pair) {
            let other = self.sockets.get_mut(peer)?;
            other.reads_over |= how != 0;
            self.wake(Key::Socket(peer));
        }
        self.wake(Key::Socket(id));
        Ok(0)
    }

    /// `getsockname`, and `getpeername` if `remote`.
    pub(crate) fn socket_name(
        &mut self,
        tid: Tid,
        number: u32,
        address: u64,
        len: u64,
        remote: bool,
    ) -> Outcome {
        let (_, id) = self.socket_at(tid, number)?;
        let socket = self.sockets.get(id)?;
        let family = socket.family;
        let gone = socket.kind != Kind::Datagram && socket.peer.is_none();
        if remote && (!socket.connected || gone) {
            return Err(Errno::ENOTCONN.into());
        }
        let name = if remote {
            socket.remote.clone()
        } else {
            socket.local.clone()
        };
        self.put_address(tid, family, name.as_ref(), address, len)?;
        Ok(0)
    }

    /// Stores a name and its length where there is so much room for it.
    pub(super) fn put_address(
        &mut self,
        tid: Tid,
        family: Family,
        name: Option<&Address>,
        address: u64,
        len: u64,
    ) -> Result<()> {
        let room: i32 = self.get(tid, len)?;
        let room = usize::try_from(room).map_err(|_| Errno::EINVAL)?;
        let bytes = address_bytes(family, name);
        self.write_user(tid, address, &bytes[..bytes.len().min(room)])?;
        self.put(tid, len, &super::low(bytes.len() as u64))
    }

    pub(crate) fn setsockopt(&mut self, tid: Tid, a: [u64; 6]) -> Outcome {
        let (_, id) = self.socket_at(tid, super::low(a[0]))?;
        let (level, name, len) = (super::low(a[1]), super::low(a[2]), super::low(a[4]));
        if super::signed(a[4]) < 0 {
            return Err(Errno::EINVAL.into());
        }
        let bytes = self.bytes(tid, a[3], index(u64::from(len.min(16))))?;
        match (level, name) {
            (option::SOCKET, option::RECEIVE_TIME | option::SEND_TIME) => {
                if bytes.len() < 16 {
                    return Err(Errno::EINVAL.into());
                }
                let [seconds, us]: [u64; 2] = self.get(tid, a[3])?;
                if us >= 1_000_000 {
                    // EDOM.
                    return Err(Errno(33).into());
                }
                let time = seconds
                    .saturating_mul(1_000_000_000)
                    .saturating_add(us * 1000);
                let which = usize::from(name == option::SEND_TIME);
                self.sockets.get_mut(id)?.patience[which] = (time > 0).then_some(time);
            }
            _ if option::is_remembered(level, name) => {
                if bytes.is_empty() || level == option::SOCKET && bytes.len() < 4 {
                    return Err(Errno::EINVAL.into());
                }
                let socket = self.sockets.get_mut(id)?;
                socket.options.insert((level, name), bytes.into());
            }
            _ => return Err(Errno::ENOPROTOOPT.into()),
        }
        Ok(0)
    }

    pub(crate) fn getsockopt(&mut self, tid: Tid, a: [u64; 6]) -> Outcome {
        let (_, id) = self.socket_at(tid, super::low(a[0]))?;
        let (level, name) = (super::low(a[1]), super::low(a[2]));
        let room: i32 = self.get(tid, a[4])?;
        let room = usize::try_from(room).map_err(|_| Errno::EINVAL)?;
        let socket = self.sockets.get_mut(id)?;
        let word = |value: u32| value.to_le_bytes().to_vec();
        let bytes = match (level, name) {
            (option::SOCKET, option::TYPE) => word(match socket.kind {
                Kind::Stream => 1,
                Kind::Datagram => 2,
                Kind::Packets => 5,
            }),
            (option::SOCKET, option::ERROR) => word(socket.error.take().map_or(0, |errno| errno.0)),
            (option::SOCKET, option::LISTENS) => word(socket.backlog.is_some().into()),
            (option::SOCKET, option::DOMAIN) => word(match socket.family {
                Family::Unix => AF_UNIX.into(),
                Family::Inet => AF_INET.into(),
            }),
            (option::SOCKET, option::PROTOCOL) => word(match (socket.family, socket.kind) {
                (Family::Unix, _) => 0,
                (_, Kind::Stream) => IPPROTO_TCP,
                _ => IPPROTO_UDP,
            }),
            (option::SOCKET, option::PEER) => {
                let peer = match socket.connected {
                    true => socket.peer_owner,
                    false => return Err(Errno::ENOTCONN.into()),
                };
                [peer.pid, peer.uid, peer.gid]
                    .into_iter()
                    .flat_map(u32::to_le_bytes)
                    .collect()
            }
            (option::SOCKET, option::RECEIVE_TIME | option::SEND_TIME) => {
                let which = usize::from(name == option::SEND_TIME);
                let time = socket.patience[which].unwrap_or(0);
                let words = [time / 1_000_000_000, time % 1_000_000_000 / 1000];
                words.into_iter().flat_map(u64::to_le_bytes).collect()
            }
            _ if option::is_remembered(level, name) => {
                match (level, name, socket.options.get(&(level, name))) {
                    // Linux doubles what is asked for, for its own needs.
                    (option::SOCKET, option::SEND_BUFFER | option::RECEIVE_BUFFER, Some(value)) => {
                        let value = value
                            .first_chunk()
                            .map_or(0, |value| u32::from_le_bytes(*value));
                        word(value.saturating_mul(2).max(4608))
                    }
                    (option::SOCKET, option::SEND_BUFFER | option::RECEIVE_BUFFER, None) => {
                        word(u32::try_from(CAPACITY).unwrap_or(u32::MAX))
                    }
                    (option::SOCKET, 13, None) => vec![0; 8],
                    (6, 2, None) => word(536),
                    (_, _, Some(value)) => value.to_vec(),
                    (_, _, None) => word(0),
                }
            }
            _ => return Err(Errno::ENOPROTOOPT.into()),
        };
        let len = bytes.len().min(room);
        self.write_user(tid, a[3], &bytes[..len])?;
        self.put(tid, a[4], &super::low(len as u64))?;
        Ok(0)
    }
}

/// Marks a connection that its maker has not been told of.
const IN_PROGRESS: (u32, u32) = (u32::MAX, 0);

/// What an address in a program's memory says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    Name(Address),
    /// A file, still to be looked up.
    Path(Vec<u8>),
    /// Of the right family, and nothing more.
    Unnamed,
}

fn parse_address(family: u16, bytes: &[u8]) -> Result<Wanted> {
    let (head, rest) = bytes.split_first_chunk().ok_or(Errno::EINVAL)?;
    if u16::from_le_bytes(*head) != family {
        return Err(Errno::EAFNOSUPPORT);
    }
    if family == AF_INET {
        let (port, rest) = rest.split_first_chunk().ok_or(Errno::EINVAL)?;
        let ip = rest.first_chunk().ok_or(Errno::EINVAL)?;
        if bytes.len() < 16 {
            return Err(Errno::EINVAL);
        }
        let name = Address::Inet(u32::from_be_bytes(*ip), u16::from_be_bytes(*port));
        return Ok(Wanted::Name(name));
    }
    if rest.len() > LONGEST_NAME {
        return Err(Errno::EINVAL);
    }
    Ok(match rest.first() {
        None => Wanted::Unnamed,
        Some(0) => Wanted::Name(Address::Abstract(rest[1..].into())),
        Some(_) => {
            let path = rest.split(|byte| *byte == 0).next().unwrap_or_default();
            Wanted::Path(path.to_vec())
        }
    })
}

/// A name as programs see it.
pub(super) fn address_bytes(family: Family, name: Option<&Address>) -> Vec<u8> {
    let head = |family: u16| family.to_le_bytes().to_vec();
    match (family, name) {
        (Family::Inet, name) => {
            let (ip, port) = match name {
                Some(Address::Inet(ip, port)) => (*ip, *port),
                _ => (ANY, 0),
            };
            let mut bytes = head(AF_INET);
            bytes.extend(port.to_be_bytes());
            bytes.extend(ip.to_be_bytes());
            bytes.extend([0; 8]);
            bytes
        }
        (Family::Unix, name) => {
            let mut bytes = head(AF_UNIX);
            match name {
                Some(Address::Path(_, path)) => {
                    bytes.extend_from_slice(path);
                    bytes.push(0);
                }
                Some(Address::Abstract(name)) => {
                    bytes.push(0);
                    bytes.extend_from_slice(name);
                }
                _ => {}
            }
            bytes
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        let inet = Address::Inet(LOOPBACK, 8080);
        let bytes = address_bytes(Family::Inet, Some(&inet));
        assert_eq!(bytes[..8], [2, 0, 0x1f, 0x90, 127, 0, 0, 1]);
        assert_eq!(parse_address(AF_INET, &bytes), Ok(Wanted::Name(inet)));
        let hidden = Address::Abstract(Box::from(&b"a\0b"[..]));
        let bytes = address_bytes(Family::Unix, Some(&hidden));
        assert_eq!(parse_address(AF_UNIX, &bytes), Ok(Wanted::Name(hidden)));
        let path = Address::Path(3, Box::from(&b"/run/x"[..]));
        let bytes = address_bytes(Family::Unix, Some(&path));
        assert_eq!(
            parse_address(AF_UNIX, &bytes),
            Ok(Wanted::Path(b"/run/x".to_vec()))
        );
        assert_eq!(parse_address(AF_UNIX, &[1, 0]), Ok(Wanted::Unnamed));
        assert_eq!(parse_address(AF_UNIX, &[1]), Err(Errno::EINVAL));
        assert_eq!(parse_address(AF_UNIX, &[2, 0, 0]), Err(Errno::EAFNOSUPPORT));
        assert_eq!(
            parse_address(AF_INET, &[2, 0, 0, 1, 127, 0]),
            Err(Errno::EINVAL)
        );
        assert_eq!(parse_address(AF_UNIX, &[1; 120]), Err(Errno::EAFNOSUPPORT));
    }
}
