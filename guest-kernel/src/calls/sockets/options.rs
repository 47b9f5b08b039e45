//! Options of sockets: what they are told, and asked.

use alloc::vec;

use super::super::{low, signed};
use super::{AF_INET, AF_INET6, AF_UNIX, IPPROTO_TCP, IPPROTO_UDP};
use crate::errno::{Errno, Outcome};
use crate::kernel::Kernel;
use crate::mem::index;
use crate::streams::address::{Family, Kind};
use crate::streams::socket::CAPACITY;
use crate::wait::Tid;

/// Levels and names of options.
mod option {
    pub(super) const SOCKET: u32 = 1;
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
    /// Of IPv6: to take nothing of IPv4.
    pub(super) const SIX: u32 = 41;
    pub(super) const ONLY_SIX: u32 = 26;
    /// Those that are remembered and change nothing here.
    pub(super) fn is_remembered(level: u32, name: u32) -> bool {
        match level {
            SOCKET => matches!(name, 2 | 5..=10 | 12 | 13 | 15 | 16 | 18 | 19 | 29 | 35),
            0 => matches!(name, 1..=4 | 8 | 10..=13 | 32..=34),
            6 => matches!(name, 1..=6 | 8..=10 | 12 | 18 | 23),
            SIX => matches!(name, 16..=19 | 26 | 67),
            _ => false,
        }
    }
}

impl Kernel {
    pub(crate) fn setsockopt(&mut self, tid: Tid, a: [u64; 6]) -> Outcome {
        let (_, id) = self.socket_at(tid, low(a[0]))?;
        let (level, name, len) = (low(a[1]), low(a[2]), low(a[4]));
        if signed(a[4]) < 0 {
            return Err(Errno::EINVAL.into());
        }
        let socket = self.sockets.get(id)?;
        let (family, is_named) = (socket.family, socket.local.is_some());
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
            (option::SIX, _) if family != Family::Inet6 => return Err(Errno::ENOPROTOOPT.into()),
            // What it takes is settled when it gets its name.
            (option::SIX, option::ONLY_SIX) if is_named => return Err(Errno::EINVAL.into()),
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
        let (_, id) = self.socket_at(tid, low(a[0]))?;
        let (level, name) = (low(a[1]), low(a[2]));
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
                Family::Inet6 => AF_INET6.into(),
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
            (option::SIX, _) if socket.family != Family::Inet6 => {
                return Err(Errno::ENOPROTOOPT.into());
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
        self.put(tid, a[4], &low(len as u64))?;
        Ok(0)
    }
}
