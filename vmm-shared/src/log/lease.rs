//! Joining, leases and eviction: how members come and how they go.
//!
//! A member shows that it lives by counting up its heartbeat. Every other
//! member watches the count with its *own* clock, so no clocks need to agree:
//! a count that stays the same for a lease, over several looks, means a
//! member to evict. That may be wrong: the member may only have been paused.
//! Nothing depends on its being right, because an eviction takes effect by
//! its place in the log (see "Fencing" in the [module docs](super)).

use alloc::vec::Vec;

use crate::sync::Ordering;

use super::Log;
use super::clock::{Clock, Wait};
use super::combining::Readers;
use super::machine::StateMachine;
use super::member::{Epoch, HEARTBEAT, MAX_NODE, MemberId, State, Status};
use super::replica::{Config, Core, Guard, Phase, Replica, ReplicaError};
use super::roster::Change;
use super::snapshot::last_request;

/// What this member has seen of the others.
#[derive(Debug)]
pub(crate) struct Watch {
    looked_ns: u64,
    seen: Vec<Seen>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    epoch: Epoch,
    beat: u64,
    applied: u64,
    wanted: Option<u64>,
    silent_ns: u64,
}

impl Watch {
    pub(crate) const fn new(now_ns: u64) -> Self {
        Self {
            looked_ns: now_ns,
            seen: Vec::new(),
        }
    }

    /// Looks at all members once, and returns those to evict.
    fn look(
        &mut self,
        log: &Log,
        me: MemberId,
        my_applied: u64,
        now_ns: u64,
        lease_ns: u64,
    ) -> Vec<(MemberId, Epoch)> {
        // A watcher that slept itself must not count its own sleep as the
        // others' silence: one look counts for a quarter of the lease at most.
        let step = now_ns.saturating_sub(self.looked_ns).min(lease_ns / 4);
        self.looked_ns = now_ns;
        self.seen.resize(log.geometry().members, Seen::default());
        let mut silent = Vec::new();
        let (head, far) = (log.head(), log.geometry().order_slots as u64 / 2);
        for (member, seen) in log.members().zip(&mut self.seen) {
            let status = log.status(member);
            let limit = match status.state {
                State::Joining | State::Live => lease_ns,
                // Its evictor is at work, or has died over it.
                State::Evicting => lease_ns / 4,
                State::Ending => 0,
                State::Free | State::Evicted => continue,
            };
            // Relaxed: a sign of life, and nothing is read on its strength.
            let beat = log.record(member, HEARTBEAT, 0).load(Ordering::Relaxed);
            let applied = log.applied(member);
            let quiet = (seen.epoch, seen.beat) == (status.epoch, beat);
            let wanted = log.wanted(member);
            // A heart that beats is not enough for one that holds up the log:
            // its combiner may hang while another thread ticks. One that goes
            // on asking for pieces of a snapshot does not hang.
            let stuck = status.state == State::Live
                && (seen.epoch, seen.applied, seen.wanted) == (status.epoch, applied, wanted)
                && applied >= head
                && my_applied.saturating_sub(applied) > far;
            let silent_ns = if quiet || stuck {
                seen.silent_ns.saturating_add(step)
            } else {
                0
            };
            *seen = Seen {
                epoch: status.epoch,
                beat,
                applied,
                wanted,
                silent_ns,
            };
            if seen.silent_ns >= limit && member != me {
                seen.silent_ns = 0;
                silent.push((member, status.epoch));
            }
        }
        silent
    }
}

impl<S: StateMachine, C: Clock> Replica<S, C> {
    /// Joins the log: claims a member slot, gets the state (from the log's
    /// start if it still goes back so far, else from a live member) and
    /// becomes a member. `machine` is the state before the first operation.
    ///
    /// # Errors
    /// If that does not succeed within the configured wait, or a limit in
    /// `config` is zero.
    pub fn join(log: Log, machine: S, clock: C, config: Config) -> Result<Self, ReplicaError> {
        if config.threads == 0
            || config.part_bytes == 0
            || config.lease_ns < 4
            || config.node > MAX_NODE
        {
            return Err(ReplicaError::BadConfig);
        }
        let mut wait = Wait::new(config.wait_ns);
        let (me, epoch) = loop {
            if let Some(claimed) = claim(&log, config.node) {
                break claimed;
            }
            if wait.expired(&clock) {
                return Err(ReplicaError::NoFreeMember);
            }
        };
        let seq = last_request(&log, me);
        let replica = Self::new(log, machine, clock, config, me, epoch, seq);
        if let Err(error) = replica.enter(&mut wait) {
            replica.bury();
            return Err(error);
        }
        Ok(replica)
    }

    fn enter(&self, wait: &mut Wait) -> Result<(), ReplicaError> {
        let mut guard = self
            .lock
            .try_combine(Readers::Stay)
            .expect("nobody else has this replica yet");
        let mut joined = false;
        loop {
            self.beat();
            match self.step(&mut guard) {
                Ok(()) if !joined => {
                    self.append_change(&mut guard, Change::Joined, self.me, self.epoch)?;
                    joined = true;
                    continue;
                }
                Ok(()) if guard.core().roster.has(self.me, self.epoch) => break,
                Ok(()) | Err(ReplicaError::Loading) => {}
                Err(error) => return Err(error),
            }
            if wait.expired(&self.clock) {
                let anyone = self.pick_donor(None).is_some();
                return Err(if anyone || joined {
                    ReplicaError::TimedOut
                } else {
                    ReplicaError::StateLost
                });
            }
        }
        if self
            .log
            .change_status(self.me, self.epoch, State::Joining, State::Live)
        {
            Ok(())
        } else {
            Err(ReplicaError::Ended)
        }
    }

    /// Shows that this member lives.
    pub(crate) fn beat(&self) {
        // Relaxed: see `Watch::look`; and `ended` is a hint. A last beat after
        // the slot has changed hands only makes its new owner look alive.
        if self.ended.load(Ordering::Relaxed) == 0 {
            self.log
                .record(self.me, HEARTBEAT, 0)
                .fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The regular work of a member: renews its lease, applies what others
    /// have appended, evicts the silent, hands out snapshots. To be called at
    /// least four times per lease, on any thread; more often while somebody
    /// joins.
    ///
    /// # Errors
    /// If this member has ended, or its replica can't go on.
    pub fn tick(&self) -> Result<(), ReplicaError> {
        self.beat();
        let Some(mut guard) = self.lock.try_combine(Readers::Stay) else {
            // A node whose threads combine all the time must not be deaf to
            // the others: whoever has the lock does the rest.
            // Relaxed: a hint, which a later tick repeats.
            self.due.store(1, Ordering::Relaxed);
            return Ok(());
        };
        // Before anything else, so that the combiner does not do it as well.
        self.due.store(0, Ordering::Relaxed);
        self.combine(&mut guard);
        self.maintain(&mut guard)
    }

    /// What a tick does beyond renewing the lease and keeping up.
    pub(crate) fn maintain(&self, guard: &mut Guard<'_, S>) -> Result<(), ReplicaError> {
        // A lost slot shows in the status before it shows in the log.
        let status = self.log.status(self.me);
        if !status.is(State::Live, self.epoch) {
            self.end(guard);
        }
        let (core, local, _) = guard.view();
        match local.phase {
            Phase::Ended(error) => {
                self.bury();
                return Err(error);
            }
            Phase::Loading => return Ok(()),
            Phase::Running => {}
        }
        for (member, epoch) in self.mark_silent(core, local.applied) {
            match self.evict_with(guard, member, epoch) {
                // Tried again at a later tick.
                Ok(()) | Err(ReplicaError::Full | ReplicaError::Loading) => {}
                Err(error) => return Err(error),
            }
        }
        self.serve(guard);
        Ok(())
    }

    /// Looks for silent members, and marks them, so that none of them holds
    /// up the log. Done by whoever waits for room, too: that one may be the
    /// only member that could, and the dead may be what it waits for.
    pub(crate) fn mark_silent(&self, core: &mut Core<S>, applied: u64) -> Vec<(MemberId, Epoch)> {
        let now = self.clock.now_ns();
        let lease_ns = self.config.lease_ns;
        let silent = core.watch.look(&self.log, self.me, applied, now, lease_ns);
        for &(member, epoch) in &silent {
            self.mark(member, epoch);
        }
        silent
    }

    /// From here on the member's position counts no more.
    fn mark(&self, member: MemberId, epoch: Epoch) -> bool {
        [State::Live, State::Joining].into_iter().any(|state| {
            self.log
                .change_status(member, epoch, state, State::Evicting)
        })
    }

    /// Evicts a member at once, for a caller who knows that it is dead or
    /// wants it out. Nothing happens if that incarnation has ended already.
    ///
    /// # Errors
    /// If the eviction could not be linked within the wait.
    pub fn evict(&self, member: MemberId, epoch: Epoch) -> Result<(), ReplicaError> {
        let mut wait = Wait::new(self.config.wait_ns);
        loop {
            if let Some(mut guard) = self.lock.try_combine(Readers::Stay) {
                return self.evict_with(&mut guard, member, epoch);
            }
            if wait.expired(&self.clock) {
                return Err(ReplicaError::TimedOut);
            }
        }
    }

    fn evict_with(
        &self,
        guard: &mut Guard<'_, S>,
        member: MemberId,
        epoch: Epoch,
    ) -> Result<(), ReplicaError> {
        // First: there is room for the entry below even if the member was what
        // filled the log.
        self.mark(member, epoch);
        let found = self.log.status(member);
        if !found.is(State::Evicting, epoch) && !found.is(State::Ending, epoch) {
            return Ok(());
        }
        // Two evictors may both come here; the second entry has no effect.
        let position = self.append_change(guard, Change::Evicted, member, epoch)?;
        self.log.note_end(member, position + 1);
        for (from, to) in [
            (State::Evicting, State::Evicted),
            (State::Ending, State::Free),
        ] {
            self.log.change_status(member, epoch, from, to);
        }
        guard.core().counters.evictions += 1;
        self.catch_up(guard)
    }

    /// This member has lost its slot: it stops.
    pub(crate) fn end(&self, guard: &mut Guard<'_, S>) {
        self.stop_writing();
        guard.write(&self.clock, |_, local, _| {
            local.phase = Phase::Ended(ReplicaError::Ended);
        });
        self.bury();
    }

    /// Says that this incarnation has stopped, as its last act, so that its
    /// slot needs no quarantine.
    pub(crate) fn bury(&self) {
        self.stop_writing();
        self.log.confirm_dead(self.me, self.epoch);
    }
}

/// Claims a free member slot whose lane nobody needs to read any more.
fn claim(log: &Log, node: u32) -> Option<(MemberId, Epoch)> {
    let head = log.head();
    for member in log.members() {
        let free = log.status(member);
        let Some(epoch) = free.epoch.checked_add(1) else {
            continue;
        };
        // The last incarnation's batches are all before `ended_at`.
        if free.state != State::Free || log.ended_at(member) > head {
            continue;
        }
        let joining = Status {
            state: State::Joining,
            epoch,
            node,
        };
        if log.replace_status(member, free, joining) {
            // The log's start: in force while the log goes back so far, and
            // otherwise behind the frontier, where it holds up nobody.
            log.set_applied(member, 0);
            return Some((member, epoch));
        }
    }
    // Slots may wait for the frontier to pass their last batch.
    if let Some(lowest) = log.lowest_needed() {
        log.raise_head(lowest);
    }
    None
}
