//! epoll: waiting for many files again and again.

use alloc::vec::Vec;

use linux_raw_sys::general::{
    EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, EPOLLEXCLUSIVE, O_CLOEXEC, O_RDWR, POLLERR,
    POLLHUP,
};

use crate::errno::{Errno, Outcome, Result};
use crate::kernel::Kernel;
use crate::process::files::{FileId, Object, OpenFile};
use crate::streams::epoll::{Epoll, Watch, Watched};
use crate::wait::{Key, Tid};

/// Bytes of a program's `epoll_event`, which is packed.
const EVENT: u64 = 12;
/// Most events of one call.
const MOST_EVENTS: u64 = i32::MAX as u64 / EVENT;
/// Most watches of one instance.
const MOST_WATCHES: usize = 1 << 16;
/// Instances that may watch each other in a row.
const DEEPEST: u32 = 5;

impl Kernel {
    pub(crate) fn epoll_create(&mut self, tid: Tid, flags: u32) -> Outcome {
        if flags & !O_CLOEXEC != 0 {
            return Err(Errno::EINVAL.into());
        }
        self.check_memory()?;
        let epoll = self.epolls.insert(Epoll::default());
        let file = OpenFile::new(Object::Epoll(epoll), None, O_RDWR);
        Ok(self.add_file(tid, file, flags)?.into())
    }

    fn epoll_at(&mut self, tid: Tid, number: u32) -> Result<u32> {
        let id = self.file_id(tid, number)?;
        match self.file(id).object {
            Object::Epoll(epoll) => Ok(epoll),
            _ => Err(Errno::EINVAL),
        }
    }

    pub(crate) fn epoll_ctl(
        &mut self,
        tid: Tid,
        number: u32,
        operation: u32,
        target: u32,
        address: u64,
    ) -> Outcome {
        let me = self.file_id(tid, number)?;
        let file = self.file_id(tid, target)?;
        let id = self.epoll_at(tid, number)?;
        let wanted = match operation {
            EPOLL_CTL_DEL => None,
            _ => {
                let [events, low, high]: [u32; 3] = self.get(tid, address)?;
                Some((events, u64::from(high) << 32 | u64::from(low)))
            }
        };
        if me == file {
            return Err(Errno::EINVAL.into());
        }
        let inner = match self.file(file).object {
            // They are always ready.
            Object::File | Object::Directory { .. } | Object::ProcDirectory { .. } => {
                return Err(Errno::EPERM.into());
            }
            Object::Epoll(inner) if operation == EPOLL_CTL_ADD => Some(inner),
            _ => None,
        };
        if inner.is_some_and(|inner| self.watches(inner, id, DEEPEST)) {
            return Err(Errno::ELOOP.into());
        }
        let watched = (target, file);
        let epoll = self.epolls.get_mut(id).ok_or(Errno::EBADF)?;
        let old = epoll.watches.get(&watched).copied();
        match (operation, old, wanted) {
            (EPOLL_CTL_ADD, Some(_), _) => return Err(Errno::EEXIST.into()),
            (EPOLL_CTL_ADD, None, Some((events, data))) => {
                if epoll.watches.len() >= MOST_WATCHES {
                    return Err(Errno::ENOSPC.into());
                }
                self.check_memory()?;
                self.set_watch(id, watched, events, data);
            }
            (EPOLL_CTL_MOD, Some(old), Some((events, data))) => {
                if (old.events | events) & EPOLLEXCLUSIVE != 0 {
                    return Err(Errno::EINVAL.into());
                }
                self.drop_watch(id, watched);
                self.set_watch(id, watched, events, data);
            }
            (EPOLL_CTL_DEL, Some(_), _) => self.drop_watch(id, watched),
            (EPOLL_CTL_MOD | EPOLL_CTL_DEL, None, _) => return Err(Errno::ENOENT.into()),
            _ => return Err(Errno::EINVAL.into()),
        }
        // Who waits there has more to look at.
        self.wake(Key::Epoll(id));
        Ok(0)
    }

    /// Whether instance `id` watches `other`, or one that does, or so many in
    /// a row that it can't be told.
    fn watches(&self, id: u32, other: u32, depth: u32) -> bool {
        if id == other || depth == 0 {
            return true;
        }
        let Some(epoll) = self.epolls.get(id) else {
            return false;
        };
        epoll.watches.keys().any(|(_, file)| {
            let object = self.files.get(*file).map(|file| &file.object);
            matches!(object, Some(Object::Epoll(next)) if self.watches(*next, other, depth - 1))
        })
    }

    fn set_watch(&mut self, id: u32, watched: Watched, events: u32, data: u64) {
        let watch = Watch {
            // Those are told whether asked for or not.
            events: events | POLLERR | POLLHUP,
            data,
            seen: None,
        };
        if watch.edge_triggered() {
            let key = self.change_key(watched.1);
            self.queues.watch(key);
        }
        self.file(watched.1).watchers.push((id, watched.0));
        if let Some(epoll) = self.epolls.get_mut(id) {
            epoll.watches.insert(watched, watch);
        }
    }

    fn drop_watch(&mut self, id: u32, watched: Watched) {
        let watchers = &mut self.file(watched.1).watchers;
        watchers.retain(|watcher| *watcher != (id, watched.0));
        let epoll = self.epolls.get_mut(id);
        let watch = epoll.and_then(|epoll| epoll.watches.remove(&watched));
        if watch.is_some_and(|watch| watch.edge_triggered()) {
            let key = self.change_key(watched.1);
            self.queues.unwatch(key);
        }
    }

    /// A file is about to go: nobody watches it any more.
    pub(crate) fn forget_watched(&mut self, file: FileId) {
        for (epoll, number) in core::mem::take(&mut self.file(file).watchers) {
            self.drop_watch(epoll, (number, file));
        }
    }

    /// An instance is closed for good.
    pub(crate) fn close_epoll(&mut self, id: u32) {
        let watches: Vec<_> = match self.epolls.get(id) {
            Some(epoll) => epoll.watches.keys().copied().collect(),
            None => return,
        };
        for watched in watches {
            self.drop_watch(id, watched);
        }
        self.epolls.remove(id);
    }

    /// Whether an instance has something to tell; and what to wait for if not.
    pub(super) fn epoll_is_ready(&mut self, tid: Tid, id: u32, keys: &mut Vec<Key>) -> bool {
        keys.push(Key::Epoll(id));
        let Some(epoll) = self.epolls.get(id) else {
            return false;
        };
        let watches: Vec<_> = epoll
            .watches
            .iter()
            .map(|(key, watch)| (*key, *watch))
            .collect();
        let mut ready = false;
        for ((_, file), mut watch) in watches {
            let found = self.readiness(tid, file, keys);
            let change = self.change_of(file, &watch);
            ready |= watch.report(found, change) != 0;
        }
        ready
    }

    /// The latest change of a file, for a watch that tells changes only.
    fn change_of(&mut self, file: FileId, watch: &Watch) -> u64 {
        match watch.edge_triggered() {
            true => self.queues.change(self.change_key(file)),
            false => 0,
        }
    }

    pub(crate) fn epoll_wait(
        &mut self,
        tid: Tid,
        number: u32,
        address: u64,
        most: u64,
        timeout: Option<u64>,
    ) -> Outcome {
        let id = self.epoll_at(tid, number)?;
        if most == 0 || most > MOST_EVENTS {
            return Err(Errno::EINVAL.into());
        }
        let epoll = self.epolls.get(id).ok_or(Errno::EBADF)?;
        let turns: Vec<_> = epoll.turns().collect();
        let mut keys = Vec::from([Key::Epoll(id)]);
        let mut count = 0;
        for watched in turns {
            if count == most {
                break;
            }
            let found = self.readiness(tid, watched.1, &mut keys);
            let watch = |kernel: &Self| kernel.epolls.get(id)?.watches.get(&watched).copied();
            let Some(mut watch) = watch(self) else {
                continue;
            };
            let change = self.change_of(watched.1, &watch);
            let told = watch.report(found, change);
            if told == 0 {
                continue;
            }
            let data = [told, super::low(watch.data), super::low(watch.data >> 32)];
            if let Err(errno) = self.put(tid, address + count * EVENT, &data) {
                return if count > 0 {
                    Ok(count)
                } else {
                    Err(errno.into())
                };
            }
            count += 1;
            if let Some(epoll) = self.epolls.get_mut(id) {
                epoll.watches.insert(watched, watch);
                epoll.last = Some(watched);
            }
        }
        let deadline = self.deadline(tid, timeout);
        if count == 0 && deadline.is_none_or(|at| at > self.now()) {
            keys.sort();
            keys.dedup();
            return Err(self.block(tid, &keys, deadline));
        }
        Ok(count)
    }

    /// `epoll_wait` and `epoll_pwait`, with a time-out in ms.
    pub(crate) fn epoll_wait_ms(&mut self, tid: Tid, a: [u64; 6], mask: u64) -> Outcome {
        let timeout = u64::try_from(super::signed(a[3]))
            .ok()
            .map(|ms| ms * 1_000_000);
        let most = u64::try_from(super::signed(a[2])).map_err(|_| Errno::EINVAL)?;
        if mask != 0 {
            self.mask_for_call(tid, mask)?;
        }
        self.epoll_wait(tid, super::low(a[0]), a[1], most, timeout)
    }

    pub(crate) fn epoll_pwait2(&mut self, tid: Tid, a: [u64; 6]) -> Outcome {
        let timeout = match a[3] {
            0 => None,
            address => Some(self.timespec(tid, address)?),
        };
        let most = u64::try_from(super::signed(a[2])).map_err(|_| Errno::EINVAL)?;
        if a[4] != 0 {
            self.mask_for_call(tid, a[4])?;
        }
        self.epoll_wait(tid, super::low(a[0]), a[1], most, timeout)
    }
}
