//! How anyone sends a vCPU an interrupt.
//!
//! Senders set bits; the vCPU's core takes them before it enters the guest.
//! `armed` says whether the core sleeps or runs the guest and so would not
//! look by itself: the sender that takes the arm must kick the core. One kick
//! per sleep is enough, however many senders there are.
//!
//! ```text
//!   sender                          vCPU's core
//!   set request bit                 armed = true
//!   armed.swap(false)? -> kick      any request? -> armed = false, don't enter
//!                                   enter the guest or sleep
//! ```
//!
//! Both sides write one word and read the other, sequentially consistent, so
//! at least one sees the other's write: no request is left behind.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// A request that is no plain interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Reset and wait for start-up.
    Init,
    /// Start at this real-mode page, if waiting for it.
    StartUp(u8),
    /// Wake from HLT though no interrupt came.
    Unhalt,
}

const INIT: u32 = 1 << 8;
const STARTUP: u32 = 1 << 9;
const UNHALT: u32 = 1 << 10;
const STARTUP_PAGE: u32 = 0xff;

/// Whether the sender must kick the vCPU's core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Kick {
    /// The core sleeps or runs the guest.
    Needed,
    /// The core will look by itself.
    NotNeeded,
}

/// What is requested of one vCPU.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct PostedInterrupts {
    requests: [AtomicU64; 4],
    signals: AtomicU32,
    armed: AtomicBool,
}

impl PostedInterrupts {
    /// Nothing requested.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            requests: [const { AtomicU64::new(0) }; 4],
            signals: AtomicU32::new(0),
            armed: AtomicBool::new(false),
        }
    }

    /// Requests the interrupt `vector`.
    pub fn post(&self, vector: u8) -> Kick {
        let bit = 1_u64 << (vector & 63);
        // SeqCst: ordered before the look at `armed` (module head).
        self.requests[usize::from(vector >> 6)].fetch_or(bit, Ordering::SeqCst);
        self.take_arm()
    }

    /// Requests something else.
    pub fn signal(&self, signal: Signal) -> Kick {
        // SeqCst: as in `post`.
        match signal {
            Signal::Init => self.signals.fetch_or(INIT, Ordering::SeqCst),
            Signal::Unhalt => self.signals.fetch_or(UNHALT, Ordering::SeqCst),
            Signal::StartUp(page) => {
                let with_page = |old| Some(old & !STARTUP_PAGE | STARTUP | u32::from(page));
                self.signals
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, with_page)
                    .unwrap_or_default()
            }
        };
        self.take_arm()
    }

    /// Makes the core look at everything, though nothing is requested here.
    pub fn nudge(&self) -> Kick {
        self.take_arm()
    }

    fn take_arm(&self) -> Kick {
        // The plain load keeps the line shared while the core is awake.
        // SeqCst on both: see the module's head.
        if self.armed.load(Ordering::SeqCst) && self.armed.swap(false, Ordering::SeqCst) {
            Kick::Needed
        } else {
            Kick::NotNeeded
        }
    }

    /// Announces that the core is about to enter the guest or sleep. If this
    /// returns false there is something to do first.
    #[must_use]
    pub fn arm(&self) -> bool {
        self.armed.store(true, Ordering::SeqCst);
        if self.is_idle() {
            return true;
        }
        self.disarm();
        false
    }

    /// Announces that the core looks for itself again.
    pub fn disarm(&self) {
        // Relaxed: a sender that still sees the arm only kicks in vain.
        self.armed.store(false, Ordering::Relaxed);
    }

    /// Whether nothing is requested.
    fn is_idle(&self) -> bool {
        self.signals.load(Ordering::SeqCst) == 0
            && self
                .requests
                .iter()
                .all(|word| word.load(Ordering::SeqCst) == 0)
    }

    /// Takes all requested vectors, as a bitmap.
    pub fn take_vectors(&self) -> [u64; 4] {
        // Acquire: what the sender wrote before is visible to the guest.
        self.requests
            .each_ref()
            .map(|word| match word.load(Ordering::Relaxed) {
                0 => 0,
                _ => word.swap(0, Ordering::Acquire),
            })
    }

    /// Takes the other requests, in the order in which they take effect.
    pub fn take_signals(&self) -> impl Iterator<Item = Signal> {
        let signals = match self.signals.load(Ordering::Relaxed) {
            0 => 0,
            _ => self.signals.swap(0, Ordering::Acquire),
        };
        let [page, ..] = signals.to_le_bytes();
        [
            (signals & INIT != 0).then_some(Signal::Init),
            (signals & STARTUP != 0).then_some(Signal::StartUp(page)),
            (signals & UNHALT != 0).then_some(Signal::Unhalt),
        ]
        .into_iter()
        .flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_sleep_is_ended_by_one_kick() {
        let posted = PostedInterrupts::new();
        assert_eq!(posted.post(3), Kick::NotNeeded);
        assert!(!posted.arm(), "a request is waiting");
        assert_eq!(posted.take_vectors(), [8, 0, 0, 0]);
        assert!(posted.arm());
        assert_eq!(posted.post(200), Kick::Needed);
        assert_eq!(posted.post(201), Kick::NotNeeded);
        assert_eq!(posted.take_vectors(), [0, 0, 0, 3 << 8]);
    }

    #[test]
    fn init_comes_before_start_up_and_the_last_page_wins() {
        let posted = PostedInterrupts::new();
        let _ = posted.signal(Signal::StartUp(8));
        let _ = posted.signal(Signal::StartUp(9));
        let _ = posted.signal(Signal::Init);
        let signals: Vec<_> = posted.take_signals().collect();
        assert_eq!(signals, [Signal::Init, Signal::StartUp(9)]);
        assert_eq!(posted.take_signals().count(), 0);
    }
}
