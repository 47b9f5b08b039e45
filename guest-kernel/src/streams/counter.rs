//! Counters that programs add to and wait for: eventfd(2).

/// A counter.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counter {
    pub(crate) count: u64,
    /// A read takes one instead of all.
    pub(crate) semaphore: bool,
}

impl Counter {
    /// What a read gets; `None` if it must wait.
    pub(crate) fn take(&mut self) -> Option<u64> {
        let taken = if self.semaphore {
            self.count.min(1)
        } else {
            self.count
        };
        self.count -= taken;
        (taken > 0).then_some(taken)
    }

    /// Whether there was room for it.
    pub(crate) fn add(&mut self, more: u64) -> bool {
        let sum = self.count.checked_add(more).filter(|sum| *sum < u64::MAX);
        self.count = sum.unwrap_or(self.count);
        sum.is_some()
    }

    pub(crate) fn has_room(self) -> bool {
        self.count < u64::MAX - 1
    }
}

#[cfg(test)]
mod tests {
    use super::Counter;

    #[test]
    fn a_semaphore_is_taken_one_by_one_and_a_counter_as_a_whole() {
        let mut counter = Counter {
            count: 3,
            semaphore: false,
        };
        assert_eq!((counter.take(), counter.take()), (Some(3), None));
        assert!(counter.add(u64::MAX - 1) && !counter.has_room() && !counter.add(1));
        let mut counter = Counter {
            count: 2,
            semaphore: true,
        };
        assert_eq!(
            [counter.take(), counter.take(), counter.take()],
            [Some(1), Some(1), None]
        );
    }
}
