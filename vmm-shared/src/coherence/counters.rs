//! What a node counts about its faults, for the caller to publish.

use super::fault::Grant;
use super::rules::Change;

/// Counts since the node's start. Plain numbers: one per core, summed up, or
/// one per node under the lock of its page tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    changes: [u64; 11],
    splits: u64,
    refreshes: u64,
    asked: u64,
    served: u64,
}

const NAMES: [(Change, &str); 11] = [
    (Change::Regrant, "regrants"),
    (Change::FirstTouch, "first_touches"),
    (Change::Join, "joins"),
    (Change::SharedAsData, "shared_as_data"),
    (Change::SharedAsCode, "shared_as_code"),
    (Change::CodeToData, "code_to_data"),
    (Change::DataToCode, "data_to_code"),
    (Change::Alone, "alone_again"),
    (Change::Roam, "began_to_roam"),
    (Change::Move, "moves"),
    (Change::Settle, "settled"),
];

impl Counters {
    /// How many [`values`](Self::values) there are.
    pub const COUNT: usize = NAMES.len() + 4;

    /// Counts a completed grant.
    pub fn note(&mut self, grant: &Grant) {
        self.changes[grant.change as usize] += 1;
        self.splits += u64::from(grant.split);
        self.refreshes += u64::from(grant.must_refresh);
        self.asked += u64::from(grant.asked.len());
    }

    /// Counts an acknowledged revocation.
    pub fn note_served(&mut self) {
        self.served += 1;
    }

    /// How often this change happened.
    #[must_use]
    pub const fn changes(&self, change: Change) -> u64 {
        self.changes[change as usize]
    }

    /// Transitions that cost peers something: all grants but first touches,
    /// joins and regrants.
    #[must_use]
    pub fn transitions(&self) -> u64 {
        let free = [Change::Regrant, Change::FirstTouch, Change::Join];
        NAMES
            .iter()
            .filter(|(change, _)| !free.contains(change))
            .map(|(change, _)| self.changes(*change))
            .sum()
    }

    /// All counts with the names operators see.
    pub fn values(&self) -> impl Iterator<Item = (&'static str, u64)> + use<> {
        let Self {
            splits,
            refreshes,
            asked,
            served,
            ..
        } = *self;
        let rest = [
            ("splits", splits),
            ("refreshes", refreshes),
            ("revocations_asked", asked),
            ("revocations_served", served),
        ];
        let counts = self.changes;
        NAMES
            .into_iter()
            .map(move |(change, name)| (name, counts[change as usize]))
            .chain(rest)
    }
}
