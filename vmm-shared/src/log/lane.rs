//! The author's side of its lane: where the next batch goes.
//!
//! A lane is a ring of lines that one incarnation of one member writes. What
//! is free in it follows from the reclaim frontier and from the author's own
//! memory of what it linked where, so none of it is in shared memory.

use alloc::collections::VecDeque;

use crate::sync::{Ordering, fence};

/// Lines reserved for one batch. Dropping it gives them back: nobody can see
/// a batch that was not linked.
#[derive(Debug)]
#[must_use]
pub(crate) struct Reserved {
    /// The first line.
    pub(crate) line: usize,
    end: u64,
}

/// The author's view of its lane. Cursors count lines and only grow.
#[derive(Debug)]
pub(crate) struct Lane {
    lines: u64,
    written: u64,
    freed: u64,
    /// Linked batches whose space is in use, neighbours put together to
    /// about a sixteenth of the lane each.
    linked: VecDeque<Span>,
}

/// A stretch of the lane that is free once `position` is reclaimed.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: u64,
    end: u64,
    position: u64,
}

impl Lane {
    pub(crate) fn new(lines: usize) -> Self {
        Self {
            lines: lines as u64,
            written: 0,
            freed: 0,
            linked: VecDeque::new(),
        }
    }

    /// `need` lines in a row, if there are some that no position from `head`
    /// on uses. `head` must have been loaded with Acquire.
    pub(crate) fn reserve(&mut self, need: usize, head: u64) -> Option<Reserved> {
        let need = need as u64;
        let at = self.written & (self.lines - 1);
        // A batch does not wrap: the rest of the last round is left out.
        let skip = if at + need > self.lines {
            self.lines - at
        } else {
            0
        };
        let end = self.written + skip + need;
        if end - self.freed > self.lines {
            self.release(head);
            if end - self.freed > self.lines {
                return None;
            }
        }
        // Release: orders the caller's load of the frontier before the writes
        // that follow; pairs with the Acquire fence in `fetch`.
        fence(Ordering::Release);
        Some(Reserved {
            line: usize::try_from((end - need) & (self.lines - 1)).expect("below the lines"),
            end,
        })
    }

    fn release(&mut self, head: u64) {
        while let Some(span) = self.linked.front()
            && span.position < head
        {
            self.freed = span.end;
            self.linked.pop_front();
        }
        if self.linked.is_empty() {
            self.freed = self.written;
        }
    }

    /// The batch in `reserved` was linked at `position`.
    pub(crate) fn commit(&mut self, reserved: &Reserved, position: u64) {
        let (start, end) = (self.written, reserved.end);
        self.written = end;
        match self.linked.back_mut() {
            Some(span) if end - span.start <= self.lines / 16 => {
                span.end = end;
                span.position = position;
            }
            _ => self.linked.push_back(Span {
                start,
                end,
                position,
            }),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn space_comes_back_only_when_the_frontier_has_passed() {
        let mut lane = Lane::new(8);
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
    }

    #[test]
    fn a_batch_never_wraps_and_a_dropped_one_leaves_no_trace() {
        let mut lane = Lane::new(8);
        let first = lane.reserve(6, 0).expect("empty");
        lane.commit(&first, 0);
        assert!(lane.reserve(4, 0).is_none());
        let second = lane.reserve(4, 1).expect("all reclaimed");
        assert_eq!(second.line, 0);
        drop(second);
        let third = lane.reserve(2, 1).expect("all reclaimed");
        assert_eq!(third.line, 6);
    }
}
