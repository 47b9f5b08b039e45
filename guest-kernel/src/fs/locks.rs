//! Locks on parts of files, and on files as wholes. They bind only those who
//! ask.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use super::node::NodeId;
use crate::process::Pid;
use crate::process::files::FileId;

/// Who holds a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    /// A process, by `fcntl`.
    Process(Pid),
    /// An open file: all that share it.
    File(FileId),
}

/// A lock on the bytes from `first` to `last`, that one included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lock {
    pub(crate) holder: Holder,
    pub(crate) first: u64,
    pub(crate) last: u64,
    /// Nobody else may have one.
    pub(crate) exclusive: bool,
}

impl Lock {
    fn meets(&self, other: &Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

/// The locks of all files.
#[derive(Debug, Default)]
pub(crate) struct Locks(BTreeMap<NodeId, Vec<Lock>>);

/// Longest chain of who waits for whom that is followed.
const LONGEST_CHAIN: usize = 10;

impl Locks {
    /// A lock in the way of another.
    pub(crate) fn conflict(&self, file: NodeId, wanted: &Lock) -> Option<Lock> {
        let locks = self.0.get(&file)?;
        let in_the_way = |lock: &&Lock| {
            lock.holder != wanted.holder
                && lock.meets(wanted)
                && (lock.exclusive || wanted.exclusive)
        };
        locks.iter().find(in_the_way).copied()
    }

    /// Whether who wants a lock would wait for itself, where the others wait
    /// for these.
    pub(crate) fn deadlocks(
        &self,
        file: NodeId,
        wanted: &Lock,
        waits: impl Iterator<Item = (NodeId, Lock)> + Clone,
    ) -> bool {
        let mut next = (file, *wanted);
        for _ in 0..LONGEST_CHAIN {
            let Some(other) = self.conflict(next.0, &next.1) else {
                return false;
            };
            if other.holder == wanted.holder {
                return true;
            }
            match waits.clone().find(|(_, lock)| lock.holder == other.holder) {
                Some(wait) => next = wait,
                None => return false,
            }
        }
        false
    }

    /// Takes a lock, in place of what its holder has of these bytes. Nothing
    /// may be in the way.
    pub(crate) fn set(&mut self, file: NodeId, lock: Lock) {
        self.clear(file, &lock);
        self.0.entry(file).or_default().push(lock);
    }

    /// Gives back what the holder has of these bytes; whether it had any.
    pub(crate) fn clear(&mut self, file: NodeId, range: &Lock) -> bool {
        let Some(locks) = self.0.get_mut(&file) else {
            return false;
        };
        let mut rest = Vec::with_capacity(locks.len());
        let mut had = false;
        for lock in locks.drain(..) {
            if lock.holder != range.holder || !lock.meets(range) {
                rest.push(lock);
                continue;
            }
            had = true;
            if lock.first < range.first {
                let last = range.first - 1;
                rest.push(Lock { last, ..lock });
            }
            if lock.last > range.last {
                let first = range.last + 1;
                rest.push(Lock { first, ..lock });
            }
        }
        *locks = rest;
        if locks.is_empty() {
            self.0.remove(&file);
        }
        had
    }

    /// Gives back all that a holder has of a file; whether it had any.
    pub(crate) fn release(&mut self, file: NodeId, holder: Holder) -> bool {
        let all = Lock {
            holder,
            first: 0,
            last: u64::MAX,
            exclusive: false,
        };
        self.clear(file, &all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: NodeId = 3;

    fn lock(pid: Pid, first: u64, last: u64, exclusive: bool) -> Lock {
        Lock {
            holder: Holder::Process(pid),
            first,
            last,
            exclusive,
        }
    }

    #[test]
    fn readers_share_and_writers_do_not() {
        let mut locks = Locks::default();
        locks.set(FILE, lock(1, 0, 9, false));
        assert_eq!(locks.conflict(FILE, &lock(2, 5, 20, false)), None);
        let conflict = locks.conflict(FILE, &lock(2, 9, 9, true));
        assert_eq!(conflict, Some(lock(1, 0, 9, false)));
        assert_eq!(locks.conflict(FILE, &lock(2, 10, 20, true)), None);
        assert_eq!(locks.conflict(FILE + 1, &lock(2, 0, 9, true)), None);
        assert_eq!(locks.conflict(FILE, &lock(1, 0, 9, true)), None, "its own");
        locks.set(FILE, lock(1, 0, u64::MAX, true));
        assert!(
            locks
                .conflict(FILE, &lock(2, u64::MAX, u64::MAX, false))
                .is_some()
        );
    }

    #[test]
    fn who_would_wait_for_itself_is_found() {
        let mut locks = Locks::default();
        for pid in 1..=3 {
            locks.set(FILE, lock(pid, pid.into(), pid.into(), true));
        }
        // 2 waits for 1, and 3 for 2.
        let waits = [(FILE, lock(3, 2, 2, true)), (FILE, lock(2, 1, 1, true))];
        let deadlocks = |lock| locks.deadlocks(FILE, &lock, waits.iter().copied());
        assert!(deadlocks(lock(1, 3, 3, true)) && deadlocks(lock(1, 2, 2, true)));
        assert!(!deadlocks(lock(4, 3, 3, true)) && !deadlocks(lock(1, 4, 4, true)));
    }

    #[test]
    fn giving_back_the_middle_leaves_both_ends() {
        let mut locks = Locks::default();
        locks.set(FILE, lock(1, 10, 29, true));
        assert!(locks.clear(FILE, &lock(1, 15, 19, false)));
        assert!(locks.conflict(FILE, &lock(2, 14, 14, false)).is_some());
        assert!(locks.conflict(FILE, &lock(2, 15, 19, true)).is_none());
        assert!(locks.conflict(FILE, &lock(2, 20, 20, false)).is_some());
        assert!(!locks.clear(FILE, &lock(2, 0, u64::MAX, false)), "not its");
        // A weaker lock in part of a stronger one.
        locks.set(FILE, lock(1, 25, 40, false));
        assert!(locks.conflict(FILE, &lock(2, 24, 24, false)).is_some());
        assert!(locks.conflict(FILE, &lock(2, 25, 40, false)).is_none());
        assert!(locks.release(FILE, Holder::Process(1)));
        assert!(!locks.release(FILE, Holder::Process(1)) && locks.0.is_empty());
    }
}
