//! Taking a piece away from all nodes, to move it to another place.
//!
//! Entries don't change by it: what they say is an upper bound of what nodes
//! have, before and after. Who recalls a piece sees to it that it is not
//! mapped anew meanwhile (see [`pieces`](crate::pieces)), so no lock is held
//! while nodes answer.

use core::sync::atomic::Ordering;

use super::CoherenceError;
use super::entry::Member;
use super::fault::Step;
use super::map::{Attempt, CoherenceMap};
use super::requests::Ticket;
use super::rights::{NodeSet, Rights, Unit};
use super::words::Words;
use crate::addr::NodeId;
use crate::shm::SharedMem;

/// All other nodes give up all rights on a piece, from
/// [`CoherenceMap::recall`].
///
/// As with a [`Fault`](super::Fault), the core must go on serving between two
/// polls.
#[derive(Debug)]
#[must_use = "nothing happens until it is polled"]
pub struct Recall<W: Words = SharedMem> {
    map: CoherenceMap<W>,
    member: Member,
    piece: usize,
    asked: Option<(Ticket, NodeSet)>,
}

impl<W: Words> Recall<W> {
    /// What it waits for; `None` once no other node has any right.
    ///
    /// # Errors
    /// As for [`Fault::poll`](super::Fault::poll).
    pub fn poll(&mut self) -> Result<Option<Step>, CoherenceError> {
        self.map.check(self.member)?;
        let (ticket, pending) = match self.asked {
            Some(asked) => asked,
            None => {
                let others = self.map.members().without(self.member.node);
                let unit = Unit::Piece(self.piece);
                match self.map.ask(self.member, unit, Rights::NONE, others)? {
                    Some(ticket) => (ticket, others),
                    None => return Ok(Some(Step::Busy)),
                }
            }
        };
        let pending = self.map.unanswered(self.member, ticket, pending)?;
        self.asked = Some((ticket, pending));
        if pending.is_empty() {
            self.map.close(self.member, ticket);
            return Ok(None);
        }
        Ok(Some(Step::Revoking(pending)))
    }

    /// Repeats the hints to nodes that have not answered, and returns them.
    #[must_use = "these nodes need a doorbell"]
    pub fn nudge(&self) -> NodeSet {
        let pending = self.asked.map_or(NodeSet::EMPTY, |(_, pending)| pending);
        self.map.hint(self.member.node, pending);
        pending
    }
}

/// Nodes learn that a piece's bytes are new to them, from
/// [`CoherenceMap::estrange`].
#[derive(Debug)]
#[must_use = "nothing happens until it is polled"]
pub struct Estrangement<W: Words = SharedMem> {
    map: CoherenceMap<W>,
    member: Member,
    piece: usize,
    nodes: NodeSet,
    /// The frame whose turn it is, once the piece is known to be split.
    frame: Option<usize>,
    patience: u32,
}

impl<W: Words> Estrangement<W> {
    /// Goes on as far as possible without waiting; whether it is done.
    ///
    /// # Errors
    /// As for [`Fault::poll`](super::Fault::poll).
    pub fn poll(&mut self) -> Result<bool, CoherenceError> {
        self.map.check(self.member)?;
        if self.nodes.is_empty() {
            return Ok(true);
        }
        let frames = self.map.layout.frames_of(self.piece);
        loop {
            let unit = self.frame.map_or(Unit::Piece(self.piece), Unit::Frame);
            match self.map.try_lock(self.member, unit, &mut self.patience)? {
                Attempt::Busy => return Ok(false),
                // For good.
                Attempt::Split => self.frame = Some(frames.start),
                Attempt::Locked(_) => {
                    let at = self.map.layout.entry(unit).stale;
                    // Relaxed: under the entry's lock.
                    self.map.words.fetch_or(at, self.nodes.0, Ordering::Relaxed);
                    self.map.unlock(self.member, unit)?;
                    self.frame = self.frame.map(|frame| frame + 1);
                    if self.frame.is_none_or(|next| next == frames.end) {
                        return Ok(true);
                    }
                }
            }
            self.patience = 0;
        }
    }
}

impl<W: Words> CoherenceMap<W> {
    fn exists(&self, piece: usize) -> Result<(), CoherenceError> {
        let frame = Unit::Piece(piece).first_frame();
        let exists = self.layout.has(Unit::Piece(piece));
        exists
            .then_some(())
            .ok_or(CoherenceError::NoSuchFrame { frame })
    }

    /// Begins to take a piece away from all other nodes. Nothing happens
    /// before the first poll.
    ///
    /// # Errors
    /// If there is no such piece or the node has been fenced.
    pub fn recall(&self, member: Member, piece: usize) -> Result<Recall<W>, CoherenceError> {
        self.exists(piece)?;
        self.check(member)?;
        Ok(Recall {
            map: self.clone(),
            member,
            piece,
            asked: None,
        })
    }

    /// Nodes that may hold translations of a piece, wherever it has been.
    ///
    /// # Errors
    /// If there is no such piece.
    pub fn translated(&self, piece: usize) -> Result<NodeSet, CoherenceError> {
        self.exists(piece)?;
        let at = self.layout.entry(Unit::Piece(piece)).translated;
        // Relaxed: who has given the piece up put itself there before.
        Ok(NodeSet(self.words.load(at, Ordering::Relaxed)))
    }

    /// Begins to note that these nodes may hold translations of something
    /// else where a piece is going to be: before they execute any of it, they
    /// refresh. Nodes must not map the piece until it is done.
    ///
    /// # Errors
    /// If there is no such piece or the node has been fenced.
    pub fn estrange(
        &self,
        member: Member,
        piece: usize,
        nodes: NodeSet,
    ) -> Result<Estrangement<W>, CoherenceError> {
        self.exists(piece)?;
        self.check(member)?;
        let at = self.layout.entry(Unit::Piece(piece)).translated;
        // Relaxed: before any of the entries' locks below.
        self.words.fetch_or(at, nodes.0, Ordering::Relaxed);
        Ok(Estrangement {
            map: self.clone(),
            member,
            piece,
            nodes,
            frame: None,
            patience: 0,
        })
    }

    /// All nodes that take part.
    fn members(&self) -> NodeSet {
        let nodes = u16::try_from(self.layout.geometry.nodes).expect("at most 64");
        let all = (0..nodes).map(NodeId).fold(NodeSet::EMPTY, NodeSet::with);
        self.members_of(all)
    }

    /// The nodes among `pending` that have neither answered nor died.
    pub(super) fn unanswered(
        &self,
        member: Member,
        ticket: Ticket,
        pending: NodeSet,
    ) -> Result<NodeSet, CoherenceError> {
        let mut left = pending;
        for node in pending {
            if !self.is_member(node) || self.answered(member, ticket, node)? {
                left = left.without(node);
            }
        }
        Ok(left)
    }
}
