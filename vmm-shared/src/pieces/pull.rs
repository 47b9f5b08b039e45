//! What a node is asked to take over.
//!
//! Whoever wants memory to move leaves a *pull* in the record of the node that
//! is to have it, and rings that node. One stands at a time, until it has
//! ended. Its id tells the asker, or the asker's successor, that it is still
//! that one.
//!
//! ```text
//!   0   the pull that stands, or 0        who asks; its end clears it
//!   1   id and pieces taken               the node
//!   2   id and how it ended               the node
//!   3   pieces taken by all pulls         the node
//!   4   TSC ticks that copying took       the node
//!   5   TSC ticks of the longest time a piece was out of reach
//! ```

use core::sync::atomic::Ordering;

use crate::addr::NodeId;
use crate::coherence::Words;

const PULL: usize = 0;
const TAKEN: usize = 1;
const ENDED: usize = 2;
const ALL_TAKEN: usize = 3;
const COPYING: usize = 4;
const LONGEST: usize = 5;

const ID: u32 = 32;
const NODE: u32 = 25;
const COUNT: u64 = (1 << NODE) - 1;
const NODES: u64 = 0x3f;
/// Set in every pull, so that none is 0.
const STANDS: u64 = 1 << 31;

/// What its asker knows a pull by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PullId(pub u32);

/// Take pieces over from a node, as far as it has any, until there are so many
/// that have been taken under this id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pull {
    /// What the asker knows it by.
    pub id: PullId,
    /// The node that gives them now.
    pub from: NodeId,
    /// How many; less than 2^25.
    pub count: u32,
}

impl Pull {
    fn to_raw(self) -> u64 {
        u64::from(self.id.0) << ID
            | STANDS
            | (u64::from(self.from.0) & NODES) << NODE
            | u64::from(self.count) & COUNT
    }

    fn from_raw(raw: u64) -> Option<Self> {
        (raw & STANDS != 0).then(|| Self {
            id: PullId(high(raw)),
            from: NodeId(u16::try_from(raw >> NODE & NODES).expect("6 bits")),
            count: u32::try_from(raw & COUNT).expect("25 bits"),
        })
    }
}

/// How a pull has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All pieces have been taken that were there to be taken.
    Done,
    /// The node has no room for more.
    NoRoom,
    /// The map or the table of instruction coherence is damaged.
    Damaged,
}

impl Ended {
    const fn to_raw(self) -> u32 {
        match self {
            Self::Done => 1,
            Self::NoRoom => 2,
            Self::Damaged => 3,
        }
    }

    /// Garbage means that nobody knows.
    const fn from_raw(raw: u32) -> Self {
        match raw {
            1 => Self::Done,
            2 => Self::NoRoom,
            _ => Self::Damaged,
        }
    }
}

/// How far a pull has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Pieces taken.
    pub taken: u32,
    /// How it ended, if it has.
    pub ended: Option<Ended>,
}

/// Another pull stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the node takes memory over already")]
pub struct Pulling;

/// The record of one node.
#[derive(Debug)]
pub struct PullRecord<'a, W: Words> {
    words: &'a W,
    start: usize,
}

impl<'a, W: Words> PullRecord<'a, W> {
    pub(super) const fn new(words: &'a W, start: usize) -> Self {
        Self { words, start }
    }

    fn load(&self, word: usize) -> u64 {
        // Acquire: pairs with `store`.
        self.words.load(self.start + word, Ordering::Acquire)
    }

    fn store(&self, word: usize, value: u64) {
        // Release: what was written before is visible with it.
        self.words
            .store(self.start + word, value, Ordering::Release);
    }

    /// Asks for it. The node must be rung.
    ///
    /// # Errors
    /// If another stands.
    pub fn ask(&self, pull: Pull) -> Result<(), Pulling> {
        // AcqRel: how the one before has ended has been seen.
        self.words
            .compare_exchange(self.start + PULL, 0, pull.to_raw(), Ordering::AcqRel)
            .map(drop)
            .map_err(|_| Pulling)
    }

    /// Lets a pull that stands take no more: it ends after the piece at hand.
    /// Nothing happens to one that has ended.
    pub fn curtail(&self, pull: Pull) {
        let shorter = Pull { count: 0, ..pull };
        // AcqRel: as in `ask`. A failure means that it has ended.
        let _ = self.words.compare_exchange(
            self.start + PULL,
            pull.to_raw(),
            shorter.to_raw(),
            Ordering::AcqRel,
        );
    }

    /// The pull that stands, if one does: one load, for the run loop.
    #[must_use]
    pub fn standing(&self) -> Option<Pull> {
        Pull::from_raw(self.load(PULL))
    }

    /// What has become of the pull with this id; `None` if it has never been
    /// asked for, or another has come after it.
    #[must_use]
    pub fn progress(&self, id: PullId) -> Option<Progress> {
        // First, so that its end is not missed.
        let stands = self.standing().is_some_and(|pull| pull.id == id);
        let of_id = |raw: u64| (high(raw) == id.0).then(|| low(raw));
        let taken = of_id(self.load(TAKEN));
        let ended = of_id(self.load(ENDED)).filter(|raw| *raw != 0);
        (stands || ended.is_some()).then(|| Progress {
            taken: taken.unwrap_or(0),
            ended: ended.filter(|_| !stands).map(Ended::from_raw),
        })
    }

    /// How many pieces a pull has taken, for the node itself.
    #[must_use]
    pub fn taken(&self, pull: Pull) -> u32 {
        let raw = self.load(TAKEN);
        if high(raw) == pull.id.0 { low(raw) } else { 0 }
    }

    /// One more. Only for the node itself; times in TSC ticks.
    pub fn took_one(&self, pull: Pull, copying: u64, out_of_reach: u64) {
        let taken = self.taken(pull).saturating_add(1);
        self.store(COPYING, self.load(COPYING).wrapping_add(copying));
        self.store(LONGEST, self.load(LONGEST).max(out_of_reach));
        self.store(ALL_TAKEN, self.load(ALL_TAKEN).wrapping_add(1));
        self.store(TAKEN, with_id(pull.id, taken));
    }

    /// It is over. Only for the node itself.
    pub fn end(&self, pull: Pull, how: Ended) {
        self.store(TAKEN, with_id(pull.id, self.taken(pull)));
        self.store(ENDED, with_id(pull.id, how.to_raw()));
        self.store(PULL, 0);
    }

    /// Pieces that the node has taken so far, for all pulls.
    #[must_use]
    pub fn all_taken(&self) -> u64 {
        self.load(ALL_TAKEN)
    }

    /// TSC ticks that it has spent copying them.
    #[must_use]
    pub fn copying(&self) -> u64 {
        self.load(COPYING)
    }

    /// TSC ticks of the longest time for which a piece was out of the guest's
    /// reach.
    #[must_use]
    pub fn longest(&self) -> u64 {
        self.load(LONGEST)
    }
}

fn with_id(id: PullId, value: u32) -> u64 {
    u64::from(id.0) << ID | u64::from(value)
}

fn high(raw: u64) -> u32 {
    u32::try_from(raw >> ID).expect("32 bits")
}

fn low(raw: u64) -> u32 {
    u32::try_from(raw & u64::from(u32::MAX)).expect("32 bits")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::testing::leaked;

    #[test]
    fn a_pull_stands_until_it_has_ended_and_is_known_by_its_id() {
        let memory = leaked(1);
        let record = PullRecord::new(&memory, 0);
        assert_eq!(record.standing(), None);
        assert_eq!(record.progress(PullId(0)), None, "nobody asked");
        for (id, from, count, how) in [
            (0, 63, (1 << 25) - 1, Ended::Done),
            (u32::MAX, 0, 0, Ended::NoRoom),
            (7, 1, 2, Ended::Damaged),
        ] {
            let pull = Pull {
                id: PullId(id),
                from: NodeId(from),
                count,
            };
            assert_eq!(record.ask(pull), Ok(()));
            assert_eq!(record.ask(pull), Err(Pulling));
            assert_eq!(record.standing(), Some(pull));
            record.took_one(pull, 5, 9);
            let progress = |ended| Some(Progress { taken: 1, ended });
            assert_eq!(record.progress(pull.id), progress(None));
            record.end(pull, how);
            assert_eq!(record.standing(), None);
            assert_eq!(record.progress(pull.id), progress(Some(how)));
            assert_eq!(record.progress(PullId(id ^ 1)), None, "another");
        }
        assert_eq!(
            (record.all_taken(), record.copying(), record.longest()),
            (3, 15, 9)
        );
    }

    #[test]
    fn a_pull_that_is_curtailed_stands_until_its_node_ends_it() {
        let memory = leaked(1);
        let record = PullRecord::new(&memory, 0);
        let pull = Pull {
            id: PullId(7),
            from: NodeId(1),
            count: 5,
        };
        record.ask(pull).expect("the first");
        record.curtail(Pull { count: 4, ..pull });
        assert_eq!(record.standing(), Some(pull), "that was another");
        record.curtail(pull);
        record.took_one(pull, 0, 0);
        let now = record.standing().expect("it has not ended");
        assert_eq!((now.id, now.from, now.count), (pull.id, pull.from, 0));
        record.end(now, Ended::Done);
        record.curtail(pull);
        assert_eq!(record.standing(), None);
        let progress = record.progress(pull.id).expect("the last");
        assert_eq!((progress.taken, progress.ended), (1, Some(Ended::Done)));
    }

    /// The same job asks again, as after a failure that has gone.
    #[test]
    fn the_same_id_again_begins_anew() {
        let memory = leaked(1);
        let record = PullRecord::new(&memory, 0);
        let pull = Pull {
            id: PullId(7),
            from: NodeId(1),
            count: 2,
        };
        record.ask(pull).expect("the first");
        record.end(pull, Ended::NoRoom);
        record.ask(pull).expect("the first has ended");
        let under_way = Progress {
            taken: 0,
            ended: None,
        };
        assert_eq!(record.progress(pull.id), Some(under_way));
    }
}
