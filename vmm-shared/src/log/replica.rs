//! A replica of a state machine, and the threads that use it.

use alloc::vec::Vec;

use zerocopy::IntoBytes;

use super::batch::{Kind, Piece, arena_words, batch_words, max_words};
use super::clock::{Clock, Wait};
use super::combining::{Combiner, Combining, Readers, Sitter};
use super::lane::Lane;
use super::lease::Watch;
use super::machine::StateMachine;
use super::member::{Epoch, MemberId, State};
use super::roster::{Change, Roster};
use super::snapshot::{Donor, Transfer};
use super::{Geometry, Log};
use crate::sync::{AtomicU64, Ordering};

/// What a member does how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// A member that is silent for so long is evicted. Each member has to
    /// run [`Replica::tick`] at least four times as often.
    pub lease_ns: u64,
    /// How long a writer that needs space waits for a slow member before it
    /// goes on without it; that one then catches up by snapshot. For one that
    /// is loading a snapshot it waits for a lease, if that is longer.
    pub patience_ns: u64,
    /// How many live members have to have applied a batch before one may go
    /// on without the others, as long as there are so many. With 2, no single
    /// death loses the state; the last two wait for each other, at most until
    /// one is evicted. With 1, nobody ever waits longer than the patience.
    pub copies: usize,
    /// How long an operation may wait: for space, for a snapshot, for its
    /// combiner.
    pub wait_ns: u64,
    /// Threads of this node that can use the replica at once.
    pub threads: usize,
    /// This node's number, below 2²⁴: who may vouch for the death of this
    /// member's process; see [`Log::confirm_node_dead`].
    pub node: u32,
    /// About how much of the state is copied without letting writers in.
    pub part_bytes: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            lease_ns: 200_000_000,
            patience_ns: 10_000_000,
            copies: 2,
            wait_ns: 1_000_000_000,
            threads: 64,
            node: 0,
            part_bytes: 64 << 10,
        }
    }
}

/// Why an operation, or a replica, did not get through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaError {
    /// No space in the log within the wait. The operation was not applied.
    Full,
    /// No combiner got to the operation within the wait. It was not applied.
    TimedOut,
    /// The replica loads a snapshot, and took longer than the wait. The
    /// operation was not applied.
    Loading,
    /// This member was evicted, or has left. The operation was not applied.
    Ended,
    /// The operation is in the log, at this position, but this replica fell
    /// behind before it applied it: it takes effect exactly once if this
    /// member still was one, and the answer is lost.
    OutcomeUnknown {
        /// Where it is.
        position: u64,
    },
    /// The payload is larger than the log's batches.
    TooLarge {
        /// Bytes of the operation and its payload.
        bytes: usize,
    },
    /// The log's own words at this position are none that a member writes.
    Corrupt {
        /// Where.
        position: u64,
    },
    /// The log has used up its laps.
    Exhausted,
    /// Every member slot is taken or in quarantine.
    NoFreeMember,
    /// The log no longer goes back to its start, and no member that has the
    /// state answers.
    StateLost,
    /// A limit is zero, or the node's number too large.
    BadConfig,
}

/// What has happened in a replica so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Batches applied.
    pub batches: u64,
    /// Operations applied.
    pub operations: u64,
    /// Batches skipped because their author was no member at that position.
    pub tombstones: u64,
    /// Batches and entries skipped because their bytes make none.
    pub malformed: u64,
    /// Times that this replica was too slow and loaded a snapshot.
    pub overruns: u64,
    /// Times that this member went on without a slow one.
    pub passed: u64,
    /// Evictions linked by this member.
    pub evictions: u64,
    /// Parts of snapshots handed out.
    pub parts: u64,
}

/// How far a replica is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Loading,
    Running,
    Ended(ReplicaError),
}

/// What readers share and the combiner writes.
pub(crate) struct Local<S> {
    pub(crate) machine: S,
    /// The next position to apply.
    pub(crate) applied: u64,
    pub(crate) phase: Phase,
}

pub(crate) struct Request<S: StateMachine> {
    pub(crate) op: S::Op,
    pub(crate) payload: Vec<u8>,
}

impl<S: StateMachine> Request<S> {
    /// The request as it goes into a batch.
    #[inline]
    pub(crate) fn piece(&self) -> Piece<'_> {
        Piece {
            kind: Kind::Operation,
            first: self.op.as_bytes(),
            second: &self.payload,
        }
    }
}

pub(crate) type Outcome<S> = Result<<S as StateMachine>::Answer, ReplicaError>;

/// What the combiner has to itself.
pub(crate) struct Core<S: StateMachine> {
    pub(crate) lane: Lane,
    /// The log's end as far as known; never below what is applied.
    pub(crate) end: u64,
    pub(crate) head_seen: u64,
    /// When others' batches were found here last.
    pub(crate) crossed_ns: u64,
    pub(crate) roster: Roster,
    /// The batch being made, and for each request its seat; `None` is the
    /// combiner's own.
    pub(crate) batch: Vec<Request<S>>,
    pub(crate) waiting: Vec<Option<usize>>,
    /// A request that did not fit the batch any more.
    pub(crate) left_over: Option<(Request<S>, Option<usize>)>,
    /// Where the batch was linked, until it is applied.
    pub(crate) in_flight: Option<u64>,
    pub(crate) own_answer: Option<Outcome<S>>,
    pub(crate) copy: Vec<u64>,
    pub(crate) watch: Watch,
    pub(crate) transfer: Option<Transfer>,
    pub(crate) donor: Donor,
    pub(crate) counters: Counters,
}

pub(crate) type Lock<S> = Combining<Core<S>, Local<S>, Request<S>, Outcome<S>>;
pub(crate) type Guard<'a, S> = Combiner<'a, Core<S>, Local<S>, Request<S>, Outcome<S>>;
type Seat<'a, S> = Sitter<'a, Core<S>, Local<S>, Request<S>, Outcome<S>>;

/// One member's replica of a state machine.
///
/// Threads use it through [`Thread`]s. Somebody has to call
/// [`tick`](Self::tick) regularly: it renews the lease, applies what others
/// append, evicts the silent and hands out snapshots.
pub struct Replica<S: StateMachine, C> {
    pub(crate) log: Log,
    pub(crate) clock: C,
    pub(crate) config: Config,
    pub(crate) me: MemberId,
    pub(crate) epoch: Epoch,
    /// 1 once this member must not write to the log's memory any more.
    pub(crate) ended: AtomicU64,
    /// 1 if a tick found the lock taken.
    pub(crate) due: AtomicU64,
    pub(crate) lock: Lock<S>,
}

impl<S: StateMachine, C: Clock> Replica<S, C> {
    pub(crate) fn new(
        log: Log,
        machine: S,
        clock: C,
        config: Config,
        me: MemberId,
        epoch: Epoch,
        seq: u64,
    ) -> Self {
        let core = Core {
            lane: Lane::new(log.geometry()),
            end: 0,
            head_seen: 0,
            crossed_ns: 0,
            roster: Roster::default(),
            batch: Vec::new(),
            waiting: Vec::new(),
            left_over: None,
            in_flight: None,
            own_answer: None,
            copy: Vec::new(),
            watch: Watch::new(clock.now_ns()),
            transfer: Some(Transfer::new(seq)),
            donor: Donor::default(),
            counters: Counters::default(),
        };
        let local = Local {
            machine,
            applied: 0,
            phase: Phase::Loading,
        };
        Self {
            log,
            clock,
            config,
            me,
            epoch,
            ended: AtomicU64::new(0),
            due: AtomicU64::new(0),
            lock: Combining::new(core, local, config.threads),
        }
    }

    /// Which member slot this replica has.
    #[must_use]
    pub const fn member(&self) -> MemberId {
        self.me
    }

    /// Which incarnation of the slot it is.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The log that it follows.
    #[must_use]
    pub const fn log(&self) -> &Log {
        &self.log
    }

    /// A seat for one thread, or `None` if all are taken.
    #[must_use]
    pub fn thread(&self) -> Option<Thread<'_, S, C>> {
        let seat = self.lock.sit()?;
        Some(Thread {
            replica: self,
            seat,
        })
    }

    /// The counters, or `None` while another thread combines.
    #[must_use]
    pub fn counters(&self) -> Option<Counters> {
        self.lock
            .try_combine(Readers::Stay)
            .map(|mut guard| guard.core().counters)
    }

    /// Leaves the log and gives the state back. A member that was evicted
    /// says by this that it has stopped, which frees its slot.
    ///
    /// # Errors
    /// If the departure could not be linked within the wait. The member has
    /// stopped all the same, and the others evict it.
    pub fn leave(self) -> Result<S, ReplicaError> {
        let linked = self
            .lock
            .try_combine(Readers::Stay)
            .ok_or(ReplicaError::TimedOut)
            .and_then(|mut guard| self.leave_with(&mut guard));
        self.bury();
        match linked {
            Ok(()) | Err(ReplicaError::Ended) => Ok(self.lock.into_state().machine),
            Err(error) => Err(error),
        }
    }

    fn leave_with(&self, guard: &mut Guard<'_, S>) -> Result<(), ReplicaError> {
        self.catch_up(guard)?;
        let position = self.append_change(guard, Change::Left, self.me, self.epoch)?;
        self.catch_up_to_the_end(guard, position);
        self.log.note_end(self.me, position + 1);
        self.log
            .change_status(self.me, self.epoch, State::Live, State::Free);
        Ok(())
    }

    /// The state that is given back holds all up to the departure.
    fn catch_up_to_the_end(&self, guard: &mut Guard<'_, S>, position: u64) {
        loop {
            let before = guard.view().1.applied;
            if before > position || self.catch_up(guard).is_err() {
                break;
            }
            if guard.view().1.applied == before {
                // Somebody has written over the log.
                break;
            }
        }
    }

    /// The lock, if it can be had within about a microsecond: as long as few
    /// threads want it, that is cheaper than to have another do the work.
    #[inline]
    fn lock_soon(&self) -> Option<Guard<'_, S>> {
        for round in 0..LOCK_ROUNDS {
            let guard = self.lock.try_combine(Readers::Out);
            if guard.is_some() {
                return guard;
            }
            for _ in 0..1_u32 << round {
                core::hint::spin_loop();
            }
        }
        self.lock.try_combine(Readers::Out)
    }

    pub(crate) fn stop_writing(&self) {
        // Relaxed: a hint to this node's own threads.
        self.ended.store(1, Ordering::Relaxed);
    }
}

/// A thread's access to its node's replica.
pub struct Thread<'a, S: StateMachine, C> {
    replica: &'a Replica<S, C>,
    seat: Seat<'a, S>,
}

impl<S: StateMachine, C: Clock> Thread<'_, S, C> {
    /// Appends an operation, and returns its answer once it is applied here.
    /// By then it is in every later read on every replica.
    ///
    /// # Errors
    /// Each error says whether the operation was applied.
    #[inline]
    pub fn update(&mut self, op: S::Op) -> Outcome<S> {
        self.update_with(op, &[])
    }

    /// As [`update`](Self::update), with bytes beyond the fixed layout.
    ///
    /// # Errors
    /// As for `update`.
    #[inline]
    pub fn update_with(&mut self, op: S::Op, payload: &[u8]) -> Outcome<S> {
        let geometry = self.replica.log.geometry();
        if words_for::<S>(geometry, payload) > max_words(geometry) {
            return Err(ReplicaError::TooLarge {
                bytes: size_of::<S::Op>() + payload.len(),
            });
        }
        let replica = self.replica;
        match replica.lock_soon() {
            Some(mut guard) => replica.update(&mut guard, &op, payload),
            None => self.post_and_wait(op, payload),
        }
    }

    #[cold]
    fn post_and_wait(&mut self, op: S::Op, payload: &[u8]) -> Outcome<S> {
        let payload = payload.into();
        self.seat.post(Request { op, payload });
        let mut wait = Wait::new(self.replica.config.wait_ns);
        loop {
            if let Some(answer) = self.seat.poll() {
                return answer;
            }
            if let Some(mut guard) = self.replica.lock.try_combine(Readers::Out) {
                self.replica.combine(&mut guard);
            } else if wait.expired(&self.replica.clock) && self.seat.withdraw() {
                return Err(ReplicaError::TimedOut);
            }
        }
    }

    /// Reads the state as it is now: every operation that has been answered
    /// anywhere before the call is in it (linearizable).
    ///
    /// # Errors
    /// If this member has ended, or could not catch up within the wait.
    #[inline]
    pub fn read<R>(&mut self, query: impl FnOnce(&S) -> R) -> Result<R, ReplicaError> {
        // A short path first: the locked instruction in `try_read` waits for
        // all that was stored before, spilled registers too.
        if let Some(local) = self.seat.try_read()
            && local.phase == Phase::Running
            && self.replica.log.is_free(local.applied)
        {
            return Ok(query(&local.machine));
        }
        self.catch_up_and_read(query)
    }

    #[cold]
    fn catch_up_and_read<R>(&mut self, query: impl FnOnce(&S) -> R) -> Result<R, ReplicaError> {
        // The end of the log at some moment after the call began; to have
        // applied so much is enough, however fast writers go on.
        let mut target = None;
        let mut wait = Wait::new(self.replica.config.wait_ns);
        loop {
            let mut running = false;
            if let Some(local) = self.seat.try_read() {
                match local.phase {
                    Phase::Running => {
                        running = true;
                        let fresh = match target {
                            Some(target) => local.applied >= target,
                            None => self.replica.log.is_free(local.applied),
                        };
                        if fresh {
                            return Ok(query(&local.machine));
                        }
                    }
                    Phase::Loading => target = None,
                    Phase::Ended(error) => return Err(error),
                }
                drop(local);
                if let Some(mut guard) = self.replica.lock.try_combine(Readers::Out) {
                    match self.replica.refresh(&mut guard) {
                        Ok(applied) => {
                            target = Some(applied);
                            continue;
                        }
                        Err(ReplicaError::Loading) => {}
                        Err(error) => return Err(error),
                    }
                }
            }
            if wait.expired(&self.replica.clock) {
                return Err(if running {
                    ReplicaError::TimedOut
                } else {
                    ReplicaError::Loading
                });
            }
        }
    }

    /// Reads the state as this replica has it, without a look at the log: the
    /// answers of this node's own threads are in it, and it never goes back,
    /// but what other nodes have done lately may be missing.
    ///
    /// # Errors
    /// If this member has ended, or loads a snapshot for longer than the
    /// wait.
    pub fn read_local<R>(&mut self, query: impl FnOnce(&S) -> R) -> Result<R, ReplicaError> {
        let mut wait = Wait::new(self.replica.config.wait_ns);
        loop {
            if let Some(local) = self.seat.try_read() {
                match local.phase {
                    Phase::Running => return Ok(query(&local.machine)),
                    Phase::Loading => {}
                    Phase::Ended(error) => return Err(error),
                }
            }
            if wait.expired(&self.replica.clock) {
                return Err(ReplicaError::Loading);
            }
        }
    }
}

/// Tries for the lock, each after twice the time of the last, before a thread
/// leaves its request to another.
const LOCK_ROUNDS: u32 = if cfg!(loom) { 0 } else { 7 };

/// Words of a batch with one operation and this payload.
#[inline]
pub(crate) fn words_for<S: StateMachine>(geometry: &Geometry, payload: &[u8]) -> usize {
    let bytes = size_of::<S::Op>() + payload.len();
    batch_words(geometry, 1, arena_words(geometry, bytes))
}

pub(crate) fn payload_len<S: StateMachine>(request: &Request<S>) -> usize {
    request.op.as_bytes().len() + request.payload.len()
}
