//! One rack at a time: a node takes a host core for each of its own, and
//! several racks at once would only wait for each other.

use std::fs::File;

use rustix::fs::{FlockOperation, flock};

/// The right to boot a rack, until it is dropped. It holds between threads
/// and between processes: the runner may start each test in its own.
#[derive(Debug)]
pub struct Turn {
    _lock: File,
}

impl Turn {
    /// Waits until nobody else has it.
    ///
    /// # Panics
    /// If the lock file can't be made.
    #[must_use]
    pub fn wait() -> Self {
        let path = rack::beside_executable("boot-tests.lock");
        let lock = File::create(&path).expect("the build folder is writable");
        flock(&lock, FlockOperation::LockExclusive).expect("files can be locked");
        Self { _lock: lock }
    }
}
