//! Branch and bound, best bound first: from a bound and an answer to a proof.

use alloc::collections::BinaryHeap;
use alloc::vec::Vec;
use core::cmp::Ordering;

use vmm_shared::log::Clock;

use super::cost::{Bounds, Room};
use super::dual::{OpenRange, PLACES, Prices, Relaxation, worth};
use super::primal::Placement;
use super::{Budget, NoSolution, Problem, Share, Solution};

/// Branches that may wait, times nodes: what bounds the memory.
const MOST_ROOMS: usize = 1 << 20;
/// Vertices whose worth differs by less than this are alike to the prices:
/// half a unit of cost.
const ALIKE: i64 = 1 << (PLACES - 1);

/// Of so many rounds …
const DIVE_EVERY: u32 = 64;
/// … so many go straight down.
const DIVE_DEPTH: u32 = 16;

/// A part of the problem.
#[derive(Clone, Debug)]
struct Branch {
    bound: i64,
    depth: u32,
    rooms: Vec<Room>,
    open: OpenRange,
    prices: Prices,
    domain_prices: Vec<Prices>,
    split: Split,
}

impl PartialEq for Branch {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Branch {}
impl PartialOrd for Branch {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Branch {
    /// The greatest is the one to be looked at first.
    fn cmp(&self, other: &Self) -> Ordering {
        let key = |branch: &Self| (core::cmp::Reverse(branch.bound), branch.depth);
        key(self).cmp(&key(other))
    }
}

/// How a branch is cut in two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Split {
    /// Not more open nodes than this, or more.
    Open(u32),
    /// The node gives nothing, or something.
    Closed(usize),
    /// The node gives not more vCPUs than this, or more.
    Vcpus(usize, u32),
    /// The node gives not more slices than this, or more.
    Slices(usize, u32),
    /// Nothing is left to be cut.
    Whole,
}

impl Split {
    fn halves(self, branch: &Branch) -> Vec<(Vec<Room>, OpenRange)> {
        let with = |node: usize, change: &dyn Fn(&mut Room)| {
            let mut rooms = branch.rooms.clone();
            change(&mut rooms[node]);
            (rooms, branch.open)
        };
        match self {
            Self::Whole => Vec::new(),
            Self::Open(most) => {
                let (mut few, mut many) = (branch.open, branch.open);
                few.max = most;
                many.min = most + 1;
                let both = [few, many].map(|open| (branch.rooms.clone(), open));
                both.into()
            }
            Self::Closed(node) => [
                with(node, &|room| {
                    (room.vcpus, room.slices) = (Bounds::new(0, 0), Bounds::new(0, 0));
                }),
                with(node, &|room| room.open = true),
            ]
            .into(),
            Self::Vcpus(node, most) => [
                with(node, &|room| room.vcpus.max = most),
                with(node, &|room| room.vcpus.min = most + 1),
            ]
            .into(),
            Self::Slices(node, most) => [
                with(node, &|room| room.slices.max = most),
                with(node, &|room| room.slices.min = most + 1),
            ]
            .into(),
        }
    }
}

/// The best prices for the whole problem.
#[derive(Clone, Debug)]
pub(crate) struct RootPrices {
    pub(crate) common: Prices,
    /// Of each domain.
    pub(crate) domains: Vec<Prices>,
}

struct Search<'a, C> {
    problem: &'a Problem,
    clock: &'a C,
    deadline_ns: u64,
    best: Option<(i64, Vec<Share>)>,
    relaxation: Relaxation<'a>,
    branches: u32,
}

/// Solves a problem that is well formed and not impossible by its sums.
pub(crate) fn search<C: Clock>(
    problem: &Problem,
    budget: Budget,
    clock: &C,
) -> Result<(Solution, RootPrices), NoSolution> {
    let deadline_ns = clock.now_ns().saturating_add(budget.time_ns);
    let mut search = Search {
        problem,
        clock,
        deadline_ns,
        best: None,
        relaxation: Relaxation::new(problem),
        branches: 0,
    };
    let root = Branch {
        bound: i64::MIN,
        depth: 0,
        rooms: search.relaxation.rooms().to_vec(),
        open: search.relaxation.open,
        prices: [0; 3],
        domain_prices: search.relaxation.domain_prices().to_vec(),
        split: Split::Whole,
    };
    let most_waiting = MOST_ROOMS / problem.nodes.len().max(1);
    let mut waiting = BinaryHeap::new();
    waiting.extend(search.look(root));
    let prices = search.relaxation.all_prices();
    // The least bound of all that was left aside.
    let mut bound = i64::MAX;
    let mut dive = None;
    let mut rounds = 0_u32;
    while let Some(branch) = dive.take().or_else(|| waiting.pop()) {
        let cost = search.best.as_ref().map_or(i64::MAX, |best| best.0);
        if branch.bound >= cost {
            continue;
        }
        let others = waiting
            .peek()
            .map_or(i64::MAX, |other: &Branch| other.bound);
        let least = branch.bound.min(others).min(bound);
        let good_enough = search.best.is_some()
            && i128::from(cost - least) * 1000
                <= i128::from(budget.gap_permille) * i128::from(cost);
        if good_enough || search.is_late() || waiting.len() >= most_waiting {
            bound = least;
            break;
        }
        if branch.split == Split::Whole {
            bound = bound.min(branch.bound);
            continue;
        }
        let halves = branch.split.halves(&branch).into_iter();
        let mut halves: Vec<Branch> = halves
            .filter_map(|(rooms, open)| {
                search.look(Branch {
                    depth: branch.depth + 1,
                    rooms,
                    open,
                    ..branch.clone()
                })
            })
            .collect();
        // Now and then straight on into the better half, down to its end:
        // best first alone proves, but finds answers late.
        rounds += 1;
        if rounds % DIVE_EVERY < DIVE_DEPTH {
            halves.sort();
            dive = halves.pop();
        }
        waiting.extend(halves);
    }
    let Some((cost, shares)) = search.best else {
        return Err(if bound == i64::MAX {
            NoSolution::Impossible
        } else {
            NoSolution::TimedOut
        });
    };
    let solution = Solution {
        shares,
        cost,
        bound: bound.min(cost),
        branches: search.branches,
    };
    Ok((solution, prices))
}

impl<C: Clock> Search<'_, C> {
    /// Bounds a branch and tries for an answer in it; `None` if nothing better
    /// than the best can be in it.
    fn look(&mut self, mut branch: Branch) -> Option<Branch> {
        if !self.has_room(&branch.rooms, branch.open) || !self.relaxation.set_rooms(&branch.rooms) {
            return None;
        }
        self.branches += 1;
        self.relaxation.open = branch.open;
        self.relaxation
            .set_prices(branch.prices, &branch.domain_prices);
        let enough = self.best.as_ref().map_or(i64::MAX, |best| best.0);
        branch.bound = self.relaxation.bound(enough).max(branch.bound);
        if self.is_beaten(branch.bound) {
            return None;
        }
        let net = self.relaxation.net_prices();
        let picks: Vec<(i64, Share)> = net
            .iter()
            .enumerate()
            .map(|(node, prices)| self.relaxation.pick(node, prices))
            .collect();
        self.try_for_answer(&branch, &net, &picks);
        if self.is_beaten(branch.bound) {
            return None;
        }
        branch.prices = self.relaxation.prices;
        branch.domain_prices = self.relaxation.domain_prices().to_vec();
        branch.split = self.choose_split(&branch, &net, &picks);
        Some(branch)
    }

    fn is_late(&self) -> bool {
        self.clock.now_ns() >= self.deadline_ns
    }

    fn is_beaten(&self, bound: i64) -> bool {
        self.best.as_ref().is_some_and(|best| bound >= best.0)
    }

    /// Whether the rooms can add up to what is asked at all.
    fn has_room(&self, rooms: &[Room], open: OpenRange) -> bool {
        let fits = |bounds: fn(&Room) -> Bounds, total: u32| {
            let least: u64 = rooms.iter().map(|room| u64::from(bounds(room).min)).sum();
            let most: u64 = rooms.iter().map(|room| u64::from(bounds(room).max)).sum();
            (least..=most).contains(&u64::from(total))
        };
        let must_open = rooms.iter().filter(|room| !room.may_close()).count();
        let total = self.problem.total;
        fits(|room| room.vcpus, total.vcpus)
            && fits(|room| room.slices, total.slices)
            && must_open <= open.max as usize
    }

    fn try_for_answer(&mut self, branch: &Branch, net: &[Prices], picks: &[(i64, Share)]) {
        // Far from the root the answers repeat; there, trying now and then is
        // enough.
        if branch.depth > 3 && !self.branches.is_multiple_of(4) {
            return;
        }
        let shares = picks.iter().map(|pick| pick.1).collect();
        let mut placement = Placement::new(self.problem, &branch.rooms, shares);
        if !placement.repair(&self.relaxation, net) {
            return;
        }
        let best = self.best.as_ref().map_or(i64::MAX, |best| best.0);
        if self.problem.cost(&placement.shares) <= branch.bound {
            // It can't get better.
        } else if branch.depth == 0 {
            placement.polish(50, &|| self.is_late());
        } else if self.problem.cost(&placement.shares).saturating_sub(best) <= best / 64 {
            placement.polish(2, &|| self.is_late());
        }
        let cost = self.problem.cost(&placement.shares);
        if self.best.as_ref().is_none_or(|best| cost < best.0) {
            self.best = Some((cost, placement.shares));
        }
    }

    /// Splits where the prices can't decide, and the truth between two shares
    /// that are alike to them differs most from what they say.
    fn choose_split(&self, branch: &Branch, net: &[Prices], picks: &[(i64, Share)]) -> Split {
        let has_open_costs = self.problem.nodes.iter().any(|node| node.open_weight > 0);
        if has_open_costs && let Some((most, _)) = self.relaxation.split_of_opened() {
            return Split::Open(most);
        }
        let mut best: Option<(i64, Split)> = None;
        for (node, (least, pick)) in picks.iter().enumerate() {
            for vertex in self.relaxation.hull(node) {
                let apart = worth(vertex, &net[node]) - least;
                if apart > ALIKE || vertex.share == *pick {
                    continue;
                }
                let (score, split) = self.rate(node, &branch.rooms[node], *pick, vertex.share);
                let score = score - apart;
                if best.is_none_or(|best| score > best.0) {
                    best = Some((score, split));
                }
            }
        }
        best.map_or_else(|| widest(&branch.rooms), |best| best.1)
    }

    /// How far the truth half-way between two shares is from what a line says,
    /// and where to cut between them.
    fn rate(&self, node: usize, room: &Room, a: Share, b: Share) -> (i64, Split) {
        let terms = &self.problem.nodes[node];
        let middle = Share::new(a.vcpus.midpoint(b.vcpus), a.slices.midpoint(b.slices));
        let cost = |share| self.problem.node_cost(terms, share) << PLACES;
        let apart = cost(middle) - (cost(a) + cost(b)) / 2;
        let split = if a.is_open() != b.is_open() && room.may_close() {
            Split::Closed(node)
        } else if a.vcpus == b.vcpus {
            Split::Slices(node, middle.slices)
        } else {
            Split::Vcpus(node, middle.vcpus)
        };
        (apart, split)
    }
}

/// A split where nothing else tells: the node with the most possibilities.
fn widest(rooms: &[Room]) -> Split {
    let width = |bounds: Bounds| bounds.max - bounds.min;
    let widest = |bounds: fn(&Room) -> Bounds| {
        let sizes = rooms.iter().enumerate();
        sizes
            .map(|(node, room)| (width(bounds(room)), node))
            .max_by_key(|size| size.0)
            .filter(|size| size.0 > 0)
    };
    let middle = |bounds: Bounds| bounds.min + width(bounds) / 2;
    if let Some((_, node)) = widest(|room| room.vcpus) {
        return Split::Vcpus(node, middle(rooms[node].vcpus));
    }
    if let Some((_, node)) = widest(|room| room.slices) {
        return Split::Slices(node, middle(rooms[node].slices));
    }
    Split::Whole
}
