//! Tables full of nonsense: every call has a defined answer, in finite time.

use std::sync::atomic::Ordering;

use super::world::{Dice, FRAMES, Mortal, World};
use crate::addr::NodeId;
use crate::coherence::layout::Layout;
use crate::coherence::*;

/// More accesses to the table than any call makes; a split makes 1,500.
const ENDLESS: u64 = 20_000;

fn finite<T>(words: &Mortal, call: impl FnOnce() -> T) -> T {
    words
        .with_fuel(&mut { ENDLESS }, call)
        .expect("the call ends")
}

/// Words of several sorts: noise, all ones, almost zero, nearly right.
fn nonsense(dice: &mut Dice, sort: u64) -> u64 {
    let noise = dice.0 ^ dice.below(u64::MAX).rotate_left(32);
    match sort {
        0 => noise,
        1 => u64::MAX,
        2 => 1 << dice.below(64),
        3 => dice.below(8),
        // A control word locked by node 0 in epoch 1.
        4 => dice.below(6) | 1 << 31 | 1 << 32,
        _ => noise & 0x7ff_fff8 | dice.below(6),
    }
}

#[test]
fn a_table_of_nonsense_never_panics_or_hangs() {
    let geometry = Geometry {
        frames: FRAMES,
        nodes: 3,
        slots: 2,
    };
    let size = geometry.table_size().expect("a legal geometry");
    let mut dice = Dice(0x1234_5678_9abc_def1);
    let mut errors = 0;
    let mut grants = 0;
    for round in 0..600 {
        let words = Mortal::new(size);
        let sorts = [dice.below(6), dice.below(6), round % 6];
        for word in words.words.iter() {
            let sort = sorts[dice.index(3)];
            word.store(nonsense(&mut dice, sort), Ordering::Relaxed);
        }
        let map = CoherenceMap::new(words.clone(), geometry).expect("large enough");
        let me = Member {
            node: NodeId(0),
            epoch: 1,
        };
        // Else every call would end at the first check.
        words.words[Layout::epoch(me.node)].store(1, Ordering::Relaxed);
        for _ in 0..4 {
            let frame = dice.index(FRAMES);
            let mut fault = map.fault(me, frame, dice.access()).expect("a member");
            for _ in 0..40 {
                match finite(&words, || fault.poll()) {
                    Ok(Step::Granted(grant)) => {
                        assert!(grant.unit.contains(frame));
                        errors += u32::from(finite(&words, || fault.complete()).is_err());
                        grants += 1;
                        break;
                    }
                    Ok(_) => {
                        let _ = fault.nudge();
                    }
                    Err(_) => {
                        errors += 1;
                        break;
                    }
                }
            }
            for _ in 0..4 {
                match finite(&words, || map.next_revocation(me)) {
                    Ok(Some(revocation)) => {
                        assert!(revocation.unit.first_frame() < FRAMES);
                        finite(&words, || map.acknowledge(me, &revocation));
                    }
                    Ok(None) => break,
                    Err(_) => errors += 1,
                }
            }
        }
        let _ = finite(&words, || map.claim(me, 0..2, |_| ()));
        let _ = map.view(dice.index(FRAMES));
        for node in 0..4 {
            let other = Member {
                node: NodeId(node),
                epoch: 1,
            };
            let _ = map.fence(other);
            let _ = finite(&words, || map.join(other.node, 5));
        }
    }
    assert!(errors > 300, "{errors}");
    assert!(grants > 100, "{grants}");
}

#[test]
fn one_bad_word_in_a_running_rack_never_panics_or_hangs() {
    let mut stopped = 0;
    for seed in 1..60 {
        let mut dice = Dice((seed * 0x9e37_79b9) | 1);
        let mut world = World::new(3, 2);
        let words = world.words.clone();
        for step in 0..1500 {
            if step % 50 == 49 {
                let sort = dice.below(6);
                // Mostly where something is in use.
                let limit = if dice.one_in(2) {
                    260
                } else {
                    words.words.len()
                };
                let at = dice.index(limit);
                let value = nonsense(&mut dice, sort);
                words.words[at].store(value, Ordering::Relaxed);
            }
            if finite(&words, || world.step(&mut dice)).is_err() {
                stopped += 1;
                break;
            }
        }
    }
    assert!(stopped > 20, "{stopped}");
}
