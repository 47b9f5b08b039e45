//! The state machine that finds lost and doubled operations.

use std::collections::BTreeMap;

use vmm_shared::log::{At, BadSnapshot, StateMachine};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// "Client `client` does its operation number `number`."
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Step {
    pub(crate) client: u64,
    pub(crate) number: u64,
}

/// For each client the last operation applied. A client numbers its
/// operations from 1 on, so anything but "one more than the last" is a loss or
/// a double.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ledger {
    pub(crate) last: BTreeMap<u64, u64>,
    pub(crate) violations: u64,
}

/// The key under which the number of violations is saved.
const VIOLATIONS: u64 = u64::MAX;

impl Ledger {
    pub(crate) fn last_of(&self, client: u64) -> u64 {
        self.last.get(&client).copied().unwrap_or(0)
    }

    /// Equal states have equal digests, and others most likely not.
    pub(crate) fn digest(&self) -> u64 {
        let words = self.last.iter().flat_map(|(client, last)| [*client, *last]);
        let mut digest = 0xcbf2_9ce4_8422_2325;
        for word in words.chain([self.violations]) {
            for byte in word.to_le_bytes() {
                digest = (digest ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
            }
        }
        digest
    }
}

impl StateMachine for Ledger {
    type Op = Step;
    /// Whether the operation was the next one of its client.
    type Answer = bool;

    fn apply(&mut self, step: &Step, _: &[u8], _: At) -> bool {
        let last = self.last.entry(step.client).or_insert(0);
        let expected = *last + 1 == step.number;
        *last = step.number;
        self.violations += u64::from(!expected);
        expected
    }

    fn reset(&mut self) {
        *self = Self::default();
    }

    fn save(&self, from: u64, budget: usize, out: &mut Vec<u8>) -> Option<u64> {
        for (client, last) in self.last.range(from..) {
            if out.len() >= budget {
                return Some(*client);
            }
            out.extend_from_slice(client.as_bytes());
            out.extend_from_slice(last.as_bytes());
        }
        out.extend_from_slice(VIOLATIONS.as_bytes());
        out.extend_from_slice(self.violations.as_bytes());
        None
    }

    fn load(&mut self, _: u64, part: &[u8]) -> Result<(), BadSnapshot> {
        let (words, rest) = part.as_chunks::<8>();
        let (pairs, odd) = words.as_chunks::<2>();
        if !rest.is_empty() || !odd.is_empty() {
            return Err(BadSnapshot);
        }
        for [client, last] in pairs {
            let (client, last) = (u64::from_ne_bytes(*client), u64::from_ne_bytes(*last));
            if client == VIOLATIONS {
                self.violations = last;
            } else {
                self.last.insert(client, last);
            }
        }
        Ok(())
    }

    fn apply_below(&mut self, bound: u64, step: &Step, payload: &[u8], at: At) {
        if step.client < bound {
            self.apply(step, payload, at);
        }
    }
}
