//! A guest's fault on its way to a grant.

use core::sync::atomic::Ordering;

use super::CoherenceError;
use super::entry::{Member, State};
use super::map::{Attempt, CoherenceMap};
use super::requests::Ticket;
use super::rights::{Access, NodeSet, Rights, Unit};
use super::rules::{Change, Plan, Situation, Verdict, decide};
use super::words::Words;
use crate::shm::SharedMem;

/// What a fault waits for, or its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Do what the grant says, then [`Fault::complete`].
    Granted(Grant),
    /// These nodes have been asked and have not answered yet: ring their
    /// doorbells when this is first returned, and see [`Fault::nudge`].
    Revoking(NodeSet),
    /// Somebody else is changing the entry: poll again.
    Busy,
}

/// Rights for a node, and its duties.
///
/// In this order: refresh, install, flush, [`Fault::complete`]. The entry
/// stays locked until then, so no other node can ask for the rights back
/// before they are in the page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// What to map. A frame may be part of a large page: split that.
    pub unit: Unit,
    /// The rights that replace those the node has on the unit.
    pub rights: Rights,
    /// Rewrite the frame's bytes in place first
    /// ([`refresh`](super::refresh())). The unit is a frame then.
    pub must_refresh: bool,
    /// The node may lose a right by this: flush the TLBs of all its cores
    /// between installing and completing.
    pub must_flush: bool,
    /// What happened to the entry.
    pub change: Change,
    /// A piece was split for this.
    pub split: bool,
    /// Nodes that gave up rights for this.
    pub asked: NodeSet,
}

/// One fault of a guest, from [`CoherenceMap::fault`].
///
/// Holds at most one lock, and never waits: between two polls, the core must
/// go on serving its node's revocations. Dropping a fault that has been polled,
/// without [`complete`](Self::complete) or [`abandon`](Self::abandon), leaves the entry
/// locked until the node is fenced.
#[derive(Debug)]
#[must_use = "nothing happens until it is polled"]
pub struct Fault<W: Words = SharedMem> {
    map: CoherenceMap<W>,
    member: Member,
    frame: usize,
    access: Access,
    patience: u32,
    split: bool,
    phase: Phase,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// No lock yet.
    Outside,
    /// The entry is locked, nobody asked.
    Locked(Unit),
    /// The entry is locked, and peers have been asked.
    Revoking {
        unit: Unit,
        plan: Plan,
        ticket: Ticket,
        asked: NodeSet,
        pending: NodeSet,
    },
    /// The entry is locked and says what is granted.
    Granted(Grant),
}

/// What the holder of the lock finds in an entry.
struct Found {
    plan: Option<Plan>,
    state: State,
    others: NodeSet,
}

impl<W: Words> Fault<W> {
    pub(super) const fn new(
        map: CoherenceMap<W>,
        member: Member,
        frame: usize,
        access: Access,
    ) -> Self {
        Self {
            map,
            member,
            frame,
            access,
            patience: 0,
            split: false,
            phase: Phase::Outside,
        }
    }

    /// Goes on as far as possible without waiting.
    ///
    /// # Errors
    /// [`CoherenceError::Fenced`] if this node is out; anything else means
    /// that the shared table is damaged, and the VM must stop.
    pub fn poll(&mut self) -> Result<Step, CoherenceError> {
        self.map.check(self.member)?;
        loop {
            match self.phase {
                Phase::Outside => match self.enter()? {
                    Some(unit) => self.phase = Phase::Locked(unit),
                    None => return Ok(Step::Busy),
                },
                Phase::Locked(unit) => {
                    if !self.examine(unit)? {
                        return Ok(Step::Busy);
                    }
                }
                Phase::Revoking {
                    unit,
                    plan,
                    ticket,
                    asked,
                    pending,
                } => {
                    let pending = self.map.unanswered(self.member, ticket, pending)?;
                    if !pending.is_empty() {
                        self.phase = Phase::Revoking {
                            unit,
                            plan,
                            ticket,
                            asked,
                            pending,
                        };
                        return Ok(Step::Revoking(pending));
                    }
                    self.map.close(self.member, ticket);
                    self.settle(unit, plan, asked)?;
                }
                Phase::Granted(grant) => return Ok(Step::Granted(grant)),
            }
        }
    }

    /// Repeats the hints to nodes that have not answered, and returns them,
    /// so that the caller rings again. For when a time-out has passed.
    #[must_use = "these nodes need a doorbell"]
    pub fn nudge(&self) -> NodeSet {
        match self.phase {
            Phase::Revoking { pending, .. } => {
                self.map.hint(self.member.node, pending);
                pending
            }
            _ => NodeSet::EMPTY,
        }
    }

    /// Ends the fault, once the grant's duties are done.
    ///
    /// # Errors
    /// As for [`poll`](Self::poll), and [`CoherenceError::NotGranted`] if
    /// there is no grant yet.
    pub fn complete(self) -> Result<(), CoherenceError> {
        let Phase::Granted(grant) = self.phase else {
            return Err(CoherenceError::NotGranted);
        };
        if grant.must_refresh {
            let at = self.map.layout.entry(grant.unit).stale;
            let stale = NodeSet(self.map.words.load(at, Ordering::Relaxed));
            // Relaxed: under the entry's lock.
            self.map
                .words
                .store(at, stale.without(self.member.node).0, Ordering::Relaxed);
        }
        self.map.unlock(self.member, grant.unit)
    }

    /// Gives the fault up, as when the VM stops. What was granted must not be
    /// installed.
    ///
    /// # Errors
    /// As for [`poll`](Self::poll).
    pub fn abandon(self) -> Result<(), CoherenceError> {
        match self.phase {
            Phase::Outside => Ok(()),
            Phase::Locked(unit) => self.map.unlock(self.member, unit),
            Phase::Revoking { unit, ticket, .. } => {
                self.map.close(self.member, ticket);
                self.map.unlock(self.member, unit)
            }
            Phase::Granted(grant) => self.map.unlock(self.member, grant.unit),
        }
    }

    /// Tries to get the frame for its node without asking anybody, before the
    /// guest needs it.
    pub(super) fn join_if_free(
        &mut self,
        install: impl FnOnce(Unit, Rights),
    ) -> Result<(), CoherenceError> {
        let Some(unit) = self.enter()? else {
            return Ok(());
        };
        let plan = self.look(unit)?.plan;
        let free = |plan: &Plan| plan.change == Change::Join && plan.keep.is_none();
        if let (Unit::Frame(_), Some(plan)) = (unit, plan.filter(free)) {
            self.settle(unit, plan, NodeSet::EMPTY)?;
            install(unit, plan.rights);
        }
        self.map.unlock(self.member, unit)
    }

    /// Locks the entry that counts for the frame.
    fn enter(&mut self) -> Result<Option<Unit>, CoherenceError> {
        let frame = Unit::Frame(self.frame);
        for unit in [Unit::Piece(frame.piece()), frame] {
            match self.map.try_lock(self.member, unit, &mut self.patience)? {
                Attempt::Locked(_) => return Ok(Some(unit)),
                Attempt::Busy => return Ok(None),
                Attempt::Split => {}
            }
        }
        Ok(None)
    }

    /// Decides what to do with the locked entry and begins it; false if that
    /// needs a request slot and none is free.
    fn examine(&mut self, unit: Unit) -> Result<bool, CoherenceError> {
        let Found {
            plan,
            state,
            others,
        } = self.look(unit)?;
        let Some(plan) = plan else {
            self.map.split(self.member, unit.piece(), state)?;
            self.split = true;
            self.phase = Phase::Outside;
            return Ok(true);
        };
        let Some(keep) = plan.keep else {
            self.settle(unit, plan, NodeSet::EMPTY)?;
            return Ok(true);
        };
        match self.map.ask(self.member, unit, keep, others)? {
            None => Ok(false),
            Some(ticket) => {
                self.phase = Phase::Revoking {
                    unit,
                    plan,
                    ticket,
                    asked: others,
                    pending: others,
                };
                Ok(true)
            }
        }
    }

    /// Reads the locked entry; no plan means that it is a piece to split.
    fn look(&self, unit: Unit) -> Result<Found, CoherenceError> {
        let me = self.member.node;
        let at = self.map.layout.entry(unit);
        let control = self.map.held(self.member, unit)?;
        // Relaxed: ordered by the lock.
        let mapped = NodeSet(self.map.words.load(at.mapped, Ordering::Relaxed));
        let stale = NodeSet(self.map.words.load(at.stale, Ordering::Relaxed));
        let others = self.map.members_of(mapped.without(me));
        let verdict = decide(Situation {
            state: control.state,
            history: control.history,
            others: !others.is_empty(),
            mapped: mapped.contains(me),
            stale: stale.contains(me),
            piece: matches!(unit, Unit::Piece(_)),
            access: self.access,
        });
        Ok(Found {
            plan: match verdict {
                Verdict::Split => None,
                Verdict::Become(plan) => Some(plan),
            },
            state: control.state,
            others,
        })
    }

    /// Writes the outcome into the locked entry, in an order that leaves an
    /// upper bound of everybody's rights behind at every instant.
    fn settle(&mut self, unit: Unit, plan: Plan, asked: NodeSet) -> Result<(), CoherenceError> {
        let me = self.member.node;
        let at = self.map.layout.entry(unit);
        let words = &self.map.words;
        let before = self.map.held(self.member, unit)?.state;
        let had = NodeSet(words.load(at.mapped, Ordering::Relaxed));
        let mut stale = NodeSet(words.load(at.stale, Ordering::Relaxed));
        let mine = if stale.contains(me) {
            before.rights() & Rights::READ_WRITE
        } else {
            before.rights()
        };
        let must_flush = had.contains(me) && !plan.rights.contains(mine);
        let others = match plan.keep {
            Some(Rights::NONE) => NodeSet::EMPTY,
            _ => self.map.members_of(had.without(me)),
        };
        // Relaxed, all four: under the entry's lock, except for `translated`,
        // which frames of a piece share: a node that executes this frame puts
        // itself there under this frame's lock, and that is what matters here.
        if plan.rights.contains(Rights::WRITE) {
            // Whatever others have translated, this node may change now.
            let translated = NodeSet(words.load(at.translated, Ordering::Relaxed));
            stale = NodeSet(stale.0 | translated.without(me).0);
            words.store(at.stale, stale.0, Ordering::Relaxed);
        }
        if plan.rights.contains(Rights::EXECUTE) {
            words.fetch_or(at.translated, NodeSet::only(me).0, Ordering::Relaxed);
        }
        words.store(at.mapped, others.with(me).0, Ordering::Relaxed);
        self.map.update(self.member, unit, |control| {
            control.state = plan.state;
            control.history = plan.history;
        })?;
        self.phase = Phase::Granted(Grant {
            unit,
            rights: plan.rights,
            must_refresh: plan.rights.contains(Rights::EXECUTE) && stale.contains(me),
            must_flush,
            change: plan.change,
            split: self.split,
            asked,
        });
        Ok(())
    }
}
