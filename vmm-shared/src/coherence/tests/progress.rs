//! That guests get on, however much their nodes want the same units.

use super::world::{Dice, Neglect, World};
use crate::coherence::*;
use Access::{Execute, Read, Write};

/// What the guest of a node does for ever.
type Instruction = &'static [(usize, Access)];

/// Steps of all nodes by turns.
const ROUNDS: usize = 4000;

/// Lets each node's guest repeat its instruction. A doorbell is always faster
/// than the guest: what others have asked for is served before each attempt.
/// Returns how many instructions each node has completed.
fn fight(neglect: Neglect, instructions: &[Instruction], dice: Option<Dice>) -> Vec<u32> {
    fight_starved(0, neglect, instructions, dice)
}

/// The same on hosts that run something else, for so many steps' time, before
/// each step of a node.
fn fight_starved(
    starved: u64,
    neglect: Neglect,
    instructions: &[Instruction],
    mut dice: Option<Dice>,
) -> Vec<u32> {
    let mut world = World::new(instructions.len() as u16, 1);
    world.neglect = neglect;
    let mut done = vec![0; instructions.len()];
    for round in 0..ROUNDS {
        for (node, instruction) in instructions.iter().enumerate() {
            if dice.as_mut().is_some_and(|dice| dice.one_in(3)) {
                continue;
            }
            world.starve(starved);
            if round % 16 == 0 {
                world.nudge(node, 0);
            }
            while world.serve(node, 0, false).expect("sound") {}
            if world.has_fault(node, 0) {
                world.advance(node, 0).expect("sound");
            } else if world.instruction(node, 0, instruction).expect("coherent") {
                done[node] += 1;
            }
            world.check().expect("coherent");
        }
    }
    done
}

const WRITER: Instruction = &[(0, Write)];
const EXECUTOR: Instruction = &[(0, Execute)];

#[test]
fn nodes_that_fight_over_a_frame_take_turns() {
    for instructions in [
        &[WRITER, EXECUTOR][..],
        &[WRITER, EXECUTOR, EXECUTOR],
        &[WRITER, EXECUTOR, WRITER, EXECUTOR],
    ] {
        let done = fight(Neglect::Nothing, instructions, None);
        let least = 4000 / 60 / instructions.len() as u32;
        assert!(done.iter().all(|done| *done > least), "{done:?}");
    }
}

/// Without the rule nobody ever gets anywhere: what the rule is for.
#[test]
fn without_holding_they_would_take_it_from_each_other_for_ever() {
    let done = fight(Neglect::Holding, &[WRITER, EXECUTOR], None);
    assert!(done.iter().all(|done| *done < 5), "{done:?}");
}

/// Each node's instruction needs a frame that the other's changes.
#[test]
fn nodes_that_need_each_others_frames_in_one_instruction_get_on() {
    let one: Instruction = &[(0, Execute), (512, Write)];
    let other: Instruction = &[(512, Execute), (0, Write)];
    let done = fight(Neglect::Nothing, &[one, other], None);
    assert!(done.iter().all(|done| *done > 10), "{done:?}");
    for seed in 1..20 {
        let done = fight(Neglect::Nothing, &[one, other], Some(Dice(seed)));
        assert!(done.iter().all(|done| *done > 10), "{seed}: {done:?}");
    }
}

/// Whatever a node does, every hold of the usual length is over meanwhile.
#[test]
fn starved_nodes_get_on_too() {
    let one: Instruction = &[(0, Execute), (512, Write)];
    let other: Instruction = &[(512, Execute), (0, Write)];
    for starved in [70, 200, 1000] {
        for instructions in [&[WRITER, EXECUTOR][..], &[one, other]] {
            let done = fight_starved(starved, Neglect::Nothing, instructions, None);
            assert!(done.iter().all(|done| *done > 10), "{starved}: {done:?}");
        }
    }
}

/// Page tables, code and data, some of it the other node's code.
#[test]
fn an_instruction_of_many_frames_gets_on() {
    let one: Instruction = &[(0, Execute), (1, Write), (511, Read), (512, Write)];
    let other: Instruction = &[(512, Execute), (511, Write), (1, Read), (0, Write)];
    for seed in 1..20 {
        let done = fight(Neglect::Nothing, &[one, other, one], Some(Dice(seed)));
        assert!(done.iter().all(|done| *done > 3), "{seed}: {done:?}");
    }
}

#[test]
fn a_guest_that_stops_keeps_nobody_waiting_for_long() {
    let mut world = World::new(2, 1);
    // Node 0 is granted the frame and never comes to use it.
    assert!(!world.access(0, 0, 0, Write).expect("coherent"));
    while world.has_fault(0, 0) {
        world.advance(0, 0).expect("sound");
    }
    assert!(!world.access(1, 0, 0, Execute).expect("coherent"));
    world.advance(1, 0).expect("asks");
    assert!(!world.serve(0, 0, false).expect("sound"), "it is held");
    world.drain().expect("for a time only");
    assert!(world.access(1, 0, 0, Execute).expect("coherent"));
}
