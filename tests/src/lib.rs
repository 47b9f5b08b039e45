//! What the tests that boot racks have in common.
//!
//! `tests/` holds the tests themselves. They run the built `viaduct` in an
//! environment of their own ([`Bench`]) and hold it to what its manual says:
//! streams, exit statuses, and nothing left behind. Tests of hostile guests
//! start racks directly, with kernels assembled on the spot ([`guest`]); images
//! that need no kernel are assembled too ([`bare`]).
//!
//! Nothing here depends on how fast anything is. [`LIMIT`] only catches hangs.

mod alarms;
pub mod bare;
mod bench;
pub mod guest;
mod terminal;
mod turn;
mod up;

use std::path::PathBuf;
use std::time::Duration;

pub use alarms::alarms;
pub use bench::{Bench, Finished, Line, Started};
pub use terminal::{COLUMNS, ROWS, Terminal};
pub use turn::Turn;
pub use up::Up;

/// After so long a thing that should have happened never will.
pub const LIMIT: Duration = Duration::from_secs(300);

/// The console, as `scripts/build` makes it.
///
/// # Panics
/// If it has not been built.
#[must_use]
pub fn viaduct() -> PathBuf {
    built("release/viaduct")
}

/// The hypervisor's image, as `scripts/build` makes it.
///
/// # Panics
/// If it has not been built.
#[must_use]
pub fn hypervisor() -> PathBuf {
    built("x86_64-unknown-none/release/hypervisor")
}

/// The guest's litmus programs, as `scripts/test` makes them.
///
/// # Panics
/// If they have not been built.
#[must_use]
pub fn litmus() -> PathBuf {
    built("x86_64-unknown-linux-musl/release/viaduct-litmus")
}

fn built(path: &str) -> PathBuf {
    let file = rack::beside_executable(path);
    let found = file.display();
    assert!(
        file.exists(),
        "{found} is missing: run scripts/build or scripts/test"
    );
    file
}

/// Bytes as text, for comparison and for messages.
#[must_use]
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Bytes without a pattern that a lost, doubled or moved piece could hide in.
pub fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(count + 8);
    while bytes.len() < count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(count);
    bytes
}
