//! A cluster in the hands of a test: appending is applying.

#![expect(dead_code, reason = "each test program uses a part")]

use std::time::Instant;

use control_plane::cluster::{
    Change, Cluster, Done, JobId, Op, Refusal, StepResult, VmId, VmPhase, Wish,
};
use control_plane::optimise::{Budget, Share};
use control_plane::place::plan::{NoPlan, Todo, plan, todo};
use control_plane::policy::text::parse;
use vmm_shared::addr::NodeId;
use vmm_shared::log::{At, Clock, MemberId, StateMachine};

pub(crate) const VM: VmId = VmId(0);

/// Catches hangs only.
pub(crate) const LONG: Budget = Budget::exact(60_000_000_000);

pub(crate) struct Wall(Instant);

impl Clock for Wall {
    fn now_ns(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).expect("not for centuries")
    }
}

pub(crate) fn wall() -> Wall {
    Wall(Instant::now())
}

/// A cluster, and the log that made it.
#[derive(Clone, Default)]
pub(crate) struct Rack {
    pub(crate) cluster: Cluster,
    pub(crate) log: Vec<(Op, Vec<u8>)>,
}

pub(crate) fn at(position: usize) -> At {
    At {
        position: position as u64,
        member: MemberId::new(0).expect("a small number"),
    }
}

impl Rack {
    /// Nodes of `(domain, cores, slices)`, and a VM that holds nothing.
    pub(crate) fn new(nodes: &[(u16, u32, u32)], most: Share) -> Self {
        let mut rack = Self::default();
        for (node, (domain, cores, slices)) in (0..).map(NodeId).zip(nodes) {
            rack.must(Change::Join {
                node,
                domain: *domain,
                size: Share::new(*cores, *slices),
            });
        }
        rack.must(Change::CreateVm {
            vm: VM,
            most,
            least: Share::new(1, 1),
            block: 1,
        });
        rack
    }

    pub(crate) fn append(&mut self, change: Change, payload: &[u8]) -> Result<Done, Refusal> {
        let op = Op::from(change);
        assert_eq!(op.change(), Some(change), "the wire form says the same");
        let outcome = self.cluster.apply(&op, payload, at(self.log.len()));
        self.log.push((op, payload.to_vec()));
        assert_eq!(self.cluster.check(), Ok(()), "after {change:?}");
        outcome
    }

    pub(crate) fn must(&mut self, change: Change) -> Done {
        self.append(change, &[])
            .unwrap_or_else(|refusal| panic!("{change:?}: {refusal}"))
    }

    pub(crate) fn policy(&mut self, text: &str) {
        let policy = parse(text).expect("a policy");
        self.append(Change::LoadPolicy, policy.as_bytes())
            .expect("loaded");
    }

    pub(crate) fn ask(&mut self, wish: Wish) -> Result<Done, Refusal> {
        self.append(Change::Ask { request: 7, wish }, &[])
    }

    pub(crate) fn start(&mut self, wish: Wish) -> JobId {
        match self.ask(wish) {
            Ok(Done::Started { job }) => job,
            other => panic!("{wish}: {other:?}"),
        }
    }

    /// One thing that is to be done, if there is one. Steps end as `executor`
    /// says.
    pub(crate) fn turn(&mut self, executor: &mut dyn FnMut(&Cluster, u32) -> StepResult) -> bool {
        let Some(next) = todo(&self.cluster).next() else {
            return false;
        };
        match next {
            Todo::Plan(job) => {
                let wish = self.cluster.jobs()[&job].wish();
                match plan(&self.cluster, wish, LONG, &wall()) {
                    Ok(plan) => {
                        let (op, payload) = plan.into_op(job);
                        let change = op.change().expect("a plan");
                        let payload = payload.to_vec();
                        self.append(change, &payload).expect("a plan that fits");
                    }
                    Err(_) => {
                        self.must(Change::Refuse { job });
                    }
                }
            }
            Todo::Execute { job, index, step } => {
                let result = if step.is_bookkeeping() {
                    StepResult::Done
                } else {
                    executor(&self.cluster, index)
                };
                self.must(Change::Step { job, index, result });
            }
        }
        true
    }

    /// Works until nothing is to be done; every step succeeds.
    pub(crate) fn work(&mut self) {
        while self.turn(&mut |_, _| StepResult::Done) {}
    }

    /// Every guest answers.
    pub(crate) fn must_run(&mut self) {
        let vms: Vec<VmId> = self.cluster.vms().keys().copied().collect();
        for vm in vms {
            self.must(Change::Phase {
                vm,
                phase: VmPhase::Running,
            });
        }
    }

    /// Gives the VM its first placement; then its guest answers.
    pub(crate) fn boot(&mut self, to: Share) {
        self.start(Wish::Resize { vm: VM, to });
        self.work();
        self.must(Change::Phase {
            vm: VM,
            phase: VmPhase::Running,
        });
        assert_eq!(self.cluster.vms()[&VM].granted(), to);
    }

    pub(crate) fn dry_run(&self, wish: Wish) -> Result<control_plane::place::plan::Plan, NoPlan> {
        plan(&self.cluster, wish, LONG, &wall())
    }

    pub(crate) fn snapshot(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        assert_eq!(
            self.cluster.save(0, 1 << 16, &mut bytes),
            None,
            "in one part"
        );
        bytes
    }

    /// What each node gives.
    pub(crate) fn shares(&self) -> Vec<Share> {
        let vm = &self.cluster.vms()[&VM];
        let nodes = self.cluster.nodes().keys();
        nodes.map(|node| vm.granted_at(*node)).collect()
    }
}
