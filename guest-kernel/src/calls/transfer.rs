//! Reading and writing.

use alloc::vec;

use linux_raw_sys::general::{SEEK_CUR, SEEK_DATA, SEEK_END, SEEK_HOLE, SEEK_SET, SIGPIPE};

use crate::errno::{Errno, Outcome, Result, Stop};
use crate::kernel::Kernel;
use crate::mem::{PAGE, index};
use crate::process::files::{Device, FileId, Object};
use crate::process::signal::Info;
use crate::streams::pipe::{ATOMIC, Transfer};
use crate::streams::terminal;
use crate::user::MOST_BYTES;
use crate::wait::{Key, Tid};

/// Bytes that are moved at a time.
const CHUNK: usize = PAGE;

/// What moving some bytes came to.
enum Moved {
    Bytes(usize),
    /// Nothing now; what to wait for.
    Wait(Key),
    End,
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
                let moved = match self.read_some(tid, id, &mut chunk, *len - at) {
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

    fn is_stream(&mut self, id: FileId) -> bool {
        !matches!(
            self.file(id).object,
            Object::File
                | Object::Text(_)
                | Object::Device(Device::Zero | Device::Random | Device::Full)
        )
    }

    /// Whether a stream has nothing to read now.
    fn has_nothing(&mut self, id: FileId) -> bool {
        match self.file(id).object {
            Object::PipeReader(pipe)
            | Object::PipeBoth(pipe)
            | Object::Socket { reads: pipe, .. } => {
                let pipe = self.pipes.get(pipe);
                pipe.is_none_or(|pipe| pipe.len() == 0 || pipe.keeps_messages())
            }
            Object::Device(Device::Launcher) => self.from_launcher.is_empty(),
            Object::Master(number) => {
                let terminal = self.terminals.get(number);
                terminal.is_none_or(|terminal| terminal.printed() == 0)
            }
            // A read takes one line at most.
            _ => true,
        }
    }

    fn read_some(&mut self, tid: Tid, id: FileId, into: &mut [u8], _: u64) -> Result<Moved, Stop> {
        let offset = self.file(id).offset;
        match &self.file(id).object {
            Object::File => {
                let node = self.file(id).node().ok_or(Errno::EBADF)?;
                let count = self.objects.read(node, offset, into);
                self.file(id).offset += count as u64;
                Ok(Moved::Bytes(count))
            }
            Object::Text(text) => {
                let rest = usize::try_from(offset).ok().and_then(|at| text.get(at..));
                let rest = rest.unwrap_or_default();
                let count = rest.len().min(into.len());
                into[..count].copy_from_slice(&rest[..count]);
                self.file(id).offset += count as u64;
                Ok(Moved::Bytes(count))
            }
            Object::Device(device) => {
                let device = *device;
                self.read_device(device, into)
            }
            Object::PipeReader(pipe)
            | Object::PipeBoth(pipe)
            | Object::Socket { reads: pipe, .. } => {
                let pipe = *pipe;
                let ends = self.pipes.get_mut(pipe).ok_or(Errno::EBADF)?;
                Ok(match ends.read(into) {
                    Transfer::Moved(count) => {
                        self.wake(Key::Pipe(pipe));
                        Moved::Bytes(count)
                    }
                    Transfer::Wait => Moved::Wait(Key::Pipe(pipe)),
                    Transfer::Closed => Moved::End,
                })
            }
            Object::Terminal(number) => {
                let number = *number;
                self.read_terminal(tid, number, into)
            }
            Object::Master(number) => {
                let number = *number;
                let terminal = self.terminals.get_mut(number).ok_or(Errno::EIO)?;
                let count = terminal.take_output(into);
                if count > 0 {
                    self.wake(Key::Terminal(number));
                    return Ok(Moved::Bytes(count));
                }
                match terminal.used && terminal.slaves == 0 {
                    true => Err(Errno::EIO.into()),
                    false => Ok(Moved::Wait(Key::Terminal(number))),
                }
            }
            Object::Event(number) => {
                let number = *number;
                self.read_event(number, into)
            }
            Object::PipeWriter(_) | Object::PathOnly => Err(Errno::EBADF.into()),
            Object::Directory { .. } | Object::ProcDirectory { .. } => Err(Errno::EISDIR.into()),
        }
    }

    fn read_event(&mut self, number: u32, into: &mut [u8]) -> Result<Moved, Stop> {
        let count = self.events.get_mut(number).ok_or(Errno::EBADF)?;
        if into.len() < 8 {
            return Err(Errno::EINVAL.into());
        }
        if *count == 0 {
            return Ok(Moved::Wait(Key::Event(number)));
        }
        into[..8].copy_from_slice(&core::mem::take(count).to_le_bytes());
        self.wake(Key::Event(number));
        Ok(Moved::Bytes(8))
    }

    fn read_device(&mut self, device: Device, into: &mut [u8]) -> Result<Moved, Stop> {
        match device {
            Device::Null => Ok(Moved::End),
            Device::Zero | Device::Full => {
                into.fill(0);
                Ok(Moved::Bytes(into.len()))
            }
            Device::Random => {
                self.fill_random(into);
                Ok(Moved::Bytes(into.len()))
            }
            // Nobody can type there.
            Device::Console => Ok(Moved::Wait(Key::Time)),
            Device::Launcher => {
                let count = self.from_launcher.read(into);
                if count > 0 {
                    if self.from_launcher.must_wake_producer() {
                        self.machine.ring_launcher();
                    }
                    return Ok(Moved::Bytes(count));
                }
                Ok(match self.from_launcher.arm_consumer() {
                    true => Moved::Wait(Key::Launcher),
                    false => Moved::Bytes(self.from_launcher.read(into)),
                })
            }
        }
    }

    fn read_terminal(&mut self, tid: Tid, number: u32, into: &mut [u8]) -> Result<Moved, Stop> {
        const SIGTTIN: u8 = 21;
        self.check_background(tid, number, SIGTTIN)?;
        let terminal = self.terminals.get_mut(number).ok_or(Errno::EIO)?;
        match terminal.read(into) {
            terminal::Read::Bytes(0) => Ok(Moved::End),
            terminal::Read::Bytes(count) => {
                self.wake(Key::Terminal(number));
                Ok(Moved::Bytes(count))
            }
            terminal::Read::Wait if terminal.masters == 0 => Ok(Moved::End),
            terminal::Read::Wait => Ok(Moved::Wait(Key::Terminal(number))),
        }
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

    fn write_some(&mut self, tid: Tid, id: FileId, from: &[u8], left: u64) -> Result<Moved, Stop> {
        match self.file(id).object {
            Object::File => {
                let node = self.file(id).node().ok_or(Errno::EBADF)?;
                let offset = match self.file(id).appends() {
                    true => self.objects.node(node).size(),
                    false => self.file(id).offset,
                };
                let count = self.write_node(node, offset, from)?;
                self.file(id).offset = offset + count as u64;
                Ok(Moved::Bytes(count))
            }
            Object::Device(device) => self.write_device(device, from),
            Object::PipeWriter(pipe)
            | Object::PipeBoth(pipe)
            | Object::Socket { writes: pipe, .. } => {
                let left = usize::try_from(left).unwrap_or(usize::MAX);
                // Nothing was written of it yet, or it may be taken apart.
                let started = self.thread(tid).call.is_some_and(|call| call.done > 0);
                let left = if started { left.max(ATOMIC + 1) } else { left };
                let ends = self.pipes.get_mut(pipe).ok_or(Errno::EBADF)?;
                match ends.write(from, left) {
                    Transfer::Moved(count) => {
                        self.wake(Key::Pipe(pipe));
                        Ok(Moved::Bytes(count))
                    }
                    Transfer::Wait => Ok(Moved::Wait(Key::Pipe(pipe))),
                    Transfer::Closed => {
                        let pid = self.pid_of(tid);
                        let signal = u8::try_from(SIGPIPE).expect("a small number");
                        let info = Info::from_process(signal, 0, pid, 0);
                        self.send_to_thread(tid, info);
                        Err(Errno::EPIPE.into())
                    }
                }
            }
            Object::Terminal(number) => {
                const TOSTOP: u32 = 0o400;
                const SIGTTOU: u8 = 22;
                let stops = |terminal: &terminal::Terminal| terminal.modes.local & TOSTOP != 0;
                if self.terminals.get(number).is_some_and(stops) {
                    self.check_background(tid, number, SIGTTOU)?;
                }
                let terminal = self.terminals.get_mut(number).ok_or(Errno::EIO)?;
                if terminal.masters == 0 {
                    return Err(Errno::EIO.into());
                }
                let count = terminal.print_all(from);
                if count == 0 {
                    return Ok(Moved::Wait(Key::Terminal(number)));
                }
                self.wake(Key::Terminal(number));
                Ok(Moved::Bytes(count))
            }
            Object::Master(number) => self.type_in(number, from),
            Object::Event(number) => {
                let count = self.events.get_mut(number).ok_or(Errno::EBADF)?;
                let value = from.first_chunk().ok_or(Errno::EINVAL)?;
                let sum = count
                    .checked_add(u64::from_le_bytes(*value))
                    .filter(|sum| *sum < u64::MAX);
                let Some(sum) = sum else {
                    return Ok(Moved::Wait(Key::Event(number)));
                };
                *count = sum;
                self.wake(Key::Event(number));
                Ok(Moved::Bytes(8))
            }
            _ => Err(Errno::EBADF.into()),
        }
    }

    fn type_in(&mut self, number: u32, from: &[u8]) -> Result<Moved, Stop> {
        let terminal = self.terminals.get_mut(number).ok_or(Errno::EIO)?;
        let group = terminal.foreground;
        let mut signals = vec![];
        let count = terminal.type_in(from, |signal| signals.push(signal));
        for signal in signals {
            self.send_to_group(group, Info::from_kernel(signal));
        }
        if count == 0 {
            return Ok(Moved::Wait(Key::Terminal(number)));
        }
        self.wake(Key::Terminal(number));
        Ok(Moved::Bytes(count))
    }

    fn write_device(&mut self, device: Device, from: &[u8]) -> Result<Moved, Stop> {
        match device {
            Device::Null | Device::Zero | Device::Random => Ok(Moved::Bytes(from.len())),
            Device::Full => Err(Errno::ENOSPC.into()),
            Device::Console => {
                self.print(from);
                Ok(Moved::Bytes(from.len()))
            }
            Device::Launcher => {
                let mut count = self.to_launcher.write(from);
                if count == 0 && !self.to_launcher.arm_producer() {
                    count = self.to_launcher.write(from);
                }
                if self.to_launcher.must_wake_consumer() {
                    self.machine.ring_launcher();
                }
                Ok(match count {
                    0 => Moved::Wait(Key::Launcher),
                    count => Moved::Bytes(count),
                })
            }
        }
    }

    /// Writes to a regular file, which changes its times.
    fn write_node(&mut self, node: u32, offset: u64, from: &[u8]) -> Result<usize> {
        self.check_memory().map_err(|_| Errno::ENOSPC)?;
        let count = self.objects.write(node, offset, from)?;
        let now = self.wall();
        let meta = &mut self.objects.node_mut(node).meta;
        (meta.mtime, meta.ctime) = (now, now);
        Ok(count)
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
        let mut done = 0;
        while done < count {
            let size = CHUNK.min(index((count - done).min(CHUNK as u64)));
            let mut chunk = vec![0; size];
            let read = self.objects.read(node, at, &mut chunk);
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
