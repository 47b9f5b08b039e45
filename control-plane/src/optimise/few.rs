//! Small requests in large clusters: nothing moves, little is added.
//!
//! Where each node gives at least what it gives now, and all of them only a
//! little more, a few dozen nodes come into question: those where a vCPU, a
//! slice, both in their ratio, or all that is asked costs least. The problem
//! over these is solved as any other. Its prices then bound the **whole**
//! problem: for most nodes one look at the slopes shows that they would stay
//! as they are at these prices. So the gap is as honest as for a full solve.

use alloc::vec::Vec;

use arrayvec::ArrayVec;
use vmm_shared::log::Clock;

use super::branch::{RootPrices, search};
use super::cost::{Bounds, Hinge, Limit, NodeTerms, Room, Side, vertices};
use super::dual::{PLACES, Prices, SLICE, VCPU, best_count, cheapest, rounded, worth};
use super::{Budget, NoSolution, Problem, Share, Solution, Vertex, check, solve};

/// Nodes kept for each kind of step.
const BEST: usize = 8;
const STEPS: usize = 4;

/// Finds a placement that moves nothing: every node goes on giving at least
/// the least that it may. As [`solve`], and much faster if little is added to
/// a large cluster.
///
/// # Errors
/// As for `solve`.
pub fn solve_few<C: Clock>(
    problem: &Problem,
    budget: Budget,
    clock: &C,
) -> Result<Solution, NoSolution> {
    check(problem)?;
    if problem.nodes.len() <= BEST * STEPS {
        return solve(problem, budget, clock);
    }
    let least: Vec<Share> = problem.nodes.iter().map(least).collect();
    let chosen = choose(problem, &least);
    let (part, prices) = match search(&cut(problem, &least, &chosen), budget, clock) {
        Ok(found) => found,
        // Too few were chosen.
        Err(_) => return solve(problem, budget, clock),
    };
    let mut shares = least;
    for (node, share) in chosen.iter().zip(part.shares) {
        shares[*node] = share;
    }
    let cost = problem.cost(&shares);
    Ok(Solution {
        bound: bound_of_all(problem, &prices).min(cost),
        shares,
        cost,
        branches: part.branches,
    })
}

fn least(node: &NodeTerms) -> Share {
    Share::new(node.vcpus.min, node.slices.min)
}

/// The nodes at which some step costs least, in order.
fn choose(problem: &Problem, least: &[Share]) -> Vec<usize> {
    let given = |count: fn(&Share) -> u32| -> u32 { least.iter().map(count).sum() };
    let vcpus = problem.total.vcpus - given(|share| share.vcpus);
    let slices = problem.total.slices - given(|share| share.slices);
    let steps: [Share; STEPS] = [
        Share::new(vcpus.min(1), 0),
        Share::new(0, slices.min(1)),
        Share::new(vcpus.min(1), slices.min(problem.ratio)),
        Share::new(vcpus, slices),
    ];
    let mut best: [ArrayVec<(i64, usize), BEST>; STEPS] = Default::default();
    for (node, (terms, share)) in problem.nodes.iter().zip(least).enumerate() {
        if terms.vcpus.min == terms.vcpus.max && terms.slices.min == terms.slices.max {
            continue;
        }
        let now = problem.node_cost(terms, *share);
        for (step, best) in steps.iter().zip(&mut best) {
            let vcpus = share.vcpus + step.vcpus;
            let slices = share.slices + step.slices;
            if vcpus > terms.vcpus.max || slices > terms.slices.max {
                continue;
            }
            let more = problem.node_cost(terms, Share::new(vcpus, slices)) - now;
            let place = best.partition_point(|kept| kept.0 <= more);
            if place < BEST {
                if best.is_full() {
                    best.pop();
                }
                best.insert(place, (more, node));
            }
        }
    }
    let mut chosen: Vec<usize> = best.iter().flatten().map(|kept| kept.1).collect();
    chosen.sort_unstable();
    chosen.dedup();
    chosen
}

/// The problem over the chosen nodes alone; the others give their least.
fn cut(problem: &Problem, least: &[Share], chosen: &[usize]) -> Problem {
    let mut sums = problem.domain_sums(least);
    let mut total = problem.total;
    for sum in &sums {
        total.vcpus -= sum.vcpus;
        total.slices -= sum.slices;
    }
    for node in chosen {
        let sum = &mut sums[usize::from(problem.nodes[*node].domain)];
        sum.vcpus -= least[*node].vcpus;
        sum.slices -= least[*node].slices;
        total.vcpus += least[*node].vcpus;
        total.slices += least[*node].slices;
    }
    let rest = |limit: &Limit, given: u32| Limit {
        max: limit.max.saturating_sub(given),
        soft_max: limit.soft_max.saturating_sub(given),
        ..*limit
    };
    let mut domains = problem.domains.clone();
    for (domain, sum) in domains.iter_mut().zip(&sums) {
        domain.vcpus = rest(&domain.vcpus, sum.vcpus);
        domain.slices = rest(&domain.slices, sum.slices);
    }
    Problem {
        total,
        nodes: chosen
            .iter()
            .map(|node| problem.nodes[*node].clone())
            .collect(),
        domains,
        ..*problem
    }
}

/// What the prices say of the whole problem.
fn bound_of_all(problem: &Problem, prices: &RootPrices) -> i64 {
    let mut sum = 0_i128;
    let mut hull: Vec<Vertex> = Vec::new();
    for node in &problem.nodes {
        let own = &prices.domains[usize::from(node.domain)];
        let net = [
            prices.common[SLICE] - own[SLICE],
            prices.common[VCPU] - own[VCPU],
            0,
        ];
        let share = least(node);
        sum += i128::from(if stays(problem, node, share, &net) {
            let cost = problem.node_cost(node, share);
            worth(&Vertex { share, cost }, &net)
        } else {
            hull.clear();
            vertices(problem, node, &Room::of(node), &mut hull);
            cheapest(&hull, &net).0
        });
    }
    for (domain, own) in problem.domains.iter().zip(&prices.domains) {
        sum += best_count(&domain.vcpus, own[VCPU]).0 + best_count(&domain.slices, own[SLICE]).0;
    }
    sum += i128::from(prices.common[VCPU]) * i128::from(problem.total.vcpus);
    sum += i128::from(prices.common[SLICE]) * i128::from(problem.total.slices);
    rounded(sum, problem.cost_step())
}

/// Whether the slopes of a node's cost at its least share show that no larger
/// one is cheaper at these prices: then they do so in each of the directions
/// between which the cost is linear. The jump of a closed node only helps.
fn stays(problem: &Problem, node: &NodeTerms, share: Share, prices: &Prices) -> bool {
    let slope = |hinges: &[Hinge], count: u32, bounds: Bounds| {
        let one = |hinge: &Hinge| {
            let weight = i64::from(hinge.weight);
            match hinge.side {
                Side::Above if count >= hinge.at => weight,
                Side::Below if count < hinge.at => -weight,
                _ => 0,
            }
        };
        let all: i64 = hinges.iter().map(one).sum();
        (bounds.min < bounds.max).then_some(all << PLACES)
    };
    let ratio = i64::from(problem.ratio);
    let far = problem.far_weight << PLACES;
    let line = i64::from(share.vcpus) * ratio;
    let above = i64::from(share.slices) > line;
    let vcpu = slope(&node.vcpu_hinges, share.vcpus, node.vcpus).map(|slope| slope - prices[VCPU]);
    let slice =
        slope(&node.slice_hinges, share.slices, node.slices).map(|slope| slope - prices[SLICE]);
    let near = if above { far.saturating_mul(ratio) } else { 0 };
    let beyond = if i64::from(share.slices) >= line {
        far
    } else {
        0
    };
    let both = vcpu
        .zip(slice)
        .is_none_or(|(vcpu, slice)| vcpu.saturating_add(slice.saturating_mul(ratio)) >= 0);
    vcpu.is_none_or(|vcpu| vcpu >= near)
        && slice.is_none_or(|slice| slice.saturating_add(beyond) >= 0)
        && both
}
