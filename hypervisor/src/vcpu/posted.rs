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
//!
//! A vCPU that moves is not armed until its new core has it. That core first
//! publishes where the vCPU is, then arms, then looks at the requests; so who
//! takes the new arm kicks the new core, and what was requested before is
//! found there. Who has taken the old arm may kick either core in vain.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vmm_shared::addr::{Location, NodeId};
use vmm_shared::shm::SharedMem;

use super::lapic::LogicalAddress;

/// A request that is no plain interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Reset and wait for start-up.
    Init,
    /// Start at this real-mode page, if waiting for it.
    StartUp(u8),
    /// Wake from HLT though no interrupt came.
    Unhalt,
    /// So many non-maskable interrupts; more than two make no difference.
    Nmi(u8),
    /// Look at the order for this vCPU.
    Order,
}

const SIGNALS: usize = 32;
const ARMED: usize = 36;
const PLACE: usize = 40;
const LOGICAL: usize = 44;
const LEN: usize = 64;

const INIT: u32 = 1 << 8;
const STARTUP: u32 = 1 << 9;
const UNHALT: u32 = 1 << 10;
/// Non-maskable interrupts: none, one, or two of them.
const NMI_SHIFT: u32 = 11;
const NMI_MASK: u32 = 3 << NMI_SHIFT;
const ORDER: u32 = 1 << 13;
const STARTUP_PAGE: u32 = 0xff;
/// Bits that somebody sets.
const KNOWN: u32 = INIT | STARTUP | UNHALT | NMI_MASK | ORDER | STARTUP_PAGE;

/// Whether the sender must kick the vCPU's core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Kick {
    /// The core sleeps or runs the guest.
    Needed,
    /// The core will look by itself.
    NotNeeded,
}

/// What is requested of one vCPU: the first line of its home in the control
/// region.
///
/// ```text
///   0    256 request bits
///   32   signals
///   36   armed
///   40   where it runs: node in the high half, core in the low half
///   44   its APIC's logical address: model in byte 1, address in byte 0
/// ```
#[derive(Clone, Copy, Debug)]
pub struct PostedInterrupts {
    home: SharedMem,
}

impl PostedInterrupts {
    /// The requests in a vCPU's home; `None` if it is too small.
    #[must_use]
    pub fn new(home: SharedMem) -> Option<Self> {
        (home.len() >= LEN).then_some(Self { home })
    }

    fn requests(&self, word: usize) -> &AtomicU64 {
        self.home
            .atomic_u64(word * 8)
            .expect("`new` has checked the size")
    }

    fn signals(&self) -> &AtomicU32 {
        self.home
            .atomic_u32(SIGNALS)
            .expect("`new` has checked the size")
    }

    fn armed(&self) -> &AtomicU32 {
        self.home
            .atomic_u32(ARMED)
            .expect("`new` has checked the size")
    }

    /// Where the vCPU runs.
    #[must_use]
    pub fn location(&self) -> Location {
        let [c0, c1, n0, n1] = self.place().load(Ordering::Relaxed).to_le_bytes();
        Location {
            node: NodeId(u16::from_le_bytes([n0, n1])),
            core: u16::from_le_bytes([c0, c1]),
        }
    }

    /// Publishes where the vCPU runs.
    pub fn set_location(&self, location: Location) {
        let place = u32::from(location.node.0) << 16 | u32::from(location.core);
        self.place().store(place, Ordering::Relaxed);
    }

    fn place(&self) -> &AtomicU32 {
        self.home
            .atomic_u32(PLACE)
            .expect("`new` has checked the size")
    }

    /// The logical address of the vCPU's APIC.
    #[must_use]
    pub fn logical_address(&self) -> LogicalAddress {
        let [address, model, ..] = self.logical().load(Ordering::Relaxed).to_le_bytes();
        match model {
            0 => LogicalAddress::FromId,
            1 => LogicalAddress::Flat(address),
            2 => LogicalAddress::Cluster(address),
            _ => LogicalAddress::Off,
        }
    }

    /// Publishes the logical address of the vCPU's APIC.
    pub fn set_logical_address(&self, address: LogicalAddress) {
        let bytes = match address {
            LogicalAddress::FromId => [0, 0],
            LogicalAddress::Flat(address) => [address, 1],
            LogicalAddress::Cluster(address) => [address, 2],
            LogicalAddress::Off => [0, 3],
        };
        // Relaxed: who changes it tells the others itself.
        self.logical()
            .store(u16::from_le_bytes(bytes).into(), Ordering::Relaxed);
    }

    fn logical(&self) -> &AtomicU32 {
        self.home
            .atomic_u32(LOGICAL)
            .expect("`new` has checked the size")
    }

    /// Requests the interrupt `vector`.
    pub fn post(&self, vector: u8) -> Kick {
        let bit = 1_u64 << (vector & 63);
        // SeqCst: ordered before the look at `armed` (module head).
        self.requests(usize::from(vector >> 6))
            .fetch_or(bit, Ordering::SeqCst);
        self.take_arm()
    }

    /// Requests something else.
    pub fn signal(&self, signal: Signal) -> Kick {
        // SeqCst: as in `post`.
        match signal {
            Signal::Init => self.signals().fetch_or(INIT, Ordering::SeqCst),
            Signal::Unhalt => self.signals().fetch_or(UNHALT, Ordering::SeqCst),
            Signal::Order => self.signals().fetch_or(ORDER, Ordering::SeqCst),
            Signal::Nmi(count) => {
                let with_count = |old: u32| {
                    let waiting = (old & NMI_MASK) >> NMI_SHIFT;
                    let all = (waiting + u32::from(count)).min(2);
                    Some(old & !NMI_MASK | all << NMI_SHIFT)
                };
                self.signals()
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, with_count)
                    .unwrap_or_default()
            }
            Signal::StartUp(page) => {
                let with_page = |old| Some(old & !STARTUP_PAGE | STARTUP | u32::from(page));
                self.signals()
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
        if self.armed().load(Ordering::SeqCst) != 0 && self.armed().swap(0, Ordering::SeqCst) != 0 {
            Kick::Needed
        } else {
            Kick::NotNeeded
        }
    }

    /// Announces that the core is about to enter the guest or sleep. If this
    /// returns false there is something to do first.
    #[must_use]
    pub fn arm(&self) -> bool {
        self.armed().store(1, Ordering::SeqCst);
        if self.is_idle() {
            return true;
        }
        self.disarm();
        false
    }

    /// Announces that the core looks for itself again.
    pub fn disarm(&self) {
        // Relaxed: a sender that still sees the arm only kicks in vain.
        self.armed().store(0, Ordering::Relaxed);
    }

    /// Whether the core is armed: nobody has kicked it since it was.
    #[must_use]
    pub fn is_armed(&self) -> bool {
        // Relaxed: who takes the arm interrupts the core.
        self.armed().load(Ordering::Relaxed) != 0
    }

    /// Forgets all requests, those for a vCPU that was here before.
    pub fn clear(&self) {
        let _ = self.take_vectors();
        let _ = self.take_signals();
    }

    /// Whether nothing is requested.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.signals().load(Ordering::SeqCst) == 0
            && (0..4).all(|word| self.requests(word).load(Ordering::SeqCst) == 0)
    }

    /// Takes all requested vectors, as a bitmap.
    pub fn take_vectors(&self) -> [u64; 4] {
        // Acquire: what the sender wrote before is visible to the guest.
        core::array::from_fn(|index| match self.requests(index).load(Ordering::Relaxed) {
            0 => 0,
            _ => self.requests(index).swap(0, Ordering::Acquire),
        })
    }

    /// Takes the other requests.
    #[must_use]
    pub fn take_signals(&self) -> Signals {
        Signals(match self.signals().load(Ordering::Relaxed) {
            0 => 0,
            // Acquire: as in `take_vectors`.
            _ => self.signals().swap(0, Ordering::Acquire),
        })
    }
}

/// Signals that were taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signals(u32);

impl Signals {
    /// Whether somebody has set bits that mean nothing.
    #[must_use]
    pub const fn has_garbage(self) -> bool {
        self.0 & !KNOWN != 0
    }

    /// The signals, in the order in which they take effect.
    pub fn iter(self) -> impl Iterator<Item = Signal> {
        let Self(signals) = self;
        let [page, ..] = signals.to_le_bytes();
        let [nmis, ..] = ((signals & NMI_MASK) >> NMI_SHIFT).to_le_bytes();
        [
            (signals & INIT != 0).then_some(Signal::Init),
            (signals & STARTUP != 0).then_some(Signal::StartUp(page)),
            (signals & UNHALT != 0).then_some(Signal::Unhalt),
            (nmis != 0).then_some(Signal::Nmi(nmis)),
            (signals & ORDER != 0).then_some(Signal::Order),
        ]
        .into_iter()
        .flatten()
    }
}

#[cfg(test)]
#[expect(unsafe_code, reason = "a leaked buffer as a vCPU's home")]
mod tests {
    use super::*;
    use core::ptr::NonNull;

    fn posted() -> PostedInterrupts {
        let home = Box::leak(Box::new([0_u64; 8]));
        // SAFETY: leaked, aligned, and reached through the window only.
        let home = unsafe { SharedMem::new(NonNull::from(home).cast(), 64) };
        PostedInterrupts::new(home).expect("large enough")
    }

    #[test]
    fn one_sleep_is_ended_by_one_kick() {
        let posted = posted();
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
        let posted = posted();
        let _ = posted.signal(Signal::StartUp(8));
        let _ = posted.signal(Signal::StartUp(9));
        let _ = posted.signal(Signal::Init);
        let signals: Vec<_> = posted.take_signals().iter().collect();
        assert_eq!(signals, [Signal::Init, Signal::StartUp(9)]);
        assert_eq!(posted.take_signals().iter().count(), 0);
    }

    #[test]
    fn bits_that_mean_nothing_are_told_apart() {
        let posted = posted();
        let _ = posted.signal(Signal::StartUp(8));
        assert!(!posted.take_signals().has_garbage());
        posted.signals().store(1 << 14 | UNHALT, Ordering::Relaxed);
        let signals = posted.take_signals();
        assert!(signals.has_garbage());
        assert_eq!(signals.iter().collect::<Vec<_>>(), [Signal::Unhalt]);
    }

    #[test]
    fn two_nmis_are_as_good_as_more() {
        let posted = posted();
        let _ = posted.signal(Signal::Nmi(1));
        assert_eq!(
            posted.take_signals().iter().collect::<Vec<_>>(),
            [Signal::Nmi(1)]
        );
        for _ in 0..3 {
            let _ = posted.signal(Signal::Nmi(1));
        }
        let _ = posted.signal(Signal::StartUp(8));
        let expected = [Signal::StartUp(8), Signal::Nmi(2)];
        assert_eq!(posted.take_signals().iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn logical_addresses_are_found_as_they_were_published() {
        let posted = posted();
        assert_eq!(posted.logical_address(), LogicalAddress::FromId);
        for address in [
            LogicalAddress::Flat(0x81),
            LogicalAddress::Cluster(0x12),
            LogicalAddress::Off,
            LogicalAddress::FromId,
        ] {
            posted.set_logical_address(address);
            assert_eq!(posted.logical_address(), address);
        }
    }
}
