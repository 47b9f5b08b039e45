//! Device accesses of vCPUs on nodes that don't own the devices.
//!
//! Each vCPU has one slot in its home: it executes one instruction at a time.
//!
//! ```text
//!   128  state: idle, asked, answered   asker and owner by turns
//!   132  what: space, direction, width
//!   136  address
//!   144  value, there and back
//!   152  what follows from it
//! ```
//!
//! The asker sets its bit in the VM record and rings the owner; the owner
//! takes all bits at once. Garbage in a slot makes an access that nothing
//! answers. The VM can't go on without the owner: the asker waits until it has
//! an answer or the VM is held.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vmm_shared::shm::SharedMem;

use crate::devices::Width;
use crate::vcpu::exit::{Direction, StopReason};

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
            _ => Request::Unknown,
        };
        Some((self.value().load(Ordering::Relaxed), request))
    }

    /// The access that is asked for, if one is and it makes sense.
    #[must_use]
    pub fn question(&self) -> Option<Access> {
        if self.state().load(Ordering::Acquire) != ASKED {
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

    /// Answers. The asker must be woken.
    pub fn answer(&self, value: u64, request: Request) {
        let request = match request {
            Request::None => 0,
            Request::Unknown => 1,
            Request::Stop(StopReason::Reset) => 3,
            Request::Stop(_) => 2,
        };
        self.value().store(value, Ordering::Relaxed);
        self.request().store(request, Ordering::Relaxed);
        self.state().store(ANSWERED, Ordering::Release);
    }
}
