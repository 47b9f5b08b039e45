//! Memory that a running guest takes, and gives up, in blocks of 64 slices.

mod support;

use control_plane::cluster::{Change, JobState, Refusal, StepKind, StepResult, Wish};
use control_plane::optimise::Share;
use control_plane::place::plan::NoPlan;
use proptest::prelude::*;
use support::{Rack, VM};
use vmm_shared::addr::NodeId;
use zerocopy::IntoBytes;

const BLOCK: u32 = 64;

const POLICY: &str = r#"
[[constraint]]
name = "even"
kind = "spread"
weight = 8
slice-weight = 2

[[constraint]]
name = "stay"
kind = "fewest-moves"
weight = 4
slice-weight = 1
"#;

/// Nodes of so many slices, and a VM that has booted with `first`.
fn rack(nodes: &[u32], first: Share) -> Rack {
    let nodes: Vec<_> = (0..).zip(nodes).map(|(id, size)| (id, 4, *size)).collect();
    let mut rack = Rack::new(&nodes, Share::new(8, first.slices));
    rack.must(Change::RemoveVm { vm: VM });
    rack.must(Change::CreateVm {
        vm: VM,
        most: Share::new(8, first.slices + 16 * BLOCK),
        least: Share::new(1, first.slices),
        block: 64,
    });
    rack.policy(POLICY);
    rack.boot(first);
    rack
}

fn resize(slices: u32) -> Wish {
    let to = Share::new(2, slices);
    Wish::Resize { vm: VM, to }
}

fn slices(rack: &Rack) -> Vec<u32> {
    rack.shares().iter().map(|share| share.slices).collect()
}

#[test]
fn a_vm_grows_and_shrinks_by_whole_blocks_of_one_node_each() {
    // Odd shares, of which no number of blocks makes even ones.
    let mut rack = rack(&[500, 500, 500], Share::new(2, 200));
    assert_eq!(slices(&rack), [67, 67, 66]);
    rack.start(resize(200 + 4 * BLOCK));
    rack.work();
    let mut more: Vec<u32> = slices(&rack).iter().map(|count| count - 66).collect();
    more.sort_unstable();
    assert!(
        [[64, 65, 129], [64, 64, 130], [65, 65, 128]].contains(&[more[0], more[1], more[2]]),
        "{more:?}"
    );
    rack.start(resize(200 + BLOCK));
    rack.work();
    assert_eq!(slices(&rack).iter().sum::<u32>(), 200 + BLOCK);
    rack.start(resize(200));
    rack.work();
    assert_eq!(slices(&rack), [67, 67, 66]);
}

#[test]
fn sizes_between_blocks_are_refused_with_the_nearest_that_can_be() {
    let mut rack = rack(&[500, 500], Share::new(2, 256));
    for (asked, refusal) in [
        (
            257,
            Refusal::NotWhole {
                below: 256,
                above: 320,
            },
        ),
        (
            383,
            Refusal::NotWhole {
                below: 320,
                above: 384,
            },
        ),
        (
            255,
            Refusal::OutOfRange {
                nearest: Share::new(2, 256),
            },
        ),
        (
            9999,
            Refusal::OutOfRange {
                nearest: Share::new(2, 256 + 16 * BLOCK),
            },
        ),
    ] {
        assert_eq!(rack.ask(resize(asked)), Err(refusal), "{asked}");
        if let Refusal::NotWhole { below, above } = refusal {
            let planned = rack.dry_run(resize(asked)).map(|plan| plan.steps);
            assert_eq!(planned, Err(NoPlan::NotWhole { below, above }));
        }
    }
    let said = Refusal::NotWhole {
        below: 256,
        above: 320,
    };
    assert_eq!(
        said.to_string(),
        "memory comes and goes in blocks of 128M: the nearest are 512M and 640M"
    );
}

#[test]
fn nodes_that_have_less_than_a_block_left_are_named() {
    // 44 left on each: together more than a block.
    let rack = rack(&[144, 144], Share::new(2, 200));
    let Err(NoPlan::Conflict(conflict)) = rack.dry_run(resize(200 + BLOCK)) else {
        panic!("no node has a whole block");
    };
    assert_eq!(
        conflict.to_string(),
        "528M of memory asked, 400M possible by capacity; \
         node 0 gives 200M at most by capacity; node 1 gives 200M at most by capacity"
    );
}

#[test]
fn moves_need_not_be_whole() {
    let mut rack = rack(&[500, 500], Share::new(2, 200));
    rack.start(resize(200 + BLOCK));
    rack.work();
    rack.start(Wish::Drain { node: NodeId(1) });
    rack.work();
    assert_eq!(slices(&rack), [264, 0]);
    rack.must(Change::Cordon {
        node: NodeId(1),
        on: false,
    });
    rack.start(Wish::Rebalance { vm: VM });
    rack.work();
    assert_eq!(slices(&rack), [132, 132]);
    // Neither has a block more than the other now.
    rack.start(resize(200));
    rack.work();
    assert_eq!(slices(&rack).iter().sum::<u32>(), 200);
}

#[test]
fn a_plan_of_parts_of_blocks_is_refused_by_every_replica() {
    let mut rack = rack(&[500, 500], Share::new(2, 200));
    let plan = rack.dry_run(resize(200 + BLOCK)).expect("there is room");
    let job = rack.start(resize(200 + BLOCK));
    let mut steps = Vec::new();
    for step in &plan.steps {
        let half = control_plane::cluster::Step {
            slices: step.slices / 2,
            ..*step
        };
        steps.extend([half, half]);
    }
    let change = Change::Plan { job };
    assert_eq!(rack.append(change, steps.as_bytes()), Err(Refusal::BadPlan));
    assert_eq!(
        rack.append(change, plan.steps.as_bytes()).map(|_| ()),
        Ok(())
    );
}

#[test]
fn a_block_that_the_guest_keeps_is_short_and_can_be_asked_for_again() {
    let mut rack = rack(&[500, 500], Share::new(2, 200));
    rack.start(resize(200 + 2 * BLOCK));
    rack.work();
    let job = rack.start(resize(200));
    while rack.turn(&mut |cluster, _| {
        let (_, step) = cluster.jobs()[&job].current().expect("a step");
        assert_eq!((step.kind, step.slices), (StepKind::Remove, BLOCK));
        match step.from {
            0 => StepResult::Done,
            _ => StepResult::Short {
                slices: 0,
                reason: 3,
            },
        }
    }) {}
    let state = rack.cluster.jobs()[&job].state();
    let (short, reason) = (BLOCK, 3);
    assert_eq!(state, JobState::Finished { short, reason });
    assert_eq!(slices(&rack), [100, 164]);
    assert_eq!(rack.cluster.vms()[&VM].desired().slices, 200);
    rack.start(resize(200));
    rack.work();
    assert_eq!(slices(&rack), [100, 100]);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    /// Whatever the nodes have, and wherever the memory has moved: a plan is
    /// accepted, and is of whole blocks of nodes that have them.
    #[test]
    fn plans_are_whole_or_say_who_lacks_what(
        sizes in prop::collection::vec(64_u32..400, 1..6),
        part in 1_u32..100,
        blocks in prop::collection::vec(0_u32..8, 1..6),
        moved in prop::collection::vec((0_u16..6, 0_u16..6, 1_u32..64), 0..6),
    ) {
        let first = (sizes.iter().sum::<u32>() * part / 100).max(1);
        let mut rack = rack(&sizes, Share::new(2, first));
        for (from, to, count) in moved {
            let (from, to) = (NodeId(from), NodeId(to));
            let _ = rack.ask(Wish::MoveSlices { vm: VM, from, to, count });
            rack.work();
        }
        for blocks in blocks {
            let to = first + blocks * BLOCK;
            let before = slices(&rack);
            let room: u32 = sizes.iter().zip(&before).map(|(size, has)| (size - has) / BLOCK).sum();
            let total: u32 = before.iter().sum();
            match rack.dry_run(resize(to)) {
                Err(NoPlan::Conflict(_)) => {
                    prop_assert!(to > total + room * BLOCK);
                }
                Err(other) => prop_assert!(false, "{other}"),
                Ok(plan) => {
                    for step in &plan.steps {
                        prop_assert!(step.kind != StepKind::Move || step.slices == 0);
                        let whole = step.slices.is_multiple_of(BLOCK);
                        prop_assert!(whole || step.kind != StepKind::Add, "{step:?}");
                    }
                    prop_assert!(plan.parts.iter().all(|part| part.bound <= part.cost));
                    if rack.ask(resize(to)).is_ok() {
                        rack.work();
                    }
                    prop_assert_eq!(slices(&rack).iter().sum::<u32>(), to);
                }
            }
        }
    }
}
