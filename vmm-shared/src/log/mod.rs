//! The replicated log.

pub mod clock;
mod layout;
mod member;
mod order;
mod roster;

mod apply;
mod batch;
mod combine;
mod combining;
mod lane;
mod lease;
mod machine;
mod replica;
mod snapshot;

#[cfg(not(loom))]
use crate::shm::SharedMem;
use crate::sync::Words;

pub use clock::Clock;
pub use layout::{Geometry, MAGIC, MAX_MEMBERS, VERSION};
pub use machine::{At, BadSnapshot, StateMachine};
pub use member::{Epoch, MemberId, State, Status};
pub use replica::{Config, Counters, Replica, ReplicaError, Thread};
pub use roster::{Change, MemberChange};

use layout::Layout;

/// Why a window is not the log that it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogError {
    /// No magic: nothing was created there.
    NotALog,
    /// Made by another version of the protocol.
    Version {
        /// The version found.
        found: u64,
    },
    /// Sizes that [`Geometry::is_legal`] refuses.
    BadGeometry,
    /// The window is smaller than the sizes need.
    TooSmall {
        /// Bytes needed.
        needs: usize,
        /// Bytes present.
        has: usize,
    },
}

/// A log in a shared region: what all members see of it.
///
/// Copying the handle copies the view, not the log. To take part, make a
/// [`Replica`] of it.
#[derive(Clone, Debug)]
pub struct Log {
    layout: Layout,
}

#[cfg(not(loom))]
impl Log {
    /// Makes an empty log in `memory`. Nobody may be using what is there.
    ///
    /// # Errors
    /// If the sizes are not legal or the memory is too small.
    pub fn create(memory: SharedMem, geometry: Geometry) -> Result<Self, LogError> {
        Self::create_in(&Words::new(memory), geometry)
    }

    /// The log that was created in `memory`.
    ///
    /// # Errors
    /// If there is none that this build can use.
    pub fn attach(memory: SharedMem) -> Result<Self, LogError> {
        Self::attach_to(&Words::new(memory))
    }
}

impl Log {
    pub(crate) fn create_in(words: &Words, geometry: Geometry) -> Result<Self, LogError> {
        Layout::create(words, geometry).map(|layout| Self { layout })
    }

    pub(crate) fn attach_to(words: &Words) -> Result<Self, LogError> {
        Layout::attach(words).map(|layout| Self { layout })
    }

    /// The sizes it was created with.
    #[must_use]
    pub const fn geometry(&self) -> &Geometry {
        self.layout.geometry()
    }
}

#[cfg(all(test, loom))]
mod models;
#[cfg(test)]
mod testing;
#[cfg(all(test, not(loom)))]
mod tests;
