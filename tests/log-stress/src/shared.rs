//! What the processes share: a file with a score board and a log.
#![expect(unsafe_code, reason = "maps the shared file")]

use std::fs::File;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use vmm_shared::log::{Clock, Config, Geometry};
use vmm_shared::shm::SharedMem;

/// Bytes of the score board, before the log.
pub(crate) const BOARD_BYTES: usize = 64 << 10;
/// Most processes that can run at once.
pub(crate) const MAX_PROCESSES: usize = 16;
/// Most threads per process.
pub(crate) const MAX_THREADS: usize = 16;

/// A log on which a busy test wraps many times a second.
pub(crate) const GEOMETRY: Geometry = Geometry {
    order_slots: 1 << 12,
    members: 16,
    lane_lines: 1 << 12,
    entry_bytes: 32,
    stage_lines: 64,
};

pub(crate) const LEASE: Duration = Duration::from_millis(400);

pub(crate) fn config(node: u32) -> Config {
    Config {
        lease_ns: 400_000_000,
        patience_ns: 100_000_000,
        wait_ns: 5_000_000_000,
        node,
        part_bytes: 2 << 10,
        ..Config::default()
    }
}

/// The host's monotonic clock. A wait that gets long sleeps: here run many more
/// threads than there are processors, and those that wait must not take the
/// time that the one they wait for needs to show that it lives.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostClock(Instant);

impl HostClock {
    pub(crate) fn new() -> Self {
        Self(Instant::now())
    }
}

impl Clock for HostClock {
    fn now_ns(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).expect("not for 500 years")
    }
    fn pause(&self, round: u32) {
        match round {
            0..32 => std::hint::spin_loop(),
            32..48 => std::thread::yield_now(),
            _ => std::thread::sleep(Duration::from_micros(100)),
        }
    }
}

/// Maps the file for as long as the process lives.
pub(crate) fn map(file: &File) -> std::io::Result<SharedMem> {
    let mapping = Box::leak(Box::new(memmap2::MmapRaw::map_raw(file)?));
    let base = NonNull::new(mapping.as_mut_ptr()).expect("a mapping is never at null");
    // SAFETY: 1. leaked, and nobody shortens the file; 2. page-aligned;
    // 3. `MmapRaw` makes no references.
    Ok(unsafe { SharedMem::new(base, mapping.len()) })
}

/// The part of the file that holds the log.
pub(crate) fn log_part(memory: SharedMem) -> SharedMem {
    memory
        .window(BOARD_BYTES, memory.len() - BOARD_BYTES)
        .expect("the file was made large enough")
}

/// What a process tells the others about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum Stage {
    Starting = 0,
    Running = 1,
    Stopped = 2,
    Reported = 3,
}

/// The score board. Its words outlive the processes that write them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Board(pub(crate) SharedMem);

impl Board {
    fn word(&self, index: usize) -> &AtomicU64 {
        self.0.atomic_u64(index * 8).expect("inside the board")
    }

    /// 0: write; 1: stop writing; 2: report.
    pub(crate) fn command(&self) -> &AtomicU64 {
        self.word(0)
    }

    fn process(&self, slot: usize, index: usize) -> &AtomicU64 {
        assert!(slot < MAX_PROCESSES && index < 64);
        self.word(64 + slot * 64 + index)
    }

    pub(crate) fn stage(&self, slot: usize) -> &AtomicU64 {
        self.process(slot, 0)
    }

    pub(crate) fn digest(&self, slot: usize) -> &AtomicU64 {
        self.process(slot, 1)
    }

    /// The number of the operation that this thread is about to do.
    pub(crate) fn issued(&self, slot: usize, thread: usize) -> &AtomicU64 {
        assert!(thread < MAX_THREADS);
        self.process(slot, 8 + 2 * thread)
    }

    /// The number of the last operation that was answered.
    pub(crate) fn answered(&self, slot: usize, thread: usize) -> &AtomicU64 {
        assert!(thread < MAX_THREADS);
        self.process(slot, 9 + 2 * thread)
    }
}

/// The client that a thread is.
pub(crate) fn client(generation: u32, thread: usize) -> u64 {
    u64::from(generation) * MAX_THREADS as u64 + thread as u64
}
