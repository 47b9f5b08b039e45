//! What the tests and models of the log share.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{At, BadSnapshot, Change, MemberChange, StateMachine};

/// An operation on [`Map`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Op {
    pub(crate) key: u64,
    pub(crate) add: u64,
}

pub(crate) const fn op(key: u64, add: u64) -> Op {
    Op { key, add }
}

/// Sums by key. Answers with the sum before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Map {
    pub(crate) sums: BTreeMap<u64, u64>,
    pub(crate) changes: Vec<(Change, usize)>,
    /// Save all in one part.
    pub(crate) whole: bool,
}

impl Map {
    pub(crate) fn get(&self, key: u64) -> u64 {
        self.sums.get(&key).copied().unwrap_or(0)
    }
}

impl StateMachine for Map {
    type Op = Op;
    type Answer = u64;

    fn apply(&mut self, op: &Op, payload: &[u8], _: At) -> u64 {
        let more: u64 = payload.iter().map(|&byte| u64::from(byte)).sum();
        let sum = self.sums.entry(op.key).or_insert(0);
        let before = *sum;
        *sum = sum.wrapping_add(op.add).wrapping_add(more);
        before
    }

    fn member_changed(&mut self, change: &MemberChange) {
        self.changes.push((change.change, change.member.index()));
    }

    fn reset(&mut self) {
        self.sums.clear();
        self.changes.clear();
    }

    fn save(&self, from: u64, budget: usize, out: &mut Vec<u8>) -> Option<u64> {
        for (&key, &sum) in self.sums.range(from..) {
            if out.len() >= budget && !self.whole {
                return Some(key);
            }
            out.extend_from_slice(&key.to_le_bytes());
            out.extend_from_slice(&sum.to_le_bytes());
        }
        None
    }

    fn load(&mut self, _: u64, part: &[u8]) -> Result<(), BadSnapshot> {
        let (words, rest) = part.as_chunks::<8>();
        let (pairs, odd) = words.as_chunks::<2>();
        if !rest.is_empty() || !odd.is_empty() {
            return Err(BadSnapshot);
        }
        for [key, sum] in pairs {
            self.sums
                .insert(u64::from_le_bytes(*key), u64::from_le_bytes(*sum));
        }
        Ok(())
    }

    fn apply_below(&mut self, bound: u64, op: &Op, payload: &[u8], at: At) {
        if op.key < bound {
            self.apply(op, payload, at);
        }
    }
}
