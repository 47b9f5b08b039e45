//! Applying: each operation of the log to the tables, or its refusal.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::fmt;

use vmm_shared::addr::{LARGE_PAGE_SIZE, NodeId, VcpuId};
use vmm_shared::log::{At, BadSnapshot, StateMachine};

use super::jobs::{Job, JobState, NODE_LOST};
use super::journal::Record;
use super::{
    Change, Cluster, Holder, JobId, MAX_CORES, MAX_SLICES, MAX_VM_VCPUS, Node, Op, Vm, VmId,
    VmPhase, Wish,
};
use crate::optimise::{MAX_COUNT, Share};
use crate::place::Cause;
use crate::policy::{Policy, PolicyError};

/// What came of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// It took effect.
    Applied,
    /// A job will do it.
    Started {
        /// Which.
        job: JobId,
    },
    /// A job is doing just that already.
    Joined {
        /// Which.
        job: JobId,
    },
    /// It is as asked already.
    Nothing,
}

/// Why an operation took no effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Its bytes make no operation of this version.
    Malformed,
    /// No such node.
    NoNode {
        /// Which.
        node: NodeId,
    },
    /// No such VM.
    NoVm {
        /// Which.
        vm: VmId,
    },
    /// No such job.
    NoJob {
        /// Which.
        job: JobId,
    },
    /// No such vCPU.
    NoVcpu {
        /// Which.
        vcpu: u16,
    },
    /// The node or VM is there already.
    Exists,
    /// A size beyond what the tables hold.
    TooLarge,
    /// Less than the least, or more than the most, that the VM can have.
    OutOfRange {
        /// The nearest that it can have.
        nearest: Share,
    },
    /// The guest takes memory, and gives it up, in whole blocks.
    NotWhole {
        /// The nearest numbers of slices that it can have.
        below: u32,
        /// Above what was asked.
        above: u32,
    },
    /// The node still gives something, or the VM still holds something.
    InUse,
    /// The node is cordoned.
    Cordoned {
        /// Which.
        node: NodeId,
    },
    /// Another job changes the VM.
    Busy {
        /// Which.
        job: JobId,
    },
    /// The guest boots: its plan has to wait.
    StillBooting {
        /// Which VM.
        vm: VmId,
    },
    /// The job is in no state for that.
    WrongState {
        /// Which.
        job: JobId,
    },
    /// The job is being undone already.
    Undoing {
        /// Which.
        job: JobId,
    },
    /// Rows are released already: the job can't be undone any more.
    TooLate {
        /// Which.
        job: JobId,
    },
    /// The node has not so much left.
    NoRoom {
        /// Which.
        node: NodeId,
    },
    /// The plan's steps don't fit together or don't do what was wished.
    BadPlan,
    /// The plan breaks a hard constraint.
    Breaks {
        /// Which.
        cause: Cause,
    },
    /// The policy has a fault; the old one is in force.
    Policy(PolicyError),
}

type Outcome = Result<Done, Refusal>;

impl Refusal {
    /// A stable number and name for programs.
    #[must_use]
    pub const fn code(&self) -> (u8, &'static str) {
        match self {
            Self::Malformed => (1, "malformed"),
            Self::NoNode { .. } => (2, "no-node"),
            Self::NoVm { .. } => (3, "no-vm"),
            Self::NoJob { .. } => (4, "no-job"),
            Self::NoVcpu { .. } => (5, "no-vcpu"),
            Self::Exists => (6, "exists"),
            Self::TooLarge => (7, "too-large"),
            Self::OutOfRange { .. } => (8, "out-of-range"),
            Self::InUse => (9, "in-use"),
            Self::Cordoned { .. } => (10, "cordoned"),
            Self::Busy { .. } => (11, "busy"),
            Self::StillBooting { .. } => (12, "still-booting"),
            Self::WrongState { .. } => (13, "wrong-state"),
            Self::TooLate { .. } => (14, "too-late"),
            Self::NoRoom { .. } => (15, "no-room"),
            Self::BadPlan => (16, "bad-plan"),
            Self::Breaks { .. } => (17, "breaks-constraint"),
            Self::Policy(_) => (18, "bad-policy"),
            Self::NotWhole { .. } => (19, "not-whole"),
            Self::Undoing { .. } => (20, "undoing"),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed => f.write_str("this is no operation of this version"),
            Self::NoNode { node } => write!(f, "there is no node {}", node.0),
            Self::NoVm { vm } => write!(f, "there is no vm {}", vm.0),
            Self::NoJob { job } => write!(f, "there is no job {}", job.0),
            Self::NoVcpu { vcpu } => write!(f, "there is no vCPU {vcpu}"),
            Self::Exists => f.write_str("it is there already"),
            Self::TooLarge => f.write_str("the sizes are beyond what the tables hold"),
            Self::OutOfRange { nearest } => write!(
                f,
                "the VM can't have that; the nearest is {} vCPUs and {}M of memory",
                nearest.vcpus,
                mib(nearest.slices)
            ),
            Self::NotWhole { below, above } => write!(
                f,
                "memory comes and goes in blocks of {}M: the nearest are {}M and {}M",
                mib(above - below),
                mib(*below),
                mib(*above)
            ),
            Self::InUse => f.write_str("it still gives cores or slices to others: drain it first"),
            Self::Cordoned { node } => write!(f, "node {} is cordoned", node.0),
            Self::Busy { job } => {
                write!(f, "job {} changes the VM: wait for it or cancel it", job.0)
            }
            Self::StillBooting { vm } => write!(f, "the guest of vm {} boots: the job waits", vm.0),
            Self::WrongState { job } => write!(f, "job {} is past that", job.0),
            Self::Undoing { job } => write!(
                f,
                "job {0} is being undone already; viaduct job cancel --force {0} does not wait for the guest",
                job.0
            ),
            Self::TooLate { job } => write!(f, "job {} can't be undone any more", job.0),
            Self::NoRoom { node } => write!(f, "node {} has not so much left", node.0),
            Self::BadPlan => f.write_str("the plan does not fit the tables: make a new one"),
            Self::Breaks { cause } => write!(f, "the plan breaks a hard constraint: {cause:?}"),
            Self::Policy(error) => write!(f, "constraint {}: {}", error.rule + 1, error.fault),
        }
    }
}

fn mib(slices: u32) -> u64 {
    (u64::from(slices) * LARGE_PAGE_SIZE) >> 20
}

/// The seat of each possible vCPU: pairs of a node and a number, 16 bits each.
/// Without any, vCPUs are at home anywhere.
fn seats_of(mut bytes: &[u8], vcpus: u32) -> Option<Vec<NodeId>> {
    let mut seats = Vec::new();
    while let Some((pair, rest)) = bytes.split_first_chunk::<4>() {
        let [n0, n1, c0, c1] = *pair;
        let count = usize::from(u16::from_le_bytes([c0, c1]));
        let node = NodeId(u16::from_le_bytes([n0, n1]));
        bytes = rest;
        if seats.len() + count > vcpus as usize {
            return None;
        }
        seats.resize(seats.len() + count, node);
    }
    let is_whole = seats.is_empty() || seats.len() == vcpus as usize;
    (bytes.is_empty() && is_whole).then_some(seats)
}

/// What was found to have come or gone: a vCPU, or else slices.
const fn found_share(vcpu: Option<VcpuId>, slices: u32) -> Share {
    match vcpu {
        Some(_) => Share::new(1, 0),
        None => Share::new(0, slices),
    }
}

impl StateMachine for Cluster {
    type Op = Op;
    type Answer = Outcome;

    fn apply(&mut self, op: &Op, payload: &[u8], at: At) -> Outcome {
        let outcome = match op.change() {
            Some(change) => self.change(change, payload),
            None => Err(Refusal::Malformed),
        };
        self.journal.add(Record::new(at, *op, &outcome));
        outcome
    }

    fn reset(&mut self) {
        *self = Self::default();
    }

    /// The state is saved whole.
    fn save(&self, _: u64, _: usize, out: &mut Vec<u8>) -> Option<u64> {
        self.write(out);
        None
    }

    fn load(&mut self, _: u64, part: &[u8]) -> Result<(), BadSnapshot> {
        *self = Self::read(part).ok_or(BadSnapshot)?;
        Ok(())
    }
}

impl Cluster {
    fn change(&mut self, change: Change, payload: &[u8]) -> Outcome {
        let applied = |(): ()| Done::Applied;
        match change {
            Change::Join { node, domain, size } => self.join(node, domain, size).map(applied),
            Change::Leave { node } => self.leave(node).map(applied),
            Change::Admit { node } => match self.left.remove(&node) {
                true => Ok(Done::Applied),
                false => Err(Refusal::NoNode { node }),
            },
            Change::Lose { node } => self.lose(node).map(applied),
            Change::Cordon { node, on } => {
                self.node(node)?.cordoned = on;
                Ok(Done::Applied)
            }
            Change::LoadPolicy => {
                self.policy = Policy::from_bytes(payload).map_err(Refusal::Policy)?;
                Ok(Done::Applied)
            }
            Change::CreateVm {
                vm,
                most,
                least,
                block,
            } => self.create(vm, [least, most], block, payload).map(applied),
            Change::RemoveVm { vm } => self.remove(vm).map(applied),
            Change::Phase { vm, phase } => {
                self.vm(vm)?.phase = phase;
                Ok(Done::Applied)
            }
            Change::Seen { vm, share } => {
                self.vm(vm)?.seen = share;
                Ok(Done::Applied)
            }
            Change::Ask { request, wish } => self.ask(request, wish),
            Change::Plan { job } => self.plan(job, payload).map(applied),
            Change::Refuse { job } => self.refuse(job).map(applied),
            Change::Step { job, index, result } => self.step(job, index, result).map(applied),
            Change::Cancel { job } => self.cancel(job).map(applied),
            Change::Abandon { job } => self.abandon(job).map(applied),
            Change::GivenUp {
                vm,
                vcpu,
                node,
                slices,
            } => self.given_up(vm, vcpu, node, slices).map(applied),
            Change::Got {
                vm,
                vcpu,
                node,
                slices,
            } => self.got(vm, vcpu, node, slices).map(applied),
            Change::Lease {
                holder,
                node,
                share,
            } => {
                self.node(holder)?;
                let row = self.node(node)?;
                if row.cordoned {
                    return Err(Refusal::Cordoned { node });
                }
                if share.vcpus > row.free.vcpus || share.slices > row.free.slices {
                    return Err(Refusal::NoRoom { node });
                }
                row.pass(share, Holder::Free, Holder::Pool(holder));
                Ok(Done::Applied)
            }
            Change::Return {
                holder,
                node,
                share,
            } => {
                let row = self.node(node)?;
                let held = row.held_by(Holder::Pool(holder));
                if share.vcpus > held.vcpus || share.slices > held.slices {
                    return Err(Refusal::NoRoom { node });
                }
                row.pass(share, Holder::Pool(holder), Holder::Free);
                Ok(Done::Applied)
            }
            // No node has this number; in a snapshot it stands for nobody.
            Change::TakeOver {
                node: node @ NodeId(u16::MAX),
            } => Err(Refusal::NoNode { node }),
            Change::TakeOver { node } => {
                self.controller = Some(node);
                self.term = self.term.saturating_add(1);
                Ok(Done::Applied)
            }
        }
    }

    fn node(&mut self, node: NodeId) -> Result<&mut Node, Refusal> {
        self.nodes.get_mut(&node).ok_or(Refusal::NoNode { node })
    }

    fn vm(&mut self, vm: VmId) -> Result<&mut Vm, Refusal> {
        self.vms.get_mut(&vm).ok_or(Refusal::NoVm { vm })
    }

    fn join(&mut self, node: NodeId, domain: u16, size: Share) -> Result<(), Refusal> {
        if size.vcpus > MAX_CORES || size.slices > MAX_SLICES || node.0 == u16::MAX {
            return Err(Refusal::TooLarge);
        }
        if self.nodes.contains_key(&node) {
            return Err(Refusal::Exists);
        }
        let rows = |count: u32| alloc::vec![Holder::Free; count as usize];
        let row = Node {
            domain,
            cordoned: false,
            cores: rows(size.vcpus),
            slices: rows(size.slices),
            free: size,
        };
        self.nodes.insert(node, row);
        self.left.remove(&node);
        Ok(())
    }

    fn leave(&mut self, node: NodeId) -> Result<(), Refusal> {
        let row = self.node(node)?;
        let pool = Holder::Pool(node);
        let own = row.held_by(pool);
        // What it keeps for itself goes with it.
        if row.size() != Share::new(row.free.vcpus + own.vcpus, row.free.slices + own.slices) {
            return Err(Refusal::InUse);
        }
        let elsewhere =
            |(id, row): (&NodeId, &Node)| *id != node && row.held_by(pool) != Share::NONE;
        if self.nodes.iter().any(elsewhere) {
            return Err(Refusal::InUse);
        }
        self.nodes.remove(&node);
        self.left.insert(node);
        Ok(())
    }

    fn lose(&mut self, node: NodeId) -> Result<(), Refusal> {
        self.node(node)?;
        self.nodes.remove(&node);
        for row in self.nodes.values_mut() {
            let held = row.held_by(Holder::Pool(node));
            row.pass(held, Holder::Pool(node), Holder::Free);
        }
        let stuck: Vec<JobId> = {
            let active = self.jobs.values().filter(|job| !job.state.has_ended());
            let hurt = active.filter(|job| {
                let uses = |step: &super::Step| step.from == node.0 || step.to == node.0;
                let of_node = matches!(job.wish, Wish::Drain { node: own } if own == node);
                of_node || job.steps.iter().any(uses)
            });
            hurt.map(|job| job.id).collect()
        };
        for vm in self.vms.values_mut() {
            vm.placements.remove(&node);
            for home in &mut vm.homes {
                home.take_if(|home| *home == node);
            }
        }
        for id in stuck {
            if let Some(job) = self.jobs.get_mut(&id) {
                job.state = JobState::Stuck { reason: NODE_LOST };
            }
            self.settle(id);
        }
        Ok(())
    }

    /// Frees what a job's VMs hold and don't use.
    pub(crate) fn release_unused(&mut self, id: JobId) {
        let Some(job) = self.jobs.get(&id) else {
            return;
        };
        let touched: BTreeMap<VmId, ()> =
            job.steps.iter().map(|step| (VmId(step.vm), ())).collect();
        for id in touched.keys() {
            let Some(vm) = self.vms.get_mut(id) else {
                continue;
            };
            for (node, placement) in &mut vm.placements {
                if let Some(row) = self.nodes.get_mut(node) {
                    row.pass(placement.unused(), Holder::Leased(*id), Holder::Free);
                }
                placement.held = placement.granted;
            }
            vm.placements
                .retain(|_, placement| placement.held != Share::NONE);
        }
    }

    /// Books what no job waits for; one that changes the VM would find it out by
    /// itself.
    fn given_up(
        &mut self,
        id: VmId,
        vcpu: Option<VcpuId>,
        node: NodeId,
        slices: u32,
    ) -> Result<(), Refusal> {
        let share = found_share(vcpu, slices);
        let vm = self.idle(id)?;
        if let Some(vcpu) = vcpu {
            let home = vm.homes.get_mut(usize::from(vcpu.0));
            let none = Refusal::NoVcpu { vcpu: vcpu.0 };
            home.and_then(|home| home.take_if(|home| *home == node))
                .ok_or(none)?;
        }
        let none = Refusal::NoRoom { node };
        let placement = vm.placements.get_mut(&node).ok_or(none)?;
        if share.slices > placement.granted.slices {
            return Err(none);
        }
        for amount in [&mut placement.held, &mut placement.granted] {
            amount.vcpus -= share.vcpus;
            amount.slices -= share.slices;
        }
        if placement.held == Share::NONE {
            vm.placements.remove(&node);
        }
        self.node(node)?.pass(share, Holder::Vm(id), Holder::Free);
        Ok(())
    }

    /// The same of what a guest has got.
    fn got(
        &mut self,
        id: VmId,
        vcpu: Option<VcpuId>,
        node: NodeId,
        slices: u32,
    ) -> Result<(), Refusal> {
        let free = self.node(node)?.free;
        let share = found_share(vcpu, slices);
        let vm = self.idle(id)?;
        if share == Share::NONE || share.vcpus > free.vcpus || share.slices > free.slices {
            return Err(Refusal::NoRoom { node });
        }
        if let Some(vcpu) = vcpu {
            let home = vm.homes.get_mut(usize::from(vcpu.0));
            let home = home.filter(|home| home.is_none());
            *home.ok_or(Refusal::NoVcpu { vcpu: vcpu.0 })? = Some(node);
        }
        let placement = vm.placements.entry(node).or_default();
        for amount in [&mut placement.held, &mut placement.granted] {
            amount.vcpus += share.vcpus;
            amount.slices += share.slices;
        }
        self.node(node)?.pass(share, Holder::Free, Holder::Vm(id));
        Ok(())
    }

    /// A VM that no job changes.
    fn idle(&mut self, id: VmId) -> Result<&mut Vm, Refusal> {
        if let Some(job) = self.job_of(id) {
            return Err(Refusal::Busy { job: job.id });
        }
        self.vm(id)
    }

    fn create(
        &mut self,
        vm: VmId,
        [least, most]: [Share; 2],
        block: u16,
        seats: &[u8],
    ) -> Result<(), Refusal> {
        let legal = least.vcpus >= 1
            && least.vcpus <= most.vcpus
            && least.slices <= most.slices
            && most.vcpus <= MAX_VM_VCPUS
            && most.slices <= MAX_COUNT
            && block > 0
            && vm.0 != u16::MAX;
        if !legal {
            return Err(Refusal::TooLarge);
        }
        if self.vms.contains_key(&vm) {
            return Err(Refusal::Exists);
        }
        let seats = seats_of(seats, most.vcpus).ok_or(Refusal::Malformed)?;
        let row = Vm {
            seats,
            least,
            most,
            desired: Share::NONE,
            seen: Share::NONE,
            phase: VmPhase::Booting,
            block,
            placements: BTreeMap::new(),
            homes: alloc::vec![None; most.vcpus as usize],
        };
        self.vms.insert(vm, row);
        Ok(())
    }

    /// A VM that has ended gives all back; a job that still changes it first
    /// has to be cancelled.
    fn remove(&mut self, id: VmId) -> Result<(), Refusal> {
        if let Some(job) = self.job_of(id) {
            return Err(Refusal::Busy { job: job.id });
        }
        let vm = self.vms.remove(&id).ok_or(Refusal::NoVm { vm: id })?;
        for (node, placement) in vm.placements {
            if let Some(row) = self.nodes.get_mut(&node) {
                row.pass(placement.granted, Holder::Vm(id), Holder::Free);
                row.pass(placement.unused(), Holder::Leased(id), Holder::Free);
            }
        }
        Ok(())
    }

    fn ask(&mut self, request: u64, wish: Wish) -> Outcome {
        let touched: Vec<VmId> = match wish {
            Wish::Resize { vm, to } => {
                let row = self.vm(vm)?;
                let mut nearest = Share {
                    vcpus: to.vcpus.clamp(row.least.vcpus, row.most.vcpus),
                    slices: to.slices.clamp(row.least.slices, row.most.slices),
                };
                let whole = row.whole_around(nearest.slices);
                if to != nearest {
                    nearest.slices = whole.map_or(nearest.slices, |(below, _)| below);
                    return Err(Refusal::OutOfRange { nearest });
                }
                if let Some((below, above)) = whole {
                    return Err(Refusal::NotWhole { below, above });
                }
                [vm].into()
            }
            Wish::PlaceVcpu { vm, vcpu, to } => {
                self.placed(vm, vcpu, to)?;
                [vm].into()
            }
            Wish::MoveSlices {
                vm,
                from,
                to,
                count,
            } => {
                self.target(to)?;
                if self.vm(vm)?.granted_at(from).slices < count || from == to {
                    return Err(Refusal::NoRoom { node: from });
                }
                [vm].into()
            }
            Wish::Rebalance { vm } => {
                self.vm(vm)?;
                [vm].into()
            }
            Wish::Drain { node } => {
                self.node(node)?;
                let on = self
                    .vms
                    .iter()
                    .filter(|(_, vm)| vm.placements.contains_key(&node));
                on.map(|(id, _)| *id).collect()
            }
        };
        let same = |job: &&Job| job.wish == wish && job.is_wanted();
        if let Some(job) = self.jobs.values().find(same) {
            return Ok(Done::Joined { job: job.id });
        }
        for vm in &touched {
            if let Some(job) = self.job_of(*vm) {
                return Err(Refusal::Busy { job: job.id });
            }
        }
        let mut before = Share::NONE;
        match wish {
            Wish::Resize { vm, to } => {
                let row = self.vm(vm)?;
                before = row.desired;
                row.desired = to;
                if row.granted() == to {
                    return Ok(Done::Nothing);
                }
            }
            Wish::PlaceVcpu { vm, vcpu, to } => {
                let row = self.vm(vm)?;
                if row.home(vcpu) == to {
                    return Ok(Done::Nothing);
                }
                before = row.desired;
                let given = row.granted().vcpus;
                match (row.home(vcpu), to) {
                    (None, Some(_)) => row.desired.vcpus = given + 1,
                    (Some(_), None) => row.desired.vcpus = given - 1,
                    _ => {}
                }
            }
            Wish::MoveSlices { count: 0, .. } => return Ok(Done::Nothing),
            Wish::Drain { node } => {
                self.node(node)?.cordoned = true;
                if touched.is_empty() {
                    return Ok(Done::Nothing);
                }
            }
            _ => {}
        }
        self.last_job = self.last_job.checked_add(1).ok_or(Refusal::TooLarge)?;
        let id = JobId(self.last_job);
        let job = Job {
            id,
            request,
            wish,
            state: JobState::Waiting,
            steps: Vec::new(),
            done: 0,
            short: 0,
            reason: 0,
            before,
            abandoned: false,
        };
        self.jobs.insert(id, job);
        Ok(Done::Started { job: id })
    }

    /// Checks that a vCPU can be asked to be there, or nowhere.
    fn placed(&mut self, vm: VmId, vcpu: VcpuId, to: Option<NodeId>) -> Result<(), Refusal> {
        let row = self.vm(vm)?;
        let home = row.homes.get(usize::from(vcpu.0));
        let home = *home.ok_or(Refusal::NoVcpu { vcpu: vcpu.0 })?;
        let least = row.granted().vcpus == row.least.vcpus;
        if home.is_some() && to.is_none() && least {
            let nearest = row.granted();
            return Err(Refusal::OutOfRange { nearest });
        }
        match to {
            Some(node) if home != to => self.target(node),
            Some(node) => self.node(node).map(|_| ()),
            None => Ok(()),
        }
    }

    fn target(&mut self, node: NodeId) -> Result<(), Refusal> {
        if self.node(node)?.cordoned {
            return Err(Refusal::Cordoned { node });
        }
        Ok(())
    }
}
