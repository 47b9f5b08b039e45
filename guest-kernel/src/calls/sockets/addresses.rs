//! Sockets' addresses, as programs write and read them.

use alloc::vec::Vec;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::super::low;
use super::{AF_INET, AF_INET6, AF_UNIX};
use crate::errno::{Errno, Result};
use crate::fs::Place;
use crate::fs::node::Kind;
use crate::fs::walk::{Last, may, right};
use crate::kernel::Kernel;
use crate::streams::address::{Address, Family};
use crate::wait::Tid;

/// Bytes of an IPv6 address's flow, between port and address.
const FLOW: usize = 4;
/// Longest path of an address.
const LONGEST_NAME: usize = 108;

/// What an address in a program's memory says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    Name(Address),
    /// A file, still to be looked up.
    Path(Vec<u8>),
    /// Of the right family, and nothing more.
    Unnamed,
}

impl Kernel {
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
            Family::Inet6 => AF_INET6,
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
                    Kind::Socket => Ok(Address::Path(node, path.into())),
                    _ => Err(Errno::ECONNREFUSED),
                }
            }
        }
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
        self.put(tid, len, &low(bytes.len() as u64))
    }
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
        let ip = Ipv4Addr::from_octets(*ip);
        let name = Address::Inet(ip.into(), u16::from_be_bytes(*port));
        return Ok(Wanted::Name(name));
    }
    if family == AF_INET6 {
        let (port, rest) = rest.split_first_chunk().ok_or(Errno::EINVAL)?;
        let ip = rest.get(FLOW..).and_then(<[u8]>::first_chunk);
        let ip = Ipv6Addr::from_octets(*ip.ok_or(Errno::EINVAL)?);
        let name = Address::Inet(ip.to_canonical(), u16::from_be_bytes(*port));
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
fn address_bytes(family: Family, name: Option<&Address>) -> Vec<u8> {
    let head = |family: u16| family.to_le_bytes().to_vec();
    match (family, name) {
        (Family::Inet, name) => {
            let (ip, port) = match name {
                Some(Address::Inet(IpAddr::V4(ip), port)) => (*ip, *port),
                _ => (Ipv4Addr::UNSPECIFIED, 0),
            };
            let mut bytes = head(AF_INET);
            bytes.extend(port.to_be_bytes());
            bytes.extend(ip.octets());
            bytes.extend([0; 8]);
            bytes
        }
        (Family::Inet6, name) => {
            let (ip, port) = match name {
                Some(Address::Inet(IpAddr::V4(ip), port)) => (ip.to_ipv6_mapped(), *port),
                Some(Address::Inet(IpAddr::V6(ip), port)) => (*ip, *port),
                _ => (Ipv6Addr::UNSPECIFIED, 0),
            };
            let mut bytes = head(AF_INET6);
            bytes.extend(port.to_be_bytes());
            bytes.extend([0; FLOW]);
            bytes.extend(ip.octets());
            // The scope.
            bytes.extend([0; 4]);
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

/// Reads bytes as an address of each family.
///
/// # Panics
/// If one that is taken isn't read again as it is written.
#[cfg(any(test, fuzzing))]
pub(super) fn read_anything(bytes: &[u8]) {
    for (number, family) in [
        (AF_UNIX, Family::Unix),
        (AF_INET, Family::Inet),
        (AF_INET6, Family::Inet6),
    ] {
        let name = match parse_address(number, bytes) {
            Ok(Wanted::Name(name)) => name,
            // The zero byte behind the longest has no room.
            Ok(Wanted::Path(path)) if path.len() < LONGEST_NAME => Address::Path(0, path.into()),
            _ => continue,
        };
        let written = address_bytes(family, Some(&name));
        let read = match parse_address(number, &written) {
            Ok(Wanted::Name(name)) => name,
            Ok(Wanted::Path(path)) => Address::Path(0, path.into()),
            other => panic!("{name:?} became {other:?}"),
        };
        assert_eq!(read, name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        let inet = Address::Inet(Ipv4Addr::LOCALHOST.into(), 8080);
        let bytes = address_bytes(Family::Inet, Some(&inet));
        assert_eq!(bytes[..8], [2, 0, 0x1f, 0x90, 127, 0, 0, 1]);
        assert_eq!(
            parse_address(AF_INET, &bytes),
            Ok(Wanted::Name(inet.clone()))
        );
        let mapped = address_bytes(Family::Inet6, Some(&inet));
        assert_eq!(mapped[..8], [10, 0, 0x1f, 0x90, 0, 0, 0, 0]);
        assert_eq!(mapped[16..24], [0, 0, 0xff, 0xff, 127, 0, 0, 1]);
        assert_eq!(parse_address(AF_INET6, &mapped), Ok(Wanted::Name(inet)));
        let six = Address::Inet(Ipv6Addr::LOCALHOST.into(), 8080);
        let bytes = address_bytes(Family::Inet6, Some(&six));
        assert_eq!((bytes.len(), bytes[23]), (28, 1));
        // Without the scope, as RFC 2133 has it.
        assert_eq!(parse_address(AF_INET6, &bytes[..24]), Ok(Wanted::Name(six)));
        assert_eq!(parse_address(AF_INET6, &bytes[..23]), Err(Errno::EINVAL));
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
