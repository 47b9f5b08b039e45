//! Replicas that apply the same log are equal, whatever is in the log, and
//! nothing is ever leased twice or leaked.

mod support;

use control_plane::cluster::{
    Change, Cluster, Holder, JobId, Op, Refusal, StepKind, StepResult, Trial, VmId, VmPhase, Wish,
};
use control_plane::optimise::Share;
use control_plane::place::plan::plan;
use proptest::prelude::*;
use support::{LONG, Rack, VM, at, wall};
use vmm_shared::addr::{NodeId, VcpuId};
use vmm_shared::log::StateMachine;
use zerocopy::{FromBytes, IntoBytes};

const POLICIES: [&str; 3] = [
    "",
    r#"
[[constraint]]
name = "domains"
kind = "failure-domain"
percent = 70
hard = true
[[constraint]]
name = "even"
kind = "spread"
weight = 3
[[constraint]]
name = "stay"
kind = "fewest-moves"
weight = 2
"#,
    r#"
[[constraint]]
name = "host"
kind = "headroom"
cores = 1
slices = 2
hard = true
[[constraint]]
name = "few"
kind = "pack"
weight = 9
[[constraint]]
name = "near"
kind = "near-memory"
weight = 2
[[constraint]]
name = "first"
kind = "pin"
hard = true
vm = 0
vcpu = 0
node = 1
"#,
];

/// What a test does next.
#[derive(Clone, Debug)]
enum Act {
    Change(Change),
    Policy(usize),
    /// The control role does the next thing; steps end like that.
    Turn(StepResult),
    /// A replica joins by a snapshot and takes the place of this one.
    Rejoin,
    Garbage([u8; 32], Vec<u8>),
}

fn shares() -> impl Strategy<Value = Share> {
    (0_u32..8, 0_u32..40).prop_map(|(vcpus, slices)| Share::new(vcpus, slices))
}

fn wishes() -> impl Strategy<Value = Wish> {
    let node = (0_u16..5).prop_map(NodeId);
    let vm = (0_u16..2).prop_map(VmId);
    prop_oneof![
        4 => (vm.clone(), shares()).prop_map(|(vm, to)| Wish::Resize { vm, to }),
        4 => (vm.clone(), 0_u16..8, prop::option::of(node.clone()))
            .prop_map(|(vm, vcpu, to)| Wish::PlaceVcpu { vm, vcpu: VcpuId(vcpu), to }),
        1 => (vm.clone(), node.clone(), node.clone(), 0_u32..10)
            .prop_map(|(vm, from, to, count)| Wish::MoveSlices { vm, from, to, count }),
        2 => node.prop_map(|node| Wish::Drain { node }),
        2 => vm.prop_map(|vm| Wish::Rebalance { vm }),
    ]
}

fn results() -> impl Strategy<Value = StepResult> {
    prop_oneof![
        12 => Just(StepResult::Done),
        1 => (0_u32..6).prop_map(|slices| StepResult::Short { slices, reason: 1 }),
        1 => Just(StepResult::Failed { reason: 2 }),
    ]
}

fn changes() -> impl Strategy<Value = Change> {
    let node = (0_u16..5).prop_map(NodeId);
    let vm = (0_u16..2).prop_map(VmId);
    let job = (1_u32..6).prop_map(JobId);
    prop_oneof![
        2 => (node.clone(), 0_u16..3, shares())
            .prop_map(|(node, domain, size)| Change::Join { node, domain, size }),
        1 => node.clone().prop_map(|node| Change::Leave { node }),
        1 => node.clone().prop_map(|node| Change::Lose { node }),
        1 => node.clone().prop_map(|node| Change::Admit { node }),
        2 => (node.clone(), any::<bool>()).prop_map(|(node, on)| Change::Cordon { node, on }),
        1 => (vm.clone(), shares()).prop_map(|(vm, most)| Change::CreateVm {
            vm,
            most,
            least: Share::new(1, 0),
            block: 1,
        }),
        1 => vm.clone().prop_map(|vm| Change::RemoveVm { vm }),
        2 => vm.clone().prop_map(|vm| Change::Phase { vm, phase: VmPhase::Running }),
        1 => (vm, shares()).prop_map(|(vm, share)| Change::Seen { vm, share }),
        10 => wishes().prop_map(|wish| Change::Ask { request: 1, wish }),
        2 => prop_oneof![node.clone(), Just(NodeId(u16::MAX))]
            .prop_map(|node| Change::TakeOver { node }),
        2 => job.clone().prop_map(|job| Change::Cancel { job }),
        1 => (job, 0_u32..4, results())
            .prop_map(|(job, index, result)| Change::Step { job, index, result }),
        2 => (node.clone(), node.clone(), shares())
            .prop_map(|(holder, node, share)| Change::Lease { holder, node, share }),
        2 => (node.clone(), node, shares())
            .prop_map(|(holder, node, share)| Change::Return { holder, node, share }),
    ]
}

fn acts() -> impl Strategy<Value = Act> {
    prop_oneof![
        10 => changes().prop_map(Act::Change),
        1 => (0..POLICIES.len()).prop_map(Act::Policy),
        20 => results().prop_map(Act::Turn),
        1 => Just(Act::Rejoin),
        1 => (any::<[u8; 32]>(), prop::collection::vec(any::<u8>(), 0..80))
            .prop_map(|(op, payload)| Act::Garbage(op, payload)),
    ]
}

fn act(rack: &mut Rack, act: Act) {
    match act {
        Act::Change(change) => {
            // Refusals are fine; panics and broken tables are not.
            let _ = rack.append(change, &[]);
        }
        Act::Policy(index) => rack.policy(POLICIES[index]),
        Act::Turn(result) => {
            let next = |cluster: &Cluster| {
                let short = |slices| {
                    let mut steps = cluster.jobs().values().filter_map(|job| job.current());
                    steps.next().is_some_and(|(_, step)| slices < step.slices)
                };
                match result {
                    StepResult::Short { slices, .. } if !short(slices) => StepResult::Done,
                    other => other,
                }
            };
            rack.turn(&mut |cluster, _| next(cluster));
        }
        Act::Rejoin => {
            let mut fresh = Cluster::default();
            fresh.load(0, &rack.snapshot()).expect("a snapshot");
            assert_eq!(fresh, rack.cluster);
            rack.cluster = fresh;
        }
        Act::Garbage(op, payload) => {
            let op = Op::read_from_bytes(&op).expect("any bytes are an operation");
            let _ = rack.cluster.apply(&op, &payload, at(rack.log.len()));
            rack.log.push((op, payload));
            assert_eq!(rack.cluster.check(), Ok(()));
        }
    }
}

fn rows_of_nobody_known(cluster: &Cluster) -> usize {
    let nodes = cluster.nodes().values();
    let rows = nodes.flat_map(|node| node.cores().iter().chain(node.slices()));
    let unknown = |holder: &&Holder| match holder {
        Holder::Vm(vm) | Holder::Leased(vm) => !cluster.vms().contains_key(vm),
        Holder::Pool(node) => !cluster.nodes().contains_key(node),
        Holder::Free => false,
    };
    rows.filter(unknown).count()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn the_state_is_a_function_of_the_log(acts in prop::collection::vec(acts(), 1..120)) {
        let nodes = [(0, 4, 20), (1, 6, 30), (2, 3, 40), (0, 5, 10)];
        let mut rack = Rack::new(&nodes, Share::new(8, 60));
        rack.boot(Share::new(3, 12));
        for next in acts {
            act(&mut rack, next);
        }
        let mut replica = Cluster::default();
        for (position, (op, payload)) in rack.log.iter().enumerate() {
            let _ = replica.apply(op, payload, at(position));
        }
        prop_assert_eq!(&replica, &rack.cluster);
        prop_assert_eq!(rows_of_nobody_known(&replica), 0);
        // What is left to do gets done, and then nothing is leased in vain.
        rack.must_run();
        rack.work();
        for vm in rack.cluster.vms().values() {
            for placement in vm.placements().values() {
                prop_assert_eq!(placement.held, placement.granted);
            }
        }
    }

    #[test]
    fn damaged_snapshots_are_refused_or_consistent(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<Option<prop::sample::Index>>(),
    ) {
        let mut rack = Rack::new(&[(0, 4, 20), (1, 6, 30)], Share::new(8, 60));
        rack.policy(POLICIES[2]);
        rack.boot(Share::new(3, 12));
        rack.start(Wish::Resize { vm: VM, to: Share::new(5, 20) });
        rack.turn(&mut |_, _| StepResult::Done);
        let mut bytes = rack.snapshot();
        for (place, value) in changes {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let mut fresh = Cluster::default();
        if fresh.load(0, &bytes).is_ok() {
            prop_assert_eq!(fresh.check(), Ok(()));
        }
    }

    #[test]
    fn no_step_of_a_plan_breaks_what_its_ends_keep(
        sizes in prop::collection::vec((0_u16..3, 1_u32..8, 1_u32..40), 2..7),
        policy in 0..POLICIES.len(),
        first in shares(),
        second in shares(),
        drained in 0_u16..3,
    ) {
        let mut rack = Rack::new(&sizes, Share::new(8, 60));
        rack.policy(POLICIES[policy]);
        let asked = |share: Share| Share::new(share.vcpus.max(1), share.slices.max(1));
        rack.start(Wish::Resize { vm: VM, to: asked(first) });
        rack.work();
        prop_assume!(rack.cluster.vms()[&VM].granted() == asked(first));
        let node = NodeId(drained);
        let to = asked(second);
        let wishes = [Wish::Resize { vm: VM, to }, Wish::Rebalance { vm: VM }, Wish::Drain { node }];
        for wish in wishes {
            if matches!(wish, Wish::Drain { .. }) && !rack.cluster.nodes().contains_key(&node) {
                continue;
            }
            let Ok(plan) = plan(&rack.cluster, wish, LONG, &wall()) else {
                continue;
            };
            check_plan(&rack, &plan.steps)?;
        }
    }
}

/// Takes the steps one by one: between start and end, no node and no domain
/// ever gives more than at one of them, and no more rows are held than there
/// are.
fn check_plan(rack: &Rack, steps: &[control_plane::cluster::Step]) -> Result<(), TestCaseError> {
    let start = &rack.cluster.vms()[&VM];
    let mut trial = Trial::new(&rack.cluster);
    for step in steps {
        prop_assert_eq!(trial.step(step), Ok::<(), Refusal>(()));
    }
    let Some(end) = trial.vms().get(&VM).cloned() else {
        return Ok(());
    };
    let mut trial = Trial::new(&rack.cluster);
    let given = |vm: &control_plane::cluster::Vm, domain: u16| {
        let nodes = rack
            .cluster
            .nodes()
            .iter()
            .filter(|(_, row)| row.domain() == domain);
        nodes.fold((0, 0), |sum, (node, _)| {
            let share = vm.granted_at(*node);
            (sum.0 + share.vcpus, sum.1 + share.slices)
        })
    };
    // vCPUs that have to change places need one core more for the time.
    let circle = steps.iter().any(|lease| {
        let back = |release: &control_plane::cluster::Step| {
            release.kind == StepKind::Release && release.from == lease.to && release.cores > 0
        };
        lease.kind == StepKind::Lease && lease.cores > 0 && steps.iter().any(back)
    });
    for step in steps {
        trial.step(step).expect("tried before");
        let now = &trial.vms()[&VM];
        for (node, row) in rack.cluster.nodes() {
            let (a, b, now) = (
                start.granted_at(*node),
                end.granted_at(*node),
                now.granted_at(*node),
            );
            prop_assert!(circle || now.vcpus <= a.vcpus.max(b.vcpus), "{step:?}");
            prop_assert!(now.slices <= a.slices.max(b.slices), "{step:?}");
            let (a, b) = (given(start, row.domain()), given(&end, row.domain()));
            let now = given(&trial.vms()[&VM], row.domain());
            prop_assert!(circle || now.0 <= a.0.max(b.0), "{step:?}");
            prop_assert!(now.1 <= a.1.max(b.1), "{step:?}");
        }
        if step.kind != StepKind::Lease {
            prop_assert!(now.home(VcpuId(0)).is_some(), "the boot CPU stays");
        }
    }
    Ok(())
}

#[test]
fn the_wire_form_is_total() {
    // Every code and sort: none panics, and what is read is written alike.
    for code in 0..=u8::MAX {
        for sort in 0..=u8::MAX {
            let mut op = Op::from(Change::LoadPolicy);
            op.as_mut_bytes()[0] = code;
            op.as_mut_bytes()[1] = sort;
            if let Some(change) = op.change() {
                assert_eq!(Op::from(change).change(), Some(change));
            }
        }
    }
}
