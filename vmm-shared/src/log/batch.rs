//! A batch in its author's lane.
//!
//! ```text
//! word 0     the position it is offered at
//! word 1     epoch (32) | words used (22) | entries (10)
//! word 2..   entries, each `entry_bytes` long:
//!              word 0   kind (8) above payload length (32)
//!              word 1.. the payload if it fits, else its place in the arena
//!      ..    arena: payloads that did not fit, each from a word on
//! ```
//!
//! A batch starts at a line and never wraps. Its bytes are written with
//! relaxed stores and published by the link; they are copied with relaxed
//! loads and believed only once the copy is known to be older than any reuse
//! of the space (see [`fetch`]).

use alloc::vec::Vec;

use zerocopy::IntoBytes;

use crate::sync::{AtomicU64, Ordering, fence};

use super::Log;
use super::layout::{Geometry, LINE};
use super::member::{Epoch, MemberId};
use super::order::Link;
use super::roster::Change;

const HEAD_WORDS: usize = 2;
const COUNT_BITS: u32 = 10;
const WORDS_BITS: u32 = 22;
/// Most entries in one batch.
pub(crate) const MAX_ENTRIES: usize = (1 << COUNT_BITS) - 1;

/// What an entry is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Operation,
    Membership(Change),
}

impl Kind {
    #[inline]
    const fn code(self) -> u64 {
        match self {
            Self::Operation => 1,
            Self::Membership(Change::Joined) => 2,
            Self::Membership(Change::Left) => 3,
            Self::Membership(Change::Evicted) => 4,
        }
    }

    #[inline]
    const fn from_code(code: u64) -> Option<Self> {
        match code {
            1 => Some(Self::Operation),
            2 => Some(Self::Membership(Change::Joined)),
            3 => Some(Self::Membership(Change::Left)),
            4 => Some(Self::Membership(Change::Evicted)),
            _ => None,
        }
    }
}

/// An entry to be written: its payload is `first` followed by `second`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece<'a> {
    pub(crate) kind: Kind,
    pub(crate) first: &'a [u8],
    pub(crate) second: &'a [u8],
}

/// Arena words that a payload of `len` bytes takes.
#[inline]
pub(crate) fn arena_words(geometry: &Geometry, len: usize) -> usize {
    if len <= geometry.inline_bytes() {
        0
    } else {
        len.div_ceil(8)
    }
}

/// Words of a batch of `entries` with `arena` words of long payloads.
#[inline]
pub(crate) const fn batch_words(geometry: &Geometry, entries: usize, arena: usize) -> usize {
    HEAD_WORDS + entries * (geometry.entry_bytes / 8) + arena
}

/// Most words that a batch may have.
pub(crate) const fn max_words(geometry: &Geometry) -> usize {
    geometry.segment_lines() * LINE
}

#[inline]
fn store_bytes(words: &[AtomicU64], first: &[u8], second: &[u8]) {
    // Relaxed, all: published by the link.
    let (whole, odd) = first.as_chunks::<8>();
    for (word, bytes) in words.iter().zip(whole) {
        word.store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
    }
    if odd.is_empty() && second.is_empty() {
        return;
    }
    let mut rest = odd.iter().chain(second);
    for word in &words[whole.len()..] {
        let mut bytes = [0; 8];
        let mut any = false;
        for (byte, value) in bytes.iter_mut().zip(rest.by_ref()) {
            *byte = *value;
            any = true;
        }
        if !any {
            break;
        }
        word.store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
    }
}

/// Writes a batch into reserved words of the author's own lane.
#[inline]
pub(crate) fn write<'a>(
    words: &[AtomicU64],
    geometry: &Geometry,
    epoch: Epoch,
    pieces: impl ExactSizeIterator<Item = Piece<'a>>,
) {
    let stride = geometry.entry_bytes / 8;
    let count = pieces.len();
    let mut arena = HEAD_WORDS + count * stride;
    for (index, piece) in pieces.enumerate() {
        let entry = HEAD_WORDS + index * stride;
        let len = piece.first.len() + piece.second.len();
        // Relaxed: published by the link.
        words[entry].store((piece.kind.code() << 32) | len as u64, Ordering::Relaxed);
        let at = match arena_words(geometry, len) {
            0 => entry + 1,
            long => {
                words[entry + 1].store(arena as u64, Ordering::Relaxed);
                arena += long;
                arena - long
            }
        };
        store_bytes(&words[at..], piece.first, piece.second);
    }
    let head = (u64::from(epoch) << 32) | ((arena as u64) << COUNT_BITS) | count as u64;
    words[1].store(head, Ordering::Relaxed);
}

/// Says in the batch at which position it is about to be linked.
#[inline]
pub(crate) fn offer_at(words: &[AtomicU64], position: u64) {
    // Relaxed: published by the link.
    words[0].store(position, Ordering::Relaxed);
}

/// A private copy of a batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Batch<'a> {
    pub(crate) author: (MemberId, Epoch),
    words: &'a [u64],
    stride: usize,
    count: usize,
}

/// Why there is no batch to apply at a filled position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoBatch {
    /// The reader was too slow; the space may have been used again.
    Overrun,
    /// The author's bytes make no batch: garbage, or a tombstone whose lane
    /// has a new owner.
    Malformed,
}

/// Copies the batch that `link` names at `position`.
///
/// The author may use the space again once the reclaim frontier is past
/// `position`, while we copy. So this is a sequence lock with the frontier as
/// the sequence: copy, then look at the frontier, and believe the copy only
/// if the frontier has not passed. The author loads the frontier before it
/// writes; if one of our loads saw such a write, then the fences order that
/// load of the frontier before ours, and ours sees at least as much.
#[inline]
pub(crate) fn fetch<'a>(
    log: &Log,
    position: u64,
    link: Link,
    copy: &'a mut Vec<u64>,
) -> Result<Batch<'a>, NoBatch> {
    let geometry = log.layout.geometry();
    let copied = copy_words(log, link, copy);
    // Acquire: pairs with the Release fence in `Lane::reserve`.
    fence(Ordering::Acquire);
    // Relaxed: ordered by the fence above.
    if log.layout.head().load(Ordering::Relaxed) > position {
        return Err(NoBatch::Overrun);
    }
    let (epoch, count) = copied.ok_or(NoBatch::Malformed)?;
    let words: &'a [u64] = copy;
    let stride = geometry.entry_bytes / 8;
    if words[0] != position || HEAD_WORDS + count * stride > words.len() {
        return Err(NoBatch::Malformed);
    }
    Ok(Batch {
        author: (link.member, epoch),
        words,
        stride,
        count,
    })
}

#[inline]
fn copy_words(log: &Log, link: Link, copy: &mut Vec<u64>) -> Option<(Epoch, usize)> {
    let head = log.layout.lane(link.member, link.line, HEAD_WORDS)?;
    // Relaxed, all: `look` has acquired what the link published.
    let second = head[1].load(Ordering::Relaxed);
    let field = |shift: u32, bits: u32| {
        usize::try_from((second >> shift) & ((1 << bits) - 1)).expect("a few bits")
    };
    let (count, used) = (field(0, COUNT_BITS), field(COUNT_BITS, WORDS_BITS));
    if used < HEAD_WORDS || used > max_words(log.layout.geometry()) {
        return None;
    }
    let words = log.layout.lane(link.member, link.line, used)?;
    copy.clear();
    copy.extend(words.iter().map(|word| word.load(Ordering::Relaxed)));
    copy[1] = second;
    Some((Epoch::try_from(second >> 32).expect("32 bits"), count))
}

/// An entry of a copied batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry<'a> {
    pub(crate) kind: Kind,
    pub(crate) payload: &'a [u8],
}

impl<'a> Batch<'a> {
    pub(crate) const fn len(&self) -> usize {
        self.count
    }

    /// Entry `index`, unless the author wrote garbage there.
    #[inline]
    pub(crate) fn entry(&self, index: usize) -> Option<Entry<'a>> {
        let entry = self
            .words
            .get(HEAD_WORDS + index * self.stride..)?
            .get(..self.stride)?;
        let kind = Kind::from_code(entry[0] >> 32)?;
        let len = usize::try_from(entry[0] & 0xffff_ffff).ok()?;
        let inline = entry[1..].as_bytes();
        let payload = if len <= inline.len() {
            &inline[..len]
        } else {
            let arena = usize::try_from(entry[1]).ok()?;
            self.words.get(arena..)?.as_bytes().get(..len)?
        };
        Some(Entry { kind, payload })
    }
}

/// The payload of an entry that changes the membership.
pub(crate) fn member_payload(member: MemberId, epoch: Epoch) -> [u8; 8] {
    ((u64::from(epoch) << 8) | member.bits()).to_le_bytes()
}

/// Reads what [`member_payload`] wrote.
pub(crate) fn parse_member(payload: &[u8]) -> Option<(MemberId, Epoch)> {
    let word = u64::from_le_bytes(payload.try_into().ok()?);
    let index = usize::try_from(word & 0xff).ok()?;
    Some((MemberId::new(index)?, Epoch::try_from(word >> 8).ok()?))
}
