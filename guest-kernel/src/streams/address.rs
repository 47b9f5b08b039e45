//! What sockets are called, and who takes what is sent to a name.
//!
//! An IPv4 address is the same whether an IPv4 socket uses it or an IPv6 one,
//! which programs see it mapped by: `::ffff:127.0.0.1`.

use alloc::boxed::Box;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::socket::{Socket, SocketId, Sockets};
use crate::errno::{Errno, Result};
use crate::fs::node::NodeId;

/// Ports that are given to who asks for any.
const ANY_PORTS: core::ops::Range<u16> = 32768..61000;
/// Levels and names of options.
const SHARES: (u32, u32) = (1, 2);
const ONLY_SIX: (u32, u32) = (41, 26);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    Unix,
    Inet,
    Inet6,
}

impl Family {
    /// The address of whoever has none of its own.
    pub(crate) fn any(self) -> IpAddr {
        match self {
            Self::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
            _ => Ipv4Addr::UNSPECIFIED.into(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Stream,
    Datagram,
    /// Connected, and keeps messages apart.
    Packets,
}

/// What a socket is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Address {
    /// A file, and the path that it was bound by.
    Path(NodeId, Box<[u8]>),
    Abstract(Box<[u8]>),
    /// Address and port.
    Inet(IpAddr, u16),
}

/// Whom what is sent to an address without a place reaches: this machine.
pub(crate) fn reached(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        other => other,
    }
}

/// What is given next to who asks for any port or name.
#[derive(Debug)]
pub(super) struct Next {
    port: u16,
    name: u32,
}

impl Default for Next {
    fn default() -> Self {
        Self {
            port: ANY_PORTS.start,
            name: 0,
        }
    }
}

impl Socket {
    /// Whether it takes nothing of IPv4.
    pub(crate) fn is_only_six(&self) -> bool {
        self.is_on(ONLY_SIX.0, ONLY_SIX.1)
    }

    /// Whether it takes what is sent to `to` if it is bound to `own`.
    fn takes_at(&self, own: IpAddr, to: IpAddr) -> bool {
        let all = own.is_unspecified() && own.is_ipv6() && !self.is_only_six();
        own == to || all || own.is_unspecified() && own.is_ipv4() == to.is_ipv4()
    }
}

impl Sockets {
    /// The sockets that take connections or datagrams at an address.
    pub(crate) fn find(&self, kind: Kind, wanted: &Address) -> Option<SocketId> {
        let is = |socket: &Socket| {
            let open = kind == Kind::Datagram || socket.backlog.is_some();
            let same = match (&socket.local, wanted) {
                (Some(Address::Inet(ip, port)), Address::Inet(to, wanted)) => {
                    port == wanted && socket.takes_at(*ip, *to)
                }
                (Some(Address::Path(one, _)), Address::Path(other, _)) => one == other,
                (Some(Address::Abstract(one)), Address::Abstract(other)) => one == other,
                _ => false,
            };
            socket.kind == kind && open && same
        };
        let mut all = self.iter();
        all.find(|(_, socket)| is(socket)).map(|(id, _)| id)
    }

    /// Whether a name is taken for a socket, which may share a port with
    /// connections of one that was there before if it has been told so.
    pub(crate) fn is_taken(&self, new: &Socket, name: &Address) -> bool {
        let shares = new.is_on(SHARES.0, SHARES.1);
        let takes = |socket: &Socket| match (&socket.local, name) {
            (Some(Address::Inet(ip, port)), Address::Inet(other, wanted)) => {
                let in_use = !shares || socket.backlog.is_some() || new.kind == Kind::Datagram;
                let meet = socket.takes_at(*ip, *other) || new.takes_at(*other, *ip);
                socket.kind == new.kind && port == wanted && meet && in_use
            }
            (Some(Address::Abstract(one)), Address::Abstract(other)) => one == other,
            _ => false,
        };
        self.iter().any(|(_, socket)| takes(socket))
    }

    /// A port that nobody has at an address.
    pub(crate) fn free_port(&mut self, id: SocketId, ip: IpAddr) -> Result<u16> {
        for _ in ANY_PORTS {
            let port = self.next.port;
            self.next.port = match port + 1 {
                next if ANY_PORTS.contains(&next) => next,
                _ => ANY_PORTS.start,
            };
            if !self.is_taken(self.get(id)?, &Address::Inet(ip, port)) {
                return Ok(port);
            }
        }
        Err(Errno::EADDRINUSE)
    }

    /// An abstract name that nobody has.
    pub(crate) fn free_name(&mut self) -> Address {
        loop {
            self.next.name = self.next.name.wrapping_add(1) & 0xf_ffff;
            let name = alloc::format!("{:05x}", self.next.name);
            let name = Address::Abstract(name.into_bytes().into());
            if self
                .iter()
                .all(|(_, socket)| socket.local.as_ref() != Some(&name))
            {
                return name;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::socket::Sender;
    use super::*;

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
    const SIX: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);
    const ALL_FOUR: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    const ALL: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

    fn socket(family: Family) -> Socket {
        Socket::new(family, Kind::Datagram, Sender::default())
    }

    fn only_six() -> Socket {
        let mut socket = socket(Family::Inet6);
        socket
            .options
            .insert(ONLY_SIX, Box::from(&[1, 0, 0, 0][..]));
        socket
    }

    #[test]
    fn ports_are_found_and_given() {
        let mut sockets = Sockets::default();
        let id = sockets.insert(socket(Family::Inet));
        let port = sockets.free_port(id, HERE).expect("all are free");
        let bound = sockets.get_mut(id).expect("there");
        bound.local = Some(Address::Inet(HERE, port));
        let find = |kind, ip| sockets.find(kind, &Address::Inet(ip, port));
        assert_eq!(find(Kind::Datagram, HERE), Some(id));
        let other = Ipv4Addr::new(127, 0, 0, 2).into();
        assert_eq!(find(Kind::Datagram, other), None);
        assert_eq!(find(Kind::Stream, HERE), None);
        let new = socket(Family::Inet);
        assert!(sockets.is_taken(&new, &Address::Inet(ALL_FOUR, port)));
        let id = sockets.insert(new);
        assert_ne!(sockets.free_port(id, ALL_FOUR), Ok(port));
    }

    #[test]
    fn who_is_bound_to_all_of_ipv6_takes_ipv4_unless_told_not_to() {
        let bound = |socket: Socket, ip, to| {
            let mut sockets = Sockets::default();
            let id = sockets.insert(socket);
            sockets.get_mut(id).expect("there").local = Some(Address::Inet(ip, 80));
            sockets
                .find(Kind::Datagram, &Address::Inet(to, 80))
                .is_some()
        };
        for (ip, to, takes) in [
            (ALL, HERE, true),
            (ALL, SIX, true),
            (ALL_FOUR, HERE, true),
            (ALL_FOUR, SIX, false),
            (SIX, SIX, true),
            (SIX, HERE, false),
        ] {
            assert_eq!(bound(socket(Family::Inet6), ip, to), takes, "{ip} {to}");
        }
        assert!(!bound(only_six(), ALL, HERE) && bound(only_six(), ALL, SIX));
        let mut sockets = Sockets::default();
        let mut four = socket(Family::Inet);
        four.local = Some(Address::Inet(ALL_FOUR, 80));
        sockets.insert(four);
        let name = Address::Inet(ALL, 80);
        assert!(sockets.is_taken(&socket(Family::Inet6), &name));
        assert!(!sockets.is_taken(&only_six(), &name));
    }
}
