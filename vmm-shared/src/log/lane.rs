//! The author's side of its lane: where the next batch goes.
//!
//! One incarnation of one member writes a lane, segment by segment. What is
//! free in it follows from the reclaim frontier and from the author's own
//! memory of what it linked where, so none of it is in shared memory. Of the
//! free segments the one that was freed last is written next: it is the one
//! most likely to be in the author's cache, and a large lane costs no more
//! than a small one as long as little of it is needed.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::sync::{Ordering, fence};

use super::Geometry;

/// Lines reserved for one batch. Dropping it gives them back: nobody can see
/// a batch that was not linked.
#[derive(Debug)]
#[must_use]
pub(crate) struct Reserved {
    /// The first line.
    pub(crate) line: usize,
    lines: usize,
}

/// The author's view of its lane.
#[derive(Debug)]
pub(crate) struct Lane {
    segment_lines: usize,
    current: Segment,
    /// Segments with batches that the frontier has not passed, oldest first.
    full: VecDeque<Segment>,
    /// First lines of free segments; the last was freed last.
    free: Vec<usize>,
}

/// A part of the lane that is filled from its start and freed as a whole.
#[derive(Clone, Copy, Debug)]
struct Segment {
    first_line: usize,
    used_lines: usize,
    /// Where its last batch was linked.
    position: u64,
}

impl Segment {
    const fn at(first_line: usize) -> Self {
        Self {
            first_line,
            used_lines: 0,
            position: 0,
        }
    }
}

impl Lane {
    pub(crate) fn new(geometry: &Geometry) -> Self {
        let (lines, segment_lines) = (geometry.lane_lines, geometry.segment_lines());
        Self {
            segment_lines,
            current: Segment::at(0),
            full: VecDeque::new(),
            free: (1..lines / segment_lines)
                .rev()
                .map(|index| index * segment_lines)
                .collect(),
        }
    }

    /// `need` lines in a row, if there are some that no position from `head`
    /// on uses. `head` must have been loaded with Acquire.
    #[inline]
    pub(crate) fn reserve(&mut self, need: usize, head: u64) -> Option<Reserved> {
        if self.current.used_lines + need > self.segment_lines {
            self.next_segment(head)?;
            if need > self.segment_lines {
                return None;
            }
        }
        // Release: orders the caller's load of the frontier before the writes
        // that follow; pairs with the Acquire fence in `fetch`.
        fence(Ordering::Release);
        Some(Reserved {
            line: self.current.first_line + self.current.used_lines,
            lines: need,
        })
    }

    fn next_segment(&mut self, head: u64) -> Option<()> {
        while let Some(segment) = self.full.front()
            && segment.position < head
        {
            self.free.push(segment.first_line);
            self.full.pop_front();
        }
        if self.current.position < head {
            self.current.used_lines = 0;
        } else {
            let next = self.free.pop()?;
            self.full.push_back(self.current);
            self.current = Segment::at(next);
        }
        Some(())
    }

    /// The batch in `reserved` was linked at `position`.
    #[inline]
    pub(crate) fn commit(&mut self, reserved: &Reserved, position: u64) {
        self.current.used_lines += reserved.lines;
        self.current.position = position;
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::tests::TINY;
    use super::*;

    /// Four segments of two lines.
    fn lane() -> Lane {
        Lane::new(&Geometry {
            lane_lines: 8,
            ..TINY
        })
    }

    #[test]
    fn space_comes_back_only_when_the_frontier_has_passed() {
        let mut lane = lane();
        for position in 0..4 {
            let reserved = lane.reserve(2, 0).expect("eight lines");
            assert_eq!(reserved.line as u64, position * 2);
            lane.commit(&reserved, position);
        }
        assert!(lane.reserve(1, 0).is_none());
        let reserved = lane.reserve(2, 1).expect("position 0 is reclaimed");
        assert_eq!(reserved.line, 0);
        lane.commit(&reserved, 4);
        assert!(lane.reserve(1, 1).is_none());
        let reserved = lane.reserve(2, 5).expect("all reclaimed");
        assert_eq!(reserved.line, 0, "the warmest first");
    }

    #[test]
    fn a_batch_stays_in_its_segment_and_a_dropped_one_leaves_no_trace() {
        let mut lane = lane();
        let first = lane.reserve(1, 0).expect("empty");
        lane.commit(&first, 0);
        let dropped = lane.reserve(1, 0).expect("half a segment");
        assert_eq!(dropped.line, 1);
        drop(dropped);
        let second = lane.reserve(2, 0).expect("three segments");
        assert_eq!(second.line, 2);
        lane.commit(&second, 1);
        assert!(lane.reserve(3, 0).is_none(), "longer than a segment");
    }
}
