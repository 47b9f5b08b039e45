//! The device's side of a split virtqueue (specification section 2.7).
//!
//! Ring indices are shared with vCPUs that run meanwhile: this module relies
//! on [`GuestMemory`] to move a naturally aligned value of 2 bytes in one
//! access. The order between ring accesses is made by the fences here.

use core::sync::atomic::{Ordering, fence};

use vmm_shared::addr::Gpa;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::chain::Chain;
use crate::mem::{GuestMemory, GuestMemoryError};

const DESCRIPTOR_NEXT: u16 = 1 << 0;
const DESCRIPTOR_WRITE: u16 = 1 << 1;
const DESCRIPTOR_INDIRECT: u16 = 1 << 2;
const AVAILABLE_NO_INTERRUPT: u16 = 1 << 0;
const USED_NO_NOTIFY: u16 = 1 << 0;

/// What a driver has done wrong with a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueError {
    /// A size that is zero, no power of two, or above the maximum.
    Size {
        /// The size.
        size: u32,
    },
    /// A ring that is misaligned or wraps around the address space.
    Address {
        /// Where it starts.
        gpa: Gpa,
    },
    /// A ring or buffer that is not in guest memory.
    OutsideMemory {
        /// First byte of the access.
        gpa: Gpa,
    },
    /// More buffers made available than the queue has descriptors.
    AvailableIndex {
        /// The driver's index.
        index: u16,
        /// The index that we were at.
        next: u16,
    },
    /// A descriptor number beyond the table.
    DescriptorIndex {
        /// The number.
        index: u16,
    },
    /// A chain with more descriptors than the table has: a loop.
    Loop {
        /// The chain's first descriptor.
        head: u16,
    },
    /// An indirect descriptor, which was not offered.
    Indirect {
        /// The chain's first descriptor.
        head: u16,
    },
    /// A readable descriptor behind a writable one.
    Order {
        /// The chain's first descriptor.
        head: u16,
    },
    /// A buffer too small for what the device has to say.
    TooSmall {
        /// The chain's first descriptor.
        head: u16,
    },
}

impl From<GuestMemoryError> for QueueError {
    fn from(error: GuestMemoryError) -> Self {
        Self::OutsideMemory { gpa: error.gpa }
    }
}

/// How each side says that it wants no notification.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Suppression {
    /// By a flag in its ring.
    #[default]
    Flags,
    /// By the index at which it wants the next one.
    EventIndex,
}

/// Whether the driver is to notify us of new buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kicks {
    /// It is.
    #[default]
    Wanted,
    /// It need not; it still may.
    Unwanted,
}

/// One entry of the descriptor table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

const _: () = assert!(size_of::<Descriptor>() == 16);

/// One entry of the used ring.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct UsedElement {
    id: u32,
    len: u32,
}

/// Where the driver has put a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueLayout {
    /// Number of descriptors, as written by the driver.
    pub size: u32,
    /// The descriptor table.
    pub descriptors: Gpa,
    /// The available ring (driver area).
    pub available: Gpa,
    /// The used ring (device area).
    pub used: Gpa,
}

/// A running queue.
#[derive(Clone, Debug)]
pub struct Queue {
    size: u16,
    descriptors: Gpa,
    available: Gpa,
    used: Gpa,
    suppression: Suppression,
    kicks: Kicks,
    /// Index in the available ring of the next buffer to take.
    next_available: u16,
    /// Index in the used ring of the next buffer to give back.
    next_used: u16,
    /// What the driver knows of `next_used`.
    published: u16,
}

impl Queue {
    /// Starts a queue with empty rings.
    ///
    /// # Errors
    /// If the driver's layout is not one.
    pub fn new(
        layout: QueueLayout,
        max_size: u16,
        suppression: Suppression,
    ) -> Result<Self, QueueError> {
        let size = u16::try_from(layout.size)
            .ok()
            .filter(|size| size.is_power_of_two() && *size <= max_size)
            .ok_or(QueueError::Size { size: layout.size })?;
        let entries = u64::from(size);
        for (gpa, align, len) in [
            (layout.descriptors, 16, 16 * entries),
            (layout.available, 2, 6 + 2 * entries),
            (layout.used, 4, 6 + 8 * entries),
        ] {
            if !gpa.is_aligned(align) || gpa.checked_add(len).is_none() {
                return Err(QueueError::Address { gpa });
            }
        }
        Ok(Self {
            size,
            descriptors: layout.descriptors,
            available: layout.available,
            used: layout.used,
            suppression,
            kicks: Kicks::Wanted,
            next_available: 0,
            next_used: 0,
            published: 0,
        })
    }

    /// Number of descriptors.
    #[must_use]
    pub const fn size(&self) -> u16 {
        self.size
    }

    /// Takes the next available buffer into `chain`; false if there is none.
    ///
    /// # Errors
    /// If the ring or the chain breaks the rules.
    pub fn pop(
        &mut self,
        memory: &impl GuestMemory,
        chain: &mut Chain,
    ) -> Result<bool, QueueError> {
        if !self.has_available(memory)? {
            return Ok(false);
        }
        let slot = u64::from(self.next_available % self.size);
        let head = memory.read::<u16>(at(self.available, 4 + 2 * slot))?;
        self.read_chain(memory, head, chain)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(true)
    }

    /// Undoes the last [`pop`](Self::pop).
    pub fn put_back(&mut self) {
        self.next_available = self.next_available.wrapping_sub(1);
    }

    /// Whether a buffer can be taken.
    ///
    /// # Errors
    /// If the driver's index can't be right or can't be read.
    pub fn has_available(&self, memory: &impl GuestMemory) -> Result<bool, QueueError> {
        let index = memory.read::<u16>(at(self.available, 2))?;
        // Acquire: the entries and descriptors are read after the index that
        // covers them.
        fence(Ordering::Acquire);
        let waiting = index.wrapping_sub(self.next_available);
        if waiting > self.size {
            return Err(QueueError::AvailableIndex {
                index,
                next: self.next_available,
            });
        }
        Ok(waiting > 0)
    }

    /// Gives a buffer back; the driver sees it at the next
    /// [`publish`](Self::publish).
    ///
    /// # Errors
    /// If the ring is not in guest memory.
    pub fn push(&mut self, memory: &impl GuestMemory, chain: &Chain) -> Result<(), QueueError> {
        let slot = u64::from(self.next_used % self.size);
        let element = UsedElement {
            id: u32::from(chain.head()),
            len: chain.written(),
        };
        memory.write(at(self.used, 4 + 8 * slot), &element)?;
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Shows the driver what was given back; true if it wants an interrupt.
    ///
    /// # Errors
    /// If a ring is not in guest memory.
    pub fn publish(&mut self, memory: &impl GuestMemory) -> Result<bool, QueueError> {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return Ok(false);
        }
        // Release: the buffers and entries are written before the index that
        // covers them.
        fence(Ordering::Release);
        memory.write(at(self.used, 2), &new)?;
        self.published = new;
        // SeqCst: the driver stores its wish and then looks at our index; we
        // store our index and then look at its wish. One of us sees the other.
        fence(Ordering::SeqCst);
        match self.suppression {
            Suppression::Flags => {
                let flags = memory.read::<u16>(self.available)?;
                Ok(flags & AVAILABLE_NO_INTERRUPT == 0)
            }
            Suppression::EventIndex => {
                let offset = 4 + 2 * u64::from(self.size);
                let event = memory.read::<u16>(at(self.available, offset))?;
                // Whether `event` is one of the indices from `old` to `new`.
                let behind_new = new.wrapping_sub(event).wrapping_sub(1);
                Ok(behind_new < new.wrapping_sub(old))
            }
        }
    }

    /// Tells the driver whether to notify us. After `Wanted`, look once more
    /// for buffers: one may have come just before.
    ///
    /// # Errors
    /// If the ring is not in guest memory.
    pub fn set_kicks(&mut self, memory: &impl GuestMemory, kicks: Kicks) -> Result<(), QueueError> {
        match (self.suppression, kicks) {
            (Suppression::EventIndex, Kicks::Wanted) => {
                let offset = 4 + 8 * u64::from(self.size);
                memory.write(at(self.used, offset), &self.next_available)?;
            }
            // The index where the next one was wanted stays behind.
            (Suppression::EventIndex, Kicks::Unwanted) => {}
            (Suppression::Flags, kicks) if kicks == self.kicks => return Ok(()),
            (Suppression::Flags, Kicks::Wanted) => memory.write(self.used, &0_u16)?,
            (Suppression::Flags, Kicks::Unwanted) => memory.write(self.used, &USED_NO_NOTIFY)?,
        }
        self.kicks = kicks;
        // SeqCst: our wish is stored before the driver's index is read again;
        // see `publish`.
        fence(Ordering::SeqCst);
        Ok(())
    }

    fn read_chain(
        &self,
        memory: &impl GuestMemory,
        head: u16,
        chain: &mut Chain,
    ) -> Result<(), QueueError> {
        chain.start(head);
        let mut index = head;
        for _ in 0..self.size {
            if index >= self.size {
                return Err(QueueError::DescriptorIndex { index });
            }
            let offset = 16 * u64::from(index);
            let descriptor = memory.read::<Descriptor>(at(self.descriptors, offset))?;
            if descriptor.flags & DESCRIPTOR_INDIRECT != 0 {
                return Err(QueueError::Indirect { head });
            }
            let gpa = Gpa(descriptor.address);
            if descriptor.flags & DESCRIPTOR_WRITE != 0 {
                chain.add_writable(gpa, descriptor.len)?;
            } else if chain.has_writable() {
                return Err(QueueError::Order { head });
            } else {
                chain.add_readable(gpa, descriptor.len)?;
            }
            if descriptor.flags & DESCRIPTOR_NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(QueueError::Loop { head })
    }
}

/// `offset` bytes into a ring; `Queue::new` has checked that its end exists.
const fn at(base: Gpa, offset: u64) -> Gpa {
    Gpa(base.0 + offset)
}

#[cfg(test)]
mod tests {
    use super::super::testing::DriverQueue;
    use super::*;
    use crate::mem::sparse::SparseMemory;

    fn queue(suppression: Suppression) -> (SparseMemory, DriverQueue, Queue) {
        let ram = SparseMemory::new(0x10000);
        let driver = DriverQueue::new(0x1000, 4);
        let queue = Queue::new(driver.layout(), 4, suppression).expect("a good layout");
        (ram, driver, queue)
    }

    #[test]
    fn layouts_that_break_the_rules_are_refused() {
        let good = DriverQueue::new(0x1000, 4).layout();
        assert!(Queue::new(good, 4, Suppression::Flags).is_ok());
        for size in [0, 3, 8, 0x1_0004] {
            let layout = QueueLayout { size, ..good };
            let error = Queue::new(layout, 4, Suppression::Flags).err();
            assert_eq!(error, Some(QueueError::Size { size }));
        }
        for layout in [
            QueueLayout {
                descriptors: Gpa(8),
                ..good
            },
            QueueLayout {
                available: Gpa(1),
                ..good
            },
            QueueLayout {
                used: Gpa(2),
                ..good
            },
            QueueLayout {
                used: Gpa(u64::MAX - 3),
                ..good
            },
            QueueLayout {
                descriptors: Gpa(u64::MAX - 15),
                ..good
            },
        ] {
            let error = Queue::new(layout, 4, Suppression::Flags).err();
            assert!(matches!(error, Some(QueueError::Address { .. })));
        }
    }

    #[test]
    fn buffers_are_taken_in_order_and_given_back_across_wraps() {
        let (ram, mut driver, mut queue) = queue(Suppression::Flags);
        let mut chain = Chain::default();
        for round in 0..70_000_u32 {
            assert_eq!(queue.pop(&ram, &mut chain), Ok(false));
            let head = driver.offer(&ram, &[(0x8000, 10, 0), (0x9000, 20, DESCRIPTOR_WRITE)]);
            assert_eq!(queue.pop(&ram, &mut chain), Ok(true));
            assert_eq!(chain.head(), head);
            assert_eq!((chain.readable_left(), chain.writable_left()), (10, 20));
            assert_eq!(chain.write(&ram, b"xyz"), Ok(3));
            queue.push(&ram, &chain).expect("inside");
            assert_eq!(driver.take(&ram), None, "not yet published");
            assert_eq!(queue.publish(&ram), Ok(true));
            assert_eq!(driver.take(&ram), Some((head, 3)), "round {round}");
        }
    }

    #[test]
    fn a_buffer_put_back_comes_again() {
        let (ram, mut driver, mut queue) = queue(Suppression::Flags);
        let head = driver.offer(&ram, &[(0x8000, 1, 0)]);
        let mut chain = Chain::default();
        assert_eq!(queue.pop(&ram, &mut chain), Ok(true));
        queue.put_back();
        assert_eq!(queue.pop(&ram, &mut chain), Ok(true));
        assert_eq!(chain.head(), head);
        assert_eq!(queue.pop(&ram, &mut chain), Ok(false));
    }

    #[test]
    fn broken_chains_are_errors() {
        type Break = fn(&mut DriverQueue, &SparseMemory);
        let cases: [(Break, QueueError); 6] = [
            (
                |driver, ram| driver.set_available_index(ram, 5),
                QueueError::AvailableIndex { index: 5, next: 0 },
            ),
            (
                |driver, ram| driver.set_descriptor(ram, 0, (0, 1, DESCRIPTOR_NEXT), 4),
                QueueError::DescriptorIndex { index: 4 },
            ),
            (
                |driver, ram| driver.set_descriptor(ram, 0, (0, 1, DESCRIPTOR_NEXT), 0),
                QueueError::Loop { head: 0 },
            ),
            (
                |driver, ram| driver.set_descriptor(ram, 0, (0, 16, DESCRIPTOR_INDIRECT), 0),
                QueueError::Indirect { head: 0 },
            ),
            (
                |driver, ram| {
                    let first = (0, 1, DESCRIPTOR_NEXT | DESCRIPTOR_WRITE);
                    driver.set_descriptor(ram, 0, first, 1);
                    driver.set_descriptor(ram, 1, (0, 1, 0), 0);
                },
                QueueError::Order { head: 0 },
            ),
            (
                |driver, ram| driver.set_available_entry(ram, 0, 0xffff),
                QueueError::DescriptorIndex { index: 0xffff },
            ),
        ];
        for (break_it, expected) in cases {
            let (ram, mut driver, mut queue) = queue(Suppression::Flags);
            driver.offer(&ram, &[(0x8000, 1, 0)]);
            break_it(&mut driver, &ram);
            let result = queue.pop(&ram, &mut Chain::default());
            assert_eq!(result, Err(expected));
        }
    }

    #[test]
    fn rings_outside_memory_are_errors() {
        let ram = SparseMemory::new(0x1000);
        let layout = DriverQueue::new(0x10_0000, 4).layout();
        let mut queue = Queue::new(layout, 4, Suppression::Flags).expect("a good layout");
        let mut chain = Chain::default();
        assert!(queue.pop(&ram, &mut chain).is_err());
        assert!(queue.push(&ram, &chain).is_err());
        assert!(queue.set_kicks(&ram, Kicks::Unwanted).is_err());
    }

    #[test]
    fn flags_suppress_interrupts_and_kicks() {
        let (ram, mut driver, mut queue) = queue(Suppression::Flags);
        let mut chain = Chain::default();
        driver.set_available_flags(&ram, AVAILABLE_NO_INTERRUPT);
        driver.offer(&ram, &[(0x8000, 1, 0)]);
        assert_eq!(queue.pop(&ram, &mut chain), Ok(true));
        queue.push(&ram, &chain).expect("inside");
        assert_eq!(queue.publish(&ram), Ok(false));
        assert!(driver.wants_kick(&ram, Suppression::Flags));
        queue.set_kicks(&ram, Kicks::Unwanted).expect("inside");
        assert!(!driver.wants_kick(&ram, Suppression::Flags));
        queue.set_kicks(&ram, Kicks::Wanted).expect("inside");
        assert!(driver.wants_kick(&ram, Suppression::Flags));
    }

    #[test]
    fn event_indices_ask_for_an_interrupt_once_passed() {
        let (ram, mut driver, mut queue) = queue(Suppression::EventIndex);
        let mut chain = Chain::default();
        driver.set_used_event(&ram, 1);
        for expected in [false, true, false] {
            driver.offer(&ram, &[(0x8000, 1, 0)]);
            assert_eq!(queue.pop(&ram, &mut chain), Ok(true));
            queue.push(&ram, &chain).expect("inside");
            assert_eq!(queue.publish(&ram), Ok(expected));
            assert!(driver.take(&ram).is_some());
        }
        assert_eq!(queue.publish(&ram), Ok(false), "nothing new");
    }

    #[test]
    fn event_indices_ask_for_a_kick_at_the_next_buffer() {
        let (ram, mut driver, mut queue) = queue(Suppression::EventIndex);
        let mut chain = Chain::default();
        driver.offer(&ram, &[(0x8000, 1, 0)]);
        assert!(driver.wants_kick(&ram, Suppression::EventIndex));
        assert_eq!(queue.pop(&ram, &mut chain), Ok(true));
        driver.offer(&ram, &[(0x8000, 1, 0)]);
        assert!(!driver.wants_kick(&ram, Suppression::EventIndex));
        assert_eq!(queue.pop(&ram, &mut chain), Ok(true));
        queue.set_kicks(&ram, Kicks::Wanted).expect("inside");
        driver.offer(&ram, &[(0x8000, 1, 0)]);
        assert!(driver.wants_kick(&ram, Suppression::EventIndex));
    }
}
