//! Sending over sockets.

use alloc::vec::Vec;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use linux_raw_sys::general::SIGPIPE;

use super::super::low;
use super::super::moves::Moved;
use super::control::Header;
use super::{MSG_DONTWAIT, MSG_OOB};
use crate::errno::{Errno, Outcome, Result, Stop};
use crate::kernel::Kernel;
use crate::mem::index;
use crate::process::files::FileId;
use crate::process::signal::Info;
use crate::streams::address::{Address, Family, Kind, reached};
use crate::streams::socket::{CAPACITY, Message, Socket, SocketId};
use crate::wait::{Key, Tid};

const MSG_NOSIGNAL: u32 = 0x4000;
/// Bytes that are copied at a time.
const CHUNK: u64 = 64 << 10;
/// What a call is to send.
#[derive(Clone, Copy)]
struct Sent<'a> {
    /// Pieces of memory: addresses and lengths.
    pieces: &'a [(u64, u64)],
    flags: u32,
    /// Where the receiver's address is, and its length.
    to: Option<(u64, u32)>,
    files: &'a [FileId],
}

impl Sent<'_> {
    /// Bytes in all.
    fn total(&self) -> u64 {
        self.pieces.iter().map(|(_, len)| len).sum()
    }
}

impl Kernel {
    pub(crate) fn sendto(&mut self, tid: Tid, a: [u64; 6]) -> Outcome {
        let (file, id) = self.socket_at(tid, low(a[0]))?;
        let to = match a[4] {
            0 => None,
            address => Some((address, low(a[5]))),
        };
        let pieces = [(a[1], a[2].min(crate::user::MOST_BYTES))];
        let sent = Sent {
            pieces: &pieces,
            flags: low(a[3]),
            to,
            files: &[],
        };
        self.send(tid, file, id, sent)
    }

    pub(crate) fn sendmsg(&mut self, tid: Tid, number: u32, address: u64, flags: u32) -> Outcome {
        let (file, id) = self.socket_at(tid, number)?;
        let header: Header = self.get(tid, address)?;
        let pieces = self.pieces(tid, header.pieces, header.count)?;
        let to = (header.name != 0 && low(header.name_len) != 0)
            .then(|| (header.name, low(header.name_len)));
        let files = self.control_files(tid, &header)?;
        let sent = Sent {
            pieces: &pieces,
            flags,
            to,
            files: &files,
        };
        self.send(tid, file, id, sent)
    }

    /// Writing to a socket.
    pub(in crate::calls) fn write_socket(
        &mut self,
        tid: Tid,
        file: FileId,
        id: SocketId,
        pieces: &[(u64, u64)],
    ) -> Outcome {
        let sent = Sent {
            pieces,
            flags: 0,
            to: None,
            files: &[],
        };
        self.send(tid, file, id, sent)
    }

    fn send(&mut self, tid: Tid, file: FileId, id: SocketId, sent: Sent<'_>) -> Outcome {
        let Sent {
            pieces,
            flags,
            to,
            files,
        } = sent;
        if flags & MSG_OOB != 0 {
            return Err(Errno::EOPNOTSUPP.into());
        }
        let socket = self.sockets.get_mut(id)?;
        if let Some(errno) = socket.error.take() {
            return Err(errno.into());
        }
        let (family, kind) = (socket.family, socket.kind);
        if !files.is_empty() && family != Family::Unix {
            return Err(Errno::EINVAL.into());
        }
        if kind == Kind::Datagram {
            return self.send_datagram(tid, file, id, sent);
        }
        if to.is_some() && family == Family::Unix {
            let connected = socket.connected;
            return Err(if connected {
                Errno::EISCONN
            } else {
                Errno::EOPNOTSUPP
            }
            .into());
        }
        let total = sent.total();
        let mut done = self.thread(tid).call.map_or(0, |call| call.done);
        let sender = self.sender(tid);
        loop {
            let socket = self.sockets.get(id)?;
            if !socket.connected {
                return Err(match family {
                    Family::Unix => Errno::ENOTCONN,
                    _ => self.broken_pipe(tid, flags),
                }
                .into());
            }
            let (peer, patience) = (socket.peer, socket.patience[1]);
            let over = socket.writes_over;
            let open = peer.filter(|_| !over).and_then(|peer| {
                let other = self.sockets.get(peer).ok()?;
                let wants = family != Family::Unix || !other.reads_over;
                wants.then(|| (peer, other.room(), other.takes(index(total.min(CHUNK)))))
            });
            let Some((peer, room, takes)) = open else {
                return match done {
                    0 => Err(self.broken_pipe(tid, flags).into()),
                    done => Ok(done),
                };
            };
            if done >= total && (total > 0 || kind == Kind::Stream) {
                return Ok(done);
            }
            if kind == Kind::Packets && total > CAPACITY as u64 {
                return Err(Errno::EMSGSIZE.into());
            }
            if !takes {
                let waits = flags & MSG_DONTWAIT == 0 && !self.file(file).is_nonblocking();
                if !waits && done > 0 {
                    return Ok(done);
                }
                return self.wait_unless(tid, file, id, patience, flags);
            }
            let len = match kind {
                Kind::Stream => (total - done).min(room as u64).min(CHUNK),
                _ => total,
            };
            let bytes = match self.gather(tid, pieces, done, index(len)) {
                Ok(bytes) => bytes,
                Err(_) if done > 0 => return Ok(done),
                Err(errno) => return Err(errno.into()),
            };
            let mut message = Message::new(bytes, sender);
            if done == 0 {
                message.files = self.hold_all(files);
            }
            self.sockets.get_mut(peer)?.push(message);
            self.wake(Key::Socket(peer));
            done += len;
            if kind == Kind::Packets {
                return Ok(done);
            }
            if let Some(call) = &mut self.thread(tid).call {
                call.done = done;
            }
        }
    }

    /// Queues bytes that are no program's at a stream's other end.
    pub(in crate::calls) fn feed_socket(
        &mut self,
        tid: Tid,
        id: SocketId,
        from: &[u8],
    ) -> Result<Moved, Stop> {
        let socket = self.sockets.get_mut(id)?;
        if let Some(errno) = socket.error.take() {
            return Err(errno.into());
        }
        if socket.kind != Kind::Stream {
            return Err(Errno::EINVAL.into());
        }
        if !socket.connected && socket.family == Family::Unix {
            return Err(Errno::ENOTCONN.into());
        }
        let open = socket.connected && !socket.writes_over;
        let tells = socket.family == Family::Unix;
        let peer = socket.peer.filter(|_| open);
        let other = peer.and_then(|peer| self.sockets.get(peer).ok());
        let room = other.filter(|other| !(tells && other.reads_over));
        let (Some(peer), Some(room)) = (peer, room.map(Socket::room)) else {
            return Err(self.broken_pipe(tid, 0).into());
        };
        if room == 0 {
            return Ok(Moved::Wait(Key::Socket(id)));
        }
        let bytes = from[..room.min(from.len())].to_vec();
        let count = bytes.len();
        let sender = self.sender(tid);
        self.sockets
            .get_mut(peer)?
            .push(Message::new(bytes, sender));
        self.wake(Key::Socket(peer));
        Ok(Moved::Bytes(count))
    }

    fn send_datagram(&mut self, tid: Tid, file: FileId, id: SocketId, sent: Sent<'_>) -> Outcome {
        let Sent {
            pieces,
            flags,
            to,
            files,
        } = sent;
        let family = self.sockets.get(id)?.family;
        let name = match to {
            Some((address, len)) => {
                let wanted = self.read_address(tid, family, address, len)?;
                let mut name = self.find_name(tid, wanted)?;
                if let Address::Inet(ip, _) = &mut name {
                    *ip = reached(*ip);
                    let socket = self.sockets.get(id)?;
                    if !ip.is_loopback() || ip.is_ipv4() && socket.is_only_six() {
                        return Err(Errno::ENETUNREACH.into());
                    }
                }
                Some(name)
            }
            None => {
                let socket = self.sockets.get(id)?;
                match (socket.connected, socket.remote.clone()) {
                    (false, _) if family != Family::Unix => {
                        return Err(Errno::EDESTADDRREQ.into());
                    }
                    (false, _) => return Err(Errno::ENOTCONN.into()),
                    (true, name) => name,
                }
            }
        };
        let target = match &name {
            Some(name) => self.sockets.find(Kind::Datagram, name),
            None => self.sockets.get(id)?.peer,
        };
        let total = sent.total();
        let most = match family {
            Family::Unix => CAPACITY as u64 - 512,
            _ => 65_507,
        };
        if total > most {
            return Err(Errno::EMSGSIZE.into());
        }
        self.name_inet(id, None)?;
        let socket = self.sockets.get_mut(id)?;
        if socket.writes_over {
            return Err(self.broken_pipe(tid, flags).into());
        }
        let mut from = socket.local.clone();
        if let (Some(Address::Inet(own, _)), Some(Address::Inet(ip, _))) = (&mut from, &name) {
            if own.is_unspecified() {
                *own = match ip {
                    IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                    IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
                };
            } else if own.is_ipv4() != ip.is_ipv4() {
                return Err(Errno::ENETUNREACH.into());
            }
        }
        let patience = socket.patience[1];
        let Some(target) = target else {
            return match family {
                Family::Unix => Err(Errno::ECONNREFUSED.into()),
                // Nobody is there: said by the next call, if they are joined.
                _ => {
                    socket.error = socket.connected.then_some(Errno::ECONNREFUSED);
                    Ok(total)
                }
            };
        };
        let receiver = self.sockets.get(target)?;
        let meant_for_other = receiver.connected && receiver.peer.is_some_and(|peer| peer != id);
        if meant_for_other && family == Family::Unix {
            return Err(Errno::EPERM.into());
        }
        if !receiver.takes(index(total)) {
            return match family {
                Family::Unix => self.wait_unless(tid, file, target, patience, flags),
                _ => Ok(total),
            };
        }
        let bytes = self.gather(tid, pieces, 0, index(total))?;
        let mut message = Message::new(bytes, self.sender(tid));
        message.from = from;
        message.files = self.hold_all(files);
        self.sockets.get_mut(target)?.push(message);
        self.wake(Key::Socket(target));
        Ok(total)
    }

    fn broken_pipe(&mut self, tid: Tid, flags: u32) -> Errno {
        if flags & MSG_NOSIGNAL == 0 {
            let pid = self.pid_of(tid);
            let signal = u8::try_from(SIGPIPE).expect("a small number");
            self.send_to_thread(tid, Info::from_process(signal, 0, pid, 0));
        }
        Errno::EPIPE
    }

    /// `len` bytes from pieces of memory, behind the first `skip`.
    fn gather(
        &mut self,
        tid: Tid,
        pieces: &[(u64, u64)],
        mut skip: u64,
        len: usize,
    ) -> Result<Vec<u8>> {
        let mut all = Vec::with_capacity(len);
        for (address, piece) in pieces {
            let start = skip.min(*piece);
            skip -= start;
            let count = index((piece - start).min((len - all.len()) as u64));
            all.extend(self.bytes(tid, address + start, count)?);
        }
        Ok(all)
    }
}
