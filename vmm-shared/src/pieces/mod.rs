//! Where each piece of guest memory is.
//!
//! Guest memory is a row of 2 MiB *pieces*, numbered through without its
//! holes, as in [`coherence`](crate::coherence). What is behind a piece is a
//! *host piece*: 2 MiB of some node's region. Which one is said here and
//! nowhere else, in one word per piece:
//!
//! ```text
//!            add                     claim                 publish
//!   Absent ───────▶ At(host piece) ─────────▶ Moving(from, by) ─────────▶ At(another)
//!      ▲                  ▲                     │   │
//!      │                  └── release, forget ──┘   │ remove
//!      └────────────────────────────────────────────┘
//! ```
//!
//! # Rules
//!
//! 1. Only who has claimed a piece changes its word, until it ends the claim;
//!    if it dies, anybody ends it by [`forget`](PieceMap::forget), which puts
//!    the piece back to where it was.
//! 2. While a piece is Moving, what is true of its bytes is at `from`. Nobody
//!    writes there any more once all nodes have given the piece up.
//! 3. A mapping is put into a node's nested page tables under their lock, from
//!    a word that says At and is read under that lock. A node that has given
//!    a piece up and sees that it is Moving therefore maps it no more.
//! 4. The hypervisor writes guest memory under the same lock, and only what
//!    its tables map. It reads without a lock, and looks at the word again
//!    ([`is_still`](PieceMap::is_still)): a place is not used for anything
//!    else before the word has changed.
//! 5. The bytes of a piece are copied by the node that is to give it, into its
//!    own region, so that a place is lost only together with its node.
//!
//! A word carries a count of its changes, so that a piece that has moved away
//! and back is not taken for one that stayed.
//!
//! # Layout, in 64-bit words
//!
//! ```text
//!   nodes         8 each          what a node is asked to take: see `pull`
//!   pieces        1 each          state · node · host piece · mover · count
//!   host pieces   2 each          owner · nodes that may have translated it
//! ```

mod pull;
mod word;

#[cfg(test)]
mod models;
#[cfg(test)]
mod tests;

use core::sync::atomic::Ordering;

pub use pull::{Ended, Progress, Pull, PullId, PullRecord, Pulling};
pub use word::{HostPiece, Seen, Whereabouts};

use crate::addr::{LARGE_PAGE_SIZE, MAX_NODES, NodeId};
use crate::coherence::{NodeSet, Words};
use crate::control::NodeShare;
use crate::shm::SharedMem;

/// Words in a 64-byte line, what a node has.
const LINE: usize = 8;
const WORDS_PER_HOST_PIECE: usize = 2;
/// The owner of a host piece that is free.
const FREE: u64 = 0;
/// The owner of one that the node's region does not have.
const NOT_THERE: u64 = u64::MAX;

/// Why a map can't say where a piece is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PieceError {
    /// No piece of this guest's memory.
    #[error("there is no piece {piece} of guest memory")]
    NoSuchPiece {
        /// The piece's number.
        piece: usize,
    },
    /// A word that no node writes. The map is damaged: stop the VM.
    #[error("the map of guest memory is damaged: the word of piece {piece} is {found:#x}")]
    Corrupt {
        /// The piece's number.
        piece: usize,
        /// Its word.
        found: u64,
    },
}

/// How much a map is about. The same on all nodes: it follows from the boot
/// configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapGeometry {
    /// Pieces of guest memory, those that may come while it runs included.
    pub pieces: usize,
    /// Node numbers in use are below this.
    pub nodes: usize,
    /// Host pieces of the node that has most.
    pub host_pieces: usize,
}

impl MapGeometry {
    /// The geometry for nodes with these shares: first what they give at the
    /// start, then the blocks that may come. All who use the map work it out
    /// alike.
    #[must_use]
    pub fn of(shares: &[NodeShare]) -> Self {
        Self {
            pieces: shares
                .iter()
                .map(|share| in_pieces(share.home()))
                .fold(0, usize::saturating_add),
            nodes: shares.len(),
            host_pieces: shares.iter().map(room).max().unwrap_or(0),
        }
    }

    /// Bytes of shared memory for a map, a multiple of 64; `None` for a
    /// geometry that can't be.
    #[must_use]
    pub const fn size(self) -> Option<usize> {
        match self.words() {
            Some(words) => words.next_multiple_of(LINE).checked_mul(8),
            None => None,
        }
    }

    const fn words(self) -> Option<usize> {
        if self.nodes == 0 || self.nodes > MAX_NODES || self.pieces == 0 {
            return None;
        }
        // 2^24 pieces are 32 TiB: no sum below can overflow.
        if self.pieces > 1 << word::PIECE_BITS || self.host_pieces > 1 << word::PIECE_BITS {
            return None;
        }
        Some(self.first_host_piece() + self.nodes * self.host_pieces * WORDS_PER_HOST_PIECE)
    }

    const fn first_piece(self) -> usize {
        self.nodes * LINE
    }

    const fn first_host_piece(self) -> usize {
        (self.first_piece() + self.pieces).next_multiple_of(LINE)
    }
}

fn in_pieces(bytes: u64) -> usize {
    usize::try_from(bytes / LARGE_PAGE_SIZE).unwrap_or(usize::MAX)
}

/// Host pieces in a node's region.
fn room(share: &NodeShare) -> usize {
    usize::try_from(share.room).unwrap_or(usize::MAX)
}

/// The right to change where a piece is, for the node that has claimed it.
///
/// Dropping it leaves the piece Moving until its node is fenced.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "whoever needs the piece waits for it"]
pub struct Claim {
    piece: usize,
    from: HostPiece,
    word: Seen,
}

impl Claim {
    /// The piece.
    #[must_use]
    pub const fn piece(&self) -> usize {
        self.piece
    }

    /// Where its bytes are.
    #[must_use]
    pub const fn from(&self) -> HostPiece {
        self.from
    }
}

/// Where all pieces of guest memory are.
///
/// A copy of the value is the same map.
#[derive(Clone, Copy, Debug)]
pub struct PieceMap<W: Words = SharedMem> {
    words: W,
    geometry: MapGeometry,
}

impl<W: Words> PieceMap<W> {
    /// The map in `words`; `None` if the geometry is impossible or the window
    /// too small for it.
    #[must_use]
    pub fn new(words: W, geometry: MapGeometry) -> Option<Self> {
        (words.count() >= geometry.words()?).then_some(Self { words, geometry })
    }

    /// Writes a map of zeroes for the boot: the nodes' shares in order, each
    /// from the start of its region.
    pub fn lay_out(&self, shares: &[NodeShare]) {
        let mut next = 0;
        for (node, share) in (0..).map(NodeId).zip(shares) {
            for number in room(share)..self.geometry.host_pieces {
                let owner = self.owner(host(node, number));
                self.words.store(owner, NOT_THERE, Ordering::Relaxed);
            }
            for number in 0..in_pieces(share.memory) {
                self.add(next, host(node, number));
                next += 1;
            }
        }
    }

    /// Pieces of guest memory, those that are absent included.
    #[must_use]
    pub const fn pieces(&self) -> usize {
        self.geometry.pieces
    }

    fn word(&self, piece: usize) -> usize {
        debug_assert!(piece < self.geometry.pieces, "`look` comes first");
        self.geometry.first_piece() + piece
    }

    fn owner(&self, host: HostPiece) -> usize {
        let number = usize::from(host.node.0) * self.geometry.host_pieces + host.index();
        self.geometry.first_host_piece() + number * WORDS_PER_HOST_PIECE
    }

    const fn has(&self, host: HostPiece) -> bool {
        (host.node.0 as usize) < self.geometry.nodes && host.index() < self.geometry.host_pieces
    }

    /// Where a piece is: one load.
    ///
    /// # Errors
    /// If there is no such piece, or its word is garbage.
    pub fn look(&self, piece: usize) -> Result<Seen, PieceError> {
        if piece >= self.geometry.pieces {
            return Err(PieceError::NoSuchPiece { piece });
        }
        // Acquire: the bytes are where the word says; pairs with `publish`.
        let found = self.words.load(self.word(piece), Ordering::Acquire);
        Seen::from_raw(found)
            .filter(|seen| seen.host().is_none_or(|host| self.has(host)))
            .ok_or(PieceError::Corrupt { piece, found })
    }

    /// Whether nothing has changed since a piece was looked at: then what has
    /// been read from where it was is what it held.
    #[must_use]
    pub fn is_still(&self, piece: usize, seen: Seen) -> bool {
        // Acquire: who has read what a new owner of the place has written sees
        // that the word has changed; pairs with the fence in `claim`.
        self.words.fence(Ordering::Acquire);
        self.words.load(self.word(piece), Ordering::Relaxed) == seen.raw()
    }

    fn change(&self, piece: usize, from: Seen, to: Seen) -> bool {
        // AcqRel: what was written under the last word comes before, and what
        // is written under the next one after.
        let order = Ordering::AcqRel;
        self.words
            .compare_exchange(self.word(piece), from.raw(), to.raw(), order)
            .is_ok()
    }

    /// Takes a free host piece of a node, for a piece of guest memory; `None`
    /// if the node has none left.
    #[must_use]
    pub fn take_host(&self, node: NodeId, piece: usize) -> Option<HostPiece> {
        if usize::from(node.0) >= self.geometry.nodes {
            return None;
        }
        (0..self.geometry.host_pieces)
            .map(|number| host(node, number))
            .find(|host| self.take(*host, piece))
    }

    fn take(&self, host: HostPiece, piece: usize) -> bool {
        let at = self.owner(host);
        // Relaxed: most are taken.
        self.words.load(at, Ordering::Relaxed) == FREE
            // Acquire: its last user is done with it; pairs with `free_host`.
            && self
                .words
                .compare_exchange(at, FREE, piece as u64 + 1, Ordering::Acquire)
                .is_ok()
    }

    /// Gives a host piece back that nothing is at.
    pub fn free_host(&self, host: HostPiece) {
        // Release: see `take`.
        self.words.store(self.owner(host), FREE, Ordering::Release);
    }

    /// Host pieces of a node that are free.
    #[must_use]
    pub fn free(&self, node: NodeId) -> usize {
        if usize::from(node.0) >= self.geometry.nodes {
            return 0;
        }
        (0..self.geometry.host_pieces)
            .filter(|number| {
                let owner = self.owner(host(node, *number));
                self.words.load(owner, Ordering::Relaxed) == FREE
            })
            .count()
    }

    /// Puts an absent piece where it is to be. False if it is not absent, or
    /// the place is another's.
    pub fn add(&self, piece: usize, host: HostPiece) -> bool {
        let owner = self.owner(host);
        let is_its = self.words.load(owner, Ordering::Relaxed) == piece as u64 + 1;
        (is_its || self.take(host, piece))
            && self.look(piece).is_ok_and(|seen| {
                seen.whereabouts() == Whereabouts::Absent && self.change(piece, seen, seen.at(host))
            })
    }

    /// Claims a piece that is somewhere, for the node `by`. `None` if it is
    /// absent or claimed. The caller looks afterwards whether its node has been
    /// put out in the meantime, and then releases it.
    ///
    /// # Errors
    /// As [`look`](Self::look).
    pub fn claim(&self, piece: usize, by: NodeId) -> Result<Option<Claim>, PieceError> {
        let seen = self.look(piece)?;
        let Whereabouts::At(from) = seen.whereabouts() else {
            return Ok(None);
        };
        let word = seen.moving(from, by);
        let is_claimed = self.change(piece, seen, word);
        // SeqCst: either this node sees that it has been put out, or who has
        // put it out sees the claim; pairs with `forget`. And a Release, for
        // what is going to be written: see `is_still`.
        self.words.fence(Ordering::SeqCst);
        Ok(is_claimed.then_some(Claim { piece, from, word }))
    }

    /// Ends a claim: the piece is at `to` now, and where it was is free. False
    /// if the claim has been forgotten; then nothing has changed.
    #[must_use]
    pub fn publish(&self, claim: &Claim, to: HostPiece) -> bool {
        let done = self.change(claim.piece, claim.word, claim.word.at(to));
        if done {
            self.free_host(claim.from);
        }
        done
    }

    /// Ends a claim: there is no such piece any more, and where it was is
    /// free. False if the claim has been forgotten.
    #[must_use]
    pub fn remove(&self, claim: &Claim) -> bool {
        let done = self.change(claim.piece, claim.word, claim.word.absent());
        if done {
            self.free_host(claim.from);
        }
        done
    }

    /// Ends a claim: the piece stays where it was.
    pub fn release(&self, claim: &Claim) {
        // A failure means that the claim has been forgotten.
        let _ = self.change(claim.piece, claim.word, claim.word.at(claim.from));
    }

    /// Ends the claim on a piece whose claimant has been put out; nothing
    /// happens to another's.
    pub fn forget_at(&self, piece: usize, by: NodeId) {
        if let Ok(seen) = self.look(piece)
            && let Whereabouts::Moving { from, by: claimant } = seen.whereabouts()
            && claimant == by
        {
            // A failure means that somebody else was faster.
            let _ = self.change(piece, seen, seen.at(from));
        }
    }

    /// Ends all claims of a node that has been put out. Any number of times,
    /// by anybody.
    pub fn forget(&self, by: NodeId) {
        // SeqCst: see `claim`.
        self.words.fence(Ordering::SeqCst);
        (0..self.pieces()).for_each(|piece| self.forget_at(piece, by));
    }

    /// The pieces whose bytes are on a node, in order; those with a word that
    /// is garbage could be.
    pub fn pieces_on(&self, node: NodeId) -> impl Iterator<Item = usize> + '_ {
        (0..self.pieces()).filter(move |piece| {
            self.look(*piece)
                .map_or(true, |seen| seen.host().is_some_and(|at| at.node == node))
        })
    }

    /// The nodes whose emulators may have translated what this place held.
    #[must_use]
    pub fn translated(&self, host: HostPiece) -> NodeSet {
        let at = self.owner(host) + 1;
        // Relaxed: ordered by the place's owners.
        NodeSet(self.words.load(at, Ordering::Relaxed))
    }

    /// Notes more of them.
    pub fn note_translated(&self, host: HostPiece, nodes: NodeSet) {
        let at = self.owner(host) + 1;
        self.words.fetch_or(at, nodes.0, Ordering::Relaxed);
    }

    /// What a node is asked to take.
    #[must_use]
    pub fn pull(&self, node: NodeId) -> Option<PullRecord<'_, W>> {
        let node = usize::from(node.0);
        (node < self.geometry.nodes).then(|| PullRecord::new(&self.words, node * LINE))
    }
}

fn host(node: NodeId, number: usize) -> HostPiece {
    HostPiece {
        node,
        number: u32::try_from(number).expect("geometries are small enough"),
    }
}
