//! Non-maskable interrupts, for processors that don't virtualise them.
//!
//! The guest may not take another until it has executed IRET, which is
//! intercepted meanwhile. The exit comes before the IRET; with another one
//! waiting, that instruction is single-stepped. So is one that stands in the
//! shadow of STI or MOV SS.
//!
//! ```text
//!   Open ── delivered ──> Masked ── IRET exits ──> Returning ── it is over ──> Open
//! ```

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
}

/// The NMIs of one vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct NmiState {
    waiting: u8,
    gate: Gate,
    /// The guest's own trap flag, while it is stepped.
    stepping: Option<u64>,
}

/// RFLAGS.TF.
const TRAP: u64 = 1 << 8;

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

    /// Decides about the next entry. `ready` says that the guest is in no
    /// shadow and that nothing else is about to be delivered.
    pub(super) fn enter(&mut self, ready: bool, rflags: &mut u64) -> NmiEntry {
        if self.waiting == 0 {
            return NmiEntry::Nothing;
        }
        match self.gate {
            Gate::Open if ready => {
                self.waiting -= 1;
                self.gate = Gate::Masked;
                NmiEntry::Deliver
            }
            Gate::Masked => NmiEntry::Nothing,
            Gate::Open | Gate::Returning { .. } => {
                self.stepping = Some(*rflags & TRAP);
                *rflags |= TRAP;
                NmiEntry::Step
            }
        }
    }

    /// Takes note of an exit at `rip`. Whether it only ended a step.
    pub(super) fn leave(&mut self, is_debug: bool, rip: u64, rflags: &mut u64) -> bool {
        let returned = match self.gate {
            Gate::Returning { rip: iret } => iret != rip || is_debug,
            _ => false,
        };
        if returned {
            self.gate = Gate::Open;
        }
        let Some(trap) = self.stepping.take() else {
            return false;
        };
        // An IRET that is over has loaded a trap flag of its own.
        if !returned {
            *rflags = *rflags & !TRAP | trap;
        }
        is_debug && trap == 0
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
        assert_eq!(nmi.enter(true, &mut 0), NmiEntry::Deliver);
        assert!(nmi.awaits_iret());
    }

    #[test]
    fn one_is_served_and_one_waits_for_its_end() {
        let mut nmi = NmiState::default();
        nmi.request(2);
        nmi.request(1);
        deliver(&mut nmi);
        nmi.request(1);
        assert_eq!(nmi.enter(true, &mut 0), NmiEntry::Nothing);
        nmi.returns(0x1000);
        let mut flags = 0;
        assert_eq!(nmi.enter(true, &mut flags), NmiEntry::Step);
        assert_eq!(flags, TRAP);
        assert!(nmi.leave(true, 0x2000, &mut flags));
        deliver(&mut nmi);
        assert_eq!(nmi.waiting, 0);
    }

    #[test]
    fn the_gate_opens_when_the_iret_is_over() {
        let mut nmi = NmiState::default();
        nmi.request(1);
        deliver(&mut nmi);
        nmi.returns(0x1000);
        assert!(!nmi.leave(false, 0x1000, &mut 0), "it faulted, say");
        nmi.request(1);
        assert!(!nmi.is_deliverable());
        assert!(!nmi.leave(false, 0x1002, &mut 0));
        assert!(nmi.is_deliverable());
    }

    #[test]
    fn a_shadow_is_stepped_through() {
        let mut nmi = NmiState::default();
        nmi.request(1);
        let mut flags = 2;
        assert_eq!(nmi.enter(false, &mut flags), NmiEntry::Step);
        assert!(!nmi.leave(false, 0x1000, &mut flags), "another exit");
        assert_eq!(flags, 2);
        assert_eq!(nmi.enter(false, &mut flags), NmiEntry::Step);
        assert!(nmi.leave(true, 0x1001, &mut flags));
        assert_eq!(flags, 2, "the trap flag was not the guest's");
        assert_eq!(nmi.enter(true, &mut flags), NmiEntry::Deliver);
    }

    #[test]
    fn the_guests_own_steps_stay_its_own() {
        let mut nmi = NmiState::default();
        nmi.request(1);
        let mut flags = TRAP;
        assert_eq!(nmi.enter(false, &mut flags), NmiEntry::Step);
        assert!(
            !nmi.leave(true, 0x1000, &mut flags),
            "it wants the exception"
        );
    }
}
