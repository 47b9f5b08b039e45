//! Operations: what is appended to the cluster's log.
//!
//! On the wire each is an [`Op`] of fixed layout, some with a payload; in code
//! it is a [`Change`]. [`Op::change`] is total: what it can't read is
//! `None`, and applying that is refused.

use alloc::format;
use core::fmt;

use vmm_shared::addr::{NodeId, VcpuId};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Reason;
use crate::optimise::Share;
use crate::policy::ANY;

/// A VM of the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmId(pub u16);

/// A job: counted from 1 on, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub u32);

/// What an operator asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// So much for the VM, wherever it is best.
    Resize {
        /// Which.
        vm: VmId,
        /// vCPUs and slices.
        to: Share,
    },
    /// One vCPU on that node, or nowhere.
    PlaceVcpu {
        /// Of which VM.
        vm: VmId,
        /// Which.
        vcpu: VcpuId,
        /// Where it shall be, if anywhere.
        to: Option<NodeId>,
    },
    /// So many slices from one node to another.
    MoveSlices {
        /// Of which VM.
        vm: VmId,
        /// From where.
        from: NodeId,
        /// To where.
        to: NodeId,
        /// How many.
        count: u32,
    },
    /// Nothing of any VM on that node, which is cordoned.
    Drain {
        /// Which.
        node: NodeId,
    },
    /// The VM as it is, placed anew.
    Rebalance {
        /// Which.
        vm: VmId,
    },
}

/// What became of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepResult {
    /// Done as planned.
    Done,
    /// Done in part, the rest refused: of so many slices; or of a vCPU, which
    /// stays, none. The job goes on.
    Short {
        /// Slices that were added, moved or removed.
        slices: u32,
        /// Why not all: a code of the executor's own, for the operator.
        reason: u16,
    },
    /// Not done at all. The job is rolled back.
    Failed {
        /// Why: as above.
        reason: u16,
    },
}

/// How far a VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmPhase {
    /// Its first placement is made, or its guest boots: other jobs wait.
    Booting,
    /// Its guest answers.
    Running,
}

/// A change of the cluster's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A node offers its cores and slices.
    Join {
        /// Which.
        node: NodeId,
        /// Its failure domain.
        domain: u16,
        /// Cores and slices that it has.
        size: Share,
    },
    /// A node without leases goes. It is not taken in again before it is
    /// admitted, though it may go on living.
    Leave {
        /// Which.
        node: NodeId,
    },
    /// A node that has left may join again.
    Admit {
        /// Which.
        node: NodeId,
    },
    /// A node is fenced: what it gave is lost.
    Lose {
        /// Which.
        node: NodeId,
    },
    /// Nothing new comes onto a node.
    Cordon {
        /// Which.
        node: NodeId,
        /// Whether, or no longer.
        on: bool,
    },
    /// The payload is the policy from now on.
    LoadPolicy,
    /// A VM that holds nothing yet. The payload says how many of its possible
    /// vCPUs have their seat at which node: see [`Vm::seat`](super::Vm::seat).
    CreateVm {
        /// Which.
        vm: VmId,
        /// The most that its hot-plug windows can take.
        most: Share,
        /// The least: at least one vCPU, and its boot memory.
        least: Share,
        /// Slices that come and go at once while its guest runs.
        block: u16,
    },
    /// A VM that holds nothing any more.
    RemoveVm {
        /// Which.
        vm: VmId,
    },
    /// How far a VM is.
    Phase {
        /// Which.
        vm: VmId,
        /// How far.
        phase: VmPhase,
    },
    /// What the guest itself says that it has.
    Seen {
        /// Which VM.
        vm: VmId,
        /// vCPUs and slices on line.
        share: Share,
    },
    /// An operator's request.
    Ask {
        /// The request's number, chosen by who asks; for the journal.
        request: u64,
        /// What for.
        wish: Wish,
    },
    /// The payload is the plan of a job.
    Plan {
        /// Which job.
        job: JobId,
    },
    /// No placement was found for a job.
    Refuse {
        /// Which job.
        job: JobId,
    },
    /// A step of a job came to an end.
    Step {
        /// Which job.
        job: JobId,
        /// Which step; see [`Job::current`](super::Job::current).
        index: u32,
        /// How it ended.
        result: StepResult,
    },
    /// A job is not wanted any more.
    Cancel {
        /// Which job.
        job: JobId,
    },
    /// The same, without waiting for what the guest does not answer.
    Abandon {
        /// Which job.
        job: JobId,
    },
    /// A guest is found to have given up a vCPU, or slices, that no job waits for.
    GivenUp {
        /// The guest of which VM.
        vm: VmId,
        /// The vCPU; with none it is slices.
        vcpu: Option<VcpuId>,
        /// The node that gave it.
        node: NodeId,
        /// How many slices.
        slices: u32,
    },
    /// A guest is found to have got a vCPU, or slices, that no job waits for.
    Got {
        /// The guest of which VM.
        vm: VmId,
        /// The vCPU; with none it is slices.
        vcpu: Option<VcpuId>,
        /// The node that gives it.
        node: NodeId,
        /// How many slices.
        slices: u32,
    },
    /// A node takes cores and slices of a node into its own pool, to give
    /// them out by itself.
    Lease {
        /// Who gets them.
        holder: NodeId,
        /// Whose they are.
        node: NodeId,
        /// How many.
        share: Share,
    },
    /// A node gives back some of its pool.
    Return {
        /// Who had them.
        holder: NodeId,
        /// Whose they are.
        node: NodeId,
        /// How many.
        share: Share,
    },
    /// A control role on this node decides from now on.
    TakeOver {
        /// Where it runs.
        node: NodeId,
    },
}

/// A [`Change`] as it stands in the log.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Op {
    /// Which change.
    code: u8,
    /// Which sort of it: of a wish, a result, a phase.
    sort: u8,
    vm: u16,
    node: u16,
    other: u16,
    vcpus: u32,
    slices: u32,
    /// Vcpus and slices of a second share; numbers of jobs and steps.
    first: u32,
    second: u32,
    request: u64,
}

const _: () = assert!(size_of::<Op>() == 32, "part of the log's format");

impl Op {
    const fn new(code: u8) -> Self {
        Self {
            code,
            sort: 0,
            vm: 0,
            node: 0,
            other: 0,
            vcpus: 0,
            slices: 0,
            first: 0,
            second: 0,
            request: 0,
        }
    }

    const fn share(&self) -> Share {
        Share::new(self.vcpus, self.slices)
    }

    fn wish(&self) -> Option<Wish> {
        let (vm, node) = (VmId(self.vm), NodeId(self.node));
        Some(match self.sort {
            1 => Wish::Resize {
                vm,
                to: self.share(),
            },
            2 => Wish::PlaceVcpu {
                vm,
                vcpu: VcpuId(self.other),
                to: (node.0 != ANY).then_some(node),
            },
            3 => Wish::MoveSlices {
                vm,
                from: NodeId(self.other),
                to: node,
                count: self.slices,
            },
            4 => Wish::Drain { node },
            5 => Wish::Rebalance { vm },
            _ => return None,
        })
    }

    fn result(&self) -> Option<StepResult> {
        Some(match self.sort {
            1 => StepResult::Done,
            2 => StepResult::Short {
                slices: self.slices,
                reason: self.other,
            },
            3 => StepResult::Failed { reason: self.other },
            _ => return None,
        })
    }

    /// What it says, if it says anything that this version knows.
    #[must_use]
    pub fn change(&self) -> Option<Change> {
        let (vm, node, job) = (VmId(self.vm), NodeId(self.node), JobId(self.first));
        let (holder, share) = (NodeId(self.other), self.share());
        let vcpu = (self.other != ANY).then_some(VcpuId(self.other));
        let slices = self.slices;
        Some(match self.code {
            1 => Change::Join {
                node,
                domain: self.other,
                size: share,
            },
            2 => Change::Leave { node },
            3 => Change::Lose { node },
            4 => Change::Cordon {
                node,
                on: self.sort != 0,
            },
            5 => Change::LoadPolicy,
            6 => Change::CreateVm {
                vm,
                most: share,
                least: Share::new(self.first, self.second),
                block: self.other,
            },
            7 => Change::RemoveVm { vm },
            8 => Change::Phase {
                vm,
                phase: match self.sort {
                    1 => VmPhase::Booting,
                    2 => VmPhase::Running,
                    _ => return None,
                },
            },
            9 => Change::Seen { vm, share },
            10 => Change::Ask {
                request: self.request,
                wish: self.wish()?,
            },
            11 => Change::Plan { job },
            12 => Change::Refuse { job },
            13 => Change::Step {
                job,
                index: self.second,
                result: self.result()?,
            },
            14 => Change::Cancel { job },
            15 => Change::Lease {
                holder,
                node,
                share,
            },
            16 => Change::Return {
                holder,
                node,
                share,
            },
            17 => Change::TakeOver { node },
            18 => Change::Admit { node },
            19 => Change::Abandon { job },
            20 => Change::GivenUp {
                vm,
                vcpu,
                node,
                slices,
            },
            21 => Change::Got {
                vm,
                vcpu,
                node,
                slices,
            },
            _ => return None,
        })
    }
}

impl From<Wish> for Op {
    fn from(wish: Wish) -> Self {
        let new = |sort| Self {
            sort,
            ..Self::new(10)
        };
        match wish {
            Wish::Resize { vm, to } => Self {
                vm: vm.0,
                vcpus: to.vcpus,
                slices: to.slices,
                ..new(1)
            },
            Wish::PlaceVcpu { vm, vcpu, to } => Self {
                vm: vm.0,
                node: to.map_or(ANY, |node| node.0),
                other: vcpu.0,
                ..new(2)
            },
            Wish::MoveSlices {
                vm,
                from,
                to,
                count,
            } => Self {
                vm: vm.0,
                node: to.0,
                other: from.0,
                slices: count,
                ..new(3)
            },
            Wish::Drain { node } => Self {
                node: node.0,
                ..new(4)
            },
            Wish::Rebalance { vm } => Self { vm: vm.0, ..new(5) },
        }
    }
}

impl From<Change> for Op {
    fn from(change: Change) -> Self {
        let of_node = |code, node: NodeId| Self {
            node: node.0,
            ..Self::new(code)
        };
        let of_vm = |code, vm: VmId| Self {
            vm: vm.0,
            ..Self::new(code)
        };
        let of_job = |code, job: JobId| Self {
            first: job.0,
            ..Self::new(code)
        };
        let with = |op: Self, share: Share| Self {
            vcpus: share.vcpus,
            slices: share.slices,
            ..op
        };
        let found = |code, vm: VmId, vcpu: Option<VcpuId>, node: NodeId, slices| Self {
            other: vcpu.map_or(ANY, |vcpu| vcpu.0),
            node: node.0,
            slices,
            ..of_vm(code, vm)
        };
        match change {
            Change::Join { node, domain, size } => Self {
                other: domain,
                ..with(of_node(1, node), size)
            },
            Change::Leave { node } => of_node(2, node),
            Change::Lose { node } => of_node(3, node),
            Change::Cordon { node, on } => Self {
                sort: on.into(),
                ..of_node(4, node)
            },
            Change::LoadPolicy => Self::new(5),
            Change::CreateVm {
                vm,
                most,
                least,
                block,
            } => Self {
                other: block,
                first: least.vcpus,
                second: least.slices,
                ..with(of_vm(6, vm), most)
            },
            Change::RemoveVm { vm } => of_vm(7, vm),
            Change::Phase { vm, phase } => Self {
                sort: match phase {
                    VmPhase::Booting => 1,
                    VmPhase::Running => 2,
                },
                ..of_vm(8, vm)
            },
            Change::Seen { vm, share } => with(of_vm(9, vm), share),
            Change::Ask { request, wish } => Self {
                request,
                ..Self::from(wish)
            },
            Change::Plan { job } => of_job(11, job),
            Change::Refuse { job } => of_job(12, job),
            Change::Step { job, index, result } => {
                let (sort, slices, other) = match result {
                    StepResult::Done => (1, 0, 0),
                    StepResult::Short { slices, reason } => (2, slices, reason),
                    StepResult::Failed { reason } => (3, 0, reason),
                };
                Self {
                    sort,
                    slices,
                    other,
                    second: index,
                    ..of_job(13, job)
                }
            }
            Change::Cancel { job } => of_job(14, job),
            Change::Lease {
                holder,
                node,
                share,
            } => Self {
                other: holder.0,
                ..with(of_node(15, node), share)
            },
            Change::Return {
                holder,
                node,
                share,
            } => Self {
                other: holder.0,
                ..with(of_node(16, node), share)
            },
            Change::TakeOver { node } => of_node(17, node),
            Change::Admit { node } => of_node(18, node),
            Change::Abandon { job } => of_job(19, job),
            Change::GivenUp {
                vm,
                vcpu,
                node,
                slices,
            } => found(20, vm, vcpu, node, slices),
            Change::Got {
                vm,
                vcpu,
                node,
                slices,
            } => found(21, vm, vcpu, node, slices),
        }
    }
}

impl fmt::Display for Change {
    /// As the journal tells it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let amount = |share: &Share| (share.vcpus, u64::from(share.slices) * 2);
        let what = |vcpu: &Option<VcpuId>, slices: &u32| match vcpu {
            Some(vcpu) => format!("vCPU {}", vcpu.0),
            None => format!("{}M", u64::from(*slices) * 2),
        };
        match self {
            Self::Join { node, size, .. } => {
                let (cores, memory) = amount(size);
                write!(f, "node {} joins, {cores} cores and {memory}M", node.0)
            }
            Self::Leave { node } => write!(f, "node {} leaves", node.0),
            Self::Admit { node } => write!(f, "node {} may join again", node.0),
            Self::Lose { node } => write!(f, "node {} is lost", node.0),
            Self::Cordon { node, on: true } => write!(f, "cordon node {}", node.0),
            Self::Cordon { node, on: false } => write!(f, "uncordon node {}", node.0),
            Self::LoadPolicy => f.write_str("load a policy"),
            Self::CreateVm {
                vm, most, least, ..
            } => {
                let ((least_vcpus, least_memory), (vcpus, memory)) = (amount(least), amount(most));
                write!(
                    f,
                    "make vm {}, {least_vcpus} to {vcpus} vCPUs and {least_memory}M to {memory}M",
                    vm.0
                )
            }
            Self::RemoveVm { vm } => write!(f, "remove vm {}", vm.0),
            Self::Phase { vm, phase } => match phase {
                VmPhase::Booting => write!(f, "vm {} boots", vm.0),
                VmPhase::Running => write!(f, "vm {} runs", vm.0),
            },
            Self::Seen { vm, share } => {
                let (vcpus, memory) = amount(share);
                write!(
                    f,
                    "the guest of vm {} sees {vcpus} vCPUs and {memory}M",
                    vm.0
                )
            }
            Self::Ask { request, wish } => write!(f, "request {request:016x}: {wish}"),
            Self::Plan { job } => write!(f, "plan of job {}", job.0),
            Self::Refuse { job } => write!(f, "no plan for job {}", job.0),
            Self::Step { job, index, result } => {
                write!(f, "job {} step {index} ", job.0)?;
                match result {
                    StepResult::Done => f.write_str("done"),
                    StepResult::Short { slices, reason } => {
                        let (memory, why) = (u64::from(*slices) * 2, Reason::from_code(*reason));
                        write!(f, "done for {memory}M only: {why}")
                    }
                    StepResult::Failed { reason } => {
                        write!(f, "failed: {}", Reason::from_code(*reason))
                    }
                }
            }
            Self::Cancel { job } => write!(f, "cancel job {}", job.0),
            Self::Abandon { job } => write!(f, "cancel job {} at once", job.0),
            Self::GivenUp {
                vm,
                vcpu,
                node,
                slices,
            } => {
                let (vm, what, node) = (vm.0, what(vcpu, slices), node.0);
                write!(f, "the guest of vm {vm} has given up {what} of node {node}")
            }
            Self::Got {
                vm,
                vcpu,
                node,
                slices,
            } => {
                let (vm, what, node) = (vm.0, what(vcpu, slices), node.0);
                write!(f, "the guest of vm {vm} has got {what} of node {node}")
            }
            Self::Lease {
                holder,
                node,
                share,
            } => {
                let (cores, memory) = amount(share);
                let (to, from) = (holder.0, node.0);
                write!(
                    f,
                    "node {to} takes {cores} cores and {memory}M of node {from}"
                )
            }
            Self::Return {
                holder,
                node,
                share,
            } => {
                let (cores, memory) = amount(share);
                let (from, to) = (holder.0, node.0);
                write!(
                    f,
                    "node {from} gives {cores} cores and {memory}M back to node {to}"
                )
            }
            Self::TakeOver { node } => write!(f, "node {} is in charge", node.0),
        }
    }
}

impl fmt::Display for Wish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Resize { vm, to } => {
                write!(
                    f,
                    "resize vm {} to {} vCPUs and {}M",
                    vm.0,
                    to.vcpus,
                    u64::from(to.slices) * 2
                )
            }
            Self::PlaceVcpu {
                vm,
                vcpu,
                to: Some(to),
            } => {
                write!(f, "put vCPU {} of vm {} on node {}", vcpu.0, vm.0, to.0)
            }
            Self::PlaceVcpu { vm, vcpu, to: None } => {
                write!(f, "remove vCPU {} of vm {}", vcpu.0, vm.0)
            }
            Self::MoveSlices {
                vm,
                from,
                to,
                count,
            } => write!(
                f,
                "move {}M of vm {} from node {} to node {}",
                u64::from(*count) * 2,
                vm.0,
                from.0,
                to.0
            ),
            Self::Drain { node } => write!(f, "drain node {}", node.0),
            Self::Rebalance { vm } => write!(f, "rebalance vm {}", vm.0),
        }
    }
}
