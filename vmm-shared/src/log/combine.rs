//! Combining: one thread appends for all threads of its node.

use zerocopy::IntoBytes;

use super::batch::{
    Kind, MAX_ENTRIES, Piece, arena_words, batch_words, max_words, member_payload, offer_at, write,
};
use super::clock::{Clock, Wait};
use super::combining::Seats;
use super::layout::LINE;
use super::machine::StateMachine;
use super::member::{Epoch, MemberId, State};
use super::order::{Link, Slot};
use super::replica::{Core, Guard, Outcome, Phase, Replica, ReplicaError, Request, payload_len};
use super::roster::Change;
use crate::sync::{AtomicU64, Ordering};

impl<S: StateMachine, C: Clock> Replica<S, C> {
    /// Appends what waits in the seats, and `own`, as one batch; applies the
    /// log; gives the answers. Returns that of `own`.
    pub(crate) fn combine(
        &self,
        guard: &mut Guard<'_, S>,
        own: Option<Request<S>>,
    ) -> Option<Outcome<S>> {
        let mut wait = Wait::new(self.config.wait_ns);
        guard.core().left_over = own.map(|request| (request, None));
        loop {
            self.collect(guard);
            if guard.core().batch.is_empty() {
                // Nothing to append: only keep up. What stands in the way is
                // the business of those who wait for something.
                let _ = self.step(guard);
                break;
            }
            if let Err(error) = self.append_batch(guard, &mut wait) {
                answer_all(guard, error);
            } else {
                // The answers are given while the batch is applied.
                let _ = self.catch_up(guard);
                if let Some(position) = guard.core().in_flight.take() {
                    answer_all(guard, ReplicaError::OutcomeUnknown { position });
                }
            }
            if guard.core().left_over.is_none() {
                break;
            }
        }
        // Relaxed, both: a hint.
        if self.due.load(Ordering::Relaxed) != 0 {
            self.due.store(0, Ordering::Relaxed);
            // The next tick tells the platform what went wrong.
            let _ = self.maintain(guard);
        }
        guard.core().own_answer.take()
    }

    fn collect(&self, guard: &mut Guard<'_, S>) {
        let geometry = self.log.geometry();
        let (core, _, seats) = guard.view();
        core.batch.clear();
        core.waiting.clear();
        let mut arena = 0;
        let mut seat = 0;
        while core.batch.len() < MAX_ENTRIES {
            let (request, whose) = match core.left_over.take() {
                Some(first) => first,
                None if seat == seats.len() => break,
                None => {
                    seat += 1;
                    match seats.take(seat - 1) {
                        Some(request) => (request, Some(seat - 1)),
                        None => continue,
                    }
                }
            };
            let more = arena_words(geometry, payload_len(&request));
            if batch_words(geometry, core.batch.len() + 1, arena + more) > max_words(geometry) {
                core.left_over = Some((request, whose));
                break;
            }
            arena += more;
            core.batch.push(request);
            core.waiting.push(whose);
        }
    }

    fn append_batch(&self, guard: &mut Guard<'_, S>, wait: &mut Wait) -> Result<(), ReplicaError> {
        let geometry = *self.log.geometry();
        // A replica that loads a snapshot can append only when it is done.
        loop {
            match self.step(guard) {
                Err(ReplicaError::Loading) if !wait.expired(&self.clock) => self.beat(),
                Err(error) => return Err(error),
                Ok(()) => break,
            }
        }
        let batch = &guard.core().batch;
        let arena = batch
            .iter()
            .map(|request| arena_words(&geometry, payload_len(request)))
            .sum();
        let words = batch_words(&geometry, batch.len(), arena);
        let position = self.append(guard, words, wait, |batch, space| {
            let pieces = batch.iter().map(|request| Piece {
                kind: Kind::Operation,
                first: request.op.as_bytes(),
                second: &request.payload,
            });
            write(space, &geometry, self.epoch, pieces);
        })?;
        let core = guard.core();
        core.in_flight = Some(position);
        core.unanswered = core.waiting.len();
        Ok(())
    }

    /// Appends a change of membership.
    pub(crate) fn append_change(
        &self,
        guard: &mut Guard<'_, S>,
        change: Change,
        member: MemberId,
        epoch: Epoch,
    ) -> Result<u64, ReplicaError> {
        let geometry = *self.log.geometry();
        let payload = member_payload(member, epoch);
        let mut wait = Wait::new(self.config.wait_ns);
        let words = batch_words(&geometry, 1, 0);
        self.append(guard, words, &mut wait, |_, space| {
            let piece = Piece {
                kind: Kind::Membership(change),
                first: &payload,
                second: &[],
            };
            write(space, &geometry, self.epoch, [piece].into_iter());
        })
    }

    /// Reserves space in the lane, has the batch written there, and links it
    /// at the log's end.
    fn append(
        &self,
        guard: &mut Guard<'_, S>,
        words: usize,
        wait: &mut Wait,
        encode: impl Fn(&[Request<S>], &[AtomicU64]),
    ) -> Result<u64, ReplicaError> {
        let slots = self.log.geometry().order_slots as u64;
        loop {
            let core = guard.core();
            let lines = words.div_ceil(LINE);
            let Some(reserved) = core.lane.reserve(lines, core.head_seen) else {
                self.make_room(guard, wait)?;
                continue;
            };
            let link = Link {
                member: self.me,
                line: reserved.line,
            };
            let space = self
                .log
                .layout
                .lane(self.me, reserved.line, words)
                .expect("a reservation is inside the lane");
            encode(&core.batch, space);
            let mut seen = 0_u32;
            loop {
                let position = core.end;
                let free = match self.log.look(position) {
                    Slot::Filled(_) => {
                        core.end += 1;
                        seen += 1;
                        if seen.is_multiple_of(256) && wait.expired(&self.clock) {
                            return Err(ReplicaError::Full);
                        }
                        continue;
                    }
                    Slot::Free(free) => free,
                    Slot::Overrun => return Err(self.fall_behind(guard)),
                    Slot::Corrupt => return Err(ReplicaError::Corrupt { position }),
                };
                if position < core.head_seen {
                    return Err(self.fall_behind(guard));
                }
                if position - core.head_seen >= slots {
                    break;
                }
                if !self.log.has_laps_left(position) {
                    return Err(ReplicaError::Exhausted);
                }
                // After the end was found: see "Fencing" in the module docs.
                self.check_status()?;
                offer_at(space, position);
                if self.log.link(position, free, link) {
                    core.lane.commit(&reserved, position);
                    core.end = position + 1;
                    if position.is_multiple_of(slots / 4) {
                        self.reclaim(guard);
                    }
                    return Ok(position);
                }
            }
            drop(reserved);
            self.make_room(guard, wait)?;
        }
    }

    /// Whether this incarnation still holds its slot.
    fn check_status(&self) -> Result<(), ReplicaError> {
        let status = self.log.status(self.me);
        if status.is(State::Live, self.epoch) || status.is(State::Joining, self.epoch) {
            Ok(())
        } else {
            Err(ReplicaError::Ended)
        }
    }

    /// Moves the reclaim frontier as far as all members in good standing
    /// allow, but never past what this replica has applied: so whoever
    /// discards a batch has its effect.
    fn reclaim(&self, guard: &mut Guard<'_, S>) {
        let (core, local, _) = guard.view();
        let floor = self.log.lowest_needed().unwrap_or(local.applied);
        self.log.raise_head(floor.min(local.applied));
        core.head_seen = core.head_seen.max(self.log.head());
    }

    /// One step towards more space; returns when it is worth trying again.
    fn make_room(&self, guard: &mut Guard<'_, S>, wait: &mut Wait) -> Result<(), ReplicaError> {
        let before = guard.core().head_seen;
        match self.catch_up(guard) {
            Ok(()) => {}
            Err(error) => return Err(error),
        }
        self.reclaim(guard);
        let (core, local, _) = guard.view();
        if core.head_seen > before {
            return Ok(());
        }
        let applied = local.applied;
        // A member that waits lives.
        self.beat();
        self.mark_silent(core, applied);
        // What holds us up may be a joiner that waits for a part from us.
        self.serve(guard);
        self.nudge_slowest();
        let elapsed = wait.pause(&self.clock);
        if elapsed > self.config.patience_ns {
            // Go on without the slowest: it finds out, and loads a snapshot.
            let slots = self.log.geometry().order_slots as u64;
            let to = (before + (slots / 8).max(1))
                .min(applied)
                .min(self.log.applied_by(self.config.copies));
            if to > before {
                self.log.raise_head(to);
                let core = guard.core();
                core.head_seen = core.head_seen.max(self.log.head());
                core.counters.passed += 1;
                return Ok(());
            }
        }
        if elapsed > self.config.wait_ns {
            return Err(ReplicaError::Full);
        }
        Ok(())
    }

    fn nudge_slowest(&self) {
        let Some(lowest) = self.log.lowest_needed() else {
            return;
        };
        for member in self.log.members() {
            if member != self.me && self.log.applied(member) == lowest {
                self.clock.nudge(member);
            }
        }
    }

    /// Goes on with whatever this replica is at: loading or keeping up.
    pub(crate) fn step(&self, guard: &mut Guard<'_, S>) -> Result<(), ReplicaError> {
        let (_, local, _) = guard.view();
        if local.phase == Phase::Loading {
            self.load_step(guard)?;
        }
        self.catch_up(guard)
    }
}

fn answer_all<S: StateMachine>(guard: &mut Guard<'_, S>, error: ReplicaError) {
    let (core, _, seats) = guard.view();
    answer_rest(core, &seats, error);
}

/// Answers every request of the batch that has no answer yet.
pub(crate) fn answer_rest<S: StateMachine>(
    core: &mut Core<S>,
    seats: &Seats<'_, Request<S>, Outcome<S>>,
    error: ReplicaError,
) {
    for index in 0..core.waiting.len() {
        answer(core, seats, index, Err(error));
    }
    core.waiting.clear();
}

/// Answers request `index` of the batch, if it has no answer yet.
pub(crate) fn answer<S: StateMachine>(
    core: &mut Core<S>,
    seats: &Seats<'_, Request<S>, Outcome<S>>,
    index: usize,
    answer: Outcome<S>,
) {
    let Some(whose) = core.waiting.get(index) else {
        return;
    };
    core.unanswered = core.unanswered.saturating_sub(1);
    match whose {
        Some(seat) => seats.answer(*seat, answer),
        None if core.own_answer.is_none() => core.own_answer = Some(answer),
        None => {}
    }
}
