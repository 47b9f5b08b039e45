//! Opening files.

use alloc::vec::Vec;

use linux_raw_sys::general::{
    MFD_CLOEXEC, MFD_EXEC, O_ACCMODE, O_APPEND, O_CLOEXEC, O_CREAT, O_DIRECTORY, O_EXCL, O_NOCTTY,
    O_NOFOLLOW, O_NONBLOCK, O_PATH, O_RDONLY, O_RDWR, O_TMPFILE, O_TRUNC, O_WRONLY,
};

use super::HERE;
use crate::errno::{Errno, Outcome, Result, Stop};
use crate::fs::node::{Kind, NodeId};
use crate::fs::proc::{ProcPlace, ProcView};
use crate::fs::setup::{self, TERMINALS};
use crate::fs::walk::{self, Last, Slot, Viewer, may, right};
use crate::fs::{MEMORY_DEVICE, Place, names};
use crate::kernel::Kernel;
use crate::process::Pid;
use crate::process::files::{Object, OpenFile};
use crate::process::life::closes_on_exec;
use crate::streams::pipe::Pipe;
use crate::wait::{Key, Tid};

/// Flags that stay with an open file.
const KEPT: u32 = O_ACCMODE | O_APPEND | O_NONBLOCK | O_PATH | O_DIRECTORY | 0o100_000;
/// The terminal that a process has, and the maker of new ones.
const OWN_TERMINAL: (u32, u32) = (5, 0);
const TERMINAL_MAKER: (u32, u32) = (5, 2);

impl Kernel {
    /// Walks a path from a viewer's directory.
    fn walk(&mut self, tid: Tid, viewer: &Viewer, path: &[u8], last: Last) -> Result<Slot> {
        let me = self.pid_of(tid);
        let proc = ProcView {
            processes: &self.processes,
            files: &self.files,
            me,
        };
        walk::resolve(&mut self.objects, &proc, viewer, path, last)
    }

    /// Walks a path from the working directory.
    pub(crate) fn resolve(&mut self, tid: Tid, path: &[u8], last: Last) -> Result<Slot> {
        let viewer = self.viewer(tid);
        self.walk(tid, &viewer, path, last)
    }

    /// Walks a path from the directory that a descriptor stands for.
    pub(crate) fn resolve_at(
        &mut self,
        tid: Tid,
        directory: u32,
        path: &[u8],
        last: Last,
    ) -> Result<Slot> {
        let mut viewer = self.viewer(tid);
        if directory != HERE && path.first() != Some(&b'/') {
            let id = self.file_id(tid, directory)?;
            let place = self.file(id).place.ok_or(Errno::ENOTDIR)?;
            if !walk::is_directory(&self.objects, place) {
                return Err(Errno::ENOTDIR);
            }
            viewer.directory = place;
        }
        self.walk(tid, &viewer, path, last)
    }

    /// A path from the root on, as far as that can be told.
    pub(crate) fn absolute_path(&mut self, tid: Tid, path: &[u8]) -> Vec<u8> {
        if let Ok(Slot {
            directory: Place::Node(directory),
            name,
            ..
        }) = self.resolve(tid, path, Last::Follow)
            && let Some(mut above) = walk::path_of(&mut self.objects, self.root, directory)
        {
            if above.last() != Some(&b'/') && !name.is_empty() {
                above.push(b'/');
            }
            above.extend_from_slice(&name);
            return above;
        }
        path.to_vec()
    }

    pub(crate) fn open(
        &mut self,
        tid: Tid,
        directory: u32,
        address: u64,
        flags: u32,
        mode: u32,
    ) -> Outcome {
        let path = self.path(tid, address)?;
        self.check_memory()?;
        if flags & O_TMPFILE == O_TMPFILE {
            return self.open_nameless(tid, directory, &path, flags, mode);
        }
        let creates = flags & O_CREAT != 0;
        let last = match flags & O_NOFOLLOW != 0 || creates && flags & O_EXCL != 0 {
            true => Last::Keep,
            false => Last::Follow,
        };
        let slot = self.resolve_at(tid, directory, &path, last)?;
        let place = match slot.found {
            Some(_) if creates && flags & O_EXCL != 0 => return Err(Errno::EEXIST.into()),
            Some(place) => place,
            None if creates && slot.must_be_directory => return Err(Errno::EISDIR.into()),
            None if creates => {
                let viewer = self.viewer(tid);
                let maker = self.maker(tid);
                let mode = mode & 0o7777 & !self.process_of(tid).umask;
                let kind = setup::file();
                let id = names::create(&mut self.objects, &slot, &viewer, kind, mode, maker)?;
                return self.open_place(tid, Place::Node(id), flags & !O_TRUNC, &path, directory);
            }
            None => return Err(Errno::ENOENT.into()),
        };
        self.check_open(tid, place, flags)?;
        match place {
            Place::Proc(ProcPlace::Nameless(pid, number)) => self.reopen(tid, pid, number, flags),
            place => self.open_place(tid, place, flags, &path, directory),
        }
    }

    /// Opens what has no name, through a descriptor's link in /proc: a pipe has
    /// one end more.
    fn reopen(&mut self, tid: Tid, pid: Pid, number: u32, flags: u32) -> Outcome {
        let process = self.processes.get(&pid).ok_or(Errno::ENOENT)?;
        let id = process.files.get(number)?.file;
        let object = if flags & O_PATH != 0 {
            Object::PathOnly
        } else {
            let (Object::PipeReader(pipe) | Object::PipeWriter(pipe) | Object::PipeBoth(pipe)) =
                self.file(id).object
            else {
                return Err(Errno::ENXIO.into());
            };
            let ends = self.pipes.get_mut(pipe).ok_or(Errno::ENXIO)?;
            let mode = flags & O_ACCMODE;
            ends.readers += u32::from(mode != O_WRONLY);
            ends.writers += u32::from(mode != O_RDONLY);
            match mode {
                O_RDONLY => Object::PipeReader(pipe),
                O_WRONLY => Object::PipeWriter(pipe),
                _ => Object::PipeBoth(pipe),
            }
        };
        let file = OpenFile::new(object, None, flags & KEPT);
        Ok(self.add_file(tid, file, flags)?.into())
    }

    /// Whether what is there may be opened like this.
    fn check_open(&mut self, tid: Tid, place: Place, flags: u32) -> Result<()> {
        let is_directory = walk::is_directory(&self.objects, place);
        if flags & O_DIRECTORY != 0 && !is_directory {
            return Err(Errno::ENOTDIR);
        }
        if flags & O_PATH != 0 {
            return Ok(());
        }
        let access = flags & O_ACCMODE;
        let writes = access != O_RDONLY || flags & O_TRUNC != 0;
        if is_directory && (writes || flags & O_CREAT != 0) {
            return Err(Errno::EISDIR);
        }
        let id = match place {
            Place::Node(id) => id,
            Place::Proc(ProcPlace::Nameless(..)) => return Ok(()),
            Place::Proc(_) if writes => return Err(Errno::EACCES),
            Place::Proc(_) => return Ok(()),
        };
        if matches!(self.objects.node(id).kind, Kind::Link(_)) {
            return Err(Errno::ELOOP);
        }
        let viewer = self.viewer(tid);
        let mut rights = 0;
        if access != O_WRONLY {
            rights |= right::READ;
        }
        if writes {
            rights |= right::WRITE;
        }
        match may(&self.objects, id, &viewer, rights) {
            true => Ok(()),
            false => Err(Errno::EACCES),
        }
    }

    /// Opens what was found.
    fn open_place(
        &mut self,
        tid: Tid,
        place: Place,
        flags: u32,
        path: &[u8],
        directory: u32,
    ) -> Outcome {
        let object = match place {
            _ if flags & O_PATH != 0 => Object::PathOnly,
            Place::Proc(place) if walk::is_directory(&self.objects, Place::Proc(place)) => {
                Object::ProcDirectory { listed: 0 }
            }
            Place::Proc(place) => Object::Text(self.proc_text(place)?),
            Place::Node(id) => self.open_node(tid, id, flags)?,
        };
        self.hold_place(place);
        let file = OpenFile::new(object, Some(place), flags & KEPT);
        let id = self.files.insert(file);
        self.hold_file(id);
        if directory == HERE || path.starts_with(b"/") {
            self.set_path(tid, id, path);
        } else {
            self.set_path_below(tid, id, directory, path);
        }
        let number = self.add_descriptor(tid, id, closes_on_exec(flags), 0);
        self.release_file(id);
        Ok(number?.into())
    }

    fn set_path_below(&mut self, tid: Tid, id: u32, directory: u32, path: &[u8]) {
        let above = self
            .file_id(tid, directory)
            .ok()
            .and_then(|above| self.file(above).path.clone());
        if let Some(above) = above {
            let mut whole = above.to_vec();
            whole.push(b'/');
            whole.extend_from_slice(path);
            self.set_path(tid, id, &whole);
        }
    }

    fn open_node(&mut self, tid: Tid, id: NodeId, flags: u32) -> Result<Object, Stop> {
        match &self.objects.node(id).kind {
            Kind::File(_) => {
                if flags & O_TRUNC != 0 {
                    self.objects.truncate(id, 0)?;
                    let now = self.wall();
                    let meta = &mut self.objects.node_mut(id).meta;
                    (meta.mtime, meta.ctime) = (now, now);
                }
                Ok(Object::File)
            }
            Kind::Directory(_) => Ok(Object::Directory {
                last: None,
                listed: 0,
            }),
            Kind::Link(_) => Err(Errno::ELOOP.into()),
            Kind::Socket => Err(Errno::ENXIO.into()),
            Kind::Fifo(pipe) => {
                let pipe = *pipe;
                self.open_fifo(tid, id, pipe, flags)
            }
            Kind::Device(major, minor) => {
                let numbers = (*major, *minor);
                Ok(self.open_device(tid, numbers, flags)?)
            }
        }
    }

    fn open_device(&mut self, tid: Tid, numbers: (u32, u32), flags: u32) -> Result<Object> {
        let takes = flags & O_NOCTTY == 0;
        match numbers {
            OWN_TERMINAL => {
                let number = self.process_of(tid).terminal.ok_or(Errno::ENXIO)?;
                self.open_terminal(tid, number, false)
            }
            TERMINAL_MAKER => self.make_terminal(tid),
            (TERMINALS, number) => self.open_terminal(tid, number, takes),
            (major, minor) => setup::device(major, minor)
                .map(Object::Device)
                .ok_or(Errno::ENXIO),
        }
    }

    /// Each end of a named pipe waits for the other.
    fn open_fifo(
        &mut self,
        tid: Tid,
        id: NodeId,
        pipe: Option<u32>,
        flags: u32,
    ) -> Result<Object, Stop> {
        let pipe = pipe.unwrap_or_else(|| self.pipes.insert(Pipe::new()));
        if let Kind::Fifo(slot) = &mut self.objects.node_mut(id).kind {
            *slot = Some(pipe);
        }
        let nonblocking = flags & O_NONBLOCK != 0;
        let mode = flags & O_ACCMODE;
        let resumed = self.thread(tid).opening == Some((pipe, mode));
        let ends = self.pipes.get_mut(pipe).ok_or(Errno::ENXIO)?;
        ends.node = Some(id);
        let (object, waits) = match mode {
            O_RDONLY => {
                if !resumed {
                    ends.readers += 1;
                    ends.opened.0 += 1;
                }
                (Object::PipeReader(pipe), ends.writers == 0 && !nonblocking)
            }
            O_WRONLY => {
                if nonblocking && ends.readers == 0 {
                    return Err(Errno::ENXIO.into());
                }
                if !resumed {
                    ends.writers += 1;
                    ends.opened.1 += 1;
                }
                (Object::PipeWriter(pipe), ends.readers == 0)
            }
            _ => {
                ends.readers += 1;
                ends.writers += 1;
                (Object::PipeBoth(pipe), false)
            }
        };
        // The other end may have come and gone while this one waited.
        let opened = match object {
            Object::PipeReader(_) => ends.opened.1,
            _ => ends.opened.0,
        };
        let seen = self.thread(tid).call.map_or(0, |call| call.done);
        if !resumed {
            self.wake(Key::Pipe(pipe));
        }
        if waits && (!resumed || opened + 1 == seen) {
            if let Some(call) = &mut self.thread(tid).call {
                call.done = opened + 1;
            }
            self.thread(tid).opening = Some((pipe, mode));
            return Err(self.block(tid, &[Key::Pipe(pipe)], None));
        }
        self.thread(tid).opening = None;
        Ok(object)
    }

    /// A thread opens no named pipe any more: it is no end of one.
    pub(crate) fn give_up_opening(&mut self, tid: Tid) {
        let thread = self.threads.get_mut(&tid);
        if let Some((pipe, mode)) = thread.and_then(|thread| thread.opening.take()) {
            self.close_pipe(pipe, mode == O_RDONLY, mode == O_WRONLY);
        }
    }

    /// A file in memory that has no place in the tree. It can't be sealed.
    pub(crate) fn memfd_create(&mut self, tid: Tid, name: u64, flags: u32) -> Outcome {
        const MOST_NAME: usize = 249;
        if flags & !(MFD_CLOEXEC | MFD_EXEC) != 0 {
            return Err(Errno::EINVAL.into());
        }
        let name = match self.string(tid, name, MOST_NAME + 1) {
            Err(Errno::ENAMETOOLONG) => return Err(Errno::EINVAL.into()),
            name => name?,
        };
        self.check_memory()?;
        let maker = self.maker(tid);
        let kind = setup::file();
        let id = self.objects.make(kind, 0o777, MEMORY_DEVICE, maker);
        self.objects.hold(id);
        let mut file = OpenFile::new(Object::File, Some(Place::Node(id)), O_RDWR);
        file.path = Some([b"/memfd:", &name[..], b" (deleted)"].concat().into());
        let flags = if flags & MFD_CLOEXEC == 0 {
            0
        } else {
            O_CLOEXEC
        };
        Ok(self.add_file(tid, file, flags)?.into())
    }

    /// A file without a name.
    fn open_nameless(
        &mut self,
        tid: Tid,
        directory: u32,
        path: &[u8],
        flags: u32,
        mode: u32,
    ) -> Outcome {
        let slot = self.resolve_at(tid, directory, path, Last::Follow)?;
        let Some(Place::Node(above)) = slot.found else {
            return Err(Errno::ENOENT.into());
        };
        if !self.objects.node(above).is_directory() {
            return Err(Errno::ENOTDIR.into());
        }
        if flags & O_ACCMODE == O_RDONLY {
            return Err(Errno::EINVAL.into());
        }
        let device = self.objects.node(above).meta.device;
        let maker = self.maker(tid);
        let mode = mode & 0o7777 & !self.process_of(tid).umask;
        let id = self.objects.make(setup::file(), mode, device, maker);
        self.objects.hold(id);
        let file = OpenFile::new(Object::File, Some(Place::Node(id)), flags & KEPT);
        Ok(self.add_file(tid, file, flags)?.into())
    }
}
