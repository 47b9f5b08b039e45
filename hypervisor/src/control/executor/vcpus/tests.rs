//! The executor, and a devices' node that is the test's own hand.

#![expect(unsafe_code, reason = "a leaked buffer as the control region")]

use core::cell::Cell;
use core::ptr::NonNull;
use core::sync::atomic::Ordering;

use control_plane::cluster::{Change, Cluster, Done, JobId, Op, VmId, VmPhase, Wish};
use control_plane::optimise::Share;
use control_plane::role::Executor;
use vmm_shared::control::{BUNDLE_OFFSET, BootConfig, ControlRegion};
use vmm_shared::log::{At, MemberId, StateMachine};
use vmm_shared::region::CONTENT_OFFSET;
use vmm_shared::shm::SharedMem;
use zerocopy::{FromZeros, IntoBytes};

use super::*;

const VM: VmId = VmId(0);

/// Two nodes of two cores, and a VM that has had vCPUs 0 and 2, one on each.
struct World {
    control: ControlRegion,
    config: BootConfig,
    cluster: Cluster,
    rings: Cell<u32>,
    is_in: bool,
}

fn region() -> ControlRegion {
    let len = usize::try_from(CONTENT_OFFSET + BUNDLE_OFFSET).expect("64-bit");
    let memory = Box::leak(vec![0_u64; len / 8].into_boxed_slice());
    let base = NonNull::new(memory.as_mut_ptr()).expect("not null").cast();
    // SAFETY: leaked, aligned, and reached through the window only.
    ControlRegion::new(unsafe { SharedMem::new(base, len) }).expect("large enough")
}

fn at(node: u16, core: u16) -> Location {
    let node = NodeId(node);
    Location { node, core }
}

impl World {
    fn new() -> Self {
        let mut config = BootConfig::new_zeroed();
        config.nodes = 2;
        for share in &mut config.shares[..2] {
            (share.cores, share.vcpus, share.max_vcpus) = (2, 1, 2);
        }
        let mut world = Self {
            control: region(),
            config,
            cluster: Cluster::default(),
            rings: Cell::new(0),
            is_in: true,
        };
        for node in 0..2 {
            world.append(Change::Join {
                node: NodeId(node),
                domain: node,
                size: Share::new(2, 4),
            });
        }
        let create = Change::CreateVm {
            vm: VM,
            most: Share::new(4, 4),
            least: Share::new(1, 1),
        };
        world.with(create, &[0, 0, 2, 0, 1, 0, 2, 0]);
        let job = world.ask(Wish::Resize {
            vm: VM,
            to: Share::new(2, 4),
        });
        let shares = [(NodeId(0), Share::new(1, 2)), (NodeId(1), Share::new(1, 2))];
        let steps = control_plane::place::steps::steps(&world.cluster, VM, &shares);
        world.with(Change::Plan { job }, steps.expect("a VM").as_bytes());
        while let Some((index, _)) = world.cluster.jobs()[&job].current() {
            let result = StepResult::Done;
            world.append(Change::Step { job, index, result });
        }
        let phase = VmPhase::Running;
        world.append(Change::Phase { vm: VM, phase });
        for (vcpu, node) in [(0, 0), (2, 1)] {
            world.record(vcpu).set_place(Place::At(at(node, 0)));
            world.record(vcpu).set_started(true);
        }
        world
    }

    fn with(&mut self, change: Change, payload: &[u8]) -> Done {
        let at = At {
            position: self.cluster.end(),
            member: MemberId::new(0).expect("the first"),
        };
        let done = self.cluster.apply(&Op::from(change), payload, at);
        done.unwrap_or_else(|why| panic!("{change:?}: {why}"))
    }

    fn append(&mut self, change: Change) -> Done {
        self.with(change, &[])
    }

    fn ask(&mut self, wish: Wish) -> JobId {
        match self.append(Change::Ask { request: 1, wish }) {
            Done::Started { job } => job,
            other => panic!("{other:?}"),
        }
    }

    /// A job of one step, about a vCPU.
    fn place(&mut self, vcpu: u16, to: Option<u16>) -> JobId {
        let job = self.ask(Wish::PlaceVcpu {
            vm: VM,
            vcpu: VcpuId(vcpu),
            to: to.map(NodeId),
        });
        let wish = self.cluster.jobs()[&job].wish();
        let budget = control_plane::optimise::Budget::exact(1_000_000_000);
        let plan = control_plane::place::plan::plan(&self.cluster, wish, budget, &Still);
        let (op, payload) = plan.as_ref().expect("there is room").into_op(job);
        let payload = payload.to_vec();
        self.with(op.change().expect("a plan"), &payload);
        job
    }

    fn record(&self, vcpu: u16) -> VcpuRecord {
        self.control.vcpu(VcpuId(vcpu)).expect("there is room")
    }

    /// What an executor that knows nothing of what was before makes of it.
    fn drive(&self, job: JobId) -> Option<StepResult> {
        let job = &self.cluster.jobs()[&job];
        let (_, step) = job.current().expect("a step");
        let mut executor = NodeExecutor {
            control: &self.control,
            config: &self.config,
            ring_devices: &|| self.rings.set(self.rings.get() + 1),
            may_ask: &|| self.is_in,
        };
        assert_eq!(executor.can(&step), Ok(()));
        executor.drive(&self.cluster, job, &step)
    }

    fn settle(&self, vcpu: u16, outcome: Outcome) {
        let record = self.record(vcpu);
        record.settle(record.order().expect("an order"), outcome);
    }
}

struct Still;

impl vmm_shared::log::Clock for Still {
    fn now_ns(&self) -> u64 {
        0
    }
}

#[test]
fn a_vcpu_has_come_when_the_guest_has_started_it() {
    let mut world = World::new();
    let job = world.place(1, Some(0));
    assert_eq!(world.drive(job), None);
    let record = world.record(1);
    // Core 0 has vCPU 0.
    assert_eq!(record.order(), Some(Order::Grant(at(0, 1))));
    assert_eq!((world.rings.get(), world.drive(job)), (1, None));
    record.set_place(Place::At(at(0, 1)));
    assert_eq!(world.drive(job), None, "the guest has not answered");
    world.settle(1, Outcome::Done);
    assert_eq!(world.drive(job), None, "nor started it");
    assert_eq!(record.order(), None, "and is not asked again");
    record.set_started(true);
    assert_eq!(world.drive(job), Some(StepResult::Done));
}

#[test]
fn who_takes_over_rings_for_an_order_that_stands() {
    let mut world = World::new();
    let job = world.place(2, Some(0));
    // The one before has died between the order and the ring.
    let ticket = ticket(&world.cluster.jobs()[&job]);
    let order = Order::Move(at(0, 1));
    world.record(2).ask(order, ticket).expect("free");
    let before = world.control.vm().orders().load(Ordering::Relaxed);
    assert_eq!(world.drive(job), None);
    assert_eq!(world.record(2).order(), Some(order), "the one there was");
    assert_eq!(world.rings.get(), 1);
    assert_ne!(world.control.vm().orders().load(Ordering::Relaxed), before);
    world.record(2).set_place(Place::At(at(0, 1)));
    world.settle(2, Outcome::Done);
    assert_eq!(world.drive(job), Some(StepResult::Done));
    assert_eq!(world.rings.get(), 1);
}

#[test]
fn what_the_guest_refuses_is_told_with_its_reason() {
    let mut world = World::new();
    let job = world.place(2, None);
    assert_eq!(world.drive(job), None);
    assert_eq!(world.record(2).order(), Some(Order::Reclaim));
    world.settle(2, Outcome::Refused(0x82));
    let kept = StepResult::Short {
        slices: 0,
        reason: Reason::Kept(0x82).code(),
    };
    assert_eq!(world.drive(job), Some(kept));
    let (index, _) = world.cluster.jobs()[&job].current().expect("a step");
    let result = kept;
    world.append(Change::Step { job, index, result });
    // Another job asks anew: that outcome is not its.
    let (index, _) = world.cluster.jobs()[&job].current().expect("a release");
    let result = StepResult::Done;
    world.append(Change::Step { job, index, result });
    let job = world.place(2, None);
    assert_eq!(world.drive(job), None);
    assert_eq!(world.record(2).order(), Some(Order::Reclaim));
    world.record(2).set_place(Place::Absent);
    world.settle(2, Outcome::Done);
    assert_eq!(world.drive(job), Some(StepResult::Done));
}

#[test]
fn a_vcpu_that_the_guest_does_not_take_fails_the_step() {
    for (outcome, reason) in [
        (Outcome::Refused(1), Reason::Declined(1)),
        (Outcome::NoSuchCore, Reason::NoCore),
        (Outcome::Unable, Reason::Unable),
        (Outcome::Misplaced, Reason::Misplaced),
    ] {
        let mut world = World::new();
        let job = world.place(1, Some(1));
        assert_eq!(world.drive(job), None);
        world.settle(1, outcome);
        assert_eq!(world.drive(job), Some(failed(reason)));
    }
}

#[test]
fn undoing_waits_for_what_was_ordered_and_then_takes_it_back() {
    let mut world = World::new();
    let job = world.place(1, Some(0));
    assert_eq!(world.drive(job), None);
    world.append(Change::Cancel { job });
    assert_eq!(world.drive(job), None, "the grant stands");
    let record = world.record(1);
    record.set_place(Place::At(at(0, 1)));
    world.settle(1, Outcome::Done);
    assert_eq!(world.drive(job), None);
    assert_eq!(record.order(), Some(Order::Reclaim));
    record.set_place(Place::Absent);
    world.settle(1, Outcome::Done);
    assert_eq!(world.drive(job), Some(StepResult::Done));
}

#[test]
fn undoing_what_was_never_begun_is_nothing() {
    for (vcpu, to) in [(1, Some(0)), (2, Some(0)), (2, None)] {
        let mut world = World::new();
        let job = world.place(vcpu, to);
        world.append(Change::Cancel { job });
        assert_eq!(world.drive(job), Some(StepResult::Done), "vCPU {vcpu}");
        assert_eq!(world.rings.get(), 0);
    }
}

#[test]
fn who_was_put_out_orders_nothing() {
    let mut world = World::new();
    let job = world.place(1, Some(0));
    world.is_in = false;
    assert_eq!(world.drive(job), None);
    assert_eq!((world.record(1).order(), world.rings.get()), (None, 0));
}

#[test]
fn garbage_in_a_record_stops_nothing() {
    let mut world = World::new();
    let job = world.place(1, Some(0));
    let home = world.control.vcpu_home(VcpuId(1)).expect("there is room");
    for byte in 0..home.len() / 8 {
        let word = home.atomic_u64(byte * 8).expect("inside");
        word.store(u64::MAX, Ordering::Relaxed);
    }
    assert_eq!(world.drive(job), None);
}
