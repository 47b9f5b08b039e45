//! What a core's guest was granted and has not used yet.
//!
//! A node that gave a unit up the moment it is asked could lose it before its
//! guest has executed the instruction that faulted, and two such nodes would
//! take it from each other for ever. So each core holds what it is granted
//! until its guest gets on, and revocations of that wait.
//!
//! One instruction may need several units: its own bytes, its operands, the
//! guest's page tables. All that was granted at one place is held together. Two
//! nodes that hold what the other needs next would wait in a circle, and a
//! guest may stop before it gets on; so a hold ends after a time, too, which must
//! be of different length on different nodes. Time passes as well while the
//! host runs something else: a guest that was granted something in vain is left
//! alone twice as long with the next grant.

use super::rights::Unit;

/// Units held at once; a guest that needs more loses the first of them. Two
/// for the instruction, two for each of two operands, and page tables.
const MOST: usize = 12;
/// Interruptions of the guest after which it has had its chance, though it
/// seems not to have moved: it may be in a loop of one instruction.
const INTERRUPTIONS: u16 = 3;

/// What a hold in vain counts, and how much of that doubles time and
/// interruptions: 128 times as long at the most.
const IN_VAIN: u8 = 4;
const MOST_VAIN: u8 = 7 * IN_VAIN;

/// Where a guest is: it has got on if this has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The address of the next instruction.
    pub rip: u64,
    /// What repeated instructions count down.
    pub rcx: u64,
}

/// What one core holds. Only for faults of its guest: who writes for the
/// guest can do so before anybody is answered.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hold {
    units: [Option<Unit>; MOST],
    place: Place,
    since: u64,
    interruptions: u16,
    /// The guest can't go on before it is granted one more.
    waits: bool,
    /// Holds in a row that the guest, at this place, has had in vain: each
    /// counts [`IN_VAIN`], or 1 if the guest did not have all it needs.
    vain: u8,
}

impl Hold {
    /// The guest asks for one more unit. Whatever ends the hold meanwhile, the
    /// guest could not have used it.
    pub fn asks(&mut self) {
        self.waits = true;
    }

    /// The guest at `place` has been granted this, at the time `now`.
    pub fn granted(&mut self, unit: Unit, place: Place, now: u64) {
        if self.is_empty() || self.place != place {
            let vain = match self.place == place {
                true => self.vain,
                false => 0,
            };
            *self = Self {
                place,
                since: now,
                vain,
                ..Self::default()
            };
        }
        self.waits = false;
        if self.units.contains(&Some(unit)) {
            return;
        }
        self.units.rotate_right(1);
        self.units[0] = Some(unit);
    }

    /// The guest has left the core for something that is neither the next
    /// fault of the same instruction nor its own doing: an interrupt.
    pub fn interrupted(&mut self, place: Place) {
        self.interruptions = self.interruptions.saturating_add(1);
        if self.place != place {
            self.end();
        } else if self.interruptions >= INTERRUPTIONS << self.patience() {
            self.give_up();
        }
    }

    /// How often time and interruptions are doubled.
    fn patience(&self) -> u8 {
        self.vain / IN_VAIN
    }

    /// The guest has not got on in time. If it had all it asked for, it needs
    /// longer; if it waits for another, the two may wait in a circle, which
    /// patience would only prolong.
    fn give_up(&mut self) {
        *self = Self {
            place: self.place,
            vain: (self.vain + if self.waits { 1 } else { IN_VAIN }).min(MOST_VAIN),
            waits: self.waits,
            ..Self::default()
        };
    }

    /// The guest has executed an instruction.
    pub fn end(&mut self) {
        *self = Self::default();
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.units == [None; MOST]
    }

    /// Whether a revocation of this unit must wait. A hold that is older than
    /// `limit`, twice that after one in vain and so on, ends by this; both
    /// times are in the same unit.
    pub fn covers(&mut self, unit: Unit, now: u64, limit: u64) -> bool {
        if self.is_empty() {
            return false;
        }
        if now.wrapping_sub(self.since) > limit << self.patience() {
            self.give_up();
            return false;
        }
        self.units.iter().flatten().any(|held| held.overlaps(unit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Place = Place { rip: 1, rcx: 7 };
    const FRAME: Unit = Unit::Frame(600);

    fn held() -> Hold {
        let mut hold = Hold::default();
        hold.granted(FRAME, HERE, 100);
        hold
    }

    #[test]
    fn what_was_granted_and_its_piece_are_held_and_nothing_else() {
        let mut hold = held();
        for (unit, covered) in [
            (FRAME, true),
            (Unit::Piece(1), true),
            (Unit::Frame(601), false),
            (Unit::Piece(0), false),
        ] {
            assert_eq!(hold.covers(unit, 110, 10), covered, "{unit:?}");
        }
    }

    #[test]
    fn a_hold_ends_when_the_guest_gets_on() {
        let mut hold = held();
        hold.end();
        assert!(!hold.covers(FRAME, 100, 10));
        for place in [Place { rip: 2, ..HERE }, Place { rcx: 6, ..HERE }] {
            let mut hold = held();
            hold.interrupted(place);
            assert!(!hold.covers(FRAME, 100, 10), "{place:?}");
        }
    }

    #[test]
    fn a_hold_ends_after_some_time_or_some_chances() {
        let mut hold = held();
        assert!(!hold.covers(FRAME, 111, 10));
        assert!(hold.is_empty());
        hold.end();
        hold.granted(FRAME, HERE, 200);
        assert!(hold.covers(FRAME, 201, 10), "held anew");
        hold.interrupted(HERE);
        hold.interrupted(HERE);
        assert!(hold.covers(FRAME, 201, 10));
        hold.interrupted(HERE);
        assert!(hold.is_empty());
    }

    #[test]
    fn what_was_in_vain_is_held_for_longer_until_the_guest_gets_on() {
        let mut hold = held();
        assert!(!hold.covers(FRAME, 111, 10));
        hold.granted(FRAME, HERE, 200);
        assert!(hold.covers(FRAME, 220, 10));
        assert!(!hold.covers(FRAME, 221, 10));
        hold.granted(FRAME, HERE, 300);
        assert!(hold.covers(FRAME, 340, 10));
        for _ in 0..INTERRUPTIONS * 4 {
            assert!(!hold.is_empty());
            hold.interrupted(HERE);
        }
        assert!(hold.is_empty());
        for _ in 0..100 {
            hold.granted(FRAME, HERE, 1000);
            assert!(!hold.covers(FRAME, 1000 + 1281, 10), "for a time only");
        }
        let there = Place { rip: 2, rcx: 0 };
        hold.granted(FRAME, there, 5000);
        assert!(!hold.covers(FRAME, 5011, 10), "it has got on");
    }

    #[test]
    fn all_that_one_instruction_needs_is_held_together() {
        let mut hold = held();
        for frame in 0..11 {
            hold.granted(Unit::Frame(frame), HERE, 105);
            hold.granted(Unit::Frame(frame), HERE, 105);
        }
        assert!(hold.covers(FRAME, 110, 10));
        assert!(!hold.covers(FRAME, 111, 10), "since the first of them");
        let mut hold = held();
        hold.granted(Unit::Frame(0), Place { rip: 2, rcx: 0 }, 105);
        assert!(!hold.covers(FRAME, 105, 10), "another instruction");
        assert!(hold.covers(Unit::Frame(0), 115, 10));
    }
}
