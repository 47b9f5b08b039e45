//! Sockets: making, naming and connecting them. There is no network but the
//! loopback interface.

mod addresses;
mod control;
mod options;
mod receiving;
mod sending;

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::net::IpAddr;

use linux_raw_sys::general::{O_CLOEXEC, O_NONBLOCK, O_RDWR};

use addresses::Wanted;

use crate::errno::{Errno, Outcome, Result};
use crate::fs::Place;
use crate::fs::names;
use crate::fs::node::Kind as NodeKind;
use crate::fs::walk::Last;
use crate::kernel::Kernel;
use crate::process::files::{FileId, Object, OpenFile};
use crate::streams::address::{Address, Family, Kind, reached};
use crate::streams::socket::{Remains, Sender, Socket, SocketId};
use crate::wait::{Key, Tid};

const AF_UNIX: u16 = 1;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
const IPPROTO_TCP: u32 = 6;
const IPPROTO_UDP: u32 = 17;
/// The part of a socket's type that is none of its flags, which are `open`'s.
const TYPE: u32 = 0xf;
/// Most connections that may wait.
const MOST_WAITING: usize = 4096;
/// Flags of messages.
const MSG_OOB: u32 = 1;
const MSG_DONTWAIT: u32 = 0x40;

impl Kernel {
    /// Who sends for a thread.
    fn sender(&mut self, tid: Tid) -> Sender {
        let pid = self.pid_of(tid);
        let owner = &self.process_of(tid).owner;
        Sender {
            pid,
            uid: owner.user.effective,
            gid: owner.group.effective,
        }
    }

    fn new_socket(&mut self, tid: Tid, domain: u32, kind: u32, protocol: u32) -> Result<Socket> {
        let family = match u16::try_from(domain) {
            Ok(AF_UNIX) => Family::Unix,
            Ok(AF_INET) => Family::Inet,
            Ok(AF_INET6) => Family::Inet6,
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

    /// Ends a socket that nobody has open any more; the open files that were
    /// on their way to it are to be released.
    pub(crate) fn close_socket(&mut self, id: SocketId) -> Vec<FileId> {
        let Remains {
            mut files,
            sockets,
            node,
            peers,
        } = self.sockets.remove(id);
        self.wake(Key::Socket(id));
        for peer in peers {
            self.wake(Key::Socket(peer));
        }
        // Nobody waits at one that was never accepted.
        for socket in sockets {
            files.extend(self.close_socket(socket));
        }
        if let Some(node) = node {
            self.objects.release(node);
        }
        files
    }

    pub(crate) fn bind(&mut self, tid: Tid, number: u32, address: u64, len: u32) -> Outcome {
        let (_, id) = self.socket_at(tid, number)?;
        let socket = self.sockets.get(id)?;
        let family = socket.family;
        let (bound, only_six) = (socket.local.is_some(), socket.is_only_six());
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
                if !ip.is_unspecified() && !ip.is_loopback() {
                    return Err(Errno::EADDRNOTAVAIL.into());
                }
                if ip.is_ipv4() && only_six {
                    return Err(Errno::EINVAL.into());
                }
                if (1..1024).contains(&port) && !self.process_of(tid).owner.is_privileged() {
                    return Err(Errno::EACCES.into());
                }
                let port = match port {
                    0 => self.sockets.free_port(id, ip)?,
                    port => port,
                };
                (Address::Inet(ip, port), None)
            }
            Wanted::Name(name) => (name, None),
        };
        if self.sockets.is_taken(self.sockets.get(id)?, &name) {
            return Err(Errno::EADDRINUSE.into());
        }
        let socket = self.sockets.get_mut(id)?;
        (socket.local, socket.holds) = (Some(name), node);
        Ok(0)
    }

    /// Gives a socket of IP without a name one at an address of this machine,
    /// by default at all.
    fn name_inet(&mut self, id: SocketId, ip: Option<IpAddr>) -> Result<()> {
        let socket = self.sockets.get(id)?;
        if socket.family != Family::Unix && socket.local.is_none() {
            let ip = ip.unwrap_or(socket.family.any());
            let port = self.sockets.free_port(id, ip)?;
            self.sockets.get_mut(id)?.local = Some(Address::Inet(ip, port));
        }
        Ok(())
    }

    pub(crate) fn listen(&mut self, tid: Tid, number: u32, backlog: u32) -> Outcome {
        let (_, id) = self.socket_at(tid, number)?;
        self.name_inet(id, None)?;
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
    fn wait_at_socket(
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

    /// The same, unless this call alone must not.
    fn wait_unless(
        &mut self,
        tid: Tid,
        file: FileId,
        id: SocketId,
        patience: Option<u64>,
        flags: u32,
    ) -> Outcome {
        match flags & MSG_DONTWAIT {
            0 => self.wait_at_socket(tid, file, id, patience),
            _ => Err(Errno::EAGAIN.into()),
        }
    }

    pub(crate) fn connect(&mut self, tid: Tid, number: u32, address: u64, len: u32) -> Outcome {
        let (file, id) = self.socket_at(tid, number)?;
        let socket = self.sockets.get(id)?;
        let (family, kind) = (socket.family, socket.kind);
        let (patience, only_six) = (socket.patience[1], socket.is_only_six());
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
            *ip = reached(*ip);
            let ip = *ip;
            if !ip.is_loopback() || ip.is_ipv4() && only_six {
                return Err(Errno::ENETUNREACH.into());
            }
            if *port == 0 && kind == Kind::Stream {
                return Err(Errno::ECONNREFUSED.into());
            }
            self.name_inet(id, Some(ip))?;
            if let Some(Address::Inet(own, _)) = &mut self.sockets.get_mut(id)?.local {
                if own.is_unspecified() {
                    *own = ip;
                } else if own.is_ipv4() != ip.is_ipv4() {
                    return Err(Errno::ENETUNREACH.into());
                }
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
        let later = family != Family::Unix && self.file(file).is_nonblocking();
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
        let mut end = Socket::new(listener.family, kind, listener.owner);
        end.local = match family {
            Family::Unix => listener.local.clone(),
            _ => Some(name),
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
}

/// Reads bytes as all that a program passes for a socket.
#[cfg(any(test, fuzzing))]
pub(crate) fn read_anything(bytes: &[u8]) {
    addresses::read_anything(bytes);
    control::read_anything(bytes);
}

/// Marks a connection that its maker has not been told of.
const IN_PROGRESS: (u32, u32) = (u32::MAX, 0);

#[cfg(test)]
mod tests {
    use super::read_anything;

    #[test]
    fn whatever_a_program_passes_is_read_or_refused() {
        let mut random = crate::testing::random();
        for _ in 0..20_000 {
            let words = (0..random() % 16).map(|_| match random() % 4 {
                0 => random(),
                1 => 1,
                2 => 1 << 32 | 1,
                _ => random() % 128,
            });
            let mut bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
            bytes.truncate(
                bytes
                    .len()
                    .saturating_sub((random() % 8).try_into().expect("small")),
            );
            read_anything(&bytes);
        }
    }
}
