//! Changes of the regions as entries of a log, and the regions as its state
//! machine.

use alloc::vec::Vec;

use vmm_shared::log::{At, BadSnapshot, StateMachine};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::regions::{Applied, Backing, Change, Prot, Purpose, Region, Regions, Sharing};
use crate::errno::{Errno, Result};

/// A change, in a fixed layout: what it is, addresses and lengths, a region's
/// attributes and its offset in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Entry {
    kind: u64,
    first: u64,
    second: u64,
    attributes: u64,
    offset: u64,
}

mod kind {
    pub(super) const PLACE: u64 = 1;
    pub(super) const PLACE_NEAR: u64 = 2;
    pub(super) const MAP: u64 = 3;
    pub(super) const UNMAP: u64 = 4;
    pub(super) const PROTECT: u64 = 5;
    pub(super) const SET_HEAP: u64 = 6;
    pub(super) const MOVE_HEAP: u64 = 7;
    pub(super) const GROW: u64 = 8;
    pub(super) const PUT: u64 = 9;
}

/// Where the attributes are: rights in the lowest bits, the file's number in
/// the upper half.
const SHARED: u64 = 1 << 8;
const HEAP: u64 = 1 << 9;
const STACK: u64 = 1 << 10;
const FILE: u64 = 1 << 11;

fn pack(region: Region) -> (u64, u64) {
    let mut attributes = u64::from(region.prot.bits());
    if region.sharing == Sharing::Shared {
        attributes |= SHARED;
    }
    attributes |= match region.purpose {
        Purpose::Mapping => 0,
        Purpose::Heap => HEAP,
        Purpose::Stack => STACK,
    };
    match region.backing {
        Backing::Zeros => (attributes, 0),
        Backing::File(node, offset) => (attributes | FILE | u64::from(node) << 32, offset),
    }
}

fn unpack(end: u64, attributes: u64, offset: u64) -> Region {
    let [prot, _, _, _, a, b, c, d] = attributes.to_le_bytes();
    let has = |bit| attributes & bit != 0;
    Region {
        end,
        prot: Prot::from_bits_truncate(prot),
        sharing: match has(SHARED) {
            true => Sharing::Shared,
            false => Sharing::Private,
        },
        backing: match has(FILE) {
            true => Backing::File(u32::from_le_bytes([a, b, c, d]), offset),
            false => Backing::Zeros,
        },
        purpose: match (has(HEAP), has(STACK)) {
            (true, _) => Purpose::Heap,
            (_, true) => Purpose::Stack,
            _ => Purpose::Mapping,
        },
    }
}

impl From<Change> for Entry {
    fn from(change: Change) -> Self {
        let entry = |kind, first, second| Self {
            kind,
            first,
            second,
            attributes: 0,
            offset: 0,
        };
        let with = |entry: Self, region| {
            let (attributes, offset) = pack(region);
            Self {
                attributes,
                offset,
                ..entry
            }
        };
        match change {
            Change::Map {
                wanted,
                fixed,
                len,
                region,
            } => {
                let kind = match (wanted, fixed) {
                    (None, _) => kind::PLACE,
                    (_, false) => kind::PLACE_NEAR,
                    (_, true) => kind::MAP,
                };
                with(entry(kind, wanted.unwrap_or(0), len), region)
            }
            Change::Unmap { start, len } => entry(kind::UNMAP, start, len),
            Change::Protect { start, len, prot } => Self {
                attributes: prot.bits().into(),
                ..entry(kind::PROTECT, start, len)
            },
            Change::SetHeap(start, end) => entry(kind::SET_HEAP, start, end),
            Change::MoveHeap(end) => entry(kind::MOVE_HEAP, end, 0),
            Change::Grow(address) => entry(kind::GROW, address, 0),
            Change::Put(start, region) => with(entry(kind::PUT, start, region.end), region),
        }
    }
}

impl Entry {
    /// The change; `None` if the bytes are none.
    pub(crate) fn change(&self) -> Option<Change> {
        let region = |end| unpack(end, self.attributes, self.offset);
        let map = |wanted, fixed| Change::Map {
            wanted,
            fixed,
            len: self.second,
            region: region(0),
        };
        let (start, len) = (self.first, self.second);
        Some(match self.kind {
            kind::PLACE => map(None, false),
            kind::PLACE_NEAR => map(Some(start), false),
            kind::MAP => map(Some(start), true),
            kind::UNMAP => Change::Unmap { start, len },
            kind::PROTECT => Change::Protect {
                start,
                len,
                prot: region(0).prot,
            },
            kind::SET_HEAP => Change::SetHeap(self.first, self.second),
            kind::MOVE_HEAP => Change::MoveHeap(self.first),
            kind::GROW => Change::Grow(self.first),
            kind::PUT => Change::Put(self.first, region(self.second)),
            _ => return None,
        })
    }
}

/// Applies bytes as entries of a log, as far as they are some, and looks
/// whether the regions are sound after each.
///
/// # Panics
/// If they are not, or if a replica that gets a snapshot half way differs.
#[cfg(any(test, fuzzing))]
pub(crate) fn apply_anything(bytes: &[u8]) {
    let (chunks, _) = bytes.as_chunks::<{ size_of::<Entry>() }>();
    let (mut first, mut second) = (Regions::default(), Regions::default());
    for (number, chunk) in chunks.iter().enumerate() {
        if number == chunks.len() / 2 {
            let mut snapshot = Vec::new();
            first.save(0, 0, &mut snapshot);
            second.reset();
            second.load(0, &snapshot).expect("it was just written");
        }
        let entry = Entry::read_from_bytes(chunk).expect("any bytes are one");
        let change = entry.change().ok_or(Errno::EINVAL);
        let before = first.clone();
        let done = change.and_then(|change| first.apply(change));
        let other = change.and_then(|change| second.apply(change));
        assert_eq!(done, other, "{entry:?}");
        if done.is_err() {
            assert_eq!(first, before, "{entry:?}");
        }
        let mut free_from = 0;
        for (start, region) in first.iter() {
            assert!(free_from <= start && start < region.end, "{entry:?}");
            free_from = region.end;
        }
        assert!(free_from <= super::tables::USER_END, "{entry:?}");
    }
    assert_eq!(first, second);
}

impl StateMachine for Regions {
    type Op = Entry;
    type Answer = Result<Applied>;

    fn apply(&mut self, op: &Entry, _: &[u8], _: At) -> Result<Applied> {
        Self::apply(self, op.change().ok_or(Errno::EINVAL)?)
    }

    fn reset(&mut self) {
        *self = Self::default();
    }

    /// Whole: a change may move any boundary.
    fn save(&self, _: u64, _: usize, out: &mut Vec<u8>) -> Option<u64> {
        let (start, end) = self.heap();
        let heap = [Change::SetHeap(start, end)];
        let regions = self
            .iter()
            .map(|(start, region)| Change::Put(start, region));
        for change in heap.into_iter().chain(regions) {
            out.extend_from_slice(Entry::from(change).as_bytes());
        }
        None
    }

    fn load(&mut self, _: u64, part: &[u8]) -> Result<(), BadSnapshot> {
        let entries = <[Entry]>::ref_from_bytes(part).map_err(|_| BadSnapshot)?;
        for entry in entries {
            let change = entry.change().ok_or(BadSnapshot)?;
            Self::apply(self, change).map_err(|_| BadSnapshot)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::regions::testing::zeros;
    use super::*;

    #[test]
    fn every_change_survives_the_log() {
        let file = Region {
            backing: Backing::File(u32::MAX, 1 << 40),
            sharing: Sharing::Shared,
            purpose: Purpose::Stack,
            ..zeros(Prot::all())
        };
        let map = |wanted, fixed| Change::Map {
            wanted,
            fixed,
            len: 4096,
            region: file,
        };
        for change in [
            map(None, false),
            map(Some(0), false),
            map(Some(1 << 40), true),
            Change::Unmap {
                start: 1,
                len: u64::MAX,
            },
            Change::Protect {
                start: 4096,
                len: 1,
                prot: Prot::EXECUTE,
            },
            Change::SetHeap(1, 2),
            Change::MoveHeap(3),
            Change::Grow(4),
            Change::Put(5, Region { end: 6, ..file }),
        ] {
            assert_eq!(Entry::from(change).change(), Some(change));
        }
        let bad = Entry {
            kind: 0,
            first: 0,
            second: 0,
            attributes: 0,
            offset: 0,
        };
        assert_eq!(bad.change(), None);
    }

    /// Numbers that are often what a program would say.
    fn number(random: u64) -> u64 {
        let small = random >> 8 & 0x3f;
        match random & 7 {
            0 => random,
            1 => small,
            2 => super::super::tables::USER_END - (small << 12),
            _ => 0x10_0000 + (small << 12),
        }
    }

    #[test]
    fn whatever_is_in_the_log_the_regions_stay_sound() {
        let mut random = crate::testing::random();
        for _ in 0..40 {
            let mut bytes = Vec::new();
            for _ in 0..200 {
                let len = if random() & 3 == 0 {
                    random()
                } else {
                    (random() & 15) << 12
                };
                let second = [len, number(random())];
                let entry = Entry {
                    kind: random() % 10,
                    first: number(random()),
                    second: second[usize::from(random() & 3 == 0)],
                    attributes: random() & 0x3_0000_0f07,
                    offset: number(random()),
                };
                bytes.extend_from_slice(entry.as_bytes());
            }
            apply_anything(&bytes);
        }
    }

    #[test]
    fn a_snapshot_is_the_state() {
        let mut regions = Regions::default();
        for page in 0..40_u64 {
            let change = Change::Put(
                page << 20,
                Region {
                    end: (page << 20) + 4096,
                    backing: Backing::File(3, page << 12),
                    ..zeros(Prot::READ)
                },
            );
            regions.apply(change).expect("any");
        }
        regions.apply(Change::SetHeap(1, 2)).expect("any");
        let mut bytes = Vec::new();
        assert_eq!(regions.save(0, 16, &mut bytes), None);
        // As the log hands it over: at any alignment.
        let mut copy = Regions::default();
        copy.load(0, &bytes).expect("a whole snapshot");
        assert_eq!(copy, regions);
        assert_eq!(copy.load(0, &bytes[1..]), Err(BadSnapshot));
    }
}
