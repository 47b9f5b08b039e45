//! Jobs from wish to end: in one go, cancelled, failing, and resumed by a
//! control role that knows nothing but the tables.

mod support;

use control_plane::cluster::{
    CANCELLED, Change, Cluster, Done, JobState, NODE_LOST, Reason, Refusal, StepKind, StepResult,
    VmPhase, Wish,
};
use control_plane::optimise::Share;
use control_plane::place::Cause;
use control_plane::place::explain::Resource;
use control_plane::place::plan::NoPlan;
use support::{Rack, VM, at};
use vmm_shared::addr::{NodeId, VcpuId};
use vmm_shared::log::StateMachine;

const POLICY: &str = r#"
[[constraint]]
name = "host"
kind = "headroom"
cores = 1
hard = true

[[constraint]]
name = "few"
kind = "pack"
weight = 10

[[constraint]]
name = "near"
kind = "near-memory"
weight = 2

[[constraint]]
name = "stay"
kind = "fewest-moves"
weight = 5
slice-weight = 1
"#;

fn resize(vcpus: u32, slices: u32) -> Wish {
    Wish::Resize {
        vm: VM,
        to: Share::new(vcpus, slices),
    }
}

/// Three nodes of 4 cores and 64 slices, each a failure domain.
fn rack() -> Rack {
    let mut rack = Rack::new(&[(0, 4, 64), (1, 4, 64), (2, 4, 64)], Share::new(16, 256));
    rack.policy(POLICY);
    rack
}

fn done() -> impl FnMut(&Cluster, u32) -> StepResult {
    |_, _| StepResult::Done
}

#[test]
fn a_vm_grows_and_shrinks_as_asked() {
    let mut rack = rack();
    rack.boot(Share::new(2, 32));
    // One node is enough, and cheapest.
    assert_eq!(
        rack.shares().iter().filter(|share| share.is_open()).count(),
        1
    );
    for (vcpus, slices) in [(6, 96), (9, 192), (3, 40), (1, 1), (9, 192), (2, 32)] {
        rack.start(resize(vcpus, slices));
        rack.work();
        let vm = &rack.cluster.vms()[&VM];
        assert_eq!(vm.granted(), Share::new(vcpus, slices));
        assert_eq!(vm.desired(), vm.granted());
        assert!(vm.home(VcpuId(0)).is_some(), "the boot CPU stays");
        assert!(
            rack.shares().iter().all(|share| share.vcpus <= 3),
            "headroom"
        );
    }
    let free: u32 = rack
        .cluster
        .nodes()
        .values()
        .map(|node| node.free().slices)
        .sum();
    assert_eq!(free, 3 * 64 - 32, "nothing leaks");
}

#[test]
fn the_three_columns_are_kept_apart() {
    let mut rack = rack();
    rack.boot(Share::new(2, 32));
    rack.start(resize(3, 48));
    let vm = &rack.cluster.vms()[&VM];
    assert_eq!(
        (vm.desired(), vm.granted()),
        (Share::new(3, 48), Share::new(2, 32))
    );
    rack.work();
    rack.must(Change::Seen {
        vm: VM,
        share: Share::new(3, 40),
    });
    let vm = &rack.cluster.vms()[&VM];
    assert_eq!(
        (vm.granted(), vm.seen()),
        (Share::new(3, 48), Share::new(3, 40))
    );
}

#[test]
fn identical_requests_join_and_others_name_the_job() {
    let mut rack = rack();
    rack.boot(Share::new(2, 32));
    let job = rack.start(resize(3, 48));
    assert_eq!(rack.ask(resize(3, 48)), Ok(Done::Joined { job }));
    rack.turn(&mut done());
    assert_eq!(rack.ask(resize(3, 48)), Ok(Done::Joined { job }));
    assert_eq!(rack.ask(resize(2, 32)), Err(Refusal::Busy { job }));
    assert_eq!(
        rack.ask(Wish::Rebalance { vm: VM }),
        Err(Refusal::Busy { job })
    );
    rack.work();
    assert_eq!(rack.ask(resize(3, 48)), Ok(Done::Nothing));
}

#[test]
fn what_cannot_be_is_refused_with_the_nearest_that_can() {
    let mut rack = rack();
    rack.boot(Share::new(2, 32));
    for (vcpus, slices, nearest) in [
        (0, 32, Share::new(1, 32)),
        (2, 0, Share::new(2, 1)),
        (17, 300, Share::new(16, 256)),
    ] {
        assert_eq!(
            rack.ask(resize(vcpus, slices)),
            Err(Refusal::OutOfRange { nearest })
        );
    }
    let node = NodeId(9);
    assert_eq!(
        rack.ask(Wish::Drain { node }),
        Err(Refusal::NoNode { node })
    );
    let absent = Wish::PlaceVcpu {
        vm: VM,
        vcpu: VcpuId(16),
        to: Some(NodeId(1)),
    };
    assert_eq!(rack.ask(absent), Err(Refusal::NoVcpu { vcpu: 16 }));
    assert_eq!(rack.cluster.vms()[&VM].desired(), Share::new(2, 32));
}

#[test]
fn a_request_during_boot_waits() {
    let mut rack = rack();
    rack.start(resize(2, 32));
    rack.work();
    let job = rack.start(resize(4, 64));
    assert!(!rack.turn(&mut done()), "nothing is to be done yet");
    assert_eq!(rack.cluster.jobs()[&job].state(), JobState::Waiting);
    rack.must(Change::Phase {
        vm: VM,
        phase: VmPhase::Running,
    });
    rack.work();
    assert_eq!(rack.cluster.vms()[&VM].granted(), Share::new(4, 64));
}

#[test]
fn a_dry_run_tells_the_effort_and_changes_nothing() {
    let mut rack = rack();
    rack.boot(Share::new(2, 32));
    let before = rack.cluster.clone();
    let plan = rack.dry_run(resize(5, 80)).expect("there is room");
    assert_eq!((plan.effort.vcpus_added, plan.effort.slices_added), (3, 48));
    assert_eq!((plan.effort.vcpus_moved, plan.effort.slices_moved), (0, 0));
    assert_eq!(plan.parts[0].cost, plan.parts[0].bound);
    let text = plan.parts[0].explanation.to_string();
    assert!(text.contains("no more vCPUs by host"), "{text}");
    assert!(text.contains("in all: few 20"), "{text}");
    assert_eq!(rack.cluster, before);
}

#[test]
fn a_refusal_names_the_constraint_and_the_rows() {
    let mut rack = rack();
    rack.boot(Share::new(2, 32));
    let Err(NoPlan::Conflict(conflict)) = rack.dry_run(resize(10, 32)) else {
        panic!("9 is the most");
    };
    assert_eq!(conflict.resource, Resource::Vcpus);
    assert_eq!((conflict.asked, conflict.possible), (10, 9));
    let names: Vec<String> = conflict.causes.iter().map(ToString::to_string).collect();
    assert_eq!(names, ["host"]);
    assert_eq!(conflict.rows.len(), 3);
    assert!(
        conflict
            .rows
            .iter()
            .all(|row| row.most == 3 && row.size == 4)
    );
    assert_eq!(
        conflict.to_string(),
        "10 vCPUs asked, 9 possible by host; node 0 gives 3 at most by host; \
         node 1 gives 3 at most by host; node 2 gives 3 at most by host"
    );
    // Beyond all cores no constraint is to blame.
    let Err(NoPlan::Conflict(conflict)) = rack.dry_run(resize(13, 32)) else {
        panic!("12 cores");
    };
    assert_eq!(conflict.causes, [Cause::Capacity]);
    // A cordon and the headroom together.
    rack.must(Change::Cordon {
        node: NodeId(2),
        on: true,
    });
    let Err(NoPlan::Conflict(conflict)) = rack.dry_run(resize(9, 32)) else {
        panic!("6 are left");
    };
    assert_eq!(conflict.causes, [Cause::Cordon]);
    assert_eq!(conflict.rows[0].node, NodeId(2));
    let job = rack.start(resize(9, 32));
    rack.work();
    assert_eq!(rack.cluster.jobs()[&job].state(), JobState::Refused);
    assert_eq!(
        rack.cluster.vms()[&VM].desired(),
        Share::new(2, 32),
        "as before"
    );
}

#[test]
fn a_drain_empties_the_node_and_then_it_may_leave() {
    let mut rack = rack();
    rack.boot(Share::new(5, 100));
    let node = NodeId(0);
    assert_eq!(
        rack.append(Change::Leave { node }, &[]),
        Err(Refusal::InUse)
    );
    rack.start(Wish::Drain { node });
    rack.work();
    let vm = &rack.cluster.vms()[&VM];
    assert_eq!(vm.granted(), Share::new(5, 100));
    assert_eq!(vm.granted_at(node), Share::NONE);
    rack.must(Change::Leave { node });
    assert_eq!(
        rack.ask(Wish::Drain { node: NodeId(1) }).map(|_| ()),
        Ok(())
    );
    rack.work();
    assert!(
        matches!(
            rack.cluster.jobs().values().last().map(|job| job.state()),
            Some(JobState::Refused)
        ),
        "the last node can't take all"
    );
}

#[test]
fn moves_go_where_they_are_told_or_say_why_not() {
    let mut rack = rack();
    rack.boot(Share::new(3, 30));
    let home = rack.cluster.vms()[&VM].home(VcpuId(1)).expect("it runs");
    let to = NodeId((home.0 + 1) % 3);
    rack.start(Wish::PlaceVcpu {
        vm: VM,
        vcpu: VcpuId(1),
        to: Some(to),
    });
    rack.work();
    assert_eq!(rack.cluster.vms()[&VM].home(VcpuId(1)), Some(to));
    rack.start(Wish::MoveSlices {
        vm: VM,
        from: home,
        to,
        count: 10,
    });
    rack.work();
    assert_eq!(rack.cluster.vms()[&VM].granted_at(to), Share::new(1, 10));
    // Into the headroom of the node: not even when told.
    for _ in 0..2 {
        rack.must(Change::Lease {
            holder: to,
            node: to,
            share: Share::new(1, 0),
        });
    }
    let told = rack.dry_run(Wish::PlaceVcpu {
        vm: VM,
        vcpu: VcpuId(0),
        to: Some(to),
    });
    let Err(NoPlan::Breaks(Cause::Rule(name))) = told else {
        panic!("{told:?}");
    };
    assert_eq!(name.to_string(), "host");
}

#[test]
fn pinned_vcpus_go_home_even_in_a_circle() {
    let mut rack = Rack::new(&[(0, 3, 8), (1, 3, 8)], Share::new(8, 16));
    rack.boot(Share::new(4, 8));
    rack.start(Wish::Rebalance { vm: VM });
    rack.work();
    let vm = &rack.cluster.vms()[&VM];
    let there = |node: u16| -> Vec<u16> {
        let homes = (0..).zip(vm.homes());
        homes
            .filter(|(_, home)| **home == Some(NodeId(node)))
            .map(|(vcpu, _)| vcpu)
            .collect()
    };
    let (here, across) = (there(0)[0], there(1)[0]);
    let pin = |name: &str, vcpu: u16, node: u16| {
        format!(
            "[[constraint]]\nname = \"{name}\"\nkind = \"pin\"\nhard = true\nvm = 0\nvcpu = {vcpu}\nnode = {node}\n"
        )
    };
    // The two change places.
    rack.policy(&(pin("a", here, 1) + &pin("b", across, 0)));
    rack.start(Wish::Rebalance { vm: VM });
    rack.work();
    let vm = &rack.cluster.vms()[&VM];
    assert_eq!(vm.home(VcpuId(here)), Some(NodeId(1)));
    assert_eq!(vm.home(VcpuId(across)), Some(NodeId(0)));
}

/// Runs a job to its end, with a new control role after each step that has
/// nothing but a snapshot.
fn work_with_restarts(rack: &mut Rack) {
    let mut term = 0;
    loop {
        let bytes = rack.snapshot();
        let mut fresh = Cluster::default();
        fresh.load(0, &bytes).expect("a snapshot");
        assert_eq!(fresh, rack.cluster);
        rack.cluster = fresh;
        rack.must(Change::TakeOver {
            node: NodeId(term % 3),
        });
        term += 1;
        if !rack.turn(&mut |_, _| StepResult::Done) {
            break;
        }
    }
    assert_eq!(rack.cluster.controller().1, u32::from(term));
}

#[test]
fn a_restarted_control_role_finishes_the_job() {
    let mut rack = rack();
    rack.boot(Share::new(5, 100));
    let job = rack.start(Wish::Drain { node: NodeId(0) });
    work_with_restarts(&mut rack);
    let state = rack.cluster.jobs()[&job].state();
    assert_eq!(
        state,
        JobState::Finished {
            short: 0,
            reason: 0
        }
    );
}

#[test]
fn cancelled_after_any_step_everything_is_as_before() {
    for steps in 0.. {
        let mut rack = rack();
        rack.boot(Share::new(5, 100));
        let before = rack.cluster.clone();
        let job = rack.start(resize(3, 150));
        rack.turn(&mut done());
        for _ in 0..steps {
            assert!(rack.turn(&mut done()));
        }
        let next = rack.cluster.jobs()[&job]
            .current()
            .map(|(_, step)| step.kind);
        let past_return = rack.cluster.jobs()[&job]
            .steps()
            .iter()
            .take(rack.cluster.jobs()[&job].done() as usize)
            .any(|step| step.kind == StepKind::Release);
        let outcome = rack.append(Change::Cancel { job }, &[]);
        if past_return {
            assert_eq!(outcome, Err(Refusal::TooLate { job }));
            rack.work();
            assert_eq!(rack.cluster.vms()[&VM].granted(), Share::new(3, 150));
            if next.is_none() {
                assert!(steps > 4, "leases, additions and removals were tried");
                return;
            }
            continue;
        }
        outcome.expect("cancelled");
        work_with_restarts(&mut rack);
        let state = rack.cluster.jobs()[&job].state();
        assert_eq!(state, JobState::RolledBack { reason: CANCELLED });
        assert_eq!(rack.cluster.vms(), before.vms(), "after {steps} steps");
        assert_eq!(rack.cluster.nodes(), before.nodes(), "after {steps} steps");
    }
}

#[test]
fn a_failing_step_rolls_the_job_back() {
    let mut rack = rack();
    rack.boot(Share::new(5, 100));
    let before = rack.cluster.clone();
    let job = rack.start(Wish::Drain { node: NodeId(0) });
    let mut calls = 0;
    while rack.turn(&mut |cluster, _| {
        calls += 1;
        let back = matches!(cluster.jobs()[&job].state(), JobState::RollingBack { .. });
        if calls == 2 && !back {
            StepResult::Failed { reason: 42 }
        } else {
            StepResult::Done
        }
    }) {}
    assert_eq!(
        rack.cluster.jobs()[&job].state(),
        JobState::RolledBack { reason: 42 }
    );
    assert_eq!(rack.cluster.vms(), before.vms());
    assert!(
        rack.cluster.nodes()[&NodeId(0)].is_cordoned(),
        "the cordon stays"
    );
}

#[test]
fn a_partial_shrink_says_exactly_what_stayed() {
    let mut rack = rack();
    rack.boot(Share::new(5, 100));
    let job = rack.start(resize(5, 60));
    while rack.turn(&mut |cluster, _| {
        let (_, step) = cluster.jobs()[&job].current().expect("a step");
        if step.kind == StepKind::Remove && step.slices > 10 {
            StepResult::Short {
                slices: step.slices - 7,
                reason: 3,
            }
        } else {
            StepResult::Done
        }
    }) {}
    let JobState::Finished { short, reason: 3 } = rack.cluster.jobs()[&job].state() else {
        panic!("{:?}", rack.cluster.jobs()[&job]);
    };
    assert!(short >= 7 && short.is_multiple_of(7));
    let vm = &rack.cluster.vms()[&VM];
    assert_eq!(vm.granted(), Share::new(5, 60 + short));
    assert_eq!(
        vm.desired(),
        Share::new(5, 60),
        "a second request tries again"
    );
    rack.start(resize(5, 60));
    rack.work();
    assert_eq!(rack.cluster.vms()[&VM].granted(), Share::new(5, 60));
}

#[test]
fn a_vcpu_that_the_guest_keeps_stays_and_the_rest_goes() {
    let mut rack = rack();
    rack.boot(Share::new(5, 100));
    let job = rack.start(resize(2, 100));
    let busy = Reason::Kept(0x82);
    let mut first = None;
    while rack.turn(&mut |cluster, _| {
        let (_, step) = cluster.jobs()[&job].current().expect("a step");
        assert_eq!(step.kind, StepKind::Remove);
        match *first.get_or_insert(step.vcpu) == step.vcpu {
            true => StepResult::Short {
                slices: 0,
                reason: busy.code(),
            },
            false => StepResult::Done,
        }
    }) {}
    let job = &rack.cluster.jobs()[&job];
    assert!(matches!(job.state(), JobState::Finished { short: 0, .. }));
    let kept = VcpuId(first.expect("some were to go"));
    assert_eq!(job.kept().collect::<Vec<_>>(), [(kept, busy)]);
    let vm = &rack.cluster.vms()[&VM];
    assert_eq!(vm.granted(), Share::new(3, 100));
    assert!(vm.home(kept).is_some());
    assert_eq!(vm.desired(), Share::new(2, 100));
    rack.start(resize(2, 100));
    rack.work();
    assert_eq!(rack.cluster.vms()[&VM].granted(), Share::new(2, 100));
}

#[test]
fn what_the_guest_kept_is_not_given_back_when_the_job_is_undone() {
    let mut rack = rack();
    rack.boot(Share::new(5, 100));
    let before = rack.cluster.clone();
    let job = rack.start(resize(2, 100));
    rack.turn(&mut done());
    rack.turn(&mut |_, _| StepResult::Short {
        slices: 0,
        reason: Reason::Kept(0x82).code(),
    });
    rack.turn(&mut done());
    rack.must(Change::Cancel { job });
    while rack.turn(&mut |cluster, _| {
        let (_, step) = cluster.jobs()[&job].current().expect("a step");
        assert!(!step.is_kept(), "there is nothing to do for the executor");
        StepResult::Done
    }) {}
    assert_eq!(rack.cluster.vms(), before.vms());
    assert_eq!(rack.cluster.nodes(), before.nodes());
}

#[test]
fn a_step_that_may_have_been_begun_is_undone_first() {
    let mut rack = rack();
    rack.boot(Share::new(3, 30));
    let home = rack.cluster.vms()[&VM].home(VcpuId(1)).expect("it runs");
    let to = NodeId((home.0 + 1) % 3);
    let wish = Wish::PlaceVcpu {
        vm: VM,
        vcpu: VcpuId(1),
        to: Some(to),
    };
    let job = rack.start(wish);
    rack.turn(&mut done());
    rack.must(Change::Cancel { job });
    let (_, step) = rack.cluster.jobs()[&job].current().expect("a step");
    assert_eq!((step.kind, step.to), (StepKind::Move, home.0));
    rack.work();
    assert_eq!(rack.cluster.vms()[&VM].home(VcpuId(1)), Some(home));
}

#[test]
fn an_abandoned_job_leaves_what_the_guest_may_still_have() {
    const SILENT: StepResult = StepResult::Failed {
        reason: Reason::Unanswered.code(),
    };
    let mut rack = rack();
    rack.boot(Share::new(3, 30));
    let job = rack.start(resize(5, 30));
    for _ in 0..2 {
        rack.turn(&mut done());
    }
    assert!(rack.cluster.jobs()[&job].current().is_some());
    rack.must(Change::Cancel { job });
    let again = rack.append(Change::Cancel { job }, &[]);
    assert_eq!(again, Err(Refusal::Undoing { job }));
    let hint = again.expect_err("it is refused").to_string();
    assert!(
        hint.contains(&format!("cancel --force {}", job.0)),
        "{hint}"
    );
    rack.must(Change::Abandon { job });
    assert!(rack.cluster.jobs()[&job].is_abandoned());
    let desired = |rack: &Rack| rack.cluster.vms()[&VM].desired();
    assert_eq!(desired(&rack), Share::new(3, 30), "nobody wants more now");
    // The same request is another job: this one is being undone.
    assert_eq!(rack.ask(resize(5, 30)), Err(Refusal::Busy { job }));
    // Who joins now knows it, too.
    let mut copy = Cluster::default();
    copy.load(0, &rack.snapshot()).expect("a snapshot");
    assert_eq!(copy, rack.cluster);
    rack.turn(&mut |_, _| SILENT);
    let state = rack.cluster.jobs()[&job].state();
    let reason = Reason::Unanswered.code();
    assert_eq!(state, JobState::Stuck { reason });
    let vm = &rack.cluster.vms()[&VM];
    assert!(vm.granted().vcpus > 3, "it may be the guest's");
    assert_eq!(desired(&rack), Share::new(3, 30));
    assert_eq!(
        rack.append(Change::Abandon { job }, &[]),
        Err(Refusal::TooLate { job })
    );
    // And it can be asked for again, or taken away.
    rack.start(resize(3, 30));
    rack.work();
    assert_eq!(rack.cluster.vms()[&VM].granted(), Share::new(3, 30));
}

#[test]
fn vcpus_come_and_go_by_their_numbers() {
    let mut rack = rack();
    rack.boot(Share::new(3, 30));
    let place = |vcpu, to| Wish::PlaceVcpu {
        vm: VM,
        vcpu: VcpuId(vcpu),
        to,
    };
    rack.start(place(1, None));
    assert_eq!(rack.cluster.vms()[&VM].desired(), Share::new(2, 30));
    rack.work();
    let homes = rack.cluster.vms()[&VM].homes();
    let there: Vec<bool> = homes.iter().take(4).map(Option::is_some).collect();
    assert_eq!(there, [true, false, true, false]);
    assert_eq!(rack.ask(place(1, None)), Ok(Done::Nothing));
    rack.start(place(7, Some(NodeId(2))));
    rack.work();
    let vm = &rack.cluster.vms()[&VM];
    assert_eq!(vm.home(VcpuId(7)), Some(NodeId(2)));
    assert_eq!(
        (vm.desired(), vm.granted()),
        (Share::new(3, 30), Share::new(3, 30))
    );
    for vcpu in [0, 2] {
        rack.start(place(vcpu, None));
        rack.work();
    }
    let nearest = Share::new(1, 30);
    assert_eq!(
        rack.ask(place(7, None)),
        Err(Refusal::OutOfRange { nearest })
    );
}

/// Two nodes of four cores, and a VM with seats for three vCPUs on the first
/// and for two on the second.
fn seated(policy: &str) -> Rack {
    let mut rack = Rack::new(&[(0, 4, 64), (1, 4, 64)], Share::new(8, 64));
    rack.must(Change::RemoveVm { vm: VM });
    let create = Change::CreateVm {
        vm: VM,
        most: Share::new(5, 64),
        least: Share::new(1, 1),
        block: 1,
    };
    for wrong in [&[0, 0, 3, 0][..], &[0, 0, 6, 0], &[0, 0, 5], &[0; 3]] {
        assert_eq!(rack.append(create, wrong), Err(Refusal::Malformed));
    }
    rack.append(create, &[0, 0, 3, 0, 1, 0, 2, 0])
        .expect("made");
    rack.policy(policy);
    rack
}

fn homes(rack: &Rack) -> Vec<Option<u16>> {
    let homes = rack.cluster.vms()[&VM].homes();
    homes.iter().map(|home| home.map(|node| node.0)).collect()
}

#[test]
fn vcpus_come_to_where_the_guest_takes_them_to_be() {
    let even = "[[constraint]]\nname = \"even\"\nkind = \"spread\"\nweight = 8\nslice-weight = 1\n";
    let mut rack = seated(even);
    rack.boot(Share::new(2, 64));
    assert_eq!(homes(&rack), [Some(0), None, None, Some(1), None]);
    rack.start(resize(4, 64));
    rack.work();
    assert_eq!(homes(&rack), [Some(0), Some(0), None, Some(1), Some(1)]);
    // Without a seat left where they are to be, others will do.
    rack.must(Change::Cordon {
        node: NodeId(0),
        on: true,
    });
    rack.start(resize(5, 64));
    rack.work();
    assert_eq!(homes(&rack)[2], Some(1));
    assert_eq!(rack.cluster.vms()[&VM].seat(VcpuId(2)), Some(NodeId(0)));
}

#[test]
fn a_vcpu_that_is_pinned_comes_where_it_is_pinned_to_or_not_at_all() {
    let pin =
        "[[constraint]]\nname = \"odd\"\nkind = \"pin\"\nhard = true\nvm = 0\nvcpu = 1\nnode = 1\n";
    let mut rack = seated(pin);
    rack.boot(Share::new(1, 64));
    assert_eq!(homes(&rack)[0], Some(0), "the guest boots on it");
    for vcpus in 2..=5 {
        rack.start(resize(vcpus, 64));
        rack.work();
        assert_eq!(rack.cluster.vms()[&VM].granted(), Share::new(vcpus, 64));
        assert!(matches!(homes(&rack)[1], None | Some(1)));
    }
    assert_eq!(homes(&rack)[1], Some(1), "no other was left");
}

#[test]
fn a_node_that_has_left_waits_to_be_admitted() {
    let mut rack = rack();
    let node = NodeId(2);
    assert_eq!(
        rack.append(Change::Admit { node }, &[]),
        Err(Refusal::NoNode { node })
    );
    rack.must(Change::Leave { node });
    assert!(rack.cluster.has_left(node));
    let mut fresh = Cluster::default();
    fresh.load(0, &rack.snapshot()).expect("a snapshot");
    assert_eq!(fresh, rack.cluster);
    rack.must(Change::Admit { node });
    assert!(!rack.cluster.has_left(node));
}

#[test]
fn a_lost_node_ends_its_jobs_and_takes_what_it_gave() {
    let mut rack = rack();
    rack.boot(Share::new(6, 128));
    let gave = rack.shares()[0];
    assert!(gave.is_open());
    let job = rack.start(Wish::Drain { node: NodeId(0) });
    rack.turn(&mut done());
    rack.must(Change::Lose { node: NodeId(0) });
    assert_eq!(
        rack.cluster.jobs()[&job].state(),
        JobState::Stuck { reason: NODE_LOST }
    );
    let left = rack.cluster.vms()[&VM].granted();
    assert_eq!(left, Share::new(6 - gave.vcpus, 128 - gave.slices));
    let held: u32 = rack.cluster.vms()[&VM]
        .placements()
        .values()
        .map(|row| row.held.vcpus)
        .sum();
    assert_eq!(
        held, left.vcpus,
        "what was leased for the job is free again"
    );
}

#[test]
fn every_change_leaves_an_audit_line() {
    let mut rack = rack();
    rack.boot(Share::new(2, 32));
    let position = rack.log.len() as u64;
    let job = rack.start(resize(3, 48));
    let _ = rack.ask(resize(0, 0));
    let lines: Vec<String> = rack
        .cluster
        .journal()
        .since(position)
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        lines,
        [
            format!(
                "#{position} member 0: request 0000000000000007: resize vm 0 to 3 vCPUs and 96M -> job {}",
                job.0
            ),
            format!(
                "#{} member 0: request 0000000000000007: resize vm 0 to 0 vCPUs and 0M -> refused (8)",
                position + 1
            ),
        ]
    );
}

#[test]
fn plans_that_do_not_fit_are_refused_by_every_replica() {
    let mut rack = rack();
    rack.boot(Share::new(2, 32));
    let plan = rack.dry_run(resize(5, 64)).expect("there is room");
    let job = rack.start(resize(6, 64));
    let (op, payload) = plan.into_op(job);
    let before = rack.cluster.vms().clone();
    let outcome = rack.cluster.apply(&op, payload, at(99));
    assert_eq!(outcome, Err(Refusal::BadPlan), "it does another thing");
    let half = &payload[..payload.len() - 7];
    assert_eq!(
        rack.cluster.apply(&op, half, at(100)),
        Err(Refusal::BadPlan)
    );
    assert_eq!(rack.cluster.vms(), &before);
    // The tables change under a plan: one more node has no room left.
    let plan = rack.dry_run(resize(6, 64)).expect("there is room");
    for node in 0..3 {
        let node = NodeId(node);
        let share = Share::new(rack.cluster.nodes()[&node].free().vcpus, 0);
        rack.must(Change::Lease {
            holder: node,
            node,
            share,
        });
    }
    let (op, payload) = plan.into_op(job);
    assert!(matches!(
        rack.cluster.apply(&op, payload, at(101)),
        Err(Refusal::NoRoom { .. })
    ));
}
