//! From one open file to another: splice and copy_file_range.

use alloc::vec;

use linux_raw_sys::general::{SPLICE_F_GIFT, SPLICE_F_MORE, SPLICE_F_MOVE, SPLICE_F_NONBLOCK};

use super::low;
use super::moves::Moved;
use crate::errno::{Errno, Outcome, Result, Stop};
use crate::kernel::Kernel;
use crate::mem::{PAGE, index};
use crate::process::files::{Device, FileId, Object};
use crate::wait::{Key, Tid};

/// Most bytes of one splice: what a pipe holds at most.
const MOST: u64 = 1 << 20;

impl Kernel {
    /// Moves what there is now, if anything; one of the files is a pipe.
    pub(crate) fn splice(&mut self, tid: Tid, a: [u64; 6]) -> Outcome {
        const KNOWN: u32 = SPLICE_F_MOVE | SPLICE_F_NONBLOCK | SPLICE_F_MORE | SPLICE_F_GIFT;
        let [from, from_at, to, to_at, len, flags] = a;
        if low(flags) & !KNOWN != 0 {
            return Err(Errno::EINVAL.into());
        }
        let (source, target) = (
            self.readable_file(tid, low(from))?,
            self.writable_file(tid, low(to))?,
        );
        let ends = (self.pipe_of(source), self.pipe_of(target));
        if ends.0.is_some() && from_at != 0 || ends.1.is_some() && to_at != 0 {
            return Err(Errno::ESPIPE.into());
        }
        // What may keep what was taken from the source waiting is not for this.
        let takes = ends.1.is_some()
            || matches!(
                self.file(target).object,
                Object::File | Object::Device(Device::Null | Device::Zero | Device::Random)
            );
        let gives = ends.0.is_some() || matches!(self.file(source).object, Object::File);
        if ends == (None, None)
            || ends.0 == ends.1
            || !takes
            || !gives
            || self.file(target).appends()
        {
            return Err(Errno::EINVAL.into());
        }
        let mut done = 0;
        while done < len.min(MOST) {
            match self.splice_some(tid, (source, from_at), (target, to_at), len - done) {
                Ok(Moved::Bytes(0) | Moved::End) => break,
                Ok(Moved::Bytes(count)) => done += count as u64,
                Ok(Moved::Wait(_)) | Err(_) if done > 0 => break,
                Ok(Moved::Wait(_))
                    if low(flags) & SPLICE_F_NONBLOCK != 0
                        || self.file(source).is_nonblocking()
                        || self.file(target).is_nonblocking() =>
                {
                    return Err(Errno::EAGAIN.into());
                }
                Ok(Moved::Wait(key)) => return Err(self.block(tid, &[key], None)),
                Err(stop) => return Err(stop),
            }
        }
        Ok(done)
    }

    fn pipe_of(&mut self, id: FileId) -> Option<u32> {
        match self.file(id).object {
            Object::PipeReader(pipe) | Object::PipeWriter(pipe) | Object::PipeBoth(pipe) => {
                Some(pipe)
            }
            _ => None,
        }
    }

    fn splice_some(
        &mut self,
        tid: Tid,
        source: (FileId, u64),
        target: (FileId, u64),
        len: u64,
    ) -> Result<Moved, Stop> {
        let room = match self.pipe_of(target.0) {
            None => PAGE,
            Some(pipe) => match self.pipes.get(pipe) {
                Some(ends) if ends.readers > 0 && ends.room() == 0 => {
                    return Ok(Moved::Wait(Key::Pipe(pipe)));
                }
                Some(ends) if ends.readers > 0 => ends.room(),
                // The write says so.
                _ => PAGE,
            },
        };
        let size = room.min(PAGE).min(index(len.min(PAGE as u64)));
        let mut chunk = vec![0; size];
        let read = self.at_given(tid, source, |kernel| {
            kernel.read_some(tid, source.0, &mut chunk)
        })?;
        let Moved::Bytes(count) = read else {
            return Ok(read);
        };
        if count == 0 {
            return Ok(Moved::End);
        }
        let more = count as u64 + PAGE as u64;
        self.at_given(tid, target, |kernel| {
            kernel.write_some(tid, target.0, &chunk[..count], more)
        })
    }

    /// Moves bytes at the offset in a thread's memory, which goes on, instead
    /// of where the file is.
    fn at_given(
        &mut self,
        tid: Tid,
        (id, address): (FileId, u64),
        step: impl FnOnce(&mut Self) -> Result<Moved, Stop>,
    ) -> Result<Moved, Stop> {
        if address == 0 {
            return step(self);
        }
        let offset: u64 = self.get(tid, address)?;
        if offset.cast_signed() < 0 {
            return Err(Errno::EINVAL.into());
        }
        let saved = core::mem::replace(&mut self.file(id).offset, offset);
        let moved = step(self);
        let offset = core::mem::replace(&mut self.file(id).offset, saved);
        self.put(tid, address, &offset)?;
        moved
    }

    /// Between regular files.
    pub(crate) fn copy_file_range(&mut self, tid: Tid, a: [u64; 6]) -> Outcome {
        let [from, from_at, to, to_at, len, flags] = a;
        let (source, target) = (
            self.readable_file(tid, low(from))?,
            self.writable_file(tid, low(to))?,
        );
        if low(flags) != 0 {
            return Err(Errno::EINVAL.into());
        }
        if self.file(target).appends() {
            return Err(Errno::EBADF.into());
        }
        for id in [source, target] {
            match self.file(id).object {
                Object::File => {}
                Object::Directory { .. } => return Err(Errno::EISDIR.into()),
                _ => return Err(Errno::EINVAL.into()),
            }
        }
        let (first, second) = (
            self.start(tid, source, from_at)?,
            self.start(tid, target, to_at)?,
        );
        let same = self.file(source).node() == self.file(target).node();
        if same && first < second.saturating_add(len) && second < first.saturating_add(len) {
            return Err(Errno::EINVAL.into());
        }
        let mut done = 0;
        // A call of its own for each so much: nobody else runs meanwhile.
        while done < len.min(MOST) {
            match self.splice_some(tid, (source, from_at), (target, to_at), len - done) {
                Ok(Moved::Bytes(count)) if count > 0 => done += count as u64,
                Ok(_) => break,
                Err(_) if done > 0 => break,
                Err(stop) => return Err(stop),
            }
        }
        Ok(done)
    }

    /// Where a transfer begins.
    fn start(&mut self, tid: Tid, id: FileId, address: u64) -> Result<u64> {
        match address {
            0 => Ok(self.file(id).offset),
            address => self.get(tid, address),
        }
    }
}
