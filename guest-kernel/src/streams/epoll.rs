//! What an epoll instance watches.

use alloc::collections::BTreeMap;

use linux_raw_sys::general::{EPOLLET, EPOLLONESHOT};

use crate::process::files::FileId;

/// A watched file: the number it was added by, and what it was then.
pub(crate) type Watched = (u32, FileId);

/// What is wanted of one file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Watch {
    /// Events and flags; without events it is asleep until it is changed.
    pub(crate) events: u32,
    /// The program's own word.
    pub(crate) data: u64,
    /// The change of the file that was reported last, if only changes are
    /// to be.
    pub(crate) seen: Option<u64>,
}

/// An epoll instance.
#[derive(Debug, Default)]
pub(crate) struct Epoll {
    pub(crate) watches: BTreeMap<Watched, Watch>,
    /// Who was reported last: others come first next time.
    pub(crate) last: Option<Watched>,
}

impl Watch {
    pub(crate) fn edge_triggered(&self) -> bool {
        self.events & EPOLLET != 0
    }

    /// What is to be told of what was `found`, where `change` is the latest
    /// change of the file; and takes note that it is.
    pub(crate) fn report(&mut self, found: u32, change: u64) -> u32 {
        let told = found & self.events;
        if told == 0 || self.edge_triggered() && self.seen == Some(change) {
            return 0;
        }
        self.seen = Some(change);
        if self.events & EPOLLONESHOT != 0 {
            // How it is told stays.
            self.events &= EPOLLET;
        }
        told & !(EPOLLET | EPOLLONESHOT)
    }
}

impl Epoll {
    /// The watches in the order in which they get their turn.
    pub(crate) fn turns(&self) -> impl Iterator<Item = Watched> + '_ {
        let split = self.last.unwrap_or((u32::MAX, u32::MAX));
        let after = self.watches.range((
            core::ops::Bound::Excluded(split),
            core::ops::Bound::Unbounded,
        ));
        after
            .chain(self.watches.range(..=split))
            .map(|(watched, _)| *watched)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(events: u32) -> Watch {
        Watch {
            events,
            data: 0,
            seen: None,
        }
    }

    #[test]
    fn levels_are_told_as_long_as_they_last_and_edges_once() {
        let mut level = watch(1);
        assert_eq!([level.report(5, 7), level.report(5, 7)], [1, 1]);
        let mut edge = watch(1 | EPOLLET);
        assert_eq!(
            [edge.report(0, 7), edge.report(1, 7), edge.report(1, 7)],
            [0, 1, 0]
        );
        assert_eq!(edge.report(1, 8), 1);
        let mut once = watch(1 | EPOLLONESHOT);
        assert_eq!([once.report(1, 7), once.report(1, 8)], [1, 0]);
    }

    #[test]
    fn everybody_gets_a_turn() {
        let mut epoll = Epoll::default();
        for number in 0..3 {
            epoll.watches.insert((number, 9), watch(1));
        }
        let turns = |epoll: &Epoll| epoll.turns().map(|(number, _)| number).collect::<Vec<_>>();
        assert_eq!(turns(&epoll), [0, 1, 2]);
        epoll.last = Some((1, 9));
        assert_eq!(turns(&epoll), [2, 0, 1]);
    }
}
