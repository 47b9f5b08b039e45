//! Random steps of many nodes, with deaths in the middle of them.

use super::world::{Dice, Neglect, Verdict, World};
use crate::coherence::{Change, Counters};

/// How nodes come to their ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Deaths {
    None,
    /// At any access to the table.
    Anywhere,
}

fn run(seed: u64, steps: u32, nodes: u16, deaths: Deaths, neglect: Neglect) -> Verdict<Counters> {
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut world = World::new(nodes, 2);
    world.neglect = neglect;
    for step in 0..steps {
        let mut fuel = match deaths {
            Deaths::Anywhere if dice.one_in(150) => dice.below(40),
            _ => u64::MAX,
        };
        let words = world.words.clone();
        let alive: Vec<bool> = (0..usize::from(nodes)).map(|n| world.is_alive(n)).collect();
        // The dice decide who moves; the same throw names who dies.
        let throw = dice.0;
        let mover = Dice(throw).index(usize::from(nodes));
        let result = if fuel < u64::MAX && alive[mover] {
            words.with_fuel(&mut fuel, || world.step(&mut dice))
        } else {
            Some(world.step(&mut dice))
        };
        match result {
            Some(outcome) => outcome,
            None => {
                world.kill(mover);
                Ok(())
            }
        }
        .and_then(|()| world.check())
        .map_err(|wrong| format!("seed {seed}, step {step}: {wrong}"))?;
    }
    world
        .drain()
        .map_err(|wrong| format!("seed {seed}, at the end: {wrong}"))?;
    Ok(world.counters)
}

#[test]
fn random_steps_never_break_coherence() {
    let mut total = Vec::new();
    for seed in 1..=40 {
        let nodes = [2, 3, 5, 8][seed as usize % 4];
        let counters = run(seed, 3000, nodes, Deaths::None, Neglect::Nothing).expect("coherent");
        total.push(counters);
    }
    // A simulation that misses a path proves nothing about it.
    for change in [
        Change::Regrant,
        Change::FirstTouch,
        Change::Join,
        Change::SharedAsData,
        Change::SharedAsCode,
        Change::CodeToData,
        Change::DataToCode,
        Change::Roam,
        Change::Move,
        Change::Settle,
    ] {
        let seen: u64 = total.iter().map(|counters| counters.changes(change)).sum();
        assert!(seen > 10, "{change:?} happened {seen} times");
    }
    for (at, (name, _)) in total[0].values().enumerate() {
        let sum: u64 = total
            .iter()
            .filter_map(|counters| counters.values().nth(at))
            .map(|(_, count)| count)
            .sum();
        assert!(sum > 0 || name == "alone_again", "{name} never counted");
    }
}

/// What happens once in the life of a piece, from all sides.
#[test]
fn many_short_lives_never_break_coherence() {
    for seed in 1..=3000 {
        run(seed, 150, 2, Deaths::None, Neglect::Nothing).expect("coherent");
    }
}

#[test]
fn nodes_that_die_at_any_instant_never_break_coherence() {
    let mut alone = 0;
    for seed in 1000..1040 {
        let nodes = [2, 3, 4][seed as usize % 3];
        let counters =
            run(seed, 3000, nodes, Deaths::Anywhere, Neglect::Nothing).expect("coherent");
        alone += counters.changes(Change::Alone);
    }
    assert!(alone > 5, "{alone} frames became private again");
}

/// The model sees each mistake it is there to see.
#[test]
fn every_neglected_duty_is_noticed() {
    for neglect in [
        Neglect::Refresh,
        Neglect::FlushOnGrant,
        Neglect::FlushOnRevocation,
        Neglect::ReducingFirst,
    ] {
        let noticed = (1..=12)
            .filter(|seed| run(*seed, 3000, 3, Deaths::None, neglect).is_err())
            .count();
        assert!(noticed > 3, "{neglect:?} was noticed {noticed} times");
    }
}
