//! Applying: the log's batches, in order, to the replica's state.

use zerocopy::TryFromBytes;

use super::batch::{Batch, Kind, NoBatch, fetch, parse_member};
use super::clock::Clock;
use super::combine::{answer, answer_rest};
use super::combining::Seats;
use super::machine::{At, StateMachine};
use super::order::Slot;
use super::replica::{Core, Guard, Local, Outcome, Phase, Replica, ReplicaError, Request};
use super::roster::MemberChange;
use super::snapshot::Transfer;

/// How far to apply, and to how much of the state.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit {
    /// The position to stop at.
    pub(crate) until: u64,
    /// The state up to this bound is loaded; `None` if all of it is.
    pub(crate) below: Option<u64>,
}

/// Why applying stopped early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    Overrun,
    Corrupt { position: u64 },
}

impl<S: StateMachine, C: Clock> Replica<S, C> {
    /// Applies all that is in the log, up to one lap at a time.
    pub(crate) fn catch_up(&self, guard: &mut Guard<'_, S>) -> Result<(), ReplicaError> {
        let (_, local, _) = guard.view();
        match local.phase {
            Phase::Running => {}
            Phase::Loading => return Err(ReplicaError::Loading),
            Phase::Ended(error) => return Err(error),
        }
        if matches!(self.log.look(local.applied), Slot::Free(_)) {
            return Ok(());
        }
        let limit = Limit {
            until: local.applied + self.log.geometry().order_slots as u64,
            below: None,
        };
        let stop = guard.write(&self.clock, |core, local, seats| {
            let stop = self.apply(core, local, &seats, limit);
            core.end = core.end.max(local.applied);
            if core.roster.has_ended(self.me, self.epoch) {
                // Whatever of ours is in the log after that is a tombstone.
                local.phase = Phase::Ended(ReplicaError::Ended);
                if core.in_flight.take().is_some() {
                    answer_rest(core, &seats, ReplicaError::Ended);
                }
            }
            stop
        });
        let (_, local, _) = guard.view();
        if let Phase::Ended(error) = local.phase {
            self.stop_writing();
            self.bury();
            return Err(error);
        }
        self.log.set_applied(self.me, local.applied);
        match stop {
            None => Ok(()),
            Some(Stop::Overrun) => Err(self.fall_behind(guard)),
            Some(Stop::Corrupt { position }) => Err(ReplicaError::Corrupt { position }),
        }
    }

    /// Notes that the log has gone on without this replica, which now needs a
    /// snapshot.
    pub(crate) fn fall_behind(&self, guard: &mut Guard<'_, S>) -> ReplicaError {
        let seq = self.last_request();
        guard.write(&self.clock, |core, local, _| {
            local.phase = Phase::Loading;
            core.transfer = Some(Transfer::new(seq));
            core.counters.overruns += 1;
        });
        ReplicaError::Loading
    }

    pub(crate) fn apply(
        &self,
        core: &mut Core<S>,
        local: &mut Local<S>,
        seats: &Seats<'_, Request<S>, Outcome<S>>,
        limit: Limit,
    ) -> Option<Stop> {
        let mut copy = core::mem::take(&mut core.copy);
        let mut stop = None;
        while local.applied < limit.until && !core.roster.has_ended(self.me, self.epoch) {
            let position = local.applied;
            if core.in_flight == Some(position) {
                // Our own, and so ours to answer: nobody needs to read it back.
                core.in_flight = None;
                self.apply_own(core, local, seats);
                local.applied = position + 1;
                continue;
            }
            let link = match self.log.look(position) {
                Slot::Filled(link) => link,
                Slot::Free(_) => break,
                Slot::Overrun => {
                    stop = Some(Stop::Overrun);
                    break;
                }
                Slot::Corrupt => {
                    stop = Some(Stop::Corrupt { position });
                    break;
                }
            };
            match fetch(&self.log, position, link, &mut copy) {
                Ok(batch) => self.apply_batch(core, local, &batch, limit.below),
                Err(NoBatch::Malformed) => core.counters.malformed += 1,
                Err(NoBatch::Overrun) => {
                    stop = Some(Stop::Overrun);
                    break;
                }
            }
            local.applied = position + 1;
        }
        core.copy = copy;
        stop
    }

    /// Applies the batch that this replica has just linked.
    fn apply_own(
        &self,
        core: &mut Core<S>,
        local: &mut Local<S>,
        seats: &Seats<'_, Request<S>, Outcome<S>>,
    ) {
        core.counters.batches += 1;
        if !core.roster.has(self.me, self.epoch) {
            core.counters.tombstones += 1;
            answer_rest(core, seats, ReplicaError::Ended);
            return;
        }
        let at = At {
            position: local.applied,
            member: self.me,
        };
        let batch = core::mem::take(&mut core.batch);
        core.counters.operations += batch.len() as u64;
        for (index, request) in batch.iter().enumerate() {
            let result = local.machine.apply(&request.op, &request.payload, at);
            answer(core, seats, index, Ok(result));
        }
        core.batch = batch;
    }

    fn apply_batch(
        &self,
        core: &mut Core<S>,
        local: &mut Local<S>,
        batch: &Batch<'_>,
        below: Option<u64>,
    ) {
        let position = local.applied;
        let at = At {
            position,
            member: batch.author.0,
        };
        core.counters.batches += 1;
        let mut tombstone = false;
        for index in 0..batch.len() {
            let Some(entry) = batch.entry(index) else {
                core.counters.malformed += 1;
                continue;
            };
            let (member, epoch) = batch.author;
            match entry.kind {
                Kind::Operation if !core.roster.has(member, epoch) => tombstone = true,
                Kind::Operation => {
                    let Ok((op, payload)) = S::Op::try_read_from_prefix(entry.payload) else {
                        core.counters.malformed += 1;
                        continue;
                    };
                    core.counters.operations += 1;
                    if let Some(bound) = below {
                        local.machine.apply_below(bound, &op, payload, at);
                    } else {
                        local.machine.apply(&op, payload, at);
                    }
                }
                Kind::Membership(change) => {
                    let Some((member, epoch)) = parse_member(entry.payload) else {
                        core.counters.malformed += 1;
                        continue;
                    };
                    if core.roster.change(batch.author, change, member, epoch) {
                        local.machine.member_changed(&MemberChange {
                            change,
                            member,
                            epoch,
                            position,
                        });
                    }
                }
            }
        }
        core.counters.tombstones += u64::from(tombstone);
    }
}
