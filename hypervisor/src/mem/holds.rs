//! What each core's guest still has to use once before other nodes get it.
//!
//! See [`Hold`]. A core's own words are written by that core, and by whoever
//! finds its hold too old.

use alloc::vec::Vec;

use spin::Mutex;
use vmm_shared::addr::NodeId;
use vmm_shared::coherence::{Hold, Place, Unit};

/// How long a hold of node 0 may last; of node n, n + 1 times that. Some
/// twenty entries of a guest under emulation.
const LIMIT_US: u64 = 4000;
/// How long a guest is left alone with what it was granted before its core is
/// made to look whether it has got on.
const CHANCE_US: u64 = 100;

/// One core's.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Core {
    hold: Hold,
    /// When others may next make it leave its guest.
    kick_from: u64,
}

/// The holds of a node's cores.
#[derive(Debug)]
pub(super) struct Holds {
    cores: Vec<Mutex<Core>>,
    limit: u64,
    chance: u64,
}

impl Holds {
    /// For so many cores, whose TSC runs at this rate.
    pub(super) fn new(node: NodeId, cores: usize, tsc_khz: u32) -> Self {
        let ticks = |us: u64| us * u64::from(tsc_khz) / 1000;
        Self {
            cores: (0..cores).map(|_| Mutex::default()).collect(),
            limit: ticks(LIMIT_US) * (u64::from(node.0) + 1),
            chance: ticks(CHANCE_US),
        }
    }

    /// A core's guest asks for one more unit.
    pub(super) fn asks(&self, core: usize) {
        self.cores[core].lock().hold.asks();
    }

    /// A core's guest has been granted this at TSC `now`.
    pub(super) fn granted(&self, core: usize, unit: Unit, place: Place, now: u64) {
        let mut core = self.cores[core].lock();
        core.hold.granted(unit, place, now);
        core.kick_from = now.wrapping_add(self.chance);
    }

    /// Changes a core's hold; whether this ends it.
    pub(super) fn ends(&self, core: usize, change: impl FnOnce(&mut Hold)) -> bool {
        let mut core = self.cores[core].lock();
        let held = !core.hold.is_empty();
        change(&mut core.hold);
        held && core.hold.is_empty()
    }

    /// Whether no core holds any of this. Calls `kick` for those cores that
    /// do and have had their chance.
    pub(super) fn release(&self, unit: Unit, now: u64, kick: impl Fn(usize)) -> bool {
        let mut free = true;
        for (number, core) in self.cores.iter().enumerate() {
            let mut core = core.lock();
            if !core.hold.covers(unit, now, self.limit) {
                continue;
            }
            free = false;
            if now.wrapping_sub(core.kick_from).cast_signed() >= 0 {
                core.kick_from = now.wrapping_add(self.chance);
                kick(number);
            }
        }
        free
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::Cell;

    const HERE: Place = Place { rip: 1, rcx: 2 };
    const UNIT: Unit = Unit::Frame(3);

    #[test]
    fn a_core_is_kicked_once_per_chance_and_released_after_the_limit() {
        // One tick per microsecond.
        let holds = Holds::new(NodeId(1), 2, 1000);
        holds.granted(1, UNIT, HERE, 50);
        let kicks = Cell::new(0);
        let release = |now| {
            holds.release(UNIT, now, |core| {
                assert_eq!(core, 1);
                kicks.set(kicks.get() + 1);
            })
        };
        assert!(!release(149));
        assert_eq!(kicks.get(), 0);
        assert!(!release(150));
        assert!(!release(249));
        assert_eq!(kicks.get(), 1);
        assert!(!release(8050));
        assert!(release(8051));
        assert_eq!(kicks.get(), 2);
    }

    #[test]
    fn the_end_of_a_hold_is_noticed_once() {
        let holds = Holds::new(NodeId(0), 1, 1000);
        assert!(!holds.ends(0, Hold::end));
        holds.granted(0, UNIT, HERE, 0);
        assert!(!holds.ends(0, |hold| hold.interrupted(HERE)));
        assert!(holds.ends(0, Hold::end));
        assert!(!holds.ends(0, Hold::end));
    }
}
