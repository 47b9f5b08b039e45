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
    /// The rings to and from the launcher.
    Launcher,
    /// A lock on this file, or on a part of it.
    Lock(u32),
    /// A child of this process.
    Children(u32),
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
