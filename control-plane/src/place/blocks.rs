//! Whole blocks: a guest takes memory and gives it up in blocks of many
//! slices.
//!
//! A block comes from one node: so a node can give as many slices more as it
//! has whole blocks left. What goes need not be whole node by node, as slices
//! move; but the more of it is, the fewer have to. The optimiser counts
//! slices; its answer is made whole afterwards: each node changes by the whole
//! blocks that are in its answer, and those that are left over go, one by one,
//! to where they cost least.

use alloc::vec::Vec;

use super::draft::{Ask, Draft};
use crate::cluster::Vm;
use crate::optimise::{Bounds, Share, Solution};

/// The slices of a block, if what is asked changes how many blocks the guest
/// of this VM has.
pub(super) fn changed(vm: &Vm, ask: &Ask) -> Option<u32> {
    let given = vm.granted();
    let runs = given != Share::NONE;
    (vm.block() > 1 && runs && given.slices != ask.total.slices).then(|| vm.block())
}

/// What a node can give that gives `has` and may give `most`, where nothing
/// moves.
pub(super) const fn bounds(has: u32, most: u32, block: u32, grows: bool) -> Bounds {
    match (grows, most < has) {
        (false, false) => Bounds::new(0, has),
        (false, true) => Bounds::new(0, most),
        (true, false) => Bounds::new(has, has + (most - has) / block * block),
        // More than it may: something else will say so.
        (true, true) => Bounds::new(has, most),
    }
}

/// Makes an answer whole. `None` if more is asked, and a limit of a failure
/// domain leaves no way to do so.
pub(super) fn round(draft: &Draft, vm: &Vm, ask: &Ask, solution: Solution) -> Option<Solution> {
    let Some(block) = changed(vm, ask) else {
        return Some(solution);
    };
    let grows = ask.total.slices > vm.granted().slices;
    let Some(shares) = whole(
        draft,
        vm,
        ask.total.slices,
        &solution.shares,
        (block, grows),
    ) else {
        return (!grows).then_some(solution);
    };
    Some(Solution {
        cost: draft.problem.cost(&shares),
        shares,
        ..solution
    })
}

fn whole(
    draft: &Draft,
    vm: &Vm,
    total: u32,
    answer: &[Share],
    (block, grows): (u32, bool),
) -> Option<Vec<Share>> {
    let problem = &draft.problem;
    let step = |slices: u32| match grows {
        true => slices.checked_add(block),
        false => slices.checked_sub(block),
    };
    let mut shares = answer.to_vec();
    for (share, node) in shares.iter_mut().zip(&draft.nodes) {
        let has = vm.granted_at(*node).slices;
        let whole = has.abs_diff(share.slices) / block * block;
        share.slices = if grows { has + whole } else { has - whole };
    }
    let sums = problem.domain_sums(&shares);
    let mut sums: Vec<u32> = sums.iter().map(|sum| sum.slices).collect();
    while sums.iter().sum::<u32>() != total {
        let mut best: Option<(i64, usize, Share)> = None;
        for (index, (terms, share)) in problem.nodes.iter().zip(&shares).enumerate() {
            let next = step(share.slices).filter(|slices| terms.slices.contains(*slices));
            let domain = usize::from(terms.domain);
            let (Some(slices), Some(sum)) = (next, step(sums[domain])) else {
                continue;
            };
            let limit = problem.domains[domain].slices;
            if grows && sum > limit.max {
                continue;
            }
            let next = Share { slices, ..*share };
            let more = problem.node_cost(terms, next) - problem.node_cost(terms, *share)
                + limit.cost(sum)
                - limit.cost(sums[domain]);
            if best.is_none_or(|(least, ..)| more < least) {
                best = Some((more, index, next));
            }
        }
        let (_, index, next) = best?;
        let domain = usize::from(problem.nodes[index].domain);
        sums[domain] = step(sums[domain])?;
        shares[index] = next;
    }
    Some(shares)
}
