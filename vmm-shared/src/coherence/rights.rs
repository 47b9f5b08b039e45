//! What a node may do with memory, which memory, and sets of nodes.

use core::fmt;
use core::ops::{BitAnd, BitOr};

use crate::addr::{MAX_NODES, NodeId};

/// 4 KiB frames in a 2 MiB piece.
pub const FRAMES_PER_PIECE: usize = 512;

/// What a guest tried to do when it faulted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A load.
    Read,
    /// A store, or a locked instruction, or the CPU setting a bit in the
    /// guest's page tables.
    Write,
    /// An instruction fetch.
    Execute,
}

impl Access {
    /// The rights that the access needs.
    #[must_use]
    pub const fn needs(self) -> Rights {
        match self {
            Self::Read => Rights::READ,
            Self::Write => Rights::WRITE,
            Self::Execute => Rights::EXECUTE,
        }
    }
}

/// A set of rights on memory.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Rights(u8);

impl Rights {
    /// No access at all: not mapped.
    pub const NONE: Self = Self(0);
    /// Loads.
    pub const READ: Self = Self(1);
    /// Stores.
    pub const WRITE: Self = Self(2);
    /// Instruction fetches.
    pub const EXECUTE: Self = Self(4);
    /// Loads and stores.
    pub const READ_WRITE: Self = Self(3);
    /// Loads and instruction fetches.
    pub const READ_EXECUTE: Self = Self(5);
    /// Everything.
    pub const ALL: Self = Self(7);

    /// Whether every right in `other` is in this set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether the set is [`NONE`](Self::NONE).
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(super) const fn bits(self) -> u8 {
        self.0
    }

    pub(super) const fn from_bits(bits: u8) -> Option<Self> {
        if bits <= Self::ALL.0 {
            Some(Self(bits))
        } else {
            None
        }
    }
}

impl BitOr for Rights {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitAnd for Rights {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl fmt::Debug for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (right, letter) in [(Self::READ, 'r'), (Self::WRITE, 'w'), (Self::EXECUTE, 'x')] {
            write!(f, "{}", if self.contains(right) { letter } else { '-' })?;
        }
        Ok(())
    }
}

/// What a grant or a revocation is about. Numbers count from the start of
/// guest memory, the slices of all nodes in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// The 2 MiB piece with this number.
    Piece(usize),
    /// The 4 KiB frame with this number.
    Frame(usize),
}

impl Unit {
    /// Number of the first frame in the unit.
    #[must_use]
    pub const fn first_frame(self) -> usize {
        match self {
            Self::Piece(piece) => piece * FRAMES_PER_PIECE,
            Self::Frame(frame) => frame,
        }
    }

    /// Frames in the unit.
    #[must_use]
    pub const fn frames(self) -> usize {
        match self {
            Self::Piece(_) => FRAMES_PER_PIECE,
            Self::Frame(_) => 1,
        }
    }

    /// Whether the frame with this number is part of the unit.
    #[must_use]
    pub const fn contains(self, frame: usize) -> bool {
        match self {
            Self::Piece(piece) => frame / FRAMES_PER_PIECE == piece,
            Self::Frame(own) => own == frame,
        }
    }

    /// Whether the units have a frame in common.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.contains(other.first_frame()) || other.contains(self.first_frame())
    }

    /// Number of the piece that is or holds the unit.
    #[must_use]
    pub const fn piece(self) -> usize {
        match self {
            Self::Piece(piece) => piece,
            Self::Frame(frame) => frame / FRAMES_PER_PIECE,
        }
    }
}

/// A set of nodes; iterates in ascending order.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct NodeSet(pub u64);

const _: () = assert!(MAX_NODES <= 64);

impl NodeSet {
    /// No node.
    pub const EMPTY: Self = Self(0);

    /// The set of just this node; empty if no such node can exist.
    #[must_use]
    pub const fn only(node: NodeId) -> Self {
        if node.0 < 64 {
            Self(1 << node.0)
        } else {
            Self::EMPTY
        }
    }

    /// The set with a bit for each node, node 0 the lowest.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The set that [`bits`](Self::bits) gave.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// Whether no node is in the set.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Nodes in the set.
    #[must_use]
    pub const fn len(self) -> u32 {
        self.0.count_ones()
    }

    /// Whether the node is in the set.
    #[must_use]
    pub const fn contains(self, node: NodeId) -> bool {
        self.0 & Self::only(node).0 != 0
    }

    /// The set and one node more.
    #[must_use]
    pub const fn with(self, node: NodeId) -> Self {
        Self(self.0 | Self::only(node).0)
    }

    /// The set without one node.
    #[must_use]
    pub const fn without(self, node: NodeId) -> Self {
        Self(self.0 & !Self::only(node).0)
    }
}

impl Iterator for NodeSet {
    type Item = NodeId;

    fn next(&mut self) -> Option<NodeId> {
        let node = NodeId(u16::try_from(self.0.trailing_zeros()).expect("at most 64"));
        (!self.is_empty()).then(|| {
            *self = self.without(node);
            node
        })
    }
}

impl fmt::Debug for NodeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.map(|node| node.0)).finish()
    }
}
