//! Why each node gives what it gives, and why nothing can.

use alloc::format;
use alloc::vec::Vec;
use core::fmt;

use vmm_shared::addr::NodeId;

use super::Cause;
use super::draft::{Ask, Draft, draft};
use crate::cluster::{Cluster, Trial};
use crate::optimise::{Hinge, NodeTerms, Share};
use crate::policy::{Kind, Name};

/// What a placement costs by one soft constraint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Its name.
    pub rule: Name,
    /// What is paid for breaking it.
    pub cost: i64,
}

/// Why a node gives what it gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    /// Which.
    pub node: NodeId,
    /// What it gives.
    pub share: Share,
    /// What it could give at most.
    pub most: Share,
    /// The constraint that keeps it from giving more vCPUs, if it gives the
    /// most; otherwise the costs decided.
    pub vcpus_limited_by: Option<Cause>,
    /// The same for slices.
    pub slices_limited_by: Option<Cause>,
    /// What its share costs, by constraint.
    pub costs: Vec<Cost>,
}

/// Why a placement is as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// The nodes that give anything, and those that give their most of nothing
    /// because of a constraint.
    pub nodes: Vec<Reason>,
    /// What all costs, by constraint; failure domains included.
    pub costs: Vec<Cost>,
}

fn add(costs: &mut Vec<Cost>, rule: Name, cost: i64) {
    if cost == 0 {
        return;
    }
    match costs.iter_mut().find(|known| known.rule == rule) {
        Some(known) => known.cost += cost,
        None => costs.push(Cost { rule, cost }),
    }
}

fn costs_of_node(
    cluster: &Cluster,
    draft: &Draft,
    vm: u16,
    terms: &NodeTerms,
    share: Share,
) -> Vec<Cost> {
    let rules = cluster.policy().rules();
    let mut costs = Vec::new();
    let hinges = |costs: &mut Vec<Cost>, hinges: &[Hinge], count: u32| {
        for hinge in hinges {
            if let Some(rule) = rules.get(usize::from(hinge.rule)) {
                add(costs, rule.name, hinge.cost(count));
            }
        }
    };
    hinges(&mut costs, &terms.vcpu_hinges, share.vcpus);
    hinges(&mut costs, &terms.slice_hinges, share.slices);
    let problem = &draft.problem;
    for rule in rules.iter().filter(|rule| rule.applies_to(vm)) {
        match rule.kind {
            Kind::Pack if share.is_open() => add(&mut costs, rule.name, terms.open_weight.into()),
            Kind::Near => {
                let far = i64::from(problem.far_slices(share));
                add(&mut costs, rule.name, far * problem.far_weight);
            }
            _ => {}
        }
    }
    costs
}

/// Explains a placement of a draft.
#[must_use]
pub fn explain(cluster: &Cluster, draft: &Draft, ask: &Ask, shares: &[Share]) -> Explanation {
    let problem = &draft.problem;
    let mut explanation = Explanation {
        nodes: Vec::new(),
        costs: Vec::new(),
    };
    let rows = draft.nodes.iter().zip(&problem.nodes);
    for (((node, terms), limits), share) in rows.zip(&draft.limits).zip(shares) {
        let costs = costs_of_node(cluster, draft, ask.vm.0, terms, *share);
        for cost in &costs {
            add(&mut explanation.costs, cost.rule, cost.cost);
        }
        let limit = |at_most: bool, cause: Cause| at_most.then_some(cause);
        let reason = Reason {
            node: *node,
            share: *share,
            most: Share::new(terms.vcpus.max, terms.slices.max),
            vcpus_limited_by: limit(share.vcpus == terms.vcpus.max, limits.0),
            slices_limited_by: limit(share.slices == terms.slices.max, limits.1),
            costs,
        };
        let closed = limits.0 != Cause::Capacity || limits.1 != Cause::Capacity;
        if share.is_open() || (closed && reason.most == Share::NONE) {
            explanation.nodes.push(reason);
        }
    }
    let rules = cluster.policy().rules();
    for (terms, sum) in problem.domains.iter().zip(problem.domain_sums(shares)) {
        for (limit, count) in [(&terms.vcpus, sum.vcpus), (&terms.slices, sum.slices)] {
            if let Some(rule) = rules.get(usize::from(limit.rule)) {
                add(&mut explanation.costs, rule.name, limit.cost(count));
            }
        }
    }
    explanation
}

impl fmt::Display for Explanation {
    /// A line per node, then one with the costs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for reason in &self.nodes {
            let Share { vcpus, slices } = reason.share;
            write!(f, "node {}: {vcpus} vCPUs, {slices} slices", reason.node.0)?;
            if let Some(cause) = reason.vcpus_limited_by {
                write!(f, "; no more vCPUs by {cause}")?;
            }
            if let Some(cause) = reason.slices_limited_by {
                write!(f, "; no more slices by {cause}")?;
            }
            for cost in &reason.costs {
                write!(f, "; {} costs {}", cost.rule, cost.cost)?;
            }
            writeln!(f)?;
        }
        if self.costs.is_empty() {
            return f.write_str("in all: nothing that a preference counts");
        }
        f.write_str("in all:")?;
        for cost in &self.costs {
            write!(f, " {} {}", cost.rule, cost.cost)?;
        }
        Ok(())
    }
}

/// What there is too little of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// Cores for vCPUs.
    Vcpus,
    /// Slices of memory.
    Slices,
}

/// A row that conflicts with what is asked: a node that can't give more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Which.
    pub node: NodeId,
    /// What it has.
    pub size: u32,
    /// What nobody holds of that.
    pub free: u32,
    /// What the VM has of it now.
    pub has: u32,
    /// What it must give at least.
    pub least: u32,
    /// What it may give at most …
    pub most: u32,
    /// … because of this.
    pub cause: Cause,
}

/// Why there is no placement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// What there is too little of.
    pub resource: Resource,
    /// What was asked.
    pub asked: u32,
    /// What all nodes may give together.
    pub possible: u32,
    /// Constraints that together with what was asked can't hold; without any
    /// one of them the others could. [`Cause::Capacity`] alone: it would not
    /// fit without any constraint either.
    pub causes: Vec<Cause>,
    /// The rows at which they bind.
    pub rows: Vec<Row>,
}

impl fmt::Display for Conflict {
    /// One line, with the nodes that lack most.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.resource {
            Resource::Vcpus => "vCPUs",
            Resource::Slices => "of memory",
        };
        let amount = |count: u32| match self.resource {
            Resource::Vcpus => format!("{count}"),
            Resource::Slices => format!("{}M", u64::from(count) * 2),
        };
        let (asked, possible) = (amount(self.asked), amount(self.possible));
        write!(f, "{asked} {what} asked, {possible} possible by ")?;
        for (index, cause) in self.causes.iter().enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            write!(f, "{comma}{cause}")?;
        }
        for row in self.rows.iter().take(8) {
            write!(
                f,
                "; node {} gives {} at most by {}",
                row.node.0,
                amount(row.most),
                row.cause
            )?;
            if row.least > row.most {
                write!(f, " and must give {}", amount(row.least))?;
            }
        }
        match self.rows.len().saturating_sub(8) {
            0 => Ok(()),
            more => write!(f, "; and {more} more nodes"),
        }
    }
}

/// Finds why what is asked has no placement: an irreducible set of
/// constraints, by leaving them out one after the other. `None` if there is
/// one.
#[must_use]
pub fn conflict(cluster: &Cluster, trial: &Trial<'_>, ask: &Ask) -> Option<Conflict> {
    let full = draft(cluster, trial, ask, &[])?;
    if full.problem.is_possible() {
        return None;
    }
    let mut left_out = Vec::new();
    let mut causes = Vec::new();
    let rules = cluster.policy().rules().iter();
    let hard = rules.filter(|rule| rule.hard && rule.applies_to(ask.vm.0));
    let mut rest: Vec<Cause> = [Cause::Cordon, Cause::Drain].into();
    rest.extend(hard.map(|rule| Cause::Rule(rule.name)));
    while let Some(cause) = rest.pop() {
        left_out.push(cause);
        let without = draft(cluster, trial, ask, &left_out)?;
        if without.problem.is_possible() {
            // Needed for the conflict: it stays in.
            left_out.pop();
            causes.push(cause);
        }
    }
    if causes.is_empty() {
        causes.push(Cause::Capacity);
    }
    let core = draft(cluster, trial, ask, &left_out)?;
    Some(describe(cluster, &core, ask, causes))
}

fn describe(cluster: &Cluster, core: &Draft, ask: &Ask, causes: Vec<Cause>) -> Conflict {
    let problem = &core.problem;
    let mut of_vcpus = problem.clone();
    of_vcpus.total.slices = 0;
    for node in &mut of_vcpus.nodes {
        node.slices.min = 0;
    }
    let resource = if of_vcpus.is_possible() {
        Resource::Slices
    } else {
        Resource::Vcpus
    };
    let pick = |share: Share| match resource {
        Resource::Vcpus => share.vcpus,
        Resource::Slices => share.slices,
    };
    let mut most = alloc::vec![0_u64; problem.domains.len()];
    let mut rows = Vec::new();
    let vm = cluster.vms().get(&ask.vm);
    for ((id, terms), limits) in core.nodes.iter().zip(&problem.nodes).zip(&core.limits) {
        let (bounds, cause) = match resource {
            Resource::Vcpus => (terms.vcpus, limits.0),
            Resource::Slices => (terms.slices, limits.1),
        };
        most[usize::from(terms.domain)] += u64::from(bounds.max);
        // A pin may name a node that is not there.
        let node = cluster.nodes().get(id);
        if causes.contains(&cause) || causes == [Cause::Capacity] || bounds.min > bounds.max {
            rows.push(Row {
                node: *id,
                size: node.map_or(0, |node| pick(node.size())),
                free: node.map_or(0, |node| pick(node.free())),
                has: vm.map_or(0, |vm| pick(vm.granted_at(*id))),
                least: bounds.min,
                most: bounds.max,
                cause,
            });
        }
    }
    let possible = most.iter().zip(&problem.domains).map(|(most, domain)| {
        let limit = match resource {
            Resource::Vcpus => domain.vcpus.max,
            Resource::Slices => domain.slices.max,
        };
        (*most).min(limit.into())
    });
    rows.sort_by_key(|row| row.most);
    Conflict {
        resource,
        asked: pick(ask.total),
        possible: u32::try_from(possible.sum::<u64>()).unwrap_or(u32::MAX),
        causes,
        rows,
    }
}
