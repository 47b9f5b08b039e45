//! Sockets' addresses, as programs write and read them.

use alloc::vec::Vec;

use super::super::low;
use super::{AF_INET, AF_UNIX, ANY};
use crate::errno::{Errno, Result};
use crate::fs::Place;
use crate::fs::node::Kind;
use crate::fs::walk::{Last, may, right};
use crate::kernel::Kernel;
use crate::streams::socket::{Address, Family};
use crate::wait::Tid;

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
fn address_bytes(family: Family, name: Option<&Address>) -> Vec<u8> {
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

/// Reads bytes as an address of each family.
///
/// # Panics
/// If one that is taken isn't read again as it is written.
#[cfg(any(test, fuzzing))]
pub(super) fn read_anything(bytes: &[u8]) {
    for (number, family) in [(AF_UNIX, Family::Unix), (AF_INET, Family::Inet)] {
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
    use super::super::LOOPBACK;
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
