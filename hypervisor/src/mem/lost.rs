//! Memory that has been lost with a node that the VM goes on without.
//!
//! It is taken out of this node's tables. What the guest's kernel still
//! accesses of it is a page of this node's instead, the same for all:
//! accesses go on, and mean nothing. The kernel knows by its record of losses
//! (see [`vmm_shared::losses`]), and all vCPUs have an interrupt waiting, so
//! that no program runs on.

use core::ops::Range;
use core::sync::atomic::Ordering;

use vmm_shared::addr::{Gpa, LARGE_PAGE_SIZE, PAGE_SIZE};
use vmm_shared::coherence::{NodeSet, Rights};
use vmm_shared::pieces::{PieceError, Seen};

use super::coherent::{Bells, MappedMemory};
use crate::arch::svm::npt::GuestPage;

impl<B: Bells> MappedMemory<B> {
    /// Takes out of the tables what these nodes have had, for good.
    ///
    /// # Errors
    /// If the map of guest memory is damaged.
    pub fn part_from(&self, lost: NodeSet) -> Result<(), PieceError> {
        // Relaxed: who maps under the tables' lock after they have been
        // changed below sees it.
        let before = self.parted.fetch_or(lost.bits(), Ordering::Relaxed);
        let before = NodeSet::from_bits(before);
        for node in { lost }.filter(|node| !before.contains(*node)) {
            for piece in self.slices.map().pieces_on(node) {
                if let Some(gpa) = self.slices.gpa(piece) {
                    let page = GuestPage::Large(gpa);
                    self.change_tables(piece, |tables, _| tables.restrict(page, Rights::NONE))?;
                }
            }
        }
        self.flush();
        Ok(())
    }

    /// The nodes whose memory is not mapped any more.
    pub fn parted(&self) -> NodeSet {
        NodeSet::from_bits(self.parted.load(Ordering::Relaxed))
    }

    /// Whether what was seen of a piece is that it was on such a node.
    pub(super) fn is_lost(&self, seen: Seen) -> bool {
        let parted = self.parted();
        seen.host().is_some_and(|host| parted.contains(host.node))
    }

    /// Lets an access to lost memory go on.
    pub(super) fn map_nothing(&self, piece: usize, gpa: Gpa) -> Result<(), PieceError> {
        let page = GuestPage::Small(gpa.align_down(PAGE_SIZE));
        self.change_tables(piece, |tables, _| {
            tables.map(page, self.nothing, Rights::ALL);
        })
    }

    /// The first lost memory at or above an address, if these nodes have been
    /// lost: all that has been lost there in a row.
    pub fn next_lost(&self, from: Gpa, lost: NodeSet) -> Option<Range<u64>> {
        let is_lost = |piece: usize| {
            let seen = self.slices.look(piece).ok()?;
            let host = seen.host().filter(|host| lost.contains(host.node));
            host.and(self.slices.gpa(piece))
        };
        let mut found: Option<Range<u64>> = None;
        for piece in 0..self.slices.map().pieces() {
            let gpa = is_lost(piece).filter(|gpa| gpa.0 + LARGE_PAGE_SIZE > from.0);
            match (&mut found, gpa) {
                (None, Some(gpa)) => found = Some(gpa.0..gpa.0 + LARGE_PAGE_SIZE),
                (Some(range), Some(gpa)) if gpa.0 == range.end => range.end += LARGE_PAGE_SIZE,
                (Some(_), _) => break,
                (None, None) => {}
            }
        }
        found
    }

    /// How many pieces of memory there are from address 0 up to another, if
    /// there is some right below that.
    pub fn pieces_below(&self, end: Gpa) -> Option<usize> {
        let (piece, _) = self.slices.piece(Gpa(end.0.checked_sub(1)?))?;
        Some(piece + 1)
    }
}
