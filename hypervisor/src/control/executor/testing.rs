//! A control node's executor, and a rack that is the test's own hand.

#![expect(unsafe_code, reason = "a leaked buffer as the control region")]

use core::cell::Cell;
use core::ptr::NonNull;

use control_plane::cluster::{
    Change, Cluster, Done, JobId, Op, StepKind, StepResult, VmId, VmPhase, Wish,
};
use control_plane::optimise::{Budget, Share};
use control_plane::place::plan::plan;
use control_plane::place::steps::steps;
use control_plane::role::Executor;
use vmm_shared::addr::{LARGE_PAGE_SIZE, Location, NodeId, VcpuId};
use vmm_shared::control::{
    BUNDLE_OFFSET, Blob, BootConfig, ControlRegion, NodeShare, Place, VcpuRecord,
};
use vmm_shared::log::{At, Clock, MemberId, StateMachine};
use vmm_shared::pieces::{MapGeometry, PieceMap};
use vmm_shared::region::CONTENT_OFFSET;
use vmm_shared::shm::SharedMem;
use zerocopy::{FromZeros, IntoBytes};

use super::NodeExecutor;

pub(super) const VM: VmId = VmId(0);

/// Two nodes of two cores, and a VM that has had vCPUs 0 and 2, one on each,
/// and two slices of each. Two more have room on each, and so many blocks.
pub(super) struct World {
    pub(super) control: ControlRegion,
    config: BootConfig,
    pub(super) cluster: Cluster,
    pub(super) rings: Cell<u32>,
    pub(super) is_in: bool,
}

/// A control region with so many bytes behind its fixed part.
fn region(more: usize) -> ControlRegion {
    let len = usize::try_from(CONTENT_OFFSET + BUNDLE_OFFSET).expect("64-bit") + more;
    let memory = Box::leak(vec![0_u64; len / 8].into_boxed_slice());
    let base = NonNull::new(memory.as_mut_ptr()).expect("not null").cast();
    // SAFETY: leaked, aligned, and reached through the window only.
    ControlRegion::new(unsafe { SharedMem::new(base, len) }).expect("large enough")
}

pub(super) fn at(node: u16, core: u16) -> Location {
    let node = NodeId(node);
    Location { node, core }
}

impl World {
    pub(super) fn new() -> Self {
        Self::with_blocks(0)
    }

    pub(super) fn with_blocks(blocks: u16) -> Self {
        let room = 4 + 64 * u32::from(blocks);
        let mut config = BootConfig::new_zeroed();
        config.nodes = 2;
        let shares = &mut config.shares[..2];
        for share in &mut *shares {
            (share.cores, share.vcpus, share.max_vcpus) = (2, 1, 2);
            (share.memory, share.room) = (2 * LARGE_PAGE_SIZE, room);
            share.blocks = blocks;
        }
        let size = MapGeometry::of(shares).size().expect("a geometry");
        config.pieces = Blob {
            offset: BUNDLE_OFFSET,
            len: size as u64,
        };
        let mut world = Self {
            control: region(size),
            config,
            cluster: Cluster::default(),
            rings: Cell::new(0),
            is_in: true,
        };
        world.map().lay_out(&config.shares[..2]);
        for node in 0..2 {
            world.append(Change::Join {
                node: NodeId(node),
                domain: node,
                size: Share::new(2, room),
            });
        }
        let create = Change::CreateVm {
            vm: VM,
            most: Share::new(4, 4 + 128 * u32::from(blocks)),
            least: Share::new(1, 4),
            block: 64,
        };
        world.with(create, &[0, 0, 2, 0, 1, 0, 2, 0]);
        let job = world.ask(Wish::Resize {
            vm: VM,
            to: Share::new(2, 4),
        });
        let shares = [(NodeId(0), Share::new(1, 2)), (NodeId(1), Share::new(1, 2))];
        let steps = steps(&world.cluster, VM, &shares);
        world.with(Change::Plan { job }, steps.expect("a VM").as_bytes());
        while world.cluster.jobs()[&job].current().is_some() {
            world.report(job, StepResult::Done);
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

    pub(super) fn append(&mut self, change: Change) -> Done {
        self.with(change, &[])
    }

    fn ask(&mut self, wish: Wish) -> JobId {
        match self.append(Change::Ask { request: 1, wish }) {
            Done::Started { job } => job,
            other => panic!("{other:?}"),
        }
    }

    /// A job with its plan, whose leases are taken.
    pub(super) fn begin(&mut self, wish: Wish) -> JobId {
        let job = self.ask(wish);
        let plan = plan(&self.cluster, wish, Budget::exact(1_000_000_000), &Still);
        let (op, payload) = plan.as_ref().expect("there is room").into_op(job);
        let payload = payload.to_vec();
        self.with(op.change().expect("a plan"), &payload);
        job
    }

    /// Says how a job's step has ended.
    pub(super) fn report(&mut self, job: JobId, result: StepResult) {
        let (index, _) = self.cluster.jobs()[&job].current().expect("a step");
        self.append(Change::Step { job, index, result });
    }

    pub(super) fn record(&self, vcpu: u16) -> VcpuRecord {
        self.control.vcpu(VcpuId(vcpu)).expect("there is room")
    }

    pub(super) fn shares(&self) -> &[NodeShare] {
        &self.config.shares[..2]
    }

    pub(super) fn map(&self) -> PieceMap {
        self.control.pieces(&self.config).expect("it fits")
    }

    /// What an executor that knows nothing of what was before makes of it.
    pub(super) fn drive(&self, job: JobId) -> Option<StepResult> {
        let job = &self.cluster.jobs()[&job];
        let (_, step) = job.current().expect("a step");
        assert_ne!(step.kind, StepKind::Lease, "taken with the plan");
        let ring = |_| self.rings.set(self.rings.get() + 1);
        let may_ask = || self.is_in;
        let mut executor = NodeExecutor {
            control: &self.control,
            config: &self.config,
            ring: &ring,
            may_ask: &may_ask,
        };
        assert_eq!(executor.can(&step), Ok(()));
        executor.drive(&self.cluster, job, &step)
    }

    /// What it finds of a guest that no job changes.
    pub(super) fn found(&self) -> Option<Change> {
        let executor = NodeExecutor {
            control: &self.control,
            config: &self.config,
            ring: &|_| (),
            may_ask: &|| true,
        };
        executor.found(&self.cluster)
    }
}

struct Still;

impl Clock for Still {
    fn now_ns(&self) -> u64 {
        0
    }
}
