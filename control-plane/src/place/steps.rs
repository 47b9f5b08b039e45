//! The steps from what a VM has to what it shall have.
//!
//! Within a failure domain first, then between domains, nodes that shall give
//! less hand over to nodes that shall give more; what is left over is added
//! or removed. So what a node or a domain gives goes one way during the whole
//! plan, and no step breaks a limit that neither its start nor its end breaks.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use vmm_shared::addr::{NodeId, VcpuId};

use super::will_exist;
use crate::cluster::{Cluster, Step, StepKind, Vm, VmId};
use crate::optimise::Share;
use crate::policy::{ANY, Kind};

/// A node, and by how much it gives more or less than before.
type Difference = (u16, NodeId, u32);

/// The steps that give a VM `shares`, sorted as plans are. `None` if there is
/// no such VM.
#[must_use]
pub fn steps(cluster: &Cluster, id: VmId, shares: &[(NodeId, Share)]) -> Option<Vec<Step>> {
    let vm = cluster.vms().get(&id)?;
    let mut wanted: BTreeMap<NodeId, Share> = shares.iter().copied().collect();
    for node in vm.placements().keys() {
        wanted.entry(*node).or_default();
    }
    let mut all = Vec::new();
    for (node, share) in &wanted {
        let held = vm
            .placements()
            .get(node)
            .map_or(Share::NONE, |placement| placement.held);
        all.extend(ledger(id, *node, held, *share));
    }
    slice_steps(cluster, id, vm, &wanted, &mut all);
    vcpu_steps(cluster, id, vm, &wanted, &mut all);
    // Stable: among equals the order in which they were made.
    all.sort_by_key(|step| step.kind);
    Some(all)
}

fn ledger(id: VmId, node: NodeId, held: Share, wanted: Share) -> impl Iterator<Item = Step> {
    let more = Share {
        vcpus: wanted.vcpus.saturating_sub(held.vcpus),
        slices: wanted.slices.saturating_sub(held.slices),
    };
    let less = Share {
        vcpus: held.vcpus.saturating_sub(wanted.vcpus),
        slices: held.slices.saturating_sub(wanted.slices),
    };
    let lease = Step {
        to: node.0,
        cores: more.vcpus,
        slices: more.slices,
        ..Step::new(StepKind::Lease, id)
    };
    let release = Step {
        from: node.0,
        cores: less.vcpus,
        slices: less.slices,
        ..Step::new(StepKind::Release, id)
    };
    let both = [lease, release];
    both.into_iter()
        .filter(|step| step.cores > 0 || step.slices > 0)
}

fn slice_steps(
    cluster: &Cluster,
    id: VmId,
    vm: &Vm,
    wanted: &BTreeMap<NodeId, Share>,
    out: &mut Vec<Step>,
) {
    let mut givers: Vec<Difference> = Vec::new();
    let mut takers: Vec<Difference> = Vec::new();
    for (node, share) in wanted {
        let has = vm.granted_at(*node).slices;
        let domain = domain_of(cluster, *node);
        if share.slices > has {
            takers.push((domain, *node, share.slices - has));
        } else if share.slices < has {
            givers.push((domain, *node, has - share.slices));
        }
    }
    for same_domain in [true, false] {
        for giver in &mut givers {
            for taker in &mut takers {
                let count = giver.2.min(taker.2);
                if count == 0 || (same_domain && giver.0 != taker.0) {
                    continue;
                }
                giver.2 -= count;
                taker.2 -= count;
                out.push(Step {
                    from: giver.1.0,
                    to: taker.1.0,
                    slices: count,
                    ..Step::new(StepKind::Move, id)
                });
            }
        }
    }
    for (_, node, slices) in takers.into_iter().filter(|taker| taker.2 > 0) {
        out.push(Step {
            to: node.0,
            slices,
            ..Step::new(StepKind::Add, id)
        });
    }
    for (_, node, slices) in givers.into_iter().filter(|giver| giver.2 > 0) {
        out.push(Step {
            from: node.0,
            slices,
            ..Step::new(StepKind::Remove, id)
        });
    }
}

/// As for slices, but each vCPU by its number: pinned ones go where they
/// belong, the others stay where they can, and those that come have their seat
/// on their node, as long as there are such.
fn vcpu_steps(
    cluster: &Cluster,
    id: VmId,
    vm: &Vm,
    wanted: &BTreeMap<NodeId, Share>,
    out: &mut Vec<Step>,
) {
    let total: u32 = wanted.values().map(|share| share.vcpus).sum();
    let mut room: BTreeMap<NodeId, u32> = wanted
        .iter()
        .map(|(node, share)| (*node, share.vcpus))
        .collect();
    let mut take = |node: NodeId| match room.get_mut(&node) {
        Some(left) if *left > 0 => {
            *left -= 1;
            true
        }
        _ => false,
    };
    let homes = vm.homes();
    // Which there will be, where they are, and where they will be.
    let present = (0..)
        .zip(homes)
        .filter_map(|(vcpu, home)| Some((vcpu, Some((*home)?))));
    let absent = (0..).zip(homes).filter(|(_, home)| home.is_none());
    let order = present.chain(absent.map(|(vcpu, _)| (vcpu, None)));
    let order: Vec<(u16, Option<NodeId>)> = order.collect();
    let pins = cluster.policy().rules().iter();
    let pins: Vec<(u16, NodeId)> = pins
        .filter(|rule| rule.kind == Kind::Pin && rule.applies_to(id.0))
        .map(|rule| (rule.vcpu, NodeId(rule.node)))
        .collect();
    let pin = |vcpu: u16| pins.iter().find(|pin| pin.0 == vcpu).map(|pin| pin.1);
    let mut targets: BTreeMap<u16, NodeId> = BTreeMap::new();
    for (vcpu, _) in &order {
        if let Some(node) = pin(*vcpu)
            && will_exist(vm, total, *vcpu, |vcpu| pin(vcpu).is_some())
            && take(node)
        {
            targets.insert(*vcpu, node);
        }
    }
    // The lowest first, they stay where they are. Who finds no room there is
    // moved or removed.
    for (vcpu, home) in &order {
        if let Some(home) = home
            && !targets.contains_key(vcpu)
            && pin(*vcpu).is_none()
            && take(*home)
        {
            targets.insert(*vcpu, *home);
        }
    }
    let mut left: Vec<Difference> = room
        .iter()
        .filter(|(_, left)| **left > 0)
        .map(|(node, left)| (domain_of(cluster, *node), *node, *left))
        .collect();
    let mut homeless: Vec<(u16, Option<NodeId>)> = order
        .iter()
        .filter(|(vcpu, _)| !targets.contains_key(vcpu))
        .copied()
        .collect();
    // The guest booted on vCPU 0 and keeps it: if need be, another one goes.
    let boots = |(vcpu, home): &(u16, Option<NodeId>)| *vcpu == 0 && home.is_some();
    if homeless.first().is_some_and(boots) && left.is_empty() {
        let stays = |(vcpu, _): &(&u16, &NodeId)| pin(**vcpu).is_none();
        let last = targets.iter().rev().find(stays);
        if let Some((vcpu, node)) = last.map(|(vcpu, node)| (*vcpu, *node)) {
            targets.remove(&vcpu);
            left.push((domain_of(cluster, node), node, 1));
        }
    }
    let mut rehouse = |homeless: &mut Vec<(u16, Option<NodeId>)>, same_domain: bool| {
        homeless.retain(|(vcpu, home)| {
            let Some(home) = home else {
                return true;
            };
            let domain = domain_of(cluster, *home);
            let place = left.iter_mut().find(|(other, node, left)| {
                *left > 0 && (!same_domain || *other == domain) && node != home
            });
            let Some(place) = place else {
                return true;
            };
            place.2 -= 1;
            targets.insert(*vcpu, place.1);
            false
        });
    };
    let others = homeless.split_off(usize::from(homeless.first().is_some_and(boots)));
    rehouse(&mut homeless, true);
    rehouse(&mut homeless, false);
    homeless.extend(others);
    rehouse(&mut homeless, true);
    rehouse(&mut homeless, false);
    let mut absent: Vec<u16> = homeless
        .into_iter()
        .filter_map(|(vcpu, home)| home.is_none().then_some(vcpu))
        .collect();
    // Each node in its turn takes those that belong to it. The rest is for who
    // is left, but the guest boots on vCPU 0: that one comes in any case.
    let belongs = |vcpu: u16, node: NodeId| match pin(vcpu) {
        Some(pin) => pin == node,
        None => vm.seat(VcpuId(vcpu)) == Some(node),
    };
    let goes = |vcpu: u16, node: NodeId| pin(vcpu).is_none_or(|pin| pin == node);
    left.retain(|(_, _, left)| *left > 0);
    let boots = absent.first() == Some(&0);
    let first = left.iter().position(|(_, node, _)| belongs(0, *node));
    if boots && let Some(place) = left.get_mut(first.unwrap_or(0)) {
        place.2 -= 1;
        targets.insert(absent.remove(0), place.1);
    }
    for fits in [&belongs as &dyn Fn(u16, NodeId) -> bool, &goes] {
        for (_, node, left) in &mut left {
            while *left > 0
                && let Some(index) = absent.iter().position(|vcpu| fits(*vcpu, *node))
            {
                *left -= 1;
                targets.insert(absent.remove(index), *node);
            }
        }
    }
    let mut moves: Vec<Step> = Vec::new();
    for (vcpu, home) in &order {
        let to = targets.get(vcpu).copied();
        let kind = match (home, to) {
            (None, Some(_)) => StepKind::Add,
            (Some(_), None) => StepKind::Remove,
            (Some(home), Some(to)) if *home != to => StepKind::Move,
            _ => continue,
        };
        let step = Step {
            vcpu: *vcpu,
            from: home.map_or(ANY, |node| node.0),
            to: to.map_or(ANY, |node| node.0),
            ..Step::new(kind, id)
        };
        if kind == StepKind::Move {
            moves.push(step);
        } else {
            out.push(step);
        }
    }
    order_moves(cluster, id, vm, wanted, moves, out);
}

/// Puts moves of vCPUs into an order in which each finds a core, and no domain
/// gives more than before or after. Where pins make them go round in a circle,
/// one more core is leased for the time.
fn order_moves(
    cluster: &Cluster,
    id: VmId,
    vm: &Vm,
    wanted: &BTreeMap<NodeId, Share>,
    mut moves: Vec<Step>,
    out: &mut Vec<Step>,
) {
    let domain = |node: u16| domain_of(cluster, NodeId(node));
    let mut room: BTreeMap<u16, u32> = BTreeMap::new();
    let mut domains: BTreeMap<u16, (u32, u32)> = BTreeMap::new();
    for (node, share) in wanted {
        let added = |step: &&Step| step.kind == StepKind::Add && step.vcpu != ANY;
        let added = out.iter().filter(added).filter(|step| step.to == node.0);
        let added = u32::try_from(added.count()).expect("16-bit numbers");
        let has = vm.granted_at(*node).vcpus + added;
        room.insert(node.0, share.vcpus.saturating_sub(has));
        let sums = domains.entry(domain(node.0)).or_default();
        sums.0 += has;
        sums.1 += share.vcpus;
    }
    let mut domain_room: BTreeMap<u16, u32> = domains
        .into_iter()
        .map(|(domain, (has, wanted))| (domain, wanted.saturating_sub(has)))
        .collect();
    while !moves.is_empty() {
        let has_core = |step: &Step| room.get(&step.to).is_some_and(|room| *room > 0);
        let stays_even = |step: &Step| {
            let to = domain(step.to);
            to == domain(step.from) || domain_room.get(&to).is_some_and(|room| *room > 0)
        };
        let best = moves
            .iter()
            .position(|step| has_core(step) && stays_even(step))
            .or_else(|| moves.iter().position(has_core));
        let index = best.unwrap_or_else(|| {
            let node = moves[0].to;
            let extra = |kind, from, to| Step {
                from,
                to,
                cores: 1,
                ..Step::new(kind, id)
            };
            out.push(extra(StepKind::Lease, ANY, node));
            out.push(extra(StepKind::Release, node, ANY));
            *room.entry(node).or_default() += 1;
            0
        });
        let step = moves.remove(index);
        let pass = |rooms: &mut BTreeMap<u16, u32>, from: u16, to: u16| {
            let room = rooms.entry(to).or_default();
            *room = room.saturating_sub(1);
            *rooms.entry(from).or_default() += 1;
        };
        pass(&mut room, step.from, step.to);
        if domain(step.from) != domain(step.to) {
            pass(&mut domain_room, domain(step.from), domain(step.to));
        }
        out.push(step);
    }
}

fn domain_of(cluster: &Cluster, node: NodeId) -> u16 {
    cluster
        .nodes()
        .get(&node)
        .map_or(0, crate::cluster::Node::domain)
}
