//! A problem for the optimiser, from the tables and the policy.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use vmm_shared::addr::{NodeId, VcpuId};

use super::{Cause, blocks, part, will_exist};
use crate::cluster::{Cluster, Node, Trial, Vm, VmId};
use crate::optimise::{Bounds, DomainTerms, Hinge, Limit, NodeTerms, Problem, Share, Side};
use crate::policy::{Kind, Rule};

/// What is asked for a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Which.
    pub vm: VmId,
    /// What it shall have in all.
    pub total: Share,
    /// A node that it shall not be on.
    pub leave: Option<NodeId>,
    /// Whether what runs may move. If not, nodes only give more where more is
    /// asked, and only less where less is; memory that comes or goes in blocks
    /// moves none in either case.
    pub may_move: bool,
}

/// A problem, and what its parts stand for.
#[derive(Clone, Debug)]
pub struct Draft {
    /// The problem.
    pub problem: Problem,
    /// Its nodes.
    pub nodes: Vec<NodeId>,
    /// What sets each node's most: of vCPUs, of slices.
    pub limits: Vec<(Cause, Cause)>,
    /// Its failure domains, by their own numbers.
    pub domains: Vec<u16>,
}

/// A most that only gets less, and the constraint that set it last.
#[derive(Clone, Copy)]
struct Most {
    count: u32,
    cause: Cause,
}

impl Most {
    fn at_most(&mut self, count: u32, cause: Cause) {
        if count < self.count {
            *self = Self { count, cause };
        }
    }
}

struct Drafter<'a> {
    trial: &'a Trial<'a>,
    ask: &'a Ask,
    vm: &'a Vm,
    /// The policy's rules that apply, with their places in it.
    rules: Vec<(u16, &'a Rule)>,
    without: &'a [Cause],
}

/// Makes a problem of what is asked, as if the constraints in `without` were
/// not there. `trial` is what other VMs' plans leave; `None` if there is no
/// such VM.
#[must_use]
pub fn draft(cluster: &Cluster, trial: &Trial<'_>, ask: &Ask, without: &[Cause]) -> Option<Draft> {
    let rules = (0..).zip(cluster.policy().rules());
    let drafter = Drafter {
        trial,
        ask,
        vm: cluster.vms().get(&ask.vm)?,
        rules: rules
            .filter(|(_, rule)| rule.applies_to(ask.vm.0))
            .filter(|(_, rule)| !rule.hard || !without.contains(&Cause::Rule(rule.name)))
            .collect(),
        without,
    };
    let mut numbers: BTreeMap<u16, u16> = BTreeMap::new();
    let mut draft = Draft {
        problem: Problem {
            total: ask.total,
            ratio: ask.total.slices.div_ceil(ask.total.vcpus.max(1)).max(1),
            ..Problem::default()
        },
        nodes: Vec::new(),
        limits: Vec::new(),
        domains: Vec::new(),
    };
    for (id, node) in cluster.nodes() {
        let number = *numbers.entry(node.domain()).or_insert_with(|| {
            draft.domains.push(node.domain());
            u16::try_from(draft.domains.len() - 1).expect("no more than domains")
        });
        let (terms, limits) = drafter.node(*id, node, number);
        draft.problem.nodes.push(terms);
        draft.nodes.push(*id);
        draft.limits.push(limits);
    }
    drafter.missing_pins(cluster, &mut draft);
    drafter.spread(&mut draft);
    let terms = drafter.domain();
    draft.problem.domains = alloc::vec![terms; draft.domains.len()];
    let near = drafter
        .rules
        .iter()
        .find(|(_, rule)| rule.kind == Kind::Near);
    draft.problem.far_weight = near.map_or(0, |(_, rule)| rule.weight.into());
    Some(draft)
}

/// The least that every node gives, or all that it can, if together they give
/// `total`.
fn even_share(total: u32, mut most: Vec<u32>) -> u32 {
    most.sort_unstable();
    let mut left = total;
    let mut able = u32::try_from(most.len()).expect("16-bit ids");
    for most in most {
        let share = left.div_ceil(able.max(1));
        if share <= most {
            return share;
        }
        left -= most;
        able -= 1;
    }
    // They can't; something else will say so.
    left
}

impl Drafter<'_> {
    fn heeds(&self, cause: Cause) -> bool {
        !self.without.contains(&cause)
    }

    fn node(&self, id: NodeId, node: &Node, domain: u16) -> (NodeTerms, (Cause, Cause)) {
        let has = self.vm.granted_at(id);
        let held = self
            .vm
            .placements()
            .get(&id)
            .map_or(Share::NONE, |placement| placement.held);
        let free = self.trial.free(id);
        let room = Share::new(free.vcpus + held.vcpus, free.slices + held.slices);
        let most = |count| Most {
            count,
            cause: Cause::Capacity,
        };
        let (mut vcpus, mut slices) = (most(room.vcpus), most(room.slices));
        if node.is_cordoned() && self.heeds(Cause::Cordon) {
            vcpus.at_most(has.vcpus, Cause::Cordon);
            slices.at_most(has.slices, Cause::Cordon);
        }
        if self.ask.leave == Some(id) && self.heeds(Cause::Drain) {
            vcpus.at_most(0, Cause::Drain);
            slices.at_most(0, Cause::Drain);
        }
        let mut terms = NodeTerms {
            domain,
            ..NodeTerms::default()
        };
        let mut pinned = 0;
        for (index, rule) in &self.rules {
            if !rule.applies_at(id.0) {
                continue;
            }
            let cause = Cause::Rule(rule.name);
            let hinge = |at: u32, weight: u32, side: Side| Hinge {
                at,
                weight,
                side,
                rule: *index,
            };
            match (rule.kind, rule.hard) {
                (Kind::Headroom, true) => {
                    vcpus.at_most(room.vcpus.saturating_sub(rule.vcpus), cause);
                    slices.at_most(room.slices.saturating_sub(rule.slices), cause);
                }
                (Kind::Headroom, false) => {
                    let vcpus = room.vcpus.saturating_sub(rule.vcpus);
                    let slices = room.slices.saturating_sub(rule.slices);
                    terms
                        .vcpu_hinges
                        .push(hinge(vcpus, rule.weight, Side::Above));
                    terms
                        .slice_hinges
                        .push(hinge(slices, rule.slice_weight, Side::Above));
                }
                (Kind::Spread, true) => {
                    let no_limit = |most: u32| if most == 0 { u32::MAX } else { most };
                    vcpus.at_most(no_limit(rule.vcpus), cause);
                    slices.at_most(no_limit(rule.slices), cause);
                }
                (Kind::FewestMoves, _) => {
                    terms
                        .vcpu_hinges
                        .push(hinge(has.vcpus, rule.weight, Side::Below));
                    terms
                        .slice_hinges
                        .push(hinge(has.slices, rule.slice_weight, Side::Below));
                }
                (Kind::Pack, _) => terms.open_weight = rule.weight,
                (Kind::Pin, _) => pinned += u32::from(self.will_exist(rule.vcpu)),
                // Of the whole problem, or known only later.
                (Kind::Near | Kind::Domain, _) | (Kind::Spread, false) => {}
            }
        }
        // The boot CPU can't be removed; so that it need not move instead, its
        // node keeps one.
        let boot = VcpuId(0);
        let stays = !self.ask.may_move && self.ask.leave != Some(id);
        if stays && pinned == 0 && self.vm.home(boot) == Some(id) {
            pinned = 1;
        }
        let given = self.vm.granted();
        let bounds = |most: u32, has: u32, total: u32, given: u32| {
            let mut bounds = Bounds::new(0, most);
            if stays {
                if total >= given {
                    bounds.min = has;
                }
                if total <= given && self.ask.leave.is_none() {
                    bounds.max = most.min(has);
                }
            }
            bounds
        };
        let total = self.ask.total;
        terms.vcpus = bounds(vcpus.count, has.vcpus, total.vcpus, given.vcpus);
        terms.vcpus.min = terms.vcpus.min.max(pinned);
        terms.slices = match blocks::changed(self.vm, self.ask) {
            Some(block) => {
                let grows = total.slices > given.slices;
                blocks::bounds(has.slices, slices.count, block, grows)
            }
            None => bounds(slices.count, has.slices, total.slices, given.slices),
        };
        (terms, (vcpus.cause, slices.cause))
    }

    fn will_exist(&self, vcpu: u16) -> bool {
        let is_pinned = |vcpu: u16| {
            let mut rules = self.rules.iter();
            rules.any(|(_, rule)| rule.kind == Kind::Pin && rule.vcpu == vcpu)
        };
        will_exist(self.vm, self.ask.total.vcpus, vcpu, is_pinned)
    }

    /// Pins to nodes that are not there: such a node must give a core and has
    /// none.
    fn missing_pins(&self, cluster: &Cluster, draft: &mut Draft) {
        for (_, rule) in &self.rules {
            let node = NodeId(rule.node);
            let needed = rule.kind == Kind::Pin && self.will_exist(rule.vcpu);
            if !needed || cluster.nodes().contains_key(&node) {
                continue;
            }
            if draft.domains.is_empty() {
                draft.domains.push(0);
            }
            draft.problem.nodes.push(NodeTerms {
                vcpus: Bounds::new(1, 0),
                ..NodeTerms::default()
            });
            draft.nodes.push(node);
            let cause = Cause::Rule(rule.name);
            draft.limits.push((cause, cause));
        }
    }

    /// Adds the cost of giving more than the even share, now that it is known
    /// which nodes can give anything.
    fn spread(&self, draft: &mut Draft) {
        let soft = |(_, rule): &&(u16, &Rule)| rule.kind == Kind::Spread && !rule.hard;
        for (index, rule) in self.rules.iter().filter(soft) {
            let even = |total: u32, bounds: fn(&NodeTerms) -> Bounds| {
                let most = draft.problem.nodes.iter().map(|node| bounds(node).max);
                even_share(total, most.collect())
            };
            let vcpus = even(self.ask.total.vcpus, |node| node.vcpus);
            let slices = even(self.ask.total.slices, |node| node.slices);
            let nodes = draft.problem.nodes.iter_mut().zip(&draft.nodes);
            for (terms, _) in nodes.filter(|(_, id)| rule.applies_at(id.0)) {
                let hinge = |at: u32, weight: u32| Hinge {
                    at,
                    weight,
                    side: Side::Above,
                    rule: *index,
                };
                terms.vcpu_hinges.push(hinge(vcpus, rule.weight));
                terms.slice_hinges.push(hinge(slices, rule.slice_weight));
            }
        }
    }

    fn domain(&self) -> DomainTerms {
        let mut terms = DomainTerms::NONE;
        for (index, rule) in &self.rules {
            if rule.kind != Kind::Domain {
                continue;
            }
            let limit = |limit: &mut Limit, total: u32, weight: u32| {
                let most = part(total, rule.percent);
                if rule.hard {
                    limit.max = most;
                } else {
                    limit.soft_max = most;
                    limit.weight = weight;
                    limit.rule = *index;
                }
            };
            limit(&mut terms.vcpus, self.ask.total.vcpus, rule.weight);
            limit(&mut terms.slices, self.ask.total.slices, rule.slice_weight);
        }
        terms
    }
}

#[cfg(test)]
mod tests {
    use super::even_share;

    #[test]
    fn who_can_give_little_gives_all_and_the_others_are_even() {
        assert_eq!(even_share(10, [5, 5, 5].into()), 4);
        assert_eq!(even_share(128, [32, 128, 128].into()), 48);
        assert_eq!(even_share(129, [128, 32, 128].into()), 49);
        assert_eq!(even_share(8, [0, 8, 0].into()), 8);
        assert_eq!(even_share(0, [].into()), 0);
        assert_eq!(even_share(9, [1, 2].into()), 6);
    }
}
