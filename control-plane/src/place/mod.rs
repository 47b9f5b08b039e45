//! From wishes to plans: what the control role computes and appends.
//!
//! | step | module |
//! | --- | --- |
//! | what the tables and the policy allow, and what it costs: a problem | [`draft`](mod@draft) |
//! | its best answer | [`optimise`](crate::optimise) |
//! | the same in whole blocks of memory | `blocks` |
//! | the steps from what is to what shall be | [`steps`] |
//! | all of it, for each wish | [`plan`](mod@plan) |
//! | why each node gives what it gives; why nothing can | [`explain`](mod@explain) |
//!
//! Nothing here changes the tables, and nothing has to run on more than one
//! node: a plan goes into the log, and there every replica checks it
//! ([`broken`]).

mod blocks;
pub mod draft;
pub mod explain;
pub mod plan;
pub mod steps;

use core::fmt;

use vmm_shared::addr::{NodeId, VcpuId};

use crate::cluster::{Cluster, Vm, VmId};
use crate::optimise::Share;
use crate::policy::{Kind, Name, Rule};

/// What decides: a constraint of the policy by its name, or one of those that
/// nobody has to declare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// No core or slice is given twice.
    Capacity,
    /// Nothing new comes onto a cordoned node.
    Cordon,
    /// Nothing stays on a node that is drained.
    Drain,
    /// The policy's constraint of that name.
    Rule(Name),
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Capacity => f.pad("capacity"),
            Self::Cordon => f.pad("cordon"),
            Self::Drain => f.pad("drain"),
            Self::Rule(name) => name.fmt(f),
        }
    }
}

/// The most of `total` that a percentage is: rounded up, so that one unit is
/// always allowed.
pub(crate) fn part(total: u32, percent: u32) -> u32 {
    let part = (u64::from(total) * u64::from(percent)).div_ceil(100);
    u32::try_from(part).unwrap_or(u32::MAX)
}

/// Whether a VM that is to have `total` vCPUs will have this one, wherever each
/// is: the lowest of those that it has stay. Of those that come, the first ever
/// is the one that the guest boots on, and pinned ones come when no others are
/// left.
pub(crate) fn will_exist(vm: &Vm, total: u32, vcpu: u16, is_pinned: impl Fn(u16) -> bool) -> bool {
    let home = |vcpu: u16| vm.home(VcpuId(vcpu));
    let all = u16::try_from(vm.homes().len()).unwrap_or(u16::MAX);
    let count = |range: core::ops::Range<u16>, is: &dyn Fn(u16) -> bool| {
        u32::try_from(range.filter(|vcpu| is(*vcpu)).count()).expect("16-bit numbers")
    };
    if vcpu >= all {
        return false;
    }
    if home(vcpu).is_some() {
        return count(0..vcpu, &|other| home(other).is_some()) < total;
    }
    let missing = total.saturating_sub(vm.granted().vcpus);
    let others = count(0..all, &|other| home(other).is_none() && !is_pinned(other));
    let before = count(0..vcpu, &|other| home(other).is_none() && is_pinned(other));
    missing > 0 && (vcpu == 0 || is_pinned(vcpu) && others + before < missing)
}

/// The hard constraint that a VM would break with `after`, if there is one;
/// `free` is what each node would have left. Shares nothing with how plans
/// are made.
#[must_use]
pub fn broken(
    cluster: &Cluster,
    id: VmId,
    after: &Vm,
    free: &dyn Fn(NodeId) -> Share,
) -> Option<Cause> {
    let before = cluster.vms().get(&id);
    for (node, placement) in after.placements() {
        let Some(row) = cluster.nodes().get(node) else {
            return Some(Cause::Capacity);
        };
        let had = before.map_or(Share::NONE, |vm| vm.granted_at(*node));
        let has = placement.granted;
        if row.is_cordoned() && (has.vcpus > had.vcpus || has.slices > had.slices) {
            return Some(Cause::Cordon);
        }
    }
    let rules = cluster.policy().rules().iter();
    let mut rules = rules.filter(|rule| rule.hard && rule.applies_to(id.0));
    rules
        .find(|rule| breaks(rule, cluster, after, free))
        .map(|rule| Cause::Rule(rule.name))
}

fn breaks(rule: &Rule, cluster: &Cluster, after: &Vm, free: &dyn Fn(NodeId) -> Share) -> bool {
    let total = after.granted();
    let mut here = after
        .placements()
        .iter()
        .filter(|(node, _)| rule.applies_at(node.0));
    match rule.kind {
        Kind::Headroom => here.any(|(node, placement)| {
            let free = free(*node);
            (placement.held.vcpus > 0 && free.vcpus < rule.vcpus)
                || (placement.held.slices > 0 && free.slices < rule.slices)
        }),
        Kind::Spread => here.any(|(_, placement)| {
            let beyond = |count: u32, most: u32| most > 0 && count > most;
            beyond(placement.granted.vcpus, rule.vcpus)
                || beyond(placement.granted.slices, rule.slices)
        }),
        Kind::Domain => {
            let most = Share::new(
                part(total.vcpus, rule.percent),
                part(total.slices, rule.percent),
            );
            let domains = cluster.nodes().values().map(crate::cluster::Node::domain);
            let mut domains: alloc::vec::Vec<u16> = domains.collect();
            domains.sort_unstable();
            domains.dedup();
            domains.into_iter().any(|domain| {
                let mut sum = Share::NONE;
                for (node, placement) in after.placements() {
                    let row = cluster.nodes().get(node);
                    if row.is_some_and(|row| row.domain() == domain) {
                        sum.vcpus += placement.granted.vcpus;
                        sum.slices += placement.granted.slices;
                    }
                }
                sum.vcpus > most.vcpus || sum.slices > most.slices
            })
        }
        Kind::Pin => {
            let home = after.home(VcpuId(rule.vcpu));
            home.is_some_and(|home| home.0 != rule.node)
        }
        Kind::Pack | Kind::Near | Kind::FewestMoves => false,
    }
}
