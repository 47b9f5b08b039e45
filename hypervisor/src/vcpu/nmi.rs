//! Non-maskable interrupts, for processors that don't virtualise them.
//!
//! The guest may not take another until it has executed IRET, which is
//! intercepted meanwhile. The exit comes before the IRET; with another one
//! waiting, that instruction is single-stepped. So is one that stands in the
//! shadow of STI or MOV SS. What else is about to be delivered goes first.
//!
//! ```text
//!   Open ── delivered ──> Masked ── IRET exits ──> Returning ── it is over ──> Open
//! ```

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What an NMI has to wait for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Gate {
    /// Nothing.
    #[default]
    Open,
    /// The end of the one before.
    Masked,
    /// The IRET at this address, which is about to be executed.
    Returning { rip: u64 },
}

/// What the next entry has to do about NMIs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NmiEntry {
    /// Nothing.
    Nothing,
    /// Deliver one.
    Deliver,
    /// Execute one instruction and come back.
    Step,
    /// Come back as soon as what is queued has been delivered.
    Return,
}

/// What the guest could take at the next entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Readiness {
    /// An NMI.
    Ready,
    /// The next instruction must be executed first.
    InShadow,
    /// Another event is queued.
    Queued,
}

/// The NMIs of one vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct NmiState {
    waiting: u8,
    gate: Gate,
}

/// As they are kept in a vCPU's image.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct NmiImage {
    waiting: u32,
    gate: u32,
    rip: u64,
}

impl NmiState {
    /// Asks for NMIs. One can wait while another is served, two otherwise.
    pub(super) fn request(&mut self, count: u8) {
        let most = match self.gate {
            Gate::Open => 2,
            _ => 1,
        };
        self.waiting = self.waiting.saturating_add(count).min(most);
    }

    /// Whether the next entry could deliver one.
    pub(super) fn is_deliverable(&self) -> bool {
        self.waiting > 0 && self.gate == Gate::Open
    }

    /// Whether every exit matters to it.
    pub(super) fn is_busy(&self) -> bool {
        self.waiting > 0 || self.gate != Gate::Open
    }

    /// Whether an IRET must exit.
    pub(super) fn awaits_iret(&self) -> bool {
        self.gate == Gate::Masked
    }

    /// Decides about the next entry.
    pub(super) fn enter(&mut self, readiness: Readiness) -> NmiEntry {
        if self.waiting == 0 {
            return NmiEntry::Nothing;
        }
        match (self.gate, readiness) {
            (Gate::Masked, _) => NmiEntry::Nothing,
            (_, Readiness::Queued) => NmiEntry::Return,
            (Gate::Open, Readiness::Ready) => {
                self.waiting -= 1;
                self.gate = Gate::Masked;
                NmiEntry::Deliver
            }
            (Gate::Open | Gate::Returning { .. }, _) => NmiEntry::Step,
        }
    }

    /// Takes note of an exit at `rip`. Whether an IRET has been completed.
    pub(super) fn leave(&mut self, is_debug: bool, rip: u64) -> bool {
        let returned = match self.gate {
            Gate::Returning { rip: iret } => iret != rip || is_debug,
            _ => false,
        };
        if returned {
            self.gate = Gate::Open;
        }
        returned
    }

    /// All of it, for a vCPU that moves.
    pub(super) fn image(&self) -> NmiImage {
        let (gate, rip) = match self.gate {
            Gate::Open => (0, 0),
            Gate::Masked => (1, 0),
            Gate::Returning { rip } => (2, rip),
        };
        NmiImage {
            waiting: self.waiting.into(),
            gate,
            rip,
        }
    }

    /// That of an image.
    pub(super) fn from_image(image: &NmiImage) -> Self {
        Self {
            waiting: u8::try_from(image.waiting).unwrap_or(2).min(2),
            gate: match image.gate {
                0 => Gate::Open,
                1 => Gate::Masked,
                _ => Gate::Returning { rip: image.rip },
            },
        }
    }

    /// An IRET is about to be executed.
    pub(super) fn returns(&mut self, rip: u64) {
        self.gate = Gate::Returning { rip };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deliver(nmi: &mut NmiState) {
        assert_eq!(nmi.enter(Readiness::Ready), NmiEntry::Deliver);
        assert!(nmi.awaits_iret());
    }

    #[test]
    fn one_is_served_and_one_waits_for_its_end() {
        let mut nmi = NmiState::default();
        nmi.request(2);
        nmi.request(1);
        deliver(&mut nmi);
        nmi.request(1);
        assert_eq!(nmi.enter(Readiness::Ready), NmiEntry::Nothing);
        nmi.returns(0x1000);
        assert_eq!(nmi.enter(Readiness::Ready), NmiEntry::Step);
        assert!(nmi.leave(true, 0x2000));
        deliver(&mut nmi);
        assert_eq!(nmi.waiting, 0);
    }

    #[test]
    fn an_image_holds_all_of_it() {
        let mut nmi = NmiState::default();
        assert_eq!(NmiState::from_image(&nmi.image()), nmi);
        nmi.request(2);
        deliver(&mut nmi);
        assert_eq!(NmiState::from_image(&nmi.image()), nmi);
        nmi.returns(0x1000);
        assert_eq!(NmiState::from_image(&nmi.image()), nmi);
    }

    #[test]
    fn the_gate_opens_when_the_iret_is_over() {
        let mut nmi = NmiState::default();
        nmi.request(1);
        deliver(&mut nmi);
        nmi.returns(0x1000);
        assert!(!nmi.leave(false, 0x1000), "it faulted, say");
        nmi.request(1);
        assert!(!nmi.is_deliverable());
        assert!(nmi.leave(false, 0x1002));
        assert!(nmi.is_deliverable());
    }

    #[test]
    fn a_shadow_is_stepped_through() {
        let mut nmi = NmiState::default();
        nmi.request(1);
        assert_eq!(nmi.enter(Readiness::InShadow), NmiEntry::Step);
        assert!(!nmi.leave(true, 0x1001));
        deliver(&mut nmi);
    }

    #[test]
    fn what_is_queued_goes_first() {
        let mut nmi = NmiState::default();
        nmi.request(1);
        assert_eq!(nmi.enter(Readiness::Queued), NmiEntry::Return);
        assert!(!nmi.leave(false, 0x1000));
        deliver(&mut nmi);
    }
}
