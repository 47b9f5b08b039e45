//! Placements: repaired from what prices suggest, and polished.

use alloc::vec::Vec;

use super::cost::Room;
use super::dual::{PLACES, Prices, Relaxation};
use super::{Problem, Share};

/// A change of a share, or what is still missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Step {
    vcpus: i64,
    slices: i64,
}

impl Step {
    const fn is_none(self) -> bool {
        self.vcpus == 0 && self.slices == 0
    }

    fn between(from: Share, to: Share) -> Self {
        Self {
            vcpus: i64::from(to.vcpus) - i64::from(from.vcpus),
            slices: i64::from(to.slices) - i64::from(from.slices),
        }
    }

    fn after(self, share: Share) -> Option<Share> {
        let count = |count: u32, by: i64| u32::try_from(i64::from(count) + by).ok();
        Some(Share {
            vcpus: count(share.vcpus, self.vcpus)?,
            slices: count(share.slices, self.slices)?,
        })
    }

    const fn reversed(self) -> Self {
        Self {
            vcpus: -self.vcpus,
            slices: -self.slices,
        }
    }

    /// Whether both counts go the way of `missing` and no further.
    fn stays_within(self, missing: Self) -> bool {
        let within = |by: i64, missing: i64| {
            by == 0 || (by.signum() == missing.signum() && by.abs() <= missing.abs())
        };
        within(self.vcpus, missing.vcpus) && within(self.slices, missing.slices)
    }

    /// How much of what is missing it brings, in slices.
    const fn progress(self, ratio: u32) -> i64 {
        self.vcpus.abs() * ratio as i64 + self.slices.abs()
    }
}

/// A placement in the making, within the rooms of one branch.
pub(crate) struct Placement<'a> {
    problem: &'a Problem,
    rooms: &'a [Room],
    pub(crate) shares: Vec<Share>,
    sums: Vec<Share>,
}

/// A possible step of one node, and what it costs beyond its price, in
/// [`PLACES`].
#[derive(Clone, Copy, Debug)]
struct Offer {
    node: usize,
    to: Share,
    cost: i64,
    progress: i64,
}

impl<'a> Placement<'a> {
    pub(crate) fn new(problem: &'a Problem, rooms: &'a [Room], shares: Vec<Share>) -> Self {
        let sums = problem.domain_sums(&shares);
        Self {
            problem,
            rooms,
            shares,
            sums,
        }
    }

    fn missing(&self) -> Step {
        let given = self.sums.iter().fold(
            Step {
                vcpus: 0,
                slices: 0,
            },
            |sum, more| Step {
                vcpus: sum.vcpus + i64::from(more.vcpus),
                slices: sum.slices + i64::from(more.slices),
            },
        );
        Step {
            vcpus: i64::from(self.problem.total.vcpus) - given.vcpus,
            slices: i64::from(self.problem.total.slices) - given.slices,
        }
    }

    /// What changing a node's share to `to` adds to the cost; `None` if it
    /// may not be, or would take a domain further over its limit.
    fn change(&self, node: usize, to: Share) -> Option<i64> {
        if !self.rooms[node].contains(to) {
            return None;
        }
        let (problem, from) = (self.problem, self.shares[node]);
        let terms = &problem.nodes[node];
        let domain = usize::from(terms.domain);
        let (limits, sum) = (&problem.domains[domain], self.sums[domain]);
        let after = Step::between(from, to).after(sum)?;
        let over = (after.vcpus > limits.vcpus.max && after.vcpus > sum.vcpus)
            || (after.slices > limits.slices.max && after.slices > sum.slices);
        if over {
            return None;
        }
        let of_domain = limits.vcpus.cost(after.vcpus) - limits.vcpus.cost(sum.vcpus)
            + limits.slices.cost(after.slices)
            - limits.slices.cost(sum.slices);
        Some(problem.node_cost(terms, to) - problem.node_cost(terms, from) + of_domain)
    }

    fn set(&mut self, node: usize, to: Share) {
        let domain = usize::from(self.problem.nodes[node].domain);
        let step = Step::between(self.shares[node], to);
        self.sums[domain] = step.after(self.sums[domain]).expect("a sum of shares");
        self.shares[node] = to;
    }

    /// Gives up what domains give beyond their limits, then makes up for what
    /// is missing, cheapest first at `prices`. False if that fails.
    pub(crate) fn repair(&mut self, relaxation: &Relaxation<'_>, prices: &[Prices]) -> bool {
        for domain in 0..self.sums.len() {
            let limits = &self.problem.domains[domain];
            loop {
                let sum = self.sums[domain];
                let excess = Step {
                    vcpus: -i64::from(sum.vcpus.saturating_sub(limits.vcpus.max)),
                    slices: -i64::from(sum.slices.saturating_sub(limits.slices.max)),
                };
                if excess.is_none() {
                    break;
                }
                let inside = |node: &usize| usize::from(self.problem.nodes[*node].domain) == domain;
                let nodes = (0..self.shares.len()).filter(inside);
                if !self.pass(relaxation, prices, nodes, excess) {
                    return false;
                }
            }
        }
        loop {
            let missing = self.missing();
            if missing.is_none() {
                return true;
            }
            if !self.pass(relaxation, prices, 0..self.shares.len(), missing) {
                return false;
            }
        }
    }

    /// One round of [`repair`](Self::repair): each node's best offer, the best
    /// of them first. False if nothing could be done.
    fn pass(
        &mut self,
        relaxation: &Relaxation<'_>,
        prices: &[Prices],
        nodes: impl Iterator<Item = usize>,
        missing: Step,
    ) -> bool {
        let offer = |node| self.best_offer(relaxation, node, &prices[node], missing);
        let mut offers: Vec<Offer> = nodes.filter_map(offer).collect();
        offers.sort_unstable_by(|a, b| {
            let (left, right) = (
                i128::from(a.cost) * i128::from(b.progress),
                i128::from(b.cost) * i128::from(a.progress),
            );
            left.cmp(&right)
                .then(b.progress.cmp(&a.progress))
                .then(a.node.cmp(&b.node))
        });
        let mut left = missing;
        let mut done = false;
        for offer in offers {
            let step = Step::between(self.shares[offer.node], offer.to);
            if step.stays_within(left) && self.change(offer.node, offer.to).is_some() {
                self.set(offer.node, offer.to);
                left.vcpus -= step.vcpus;
                left.slices -= step.slices;
                done = true;
            }
        }
        done
    }

    fn best_offer(
        &self,
        relaxation: &Relaxation<'_>,
        node: usize,
        prices: &Prices,
        missing: Step,
    ) -> Option<Offer> {
        let (room, from) = (&self.rooms[node], self.shares[node]);
        let ratio = self.problem.ratio;
        let reach = |count: u32, by: i64, bounds: super::Bounds| {
            (i64::from(count) + by).clamp(bounds.min.into(), bounds.max.into()) - i64::from(count)
        };
        let vcpus = reach(from.vcpus, missing.vcpus, room.vcpus);
        let slices = reach(from.slices, missing.slices, room.slices);
        let unit = |by: i64| by.signum();
        let along = {
            let count = vcpus.abs().min(slices.abs() / i64::from(ratio));
            (vcpus.signum() == slices.signum() && count > 0).then_some(Step {
                vcpus: count * vcpus.signum(),
                slices: count * i64::from(ratio) * slices.signum(),
            })
        };
        let steps = [
            Some(Step { vcpus, slices }),
            Some(Step { vcpus, slices: 0 }),
            Some(Step { vcpus: 0, slices }),
            Some(Step {
                vcpus: unit(vcpus),
                slices: 0,
            }),
            Some(Step {
                vcpus: 0,
                slices: unit(slices),
            }),
            along,
        ];
        let ends = steps
            .into_iter()
            .flatten()
            .filter_map(|step| step.after(from));
        let vertices = relaxation.hull(node).iter().map(|vertex| vertex.share);
        let offers = ends.chain(vertices).filter_map(|to| {
            let step = Step::between(from, to);
            if step.is_none() || !step.stays_within(missing) {
                return None;
            }
            let cost = (self.change(node, to)? << PLACES)
                - prices[1] * step.vcpus
                - prices[0] * step.slices;
            Some(Offer {
                node,
                to,
                cost,
                progress: step.progress(ratio),
            })
        });
        offers.min_by(|a, b| {
            let (left, right) = (
                i128::from(a.cost) * i128::from(b.progress),
                i128::from(b.cost) * i128::from(a.progress),
            );
            left.cmp(&right).then(b.progress.cmp(&a.progress))
        })
    }

    /// Moves units between nodes while that saves anything and it isn't late;
    /// `rounds` at most.
    pub(crate) fn polish(&mut self, rounds: u32, is_late: &dyn Fn() -> bool) {
        let ratio = i64::from(self.problem.ratio);
        for _ in 0..rounds {
            let mut better = false;
            for size in [1, 2, 4, 8, 16, 64, 256] {
                let steps = [
                    (size, 0),
                    (0, size),
                    (size, size * ratio),
                    (1, size),
                    (0, size * ratio),
                ];
                for (vcpus, slices) in steps {
                    if is_late() {
                        return;
                    }
                    better |= self.exchange(Step { vcpus, slices });
                }
            }
            better |= !is_late() && self.close_one();
            if !better {
                break;
            }
        }
    }

    /// Lets the node that gains most by it give less by `step`, and the node
    /// that loses least by it give more.
    fn exchange(&mut self, step: Step) -> bool {
        let best = |step: Step, but: Option<usize>| {
            let offers = (0..self.shares.len()).filter(|node| Some(*node) != but);
            offers
                .filter_map(|node| {
                    let to = step.after(self.shares[node])?;
                    Some((self.change(node, to)?, node, to))
                })
                .min_by_key(|offer| (offer.0, offer.1))
        };
        let Some((less, giver, lower)) = best(step.reversed(), None) else {
            return false;
        };
        let Some((more, taker, higher)) = best(step, Some(giver)) else {
            return false;
        };
        if less + more >= 0 {
            return false;
        }
        let before = self.shares[giver];
        self.set(giver, lower);
        // The two may meet in a domain; what counts is the sum in the end.
        match self.change(taker, higher) {
            Some(more) if less + more < 0 => {
                self.set(taker, higher);
                true
            }
            _ => {
                self.set(giver, before);
                false
            }
        }
    }

    /// Lets some open node give nothing, if the rest can take its share over
    /// and that saves anything.
    fn close_one(&mut self) -> bool {
        let closable = |node: &usize| {
            self.shares[*node].is_open()
                && self.rooms[*node].may_close()
                && self.problem.nodes[*node].open_weight > 0
        };
        let mut nodes: Vec<usize> = (0..self.shares.len()).filter(closable).collect();
        let ratio = self.problem.ratio;
        nodes.sort_by_key(|node| Step::between(Share::NONE, self.shares[*node]).progress(ratio));
        nodes.truncate(8);
        nodes.into_iter().any(|node| self.close(node))
    }

    fn close(&mut self, closed: usize) -> bool {
        let before = self.shares.clone();
        let Some(mut cost) = self.change(closed, Share::NONE) else {
            return false;
        };
        let mut left = Step::between(Share::NONE, self.shares[closed]);
        self.set(closed, Share::NONE);
        while !left.is_none() && cost < 0 {
            let offers = (0..self.shares.len()).filter(|node| *node != closed);
            let best = offers
                .filter(|node| self.shares[*node].is_open())
                .filter_map(|node| {
                    let (room, from) = (&self.rooms[node], self.shares[node]);
                    let step = Step {
                        vcpus: left.vcpus.min(i64::from(room.vcpus.max - from.vcpus)),
                        slices: left.slices.min(i64::from(room.slices.max - from.slices)),
                    };
                    let to = step.after(from)?;
                    let progress = step.progress(self.problem.ratio);
                    (progress > 0).then_some((self.change(node, to)?, node, to, progress))
                })
                .min_by(|a, b| {
                    (i128::from(a.0) * i128::from(b.3))
                        .cmp(&(i128::from(b.0) * i128::from(a.3)))
                        .then(b.3.cmp(&a.3))
                });
            let Some((more, node, to, _)) = best else {
                break;
            };
            let step = Step::between(self.shares[node], to);
            left.vcpus -= step.vcpus;
            left.slices -= step.slices;
            cost += more;
            self.set(node, to);
        }
        if left.is_none() && cost < 0 {
            return true;
        }
        self.sums = self.problem.domain_sums(&before);
        self.shares = before;
        false
    }
}
