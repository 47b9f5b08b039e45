//! Pieces of guest memory whose place changes while the guest runs.
//!
//! The node that is to give a piece takes it over:
//!
//! ```text
//!   claim ──> take away from all nodes ──> copy ──> estrange ──> publish
//!     │         └── others: reduce tables, flush, answer             │
//!     └── from here to there, who needs the piece waits ─────────────┘
//! ```
//!
//! A piece that comes anew is added where it is to be; one that goes is taken
//! away like one that moves, and removed.
//!
//! Why no byte gets lost, and what happens if somebody dies on the way:
//! decision 024.

use alloc::vec::Vec;
use core::ops::Range;

use vmm_shared::addr::NodeId;
use vmm_shared::coherence::{NodeSet, Rights, Step, Unit};
use vmm_shared::pieces::{Claim, Ended, HostPiece, Pull, Whereabouts};

use super::coherent::{Bells, MappedMemory, MemoryError};
use crate::arch::cpu;

/// What has become of one turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// A piece has come.
    Took {
        /// TSC ticks that copying took.
        copying: u64,
        /// TSC ticks for which the guest could not reach it.
        out_of_reach: u64,
    },
    /// No more can come.
    Over(Ended),
}

/// What has become of pieces that were to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Given {
    /// They are there.
    All,
    /// None has come: the node has no room for all of them.
    NoRoom,
}

impl<B: Bells> MappedMemory<B> {
    /// Gives the guest memory that it does not have yet, from a node.
    ///
    /// # Errors
    /// If the shared state is damaged or this node has been put out.
    pub fn give(&self, pieces: Range<usize>, node: NodeId) -> Result<Given, MemoryError> {
        let map = self.slices.map();
        let places: Vec<_> = pieces
            .clone()
            .map_while(|piece| map.take_host(node, piece))
            .collect();
        if places.len() < pieces.len() {
            places.into_iter().for_each(|place| map.free_host(place));
            return Ok(Given::NoRoom);
        }
        for (piece, place) in pieces.zip(places) {
            self.estrange(piece, map.translated(place))?;
            map.add(piece, place);
        }
        Ok(Given::All)
    }

    /// Takes the first of these pieces away from all nodes that is still
    /// there; whether none is left.
    ///
    /// # Errors
    /// If the shared state is damaged or this node has been put out.
    pub fn withdraw(&self, mut pieces: Range<usize>) -> Result<bool, MemoryError> {
        let map = self.slices.map();
        let is_there = |piece: &usize| {
            let seen = map.look(*piece);
            seen.map_or(true, |seen| seen.host().is_some())
        };
        let Some(piece) = pieces.find(is_there) else {
            return Ok(true);
        };
        if let Whereabouts::Moving { by, .. } = map.look(piece)?.whereabouts()
            && self.bells.lost().contains(by)
        {
            map.forget_at(piece, by);
        }
        // Otherwise it is on its way, and another turn's.
        if let Some(claim) = map.claim(piece, self.bells.node())? {
            self.take_away(&claim)?;
            self.note_translated(&claim)?;
            let _ = map.remove(&claim);
        }
        Ok(false)
    }

    /// Takes one piece over from another node.
    ///
    /// # Errors
    /// If the shared state is damaged or this node has been put out.
    pub fn take_over(&self, pull: Pull) -> Result<Turn, MemoryError> {
        let map = self.slices.map();
        let me = self.bells.node();
        if pull.from == me {
            return Ok(Turn::Over(Ended::Done));
        }
        for piece in map.pieces_on(pull.from) {
            let Some(to) = map.take_host(me, piece) else {
                return Ok(Turn::Over(Ended::NoRoom));
            };
            let Some(claim) = map.claim(piece, me)? else {
                // Somebody else is at it.
                map.free_host(to);
                continue;
            };
            return self.carry(&claim, to);
        }
        Ok(Turn::Over(Ended::Done))
    }

    fn carry(&self, claim: &Claim, to: HostPiece) -> Result<Turn, MemoryError> {
        let map = self.slices.map();
        let began = cpu::rdtsc();
        // Whoever puts this node out from now on finds the claim.
        if self.bells.is_out() {
            map.release(claim);
            return Ok(Turn::Over(Ended::Damaged));
        }
        self.take_away(claim)?;
        let withdrawn = cpu::rdtsc();
        let (Some(source), Some(target)) =
            (self.slices.memory(claim.from()), self.slices.memory(to))
        else {
            map.release(claim);
            return Ok(Turn::Over(Ended::Damaged));
        };
        target.copy_from(&source).expect("pieces are equally long");
        let copying = cpu::rdtsc().wrapping_sub(withdrawn);
        if self.bells.lost().contains(claim.from().node) {
            map.release(claim);
            map.free_host(to);
            return Ok(Turn::Over(Ended::Damaged));
        }
        self.note_translated(claim)?;
        // This node has just written there.
        self.estrange(claim.piece(), map.translated(to).without(self.bells.node()))?;
        if !map.publish(claim, to) {
            // This node has been put out.
            return Ok(Turn::Over(Ended::Damaged));
        }
        let out_of_reach = cpu::rdtsc().wrapping_sub(began);
        Ok(Turn::Took {
            copying,
            out_of_reach,
        })
    }

    /// Takes a claimed piece away from all nodes: nobody writes it any more
    /// when this returns.
    ///
    /// # Errors
    /// If the shared state is damaged or this node has been put out.
    pub fn take_away(&self, claim: &Claim) -> Result<(), MemoryError> {
        let Some(own) = &self.membership else {
            return Ok(self.restrict(Unit::Piece(claim.piece()), Rights::NONE)?);
        };
        let mut recall = own.map.recall(own.member, claim.piece())?;
        let mut reminder = self.reminder();
        // Before this node takes its own rights away: the others do meanwhile.
        let mut pending = recall.poll()?;
        if let Some(Step::Revoking(nodes)) = pending {
            self.remind(&mut reminder, nodes, || recall.nudge());
        }
        self.restrict(Unit::Piece(claim.piece()), Rights::NONE)?;
        while let Some(step) = pending {
            if let Step::Revoking(nodes) = step {
                self.remind(&mut reminder, nodes, || recall.nudge());
            }
            self.wait_for_others(own)?;
            pending = recall.poll()?;
        }
        Ok(())
    }

    /// Notes at the place that a claimed piece leaves who may have translated
    /// what was there.
    fn note_translated(&self, claim: &Claim) -> Result<(), MemoryError> {
        if let Some(own) = self.tracked() {
            let translated = own.map.translated(claim.piece())?;
            self.slices.map().note_translated(claim.from(), translated);
        }
        Ok(())
    }

    /// Sees to it that these nodes don't execute what they have translated
    /// from the place where a piece will be.
    fn estrange(&self, piece: usize, strangers: NodeSet) -> Result<(), MemoryError> {
        let Some(own) = self.tracked() else {
            return Ok(());
        };
        let mut estrangement = own.map.estrange(own.member, piece, strangers)?;
        while !estrangement.poll()? {
            self.wait_for_others(own)?;
        }
        Ok(())
    }
}
