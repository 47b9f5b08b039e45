//! Locks on files: `flock`, and `fcntl` for parts of them.

use linux_raw_sys::general::{
    F_GETLK, F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW, F_RDLCK, F_SETLKW, F_UNLCK, F_WRLCK, LOCK_EX,
    LOCK_NB, LOCK_SH, LOCK_UN, SEEK_CUR, SEEK_END, SEEK_SET,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::errno::{Errno, Outcome, Result};
use crate::fs::locks::{Holder, Lock};
use crate::fs::node::NodeId;
use crate::kernel::Kernel;
use crate::process::Pid;
use crate::process::files::{Descriptor, FileId};
use crate::wait::{Key, Tid};

/// A program's `struct flock`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Request {
    kind: i16,
    whence: i16,
    padding: u32,
    start: i64,
    len: i64,
    pid: i32,
    padding_end: u32,
}

const _: () = assert!(size_of::<Request>() == 32);

/// The first byte that is meant and the last.
fn range(base: u64, start: i64, len: i64) -> Result<(u64, u64)> {
    const MOST: u64 = i64::MAX.cast_unsigned();
    let at = i64::try_from(base)
        .ok()
        .and_then(|base| base.checked_add(start))
        .ok_or(Errno::EOVERFLOW)?;
    let (first, last) = match len {
        0 => (at, None),
        1.. => (at, Some(at.checked_add(len - 1).ok_or(Errno::EOVERFLOW)?)),
        _ => (at.checked_add(len).ok_or(Errno::EINVAL)?, Some(at - 1)),
    };
    let first = u64::try_from(first).map_err(|_| Errno::EINVAL)?;
    // What has no end goes to that of the largest file.
    let last = last.map_or(Ok(MOST), u64::try_from);
    Ok((first, last.map_err(|_| Errno::EINVAL)?))
}

impl Kernel {
    pub(crate) fn flock(&mut self, tid: Tid, number: u32, operation: u32) -> Outcome {
        let id = self.file_id(tid, number)?;
        let node = self.file(id).node().ok_or(Errno::EBADF)?;
        let holder = Holder::File(id);
        let exclusive = match operation & !LOCK_NB {
            LOCK_UN => {
                if self.whole_locks.release(node, holder) {
                    self.wake(Key::Lock(node));
                }
                return Ok(0);
            }
            LOCK_SH => false,
            LOCK_EX => true,
            _ => return Err(Errno::EINVAL.into()),
        };
        let lock = Lock {
            holder,
            first: 0,
            last: u64::MAX,
            exclusive,
        };
        // One is given back before the other kind is taken.
        if self.whole_locks.release(node, holder) {
            self.wake(Key::Lock(node));
        }
        if self.whole_locks.conflict(node, &lock).is_some() {
            return match operation & LOCK_NB {
                0 => Err(self.block(tid, &[Key::Lock(node)], None)),
                _ => Err(Errno::EAGAIN.into()),
            };
        }
        self.whole_locks.set(node, lock);
        Ok(0)
    }

    /// `F_SETLK` and its relatives.
    pub(crate) fn record_lock(
        &mut self,
        tid: Tid,
        id: FileId,
        command: u32,
        address: u64,
    ) -> Outcome {
        let mut request: Request = self.get(tid, address)?;
        let of_file = [F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW].contains(&command);
        if of_file && request.pid != 0 {
            return Err(Errno::EINVAL.into());
        }
        let holder = match of_file {
            true => Holder::File(id),
            false => Holder::Process(self.pid_of(tid)),
        };
        let file = self.file(id);
        let node = file.node().ok_or(Errno::EBADF)?;
        let (offset, may_read, may_write) = (file.offset, file.may_read(), file.may_write());
        let base = match u32::try_from(request.whence).map_err(|_| Errno::EINVAL)? {
            SEEK_SET => 0,
            SEEK_CUR => offset,
            SEEK_END => self.objects.node(node).size(),
            _ => return Err(Errno::EINVAL.into()),
        };
        let (first, last) = range(base, request.start, request.len)?;
        let kind = u32::try_from(request.kind).map_err(|_| Errno::EINVAL)?;
        let mut lock = Lock {
            holder,
            first,
            last,
            exclusive: kind == F_WRLCK,
        };
        if ![F_RDLCK, F_WRLCK, F_UNLCK].contains(&kind) {
            return Err(Errno::EINVAL.into());
        }
        if [F_GETLK, F_OFD_GETLK].contains(&command) {
            let found = self.record_locks.conflict(node, &lock);
            match found.filter(|_| kind != F_UNLCK) {
                None => request.kind = i16::try_from(F_UNLCK).expect("a small number"),
                Some(other) => request = describe(&other),
            }
            self.put(tid, address, &request)?;
            return Ok(0);
        }
        let lacks = kind == F_RDLCK && !may_read || kind == F_WRLCK && !may_write;
        if lacks {
            return Err(Errno::EBADF.into());
        }
        if kind == F_UNLCK {
            lock.exclusive = false;
            if self.record_locks.clear(node, &lock) {
                self.wake(Key::Lock(node));
            }
            return Ok(0);
        }
        if self.record_locks.conflict(node, &lock).is_some() {
            if ![F_SETLKW, F_OFD_SETLKW].contains(&command) {
                return Err(Errno::EAGAIN.into());
            }
            if !of_file && self.deadlocks(tid, node, lock) {
                return Err(Errno::EDEADLK.into());
            }
            return Err(self.block(tid, &[Key::Lock(node)], None));
        }
        self.record_locks.set(node, lock);
        // It may have become weaker.
        self.wake(Key::Lock(node));
        Ok(0)
    }

    /// Whether a thread that is about to wait for a lock waited for its own
    /// process; if not, it is known to wait.
    fn deadlocks(&mut self, tid: Tid, node: NodeId, lock: Lock) -> bool {
        // Who was interrupted has not said so.
        let threads = &self.threads;
        self.lock_waits.retain(|tid, (node, _)| {
            let thread = threads.get(tid);
            thread.is_some_and(|thread| thread.waits && thread.keys == [Key::Lock(*node)])
        });
        let waits = self.lock_waits.values().copied();
        if self.record_locks.deadlocks(node, &lock, waits) {
            return true;
        }
        self.lock_waits.insert(tid, (node, lock));
        false
    }

    /// A process gives up a descriptor, and with it all its locks on parts of
    /// that file, whatever other descriptors it has for it.
    pub(crate) fn drop_descriptor(&mut self, pid: Pid, descriptor: Descriptor) {
        if let Some(node) = self.file(descriptor.file).node()
            && self.record_locks.release(node, Holder::Process(pid))
        {
            self.wake(Key::Lock(node));
        }
        self.release_file(descriptor.file);
    }
}

/// A lock that is in the way, for the program.
fn describe(lock: &Lock) -> Request {
    let most = i64::MAX.cast_unsigned();
    let kind = if lock.exclusive { F_WRLCK } else { F_RDLCK };
    let len = match lock.last {
        last if last >= most => 0,
        last => (last - lock.first + 1).cast_signed(),
    };
    Request {
        kind: i16::try_from(kind).expect("a small number"),
        whence: i16::try_from(SEEK_SET).expect("zero"),
        padding: 0,
        start: lock.first.cast_signed(),
        len,
        pid: match lock.holder {
            Holder::Process(pid) => pid.cast_signed(),
            Holder::File(_) => -1,
        },
        padding_end: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_of_bytes_that_can_be() {
        const MOST: u64 = i64::MAX.cast_unsigned();
        assert_eq!(range(100, -10, 5), Ok((90, 94)));
        assert_eq!(range(100, 0, -10), Ok((90, 99)));
        assert_eq!(range(0, 7, 0), Ok((7, MOST)));
        assert_eq!(range(0, i64::MAX, 1), Ok((MOST, MOST)));
        assert_eq!(range(0, 0, -1), Err(Errno::EINVAL));
        assert_eq!(range(5, -6, 1), Err(Errno::EINVAL));
        assert_eq!(range(0, i64::MAX, 2), Err(Errno::EOVERFLOW));
        assert_eq!(range(1, i64::MAX, 1), Err(Errno::EOVERFLOW));
        assert_eq!(range(0, i64::MIN, i64::MIN), Err(Errno::EINVAL));
    }
}
