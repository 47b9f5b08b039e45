//! Descriptors and what they stand for: close, dup, fcntl, pipes.

use alloc::boxed::Box;
use alloc::vec::Vec;

use linux_raw_sys::general::{
    DN_MULTISHOT, F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD, F_GETFL, F_GETLK, F_NOTIFY, F_OFD_GETLK,
    F_OFD_SETLK, F_OFD_SETLKW, F_SETFD, F_SETFL, F_SETLK, F_SETLKW, FD_CLOEXEC, O_APPEND,
    O_CLOEXEC, O_NONBLOCK, O_RDONLY, O_WRONLY, RLIMIT_NOFILE,
};

use super::low;
use crate::errno::{Errno, Outcome, Result};
use crate::fs::locks::Holder;
use crate::kernel::Kernel;
use crate::mem::index;
use crate::process::files::{Descriptor, FileId, Object, OpenFile};
use crate::process::life::closes_on_exec;
use crate::streams::flight;
use crate::streams::pipe::Pipe;
use crate::timers::{Owner, Timer};
use crate::wait::{Key, Tid};

/// `close_range` marks descriptors instead of closing them.
const CLOSE_RANGE_CLOEXEC: u32 = 4;
const F_SETPIPE_SZ: u32 = 1031;
const F_GETPIPE_SZ: u32 = 1032;
/// Flags that `F_SETFL` changes.
const CHANGEABLE: u32 = O_APPEND | O_NONBLOCK;

impl Kernel {
    /// The open file behind a descriptor.
    pub(crate) fn file_id(&mut self, tid: Tid, number: u32) -> Result<FileId> {
        Ok(self.process_of(tid).files.get(number)?.file)
    }

    /// The same, if it was opened for reading.
    pub(crate) fn readable_file(&mut self, tid: Tid, number: u32) -> Result<FileId> {
        let id = self.file_id(tid, number)?;
        match self.file(id).may_read() {
            true => Ok(id),
            false => Err(Errno::EBADF),
        }
    }

    /// The same, if it was opened for writing.
    pub(crate) fn writable_file(&mut self, tid: Tid, number: u32) -> Result<FileId> {
        let id = self.file_id(tid, number)?;
        match self.file(id).may_write() {
            true => Ok(id),
            false => Err(Errno::EBADF),
        }
    }

    /// An open file that exists.
    pub(crate) fn file(&mut self, id: FileId) -> &mut OpenFile {
        self.files
            .get_mut(id)
            .expect("descriptors hold their files")
    }

    /// One use more.
    pub(crate) fn hold_file(&mut self, id: FileId) {
        self.file(id).uses += 1;
    }

    /// One use less; the last closes it, and with it what is on its way there.
    pub(crate) fn release_file(&mut self, id: FileId) {
        // Not by calling itself: sockets can be in each other's queues deeper
        // than any stack.
        let mut next = self.drop_use(id);
        while let Some(id) = next.pop() {
            next.extend(self.drop_use(id));
        }
    }

    /// One use less of one file; those whose uses that has ended.
    fn drop_use(&mut self, id: FileId) -> Vec<FileId> {
        let mut held = Vec::new();
        let file = self.file(id);
        file.uses -= 1;
        if file.uses > 0 {
            if matches!(file.object, Object::Socket(_)) && self.sockets.fly {
                held = self.files_of_lost_sockets();
            }
            return held;
        }
        self.forget_watched(id);
        let Some(file) = self.files.remove(id) else {
            return held;
        };
        match file.object {
            Object::PipeReader(pipe) => self.close_pipe(pipe, true, false),
            Object::PipeWriter(pipe) => self.close_pipe(pipe, false, true),
            Object::PipeBoth(pipe) => self.close_pipe(pipe, true, true),
            Object::Socket(socket) => held = self.close_socket(socket),
            Object::Epoll(epoll) => self.close_epoll(epoll),
            Object::Timer(timer) => {
                self.set_timer(Owner::File(timer), Timer::default());
                self.timer_files.remove(timer);
            }
            Object::Terminal(number) => self.close_terminal(number, false),
            Object::Master(number) => self.close_terminal(number, true),
            Object::Event(number) => {
                self.events.remove(number);
            }
            _ => {}
        }
        if let Some(node) = file.node() {
            let holder = Holder::File(id);
            let mut had = self.record_locks.release(node, holder);
            had |= self.whole_locks.release(node, holder);
            if had {
                self.wake(Key::Lock(node));
            }
        }
        if let Some(place) = file.place {
            self.release_place(place);
        }
        held
    }

    /// Empties the queues of sockets that nobody can reach any more; what was
    /// in them, each with a use to give up.
    fn files_of_lost_sockets(&mut self) -> Vec<FileId> {
        let lost = flight::lost(&self.sockets, &self.files);
        self.sockets.fly = lost.is_some();
        let mut held = Vec::new();
        for id in lost.unwrap_or_default() {
            if let Ok(socket) = self.sockets.get_mut(id) {
                held.extend(socket.take_files());
            }
        }
        held
    }

    pub(super) fn close_pipe(&mut self, id: u32, reader: bool, writer: bool) {
        let Some(pipe) = self.pipes.get_mut(id) else {
            return;
        };
        pipe.readers -= u32::from(reader);
        pipe.writers -= u32::from(writer);
        if pipe.readers == 0 && pipe.writers == 0 {
            let node = pipe.node;
            self.pipes.remove(id);
            if let Some(node) = node {
                self.objects.forget_pipe(node, id);
            }
        }
        self.wake(Key::Pipe(id));
    }

    /// Gives a file the lowest free number.
    pub(crate) fn add_descriptor(
        &mut self,
        tid: Tid,
        file: FileId,
        close_on_exec: bool,
        least: u32,
    ) -> Result<u32> {
        let process = self.process_of(tid);
        let limit = process.limits[RLIMIT_NOFILE as usize].0;
        let descriptor = Descriptor {
            file,
            close_on_exec,
        };
        let number = process.files.add(descriptor, least, limit)?;
        self.hold_file(file);
        Ok(number)
    }

    /// Opens something new; what it is goes if there is no number for it.
    pub(crate) fn add_file(&mut self, tid: Tid, file: OpenFile, flags: u32) -> Result<u32> {
        let id = self.files.insert(file);
        self.hold_file(id);
        let number = self.add_descriptor(tid, id, closes_on_exec(flags), 0);
        self.release_file(id);
        number
    }

    pub(crate) fn close(&mut self, tid: Tid, number: u32) -> Outcome {
        let descriptor = self.process_of(tid).files.remove(number)?;
        let pid = self.pid_of(tid);
        self.drop_descriptor(pid, descriptor);
        Ok(0)
    }

    pub(crate) fn close_range(&mut self, tid: Tid, first: u32, last: u32, flags: u32) -> Outcome {
        if first > last {
            return Err(Errno::EINVAL.into());
        }
        let numbers: alloc::vec::Vec<_> = {
            let files = self.process_of(tid).files.iter();
            files
                .map(|(number, _)| number)
                .filter(|number| (first..=last).contains(number))
                .collect()
        };
        for number in numbers {
            if flags & CLOSE_RANGE_CLOEXEC != 0 {
                self.process_of(tid).files.get_mut(number)?.close_on_exec = true;
            } else {
                self.close(tid, number)?;
            }
        }
        Ok(0)
    }

    pub(crate) fn dup(&mut self, tid: Tid, number: u32, least: u32, cloexec: bool) -> Outcome {
        let file = self.file_id(tid, number)?;
        Ok(self.add_descriptor(tid, file, cloexec, least)?.into())
    }

    pub(crate) fn dup_to(
        &mut self,
        tid: Tid,
        from: u32,
        to: u32,
        flags: u32,
        same_is_fine: bool,
    ) -> Outcome {
        let file = self.file_id(tid, from)?;
        if from == to {
            return match same_is_fine {
                true => Ok(to.into()),
                false => Err(Errno::EINVAL.into()),
            };
        }
        if u64::from(to) >= self.process_of(tid).limits[RLIMIT_NOFILE as usize].0 {
            return Err(Errno::EBADF.into());
        }
        self.hold_file(file);
        let descriptor = Descriptor {
            file,
            close_on_exec: closes_on_exec(flags),
        };
        if let Some(old) = self.process_of(tid).files.put(to, descriptor) {
            let pid = self.pid_of(tid);
            self.drop_descriptor(pid, old);
        }
        Ok(to.into())
    }

    /// For calls that only need the descriptor to be there.
    pub(crate) fn descriptor_exists(&mut self, tid: Tid, number: u32) -> Outcome {
        self.file_id(tid, number)?;
        Ok(0)
    }

    pub(crate) fn fcntl(&mut self, tid: Tid, number: u32, command: u32, argument: u64) -> Outcome {
        let id = self.file_id(tid, number)?;
        match command {
            F_DUPFD => self.dup(tid, number, low(argument), false),
            F_DUPFD_CLOEXEC => self.dup(tid, number, low(argument), true),
            F_GETFD => {
                let descriptor = self.process_of(tid).files.get(number)?;
                Ok(u64::from(descriptor.close_on_exec) * u64::from(FD_CLOEXEC))
            }
            F_SETFD => {
                let descriptor = self.process_of(tid).files.get_mut(number)?;
                descriptor.close_on_exec = low(argument) & FD_CLOEXEC != 0;
                Ok(0)
            }
            F_GETFL => Ok(self.file(id).flags.into()),
            F_SETFL => {
                let file = self.file(id);
                file.flags = file.flags & !CHANGEABLE | low(argument) & CHANGEABLE;
                Ok(0)
            }
            F_SETLK | F_SETLKW | F_GETLK | F_OFD_SETLK | F_OFD_SETLKW | F_OFD_GETLK => {
                self.record_lock(tid, id, command, argument)
            }
            F_SETPIPE_SZ | F_GETPIPE_SZ => {
                let (Object::PipeReader(pipe) | Object::PipeWriter(pipe) | Object::PipeBoth(pipe)) =
                    self.file(id).object
                else {
                    return Err(Errno::EBADF.into());
                };
                let ends = self.pipes.get_mut(pipe).ok_or(Errno::EBADF)?;
                if command == F_GETPIPE_SZ {
                    return Ok(ends.capacity() as u64);
                }
                let capacity = ends.resize(index(u64::from(low(argument))))?;
                self.wake(Key::Pipe(pipe));
                Ok(capacity as u64)
            }
            // Nobody is told of changes; to be told of none is granted.
            F_NOTIFY if low(argument) & !DN_MULTISHOT == 0 => Ok(0),
            _ => Err(Errno::EINVAL.into()),
        }
    }

    pub(crate) fn pipe(&mut self, tid: Tid, address: u64, flags: u32) -> Outcome {
        if flags & !(O_CLOEXEC | O_NONBLOCK) != 0 {
            return Err(Errno::EINVAL.into());
        }
        self.check_memory()?;
        let mut pipe = Pipe::new();
        (pipe.readers, pipe.writers) = (1, 1);
        let pipe = self.pipes.insert(pipe);
        let status = flags & O_NONBLOCK;
        let reader = OpenFile::new(Object::PipeReader(pipe), None, O_RDONLY | status);
        let writer = OpenFile::new(Object::PipeWriter(pipe), None, O_WRONLY | status);
        self.add_pair(tid, address, reader, writer, flags)
    }

    /// Opens two files and stores their numbers.
    pub(crate) fn add_pair(
        &mut self,
        tid: Tid,
        address: u64,
        first: OpenFile,
        second: OpenFile,
        flags: u32,
    ) -> Outcome {
        let second = self.files.insert(second);
        self.hold_file(second);
        let numbers = self.add_file(tid, first, flags).and_then(|first| {
            match self.add_descriptor(tid, second, closes_on_exec(flags), 0) {
                Ok(second) => Ok([first, second]),
                Err(errno) => {
                    // It was made a moment ago.
                    let _ = self.close(tid, first);
                    Err(errno)
                }
            }
        });
        self.release_file(second);
        let numbers = numbers?;
        if let Err(errno) = self.put(tid, address, &numbers) {
            for number in numbers {
                let _ = self.close(tid, number);
            }
            return Err(errno.into());
        }
        Ok(0)
    }

    /// The path that a file was opened by, made absolute.
    pub(crate) fn set_path(&mut self, tid: Tid, id: FileId, path: &[u8]) {
        let path = self.absolute_path(tid, path);
        self.file(id).path = Some(Box::from(path));
    }
}
