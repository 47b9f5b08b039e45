//! The lock at the heart of a replica, and the seats of the threads that meet
//! there.
//!
//! ```text
//!  thread ─▶ seat: request ─┐                   ┌─▶ log
//!  thread ─▶ seat: request ─┼─▶ one combiner ───┤
//!  thread ─▶ seat: request ─┘   (holds Core)    └─▶ State, answers to seats
//!  thread ─▶ seat: flag ─────── reads State
//! ```
//!
//! [`Combining`] owns two things: the *core*, which the thread that combines
//! has to itself, and the *state*, which that thread may read freely and may
//! write after it has kept readers out. One word is the combiner's lock and
//! tells readers to stay out. A reader raises the flag in its own seat and then
//! looks at that word; a writer sets the word and then looks at the seats. So a
//! reader pays one locked instruction, a combiner one as well, and there is
//! one line that all of them share.
#![expect(
    unsafe_code,
    reason = "the lock and the hand-over cells of flat combining; nothing else here"
)]

use alloc::boxed::Box;
use core::ops::Deref;

#[cfg(loom)]
use crate::sync::fence;
use crate::sync::{AtomicU64, Ordering, Padded, Shared};

use super::clock::Clock;

// The lock's word.
const FREE: u64 = 0;
/// Somebody combines, and readers may read.
const COMBINING: u64 = 1;
/// Somebody combines, and readers stay out.
const WRITING: u64 = 2;

// A seat's stage.
const IDLE: u64 = 0;
const POSTED: u64 = 1;
const TAKEN: u64 = 2;
const DONE: u64 = 3;

/// What a thread shares with the combiner.
struct Seat<Q, A> {
    /// 1 while the thread reads the state. Apart from the desk, which the
    /// combiner looks at while the thread reads.
    reading: Padded<AtomicU64>,
    desk: Padded<Desk<Q, A>>,
}

/// Where a request and its answer change hands.
struct Desk<Q, A> {
    /// Where `request` and `answer` are at.
    stage: AtomicU64,
    /// 1 while a [`Sitter`] has the seat.
    occupied: AtomicU64,
    request: Shared<Option<Q>>,
    answer: Shared<Option<A>>,
}

/// What readers do while somebody combines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Readers {
    /// They go on until the combiner writes.
    Stay,
    /// They are told to stay out at once: the combiner is about to write.
    Out,
}

/// The lock over a core `C` and a state `S`, with seats for threads.
pub(crate) struct Combining<C, S, Q, A> {
    lock: Padded<AtomicU64>,
    /// Seats that were ever occupied.
    used: Padded<AtomicU64>,
    seats: Box<[Seat<Q, A>]>,
    core: Shared<C>,
    state: Shared<S>,
}

// SAFETY: 1. the core is reached only by the holder of `lock`; 2. the
// state is written only by that holder, after all readers are out, and read
// only by it and by readers whose flag is up; 3. a seat's cells change hands
// with its `stage`. So values only ever move between threads, and of the
// state alone there are references on several threads at once.
unsafe impl<C: Send, S: Send + Sync, Q: Send, A: Send> Sync for Combining<C, S, Q, A> {}
// SAFETY: as above; sending the whole sends its parts.
unsafe impl<C: Send, S: Send, Q: Send, A: Send> Send for Combining<C, S, Q, A> {}

impl<C, S, Q, A> Combining<C, S, Q, A> {
    pub(crate) fn new(core: C, state: S, seats: usize) -> Self {
        let seat = |_| Seat {
            reading: Padded(AtomicU64::new(0)),
            desk: Padded(Desk {
                stage: AtomicU64::new(IDLE),
                occupied: AtomicU64::new(0),
                request: Shared::new(None),
                answer: Shared::new(None),
            }),
        };
        Self {
            lock: Padded(AtomicU64::new(FREE)),
            used: Padded(AtomicU64::new(0)),
            seats: (0..seats).map(seat).collect(),
            core: Shared::new(core),
            state: Shared::new(state),
        }
    }

    /// A free seat, if there is one.
    pub(crate) fn sit(&self) -> Option<Sitter<'_, C, S, Q, A>> {
        let (index, seat) = self.seats.iter().enumerate().find(|(_, seat)| {
            // Acquire: pairs with the Release when the last sitter left, so
            // that the seat is as it left it.
            let occupied = &seat.desk.0.occupied;
            occupied
                .compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
        })?;
        // SeqCst: in one order with the flags, so that a writer which misses
        // the seat here is seen by its sitter when it reads.
        self.used.0.fetch_max(index as u64 + 1, Ordering::SeqCst);
        Some(Sitter { lock: self, seat })
    }

    /// Becomes the combiner, if nobody is.
    #[inline]
    pub(crate) fn try_combine(&self, readers: Readers) -> Option<Combiner<'_, C, S, Q, A>> {
        // Relaxed: only to keep the line shared while someone combines. (The
        // checker would explore every stale value that it may return.)
        #[cfg(not(loom))]
        if self.lock.0.load(Ordering::Relaxed) != FREE {
            return None;
        }
        let taken = match readers {
            Readers::Stay => COMBINING,
            Readers::Out => WRITING,
        };
        // SeqCst: a writer's half of Dekker's protocol, see `raise`; and an
        // Acquire, which pairs with the Release in the guard's drop.
        self.lock
            .0
            .compare_exchange(FREE, taken, Ordering::SeqCst, Ordering::Relaxed)
            .ok()?;
        #[cfg(loom)]
        fence(Ordering::SeqCst);
        Some(Combiner {
            lock: self,
            readers,
            alone: false,
        })
    }

    pub(crate) fn into_state(self) -> S {
        self.state.into_inner()
    }

    fn seats_in_use(&self, used: u64) -> &[Seat<Q, A>] {
        let used = usize::try_from(used).expect("counts seats");
        &self.seats[..used]
    }
}

/// A thread's hold on its seat.
pub(crate) struct Sitter<'a, C, S, Q, A> {
    lock: &'a Combining<C, S, Q, A>,
    seat: &'a Seat<Q, A>,
}

impl<C, S, Q, A> Sitter<'_, C, S, Q, A> {
    /// Puts a request where the combiner finds it. One at a time.
    pub(crate) fn post(&mut self, request: Q) {
        let stage = self.seat.desk.0.stage.load(Ordering::Relaxed);
        assert_eq!(stage, IDLE, "the last request was answered or withdrawn");
        // SAFETY: the stage is IDLE: only this sitter touches the cells.
        unsafe { *self.seat.desk.0.request.writing() = Some(request) };
        // Release: the request before the stage; pairs with `take`.
        self.seat.desk.0.stage.store(POSTED, Ordering::Release);
    }

    /// The answer, if it is there.
    pub(crate) fn poll(&mut self) -> Option<A> {
        // Acquire: pairs with the Release in `answer`.
        if self.seat.desk.0.stage.load(Ordering::Acquire) != DONE {
            return None;
        }
        // SAFETY: DONE gives the cells back to the sitter.
        let answer = unsafe { (*self.seat.desk.0.answer.writing()).take() };
        // Relaxed: only this sitter leaves IDLE.
        self.seat.desk.0.stage.store(IDLE, Ordering::Relaxed);
        answer
    }

    /// Takes the request back, unless a combiner has it.
    pub(crate) fn withdraw(&mut self) -> bool {
        // Relaxed: success proves that nobody took the request.
        let back = self
            .seat
            .desk
            .0
            .stage
            .compare_exchange(POSTED, IDLE, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok();
        if back {
            // SAFETY: IDLE again, see `post`.
            unsafe { *self.seat.desk.0.request.writing() = None };
        }
        back
    }

    /// The state, unless it is being written.
    #[inline]
    pub(crate) fn try_read(&mut self) -> Option<Reading<'_, S>> {
        let flag = &self.seat.reading.0;
        // Not while somebody writes: a reader that raises its flag again and
        // again could keep the writer waiting.
        if look(&self.lock.lock.0) == WRITING {
            return None;
        }
        raise(flag, 1);
        if look(&self.lock.lock.0) != WRITING {
            // SAFETY: our flag was up before we saw no writer, so a writer
            // that comes now sees our flag and waits until we lower it.
            let state = unsafe { &*self.lock.state.reading() };
            Some(Reading {
                state,
                flag,
                #[cfg(loom)]
                cell: &self.lock.state,
            })
        } else {
            // Release: pairs with the writer's look.
            flag.store(0, Ordering::Release);
            None
        }
    }
}

impl<C, S, Q, A> Drop for Sitter<'_, C, S, Q, A> {
    fn drop(&mut self) {
        // The callers leave no request behind; if one did, the seat would
        // stay out of use rather than mix two threads' answers.
        if self.seat.desk.0.stage.load(Ordering::Relaxed) == IDLE {
            // Release: pairs with `sit`.
            self.seat.desk.0.occupied.store(0, Ordering::Release);
        }
    }
}

/// Raises one's own flag: the store half of Dekker's protocol, after which
/// [`look`] tells whether the other side has done the same. One of the two
/// sides always sees the other.
#[inline]
fn raise(flag: &AtomicU64, value: u64) {
    #[cfg(not(loom))]
    // SeqCst: with the SeqCst load in `look`, one total order over both
    // sides. An exchange is one locked instruction on x86, and no fence.
    flag.swap(value, Ordering::SeqCst);
    #[cfg(loom)]
    {
        // The checker knows SeqCst fences, but not SeqCst accesses.
        flag.store(value, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }
}

#[inline]
fn look(flag: &AtomicU64) -> u64 {
    #[cfg(not(loom))]
    // SeqCst: see `raise`. It is an Acquire as well: pairs with the Release
    // that lowers the flag.
    return flag.load(Ordering::SeqCst);
    #[cfg(loom)]
    // Acquire: the fence in `raise` does the rest.
    return flag.load(Ordering::Acquire);
}

/// The state, for reading.
pub(crate) struct Reading<'a, S> {
    state: &'a S,
    flag: &'a AtomicU64,
    #[cfg(loom)]
    cell: &'a Shared<S>,
}

impl<S> Deref for Reading<'_, S> {
    type Target = S;
    #[inline]
    fn deref(&self) -> &S {
        self.state
    }
}

impl<S> Drop for Reading<'_, S> {
    #[inline]
    fn drop(&mut self) {
        #[cfg(loom)]
        self.cell.reading();
        // Release: our reads are over; pairs with the writer's look.
        self.flag.store(0, Ordering::Release);
    }
}

/// The right to combine.
pub(crate) struct Combiner<'a, C, S, Q, A> {
    lock: &'a Combining<C, S, Q, A>,
    /// What the lock's word says.
    readers: Readers,
    /// Whether all readers have been seen to be out since it says so.
    alone: bool,
}

/// The seats, as the combiner sees them.
pub(crate) struct Seats<'a, Q, A> {
    seats: &'a [Seat<Q, A>],
}

impl<C, S, Q, A> Combiner<'_, C, S, Q, A> {
    #[inline]
    pub(crate) fn core(&mut self) -> &mut C {
        // SAFETY: one combiner at a time, and `self` is borrowed.
        unsafe { &mut *self.lock.core.writing() }
    }

    /// Core and state; readers go on reading.
    #[inline]
    pub(crate) fn view(&mut self) -> (&mut C, &S, Seats<'_, Q, A>) {
        let seats = self.seats();
        // SAFETY: 1. for the core as above; 2. only the combiner ever has the
        // state exclusively, and `self` is borrowed meanwhile.
        unsafe {
            (
                &mut *self.lock.core.writing(),
                &*self.lock.state.reading(),
                seats,
            )
        }
    }

    /// Runs `act` with the state to itself. Readers stay out after that, too,
    /// until [`let_readers_in`](Self::let_readers_in) or the drop.
    #[inline]
    pub(crate) fn write<K: Clock, R>(
        &mut self,
        clock: &K,
        act: impl FnOnce(&mut C, &mut S, Seats<'_, Q, A>) -> R,
    ) -> R {
        if self.readers == Readers::Stay {
            raise(&self.lock.lock.0, WRITING);
            self.readers = Readers::Out;
        }
        if !self.alone {
            self.wait_for_readers(clock);
            self.alone = true;
        }
        // SAFETY: 1. one combiner at a time; 2. every reader is out, and none
        // gets in while the lock's word is WRITING; 3. `self` is borrowed.
        let (core, state) = unsafe {
            (
                &mut *self.lock.core.writing(),
                &mut *self.lock.state.writing(),
            )
        };
        let result = act(core, state, self.seats());
        #[cfg(loom)]
        self.lock.state.writing();
        result
    }

    #[inline]
    fn wait_for_readers<K: Clock>(&self, clock: &K) {
        // SeqCst in `look`, and the word was set before: a reader we don't
        // see in a seat sees the word. The count of seats is read after that,
        // too: a seat taken later reads the word.
        let used = look(&self.lock.used.0);
        for seat in self.lock.seats_in_use(used) {
            let mut round = 0;
            while look(&seat.reading.0) != 0 {
                clock.pause(round);
                round = round.wrapping_add(1);
            }
        }
    }

    /// Lets readers in: before a wait, or work that takes long.
    pub(crate) fn let_readers_in(&mut self) {
        if self.readers == Readers::Out {
            // Release: the writes are over; pairs with the readers' look.
            self.lock.lock.0.store(COMBINING, Ordering::Release);
            self.readers = Readers::Stay;
            self.alone = false;
        }
    }

    fn seats(&self) -> Seats<'_, Q, A> {
        // Relaxed: a seat that is missed now is found by the next combiner,
        // which its sitter will become if nobody else does.
        let used = self.lock.used.0.load(Ordering::Relaxed);
        Seats {
            seats: self.lock.seats_in_use(used),
        }
    }
}

impl<C, S, Q, A> Drop for Combiner<'_, C, S, Q, A> {
    #[inline]
    fn drop(&mut self) {
        // Release: pairs with `try_combine`, and with the readers' look.
        self.lock.lock.0.store(FREE, Ordering::Release);
    }
}

impl<Q, A> Seats<'_, Q, A> {
    /// Whether a request waits in any seat.
    #[inline]
    pub(crate) fn any_waits(&self) -> bool {
        // Relaxed: one that is missed is found by the next combiner, which
        // its sitter will become if nobody else does.
        let waits = |seat: &Seat<Q, A>| seat.desk.0.stage.load(Ordering::Relaxed) == POSTED;
        self.seats.iter().any(waits)
    }

    pub(crate) const fn len(&self) -> usize {
        self.seats.len()
    }

    /// The request in seat `index`, if one waits there. It must be answered.
    #[inline]
    pub(crate) fn take(&self, index: usize) -> Option<Q> {
        let seat = &self.seats[index].desk.0;
        // Relaxed: a cheap look first.
        if seat.stage.load(Ordering::Relaxed) != POSTED {
            return None;
        }
        // Acquire: pairs with the Release in `post`. Fails if the sitter
        // withdraws just now.
        seat.stage
            .compare_exchange(POSTED, TAKEN, Ordering::Acquire, Ordering::Relaxed)
            .ok()?;
        // SAFETY: TAKEN gives the cells to the one combiner.
        unsafe { (*seat.request.writing()).take() }
    }

    /// Answers the request that was taken from seat `index`.
    pub(crate) fn answer(&self, index: usize, answer: A) {
        let seat = &self.seats[index].desk.0;
        // Relaxed: only the combiner leaves TAKEN.
        if seat.stage.load(Ordering::Relaxed) == TAKEN {
            // SAFETY: TAKEN: the cells are the combiner's.
            unsafe { *seat.answer.writing() = Some(answer) };
            // Release: the answer before the stage; pairs with `poll`.
            seat.stage.store(DONE, Ordering::Release);
        }
    }
}
