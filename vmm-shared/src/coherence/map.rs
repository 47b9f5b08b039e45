//! The map as a whole: membership, locks of entries, the claim at boot.

use core::ops::Range;
use core::sync::atomic::Ordering;

use super::entry::{Control, Member, State};
use super::fault::Fault;
use super::layout::{EntryAt, Geometry, Layout};
use super::rights::{Access, FRAMES_PER_PIECE, NodeSet, Rights, Unit};
use super::words::Words;
use super::{CoherenceError, MAX_TRIES, PATIENCE};
use crate::addr::NodeId;
use crate::shm::SharedMem;

/// The state of instruction coherence of all guest memory. Zeroed memory is
/// the map of a guest that has not run.
///
/// A copy of the value is the same map.
#[derive(Clone, Copy, Debug)]
pub struct CoherenceMap<W: Words = SharedMem> {
    pub(super) words: W,
    pub(super) layout: Layout,
}

/// What the map says about a frame, for reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// The entry that counts for the frame: its own or its piece's.
    pub unit: Unit,
    /// The entry's state.
    pub state: State,
    /// Nodes that may hold rights.
    pub mapped: NodeSet,
    /// Nodes that have to refresh before they execute.
    pub stale: NodeSet,
    /// The node that changes the entry right now.
    pub holder: Option<Member>,
}

/// How an attempt to lock ended.
pub(super) enum Attempt {
    /// Locked; this is the control word now.
    Locked(Control),
    /// Somebody else has it, or is next.
    Busy,
    /// The piece has been split.
    Split,
}

impl<W: Words> CoherenceMap<W> {
    /// The map in `words`; `None` if the geometry is impossible or the window
    /// too small for it.
    #[must_use]
    pub fn new(words: W, geometry: Geometry) -> Option<Self> {
        let layout = Layout::new(geometry)?;
        (words.count() >= layout.end).then_some(Self { words, layout })
    }

    /// Takes `node` in, with an epoch that it never had before.
    ///
    /// # Errors
    /// If the node's number is out of range, its epoch 0, or it takes part
    /// already.
    pub fn join(&self, node: NodeId, epoch: u32) -> Result<Member, CoherenceError> {
        if usize::from(node.0) >= self.layout.geometry.nodes || epoch == 0 {
            return Err(CoherenceError::NoSuchNode { node });
        }
        // AcqRel: after the fence of the former life and all that preceded it.
        self.words
            .compare_exchange(Layout::epoch(node), 0, u64::from(epoch), Ordering::AcqRel)
            .map_err(|_| CoherenceError::AlreadyIn { node })?;
        // What a former life has left open: peers may still answer it, which
        // does no harm, but nobody will ever wait for these answers.
        for slot in 0..self.layout.geometry.slots {
            let at = self.layout.request(node, slot).sequence;
            let last = self.words.load(at, Ordering::Relaxed);
            if last % 2 == 1 {
                self.words
                    .store(at, last.saturating_add(1) & !1, Ordering::Release);
            }
        }
        self.words.store(Layout::slots(node), 0, Ordering::Release);
        Ok(Member { node, epoch })
    }

    /// Puts a node out: its rights, its locks and its requests are void from
    /// now on. Any node may do this, any number of times; all of it is one
    /// word, however large the memory.
    ///
    /// The caller vouches that the node's guest code has stopped: nothing here
    /// can take the memory away from a node that goes on regardless.
    ///
    /// # Errors
    /// If the node's number is out of range.
    pub fn fence(&self, member: Member) -> Result<(), CoherenceError> {
        if usize::from(member.node.0) >= self.layout.geometry.nodes {
            return Err(CoherenceError::NoSuchNode { node: member.node });
        }
        // AcqRel: the node's death comes before what anybody does because of
        // it. A failure means that it was fenced already, or has come back.
        let _ = self.words.compare_exchange(
            Layout::epoch(member.node),
            u64::from(member.epoch),
            0,
            Ordering::AcqRel,
        );
        Ok(())
    }

    /// Begins to resolve a fault of `member`'s guest on the frame with this
    /// number. Nothing happens before the first [`Fault::poll`].
    ///
    /// # Errors
    /// If there is no such frame.
    pub fn fault(
        &self,
        member: Member,
        frame: usize,
        access: Access,
    ) -> Result<Fault<W>, CoherenceError> {
        if frame >= self.layout.geometry.frames {
            return Err(CoherenceError::NoSuchFrame { frame });
        }
        self.check(member)?;
        Ok(Fault::new(self.clone(), member, frame, access))
    }

    /// Takes untouched pieces for a node that has loaded them and will run
    /// them, and calls `install` for each, to be mapped with all rights.
    /// Pieces that anybody has touched before are left alone.
    ///
    /// # Errors
    /// If the range is not inside guest memory, the node has been fenced, or
    /// an entry is corrupt.
    pub fn claim(
        &self,
        member: Member,
        pieces: Range<usize>,
        mut install: impl FnMut(Unit),
    ) -> Result<(), CoherenceError> {
        for piece in pieces {
            let unit = Unit::Piece(piece);
            if !self.layout.has(unit) {
                return Err(CoherenceError::NoSuchFrame {
                    frame: piece.saturating_mul(FRAMES_PER_PIECE),
                });
            }
            self.check(member)?;
            let at = self.layout.entry(unit);
            let mut patience = PATIENCE;
            let Attempt::Locked(control) = self.try_lock(member, unit, &mut patience)? else {
                continue;
            };
            let me = NodeSet::only(member.node);
            let untouched = control.state == State::Unmapped
                && self.words.load(at.mapped, Ordering::Relaxed) == 0
                && self.words.load(at.stale, Ordering::Relaxed) & me.0 == 0;
            if untouched {
                self.words.fetch_or(at.translated, me.0, Ordering::Relaxed);
                self.words.store(at.mapped, me.0, Ordering::Relaxed);
                self.update(member, unit, |control| control.state = State::Private)?;
                install(unit);
            }
            self.unlock(member, unit)?;
        }
        Ok(())
    }

    /// Gives a node frames that others share and that it may need soon,
    /// without asking anybody, and calls `install` for each. Frames that can't
    /// be had in this way, or that the node has, are left alone.
    ///
    /// For the neighbours of a frame that a node has just joined in a split
    /// piece, which it would else fault on one by one.
    ///
    /// # Errors
    /// If the range is not inside guest memory, the node has been fenced, or
    /// an entry is corrupt.
    pub fn join_around(
        &self,
        member: Member,
        frames: Range<usize>,
        mut install: impl FnMut(Unit, Rights),
    ) -> Result<(), CoherenceError> {
        for frame in frames {
            // What a read would be given, and never more than that: nobody is
            // asked to give up anything and nothing needs a refresh.
            let mut fault = self.fault(member, frame, Access::Read)?;
            fault.join_if_free(&mut install)?;
        }
        Ok(())
    }

    /// What the map says about a frame.
    ///
    /// # Errors
    /// If there is no such frame or its entry is corrupt.
    pub fn view(&self, frame: usize) -> Result<View, CoherenceError> {
        if frame >= self.layout.geometry.frames {
            return Err(CoherenceError::NoSuchFrame { frame });
        }
        let mut unit = Unit::Piece(frame / FRAMES_PER_PIECE);
        let mut control = self.control(unit)?;
        if control.state == State::Split {
            unit = Unit::Frame(frame);
            control = self.control(unit)?;
        }
        let at = self.layout.entry(unit);
        Ok(View {
            unit,
            state: control.state,
            mapped: NodeSet(self.words.load(at.mapped, Ordering::Relaxed)),
            stale: NodeSet(self.words.load(at.stale, Ordering::Relaxed)),
            holder: control.holder,
        })
    }

    /// That the member has not been fenced.
    pub(super) fn check(&self, member: Member) -> Result<(), CoherenceError> {
        if usize::from(member.node.0) >= self.layout.geometry.nodes {
            return Err(CoherenceError::NoSuchNode { node: member.node });
        }
        if self.alive(member) {
            Ok(())
        } else {
            Err(CoherenceError::Fenced { node: member.node })
        }
    }

    fn alive(&self, member: Member) -> bool {
        self.epoch(member.node) == u64::from(member.epoch)
    }

    /// Whether a node of this number takes part, in whichever life.
    pub(super) fn is_member(&self, node: NodeId) -> bool {
        self.epoch(node) != 0
    }

    fn epoch(&self, node: NodeId) -> u64 {
        if usize::from(node.0) >= self.layout.geometry.nodes {
            return 0;
        }
        // Acquire: a node's end comes before what is done because of it; pairs
        // with `fence`.
        self.words.load(Layout::epoch(node), Ordering::Acquire)
    }

    /// The nodes of the set that take part.
    pub(super) fn members_of(&self, set: NodeSet) -> NodeSet {
        set.filter(|node| self.is_member(*node))
            .fold(NodeSet::EMPTY, NodeSet::with)
    }

    fn control(&self, unit: Unit) -> Result<Control, CoherenceError> {
        // Acquire: what its last holder wrote comes before; pairs with
        // `unlock`, and with `split` for the entries of frames.
        let raw = self
            .words
            .load(self.layout.entry(unit).control, Ordering::Acquire);
        self.decoded(unit, raw)
    }

    fn decoded(&self, unit: Unit, raw: u64) -> Result<Control, CoherenceError> {
        let control = Control::from_raw(raw);
        control
            .filter(|control| control.state != State::Split || matches!(unit, Unit::Piece(_)))
            .ok_or(CoherenceError::CorruptEntry { unit, found: raw })
    }

    /// Tries to lock an entry, once.
    ///
    /// A lock whose holder has been fenced is taken over: what an entry says
    /// is at every instant an upper bound of what the nodes have, so it can be
    /// left in the middle of a change.
    ///
    /// Who finds the lock taken puts itself down as successor, if nobody is.
    /// The others leave a free lock to the successor for `patience` attempts,
    /// in case that has died or lost interest.
    pub(super) fn try_lock(
        &self,
        member: Member,
        unit: Unit,
        patience: &mut u32,
    ) -> Result<Attempt, CoherenceError> {
        let at = self.layout.entry(unit);
        let found = self.control(unit)?;
        let me = Some(member.node);
        if found.state == State::Split {
            return Ok(Attempt::Split);
        }
        if found.holder.is_some_and(|holder| self.alive(holder)) {
            if found.successor.is_none() {
                let announced = Control {
                    successor: me,
                    ..found
                };
                // Relaxed: orders nothing. If it fails, so be it.
                let _ = self.words.compare_exchange(
                    at.control,
                    found.raw(),
                    announced.raw(),
                    Ordering::Relaxed,
                );
            }
            return Ok(Attempt::Busy);
        }
        if found.successor.is_some() && found.successor != me && *patience < PATIENCE {
            *patience += 1;
            return Ok(Attempt::Busy);
        }
        let locked = Control {
            successor: None,
            holder: Some(member),
            ..found
        };
        // Acquire: the last holder's writes to the entry come before ours.
        match self
            .words
            .compare_exchange(at.control, found.raw(), locked.raw(), Ordering::Acquire)
        {
            Ok(_) => Ok(Attempt::Locked(locked)),
            Err(_) => Ok(Attempt::Busy),
        }
    }

    /// The control word of an entry that `member` has locked.
    pub(super) fn held(&self, member: Member, unit: Unit) -> Result<Control, CoherenceError> {
        let control = self.control(unit)?;
        if control.holder == Some(member) {
            Ok(control)
        } else {
            Err(CoherenceError::Fenced { node: member.node })
        }
    }

    /// Changes the control word of an entry that `member` has locked.
    pub(super) fn update(
        &self,
        member: Member,
        unit: Unit,
        change: impl Fn(&mut Control),
    ) -> Result<(), CoherenceError> {
        let at = self.layout.entry(unit).control;
        let mut raw = self.words.load(at, Ordering::Relaxed);
        // Each failure means that a waiter put itself down as successor, which
        // happens once per lock: more failures are somebody's garbage.
        for _ in 0..MAX_TRIES {
            let mut control = self.decoded(unit, raw)?;
            if control.holder != Some(member) {
                return Err(CoherenceError::Fenced { node: member.node });
            }
            change(&mut control);
            // Release: the entry's other words are written before; pairs with
            // the Acquire of whoever locks, or takes over, next.
            match self
                .words
                .compare_exchange(at, raw, control.raw(), Ordering::Release)
            {
                Ok(_) => return Ok(()),
                Err(now) => raw = now,
            }
        }
        Err(CoherenceError::CorruptEntry { unit, found: raw })
    }

    pub(super) fn unlock(&self, member: Member, unit: Unit) -> Result<(), CoherenceError> {
        self.update(member, unit, |control| control.holder = None)
    }

    /// Splits the piece that `member` has locked, and unlocks it: its frames
    /// get its state, and count from then on.
    ///
    /// No node has to hear of it: rights don't change.
    pub(super) fn split(
        &self,
        member: Member,
        piece: usize,
        state: State,
    ) -> Result<(), CoherenceError> {
        let unit = Unit::Piece(piece);
        let EntryAt { mapped, stale, .. } = self.layout.entry(unit);
        let mapped = self.words.load(mapped, Ordering::Relaxed);
        let stale = self.words.load(stale, Ordering::Relaxed);
        let control = Control::free(state).raw();
        for frame in self.layout.frames_of(piece) {
            // Relaxed: nobody looks at them before the piece says Split.
            let at = self.layout.entry(Unit::Frame(frame));
            self.words.store(at.control, control, Ordering::Relaxed);
            self.words.store(at.mapped, mapped, Ordering::Relaxed);
            self.words.store(at.stale, stale, Ordering::Relaxed);
        }
        self.update(member, unit, |control| {
            control.state = State::Split;
            control.holder = None;
            control.successor = None;
        })
    }
}
