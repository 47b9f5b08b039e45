//! Sockets, as far as they are pairs of pipes.

use linux_raw_sys::general::{O_CLOEXEC, O_NONBLOCK, O_RDWR};

use crate::errno::{Errno, Outcome};
use crate::kernel::Kernel;
use crate::process::files::{Object, OpenFile};
use crate::streams::pipe::Pipe;
use crate::wait::Tid;

const AF_UNIX: u32 = 1;
const SOCK_STREAM: u32 = 1;
const SOCK_SEQPACKET: u32 = 5;
/// The part of a socket's type that is none of its flags, which are `open`'s.
const TYPE: u32 = 0xf;
const MSG_DONTWAIT: u32 = 0x40;

impl Kernel {
    pub(crate) fn socketpair(&mut self, tid: Tid, domain: u32, kind: u32, address: u64) -> Outcome {
        if domain != AF_UNIX {
            return Err(Errno::EAFNOSUPPORT.into());
        }
        let make = match kind & TYPE {
            SOCK_STREAM => Pipe::new,
            SOCK_SEQPACKET => Pipe::of_messages,
            _ => return Err(Errno::EOPNOTSUPP.into()),
        };
        self.check_memory()?;
        let mut pipe = || {
            let mut pipe = make();
            (pipe.readers, pipe.writers) = (1, 1);
            self.pipes.insert(pipe)
        };
        let (one, two) = (pipe(), pipe());
        let flags = O_RDWR | kind & O_NONBLOCK;
        let end = |reads, writes| OpenFile::new(Object::Socket { reads, writes }, None, flags);
        self.add_pair(tid, address, end(one, two), end(two, one), kind & O_CLOEXEC)
    }

    fn socket_flags(&mut self, tid: Tid, number: u32, flags: u32) -> Result<u32, Errno> {
        let id = self.file_id(tid, number)?;
        let file = self.file(id);
        if !matches!(file.object, Object::Socket { .. }) {
            return Err(Errno::ENOTSOCK);
        }
        let before = file.flags;
        if flags & MSG_DONTWAIT != 0 {
            file.flags |= O_NONBLOCK;
        }
        Ok(before)
    }

    /// Makes a call on a socket with the flags of this call alone.
    fn with_flags(
        &mut self,
        tid: Tid,
        number: u32,
        flags: u32,
        call: impl FnOnce(&mut Self) -> Outcome,
    ) -> Outcome {
        let before = self.socket_flags(tid, number, flags)?;
        let result = call(self);
        let id = self.file_id(tid, number)?;
        self.file(id).flags = before;
        result
    }

    pub(crate) fn sendto(
        &mut self,
        tid: Tid,
        number: u32,
        address: u64,
        len: u64,
        flags: u32,
    ) -> Outcome {
        self.with_flags(tid, number, flags, |kernel| {
            kernel.write_call(tid, number, address, len)
        })
    }

    pub(crate) fn recvfrom(
        &mut self,
        tid: Tid,
        number: u32,
        address: u64,
        len: u64,
        flags: u32,
    ) -> Outcome {
        self.with_flags(tid, number, flags, |kernel| {
            kernel.read_call(tid, number, address, len)
        })
    }

    pub(crate) fn shutdown(&mut self, tid: Tid, number: u32) -> Outcome {
        self.socket_flags(tid, number, 0)?;
        Err(Errno::ENOTCONN.into())
    }
}
