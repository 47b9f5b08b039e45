//! The cluster as tables, replicated by the log.
//!
//! | table | a row | key |
//! | --- | --- | --- |
//! | nodes | failure domain, cordon, cores, slices | node |
//! | cores, slices | who holds it: nobody, a VM, a node's pool | node, index |
//! | VMs | limits; desired, granted and seen; phase | VM |
//! | placements | what a VM holds of a node, and has been granted of that | VM, node |
//! | homes | where a vCPU is; where the guest takes it to be | VM, vCPU |
//! | jobs | wish, state, plan, steps done | job |
//! | rules | the policy | name |
//! | journal | who changed what and what came of it | position |
//!
//! [`Cluster`] is a [`StateMachine`]: the tables are a function of the log.
//! Deciding (which node gives what) is not part of applying: whoever holds
//! the control role computes a plan from its replica ([`place`](crate::place))
//! and appends it; every replica checks it against the tables.
//!
//! *Held* and *granted* differ during a job: a step leases a core (held), a
//! later one lets the VM have it (granted), and at the end what is no longer
//! granted is released. [`Cluster::check`] states what always holds.
//!
//! [`StateMachine`]: vmm_shared::log::StateMachine

mod apply;
mod book;
mod jobs;
pub mod journal;
mod op;
mod reason;
mod snapshot;

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;
use core::hash::Hasher;

use fnv::FnvHasher;
use vmm_shared::addr::{NodeId, VcpuId};
use vmm_shared::control::Digest;

use crate::optimise::Share;
use crate::policy::Policy;

pub use apply::{Done, Refusal};
pub use book::Trial;
pub use jobs::{CANCELLED, Job, JobState, NODE_LOST, Step, StepKind};
pub use op::{Change, JobId, Op, StepResult, VmId, VmPhase, Wish};
pub use reason::Reason;

/// Most cores of a node: places for vCPUs, of which a core that several share
/// is several.
pub const MAX_CORES: u32 = 4096;
/// Most slices of a node: 2 TiB.
pub const MAX_SLICES: u32 = 1 << 20;
/// Most vCPUs of a VM in the tables; what a guest can address is less.
pub const MAX_VM_VCPUS: u32 = 1 << 15;
/// Jobs that are kept when they have ended.
pub const KEPT_JOBS: usize = 64;

/// Who holds a core or a slice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Holder {
    /// Nobody.
    #[default]
    Free,
    /// A VM that uses it: granted.
    Vm(VmId),
    /// A VM that does not use it yet, or any more: held beyond the granted.
    Leased(VmId),
    /// A node, to give it out by itself.
    Pool(NodeId),
}

/// A node's row, with its rows of cores and slices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub(crate) domain: u16,
    pub(crate) cordoned: bool,
    pub(crate) cores: Vec<Holder>,
    pub(crate) slices: Vec<Holder>,
    pub(crate) free: Share,
}

impl Node {
    /// Its failure domain.
    #[must_use]
    pub const fn domain(&self) -> u16 {
        self.domain
    }

    /// Whether nothing new comes onto it.
    #[must_use]
    pub const fn is_cordoned(&self) -> bool {
        self.cordoned
    }

    /// Who holds each core.
    #[must_use]
    pub fn cores(&self) -> &[Holder] {
        &self.cores
    }

    /// Who holds each slice.
    #[must_use]
    pub fn slices(&self) -> &[Holder] {
        &self.slices
    }

    /// What it has.
    #[must_use]
    pub fn size(&self) -> Share {
        Share::new(count(&self.cores), count(&self.slices))
    }

    /// What nobody holds.
    #[must_use]
    pub const fn free(&self) -> Share {
        self.free
    }

    /// Passes rows from one holder to another: the lowest ones, but the highest
    /// of those that a VM uses. The caller has checked that there are so many.
    pub(crate) fn pass(&mut self, share: Share, from: Holder, to: Holder) {
        relabel(&mut self.cores, share.vcpus, from, to);
        relabel(&mut self.slices, share.slices, from, to);
        if from == Holder::Free {
            self.free.vcpus -= share.vcpus;
            self.free.slices -= share.slices;
        }
        if to == Holder::Free {
            self.free.vcpus += share.vcpus;
            self.free.slices += share.slices;
        }
    }

    /// What a holder has of it.
    #[must_use]
    pub fn held_by(&self, holder: Holder) -> Share {
        let rows = |rows: &[Holder]| {
            u32::try_from(rows.iter().filter(|row| **row == holder).count())
                .expect("fewer rows than the most")
        };
        Share::new(rows(&self.cores), rows(&self.slices))
    }
}

fn count(rows: &[Holder]) -> u32 {
    u32::try_from(rows.len()).expect("fewer rows than the most")
}

fn relabel(rows: &mut [Holder], count: u32, from: Holder, to: Holder) {
    let matching = rows.iter_mut().filter(|row| **row == from);
    let pass = |row: &mut Holder| *row = to;
    match from {
        Holder::Vm(_) => matching.rev().take(count as usize).for_each(pass),
        _ => matching.take(count as usize).for_each(pass),
    }
}

/// What a VM has of one node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Leased.
    pub held: Share,
    /// Of that, what the VM can use.
    pub granted: Share,
}

impl Placement {
    /// What is leased and not used.
    #[must_use]
    pub const fn unused(&self) -> Share {
        Share {
            vcpus: self.held.vcpus - self.granted.vcpus,
            slices: self.held.slices - self.granted.slices,
        }
    }
}

/// A VM's row, with its placements and homes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vm {
    pub(crate) least: Share,
    pub(crate) most: Share,
    pub(crate) desired: Share,
    pub(crate) seen: Share,
    pub(crate) phase: VmPhase,
    /// Slices that come and go at once while the guest runs; at least 1.
    pub(crate) block: u16,
    pub(crate) placements: BTreeMap<NodeId, Placement>,
    /// By vCPU: where it is, if it is there.
    pub(crate) homes: Vec<Option<NodeId>>,
    /// By vCPU: the node that the guest takes it to be near to. Empty if that
    /// is not known.
    pub(crate) seats: Vec<NodeId>,
}

impl Vm {
    /// The least that it can have.
    #[must_use]
    pub const fn least(&self) -> Share {
        self.least
    }

    /// The most that it can have.
    #[must_use]
    pub const fn most(&self) -> Share {
        self.most
    }

    /// Slices that come and go at once while its guest runs: beyond the least
    /// it has whole blocks.
    #[must_use]
    pub fn block(&self) -> u32 {
        self.block.into()
    }

    /// The nearest numbers of slices that it can have, below and above one that
    /// is no number of whole blocks.
    #[must_use]
    pub fn whole_around(&self, slices: u32) -> Option<(u32, u32)> {
        let more = slices.saturating_sub(self.least.slices);
        if more.is_multiple_of(self.block()) {
            return None;
        }
        let below = self.least.slices + more / self.block() * self.block();
        Some((below, below.saturating_add(self.block())))
    }

    /// What was asked for it last.
    #[must_use]
    pub const fn desired(&self) -> Share {
        self.desired
    }

    /// What it has been given.
    #[must_use]
    pub fn granted(&self) -> Share {
        let mut sum = Share::NONE;
        for placement in self.placements.values() {
            sum.vcpus += placement.granted.vcpus;
            sum.slices += placement.granted.slices;
        }
        sum
    }

    /// What its guest says that it has.
    #[must_use]
    pub const fn seen(&self) -> Share {
        self.seen
    }

    /// How far it is.
    #[must_use]
    pub const fn phase(&self) -> VmPhase {
        self.phase
    }

    /// What it has, node by node.
    #[must_use]
    pub const fn placements(&self) -> &BTreeMap<NodeId, Placement> {
        &self.placements
    }

    /// Where its vCPUs are, by number.
    #[must_use]
    pub fn homes(&self) -> &[Option<NodeId>] {
        &self.homes
    }

    /// Where a vCPU is.
    #[must_use]
    pub fn home(&self, vcpu: VcpuId) -> Option<NodeId> {
        *self.homes.get(usize::from(vcpu.0))?
    }

    /// The node whose memory the guest has been told that a vCPU is near to,
    /// wherever it is now: all possible vCPUs are counted node by node.
    #[must_use]
    pub fn seat(&self, vcpu: VcpuId) -> Option<NodeId> {
        self.seats.get(usize::from(vcpu.0)).copied()
    }

    /// What it has been granted of a node.
    #[must_use]
    pub fn granted_at(&self, node: NodeId) -> Share {
        self.placements
            .get(&node)
            .map_or(Share::NONE, |placement| placement.granted)
    }
}

/// All tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cluster {
    pub(crate) controller: Option<NodeId>,
    /// How often the control role was taken over.
    pub(crate) term: u32,
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    /// Nodes that have left, and wait to be admitted.
    pub(crate) left: BTreeSet<NodeId>,
    pub(crate) vms: BTreeMap<VmId, Vm>,
    pub(crate) jobs: BTreeMap<JobId, Job>,
    pub(crate) last_job: u32,
    pub(crate) policy: Policy,
    pub(crate) journal: journal::Journal,
}

impl Cluster {
    /// Who decides, and for the how-manieth time somebody began to.
    #[must_use]
    pub const fn controller(&self) -> (Option<NodeId>, u32) {
        (self.controller, self.term)
    }

    /// The nodes.
    #[must_use]
    pub const fn nodes(&self) -> &BTreeMap<NodeId, Node> {
        &self.nodes
    }

    /// The nodes that have left and have not been admitted again.
    pub fn left(&self) -> impl Iterator<Item = NodeId> {
        self.left.iter().copied()
    }

    /// Whether a node has left and is not to join by itself.
    #[must_use]
    pub fn has_left(&self, node: NodeId) -> bool {
        self.left.contains(&node)
    }

    /// The VMs.
    #[must_use]
    pub const fn vms(&self) -> &BTreeMap<VmId, Vm> {
        &self.vms
    }

    /// The jobs: all that have not ended, and the last that have.
    #[must_use]
    pub const fn jobs(&self) -> &BTreeMap<JobId, Job> {
        &self.jobs
    }

    /// The constraints in force.
    #[must_use]
    pub const fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Who changed what lately.
    #[must_use]
    pub const fn journal(&self) -> &journal::Journal {
        &self.journal
    }

    /// The log position behind the last operation in the tables, or 0.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.journal.end()
    }

    /// A digest of all tables, and the log position behind the last operation
    /// in them: 0 if there is none. Equal replicas have equal digests.
    #[must_use]
    pub fn digest(&self) -> Digest {
        let mut bytes = Vec::new();
        self.write(&mut bytes);
        let mut hasher = FnvHasher::default();
        hasher.write(&bytes);
        Digest {
            position: self.end(),
            value: hasher.finish(),
        }
    }

    /// The job that has not ended and changes this VM, if there is one.
    #[must_use]
    pub fn job_of(&self, vm: VmId) -> Option<&Job> {
        self.jobs
            .values()
            .find(|job| !job.state.has_ended() && job.touches(self, vm))
    }

    /// What always holds: no core or slice has two holders or none that
    /// exists, every count agrees with its rows, no VM has been granted what
    /// it does not hold, and every vCPU has one home. The first broken one is
    /// named.
    ///
    /// # Errors
    /// If a rule is broken: then this state was not made by applying a log.
    pub fn check(&self) -> Result<(), &'static str> {
        for (id, node) in &self.nodes {
            let mut rows: BTreeMap<Holder, Share> = BTreeMap::new();
            for holder in &node.cores {
                rows.entry(*holder).or_default().vcpus += 1;
            }
            for holder in &node.slices {
                rows.entry(*holder).or_default().slices += 1;
            }
            if node.free != rows.remove(&Holder::Free).unwrap_or_default() {
                return Err("a node's free rows are miscounted");
            }
            for (vm, row) in &self.vms {
                let placement = row.placements.get(id).copied().unwrap_or_default();
                let used = rows.remove(&Holder::Vm(*vm)).unwrap_or_default();
                let leased = rows.remove(&Holder::Leased(*vm)).unwrap_or_default();
                let held = Share::new(used.vcpus + leased.vcpus, used.slices + leased.slices);
                if used != placement.granted || held != placement.held {
                    return Err("a VM does not hold the rows that its placement says");
                }
            }
            let known = |holder: &Holder| match holder {
                Holder::Pool(node) => self.nodes.contains_key(node),
                Holder::Free | Holder::Vm(_) | Holder::Leased(_) => false,
            };
            if !rows.keys().all(known) {
                return Err("a row's holder does not exist");
            }
        }
        if self.left.iter().any(|node| self.nodes.contains_key(node)) {
            return Err("a node that has left is there");
        }
        for vm in self.vms.values() {
            if !vm.seats.is_empty() && vm.seats.len() != vm.homes.len() {
                return Err("some vCPUs have seats and some have none");
            }
            for (node, placement) in &vm.placements {
                if !self.nodes.contains_key(node) {
                    return Err("a VM is on a node that does not exist");
                }
                if placement.held == Share::NONE {
                    return Err("an empty placement was kept");
                }
                if placement.granted.vcpus > placement.held.vcpus
                    || placement.granted.slices > placement.held.slices
                {
                    return Err("a VM was granted what it does not hold");
                }
                let at_home = vm.homes.iter().filter(|home| **home == Some(*node)).count();
                if at_home != placement.granted.vcpus as usize {
                    return Err("a node's vCPUs are miscounted");
                }
            }
            let homes = vm.homes.iter().flatten();
            if homes.count() != vm.granted().vcpus as usize {
                return Err("a vCPU is at home where its VM is not");
            }
        }
        Ok(())
    }
}
