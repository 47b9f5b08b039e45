//! Open files and the numbers that processes have for them.

use alloc::boxed::Box;
use alloc::vec::Vec;

use linux_raw_sys::general::{O_ACCMODE, O_APPEND, O_NONBLOCK, O_RDONLY, O_RDWR, O_WRONLY};

use crate::errno::{Errno, Result};
use crate::fs::Place;
use crate::fs::node::NodeId;
use crate::process::Pid;

/// An open file by its number in the table of all.
pub(crate) type FileId = u32;

/// What a character device does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    Null,
    Zero,
    Full,
    Random,
    /// The operator's console: can only be written to.
    Console,
    /// The way to the launcher.
    Launcher,
}

/// What an open file is.
#[derive(Clone, Debug)]
pub(crate) enum Object {
    /// A regular file.
    File,
    /// A directory, and the name that was listed last.
    Directory {
        last: Option<Box<[u8]>>,
        listed: u64,
    },
    /// A file of /proc: its text when it was opened.
    Text(Vec<u8>),
    /// A directory of /proc.
    ProcDirectory {
        listed: u64,
    },
    Device(Device),
    PipeReader(u32),
    PipeWriter(u32),
    /// A named pipe opened for both.
    PipeBoth(u32),
    Socket(u32),
    /// The program's side of a terminal, and the other.
    Terminal(u32),
    Master(u32),
    Event(u32),
    Timer(u32),
    /// Signals of this set, of who reads them.
    Signals(u64),
    Epoll(u32),
    /// A process, and when it began, as its number may be another's later.
    Process {
        pid: Pid,
        started: u64,
    },
    /// Opened for its name only.
    PathOnly,
}

/// An open file: what `open` makes and `dup` and `fork` share.
#[derive(Debug)]
pub(crate) struct OpenFile {
    pub(crate) object: Object,
    /// What it was opened as.
    pub(crate) place: Option<Place>,
    /// The flags of `open`, without those that only matter then.
    pub(crate) flags: u32,
    pub(crate) offset: u64,
    /// Descriptors, and calls that are at it.
    pub(crate) uses: u32,
    /// The path, for /proc.
    pub(crate) path: Option<Box<[u8]>>,
    /// The epoll instances that watch it, and by which numbers.
    pub(crate) watchers: Vec<(u32, u32)>,
}

impl OpenFile {
    pub(crate) fn new(object: Object, place: Option<Place>, flags: u32) -> Self {
        Self {
            object,
            place,
            flags,
            offset: 0,
            uses: 0,
            path: None,
            watchers: Vec::new(),
        }
    }

    pub(crate) fn may_read(&self) -> bool {
        [O_RDONLY, O_RDWR].contains(&(self.flags & O_ACCMODE))
    }

    pub(crate) fn may_write(&self) -> bool {
        [O_WRONLY, O_RDWR].contains(&(self.flags & O_ACCMODE))
    }

    pub(crate) fn is_nonblocking(&self) -> bool {
        self.flags & O_NONBLOCK != 0
    }

    pub(crate) fn appends(&self) -> bool {
        self.flags & O_APPEND != 0
    }

    /// The node that it is, if it is one.
    pub(crate) fn node(&self) -> Option<NodeId> {
        match self.place {
            Some(Place::Node(id)) => Some(id),
            _ => None,
        }
    }
}

/// A process's number for an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) file: FileId,
    /// It is closed when a new program starts.
    pub(crate) close_on_exec: bool,
}

/// A process's open files by number. The uses of files are counted by whoever
/// changes this.
#[derive(Clone, Debug, Default)]
pub(crate) struct Descriptors(Vec<Option<Descriptor>>);

impl Descriptors {
    pub(crate) fn get(&self, number: u32) -> Result<Descriptor> {
        let slot = self.0.get(number as usize);
        slot.copied().flatten().ok_or(Errno::EBADF)
    }

    pub(crate) fn get_mut(&mut self, number: u32) -> Result<&mut Descriptor> {
        let slot = self.0.get_mut(number as usize);
        slot.and_then(Option::as_mut).ok_or(Errno::EBADF)
    }

    /// Gives a file the lowest free number from `least` on and below `limit`.
    pub(crate) fn add(&mut self, descriptor: Descriptor, least: u32, limit: u64) -> Result<u32> {
        let mut number = least as usize;
        while self.0.get(number).is_some_and(Option::is_some) {
            number += 1;
        }
        if number as u64 >= limit {
            return Err(Errno::EMFILE);
        }
        if number >= self.0.len() {
            self.0.resize(number + 1, None);
        }
        self.0[number] = Some(descriptor);
        u32::try_from(number).map_err(|_| Errno::EMFILE)
    }

    /// Puts a file at a number; returns what was there.
    pub(crate) fn put(&mut self, number: u32, descriptor: Descriptor) -> Option<Descriptor> {
        let at = number as usize;
        if at >= self.0.len() {
            self.0.resize(at + 1, None);
        }
        self.0[at].replace(descriptor)
    }

    pub(crate) fn remove(&mut self, number: u32) -> Result<Descriptor> {
        let slot = self.0.get_mut(number as usize);
        slot.and_then(Option::take).ok_or(Errno::EBADF)
    }

    /// All of them with their numbers.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, Descriptor)> + '_ {
        (0..)
            .zip(&self.0)
            .filter_map(|(number, slot)| Some((number, (*slot)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_number_is_given() {
        let file = |file| Descriptor {
            file,
            close_on_exec: false,
        };
        let mut table = Descriptors::default();
        for number in 0..4 {
            assert_eq!(table.add(file(number), 0, 1024), Ok(number));
        }
        assert_eq!(table.remove(1), Ok(file(1)));
        assert_eq!(table.remove(1), Err(Errno::EBADF));
        assert_eq!(table.add(file(9), 0, 1024), Ok(1));
        assert_eq!(table.add(file(9), 10, 1024), Ok(10));
        assert_eq!(table.add(file(9), 0, 4), Err(Errno::EMFILE));
        assert_eq!(table.put(2, file(7)), Some(file(2)));
        assert_eq!(table.iter().count(), 5);
        assert_eq!(table.get(u32::MAX), Err(Errno::EBADF));
    }
}
