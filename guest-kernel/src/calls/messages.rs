//! Sending over sockets and receiving, with open files and credentials.

use alloc::vec::Vec;

use linux_raw_sys::general::SIGPIPE;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::moves::Moved;
use super::sockets::Wanted;
use crate::errno::{Errno, Outcome, Result, Stop};
use crate::kernel::Kernel;
use crate::mem::index;
use crate::process::files::FileId;
use crate::process::signal::Info;
use crate::streams::socket::{Address, CAPACITY, Family, Kind, Message, Socket, SocketId, Taken};
use crate::wait::{Key, Tid};

const MSG_OOB: u32 = 1;
const MSG_PEEK: u32 = 2;
const MSG_CTRUNC: u32 = 8;
const MSG_TRUNC: u32 = 0x20;
const MSG_DONTWAIT: u32 = 0x40;
const MSG_WAITALL: u32 = 0x100;
const MSG_NOSIGNAL: u32 = 0x4000;
const MSG_CLOEXEC: u32 = 0x4000_0000;

const SOL_SOCKET: u32 = 1;
const SCM_RIGHTS: u32 = 1;
const SCM_CREDENTIALS: u32 = 2;
const SO_PASSCRED: u32 = 16;
/// Most open files of one message, and bytes of what goes with it.
const MOST_FILES: usize = 253;
const MOST_CONTROL: u64 = 1 << 12;
/// Bytes that are copied at a time.
const CHUNK: u64 = 64 << 10;
/// Bytes of a control message before its data.
const CONTROL_HEAD: usize = 16;

/// A program's `struct msghdr`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Header {
    name: u64,
    name_len: u64,
    pieces: u64,
    count: u64,
    control: u64,
    control_len: u64,
    flags: u64,
}

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
        let (file, id) = self.socket_at(tid, super::low(a[0]))?;
        let to = match a[4] {
            0 => None,
            address => Some((address, super::low(a[5]))),
        };
        let pieces = [(a[1], a[2].min(crate::user::MOST_BYTES))];
        let sent = Sent {
            pieces: &pieces,
            flags: super::low(a[3]),
            to,
            files: &[],
        };
        self.send(tid, file, id, sent)
    }

    pub(crate) fn sendmsg(&mut self, tid: Tid, number: u32, address: u64, flags: u32) -> Outcome {
        let (file, id) = self.socket_at(tid, number)?;
        let header: Header = self.get(tid, address)?;
        let pieces = self.pieces(tid, header.pieces, header.count)?;
        let to = (header.name != 0 && super::low(header.name_len) != 0)
            .then(|| (header.name, super::low(header.name_len)));
        let files = self.control_files(tid, &header)?;
        let sent = Sent {
            pieces: &pieces,
            flags,
            to,
            files: &files,
        };
        self.send(tid, file, id, sent)
    }

    /// The open files in the control messages of a program.
    fn control_files(&mut self, tid: Tid, header: &Header) -> Result<Vec<FileId>> {
        let mut files = Vec::new();
        if header.control == 0 || header.control_len == 0 {
            return Ok(files);
        }
        if header.control_len > MOST_CONTROL {
            return Err(Errno::EINVAL);
        }
        let control = self.bytes(tid, header.control, index(header.control_len))?;
        for number in control_descriptors(&control)? {
            files.push(self.file_id(tid, number)?);
        }
        if files.len() > MOST_FILES {
            return Err(Errno::EINVAL);
        }
        Ok(files)
    }

    /// Writing to a socket.
    pub(super) fn write_socket(
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
        let sender = self.sender_of(tid);
        loop {
            let socket = self.sockets.get(id)?;
            if !socket.connected {
                return Err(match family {
                    Family::Inet => self.broken_pipe(tid, flags),
                    Family::Unix => Errno::ENOTCONN,
                }
                .into());
            }
            let (peer, patience) = (socket.peer, socket.patience[1]);
            let over = socket.writes_over;
            let open = peer.filter(|_| !over).and_then(|peer| {
                let other = self.sockets.get(peer).ok()?;
                let wants = family == Family::Inet || !other.reads_over;
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
    pub(super) fn feed_socket(
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
        let sender = self.sender_of(tid);
        self.sockets
            .get_mut(peer)?
            .push(Message::new(bytes, sender));
        self.wake(Key::Socket(peer));
        Ok(Moved::Bytes(count))
    }

    fn hold_all(&mut self, files: &[FileId]) -> Vec<FileId> {
        for file in files {
            self.hold_file(*file);
        }
        files.to_vec()
    }

    fn send_datagram(&mut self, tid: Tid, file: FileId, id: SocketId, sent: Sent<'_>) -> Outcome {
        let Sent {
            pieces,
            flags,
            to,
            files,
        } = sent;
        let family = self.sockets.get(id)?.family;
        let target = match to {
            Some((address, len)) => {
                let wanted = self.read_address(tid, family, address, len)?;
                if let Wanted::Name(Address::Inet(ip, _)) = wanted
                    && ip != 0
                    && ip >> 24 != 127
                {
                    return Err(Errno::ENETUNREACH.into());
                }
                let name = self.find_name(tid, wanted)?;
                self.sockets.find(Kind::Datagram, &name)
            }
            None => {
                let socket = self.sockets.get(id)?;
                match (socket.connected, socket.remote.clone()) {
                    (false, _) if family == Family::Inet => {
                        return Err(Errno::EDESTADDRREQ.into());
                    }
                    (false, _) => return Err(Errno::ENOTCONN.into()),
                    (true, Some(name)) => self.sockets.find(Kind::Datagram, &name),
                    (true, None) => socket.peer,
                }
            }
        };
        let total = sent.total();
        let most = match family {
            Family::Inet => 65_507,
            Family::Unix => CAPACITY as u64 - 512,
        };
        if total > most {
            return Err(Errno::EMSGSIZE.into());
        }
        self.name_inet(id, 0)?;
        let socket = self.sockets.get_mut(id)?;
        if socket.writes_over {
            return Err(self.broken_pipe(tid, flags).into());
        }
        let mut from = socket.local.clone();
        if let Some(Address::Inet(ip, _)) = &mut from
            && *ip == 0
        {
            *ip = super::sockets::LOOPBACK;
        }
        let patience = socket.patience[1];
        let Some(target) = target else {
            return match family {
                // Nobody is there: said by the next call, if they are joined.
                Family::Inet => {
                    socket.error = socket.connected.then_some(Errno::ECONNREFUSED);
                    Ok(total)
                }
                Family::Unix => Err(Errno::ECONNREFUSED.into()),
            };
        };
        let receiver = self.sockets.get(target)?;
        let meant_for_other = receiver.connected && receiver.peer.is_some_and(|peer| peer != id);
        if meant_for_other && family == Family::Unix {
            return Err(Errno::EPERM.into());
        }
        if !receiver.takes(index(total)) {
            return match family {
                Family::Inet => Ok(total),
                Family::Unix => self.wait_unless(tid, file, target, patience, flags),
            };
        }
        let bytes = self.gather(tid, pieces, 0, index(total))?;
        let mut message = Message::new(bytes, self.sender_of(tid));
        message.from = from;
        message.files = self.hold_all(files);
        self.sockets.get_mut(target)?.push(message);
        self.wake(Key::Socket(target));
        Ok(total)
    }

    /// Waits at a socket, unless this call alone must not.
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

    /// Puts bytes into pieces of memory, behind the first `skip`.
    fn scatter(
        &mut self,
        tid: Tid,
        pieces: &[(u64, u64)],
        mut skip: u64,
        mut bytes: &[u8],
    ) -> Result<()> {
        for (address, piece) in pieces {
            let start = skip.min(*piece);
            skip -= start;
            let room = usize::try_from(piece - start).unwrap_or(usize::MAX);
            let (now, rest) = bytes.split_at(bytes.len().min(room));
            self.write_user(tid, address + start, now)?;
            bytes = rest;
        }
        Ok(())
    }

    pub(crate) fn recvfrom(&mut self, tid: Tid, a: [u64; 6]) -> Outcome {
        let (file, id) = self.socket_at(tid, super::low(a[0]))?;
        let family = self.sockets.get(id)?.family;
        let pieces = [(a[1], a[2].min(crate::user::MOST_BYTES))];
        let flags = super::low(a[3]);
        let (count, taken) = self.receive(tid, file, id, &pieces, flags)?;
        self.release_files(&taken, flags);
        if a[4] != 0 {
            let from = self.name_of_sender(id, &taken);
            self.put_address(tid, family, from.as_ref(), a[4], a[5])?;
        }
        let cut = flags & MSG_TRUNC != 0 && self.sockets.get(id)?.kind != Kind::Stream;
        Ok(if cut { taken.whole as u64 } else { count })
    }

    /// Who sent what was received, as far as its receiver is told.
    fn name_of_sender(&mut self, id: SocketId, taken: &Taken) -> Option<Address> {
        match self.sockets.get(id) {
            Ok(socket) if socket.kind != Kind::Datagram => socket.remote.clone(),
            _ => taken.from.clone(),
        }
    }

    /// Closes what was sent with bytes to somebody who only takes bytes.
    fn release_files(&mut self, taken: &Taken, flags: u32) {
        if flags & MSG_PEEK == 0 {
            for file in &taken.files {
                self.release_file(*file);
            }
        }
    }

    /// Reading from a socket.
    pub(super) fn read_socket(
        &mut self,
        tid: Tid,
        file: FileId,
        id: SocketId,
        pieces: &[(u64, u64)],
    ) -> Outcome {
        let (count, taken) = self.receive(tid, file, id, pieces, 0)?;
        self.release_files(&taken, 0);
        Ok(count)
    }

    /// Takes what is there; how many bytes, and what came with them.
    fn receive(
        &mut self,
        tid: Tid,
        file: FileId,
        id: SocketId,
        pieces: &[(u64, u64)],
        flags: u32,
    ) -> Result<(u64, Taken), crate::errno::Stop> {
        if flags & MSG_OOB != 0 {
            return Err(Errno::EINVAL.into());
        }
        let total: u64 = pieces.iter().map(|(_, len)| len).sum();
        let look = flags & MSG_PEEK != 0;
        let mut done = self.thread(tid).call.map_or(0, |call| call.done);
        let mut first = None;
        loop {
            let socket = self.sockets.get_mut(id)?;
            let (kind, patience) = (socket.kind, socket.patience[0]);
            if kind == Kind::Stream && total == done {
                return Ok((done, first.unwrap_or_default()));
            }
            let room = usize::try_from(total - done).unwrap_or(usize::MAX);
            let Some(taken) = socket.take(room, look) else {
                if done > 0 {
                    let waits = socket.error.is_none() && !socket.reads_over;
                    if !waits || flags & MSG_DONTWAIT != 0 || self.file(file).is_nonblocking() {
                        return Ok((done, first.unwrap_or_default()));
                    }
                } else if let Some(errno) = socket.error.take() {
                    return Err(errno.into());
                } else if socket.reads_over {
                    return Ok((0, Taken::default()));
                } else if kind != Kind::Datagram && !socket.connected {
                    return Err(match socket.family {
                        Family::Unix if kind == Kind::Stream => Errno::EINVAL,
                        _ => Errno::ENOTCONN,
                    }
                    .into());
                }
                return match self.wait_unless(tid, file, id, patience, flags) {
                    Err(crate::errno::Stop::Failed(_)) if done > 0 => {
                        Ok((done, first.unwrap_or_default()))
                    }
                    Err(stop) => Err(stop),
                    Ok(_) => Err(Errno::EIO.into()),
                };
            };
            let peer = socket.peer;
            if !look {
                if kind == Kind::Datagram {
                    self.wake(Key::Socket(id));
                }
                if let Some(peer) = peer {
                    self.wake(Key::Socket(peer));
                }
            }
            if let Err(errno) = self.scatter(tid, pieces, done, &taken.bytes) {
                self.release_files(&taken, flags);
                return Err(errno.into());
            }
            done += taken.bytes.len() as u64;
            // Files end a read: who waits for all has them by then.
            let more =
                flags & MSG_WAITALL != 0 && kind == Kind::Stream && !look && taken.files.is_empty();
            first = Some(taken);
            if !more {
                return Ok((done, first.unwrap_or_default()));
            }
            if let Some(call) = &mut self.thread(tid).call {
                call.done = done;
            }
        }
    }

    pub(crate) fn recvmsg(&mut self, tid: Tid, number: u32, address: u64, flags: u32) -> Outcome {
        let (file, id) = self.socket_at(tid, number)?;
        let header: Header = self.get(tid, address)?;
        let pieces = self.pieces(tid, header.pieces, header.count)?;
        let (count, taken) = self.receive(tid, file, id, &pieces, flags)?;
        let socket = self.sockets.get(id)?;
        let (family, kind) = (socket.family, socket.kind);
        let passes = socket.options.get(&(SOL_SOCKET, SO_PASSCRED));
        let passes = passes.is_some_and(|value| value.iter().any(|byte| *byte != 0));
        if flags & MSG_PEEK != 0 {
            // Each look makes descriptors of its own.
            let files = taken.files.clone();
            self.hold_all(&files);
        }
        if header.name != 0 {
            let from = self.name_of_sender(id, &taken);
            let len = address + 8;
            self.put_address(tid, family, from.as_ref(), header.name, len)?;
        }
        let mut told = 0;
        let mut control = Vec::new();
        let mut room = index(header.control_len.min(MOST_CONTROL));
        if header.control == 0 {
            room = 0;
        }
        if passes {
            let sender = [taken.sender.pid, taken.sender.uid, taken.sender.gid];
            put_control(&mut control, SCM_CREDENTIALS, &sender);
        }
        let fits = room.saturating_sub(control.len() + CONTROL_HEAD) / 4;
        let mut numbers = Vec::new();
        for (at, file) in taken.files.iter().enumerate() {
            if at < fits {
                let cloexec = flags & MSG_CLOEXEC != 0;
                if let Ok(number) = self.add_descriptor(tid, *file, cloexec, 0) {
                    numbers.push(number);
                }
            }
            self.release_file(*file);
        }
        if numbers.len() < taken.files.len() {
            told |= MSG_CTRUNC;
        }
        if !numbers.is_empty() {
            put_control(&mut control, SCM_RIGHTS, &numbers);
        }
        if control.len() > room {
            control.truncate(room);
            if numbers.is_empty() {
                told |= MSG_CTRUNC;
            }
        }
        if kind != Kind::Stream && taken.whole as u64 > count {
            told |= MSG_TRUNC;
        }
        self.write_user(tid, header.control, &control)?;
        self.put(tid, address + 40, &(control.len() as u64))?;
        self.put(tid, address + 48, &(told | flags & MSG_CLOEXEC))?;
        let cut = flags & MSG_TRUNC != 0 && kind != Kind::Stream;
        Ok(if cut { taken.whole as u64 } else { count })
    }
}

/// Puts a control message of words behind others.
fn put_control(into: &mut Vec<u8>, kind: u32, words: &[u32]) {
    let len = CONTROL_HEAD + words.len() * 4;
    into.extend((len as u64).to_le_bytes());
    into.extend(SOL_SOCKET.to_le_bytes());
    into.extend(kind.to_le_bytes());
    into.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    into.resize(into.len().next_multiple_of(8), 0);
}

/// The descriptors in a program's control messages.
fn control_descriptors(mut bytes: &[u8]) -> Result<Vec<u32>> {
    let mut all = Vec::new();
    while bytes.len() >= CONTROL_HEAD {
        let word = |at: usize| {
            let word = bytes[at..].first_chunk().copied().unwrap_or_default();
            u32::from_le_bytes(word)
        };
        let len = usize::try_from(word(0)).unwrap_or(usize::MAX);
        if !(CONTROL_HEAD..=bytes.len()).contains(&len) || word(4) != 0 {
            return Err(Errno::EINVAL);
        }
        match (word(8), word(12)) {
            (SOL_SOCKET, SCM_RIGHTS) => {
                all.extend(
                    (CONTROL_HEAD..len)
                        .step_by(4)
                        .filter(|at| at + 4 <= len)
                        .map(word),
                );
            }
            // The kernel fills in the truth.
            (SOL_SOCKET, SCM_CREDENTIALS) => {}
            _ => return Err(Errno::EINVAL),
        }
        bytes = bytes.get(len.next_multiple_of(8)..).unwrap_or_default();
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_messages_are_read_as_they_are_written() {
        let mut bytes = Vec::new();
        put_control(&mut bytes, SCM_CREDENTIALS, &[1, 2, 3]);
        put_control(&mut bytes, SCM_RIGHTS, &[7, 8, 9]);
        assert_eq!(bytes.len(), 64);
        assert_eq!(control_descriptors(&bytes), Ok(vec![7, 8, 9]));
        assert_eq!(control_descriptors(&bytes[..60]), Ok(vec![7, 8, 9]));
        assert_eq!(control_descriptors(&bytes[..59]), Err(Errno::EINVAL));
        bytes[0] = 15;
        assert_eq!(control_descriptors(&bytes), Err(Errno::EINVAL));
        assert_eq!(control_descriptors(&[0xff; 24]), Err(Errno::EINVAL));
    }
}
