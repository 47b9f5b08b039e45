//! The control role, as operators and nodes meet it.

mod support;

use control_plane::cluster::{
    Change, Cluster, Done, Job, JobState, Op, Refusal, Step, StepKind, StepResult, Wish,
};
use control_plane::optimise::Share;
use control_plane::role::{Executor, Reply, Role, Tables};
use proptest::prelude::*;
use support::{Rack, VM, wall};
use vmm_shared::addr::{NodeId, VcpuId};
use vmm_shared::log::ReplicaError;
use vmm_shared::rpc::console::{Answer, ChangeRequest, Method, PART_BYTES, Part, Verdict};
use zerocopy::IntoBytes;

impl Tables for Rack {
    fn append(&mut self, op: Op, payload: &[u8]) -> Result<Result<Done, Refusal>, ReplicaError> {
        let change = op.change().expect("only what can be read gets here");
        Ok(Rack::append(self, change, payload))
    }

    fn read<R>(&mut self, query: impl FnOnce(&Cluster) -> R) -> Result<R, ReplicaError> {
        Ok(query(&self.cluster))
    }
}

/// Nodes that can do all but change memory.
#[derive(Default)]
struct Nodes {
    /// What the guest is found to have given up or got.
    found: Option<Change>,
}

impl Executor for Nodes {
    fn can(&self, step: &Step) -> Result<(), &'static str> {
        match step.slices > 0 && !step.is_bookkeeping() {
            true => Err("cannot change memory"),
            false => Ok(()),
        }
    }

    fn drive(&mut self, _: &Cluster, _: &Job, _: &Step) -> Option<StepResult> {
        Some(StepResult::Done)
    }

    fn found(&self, _: &Cluster) -> Option<Change> {
        self.found
    }
}

fn rack() -> Rack {
    let mut rack = Rack::new(&[(0, 4, 100), (1, 4, 100), (2, 0, 0)], Share::new(8, 200));
    rack.boot(Share::new(2, 100));
    rack
}

fn ask(role: &mut Role, rack: &mut Rack, change: Change, upload: u32, dry: bool) -> Answer {
    let mut op = [0; 32];
    op.copy_from_slice(Op::from(change).as_bytes());
    let request = ChangeRequest {
        request: 9,
        upload_len: upload,
        dry_run: dry.into(),
        op,
    };
    let body = request.as_bytes();
    match role.answer(
        Method::Change as u32,
        body,
        rack,
        &Nodes::default(),
        &wall(),
    ) {
        Reply::Answer(answer) => answer,
        other => panic!("{other:?}"),
    }
}

fn resize(vcpus: u32, slices: u32) -> Change {
    let to = Share::new(vcpus, slices);
    let wish = Wish::Resize { vm: VM, to };
    Change::Ask { request: 9, wish }
}

fn verdict(answer: &Answer) -> Verdict {
    Verdict::from_number(answer.verdict).expect("one")
}

#[test]
fn a_request_becomes_a_job_and_the_same_one_joins_it() {
    let (mut role, mut rack) = (Role::default(), rack());
    let before = rack.cluster.digest();
    let dry = ask(&mut role, &mut rack, resize(4, 100), 0, true);
    assert_eq!(verdict(&dry), Verdict::Applied);
    assert_eq!(rack.cluster.digest(), before, "a dry run changes nothing");
    let first = ask(&mut role, &mut rack, resize(4, 100), 0, false);
    assert_eq!(verdict(&first), Verdict::Started);
    let second = ask(&mut role, &mut rack, resize(4, 100), 0, false);
    assert_eq!((verdict(&second), second.job), (Verdict::Joined, first.job));
    let other = ask(&mut role, &mut rack, resize(3, 100), 0, false);
    assert_eq!(verdict(&other), Verdict::Refused);
    assert!(other.sentence().contains("job"), "{}", other.sentence());
    while role
        .turn(&mut rack, &mut Nodes::default(), &wall())
        .expect("a log")
    {}
    let job = rack.cluster.jobs().values().last().expect("the job");
    assert!(matches!(job.state(), JobState::Finished { .. }));
    assert_eq!(rack.cluster.vms()[&VM].granted(), Share::new(4, 100));
    let again = ask(&mut role, &mut rack, resize(4, 100), 0, false);
    assert_eq!(verdict(&again), Verdict::Nothing);
}

#[test]
fn what_the_guest_has_given_up_by_itself_is_not_granted_any_more() {
    let (mut role, mut rack) = (Role::default(), rack());
    let home = rack.cluster.vms()[&VM]
        .home(VcpuId(1))
        .expect("it is there");
    let given_up = Change::GivenUp {
        vm: VM,
        vcpu: Some(VcpuId(1)),
        node: home,
        slices: 0,
    };
    let mut nodes = Nodes {
        found: Some(given_up),
    };
    // As long as a job changes the VM, that is the job's to find out.
    let asked = ask(&mut role, &mut rack, resize(3, 100), 0, false);
    assert_eq!(verdict(&asked), Verdict::Started);
    let busy = rack.append(given_up, &[]);
    assert!(matches!(busy, Err(Refusal::Busy { .. })), "{busy:?}");
    while rack.cluster.job_of(VM).is_some() {
        role.turn(&mut rack, &mut nodes, &wall()).expect("a log");
    }
    assert!(
        role.turn(&mut rack, &mut nodes, &wall()).expect("a log"),
        "there was something to do"
    );
    let vm = &rack.cluster.vms()[&VM];
    assert_eq!(vm.desired(), Share::new(3, 100));
    assert_eq!(vm.granted(), Share::new(2, 100));
    assert_eq!(vm.home(VcpuId(1)), None);
    // So the same request is no success by itself.
    let again = ask(&mut role, &mut rack, resize(3, 100), 0, false);
    assert_eq!(verdict(&again), Verdict::Started);
    while role
        .turn(&mut rack, &mut Nodes::default(), &wall())
        .expect("a log")
    {}
    assert_eq!(rack.cluster.vms()[&VM].granted(), Share::new(3, 100));

    for (change, refusal) in [
        (given_up, None),
        (given_up, Some("no-vcpu")),
        (
            Change::GivenUp {
                vm: VM,
                vcpu: None,
                node: home,
                slices: 101,
            },
            Some("no-room"),
        ),
        (
            Change::GivenUp {
                vm: VM,
                vcpu: None,
                node: NodeId(2),
                slices: 1,
            },
            Some("no-room"),
        ),
    ] {
        let said = rack.append(change, &[]).err();
        assert_eq!(said.map(|why| why.code().1), refusal, "{change:?}");
    }
}

#[test]
fn what_the_guest_has_got_for_no_job_is_granted() {
    let (mut role, mut rack) = (Role::default(), rack());
    let before = rack.cluster.vms()[&VM].granted();
    let absent = rack.cluster.vms()[&VM].homes().iter();
    let absent = absent.zip(0..).find(|(home, _)| home.is_none());
    let (_, vcpu) = absent.expect("it could have more");
    let node = NodeId(1);
    let got = |vcpu, slices| Change::Got {
        vm: VM,
        vcpu,
        node,
        slices,
    };
    let mut nodes = Nodes {
        found: Some(got(Some(VcpuId(vcpu)), 0)),
    };
    assert!(role.turn(&mut rack, &mut nodes, &wall()).expect("a log"));
    rack.append(got(None, 7), &[]).expect("there is room");
    let vm = &rack.cluster.vms()[&VM];
    assert_eq!(vm.home(VcpuId(vcpu)), Some(node));
    let after = Share::new(before.vcpus + 1, before.slices + 7);
    assert_eq!(vm.granted(), after);
    rack.cluster.check().expect("sound tables");
    for (change, refusal) in [
        (got(Some(VcpuId(vcpu)), 0), "no-vcpu"),
        (got(Some(VcpuId(99)), 0), "no-vcpu"),
        (got(None, 0), "no-room"),
        (got(None, u32::MAX), "no-room"),
    ] {
        let said = rack.append(change, &[]).expect_err("it can't be");
        assert_eq!(said.code().1, refusal, "{change:?}");
    }
    rack.cluster.check().expect("sound tables");
    assert_eq!(rack.cluster.vms()[&VM].granted(), after);
    let asked = ask(&mut role, &mut rack, resize(2, 107), 0, false);
    assert_eq!(verdict(&asked), Verdict::Started);
    let busy = rack.append(got(None, 1), &[]);
    assert!(matches!(busy, Err(Refusal::Busy { .. })), "{busy:?}");
}

#[test]
fn what_cannot_be_done_is_refused_before_anything_is_changed() {
    let (mut role, mut rack) = (Role::default(), rack());
    for (change, words) in [
        (resize(2, 120), "this version cannot change memory"),
        (resize(0, 100), "nearest is 1 vCPUs and 200M"),
        (resize(9, 100), "nearest is 8 vCPUs and 200M"),
        (Change::TakeOver { node: NodeId(1) }, "not for operators"),
        (
            Change::Cordon {
                node: NodeId(7),
                on: true,
            },
            "no node 7",
        ),
        (
            Change::Cancel {
                job: control_plane::cluster::JobId(77),
            },
            "no job 77",
        ),
    ] {
        let before = rack.shares();
        let answer = ask(&mut role, &mut rack, change, 0, false);
        assert_eq!(verdict(&answer), Verdict::Refused, "{change:?}");
        let said = answer.sentence();
        assert!(said.contains(words), "no {words:?} in {said:?}");
        assert_eq!(rack.shares(), before);
        assert_eq!(rack.cluster.jobs().len(), 1, "the one that booted it");
    }
}

#[test]
fn a_full_rack_is_refused_with_the_nodes_that_lack_what() {
    let (mut role, mut rack) = (Role::default(), rack());
    rack.must(Change::Cordon {
        node: NodeId(1),
        on: true,
    });
    let answer = ask(&mut role, &mut rack, resize(6, 100), 0, false);
    assert_eq!(verdict(&answer), Verdict::Refused);
    let said = answer.sentence();
    assert!(said.contains("cordon") && said.contains("node 1"), "{said}");
}

#[test]
fn a_policy_comes_in_parts_and_all_of_them_are_needed() {
    let (mut role, mut rack) = (Role::default(), rack());
    let text = "[[constraint]]\nname = \"even\"\nkind = \"spread\"\nweight = 3\n".to_owned()
        + "[[constraint]]\nname = \"stay\"\nkind = \"fewest-moves\"\nweight = 2\n"
        + "[[constraint]]\nname = \"near\"\nkind = \"near-memory\"\nweight = 2\n"
        + "[[constraint]]\nname = \"most\"\nkind = \"spread\"\nhard = true\ncores = 3\n";
    let policy = control_plane::policy::text::parse(&text).expect("a policy");
    let bytes = policy.as_bytes();
    assert!(bytes.len() > PART_BYTES);
    let len = u32::try_from(bytes.len()).expect("short");
    let send = |role: &mut Role, rack: &mut Rack, from: usize| {
        let rest = &bytes[from..];
        let count = rest.len().min(PART_BYTES);
        let mut part = Part {
            request: 9,
            offset: u32::try_from(from).expect("short"),
            len: u32::try_from(count).expect("short"),
            bytes: [0; PART_BYTES],
        };
        part.bytes[..count].copy_from_slice(&rest[..count]);
        let method = Method::Part as u32;
        role.answer(method, part.as_bytes(), rack, &Nodes::default(), &wall())
    };
    assert_eq!(send(&mut role, &mut rack, PART_BYTES), Reply::BadArguments);
    assert_eq!(send(&mut role, &mut rack, 0), Reply::Taken);
    assert_eq!(
        send(&mut role, &mut rack, 0),
        Reply::Taken,
        "from the start"
    );
    assert_eq!(send(&mut role, &mut rack, PART_BYTES), Reply::Taken);
    let answer = ask(&mut role, &mut rack, Change::LoadPolicy, len, false);
    assert_eq!(verdict(&answer), Verdict::Applied);
    assert_eq!(rack.cluster.policy(), &policy);
}

#[test]
fn a_job_goes_on_after_a_new_role_takes_over() {
    let mut rack = rack();
    let mut first = Role::default();
    let alive = |node: NodeId| node != NodeId(2);
    assert_eq!(first.take_over(NodeId(2), |_| true, &mut rack), Ok(true));
    assert_eq!(first.take_over(NodeId(2), |_| true, &mut rack), Ok(true));
    assert_eq!(rack.cluster.controller(), (Some(NodeId(2)), 1));
    let mut other = Role::default();
    assert_eq!(other.take_over(NodeId(1), |_| true, &mut rack), Ok(false));
    // The same node after a restart.
    first = Role::default();
    assert_eq!(first.take_over(NodeId(2), |_| true, &mut rack), Ok(true));
    assert_eq!(rack.cluster.controller(), (Some(NodeId(2)), 2));
    ask(&mut first, &mut rack, resize(5, 100), 0, false);
    // The plan, and two of its steps.
    for _ in 0..3 {
        assert_eq!(
            first.turn(&mut rack, &mut Nodes::default(), &wall()),
            Ok(true)
        );
    }
    let mut second = Role::default();
    assert_eq!(second.take_over(NodeId(1), alive, &mut rack), Ok(true));
    assert_eq!(rack.cluster.controller(), (Some(NodeId(1)), 3));
    while second
        .turn(&mut rack, &mut Nodes::default(), &wall())
        .expect("a log")
    {}
    assert_eq!(rack.cluster.vms()[&VM].granted(), Share::new(5, 100));
    let adds = rack.cluster.jobs().values().last().expect("the job");
    let adds = adds
        .steps()
        .iter()
        .filter(|step| step.kind == StepKind::Add);
    assert_eq!(adds.count(), 3);
}

#[test]
fn a_vcpu_moves_where_it_is_told() {
    let (mut role, mut rack) = (Role::default(), rack());
    let home = |rack: &Rack| rack.cluster.vms()[&VM].home(VcpuId(1));
    let from = home(&rack).expect("it runs");
    let to = NodeId(1 - from.0);
    let wish = Wish::PlaceVcpu {
        vm: VM,
        vcpu: VcpuId(1),
        to: Some(to),
    };
    ask(
        &mut role,
        &mut rack,
        Change::Ask { request: 9, wish },
        0,
        false,
    );
    while role
        .turn(&mut rack, &mut Nodes::default(), &wall())
        .expect("a log")
    {}
    assert_eq!(home(&rack), Some(to));
}

proptest! {
    /// Whatever comes: no panic, and the tables stay whole.
    #[test]
    fn garbage_changes_nothing_that_it_may_not(
        calls in prop::collection::vec((0_u32..4, prop::collection::vec(any::<u8>(), 0..220)), 1..20),
        ops in prop::collection::vec((0_u8..20, any::<[u8; 31]>(), any::<bool>()), 1..20),
    ) {
        let (mut role, mut rack) = (Role::default(), rack());
        for (method, body) in calls {
            role.answer(method, &body, &mut rack, &Nodes::default(), &wall());
        }
        for (code, rest, dry) in ops {
            let mut op = [code; 32];
            op[1..].copy_from_slice(&rest);
            let request = ChangeRequest { request: 1, upload_len: 0, dry_run: dry.into(), op };
            role.answer(1, request.as_bytes(), &mut rack, &Nodes::default(), &wall());
        }
        for _ in 0..50 {
            let _ = role.turn(&mut rack, &mut Nodes::default(), &wall());
        }
        prop_assert_eq!(rack.cluster.check(), Ok(()));
    }
}
