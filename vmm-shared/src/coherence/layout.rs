//! Where things are in the table, in 64-bit words.
//!
//! ```text
//!   node lines   64 B per node     epoch · inbox · slots in use
//!   requests     64 B + 8 B per node (rounded up to 64), × slots × nodes
//!   pieces       64 B per 2 MiB    control · mapped · stale · translated
//!   frames       24 B per 4 KiB    control · mapped · stale
//! ```
//!
//! Frames cost 0.59 % of guest memory and pieces 0.003 %; the frames of a
//! piece that was never split are never touched.

use super::rights::{FRAMES_PER_PIECE, Unit};
use crate::addr::{MAX_NODES, NodeId};

/// Words in a 64-byte line.
const LINE: usize = 8;
const WORDS_PER_PIECE: usize = LINE;
const WORDS_PER_FRAME: usize = 3;
/// Most slots for requests a node may have: a bitmap in one word.
pub const MAX_SLOTS: usize = 64;

/// How much the map is about. The same on all nodes: it follows from the boot
/// configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// 4 KiB frames of guest memory, the room for hot-add included. Only a
    /// multiple of [`FRAMES_PER_PIECE`] is of use outside tests.
    pub frames: usize,
    /// Node numbers in use are below this.
    pub nodes: usize,
    /// Faults of one node that can wait for other nodes at the same time;
    /// more only wait longer. As many as a node has cores is enough.
    pub slots: usize,
}

impl Geometry {
    const fn pieces(self) -> usize {
        self.frames.div_ceil(FRAMES_PER_PIECE)
    }

    /// Bytes of shared memory for a table, a multiple of 64; `None` for a
    /// geometry that can't be.
    #[must_use]
    pub const fn table_size(self) -> Option<usize> {
        match Layout::new(self) {
            Some(layout) => Some(layout.end.next_multiple_of(LINE) * 8),
            None => None,
        }
    }
}

/// Places of the parts, as indexes of words.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) geometry: Geometry,
    requests: usize,
    words_per_request: usize,
    pieces: usize,
    frames: usize,
    pub(super) end: usize,
}

/// Indexes of the words of one entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct EntryAt {
    /// State, history and lock: see `Control`.
    pub(super) control: usize,
    /// Nodes that may hold rights, none beyond those of the state.
    pub(super) mapped: usize,
    /// Nodes that may hold translations older than the frame's bytes.
    pub(super) stale: usize,
    /// Nodes that may hold translations of the piece at all.
    pub(super) translated: usize,
}

/// Indexes of the words of one request.
#[derive(Clone, Copy, Debug)]
pub(super) struct RequestAt {
    /// Odd while the request is open; grows by one at each end.
    pub(super) sequence: usize,
    /// Unit and rights to keep.
    pub(super) what: usize,
    /// Nodes that are asked.
    pub(super) targets: usize,
    answers: usize,
}

impl RequestAt {
    /// The word in which `node` answers with the request's sequence.
    pub(super) fn answer(self, node: NodeId) -> usize {
        self.answers + usize::from(node.0)
    }
}

impl Layout {
    pub(super) const fn new(geometry: Geometry) -> Option<Self> {
        let Geometry {
            frames,
            nodes,
            slots,
        } = geometry;
        // 2^40 frames are 4 PiB: no sum below can overflow.
        if frames == 0 || frames > 1 << 40 {
            return None;
        }
        if nodes == 0 || nodes > MAX_NODES || slots == 0 || slots > MAX_SLOTS {
            return None;
        }
        let words_per_request = LINE + nodes.next_multiple_of(LINE);
        let requests = nodes * LINE;
        let pieces = requests + nodes * slots * words_per_request;
        let first_frame = pieces + geometry.pieces() * WORDS_PER_PIECE;
        Some(Self {
            geometry,
            requests,
            words_per_request,
            pieces,
            frames: first_frame,
            end: first_frame + frames * WORDS_PER_FRAME,
        })
    }

    /// Whether the unit is part of this guest memory.
    pub(super) const fn has(&self, unit: Unit) -> bool {
        match unit {
            Unit::Piece(piece) => piece < self.geometry.pieces(),
            Unit::Frame(frame) => frame < self.geometry.frames,
        }
    }

    /// The frames of a piece: all but the last piece of a test have 512.
    pub(super) fn frames_of(&self, piece: usize) -> core::ops::Range<usize> {
        let first = piece * FRAMES_PER_PIECE;
        first..(first + FRAMES_PER_PIECE).min(self.geometry.frames)
    }

    pub(super) const fn entry(&self, unit: Unit) -> EntryAt {
        let piece = self.pieces + unit.piece() * WORDS_PER_PIECE;
        let own = match unit {
            Unit::Piece(_) => piece,
            Unit::Frame(frame) => self.frames + frame * WORDS_PER_FRAME,
        };
        EntryAt {
            control: own,
            mapped: own + 1,
            stale: own + 2,
            translated: piece + 3,
        }
    }

    /// The epoch under which `node` takes part; 0 if it doesn't.
    pub(super) fn epoch(node: NodeId) -> usize {
        usize::from(node.0) * LINE
    }

    /// The nodes that have, or had, something to ask of `node`.
    pub(super) fn inbox(node: NodeId) -> usize {
        Self::epoch(node) + 1
    }

    /// The bitmap of `node`'s request slots in use.
    pub(super) fn slots(node: NodeId) -> usize {
        Self::epoch(node) + 2
    }

    pub(super) fn request(&self, node: NodeId, slot: usize) -> RequestAt {
        let number = usize::from(node.0) * self.geometry.slots + slot;
        let at = self.requests + number * self.words_per_request;
        RequestAt {
            sequence: at,
            what: at + 1,
            targets: at + 2,
            answers: at + LINE,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_stays_below_one_percent_of_guest_memory() {
        for (mib, nodes, slots) in [(256, 2, 8), (1 << 10, 8, 16), (1 << 20, 64, 64)] {
            let frames = mib << 8;
            let geometry = Geometry {
                frames,
                nodes,
                slots,
            };
            let size = geometry.table_size().expect("a legal geometry");
            let share = size as f64 / (frames as f64 * 4096.0);
            assert!(share < 0.0062, "{share} of {mib} MiB");
        }
    }

    #[test]
    fn no_two_words_share_a_place() {
        let layout = Layout::new(Geometry {
            frames: 1030,
            nodes: 9,
            slots: 3,
        })
        .expect("a legal geometry");
        let mut taken = vec![false; layout.end];
        let mut take = |at: usize| {
            assert!(!core::mem::replace(&mut taken[at], true), "word {at}");
        };
        for node in (0..9).map(NodeId) {
            take(Layout::epoch(node));
            take(Layout::inbox(node));
            take(Layout::slots(node));
            for slot in 0..3 {
                let request = layout.request(node, slot);
                take(request.sequence);
                take(request.what);
                take(request.targets);
                (0..9).map(NodeId).for_each(|by| take(request.answer(by)));
            }
        }
        for piece in 0..3 {
            let entry = layout.entry(Unit::Piece(piece));
            [entry.control, entry.mapped, entry.stale, entry.translated]
                .into_iter()
                .for_each(&mut take);
        }
        for frame in 0..1030 {
            let entry = layout.entry(Unit::Frame(frame));
            [entry.control, entry.mapped, entry.stale]
                .into_iter()
                .for_each(&mut take);
        }
        assert_eq!(layout.frames_of(2), 1024..1030);
    }

    #[test]
    fn impossible_geometries_are_refused() {
        let good = Geometry {
            frames: 512,
            nodes: 2,
            slots: 1,
        };
        assert!(good.table_size().is_some());
        for bad in [
            Geometry { frames: 0, ..good },
            Geometry {
                frames: usize::MAX,
                ..good
            },
            Geometry { nodes: 0, ..good },
            Geometry { nodes: 65, ..good },
            Geometry { slots: 0, ..good },
            Geometry { slots: 65, ..good },
        ] {
            assert_eq!(bad.table_size(), None, "{bad:?}");
        }
    }
}
