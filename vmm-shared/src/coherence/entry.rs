//! The control word of an entry: state, history and lock in one.
//!
//! ```text
//!   63            32 31 30    25 24 23 22 21 20  18 17    10 9         3 2   0
//!   | holder's epoch |L| holder | zero  |x |w |moves| flips  | successor | state|
//! ```

use super::rights::Rights;
use crate::addr::NodeId;

/// What the nodes agree that a unit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nobody has touched it.
    Unmapped = 0,
    /// Read and written by any number of nodes, executed by none.
    Data = 1,
    /// Read and executed by any number of nodes, written by none.
    Code = 2,
    /// All rights on one node. The next node to come makes it Data or Code.
    Private = 3,
    /// All rights on one node. The next node to come becomes that node: the
    /// answer to code that is written and executed by turns.
    Roaming = 4,
    /// Of a piece: ask its frames.
    Split = 5,
}

impl State {
    /// What a node in the mapped set may hold at most.
    #[must_use]
    pub const fn rights(self) -> Rights {
        match self {
            Self::Unmapped | Self::Split => Rights::NONE,
            Self::Data => Rights::READ_WRITE,
            Self::Code => Rights::READ_EXECUTE,
            Self::Private | Self::Roaming => Rights::ALL,
        }
    }

    const fn from_raw(raw: u64) -> Option<Self> {
        match raw {
            0 => Some(Self::Unmapped),
            1 => Some(Self::Data),
            2 => Some(Self::Code),
            3 => Some(Self::Private),
            4 => Some(Self::Roaming),
            5 => Some(Self::Split),
            _ => None,
        }
    }
}

/// Who takes part, and in which of its lives: a node that has been fenced and
/// comes back has a new epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// The node.
    pub node: NodeId,
    /// Its epoch; never 0.
    pub epoch: u32,
}

/// What an entry remembers to tell turns from peace. Counts events, no clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct History {
    /// The last eight grants that changed something, youngest lowest: 1 for
    /// Data↔Code, 0 for one more sharer.
    pub(super) flips: u8,
    /// Moves since the frame roams, or since the last verdict on it; below 8.
    pub(super) moves: u8,
    /// Some of these moves were for a write.
    pub(super) wrote: bool,
    /// Some of these moves were for a fetch.
    pub(super) executed: bool,
}

/// The decoded control word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Control {
    pub(super) state: State,
    pub(super) history: History,
    /// The node to which the others leave the lock when it is free next.
    pub(super) successor: Option<NodeId>,
    pub(super) holder: Option<Member>,
}

const SUCCESSOR: u32 = 3;
const FLIPS: u32 = 10;
const MOVES: u32 = 18;
const WROTE: u64 = 1 << 21;
const EXECUTED: u64 = 1 << 22;
const ZERO: u64 = 3 << 23;
const HOLDER: u32 = 25;
const LOCKED: u64 = 1 << 31;
const EPOCH: u32 = 32;

/// The `width` bits of `raw` from bit `at` on; at most 16.
fn field(raw: u64, at: u32, width: u32) -> u16 {
    u16::try_from((raw >> at) & ((1 << width) - 1)).expect("at most 16 bits")
}

impl Control {
    /// A free entry.
    pub(super) const fn free(state: State) -> Self {
        Self {
            state,
            history: History {
                flips: 0,
                moves: 0,
                wrote: false,
                executed: false,
            },
            successor: None,
            holder: None,
        }
    }

    /// `None` for a word that no node writes.
    pub(super) fn from_raw(raw: u64) -> Option<Self> {
        let state = State::from_raw(raw & 7)?;
        let successor = match field(raw, SUCCESSOR, 7) {
            0 => None,
            number @ 1..=64 => Some(NodeId(number - 1)),
            _ => return None,
        };
        let node = NodeId(field(raw, HOLDER, 6));
        let epoch = u32::try_from(raw >> EPOCH).expect("32 bits");
        let holder = match (raw & LOCKED != 0, node.0, epoch) {
            (false, 0, 0) => None,
            (false, ..) | (true, _, 0) => return None,
            (true, ..) => Some(Member { node, epoch }),
        };
        if raw & ZERO != 0 {
            return None;
        }
        Some(Self {
            state,
            history: History {
                flips: u8::try_from(field(raw, FLIPS, 8)).expect("8 bits"),
                moves: u8::try_from(field(raw, MOVES, 3)).expect("3 bits"),
                wrote: raw & WROTE != 0,
                executed: raw & EXECUTED != 0,
            },
            successor,
            holder,
        })
    }

    pub(super) fn raw(self) -> u64 {
        let successor = self.successor.map_or(0, |node| u64::from(node.0) + 1);
        let history = self.history;
        let mut raw = self.state as u64
            | successor << SUCCESSOR
            | u64::from(history.flips) << FLIPS
            | u64::from(history.moves & 7) << MOVES;
        if history.wrote {
            raw |= WROTE;
        }
        if history.executed {
            raw |= EXECUTED;
        }
        if let Some(Member { node, epoch }) = self.holder {
            raw |= LOCKED | u64::from(node.0) << HOLDER | u64::from(epoch) << EPOCH;
        }
        raw
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_that_decodes_encodes_to_itself() {
        let mut decoded = 0;
        let mut word = 1_u64;
        for _ in 0..200_000 {
            word = word
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            // Whole words, words without a lock, and words with few bits.
            for raw in [
                word,
                word & 0x00ff_ffff,
                word & word.rotate_left(21) & word.rotate_left(42),
            ] {
                if let Some(control) = Control::from_raw(raw) {
                    assert_eq!(control.raw(), raw);
                    decoded += 1;
                }
            }
        }
        assert!(decoded > 10_000, "{decoded}");
    }

    #[test]
    fn fields_do_not_overlap() {
        let full = Control {
            state: State::Split,
            history: History {
                flips: 0xa5,
                moves: 5,
                wrote: true,
                executed: false,
            },
            successor: Some(NodeId(63)),
            holder: Some(Member {
                node: NodeId(63),
                epoch: u32::MAX,
            }),
        };
        assert_eq!(Control::from_raw(full.raw()), Some(full));
        assert_eq!(Control::from_raw(0), Some(Control::free(State::Unmapped)));
    }

    #[test]
    fn words_that_nobody_writes_are_refused() {
        for raw in [6, 7, 65 << 3, 127 << 3, 1 << 23, LOCKED, 1 << 32, 1 << 25] {
            assert_eq!(Control::from_raw(raw), None, "{raw:#x}");
        }
    }
}
