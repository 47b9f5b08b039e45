//! Reading and writing.

use alloc::vec;

use linux_raw_sys::general::{
    RWF_DSYNC, RWF_HIPRI, RWF_SYNC, SEEK_CUR, SEEK_DATA, SEEK_END, SEEK_HOLE, SEEK_SET,
};

use super::low;
use super::moves::Moved;
use crate::errno::{Errno, Outcome, Result, Stop};
use crate::kernel::Kernel;
use crate::mem::{PAGE, index};
use crate::process::files::{Device, FileId, Object};
use crate::streams::pipe::ATOMIC;
use crate::user::MOST_BYTES;
use crate::wait::Tid;

/// Bytes that are moved at a time.
const CHUNK: usize = PAGE;

/// Flags of preadv2 and pwritev2 that need nothing here: files are in memory,
/// so that nothing waits for a disk.
const READ_FLAGS: u32 = RWF_HIPRI;
const WRITE_FLAGS: u32 = READ_FLAGS | RWF_DSYNC | RWF_SYNC;

fn check_flags(flags: u32, known: u32) -> Result<()> {
    match flags & !known {
        0 => Ok(()),
        _ => Err(Errno::EOPNOTSUPP),
    }
}

impl Kernel {
    pub(crate) fn read_call(&mut self, tid: Tid, number: u32, address: u64, len: u64) -> Outcome {
        let id = self.readable_file(tid, number)?;
        self.read_file(tid, id, &[(address, len.min(MOST_BYTES))])
    }

    pub(crate) fn readv(&mut self, tid: Tid, number: u32, address: u64, count: u64) -> Outcome {
        let id = self.readable_file(tid, number)?;
        let pieces = self.pieces(tid, address, count)?;
        self.read_file(tid, id, &pieces)
    }

    /// Reads as much as there is into pieces of memory.
    fn read_file(&mut self, tid: Tid, id: FileId, pieces: &[(u64, u64)]) -> Outcome {
        let mut done = 0;
        if let Object::Socket(socket) = self.file(id).object {
            return self.read_socket(tid, id, socket, pieces);
        }
        if matches!(
            self.file(id).object,
            Object::Directory { .. } | Object::ProcDirectory { .. }
        ) {
            return Err(Errno::EISDIR.into());
        }
        for (address, len) in pieces {
            let mut at = 0;
            while at < *len {
                let size = CHUNK.min(usize::try_from(len - at).unwrap_or(CHUNK));
                let mut chunk = vec![0; size];
                let moved = match self.read_some(tid, id, &mut chunk) {
                    Ok(moved) => moved,
                    Err(_) if done > 0 => return Ok(done),
                    Err(stop) => return Err(stop),
                };
                match moved {
                    Moved::Bytes(count) => {
                        let stored = self.write_user(tid, address + at, &chunk[..count]);
                        if let Err(errno) = stored {
                            return if done > 0 {
                                Ok(done)
                            } else {
                                Err(errno.into())
                            };
                        }
                        done += count as u64;
                        at += count as u64;
                        // A stream may give less than is asked for.
                        if count < size || self.is_stream(id) && self.has_nothing(id) {
                            return Ok(done);
                        }
                    }
                    Moved::End => return Ok(done),
                    Moved::Wait(_) if done > 0 => return Ok(done),
                    Moved::Wait(_) if self.file(id).is_nonblocking() => {
                        return Err(Errno::EAGAIN.into());
                    }
                    Moved::Wait(key) => return Err(self.block(tid, &[key], None)),
                }
            }
        }
        Ok(done)
    }

    pub(crate) fn write_call(&mut self, tid: Tid, number: u32, address: u64, len: u64) -> Outcome {
        let id = self.writable_file(tid, number)?;
        self.write_file(tid, id, &[(address, len.min(MOST_BYTES))])
    }

    pub(crate) fn writev(&mut self, tid: Tid, number: u32, address: u64, count: u64) -> Outcome {
        let id = self.writable_file(tid, number)?;
        let pieces = self.pieces(tid, address, count)?;
        self.write_file(tid, id, &pieces)
    }

    /// Writes pieces of memory. A write that must wait goes on where it was.
    pub(crate) fn write_file(&mut self, tid: Tid, id: FileId, pieces: &[(u64, u64)]) -> Outcome {
        if let Object::Socket(socket) = self.file(id).object {
            return self.write_socket(tid, id, socket, pieces);
        }
        let mut skip = self.thread(tid).call.map_or(0, |call| call.done);
        let mut done = skip;
        let total: u64 = pieces.iter().map(|(_, len)| len).sum();
        for (address, len) in pieces {
            let mut at = skip.min(*len);
            skip -= at;
            while at < *len {
                let size = CHUNK.min(usize::try_from(len - at).unwrap_or(CHUNK));
                let mut chunk = vec![0; size];
                let moved = match self.read_user(tid, address + at, &mut chunk) {
                    Ok(()) => self.write_some(tid, id, &chunk, total - done),
                    Err(errno) => Err(errno.into()),
                };
                match moved {
                    Ok(Moved::Bytes(count)) => {
                        done += count as u64;
                        at += count as u64;
                        if let Some(call) = &mut self.thread(tid).call {
                            call.done = done;
                        }
                    }
                    Ok(Moved::End) => return Ok(done),
                    Ok(Moved::Wait(_)) if self.file(id).is_nonblocking() => {
                        return if done > 0 {
                            Ok(done)
                        } else {
                            Err(Errno::EAGAIN.into())
                        };
                    }
                    Ok(Moved::Wait(key)) => return Err(self.block(tid, &[key], None)),
                    Err(Stop::Block) => return Err(Stop::Block),
                    Err(_) if done > 0 => return Ok(done),
                    Err(stop) => return Err(stop),
                }
            }
        }
        Ok(done)
    }

    pub(crate) fn pread(
        &mut self,
        tid: Tid,
        number: u32,
        address: u64,
        len: u64,
        offset: u64,
    ) -> Outcome {
        let id = self.seekable(tid, number)?;
        if !self.file(id).may_read() {
            return Err(Errno::EBADF.into());
        }
        let parts = [(address, len.min(MOST_BYTES))];
        self.at_offset(id, offset, |kernel| kernel.read_file(tid, id, &parts))
    }

    pub(crate) fn preadv(&mut self, tid: Tid, a: [u64; 6], flags: u32) -> Outcome {
        check_flags(flags, READ_FLAGS)?;
        let id = self.seekable(tid, low(a[0]))?;
        if !self.file(id).may_read() {
            return Err(Errno::EBADF.into());
        }
        let parts = self.pieces(tid, a[1], a[2])?;
        self.at_offset(id, a[3], |kernel| kernel.read_file(tid, id, &parts))
    }

    pub(crate) fn pwritev(&mut self, tid: Tid, a: [u64; 6], flags: u32) -> Outcome {
        check_flags(flags, WRITE_FLAGS)?;
        let id = self.seekable(tid, low(a[0]))?;
        if !self.file(id).may_write() {
            return Err(Errno::EBADF.into());
        }
        let parts = self.pieces(tid, a[1], a[2])?;
        self.at_offset(id, a[3], |kernel| kernel.write_file(tid, id, &parts))
    }

    /// With flags; offset -1 stands for the file's own place.
    pub(crate) fn preadv2(&mut self, tid: Tid, a: [u64; 6]) -> Outcome {
        if a[3] == u64::MAX {
            check_flags(low(a[5]), READ_FLAGS)?;
            return self.readv(tid, low(a[0]), a[1], a[2]);
        }
        self.preadv(tid, a, low(a[5]))
    }

    pub(crate) fn pwritev2(&mut self, tid: Tid, a: [u64; 6]) -> Outcome {
        if a[3] == u64::MAX {
            check_flags(low(a[5]), WRITE_FLAGS)?;
            return self.writev(tid, low(a[0]), a[1], a[2]);
        }
        self.pwritev(tid, a, low(a[5]))
    }

    pub(crate) fn pwrite(
        &mut self,
        tid: Tid,
        number: u32,
        address: u64,
        len: u64,
        offset: u64,
    ) -> Outcome {
        let id = self.seekable(tid, number)?;
        if !self.file(id).may_write() {
            return Err(Errno::EBADF.into());
        }
        let parts = [(address, len.min(MOST_BYTES))];
        self.at_offset(id, offset, |kernel| kernel.write_file(tid, id, &parts))
    }

    /// Makes a call at this place of a file, whose own place stays.
    fn at_offset(
        &mut self,
        id: FileId,
        offset: u64,
        call: impl FnOnce(&mut Self) -> Outcome,
    ) -> Outcome {
        if offset.cast_signed() < 0 {
            return Err(Errno::EINVAL.into());
        }
        let saved = core::mem::replace(&mut self.file(id).offset, offset);
        let result = call(self);
        self.file(id).offset = saved;
        result
    }

    fn seekable(&mut self, tid: Tid, number: u32) -> Result<FileId> {
        let id = self.file_id(tid, number)?;
        match self.file(id).object {
            Object::File | Object::Text(_) | Object::Device(_) => Ok(id),
            Object::Directory { .. } | Object::ProcDirectory { .. } => Err(Errno::EISDIR),
            _ => Err(Errno::ESPIPE),
        }
    }

    pub(crate) fn seek(&mut self, tid: Tid, number: u32, offset: i64, whence: u32) -> Outcome {
        let id = self.file_id(tid, number)?;
        let file = self.file(id);
        let current = file.offset;
        let node = file.node();
        let size = match &mut file.object {
            Object::File => node.map_or(0, |node| self.objects.node(node).size()),
            Object::Text(text) => text.len() as u64,
            Object::Directory { last, listed } if whence == SEEK_SET && offset == 0 => {
                (*last, *listed) = (None, 0);
                return Ok(0);
            }
            Object::Directory { listed, .. } => return Ok(*listed),
            Object::ProcDirectory { listed } => {
                if whence == SEEK_SET && offset == 0 {
                    *listed = 0;
                }
                return Ok(*listed);
            }
            Object::Device(Device::Console | Device::Launcher) => return Err(Errno::ESPIPE.into()),
            Object::Device(_) => return Ok(0),
            _ => return Err(Errno::ESPIPE.into()),
        };
        let base = match whence {
            SEEK_SET => 0,
            SEEK_CUR => current,
            SEEK_END => size,
            // Files are one piece of data with a hole at the end.
            SEEK_DATA | SEEK_HOLE => {
                let at = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
                if at >= size {
                    return Err(Errno::ENXIO.into());
                }
                let at = if whence == SEEK_DATA { at } else { size };
                self.file(id).offset = at;
                return Ok(at);
            }
            _ => return Err(Errno::EINVAL.into()),
        };
        let at = base
            .checked_add_signed(offset)
            .filter(|at| at.cast_signed() >= 0)
            .ok_or(Errno::EINVAL)?;
        self.file(id).offset = at;
        Ok(at)
    }

    /// From a file to anything.
    pub(crate) fn sendfile(
        &mut self,
        tid: Tid,
        to: u32,
        from: u32,
        offset: u64,
        count: u64,
    ) -> Outcome {
        let target = self.file_id(tid, to)?;
        let source = self.file_id(tid, from)?;
        if !self.file(source).may_read() || !self.file(target).may_write() {
            return Err(Errno::EBADF.into());
        }
        let file = self.file(source);
        let node = match (&file.object, file.node()) {
            (Object::File, Some(node)) => node,
            _ => return Err(Errno::EINVAL.into()),
        };
        let mut at = match offset {
            0 => self.file(source).offset,
            address => self.get(tid, address)?,
        };
        if at.cast_signed() < 0 {
            return Err(Errno::EINVAL.into());
        }
        let mut done = 0;
        while done < count {
            let size = CHUNK.min(index((count - done).min(CHUNK as u64)));
            let mut chunk = vec![0; size];
            let read = match self.objects.read(node, at, &mut chunk) {
                Ok(read) => read,
                Err(_) if done > 0 => break,
                Err(errno) => return Err(errno.into()),
            };
            if read == 0 {
                break;
            }
            match self.write_some(tid, target, &chunk[..read], ATOMIC as u64 + 1) {
                Ok(Moved::Bytes(written)) => {
                    done += written as u64;
                    at += written as u64;
                }
                Ok(Moved::Wait(_)) | Err(_) if done > 0 => break,
                Ok(Moved::Wait(_)) if self.file(target).is_nonblocking() => {
                    return Err(Errno::EAGAIN.into());
                }
                Ok(Moved::Wait(key)) => return Err(self.block(tid, &[key], None)),
                Ok(Moved::End) => break,
                Err(stop) => return Err(stop),
            }
        }
        match offset {
            0 => self.file(source).offset = at,
            address => self.put(tid, address, &at)?,
        }
        Ok(done)
    }
}
