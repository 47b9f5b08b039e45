//! Receiving from sockets.

use alloc::vec::Vec;

use super::super::low;
use super::control::{
    CONTROL_HEAD, Header, MOST_CONTROL, SCM_CREDENTIALS, SCM_RIGHTS, SOL_SOCKET, put_control,
};
use super::{MSG_DONTWAIT, MSG_OOB};
use crate::errno::{Errno, Outcome, Result, Stop};
use crate::kernel::Kernel;
use crate::mem::index;
use crate::process::files::FileId;
use crate::streams::address::{Address, Family, Kind};
use crate::streams::socket::{SocketId, Taken};
use crate::wait::{Key, Tid};

const MSG_PEEK: u32 = 2;
const MSG_CTRUNC: u32 = 8;
const MSG_TRUNC: u32 = 0x20;
const MSG_WAITALL: u32 = 0x100;
const MSG_CLOEXEC: u32 = 0x4000_0000;
const SO_PASSCRED: u32 = 16;

impl Kernel {
    pub(crate) fn recvfrom(&mut self, tid: Tid, a: [u64; 6]) -> Outcome {
        let (file, id) = self.socket_at(tid, low(a[0]))?;
        let family = self.sockets.get(id)?.family;
        let pieces = [(a[1], a[2].min(crate::user::MOST_BYTES))];
        let flags = low(a[3]);
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
    pub(in crate::calls) fn read_socket(
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
    ) -> Result<(u64, Taken), Stop> {
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
                    Err(Stop::Failed(_)) if done > 0 => Ok((done, first.unwrap_or_default())),
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
        let passes = socket.is_on(SOL_SOCKET, SO_PASSCRED);
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
}
