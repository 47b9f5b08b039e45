//! A bounded queue of fixed-size messages: many producers, many consumers,
//! any of which may die at any point.
//!
//! ```text
//! line 0   header: magic, version, sizes           the creator, once
//! line 1   taken: next position to receive         consumers, by CAS
//! line 2   asleep: 1 while the receiver sleeps     consumers
//!   ..     slots: one lap-tagged word per message  producers, by CAS
//!   ..     cells: P × C message buffers            each its one producer
//! ```
//!
//! It works like the log: a producer writes a message into a cell of its own
//! and then links the cell at the queue's end with one compare-and-swap. A
//! producer that dies before that leaves no trace; none dies in between.
//!
//! A consumer copies the message at `taken` and then moves `taken` on by
//! compare-and-swap. A producer uses a cell again only when `taken` is past
//! it. So success proves that the copy is whole and that nobody else has the
//! message, and a consumer that dies before it has lost nothing.
//!
//! One mistrusted peer can fill the queue or put nonsense in it, which is
//! refused and counted, but can't lead a receiver out of the window or into
//! an endless loop.

#[cfg(not(loom))]
use crate::shm::SharedMem;

use crate::lapped::{self, Found};
use crate::sync::{AtomicU64, Ordering, Words, fence};

/// "VIAQUEUE", read as a little-endian word.
pub const MAGIC: u64 = u64::from_le_bytes(*b"VIAQUEUE");
/// Version of the queue's layout; any other is refused.
pub const VERSION: u64 = 1;
/// Words of a message. (The models' messages are short: each word that is
/// read beside a write multiplies what there is to explore.)
pub const MESSAGE_WORDS: usize = if cfg!(loom) { 5 } else { 31 };
/// Bytes of a message.
pub const MESSAGE_BYTES: usize = MESSAGE_WORDS * 8;
/// Most cells that a producer can have.
pub const MAX_CELLS: usize = 16;
/// Most producers that a queue can have.
pub const MAX_PRODUCERS: usize = 256;

const CELL_WORDS: usize = MESSAGE_WORDS + 1;
const CELL_BITS: u32 = 6;
const LINE: usize = 8;
const TAKEN_AT: usize = LINE;
const ASLEEP_AT: usize = 2 * LINE;
const SLOTS_AT: usize = 3 * LINE;

/// A message: fixed size, any content.
pub type Message = [u64; MESSAGE_WORDS];

/// The sizes of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueSizes {
    /// Messages that can wait: a power of two, at least 2.
    pub slots: usize,
    /// Producers: at most [`MAX_PRODUCERS`].
    pub producers: usize,
    /// Messages that one producer can have waiting: at most [`MAX_CELLS`].
    pub cells: usize,
}

impl QueueSizes {
    /// Whether the sizes are within what the queue can do.
    #[must_use]
    pub const fn is_legal(&self) -> bool {
        self.slots.is_power_of_two()
            && self.slots >= 2
            && self.slots <= 1 << 20
            && self.producers >= 1
            && self.producers <= MAX_PRODUCERS
            && self.cells >= 1
            && self.cells <= MAX_CELLS
    }

    const fn cells_at(&self) -> usize {
        SLOTS_AT + self.slots.next_multiple_of(LINE)
    }

    /// Bytes that the queue occupies.
    #[must_use]
    pub const fn total_bytes(&self) -> usize {
        (self.cells_at() + self.producers * self.cells * CELL_WORDS) * 8
    }
}

/// What a queue would not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueError {
    /// No queue of this version, or of sizes that fit the window.
    NotAQueue,
    /// No slot or no cell is free.
    Full,
    /// The producer number is not one of this queue's.
    NoSuchProducer,
    /// The message at the queue's front is none; it was dropped.
    Garbage {
        /// Who linked it, as far as that can be told.
        producer: usize,
    },
    /// The queue's words are none that the protocol writes.
    Corrupt,
}

/// A queue in shared memory. Copies of the handle mean the same queue.
#[derive(Clone, Debug)]
pub struct Queue {
    words: Words,
    sizes: QueueSizes,
}

#[cfg(not(loom))]
impl Queue {
    /// Makes an empty queue in `memory`. Nobody may be using what is there.
    ///
    /// # Errors
    /// If the sizes are not legal or the memory is too small.
    pub fn create(memory: SharedMem, sizes: QueueSizes) -> Result<Self, QueueError> {
        Self::create_in(Words::new(memory), sizes)
    }

    /// The queue that was created in `memory`.
    ///
    /// # Errors
    /// If there is none that this build can use.
    pub fn attach(memory: SharedMem) -> Result<Self, QueueError> {
        Self::attach_to(Words::new(memory))
    }
}

impl Queue {
    pub(crate) fn create_in(words: Words, sizes: QueueSizes) -> Result<Self, QueueError> {
        let queue = Self::checked(words, sizes)?;
        let all = queue.words.slice(0, sizes.cells_at());
        let all = all.ok_or(QueueError::NotAQueue)?;
        // Relaxed, all: the magic below publishes them.
        for word in all {
            word.store(0, Ordering::Relaxed);
        }
        let header = [
            VERSION,
            sizes.slots as u64,
            sizes.producers as u64,
            sizes.cells as u64,
        ];
        for (word, value) in all[1..].iter().zip(header) {
            word.store(value, Ordering::Relaxed);
        }
        // Release: who sees the magic sees the rest.
        all[0].store(MAGIC, Ordering::Release);
        Ok(queue)
    }

    #[cfg_attr(loom, expect(dead_code, reason = "models create their queues"))]
    pub(crate) fn attach_to(words: Words) -> Result<Self, QueueError> {
        let header = words.slice(0, 5).ok_or(QueueError::NotAQueue)?;
        // Acquire: pairs with the Release in `create_in`.
        if header[0].load(Ordering::Acquire) != MAGIC {
            return Err(QueueError::NotAQueue);
        }
        let word = |index: usize| header[index].load(Ordering::Relaxed);
        if word(1) != VERSION {
            return Err(QueueError::NotAQueue);
        }
        let size = |index| usize::try_from(word(index)).map_err(|_| QueueError::NotAQueue);
        let sizes = QueueSizes {
            slots: size(2)?,
            producers: size(3)?,
            cells: size(4)?,
        };
        Self::checked(words, sizes)
    }

    fn checked(words: Words, sizes: QueueSizes) -> Result<Self, QueueError> {
        if sizes.is_legal() && words.len() >= sizes.total_bytes() / 8 {
            Ok(Self { words, sizes })
        } else {
            Err(QueueError::NotAQueue)
        }
    }

    fn slots(&self) -> u64 {
        self.sizes.slots as u64
    }

    fn taken(&self) -> &AtomicU64 {
        self.words.at(TAKEN_AT)
    }

    fn slot(&self, position: u64) -> &AtomicU64 {
        self.words
            .at(SLOTS_AT + lapped::index(position, self.slots()))
    }

    fn cell(&self, content: u64) -> Option<&[AtomicU64]> {
        let (producer, cell) = Self::split(content);
        if producer >= self.sizes.producers || cell >= self.sizes.cells {
            return None;
        }
        let start = self.sizes.cells_at() + (producer * self.sizes.cells + cell) * CELL_WORDS;
        self.words.slice(start, CELL_WORDS)
    }

    fn split(content: u64) -> (usize, usize) {
        let cell = content & ((1 << CELL_BITS) - 1);
        let small = |value| usize::try_from(value).expect("26 bits at most");
        (small(content >> CELL_BITS), small(cell))
    }

    /// The right to send as producer `index`.
    ///
    /// Each number may be in use once at a time, by one thread; and, as with
    /// the log's member slots, it goes to another node only when the last one
    /// can't write any more.
    ///
    /// # Errors
    /// If the queue has no such producer.
    pub fn producer(&self, index: usize) -> Result<Producer, QueueError> {
        if index >= self.sizes.producers {
            return Err(QueueError::NoSuchProducer);
        }
        // An earlier owner's messages may wait still. Each of them is at one
        // of the positions that the queue can hold now.
        // Acquire: as in `send`.
        let taken = self.taken().load(Ordering::Acquire);
        let busy_until = taken.saturating_add(self.slots());
        Ok(Producer {
            queue: self.clone(),
            index,
            next_cell: 0,
            end: taken,
            linked: [busy_until; MAX_CELLS],
        }
        .without_stale_cells(taken))
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        // Relaxed: a hint; `receive` looks again.
        let position = self.taken().load(Ordering::Relaxed);
        let word = self.slot(position).load(Ordering::Relaxed);
        !matches!(
            lapped::decode(word, position, self.slots()),
            Found::Filled(_) | Found::Later
        )
    }

    /// Takes the message at the queue's front, and says who sent it.
    ///
    /// # Errors
    /// If what is there is no message (it is dropped), or the queue's own
    /// words make no sense (nothing changes).
    pub fn receive(&self, message: &mut Message) -> Result<Option<usize>, QueueError> {
        // Each round means that another consumer was faster; a peer that
        // plays with the cursor must not keep us here.
        for _ in 0..=self.sizes.slots {
            // Acquire: pairs with the AcqRel below: positions before it are
            // dealt with.
            let position = self.taken().load(Ordering::Acquire);
            // Acquire: pairs with the Release in `send`: the cell's content.
            let word = self.slot(position).load(Ordering::Acquire);
            let content = match lapped::decode(word, position, self.slots()) {
                Found::Free => return Ok(None),
                Found::Filled(content) => content,
                Found::Later => continue,
                Found::Corrupt => return Err(QueueError::Corrupt),
            };
            let mut whole = false;
            if let Some(cell) = self.cell(content) {
                // Relaxed, all: the exchange below proves that nobody wrote.
                whole = cell[0].load(Ordering::Relaxed) == position;
                for (to, from) in message.iter_mut().zip(&cell[1..]) {
                    *to = from.load(Ordering::Relaxed);
                }
            }
            // AcqRel: Release: the loads above are over when the producer
            // sees its cell free. Acquire: with the next receiver's load.
            let won = self.taken().compare_exchange(
                position,
                position.wrapping_add(1),
                Ordering::AcqRel,
                Ordering::Relaxed,
            );
            if won.is_ok() {
                let (producer, _) = Self::split(content);
                return if whole {
                    Ok(Some(producer))
                } else {
                    Err(QueueError::Garbage { producer })
                };
            }
        }
        Ok(None)
    }

    /// Says that the receiver is about to sleep; returns whether it still
    /// should, because nothing has come.
    pub(crate) fn may_sleep(&self) -> bool {
        // Relaxed: ordered by the fence.
        self.words.at(ASLEEP_AT).store(1, Ordering::Relaxed);
        // SeqCst: the flag is up before we look; pairs with `wants_a_ring`:
        // either the sender sees the flag or we see the message.
        fence(Ordering::SeqCst);
        self.is_empty()
    }

    pub(crate) fn is_awake(&self) {
        // Relaxed: a ring too many does no harm.
        self.words.at(ASLEEP_AT).store(0, Ordering::Relaxed);
    }

    /// After a message was sent: whether the receiver has to be woken.
    #[must_use]
    pub fn wants_a_ring(&self) -> bool {
        // SeqCst: the message is linked before we look; see `may_sleep`.
        fence(Ordering::SeqCst);
        // Relaxed: ordered by the fence.
        self.words.at(ASLEEP_AT).load(Ordering::Relaxed) != 0
    }
}

/// The right of one thread to send to a queue.
#[derive(Debug)]
pub struct Producer {
    queue: Queue,
    index: usize,
    next_cell: usize,
    end: u64,
    /// For each cell the position after which it is free.
    linked: [u64; MAX_CELLS],
}

impl Producer {
    /// Finds out which cells an earlier owner's waiting messages are in.
    fn without_stale_cells(mut self, taken: u64) -> Self {
        let mut busy = [0; MAX_CELLS];
        for position in taken..taken.saturating_add(self.queue.slots()) {
            // Acquire: as in `receive`.
            let word = self.queue.slot(position).load(Ordering::Acquire);
            if let Found::Filled(content) = lapped::decode(word, position, self.queue.slots()) {
                let (producer, cell) = Queue::split(content);
                if producer == self.index {
                    busy[cell] = position + 1;
                }
            }
        }
        self.linked = busy;
        self
    }

    /// The queue that this sends to.
    #[must_use]
    pub const fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Sends a message.
    ///
    /// # Errors
    /// `Full` if it has to be tried again later; `Corrupt` if the queue's
    /// words make no sense.
    pub fn send(&mut self, message: &Message) -> Result<(), QueueError> {
        let Self { queue, linked, .. } = self;
        // Acquire: pairs with the AcqRel in `receive`, so that the copies of
        // what is taken are finished before we write the cell again.
        let taken = queue.taken().load(Ordering::Acquire);
        let number = self.next_cell;
        if linked[number] > taken {
            return Err(QueueError::Full);
        }
        let content = ((self.index as u64) << CELL_BITS) | number as u64;
        let cell = queue.cell(content).ok_or(QueueError::NoSuchProducer)?;
        // Release: orders the load of `taken` before the writes below, for
        // a receiver that copies them and then fails to take.
        fence(Ordering::Release);
        // Relaxed, all: published by the link.
        for (to, from) in cell[1..].iter().zip(message) {
            to.store(*from, Ordering::Relaxed);
        }
        let mut position = self.end.max(taken);
        let last = taken.saturating_add(queue.slots());
        while position < last {
            let slot = queue.slot(position);
            // Acquire: what is filled before us was sent before.
            let word = slot.load(Ordering::Acquire);
            match lapped::decode(word, position, queue.slots()) {
                Found::Filled(_) | Found::Later => position += 1,
                Found::Corrupt => return Err(QueueError::Corrupt),
                Found::Free if !lapped::is_countable(position, queue.slots()) => {
                    return Err(QueueError::Corrupt);
                }
                Found::Free => {
                    cell[0].store(position, Ordering::Relaxed);
                    let new = lapped::word(position, queue.slots(), content);
                    // Release: the cell before its link; pairs with
                    // `receive`. Relaxed on failure: we look again.
                    let exchanged =
                        slot.compare_exchange(word, new, Ordering::Release, Ordering::Relaxed);
                    if exchanged.is_ok() {
                        linked[number] = position + 1;
                        self.end = position + 1;
                        self.next_cell = (number + 1) % queue.sizes.cells;
                        return Ok(());
                    }
                }
            }
        }
        Err(QueueError::Full)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::shm::testing::leaked;

    const SMALL: QueueSizes = QueueSizes {
        slots: 4,
        producers: 2,
        cells: 3,
    };

    fn queue(sizes: QueueSizes) -> Queue {
        Queue::create(leaked(sizes.total_bytes().div_ceil(64)), sizes).expect("large enough")
    }

    #[test]
    fn messages_come_once_and_in_each_producers_order() {
        let queue = queue(SMALL);
        const EACH: u64 = if cfg!(miri) { 30 } else { 20_000 };
        let received = std::sync::Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for index in 0..2 {
                let mut producer = queue.producer(index).expect("legal");
                scope.spawn(move || {
                    for number in 0..EACH {
                        while producer.send(&[number; MESSAGE_WORDS]) == Err(QueueError::Full) {
                            std::thread::yield_now();
                        }
                    }
                });
            }
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut mine = Vec::new();
                    let mut message = [0; MESSAGE_WORDS];
                    let mut idle = 0;
                    while idle < 1_000_000 {
                        match queue.receive(&mut message).expect("sound") {
                            Some(producer) => {
                                assert!(message.iter().all(|word| *word == message[0]));
                                mine.push((producer, message[0]));
                                idle = 0;
                            }
                            None => {
                                let mut all = received.lock().expect("no panic");
                                all.append(&mut mine);
                                if all.len() as u64 == 2 * EACH {
                                    break;
                                }
                                drop(all);
                                idle += 1;
                                std::thread::yield_now();
                            }
                        }
                    }
                });
            }
        });
        let mut received = received.into_inner().expect("no panic");
        received.sort_unstable();
        let expected: Vec<_> = (0..2)
            .flat_map(|producer| (0..EACH).map(move |number| (producer, number)))
            .collect();
        assert_eq!(received, expected);
    }

    #[test]
    fn a_full_queue_refuses_and_a_received_message_makes_room() {
        let queue = queue(SMALL);
        let mut producers: Vec<_> = (0..2)
            .map(|index| queue.producer(index).expect("legal"))
            .collect();
        for _ in 0..3 {
            producers[0].send(&[1; MESSAGE_WORDS]).expect("three cells");
        }
        assert_eq!(
            producers[0].send(&[1; MESSAGE_WORDS]),
            Err(QueueError::Full),
            "no cell"
        );
        producers[1].send(&[2; MESSAGE_WORDS]).expect("four slots");
        assert_eq!(
            producers[1].send(&[2; MESSAGE_WORDS]),
            Err(QueueError::Full),
            "no slot"
        );
        let mut message = [0; MESSAGE_WORDS];
        assert_eq!(queue.receive(&mut message), Ok(Some(0)));
        producers[0].send(&[1; MESSAGE_WORDS]).expect("room again");
    }

    #[test]
    fn a_successor_does_not_write_over_what_waits() {
        let queue = queue(SMALL);
        let mut first = queue.producer(0).expect("legal");
        first.send(&[1; MESSAGE_WORDS]).expect("room");
        first.send(&[2; MESSAGE_WORDS]).expect("room");
        let mut second = queue.producer(0).expect("legal");
        assert_eq!(second.send(&[3; MESSAGE_WORDS]), Err(QueueError::Full));
        let mut message = [0; MESSAGE_WORDS];
        for expected in [1, 2] {
            assert_eq!(queue.receive(&mut message), Ok(Some(0)));
            assert_eq!(message, [expected; MESSAGE_WORDS]);
        }
        second.send(&[3; MESSAGE_WORDS]).expect("room");
    }

    #[test]
    fn garbage_in_the_queue_is_refused() {
        let queue = queue(SMALL);
        let mut message = [0; MESSAGE_WORDS];
        // A link to a cell that is not there, and one to a stale cell.
        for content in [u64::MAX, 0] {
            let position = queue.taken().load(Ordering::Relaxed);
            let word = lapped::word(position, 4, content);
            queue.cell(0).expect("there")[0].store(99, Ordering::Relaxed);
            queue.slot(position).store(word, Ordering::Relaxed);
            assert!(matches!(
                queue.receive(&mut message),
                Err(QueueError::Garbage { .. })
            ));
        }
        queue.taken().store(u64::MAX, Ordering::Relaxed);
        assert!(queue.receive(&mut message).is_err());
        let mut producer = queue.producer(0).expect("legal");
        assert!(producer.send(&message).is_err());
        let other = QueueSizes { cells: 65, ..SMALL };
        assert!(!other.is_legal());
        assert_eq!(Queue::attach(leaked(4)).err(), Some(QueueError::NotAQueue));
    }
}
