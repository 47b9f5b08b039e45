//! The word of a piece.
//!
//! ```text
//!   63      48 47    42 41        18 17    12 11   2 1   0
//!   |  count  | mover  | host piece |  node  | zero | state |
//! ```

use crate::addr::NodeId;

/// Bits of the number of a piece.
pub(super) const PIECE_BITS: u32 = 24;
const NODE_BITS: u32 = 6;

const ABSENT: u64 = 0;
const AT: u64 = 1;
const MOVING: u64 = 2;

const ZERO: u64 = 0x3ff << 2;
const NODE: u32 = 12;
const NUMBER: u32 = NODE + NODE_BITS;
const MOVER: u32 = NUMBER + PIECE_BITS;
const COUNT: u32 = MOVER + NODE_BITS;
const _: () = assert!(COUNT == 48);

/// 2 MiB of a node's region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPiece {
    /// Whose region.
    pub node: NodeId,
    /// Which of it, counted from the start of the region's content.
    pub number: u32,
}

impl HostPiece {
    /// Its number, as an index.
    #[must_use]
    pub const fn index(self) -> usize {
        self.number as usize
    }
}

/// What a word says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whereabouts {
    /// Nowhere: the guest does not have the piece.
    Absent,
    /// There.
    At(HostPiece),
    /// Claimed by a node; its bytes are where it was.
    Moving {
        /// Where it was.
        from: HostPiece,
        /// The node that has claimed it.
        by: NodeId,
    },
}

/// A word as it was at some instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen(u64);

impl Seen {
    /// `None` for a word that no node writes.
    pub(super) fn from_raw(raw: u64) -> Option<Self> {
        let has_place = raw >> NODE & ((1 << (COUNT - NODE)) - 1) != 0;
        let has_mover = raw >> MOVER & ((1 << NODE_BITS) - 1) != 0;
        let is_legal = raw & ZERO == 0
            && match raw & 3 {
                ABSENT => !has_place,
                AT => !has_mover,
                MOVING => true,
                _ => false,
            };
        is_legal.then_some(Self(raw))
    }

    pub(super) const fn raw(self) -> u64 {
        self.0
    }

    /// What it says.
    #[must_use]
    pub fn whereabouts(self) -> Whereabouts {
        let from = HostPiece {
            node: node(self.0 >> NODE),
            number: u32::try_from(self.0 >> NUMBER & ((1 << PIECE_BITS) - 1)).expect("24 bits"),
        };
        match self.0 & 3 {
            AT => Whereabouts::At(from),
            MOVING => Whereabouts::Moving {
                from,
                by: node(self.0 >> MOVER),
            },
            _ => Whereabouts::Absent,
        }
    }

    /// Where its bytes are.
    #[must_use]
    pub fn host(self) -> Option<HostPiece> {
        match self.whereabouts() {
            Whereabouts::Absent => None,
            Whereabouts::At(host) | Whereabouts::Moving { from: host, .. } => Some(host),
        }
    }

    /// The next word, of this state with these fields.
    const fn next(self, state: u64, fields: u64) -> Self {
        let count = (self.0 >> COUNT).wrapping_add(1) << COUNT;
        Self(count | fields | state)
    }

    pub(super) const fn absent(self) -> Self {
        self.next(ABSENT, 0)
    }

    pub(super) const fn at(self, host: HostPiece) -> Self {
        self.next(AT, place(host))
    }

    pub(super) const fn moving(self, from: HostPiece, by: NodeId) -> Self {
        self.next(MOVING, place(from) | (by.0 as u64) << MOVER)
    }
}

const fn place(host: HostPiece) -> u64 {
    (host.number as u64) << NUMBER | (host.node.0 as u64) << NODE
}

fn node(bits: u64) -> NodeId {
    NodeId(u16::try_from(bits & ((1 << NODE_BITS) - 1)).expect("6 bits"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::MAX_NODES;

    const _: () = assert!(MAX_NODES <= 1 << NODE_BITS);

    #[test]
    fn a_word_says_what_was_written_and_never_comes_again() {
        let last = HostPiece {
            node: NodeId(63),
            number: (1 << PIECE_BITS) - 1,
        };
        let first = HostPiece {
            node: NodeId(0),
            number: 0,
        };
        let by = NodeId(62);
        let absent = Seen::from_raw(0).expect("a piece that never was");
        let words = [
            (absent, Whereabouts::Absent),
            (absent.at(last), Whereabouts::At(last)),
            (
                absent.at(last).moving(last, by),
                Whereabouts::Moving { from: last, by },
            ),
            (
                absent.at(last).moving(last, by).at(first),
                Whereabouts::At(first),
            ),
            (
                absent.at(last).moving(last, by).absent(),
                Whereabouts::Absent,
            ),
        ];
        for (word, says) in words {
            assert_eq!(Seen::from_raw(word.raw()), Some(word));
            assert_eq!(word.whereabouts(), says);
        }
        let there = absent.at(first);
        assert_ne!(there, there.moving(first, by).at(first));
        // The count wraps around without touching anything else.
        let mut word = there;
        for _ in 0..1 << 16 {
            word = word.at(first);
        }
        assert_eq!(word, there);
    }

    #[test]
    fn words_that_nobody_writes_are_refused() {
        for raw in [3, 4, 1 << 11, 1 << NODE, 1 << MOVER, 1 | 1 << MOVER] {
            assert_eq!(Seen::from_raw(raw), None, "{raw:#x}");
        }
    }
}
