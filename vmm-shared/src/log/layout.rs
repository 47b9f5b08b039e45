//! Where everything of a log lies in its region.
//!
//! ```text
//! word      what                                         written by
//!  0        header: magic, version, geometry             the creator, once
//!  8        head: reclaim frontier                       anyone, only upwards
//! 16        member records, 5 lines each                 see `member`
//!  ..       order ring: one word per batch               anyone, by CAS
//! ---------------------------------------------------- coherent part ends --
//!  ..       lanes: one ring of lines per member          its owner
//!  ..       stages: one snapshot window per member       its owner
//! ```
//!
//! The coherent part is small (16 KiB of order ring carry 2,048 batches); the
//! lanes and stages are large, and each byte of them has one writer. A fabric
//! that keeps only little memory coherent needs to do so for the first part
//! alone, provided that owners write lines back before they link a batch and
//! readers drop them before they copy it.

use crate::sync::{Ordering, Words};

use super::LogError;
use super::member::MemberId;

/// "VIALOG\0\0", read as a little-endian word.
pub const MAGIC: u64 = u64::from_le_bytes(*b"VIALOG\0\0");
/// Version of the layout and the protocol; any other is refused.
pub const VERSION: u64 = 1;

/// Words in a line.
pub(crate) const LINE: usize = 8;
/// Bits of a link that number the line in a lane.
pub(crate) const LINE_BITS: u32 = 20;
/// Bits of a link that number the member.
pub(crate) const MEMBER_BITS: u32 = 6;
/// Most members that a log can have.
pub const MAX_MEMBERS: usize = 1 << MEMBER_BITS;

const HEAD_AT: usize = LINE;
const RECORDS_AT: usize = 2 * LINE;
/// Lines of a member's record.
const RECORD_LINES: usize = 5;

/// The sizes of a log, chosen when it is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Batches that the order ring holds: a power of two, at least 4.
    pub order_slots: usize,
    /// Member slots: 1 to [`MAX_MEMBERS`]. More than there are nodes, so that
    /// slots of evicted members can stay in quarantine.
    pub members: usize,
    /// 64-byte lines in each member's lane: a power of two from 4 to 2²⁰. A
    /// batch, and so an operation with its payload, fits into a quarter of a
    /// small lane and a 64th of a large one: 64 KiB of 4 MiB.
    pub lane_lines: usize,
    /// Bytes of an entry: 8 of head and the rest for the payload; a multiple
    /// of 8 from 16 to 512. A longer payload goes to the batch's arena.
    pub entry_bytes: usize,
    /// Lines in each member's stage, through which it hands out snapshots: at
    /// least 8 plus one per eight members.
    pub stage_lines: usize,
}

impl Geometry {
    /// A log for a rack of a few nodes: 64 Ki batches and 4 MiB per member.
    pub const RACK: Self = Self {
        order_slots: 1 << 16,
        members: 16,
        lane_lines: 1 << 16,
        entry_bytes: 64,
        stage_lines: 1 << 12,
    };

    /// Payload bytes that an entry holds without the arena.
    #[must_use]
    #[inline]
    pub const fn inline_bytes(&self) -> usize {
        self.entry_bytes - 8
    }

    /// Bytes of the part that must be coherent between members.
    #[must_use]
    pub const fn coherent_bytes(&self) -> usize {
        (self.order_at() + self.order_slots.next_multiple_of(LINE)) * 8
    }

    /// Bytes that the log occupies.
    #[must_use]
    pub const fn total_bytes(&self) -> usize {
        self.coherent_bytes() + self.members * (self.lane_lines + self.stage_lines) * LINE * 8
    }

    /// Lines of a segment of a lane: the most that a batch can fill.
    pub(crate) const fn segment_lines(&self) -> usize {
        match self.lane_lines {
            0..32 => self.lane_lines / 4,
            32..512 => 8,
            lines => lines / 64,
        }
    }

    /// Lines of the stage that describe the part on it, roster included.
    pub(crate) const fn stage_head_lines(&self) -> usize {
        1 + self.members.div_ceil(LINE)
    }

    const fn order_at(&self) -> usize {
        RECORDS_AT + self.members * RECORD_LINES * LINE
    }

    /// Whether the sizes are within what the protocol can do.
    #[must_use]
    pub const fn is_legal(&self) -> bool {
        let most_lines = 1 << LINE_BITS;
        self.order_slots >= 4
            && self.order_slots.is_power_of_two()
            && self.order_slots <= 1 << 32
            && self.members >= 1
            && self.members <= MAX_MEMBERS
            && self.lane_lines >= 4
            && self.lane_lines <= most_lines
            && self.lane_lines.is_power_of_two()
            && self.entry_bytes >= 16
            && self.entry_bytes <= 512
            && self.entry_bytes.is_multiple_of(8)
            && self.stage_lines > self.stage_head_lines()
            && self.stage_lines <= most_lines
    }
}

/// The words of a log, found by what they are for. All offsets come from a
/// geometry that was checked against the window once.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    geometry: Geometry,
    words: Words,
    order: Words,
    lanes: Words,
    stages: Words,
}

impl Layout {
    /// Makes an empty log of `geometry` in `words`.
    pub(crate) fn create(words: &Words, geometry: Geometry) -> Result<Self, LogError> {
        let layout = Self::cut(words, geometry)?;
        // Relaxed, all: the magic below publishes them.
        words.at(0).store(0, Ordering::Relaxed);
        for index in 1..geometry.coherent_bytes() / 8 {
            words.at(index).store(0, Ordering::Relaxed);
        }
        for (index, value) in Self::header(&geometry).into_iter().enumerate().skip(1) {
            words.at(index).store(value, Ordering::Relaxed);
        }
        // Release: who sees the magic sees the geometry and the zeroes.
        words.at(0).store(MAGIC, Ordering::Release);
        Ok(layout)
    }

    /// The log that another member has created in `words`.
    #[cfg(not(loom))]
    pub(crate) fn attach(words: &Words) -> Result<Self, LogError> {
        let header = words.slice(0, LINE).ok_or(LogError::NotALog)?;
        // Acquire: pairs with the Release in `create`.
        if header[0].load(Ordering::Acquire) != MAGIC {
            return Err(LogError::NotALog);
        }
        let version = header[1].load(Ordering::Relaxed);
        if version != VERSION {
            return Err(LogError::Version { found: version });
        }
        let size = |index: usize| {
            usize::try_from(header[index].load(Ordering::Relaxed))
                .map_err(|_| LogError::BadGeometry)
        };
        let geometry = Geometry {
            order_slots: size(2)?,
            members: size(3)?,
            lane_lines: size(4)?,
            entry_bytes: size(5)?,
            stage_lines: size(6)?,
        };
        Self::cut(words, geometry)
    }

    fn header(geometry: &Geometry) -> [u64; 7] {
        [
            MAGIC,
            VERSION,
            geometry.order_slots as u64,
            geometry.members as u64,
            geometry.lane_lines as u64,
            geometry.entry_bytes as u64,
            geometry.stage_lines as u64,
        ]
    }

    fn cut(words: &Words, geometry: Geometry) -> Result<Self, LogError> {
        // Legal sizes are so small that the sums below can't overflow.
        if !geometry.is_legal() {
            return Err(LogError::BadGeometry);
        }
        let coherent = geometry.coherent_bytes() / 8;
        let lanes = geometry.members * geometry.lane_lines * LINE;
        let stages = geometry.members * geometry.stage_lines * LINE;
        let part = |start, count| {
            words.part(start, count).ok_or(LogError::TooSmall {
                needs: geometry.total_bytes(),
                has: words.len() * 8,
            })
        };
        Ok(Self {
            geometry,
            words: part(0, coherent)?,
            order: part(geometry.order_at(), geometry.order_slots)?,
            lanes: part(coherent, lanes)?,
            stages: part(coherent + lanes, stages)?,
        })
    }

    #[inline]
    pub(crate) const fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    #[inline]
    pub(crate) fn head(&self) -> &crate::sync::AtomicU64 {
        self.words.at(HEAD_AT)
    }

    /// Word `index` of line `line` of a member's record.
    #[inline]
    pub(crate) fn record(
        &self,
        member: MemberId,
        line: usize,
        index: usize,
    ) -> &crate::sync::AtomicU64 {
        debug_assert!(line < RECORD_LINES && index < LINE, "a word of a record");
        let record = RECORDS_AT + member.index() * RECORD_LINES * LINE;
        self.words.at(record + line * LINE + index)
    }

    #[inline]
    pub(crate) fn order(&self, index: usize) -> &crate::sync::AtomicU64 {
        self.order.at(index)
    }

    /// `count` words of a member's lane, or `None` if they are not all in it.
    #[inline]
    pub(crate) fn lane(
        &self,
        member: MemberId,
        line: usize,
        count: usize,
    ) -> Option<&[crate::sync::AtomicU64]> {
        let words = self.geometry.lane_lines * LINE;
        let start = line * LINE;
        if start.checked_add(count)? > words {
            return None;
        }
        self.lanes.slice(member.index() * words + start, count)
    }

    /// A member's whole stage.
    pub(crate) fn stage(&self, member: MemberId) -> &[crate::sync::AtomicU64] {
        let words = self.geometry.stage_lines * LINE;
        self.stages
            .slice(member.index() * words, words)
            .expect("inside the checked geometry")
    }
}
