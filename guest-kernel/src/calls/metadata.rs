//! What files are: stat and its kin, permissions, owners, times, sizes.

use linux_raw_sys::general::{
    AT_EACCESS, AT_EMPTY_PATH, AT_SYMLINK_NOFOLLOW, S_IFCHR, S_IFIFO, S_IFMT, S_IFSOCK, S_ISGID,
    S_ISUID, UTIME_NOW, UTIME_OMIT, stat, statx, statx_timestamp,
};
use zerocopy::IntoBytes;

use super::HERE;
use crate::errno::{Errno, Outcome, Result};
use crate::fs::node::{Kind, Meta, NodeId};
use crate::fs::proc::ProcPlace;
use crate::fs::setup::device_number;
use crate::fs::walk::{Last, may, right};
use crate::fs::{PROC_DEVICE, Place};
use crate::kernel::Kernel;
use crate::process::files::{FileId, Object};
use crate::wait::Tid;

const NS: u64 = 1_000_000_000;
/// Filled into `statx`: everything but the time of birth.
const STATX_BASIC: u32 = 0x7ff;

/// What `stat` tells.
#[derive(Clone, Copy, Debug)]
struct Attributes {
    meta: Meta,
    size: u64,
    blocks: u64,
    /// The device that it is.
    device: u64,
}

impl Attributes {
    /// Of something that has no node.
    fn plain(mode: u32, device: u32, inode: u64, now: u64) -> Self {
        Self {
            meta: Meta {
                mode,
                uid: 0,
                gid: 0,
                links: 1,
                device,
                inode,
                atime: now,
                ctime: now,
                mtime: now,
            },
            size: 0,
            blocks: 0,
            device: 0,
        }
    }

    /// The kernel's `struct stat`.
    fn to_stat(self) -> [u64; size_of::<stat>() / 8] {
        let meta = self.meta;
        [
            meta.device.into(),
            meta.inode,
            meta.links.into(),
            u64::from(meta.uid) << 32 | u64::from(meta.mode),
            meta.gid.into(),
            self.device,
            self.size,
            4096,
            self.blocks,
            meta.atime / NS,
            meta.atime % NS,
            meta.mtime / NS,
            meta.mtime % NS,
            meta.ctime / NS,
            meta.ctime % NS,
            0,
            0,
            0,
        ]
    }
}

impl Kernel {
    fn node_attributes(&self, id: NodeId) -> Attributes {
        let node = self.objects.node(id);
        let device = match node.kind {
            Kind::Device(major, minor) => device_number(major, minor),
            _ => 0,
        };
        Attributes {
            meta: node.meta,
            size: node.size(),
            blocks: node.blocks(),
            device,
        }
    }

    fn place_attributes(&mut self, place: Place) -> Attributes {
        if let Place::Proc(ProcPlace::Nameless(pid, number)) = place
            && let Some(process) = self.processes.get(&pid)
            && let Ok(descriptor) = process.files.get(number)
        {
            return self.file_attributes(descriptor.file);
        }
        match place {
            Place::Node(id) => self.node_attributes(id),
            Place::Proc(place) => {
                let now = self.wall();
                Attributes::plain(place.mode(), PROC_DEVICE, place.inode(), now)
            }
        }
    }

    fn file_attributes(&mut self, id: FileId) -> Attributes {
        if let Some(place) = self.file(id).place {
            return self.place_attributes(place);
        }
        const NAMELESS_DEVICE: u32 = 9;
        let now = self.wall();
        let (mode, inode) = match self.file(id).object {
            Object::PipeReader(pipe) | Object::PipeWriter(pipe) | Object::PipeBoth(pipe) => {
                (S_IFIFO | 0o600, pipe)
            }
            Object::Socket(socket) => (S_IFSOCK | 0o777, socket),
            Object::Device(_) | Object::Master(_) | Object::Terminal(_) => (S_IFCHR | 0o620, id),
            _ => (0o600, id),
        };
        Attributes::plain(mode, NAMELESS_DEVICE, u64::from(inode) + 1, now)
    }

    fn attributes_at(
        &mut self,
        tid: Tid,
        directory: u32,
        address: u64,
        flags: u32,
    ) -> Result<Attributes> {
        let path = match (address, flags & AT_EMPTY_PATH) {
            (0, AT_EMPTY_PATH) => alloc::vec![],
            _ => self.path(tid, address)?,
        };
        if path.is_empty() && flags & AT_EMPTY_PATH != 0 && directory != HERE {
            let id = self.file_id(tid, directory)?;
            return Ok(self.file_attributes(id));
        }
        let path = match path.is_empty() && flags & AT_EMPTY_PATH != 0 {
            true => b".".to_vec(),
            false => path,
        };
        let place = self.place_at(tid, directory, &path, flags)?;
        Ok(self.place_attributes(place))
    }

    /// What a path names, that must be there.
    pub(crate) fn place_at(
        &mut self,
        tid: Tid,
        directory: u32,
        path: &[u8],
        flags: u32,
    ) -> Result<Place> {
        let last = match flags & AT_SYMLINK_NOFOLLOW {
            0 => Last::Follow,
            _ => Last::Keep,
        };
        let slot = self.resolve_at(tid, directory, path, last)?;
        slot.found.ok_or(Errno::ENOENT)
    }

    /// The same, for what has a node.
    fn node_at(&mut self, tid: Tid, directory: u32, address: u64, flags: u32) -> Result<NodeId> {
        let path = self.path(tid, address)?;
        if path.is_empty() && flags & AT_EMPTY_PATH != 0 {
            let id = self.file_id(tid, directory)?;
            return self.file(id).node().ok_or(Errno::EBADF);
        }
        match self.place_at(tid, directory, &path, flags)? {
            Place::Node(id) => Ok(id),
            Place::Proc(_) => Err(Errno::EPERM),
        }
    }

    pub(crate) fn stat(
        &mut self,
        tid: Tid,
        directory: u32,
        path: u64,
        address: u64,
        flags: u32,
    ) -> Outcome {
        let attributes = self.attributes_at(tid, directory, path, flags)?;
        self.put(tid, address, &attributes.to_stat())?;
        Ok(0)
    }

    pub(crate) fn fstat(&mut self, tid: Tid, number: u32, address: u64) -> Outcome {
        let id = self.file_id(tid, number)?;
        let attributes = self.file_attributes(id);
        self.put(tid, address, &attributes.to_stat())?;
        Ok(0)
    }

    pub(crate) fn statx(
        &mut self,
        tid: Tid,
        directory: u32,
        path: u64,
        flags: u32,
        _mask: u32,
        address: u64,
    ) -> Outcome {
        let found = self.attributes_at(tid, directory, path, flags)?;
        let meta = found.meta;
        let mut bytes = [0; size_of::<statx>()];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, STATX_BASIC.as_bytes());
        put(4, 4096_u32.as_bytes());
        put(16, meta.links.as_bytes());
        put(20, meta.uid.as_bytes());
        put(24, meta.gid.as_bytes());
        put(28, &meta.mode.to_le_bytes()[..2]);
        put(32, meta.inode.as_bytes());
        put(40, found.size.as_bytes());
        put(48, found.blocks.as_bytes());
        const TIME: usize = size_of::<statx_timestamp>();
        for (number, time) in [(0, meta.atime), (2, meta.ctime), (3, meta.mtime)] {
            put(64 + number * TIME, (time / NS).as_bytes());
            put(72 + number * TIME, &(time % NS).to_le_bytes()[..4]);
        }
        let part = |number: u64, shift: u32| super::low(number >> shift & 0xfff);
        put(128, part(found.device, 8).as_bytes());
        put(132, super::low(found.device & 0xff).as_bytes());
        put(140, meta.device.as_bytes());
        self.write_user(tid, address, &bytes)?;
        Ok(0)
    }

    pub(crate) fn statfs(&mut self, tid: Tid, path: u64, address: u64) -> Outcome {
        let path = self.path(tid, path)?;
        let place = self.place_at(tid, HERE, &path, 0)?;
        self.put_statfs(tid, place, address)
    }

    pub(crate) fn fstatfs(&mut self, tid: Tid, number: u32, address: u64) -> Outcome {
        let id = self.file_id(tid, number)?;
        let place = self.file(id).place.unwrap_or(Place::Node(self.root));
        self.put_statfs(tid, place, address)
    }

    fn put_statfs(&mut self, tid: Tid, place: Place, address: u64) -> Outcome {
        const TMPFS: u64 = 0x0102_1994;
        const PROC: u64 = 0x9fa0;
        let kind = match place {
            Place::Node(_) => TMPFS,
            Place::Proc(_) => PROC,
        };
        let total = self.objects.frames.total() as u64;
        let free = self.objects.frames.available() as u64;
        let nodes = self.objects.count() as u64;
        let words = [
            kind,
            4096,
            total,
            free,
            free,
            nodes + free,
            free,
            0,
            255,
            4096,
            0,
            0,
            0,
            0,
            0,
        ];
        self.put(tid, address, &words)?;
        Ok(0)
    }

    pub(crate) fn access(
        &mut self,
        tid: Tid,
        directory: u32,
        path: u64,
        rights: u32,
        flags: u32,
    ) -> Outcome {
        if rights & !7 != 0 {
            return Err(Errno::EINVAL.into());
        }
        let path = self.path(tid, path)?;
        let place = self.place_at(tid, directory, &path, flags & AT_SYMLINK_NOFOLLOW)?;
        let mut viewer = self.viewer(tid);
        if flags & AT_EACCESS == 0 {
            let owner = &self.process_of(tid).owner;
            (viewer.uid, viewer.gid) = (owner.user.real, owner.group.real);
        }
        let allowed = match place {
            Place::Node(id) => may(&self.objects, id, &viewer, rights),
            Place::Proc(ProcPlace::Nameless(..)) => rights & right::EXECUTE == 0,
            Place::Proc(place) => {
                rights & right::WRITE == 0 && place.mode() >> 6 & rights == rights
            }
        };
        if allowed {
            Ok(0)
        } else {
            Err(Errno::EACCES.into())
        }
    }

    pub(crate) fn chmod(&mut self, tid: Tid, directory: u32, path: u64, mode: u32) -> Outcome {
        let id = self.node_at(tid, directory, path, 0)?;
        self.set_mode(tid, id, mode)
    }

    pub(crate) fn fchmod(&mut self, tid: Tid, number: u32, mode: u32) -> Outcome {
        let file = self.file_id(tid, number)?;
        let id = self.file(file).node().ok_or(Errno::EINVAL)?;
        self.set_mode(tid, id, mode)
    }

    /// Whether a thread may change what belongs to a node's owner.
    fn owns(&mut self, tid: Tid, id: NodeId) -> Result<()> {
        let uid = self.process_of(tid).owner.user.effective;
        match uid == 0 || uid == self.objects.node(id).meta.uid {
            true => Ok(()),
            false => Err(Errno::EPERM),
        }
    }

    fn set_mode(&mut self, tid: Tid, id: NodeId, mode: u32) -> Outcome {
        self.owns(tid, id)?;
        let now = self.wall();
        let meta = &mut self.objects.node_mut(id).meta;
        meta.mode = meta.mode & S_IFMT | mode & 0o7777;
        meta.ctime = now;
        Ok(0)
    }

    pub(crate) fn chown(
        &mut self,
        tid: Tid,
        directory: u32,
        path: u64,
        uid: u32,
        gid: u32,
        flags: u32,
    ) -> Outcome {
        let id = self.node_at(tid, directory, path, flags)?;
        self.set_owner(tid, id, uid, gid)
    }

    pub(crate) fn fchown(&mut self, tid: Tid, number: u32, uid: u32, gid: u32) -> Outcome {
        let file = self.file_id(tid, number)?;
        let id = self.file(file).node().ok_or(Errno::EINVAL)?;
        self.set_owner(tid, id, uid, gid)
    }

    fn set_owner(&mut self, tid: Tid, id: NodeId, uid: u32, gid: u32) -> Outcome {
        if !self.process_of(tid).owner.is_privileged() {
            return Err(Errno::EPERM.into());
        }
        let now = self.wall();
        let meta = &mut self.objects.node_mut(id).meta;
        if uid != u32::MAX {
            meta.uid = uid;
        }
        if gid != u32::MAX {
            meta.gid = gid;
        }
        if meta.mode & S_IFMT == linux_raw_sys::general::S_IFREG {
            meta.mode &= !(S_ISUID | S_ISGID);
        }
        meta.ctime = now;
        Ok(0)
    }

    pub(crate) fn utimensat(
        &mut self,
        tid: Tid,
        directory: u32,
        path: u64,
        times: u64,
        flags: u32,
    ) -> Outcome {
        let id = if path == 0 {
            let file = self.file_id(tid, directory)?;
            self.file(file).node().ok_or(Errno::EACCES)?
        } else {
            self.node_at(tid, directory, path, flags)?
        };
        let now = self.wall();
        let values: [[u64; 2]; 2] = match times {
            0 => [[0, UTIME_NOW.into()]; 2],
            address => self.get(tid, address)?,
        };
        let time = |[seconds, ns]: [u64; 2], old: u64| match u32::try_from(ns) {
            Ok(UTIME_NOW) => Ok(now),
            Ok(UTIME_OMIT) => Ok(old),
            _ if ns < NS => Ok(seconds.saturating_mul(NS).saturating_add(ns)),
            _ => Err(Errno::EINVAL),
        };
        self.owns(tid, id)?;
        let meta = &mut self.objects.node_mut(id).meta;
        let (atime, mtime) = (time(values[0], meta.atime)?, time(values[1], meta.mtime)?);
        (meta.atime, meta.mtime, meta.ctime) = (atime, mtime, now);
        Ok(0)
    }

    pub(crate) fn truncate(&mut self, tid: Tid, path: u64, size: u64) -> Outcome {
        let id = self.node_at(tid, HERE, path, 0)?;
        if self.objects.node(id).is_directory() {
            return Err(Errno::EISDIR.into());
        }
        let viewer = self.viewer(tid);
        if !may(&self.objects, id, &viewer, right::WRITE) {
            return Err(Errno::EACCES.into());
        }
        self.set_size(id, size)
    }

    pub(crate) fn ftruncate(&mut self, tid: Tid, number: u32, size: u64) -> Outcome {
        let id = self.file_id(tid, number)?;
        let file = self.file(id);
        match (&file.object, file.node()) {
            (Object::File, Some(node)) if file.may_write() => self.set_size(node, size),
            _ => Err(Errno::EINVAL.into()),
        }
    }

    fn set_size(&mut self, id: NodeId, size: u64) -> Outcome {
        if size.cast_signed() < 0 {
            return Err(Errno::EINVAL.into());
        }
        self.objects.truncate(id, size)?;
        let now = self.wall();
        let meta = &mut self.objects.node_mut(id).meta;
        (meta.mtime, meta.ctime) = (now, now);
        Ok(0)
    }

    pub(crate) fn fallocate(
        &mut self,
        tid: Tid,
        number: u32,
        mode: u32,
        offset: u64,
        len: u64,
    ) -> Outcome {
        let id = self.writable_file(tid, number)?;
        let node = self.file(id).node().ok_or(Errno::ENODEV)?;
        match mode {
            0 => {
                let end = offset.checked_add(len).ok_or(Errno::EFBIG)?;
                let size = self.objects.node(node).size().max(end);
                self.set_size(node, size)
            }
            // Keep the size: there is nothing to reserve.
            1 => Ok(0),
            _ => Err(Errno::EOPNOTSUPP.into()),
        }
    }
}
