//! Waiting for several files at a time, and counters.

use alloc::vec::Vec;

use linux_raw_sys::general::{
    EFD_CLOEXEC, EFD_NONBLOCK, EFD_SEMAPHORE, O_RDWR, POLLERR, POLLHUP, POLLIN, POLLNVAL, POLLOUT,
    POLLRDHUP, POLLRDNORM, POLLWRNORM,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::errno::{Errno, Outcome};
use crate::kernel::Kernel;
use crate::process::files::{Device, FileId, Object, OpenFile};
use crate::streams::address::Kind;
use crate::streams::counter::Counter;
use crate::streams::socket::CAPACITY;
use crate::wait::{Key, Tid};

const NS: u64 = 1_000_000_000;
/// Most descriptors of one poll, and of one select.
const MOST_POLLED: u64 = 1 << 16;
const MOST_SELECTED: usize = 1024;

const IN: u32 = POLLIN | POLLRDNORM;
const OUT: u32 = POLLOUT | POLLWRNORM;

/// The kernel's `pollfd`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct PollFd {
    number: i32,
    events: u16,
    found: u16,
}

impl Kernel {
    /// What wakes those that wait for a file.
    pub(super) fn change_key(&self, id: FileId) -> Key {
        match self.files.get(id).map(|file| &file.object) {
            Some(
                Object::PipeReader(number) | Object::PipeWriter(number) | Object::PipeBoth(number),
            ) => Key::Pipe(*number),
            Some(Object::Socket(number)) => Key::Socket(*number),
            Some(Object::Terminal(number) | Object::Master(number)) => Key::Terminal(*number),
            Some(Object::Event(number)) => Key::Event(*number),
            Some(Object::Timer(number)) => Key::Timer(*number),
            Some(Object::Epoll(number)) => Key::Epoll(*number),
            Some(Object::Process { pid, .. }) => Key::End(*pid),
            Some(Object::Device(Device::Launcher)) => Key::Launcher,
            _ => Key::Time,
        }
    }

    /// What is ready at a file; adds what to wait for if it is not what is
    /// wanted.
    pub(super) fn readiness(&mut self, tid: Tid, id: FileId, keys: &mut Vec<Key>) -> u32 {
        keys.push(self.change_key(id));
        match self.file(id).object {
            Object::PipeReader(number) => self.reader(number),
            Object::PipeWriter(number) => self.writer(number),
            Object::PipeBoth(number) => self.reader(number) | self.writer(number),
            Object::Socket(number) => self.socket_readiness(number),
            Object::Epoll(number) => match self.epoll_is_ready(tid, number, keys) {
                true => IN,
                false => 0,
            },
            Object::Terminal(number) => {
                let Some(terminal) = self.terminals.get(number) else {
                    return POLLHUP;
                };
                let mut found = 0;
                if terminal.is_readable() {
                    found |= IN;
                }
                if terminal.has_room() {
                    found |= OUT;
                }
                if terminal.masters == 0 {
                    found |= POLLHUP | IN;
                }
                found
            }
            Object::Master(number) => {
                let Some(terminal) = self.terminals.get(number) else {
                    return POLLHUP;
                };
                let mut found = OUT;
                if terminal.printed() > 0 {
                    found |= IN;
                }
                if terminal.used && terminal.slaves == 0 {
                    found |= POLLHUP;
                }
                found
            }
            Object::Event(number) => {
                let counter = self.events.get(number);
                let readable = counter.is_some_and(|counter| counter.count > 0);
                let writable = counter.is_some_and(|counter| counter.has_room());
                (if readable { IN } else { 0 }) | if writable { OUT } else { 0 }
            }
            Object::Timer(number) => match self.timer_files.get(number) {
                Some(timer) if timer.expired > 0 => IN,
                _ => 0,
            },
            Object::Signals(set) => {
                let pid = self.pid_of(tid);
                keys.push(Key::Signals(pid));
                if self.pending_of(tid, set) != 0 {
                    IN
                } else {
                    0
                }
            }
            Object::Process { pid, started } => match self.has_ended(pid, started) {
                true => IN,
                false => 0,
            },
            Object::Device(Device::Console) => OUT,
            Object::Device(Device::Launcher) => {
                let mut found = 0;
                // To find nothing is to ask for a doorbell.
                if !self.from_launcher.is_empty() || !self.from_launcher.arm_consumer() {
                    found |= IN;
                }
                if self.to_launcher.space() > 0 || !self.to_launcher.arm_producer() {
                    found |= OUT;
                }
                found
            }
            _ => IN | OUT,
        }
    }

    fn socket_readiness(&self, id: u32) -> u32 {
        let Ok(socket) = self.sockets.get(id) else {
            return POLLHUP;
        };
        let mut found = 0;
        if socket.error.is_some() {
            found |= POLLERR | IN | OUT;
        }
        if socket.backlog.is_some() {
            return if socket.waiting.is_empty() {
                found
            } else {
                found | IN
            };
        }
        let stream = socket.kind != Kind::Datagram;
        let peer = socket.peer.and_then(|peer| self.sockets.get(peer).ok());
        if !socket.is_empty() || socket.reads_over {
            found |= IN;
        }
        if socket.reads_over {
            found |= POLLRDHUP;
        }
        if stream && (peer.is_none() || socket.reads_over && socket.writes_over) {
            found |= POLLHUP;
        }
        // Not for each byte of room.
        if peer.is_none_or(|peer| peer.room() >= CAPACITY / 3) {
            found |= OUT;
        }
        found
    }

    fn reader(&self, pipe: u32) -> u32 {
        match self.pipes.get(pipe) {
            None => POLLHUP,
            Some(pipe) => {
                let readable = if pipe.len() > 0 { IN } else { 0 };
                let over = if pipe.writers == 0 { POLLHUP } else { 0 };
                readable | over
            }
        }
    }

    fn writer(&self, pipe: u32) -> u32 {
        match self.pipes.get(pipe) {
            Some(pipe) if pipe.readers > 0 => match pipe.room() {
                0..crate::streams::pipe::ATOMIC => 0,
                _ => OUT,
            },
            _ => OUT | POLLERR,
        }
    }

    /// What is found at descriptors, of what is asked for; and what to wait
    /// for.
    fn poll_files(&mut self, tid: Tid, asked: &[(i32, u32)]) -> (Vec<u32>, Vec<Key>) {
        let mut keys = Vec::new();
        let mut all = Vec::with_capacity(asked.len());
        for (number, events) in asked {
            let Ok(number) = u32::try_from(*number) else {
                all.push(0);
                continue;
            };
            let Ok(id) = self.file_id(tid, number) else {
                all.push(POLLNVAL);
                continue;
            };
            let found = self.readiness(tid, id, &mut keys);
            all.push(found & (events | POLLERR | POLLHUP));
        }
        keys.sort();
        keys.dedup();
        if keys.is_empty() {
            keys.push(Key::Time);
        }
        (all, keys)
    }

    /// When a call that may wait `timeout` ns gives up.
    pub(super) fn deadline(&mut self, tid: Tid, timeout: Option<u64>) -> Option<u64> {
        let settled = self.thread(tid).call.and_then(|call| call.deadline);
        settled.or_else(|| timeout.map(|timeout| self.now().saturating_add(timeout)))
    }

    pub(crate) fn poll(&mut self, tid: Tid, address: u64, count: u64, timeout_ms: i32) -> Outcome {
        let timeout = u64::try_from(timeout_ms).ok().map(|ms| ms * 1_000_000);
        self.poll_for(tid, address, count, timeout)
    }

    pub(crate) fn ppoll(&mut self, tid: Tid, a: [u64; 6]) -> Outcome {
        let timeout = match a[2] {
            0 => None,
            address => Some(self.timespec(tid, address)?),
        };
        if a[3] != 0 {
            self.mask_for_call(tid, a[3])?;
        }
        self.poll_for(tid, a[0], a[1], timeout)
    }

    fn poll_for(&mut self, tid: Tid, address: u64, count: u64, timeout: Option<u64>) -> Outcome {
        if count > MOST_POLLED {
            return Err(Errno::EINVAL.into());
        }
        let mut list = Vec::new();
        for number in 0..count {
            let at = address.checked_add(number * 8).ok_or(Errno::EFAULT)?;
            list.push(self.get::<PollFd>(tid, at)?);
        }
        let asked: Vec<_> = list
            .iter()
            .map(|entry| (entry.number, u32::from(entry.events)))
            .collect();
        let (found, keys) = self.poll_files(tid, &asked);
        let ready = found.iter().filter(|found| **found != 0).count();
        let deadline = self.deadline(tid, timeout);
        if ready == 0 && deadline.is_none_or(|at| at > self.now()) {
            return Err(self.block(tid, &keys, deadline));
        }
        for ((entry, found), number) in list.iter_mut().zip(found).zip(0..) {
            entry.found = u16::try_from(found).unwrap_or(0);
            self.put(tid, address + number * 8, entry)?;
        }
        Ok(ready as u64)
    }

    pub(crate) fn select(&mut self, tid: Tid, a: [u64; 6]) -> Outcome {
        let timeout = match a[4] {
            0 => None,
            address => {
                let [seconds, us]: [u64; 2] = self.get(tid, address)?;
                if us.cast_signed() < 0 || seconds.cast_signed() < 0 {
                    return Err(Errno::EINVAL.into());
                }
                let us = us.saturating_mul(1000);
                Some(seconds.saturating_mul(NS).saturating_add(us))
            }
        };
        self.select_for(tid, a, timeout)
    }

    pub(crate) fn pselect(&mut self, tid: Tid, a: [u64; 6]) -> Outcome {
        let timeout = match a[4] {
            0 => None,
            address => Some(self.timespec(tid, address)?),
        };
        if a[5] != 0 {
            let [mask, _]: [u64; 2] = self.get(tid, a[5])?;
            if mask != 0 {
                self.mask_for_call(tid, mask)?;
            }
        }
        self.select_for(tid, a, timeout)
    }

    fn select_for(&mut self, tid: Tid, a: [u64; 6], timeout: Option<u64>) -> Outcome {
        let count = usize::try_from(super::low(a[0])).unwrap_or(usize::MAX);
        if super::signed(a[0]) < 0 {
            return Err(Errno::EINVAL.into());
        }
        let count = count.min(MOST_SELECTED);
        let len = count.div_ceil(64);
        let mut sets = [[0_u64; MOST_SELECTED / 64]; 3];
        for (set, address) in sets.iter_mut().zip(&a[1..4]) {
            if *address != 0 {
                self.read_user(tid, *address, set[..len].as_mut_bytes())?;
            }
        }
        let wanted = [IN | POLLHUP, OUT | POLLERR, 0];
        let mut asked = Vec::new();
        for number in 0..count {
            let bit = 1 << (number % 64);
            let events = sets
                .iter()
                .zip([IN, OUT, 0])
                .filter(|(set, _)| set[number / 64] & bit != 0)
                .fold(None, |all, (_, events)| Some(all.unwrap_or(0) | events));
            if let Some(events) = events {
                asked.push((i32::try_from(number).expect("checked"), events));
            }
        }
        let (found, keys) = self.poll_files(tid, &asked);
        if found.contains(&POLLNVAL) {
            return Err(Errno::EBADF.into());
        }
        let mut results = [[0_u64; MOST_SELECTED / 64]; 3];
        let mut ready = 0;
        for ((number, _), found) in asked.iter().zip(found) {
            let number = usize::try_from(*number).expect("it was an index");
            let bit = 1 << (number % 64);
            for ((result, set), wanted) in results.iter_mut().zip(&sets).zip(wanted) {
                if set[number / 64] & bit != 0 && found & wanted != 0 {
                    result[number / 64] |= bit;
                    ready += 1;
                }
            }
        }
        let deadline = self.deadline(tid, timeout);
        if ready == 0 && deadline.is_none_or(|at| at > self.now()) {
            return Err(self.block(tid, &keys, deadline));
        }
        for (result, address) in results.iter().zip(&a[1..4]) {
            if *address != 0 {
                self.write_user(tid, *address, result[..len].as_bytes())?;
            }
        }
        Ok(ready)
    }

    pub(crate) fn eventfd(&mut self, tid: Tid, count: u32, flags: u32) -> Outcome {
        if flags & !(EFD_SEMAPHORE | EFD_CLOEXEC | EFD_NONBLOCK) != 0 {
            return Err(Errno::EINVAL.into());
        }
        self.check_memory()?;
        let event = self.events.insert(Counter {
            count: count.into(),
            semaphore: flags & EFD_SEMAPHORE != 0,
        });
        let file = OpenFile::new(Object::Event(event), None, O_RDWR | flags & EFD_NONBLOCK);
        Ok(self.add_file(tid, file, flags)?.into())
    }
}
