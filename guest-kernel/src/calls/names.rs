//! Names: directories, links, and where a process is.

use linux_raw_sys::general::{
    AT_REMOVEDIR, AT_SYMLINK_FOLLOW, RENAME_NOREPLACE, S_IFIFO, S_IFMT, S_IFREG, S_IFSOCK,
};

use super::HERE;
use crate::errno::{Errno, Outcome};
use crate::fs::Place;
use crate::fs::names::{self, Remove};
use crate::fs::node::{Directory, Entry, Kind, Objects};
use crate::fs::proc::{ProcPlace, ProcView};
use crate::fs::setup::{self, device_parts, is_device};
use crate::fs::walk::{Last, is_directory, path_of};
use crate::kernel::Kernel;
use crate::mem::index;
use crate::process::files::Object;
use crate::wait::Tid;

/// Bytes of a `linux_dirent64` before the name.
const DIRENT: usize = 19;

impl Kernel {
    pub(crate) fn mkdir(&mut self, tid: Tid, directory: u32, path: u64, mode: u32) -> Outcome {
        let kind = Kind::Directory(Directory::empty());
        self.make(tid, directory, path, kind, mode & 0o7777)
    }

    pub(crate) fn mknod(
        &mut self,
        tid: Tid,
        directory: u32,
        path: u64,
        mode: u32,
        device: u64,
    ) -> Outcome {
        let kind = match mode & S_IFMT {
            0 | S_IFREG => setup::file(),
            S_IFIFO => Kind::Fifo(None),
            S_IFSOCK => Kind::Socket,
            _ if is_device(mode) => {
                if !self.process_of(tid).owner.is_privileged() {
                    return Err(Errno::EPERM.into());
                }
                let (major, minor) = device_parts(device);
                Kind::Device(major, minor)
            }
            _ => return Err(Errno::EINVAL.into()),
        };
        self.make(tid, directory, path, kind, mode)
    }

    fn make(&mut self, tid: Tid, directory: u32, path: u64, kind: Kind, mode: u32) -> Outcome {
        let path = self.path(tid, path)?;
        self.check_memory()?;
        let slot = self.resolve_at(tid, directory, &path, Last::Keep)?;
        if slot.must_be_directory && slot.found.is_none() && !matches!(kind, Kind::Directory(_)) {
            return Err(Errno::ENOENT.into());
        }
        let viewer = self.viewer(tid);
        let maker = self.maker(tid);
        let mode = mode & !self.process_of(tid).umask;
        names::create(&mut self.objects, &slot, &viewer, kind, mode, maker)?;
        Ok(0)
    }

    pub(crate) fn unlink(&mut self, tid: Tid, directory: u32, path: u64, flags: u32) -> Outcome {
        let path = self.path(tid, path)?;
        let slot = self.resolve_at(tid, directory, &path, Last::Keep)?;
        let what = match flags & AT_REMOVEDIR {
            0 => Remove::File,
            _ => Remove::Directory,
        };
        if what == Remove::Directory && path.ends_with(b".") && slot.name.is_empty() {
            return Err(Errno::EINVAL.into());
        }
        let viewer = self.viewer(tid);
        let now = self.wall();
        names::remove(&mut self.objects, &slot, &viewer, what, now)?;
        Ok(0)
    }

    pub(crate) fn rename(
        &mut self,
        tid: Tid,
        from: (u32, u64),
        to: (u32, u64),
        flags: u32,
    ) -> Outcome {
        if flags & !RENAME_NOREPLACE != 0 {
            return Err(Errno::EINVAL.into());
        }
        let (old, new) = (self.path(tid, from.1)?, self.path(tid, to.1)?);
        let source = self.resolve_at(tid, from.0, &old, Last::Keep)?;
        let target = self.resolve_at(tid, to.0, &new, Last::Keep)?;
        let viewer = self.viewer(tid);
        let now = self.wall();
        let replace = flags & RENAME_NOREPLACE == 0;
        names::rename(&mut self.objects, &source, &target, &viewer, replace, now)?;
        Ok(0)
    }

    pub(crate) fn link(
        &mut self,
        tid: Tid,
        from: (u32, u64),
        to: (u32, u64),
        flags: u32,
    ) -> Outcome {
        let (old, new) = (self.path(tid, from.1)?, self.path(tid, to.1)?);
        let last = match flags & AT_SYMLINK_FOLLOW {
            0 => Last::Keep,
            _ => Last::Follow,
        };
        let found = self.resolve_at(tid, from.0, &old, last)?.found;
        let Place::Node(id) = found.ok_or(Errno::ENOENT)? else {
            return Err(Errno::EXDEV.into());
        };
        let slot = self.resolve_at(tid, to.0, &new, Last::Keep)?;
        let viewer = self.viewer(tid);
        let now = self.wall();
        names::link(&mut self.objects, id, &slot, &viewer, now)?;
        Ok(0)
    }

    pub(crate) fn symlink(&mut self, tid: Tid, target: u64, directory: u32, path: u64) -> Outcome {
        let target = self.path(tid, target)?;
        let path = self.path(tid, path)?;
        if target.is_empty() {
            return Err(Errno::ENOENT.into());
        }
        self.check_memory()?;
        let slot = self.resolve_at(tid, directory, &path, Last::Keep)?;
        let viewer = self.viewer(tid);
        let maker = self.maker(tid);
        names::symlink(&mut self.objects, &target, &slot, &viewer, maker)?;
        Ok(0)
    }

    pub(crate) fn readlink(
        &mut self,
        tid: Tid,
        directory: u32,
        path: u64,
        address: u64,
        len: u64,
    ) -> Outcome {
        let path = self.path(tid, path)?;
        let place = match path.is_empty() && directory != HERE {
            true => {
                let id = self.file_id(tid, directory)?;
                self.file(id).place.ok_or(Errno::EINVAL)?
            }
            false => {
                let slot = self.resolve_at(tid, directory, &path, Last::Keep)?;
                slot.found.ok_or(Errno::ENOENT)?
            }
        };
        let text = match place {
            Place::Node(id) => match &self.objects.node(id).kind {
                Kind::Link(target) => target.to_vec(),
                _ => return Err(Errno::EINVAL.into()),
            },
            Place::Proc(place) => self.proc_link(tid, place)?,
        };
        if len == 0 {
            return Err(Errno::EINVAL.into());
        }
        let count = text.len().min(usize::try_from(len).unwrap_or(usize::MAX));
        self.write_user(tid, address, &text[..count])?;
        Ok(count as u64)
    }

    fn proc_link(&mut self, tid: Tid, place: ProcPlace) -> Result<alloc::vec::Vec<u8>, Errno> {
        let me = self.pid_of(tid);
        let proc = ProcView {
            processes: &self.processes,
            files: &self.files,
            me,
        };
        if let Some(text) = proc.link(place) {
            // What `self` is, without the way there.
            let short = text.strip_prefix(b"/proc/").map(<[u8]>::to_vec);
            return Ok(match place {
                ProcPlace::Myself | ProcPlace::Mounts => short.unwrap_or(text),
                _ => text,
            });
        }
        match proc.jump(place) {
            Some(Place::Node(id)) if self.objects.node(id).is_directory() => {
                path_of(&mut self.objects, self.root, id).ok_or(Errno::ENOENT)
            }
            Some(Place::Proc(_)) => Ok(b"/proc".to_vec()),
            _ => Err(Errno::EINVAL),
        }
    }

    pub(crate) fn chdir(&mut self, tid: Tid, path: u64) -> Outcome {
        let path = self.path(tid, path)?;
        let slot = self.resolve(tid, &path, Last::Follow)?;
        self.enter(tid, slot.found.ok_or(Errno::ENOENT)?)
    }

    pub(crate) fn fchdir(&mut self, tid: Tid, number: u32) -> Outcome {
        let id = self.file_id(tid, number)?;
        let place = self.file(id).place.ok_or(Errno::ENOTDIR)?;
        self.enter(tid, place)
    }

    fn enter(&mut self, tid: Tid, place: Place) -> Outcome {
        self.check_directory(tid, place)?;
        self.hold_place(place);
        let old = core::mem::replace(&mut self.process_of(tid).directory, place);
        self.release_place(old);
        Ok(0)
    }

    fn check_directory(&mut self, tid: Tid, place: Place) -> Result<(), Errno> {
        use crate::fs::walk::{may, right};
        if !is_directory(&self.objects, place) {
            return Err(Errno::ENOTDIR);
        }
        let viewer = self.viewer(tid);
        match place {
            Place::Node(id) if !may(&self.objects, id, &viewer, right::EXECUTE) => {
                Err(Errno::EACCES)
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn chroot(&mut self, tid: Tid, path: u64) -> Outcome {
        let path = self.path(tid, path)?;
        let slot = self.resolve(tid, &path, Last::Follow)?;
        let place = slot.found.ok_or(Errno::ENOENT)?;
        self.check_directory(tid, place)?;
        if !self.process_of(tid).owner.is_privileged() {
            return Err(Errno::EPERM.into());
        }
        let Place::Node(id) = place else {
            return Err(Errno::EACCES.into());
        };
        self.objects.hold(id);
        let old = core::mem::replace(&mut self.process_of(tid).root, id);
        self.objects.release(old);
        Ok(0)
    }

    pub(crate) fn getcwd(&mut self, tid: Tid, address: u64, len: u64) -> Outcome {
        let process = self.process_of(tid);
        let (root, place) = (process.root, process.directory);
        let mut path = match place {
            Place::Node(id) => path_of(&mut self.objects, root, id).ok_or(Errno::ENOENT)?,
            Place::Proc(place) => proc_path(place),
        };
        path.push(0);
        if path.len() as u64 > len {
            return Err(Errno::ERANGE.into());
        }
        self.write_user(tid, address, &path)?;
        Ok(path.len() as u64)
    }

    pub(crate) fn umask(&mut self, tid: Tid, mask: u32) -> Outcome {
        let old = core::mem::replace(&mut self.process_of(tid).umask, mask & 0o777);
        Ok(old.into())
    }

    /// Lists a directory, as much as fits.
    pub(crate) fn getdents(&mut self, tid: Tid, number: u32, address: u64, len: u64) -> Outcome {
        let id = self.file_id(tid, number)?;
        let place = self.file(id).place.ok_or(Errno::ENOTDIR)?;
        let limit = usize::try_from(len).unwrap_or(usize::MAX).min(1 << 16);
        let mut bytes = alloc::vec::Vec::new();
        let object = self.file(id).object.clone();
        let object = match (object, place) {
            (
                Object::Directory {
                    mut last,
                    mut listed,
                },
                Place::Node(node),
            ) => {
                let parent = self.objects.directory(node)?.parent;
                for (at, name, id) in [(0, &b"."[..], node), (1, b"..", parent)] {
                    if listed != at {
                        continue;
                    }
                    let meta = self.objects.node(id).meta;
                    if !push(&mut bytes, limit, meta.inode, listed + 1, meta.mode, name) {
                        break;
                    }
                    listed += 1;
                }
                while listed >= 2
                    && let Some((name, entry)) =
                        next_name(&mut self.objects, node, last.as_deref())?
                {
                    let (inode, mode) = match entry {
                        Entry::Node(id) => {
                            let meta = self.objects.node(id).meta;
                            (meta.inode, meta.mode)
                        }
                        _ => (ProcPlace::Root.inode(), ProcPlace::Root.mode()),
                    };
                    if !push(&mut bytes, limit, inode, listed + 1, mode, &name) {
                        break;
                    }
                    listed += 1;
                    last = Some(name);
                }
                Object::Directory { last, listed }
            }
            (Object::ProcDirectory { mut listed }, Place::Proc(place)) => {
                let me = self.pid_of(tid);
                let proc = ProcView {
                    processes: &self.processes,
                    files: &self.files,
                    me,
                };
                let dots = [".", ".."].map(alloc::string::String::from);
                let names = dots.into_iter().chain(proc.list(place));
                for name in names.skip(index(listed)) {
                    let name = name.as_bytes();
                    let found = proc.lookup(place, name).unwrap_or(place);
                    if !push(
                        &mut bytes,
                        limit,
                        found.inode(),
                        listed + 1,
                        found.mode(),
                        name,
                    ) {
                        break;
                    }
                    listed += 1;
                }
                Object::ProcDirectory { listed }
            }
            _ => return Err(Errno::ENOTDIR.into()),
        };
        let before = match &self.file(id).object {
            Object::Directory { listed, .. } | Object::ProcDirectory { listed } => *listed,
            _ => 0,
        };
        let after = match &object {
            Object::Directory { listed, .. } | Object::ProcDirectory { listed } => *listed,
            _ => 0,
        };
        // There is more, and not one of them fits.
        if bytes.is_empty() && before == after && limit < 280 {
            return Err(Errno::EINVAL.into());
        }
        self.write_user(tid, address, &bytes)?;
        self.file(id).object = object;
        Ok(bytes.len() as u64)
    }
}

/// A name and what it stands for.
type Named = (alloc::boxed::Box<[u8]>, Entry);

/// The name behind `last` and what it stands for.
fn next_name(
    objects: &mut Objects,
    node: u32,
    last: Option<&[u8]>,
) -> Result<Option<Named>, Errno> {
    use core::ops::Bound;
    let entries = &objects.directory(node)?.entries;
    let from = last.map_or(Bound::Unbounded, Bound::Excluded);
    let next = entries.range::<[u8], _>((from, Bound::Unbounded)).next();
    let Some((name, _)) = next else {
        return Ok(None);
    };
    let name = name.clone();
    // Broken entries are listed, too: as nothing in particular.
    let entry = objects.entry(node, &name).unwrap_or(Entry::Proc);
    Ok(Some((name, entry)))
}

/// Appends an entry; whether it fitted.
fn push(
    bytes: &mut alloc::vec::Vec<u8>,
    limit: usize,
    inode: u64,
    next: u64,
    mode: u32,
    name: &[u8],
) -> bool {
    let len = (DIRENT + name.len() + 1).next_multiple_of(8);
    if bytes.len() + len > limit {
        return false;
    }
    let end = bytes.len() + len;
    bytes.extend(inode.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    bytes.extend(u16::try_from(len).unwrap_or(u16::MAX).to_le_bytes());
    let [kind, ..] = ((mode & S_IFMT) >> 12).to_le_bytes();
    bytes.push(kind);
    bytes.extend_from_slice(name);
    bytes.resize(end, 0);
    true
}

/// Where a place of /proc is, near enough for a working directory.
fn proc_path(place: ProcPlace) -> alloc::vec::Vec<u8> {
    use alloc::format;
    match place {
        ProcPlace::Process(pid) => format!("/proc/{pid}").into_bytes(),
        ProcPlace::Descriptors(pid) => format!("/proc/{pid}/fd").into_bytes(),
        ProcPlace::Tasks(pid) => format!("/proc/{pid}/task").into_bytes(),
        ProcPlace::Task(pid, tid) => format!("/proc/{pid}/task/{tid}").into_bytes(),
        ProcPlace::Sys => b"/proc/sys".to_vec(),
        ProcPlace::SysKernel => b"/proc/sys/kernel".to_vec(),
        ProcPlace::SysVm => b"/proc/sys/vm".to_vec(),
        ProcPlace::SysNet => b"/proc/sys/net".to_vec(),
        ProcPlace::SysNetCore => b"/proc/sys/net/core".to_vec(),
        _ => b"/proc".to_vec(),
    }
}
