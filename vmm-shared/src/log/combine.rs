//! Combining: one thread appends for all threads of its node.
//!
//! [`Replica::update`] tries the short way first: if nothing waits in the
//! seats and nothing is new in the log, one operation is written, linked and
//! applied without a batch being collected. All else takes the long way.

use zerocopy::IntoBytes;

use super::batch::{
    Kind, MAX_ENTRIES, Piece, arena_words, batch_words, max_words, member_payload, offer_at, write,
};
use super::clock::{Clock, Wait};
use super::combining::Seats;
use super::layout::LINE;
use super::machine::{At, StateMachine};
use super::member::{Epoch, MemberId};
use super::order::{Link, Slot};
use super::replica::{
    Core, Guard, Outcome, Phase, Replica, ReplicaError, Request, payload_len, words_for,
};
use super::roster::Change;
use crate::sync::{AtomicU64, Ordering};

/// Members that find each other's batches within this time append by turns.
const SOON_NS: u64 = 8_000;
/// How long one of them then gives way, and in how many looks at the most.
const GIVE_WAY_NS: u64 = 1_000;
const GIVE_WAY_ROUNDS: u32 = if cfg!(loom) { 0 } else { 256 };

impl<S: StateMachine, C: Clock> Replica<S, C> {
    /// Appends an operation of the caller's, and what waits in the seats;
    /// applies the log; gives the answers.
    #[inline]
    pub(crate) fn update(
        &self,
        guard: &mut Guard<'_, S>,
        op: &S::Op,
        payload: &[u8],
    ) -> Outcome<S> {
        let answer = match self.append_alone(guard, op, payload) {
            Some(answer) => Ok(answer),
            None => self.combine_with(guard, op, payload),
        };
        self.do_due(guard);
        answer
    }

    /// Appends what waits in the seats; applies the log; gives the answers.
    pub(crate) fn combine(&self, guard: &mut Guard<'_, S>) {
        self.combine_all(guard);
        self.do_due(guard);
    }

    /// Does a tick's work for one that found the lock taken.
    #[inline]
    fn do_due(&self, guard: &mut Guard<'_, S>) {
        // Relaxed, both: a hint.
        if self.due.load(Ordering::Relaxed) != 0 {
            self.due.store(0, Ordering::Relaxed);
            guard.let_readers_in();
            // The next tick tells the platform what went wrong.
            let _ = self.maintain(guard);
        }
    }

    #[cold]
    fn combine_with(&self, guard: &mut Guard<'_, S>, op: &S::Op, payload: &[u8]) -> Outcome<S> {
        self.give_way(guard);
        let request = Request {
            op: *op,
            payload: payload.into(),
        };
        guard.core().left_over = Some((request, None));
        self.combine_all(guard);
        let answer = guard.core().own_answer.take();
        answer.unwrap_or(Err(ReplicaError::TimedOut))
    }

    fn combine_all(&self, guard: &mut Guard<'_, S>) {
        let mut wait = Wait::new(self.config.wait_ns);
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
    }

    /// Applies at least all that is in the log when it is called; returns how
    /// far that is.
    pub(crate) fn refresh(&self, guard: &mut Guard<'_, S>) -> Result<u64, ReplicaError> {
        self.give_way(guard);
        if guard.view().2.any_waits() {
            self.combine_all(guard);
        }
        let caught_up = self.step(guard);
        self.do_due(guard);
        caught_up.map(|()| guard.view().1.applied)
    }

    /// Waits for a moment if another member appends at the same time.
    ///
    /// Each batch that crosses from one member's cache to another's costs
    /// several misses. When two append by turns, all of their time goes there.
    /// Then it is better that the one whose turn ends lets the other have a
    /// longer one, whose batches it fetches in one go. A member that appends
    /// now and then never waits.
    fn give_way(&self, guard: &mut Guard<'_, S>) {
        let (core, local, _) = guard.view();
        if local.phase != Phase::Running || !matches!(self.log.look(local.applied), Slot::Filled(_))
        {
            return;
        }
        let now = self.clock.now_ns();
        let last = core::mem::replace(&mut core.crossed_ns, now);
        if now.saturating_sub(last) > SOON_NS {
            return;
        }
        guard.let_readers_in();
        for _ in 0..GIVE_WAY_ROUNDS {
            core::hint::spin_loop();
            if self.clock.now_ns().saturating_sub(now) > GIVE_WAY_NS {
                break;
            }
        }
        guard.core().crossed_ns = self.clock.now_ns();
    }

    /// Appends and applies one operation, if nobody else wants anything and
    /// nothing is in the way: the usual case, and a short one. Otherwise
    /// nothing has happened.
    #[inline]
    fn append_alone(
        &self,
        guard: &mut Guard<'_, S>,
        op: &S::Op,
        payload: &[u8],
    ) -> Option<S::Answer> {
        let geometry = self.log.geometry();
        let slots = geometry.order_slots as u64;
        let (core, local, seats) = guard.view();
        let position = local.applied;
        if local.phase != Phase::Running
            || position
                .checked_sub(core.head_seen)
                .is_none_or(|used| used >= slots)
            || !self.log.has_laps_left(position)
            || !core.roster.has(self.me, self.epoch)
            || seats.any_waits()
        {
            return None;
        }
        let Slot::Free(free) = self.log.look(position) else {
            return None;
        };
        let words = words_for::<S>(geometry, payload);
        let reserved = core.lane.reserve(words.div_ceil(LINE), core.head_seen)?;
        let link = Link {
            member: self.me,
            line: reserved.line,
        };
        let space = self
            .log
            .layout
            .lane(self.me, reserved.line, words)
            .expect("a reservation is inside the lane");
        let piece = Piece {
            kind: Kind::Operation,
            first: op.as_bytes(),
            second: payload,
        };
        write(space, geometry, self.epoch, [piece].into_iter());
        offer_at(space, position);
        // After the end was found: see "Fencing" in the module docs.
        if !self.log.is_member(self.me, self.epoch) || !self.log.link(position, free, link) {
            return None;
        }
        core.lane.commit(&reserved, position);
        core.end = position + 1;
        core.counters.batches += 1;
        core.counters.operations += 1;
        let at = At {
            position,
            member: self.me,
        };
        let answer = guard.write(&self.clock, |_, local, _| {
            local.applied = position + 1;
            local.machine.apply(op, payload, at)
        });
        self.log.set_applied(self.me, position + 1);
        self.reclaim_now_and_then(guard, position);
        Some(answer)
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
                Err(ReplicaError::Loading) if !wait.expired(&self.clock) => {
                    guard.let_readers_in();
                    self.beat();
                }
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
            let pieces = batch.iter().map(Request::piece);
            write(space, &geometry, self.epoch, pieces);
        })?;
        guard.core().in_flight = Some(position);
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
                    self.reclaim_now_and_then(guard, position);
                    return Ok(position);
                }
            }
            drop(reserved);
            self.make_room(guard, wait)?;
        }
    }

    /// Whether this incarnation still holds its slot.
    fn check_status(&self) -> Result<(), ReplicaError> {
        if self.log.is_member(self.me, self.epoch) {
            Ok(())
        } else {
            Err(ReplicaError::Ended)
        }
    }

    /// Keeps the frontier so close that few of the lane's lines are in use,
    /// and so seldom that looking at the others' positions costs little.
    #[inline]
    fn reclaim_now_and_then(&self, guard: &mut Guard<'_, S>, position: u64) {
        let every = (self.log.geometry().order_slots as u64 / 4).min(256);
        if position.is_multiple_of(every) {
            self.reclaim(guard);
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
        guard.let_readers_in();
        let (core, _, _) = guard.view();
        // A member that waits lives.
        self.beat();
        self.mark_silent(core, applied);
        // What holds us up may be a joiner that waits for a part from us.
        self.serve(guard);
        self.nudge_slowest();
        let elapsed = wait.pause(&self.clock);
        // Who loses the log while it loads has to start over, and would for
        // ever if each time took it longer than the others' patience. So it
        // has as long as one that may be dead.
        let patience_ns = match self.log.lowest_needed() {
            Some(lowest) if self.log.is_needed_by_loader(lowest) => {
                self.config.patience_ns.max(self.config.lease_ns)
            }
            _ => self.config.patience_ns,
        };
        if elapsed > patience_ns {
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
    match whose {
        Some(seat) => seats.answer(*seat, answer),
        None if core.own_answer.is_none() => core.own_answer = Some(answer),
        None => {}
    }
}
