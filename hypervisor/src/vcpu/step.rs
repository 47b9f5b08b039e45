//! Single steps: the guest executes one instruction and exits.
//!
//! The trap flag that makes it do so is the guest's own, so an instruction that
//! stores the flags shows it: PUSHF right behind STI, which no guest is known
//! to have. Only IRETs and what stands in the shadow of STI or MOV SS are
//! stepped.

/// RFLAGS.TF.
const TRAP: u64 = 1 << 8;

/// The step of one vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Step {
    /// The guest's own trap flag, while it is stepped.
    own: Option<u64>,
}

impl Step {
    /// Makes the next entry execute one instruction.
    pub(super) fn begin(&mut self, rflags: &mut u64) {
        self.own = Some(*rflags & TRAP);
        *rflags |= TRAP;
    }

    /// Whether the guest is being stepped.
    pub(super) fn is_under_way(self) -> bool {
        self.own.is_some()
    }

    /// Ends it, as every exit does. Whether that is all the exit was for.
    /// `loaded` says that the instruction has loaded a trap flag of its own.
    pub(super) fn end(&mut self, is_debug: bool, loaded: bool, rflags: &mut u64) -> bool {
        let Some(own) = self.own.take() else {
            return false;
        };
        if !loaded {
            *rflags = *rflags & !TRAP | own;
        }
        is_debug && own == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trap_flag_is_taken_back() {
        let mut step = Step::default();
        let mut flags = 2;
        step.begin(&mut flags);
        assert!(step.is_under_way());
        assert_eq!(flags, 2 | TRAP);
        assert!(!step.end(false, false, &mut flags), "another exit");
        assert_eq!(flags, 2);
        step.begin(&mut flags);
        assert!(step.end(true, false, &mut flags));
        assert_eq!(flags, 2);
        assert!(!step.end(true, false, &mut flags), "no step at all");
    }

    #[test]
    fn the_guests_own_steps_stay_its_own() {
        let mut step = Step::default();
        let mut flags = TRAP;
        step.begin(&mut flags);
        assert!(!step.end(true, false, &mut flags), "it wants the exception");
        assert_eq!(flags, TRAP);
    }

    #[test]
    fn a_flag_that_was_loaded_stays() {
        let mut step = Step::default();
        let mut flags = 0;
        step.begin(&mut flags);
        let mut loaded = TRAP;
        assert!(step.end(true, true, &mut loaded));
        assert_eq!(loaded, TRAP);
    }
}
