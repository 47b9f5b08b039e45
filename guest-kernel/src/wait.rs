//! Threads that wait, by what they wait for.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

/// A thread by its number.
pub(crate) type Tid = u32;

/// What a thread can wait for. Who changes one wakes all that wait for it;
/// they look again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Key {
    /// A pipe's fill, or the number of its ends.
    Pipe(u32),
    /// A terminal's queues.
    Terminal(u32),
    /// A counter.
    Event(u32),
    /// A timer that can be read.
    Timer(u32),
    /// Blocked signals of this process.
    Signals(u32),
    /// What an epoll instance watches.
    Epoll(u32),
    /// A socket's queue, its connections, or its end.
    Socket(u32),
    /// The rings to and from the launcher.
    Launcher,
    /// A lock on this file, or on a part of it.
    Lock(u32),
    /// A child of this process.
    Children(u32),
    /// The end of this process.
    End(u32),
    /// The program that this process is to start, after vfork.
    Vfork(u32),
    /// Nothing but time and signals.
    Time,
}

/// All that wait.
#[derive(Debug, Default)]
pub(crate) struct Queues {
    waiters: BTreeMap<Key, Vec<Tid>>,
    /// When who is woken without anything having happened, in ns.
    deadlines: BTreeSet<(u64, Tid)>,
    /// How often what is watched for changes has changed, and by how many it
    /// is watched.
    changes: BTreeMap<Key, (u64, u32)>,
}

impl Queues {
    pub(crate) fn add(&mut self, tid: Tid, keys: &[Key], deadline: Option<u64>) {
        for key in keys {
            self.waiters.entry(*key).or_default().push(tid);
        }
        self.deadlines.extend(deadline.map(|at| (at, tid)));
    }

    /// Takes a thread off its queues.
    pub(crate) fn remove(&mut self, tid: Tid, keys: &[Key], deadline: Option<u64>) {
        for key in keys {
            if let Some(waiters) = self.waiters.get_mut(key) {
                waiters.retain(|other| *other != tid);
                if waiters.is_empty() {
                    self.waiters.remove(key);
                }
            }
        }
        if let Some(at) = deadline {
            self.deadlines.remove(&(at, tid));
        }
    }

    /// Counts changes of `key` from now on, for one more.
    pub(crate) fn watch(&mut self, key: Key) {
        self.changes.entry(key).or_default().1 += 1;
    }

    /// For one less.
    pub(crate) fn unwatch(&mut self, key: Key) {
        if let Some((_, watchers)) = self.changes.get_mut(&key) {
            *watchers -= 1;
            if *watchers == 0 {
                self.changes.remove(&key);
            }
        }
    }

    /// `key` has changed.
    pub(crate) fn note_change(&mut self, key: Key) {
        if let Some((count, _)) = self.changes.get_mut(&key) {
            *count += 1;
        }
    }

    /// How often a watched key has changed.
    pub(crate) fn change(&self, key: Key) -> u64 {
        self.changes.get(&key).map_or(0, |(count, _)| *count)
    }

    /// Who waits for `key`.
    pub(crate) fn waiting(&self, key: Key) -> Vec<Tid> {
        self.waiters.get(&key).cloned().unwrap_or_default()
    }

    /// A thread whose time has come.
    pub(crate) fn due(&self, now: u64) -> Option<Tid> {
        let (at, tid) = self.deadlines.first()?;
        (*at <= now).then_some(*tid)
    }

    /// When the next one's comes.
    pub(crate) fn next_deadline(&self) -> Option<u64> {
        Some(self.deadlines.first()?.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_counted_while_somebody_watches() {
        let mut queues = Queues::default();
        let key = Key::Event(1);
        queues.note_change(key);
        assert_eq!(queues.change(key), 0);
        queues.watch(key);
        queues.watch(key);
        queues.note_change(key);
        queues.unwatch(key);
        assert_eq!(queues.change(key), 1);
        queues.unwatch(key);
        assert!(queues.changes.is_empty());
    }

    #[test]
    fn threads_are_found_by_what_they_wait_for_and_leave_nothing_behind() {
        let mut queues = Queues::default();
        let keys = [Key::Pipe(1), Key::Terminal(1)];
        queues.add(7, &keys, Some(100));
        queues.add(8, &keys[..1], None);
        assert_eq!(queues.waiting(Key::Pipe(1)), [7, 8]);
        assert_eq!(queues.waiting(Key::Terminal(1)), [7]);
        assert_eq!(queues.waiting(Key::Terminal(2)), []);
        assert_eq!((queues.due(99), queues.due(100)), (None, Some(7)));
        queues.remove(7, &keys, Some(100));
        queues.remove(8, &keys[..1], None);
        assert!(queues.waiters.is_empty());
        assert_eq!(queues.next_deadline(), None);
    }
}
