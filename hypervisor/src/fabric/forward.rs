//! Device accesses of vCPUs on nodes that don't own the devices.
//!
//! Each vCPU has one slot in its home: it executes one instruction at a time.
//!
//! ```text
//!   128  state: idle, asked, asleep, answered   asker and owner by turns
//!   132  what: space, direction, width
//!   136  address
//!   144  value, there and back
//!   152  what follows from it
//! ```
//!
//! The asker sets its bit in the VM record and rings the owner; the owner
//! takes all bits at once, and wakes an asker that has gone to sleep. Garbage
//! in a slot makes an access that nothing answers. The VM can't go on without
//! the owner: the asker waits until it has an answer or the VM is held.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vmm_shared::shm::SharedMem;

use crate::devices::Width;
use crate::vcpu::exit::{Direction, StopReason};
use crate::vcpu::posted::Kick;

/// An access to a device register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Ports or memory.
    pub space: Space,
    /// Direction.
    pub direction: Direction,
    /// Bytes.
    pub width: Width,
    /// Port or guest physical address.
    pub address: u64,
    /// What is written; 0 for a read.
    pub value: u64,
}

/// An address space of device registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// I/O ports.
    Ports,
    /// Guest physical memory.
    Memory,
}

/// What an access leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Nothing more.
    None,
    /// Nothing answers there.
    Unknown,
    /// The guest wants this.
    Stop(StopReason),
}

const SLOT: usize = 128;
const SLOT_LEN: usize = 64;
const IDLE: u32 = 0;
const ASKED: u32 = 1;
const ANSWERED: u32 = 2;
/// Asked, and the asker wants to be woken.
const ASLEEP: u32 = 3;

const OUT: u32 = 1 << 0;
const MEMORY: u32 = 1 << 1;
const WIDTH_SHIFT: u32 = 8;

/// A vCPU's slot.
#[derive(Clone, Copy, Debug)]
pub struct Slot(SharedMem);

impl Slot {
    /// The slot in a vCPU's home; `None` if it is too small.
    #[must_use]
    pub fn new(home: SharedMem) -> Option<Self> {
        home.window(SLOT, SLOT_LEN).map(Self)
    }

    fn state(&self) -> &AtomicU32 {
        self.0.atomic_u32(0).expect("inside the slot")
    }

    fn what(&self) -> &AtomicU32 {
        self.0.atomic_u32(4).expect("inside the slot")
    }

    fn address(&self) -> &AtomicU64 {
        self.0.atomic_u64(8).expect("inside the slot")
    }

    fn value(&self) -> &AtomicU64 {
        self.0.atomic_u64(16).expect("inside the slot")
    }

    fn request(&self) -> &AtomicU32 {
        self.0.atomic_u32(24).expect("inside the slot")
    }

    /// Asks for an access. The owner must be told.
    pub fn ask(&self, access: &Access) {
        let out = if access.direction == Direction::Out {
            OUT
        } else {
            0
        };
        let memory = if access.space == Space::Memory {
            MEMORY
        } else {
            0
        };
        let width = u32::try_from(access.width.bytes()).expect("at most 8");
        self.what()
            .store(out | memory | width << WIDTH_SHIFT, Ordering::Relaxed);
        self.address().store(access.address, Ordering::Relaxed);
        self.value().store(access.value, Ordering::Relaxed);
        // Release: the question is visible once the state is.
        self.state().store(ASKED, Ordering::Release);
    }

    /// The answer, once it is there: value and what follows.
    #[must_use]
    pub fn take_answer(&self) -> Option<(u64, Request)> {
        // Acquire: pairs with the Release in `answer`.
        if self.state().load(Ordering::Acquire) != ANSWERED {
            return None;
        }
        self.state().store(IDLE, Ordering::Relaxed);
        let request = match self.request().load(Ordering::Relaxed) {
            0 => Request::None,
            2 => Request::Stop(StopReason::PowerOff),
            3 => Request::Stop(StopReason::Reset),
            4 => Request::Stop(StopReason::Exit {
                value: u32::try_from(self.value().load(Ordering::Relaxed)).unwrap_or(u32::MAX),
            }),
            _ => Request::Unknown,
        };
        Some((self.value().load(Ordering::Relaxed), request))
    }

    /// Announces that the asker is about to sleep; false if the answer has
    /// come.
    #[must_use]
    pub fn may_sleep(&self) -> bool {
        // Relaxed: orders nothing; the answer is taken by `take_answer`.
        let announced =
            self.state()
                .compare_exchange(ASKED, ASLEEP, Ordering::Relaxed, Ordering::Relaxed);
        matches!(announced, Ok(_) | Err(ASLEEP))
    }

    /// The access that is asked for, if one is and it makes sense.
    #[must_use]
    pub fn question(&self) -> Option<Access> {
        if !matches!(self.state().load(Ordering::Acquire), ASKED | ASLEEP) {
            return None;
        }
        let what = self.what().load(Ordering::Relaxed);
        let width = usize::try_from(what >> WIDTH_SHIFT).ok()?;
        Some(Access {
            space: if what & MEMORY == 0 {
                Space::Ports
            } else {
                Space::Memory
            },
            direction: if what & OUT == 0 {
                Direction::In
            } else {
                Direction::Out
            },
            width: Width::from_bytes(width)?,
            address: self.address().load(Ordering::Relaxed),
            value: self.value().load(Ordering::Relaxed),
        })
    }

    /// Answers; whether the asker must be woken.
    pub fn answer(&self, value: u64, request: Request) -> Kick {
        let mut value = value;
        let request = match request {
            Request::None => 0,
            Request::Unknown => 1,
            Request::Stop(StopReason::Exit { value: exit }) => {
                value = exit.into();
                4
            }
            Request::Stop(StopReason::Reset) => 3,
            Request::Stop(_) => 2,
        };
        self.value().store(value, Ordering::Relaxed);
        self.request().store(request, Ordering::Relaxed);
        // Release: the answer is visible once the state is.
        match self.state().swap(ANSWERED, Ordering::Release) {
            ASLEEP => Kick::Needed,
            _ => Kick::NotNeeded,
        }
    }
}

#[cfg(test)]
#[expect(unsafe_code, reason = "a leaked buffer as a vCPU's home")]
mod tests {
    use super::*;
    use core::ptr::NonNull;

    fn slot() -> Slot {
        let home = Box::leak(Box::new([0_u64; 24]));
        // SAFETY: leaked, aligned, and reached through the window only.
        let home = unsafe { SharedMem::new(NonNull::from(home).cast(), 192) };
        Slot::new(home).expect("large enough")
    }

    const READ: Access = Access {
        space: Space::Memory,
        direction: Direction::In,
        width: Width::Dword,
        address: 0xfec0_0010,
        value: 0,
    };

    #[test]
    fn an_answer_comes_back_once() {
        let slot = slot();
        assert_eq!(slot.question(), None);
        slot.ask(&READ);
        assert_eq!(slot.question(), Some(READ));
        assert_eq!(slot.take_answer(), None);
        assert_eq!(slot.answer(7, Request::None), Kick::NotNeeded);
        assert_eq!(slot.question(), None);
        assert!(!slot.may_sleep(), "the answer is there");
        assert_eq!(slot.take_answer(), Some((7, Request::None)));
        assert_eq!(slot.take_answer(), None);
    }

    #[test]
    fn who_sleeps_is_woken_by_the_answer() {
        let slot = slot();
        slot.ask(&READ);
        assert!(slot.may_sleep());
        assert!(slot.may_sleep(), "woken for nothing");
        assert_eq!(slot.question(), Some(READ));
        let stop = Request::Stop(StopReason::Reset);
        assert_eq!(slot.answer(0, stop), Kick::Needed);
        assert_eq!(slot.take_answer(), Some((0, stop)));
    }

    #[test]
    fn a_slot_full_of_garbage_asks_for_nothing_that_exists() {
        let slot = slot();
        for state in [0, 2, 4, u32::MAX] {
            slot.state().store(state, Ordering::Relaxed);
            assert_eq!(slot.question(), None);
        }
        slot.state().store(ASKED, Ordering::Relaxed);
        slot.what().store(u32::MAX, Ordering::Relaxed);
        assert_eq!(slot.question(), None);
    }
}
