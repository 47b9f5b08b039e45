//! Lower bounds from prices: the Lagrangian relaxation.
//!
//! At any prices, `Σ_n min (f_n(x, y) − p_x x − p_y y − p_o [open])` plus what
//! is asked times its price is a lower bound. It is concave and piecewise
//! linear in the prices; [`ascend`] finds its top one price at a time, by
//! tangents: two points with slopes to either side bound the top by where
//! their tangents meet, and looking there ends after a few steps. The top over
//! the inner prices is a function of the outer one, with a convex combination
//! of slopes as its slope. A scarce domain has prices of its own on top, found
//! in the same way for each setting of the common ones.
//!
//! Only whether a bound is *good* depends on that search; that it *is* one
//! does not.

use alloc::vec::Vec;

use super::branch::RootPrices;
use super::cost::{Limit, Room, Vertex, vertices};
use super::{Problem, Share};

/// Binary places of prices and bounds.
pub(crate) const PLACES: u32 = 20;
/// Binary places of slopes and sums.
const SLOPE_PLACES: u32 = 12;
/// Prices are searched within this: a million units of cost, more than all
/// weights on one vCPU or slice together, and no overflow.
const HIGHEST: i64 = 1 << 40;
/// How exact a top has to be: 1/256 of a unit of cost.
const TOLERANCE: i128 = 1 << (PLACES - 8);
/// Steps of one search; tangents meet long before.
const MAX_STEPS: u32 = 40;

pub(crate) const SLICE: usize = 0;
pub(crate) const VCPU: usize = 1;
const OPEN: usize = 2;

/// Prices of a slice, a vCPU and an open node, in [`PLACES`].
pub(crate) type Prices = [i64; 3];

/// How many nodes may be open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OpenRange {
    pub(crate) min: u32,
    pub(crate) max: u32,
}

/// A value of the relaxation, its slopes in the searched prices, and what is
/// given there; slopes and sums are averages of shares, in [`SLOPE_PLACES`].
#[derive(Clone, Copy, Debug)]
struct Point {
    value: i128,
    slope: [i64; 3],
    given: [i64; 3],
}

impl Point {
    /// The point on the line between two at which slope `dim` is zero.
    fn between(below: &Self, above: &Self, dim: usize, value: i128) -> Self {
        let (up, down) = (below.slope[dim], above.slope[dim]);
        let mix = |a: i64, b: i64| {
            let whole = i128::from(up) - i128::from(down);
            let sum = i128::from(b) * i128::from(up) - i128::from(a) * i128::from(down);
            i64::try_from(sum / whole.max(1)).unwrap_or(0)
        };
        let mut point = *below;
        point.value = value;
        for index in 0..3 {
            point.slope[index] = mix(below.slope[index], above.slope[index]);
            point.given[index] = mix(below.given[index], above.given[index]);
        }
        point.slope[dim] = 0;
        point
    }
}

/// Where a search may end.
#[derive(Clone, Copy, Debug)]
struct Ends {
    /// The lowest that a price may be.
    lowest: i64,
    /// A value that is high enough.
    enough: i128,
}

/// Moves the first `dims` prices of `at` to where `value` is highest, or high
/// enough.
fn ascend(
    value: &mut dyn FnMut(&Prices) -> Point,
    at: &mut Prices,
    dims: usize,
    ends: Ends,
) -> Point {
    let Some(dim) = dims.checked_sub(1) else {
        return value(at);
    };
    let done = |point: &Point| point.slope[dim] == 0 || point.value >= ends.enough;
    let first = ascend(value, at, dim, ends);
    let up = first.slope[dim] > 0;
    let end = if up { HIGHEST } else { ends.lowest };
    if done(&first) || at[dim] == end {
        return first;
    }
    let (mut near, mut near_at) = (first, *at);
    let mut step = 1_i64 << (PLACES - 4);
    // Outwards, until the slope turns.
    let (mut far, mut far_at) = loop {
        at[dim] = if up {
            near_at[dim].saturating_add(step).min(end)
        } else {
            near_at[dim].saturating_sub(step).max(end)
        };
        let point = ascend(value, at, dim, ends);
        if done(&point) {
            return point;
        }
        if (point.slope[dim] > 0) != up {
            break (point, *at);
        }
        if at[dim] == end {
            return point;
        }
        (near, near_at) = (point, *at);
        step = step.saturating_mul(16);
    };
    if !up {
        (near, near_at, far, far_at) = (far, far_at, near, near_at);
    }
    // Inwards: `near` slopes up, `far` slopes down.
    for _ in 0..MAX_STEPS {
        let width = i128::from(far_at[dim] - near_at[dim]);
        let (rise, fall) = (i128::from(near.slope[dim]), i128::from(far.slope[dim]));
        let meet = (((far.value - near.value) << SLOPE_PLACES) - fall * width) / (rise - fall);
        let meet = meet.clamp(0, width);
        let top = near.value + ((rise * meet) >> SLOPE_PLACES);
        if meet == 0 || meet == width || top - near.value.max(far.value) <= TOLERANCE {
            break;
        }
        let offset = i64::try_from(meet).expect("less than the width");
        *at = near_at;
        at[dim] += offset;
        let point = ascend(value, at, dim, ends);
        if done(&point) {
            return point;
        }
        if top - point.value <= TOLERANCE {
            return Point::between(&near, &far, dim, point.value);
        }
        if point.slope[dim] > 0 {
            (near, near_at) = (point, *at);
        } else {
            (far, far_at) = (point, *at);
        }
    }
    let best = if near.value >= far.value {
        near_at
    } else {
        far_at
    };
    *at = best;
    Point::between(&near, &far, dim, near.value.max(far.value))
}

/// The cheapest share of each of some nodes, added up.
#[derive(Clone, Copy, Debug, Default)]
struct Cheapest {
    value: i128,
    given: Prices,
}

pub(crate) fn worth(vertex: &Vertex, prices: &Prices) -> i64 {
    (vertex.cost << PLACES)
        - prices[SLICE] * i64::from(vertex.share.slices)
        - prices[VCPU] * i64::from(vertex.share.vcpus)
        - if vertex.share.is_open() {
            prices[OPEN]
        } else {
            0
        }
}

pub(crate) fn cheapest(hull: &[Vertex], prices: &Prices) -> (i64, Vertex) {
    let mut best = (i64::MAX, hull[0]);
    for vertex in hull {
        let worth = worth(vertex, prices);
        if worth < best.0 {
            best = (worth, *vertex);
        }
    }
    best
}

/// The best that a limit's own count can be at a price, and what that is
/// worth.
pub(crate) fn best_count(limit: &Limit, price: i64) -> (i128, i64) {
    let soft = limit.soft_max.min(limit.max);
    let at = |count: u32| {
        let cost = i128::from(limit.cost(count)) << PLACES;
        (
            cost - i128::from(price) * i128::from(count),
            i64::from(count),
        )
    };
    at(soft).min(at(limit.max))
}

/// A bound in whole units of cost, rounded up to a multiple of `step`, which
/// every cost is.
pub(crate) fn rounded(value: i128, step: i64) -> i64 {
    let step = i128::from(step) << PLACES;
    let steps = value.div_euclid(step) + i128::from(value.rem_euclid(step) > 0);
    i64::try_from((steps * step) >> PLACES).unwrap_or(i64::MAX)
}

/// The relaxation of one branch of a problem.
#[derive(Debug)]
pub(crate) struct Relaxation<'a> {
    problem: &'a Problem,
    step: i64,
    rooms: Vec<Room>,
    hulls: Vec<Vec<Vertex>>,
    /// Nodes whose domains have nothing to say.
    free: Vec<usize>,
    /// Domains that have: which, their nodes.
    scarce: Vec<(usize, Vec<usize>)>,
    pub(crate) open: OpenRange,
    pub(crate) prices: Prices,
    /// The scarce domains' own prices.
    domain_prices: Vec<Prices>,
    /// How many nodes the best prices open, in [`SLOPE_PLACES`].
    opened: i64,
}

impl<'a> Relaxation<'a> {
    pub(crate) fn new(problem: &'a Problem) -> Self {
        let mut members = alloc::vec![Vec::new(); problem.domains.len()];
        let mut most = alloc::vec![(0_u64, 0_u64); problem.domains.len()];
        for (index, node) in problem.nodes.iter().enumerate() {
            let domain = usize::from(node.domain);
            members[domain].push(index);
            most[domain].0 += u64::from(node.vcpus.max);
            most[domain].1 += u64::from(node.slices.max);
        }
        let (mut free, mut scarce) = (Vec::new(), Vec::new());
        for (index, (nodes, most)) in members.into_iter().zip(most).enumerate() {
            let domain = &problem.domains[index];
            let vcpus = most.0.min(problem.total.vcpus.into());
            let slices = most.1.min(problem.total.slices.into());
            if domain.vcpus.binds(vcpus) || domain.slices.binds(slices) {
                scarce.push((index, nodes));
            } else {
                free.extend(nodes);
            }
        }
        let rooms: Vec<Room> = problem.nodes.iter().map(Room::of).collect();
        let mut relaxation = Self {
            problem,
            step: problem.cost_step(),
            hulls: Vec::with_capacity(rooms.len()),
            rooms,
            free,
            domain_prices: alloc::vec![[0; 3]; scarce.len()],
            scarce,
            open: OpenRange {
                min: 0,
                max: u32::MAX,
            },
            prices: [0; 3],
            opened: 0,
        };
        for (node, room) in problem.nodes.iter().zip(&relaxation.rooms) {
            let mut hull = Vec::new();
            vertices(problem, node, room, &mut hull);
            relaxation.hulls.push(hull);
        }
        relaxation
    }

    /// Changes to another branch; false if a node has no share left in it.
    pub(crate) fn set_rooms(&mut self, rooms: &[Room]) -> bool {
        for (index, room) in rooms.iter().enumerate() {
            if self.rooms[index] != *room {
                self.rooms[index] = *room;
                self.hulls[index].clear();
                let node = &self.problem.nodes[index];
                vertices(self.problem, node, room, &mut self.hulls[index]);
            }
        }
        self.hulls.iter().all(|hull| !hull.is_empty())
    }

    pub(crate) fn rooms(&self) -> &[Room] {
        &self.rooms
    }

    pub(crate) fn hull(&self, node: usize) -> &[Vertex] {
        &self.hulls[node]
    }

    /// A lower bound of this branch, rounded up; moves the prices to the best,
    /// or to where the bound is `enough`.
    pub(crate) fn bound(&mut self, enough: i64) -> i64 {
        let mut at = self.prices;
        let dims = if self.has_open_range() { 3 } else { 2 };
        if dims < 3 {
            at[OPEN] = 0;
        }
        let mut domain_prices = core::mem::take(&mut self.domain_prices);
        let point = ascend(
            &mut |prices| self.value(prices, &mut domain_prices),
            &mut at,
            dims,
            Ends {
                lowest: -HIGHEST,
                enough: i128::from(enough) << PLACES,
            },
        );
        self.domain_prices = domain_prices;
        self.prices = at;
        self.opened = point.given[OPEN];
        rounded(point.value, self.step)
    }

    fn has_open_range(&self) -> bool {
        self.open.min > 0 || (self.open.max as usize) < self.rooms.len()
    }

    /// The two whole numbers of open nodes around what the prices open, if it
    /// is none itself.
    pub(crate) fn split_of_opened(&self) -> Option<(u32, u32)> {
        let fraction = self.opened & ((1 << SLOPE_PLACES) - 1);
        let slack = 1 << (SLOPE_PLACES - 5);
        let whole = u32::try_from(self.opened >> SLOPE_PLACES).ok()?;
        let between = fraction > slack && fraction < (1 << SLOPE_PLACES) - slack;
        (between && self.open.min <= whole && whole < self.open.max).then_some((whole, whole + 1))
    }

    fn value(&self, prices: &Prices, domain_prices: &mut [Prices]) -> Point {
        let sum = self.sum(&self.free, prices);
        let mut value = sum.value;
        let mut given = sum.given.map(|sum| sum << SLOPE_PLACES);
        for ((index, nodes), at) in self.scarce.iter().zip(domain_prices) {
            let point = self.domain_value(*index, nodes, prices, at);
            value += point.value;
            for (all, more) in given.iter_mut().zip(point.given) {
                *all += more;
            }
        }
        let total = self.problem.total;
        let opened = if prices[OPEN] > 0 {
            self.open.min
        } else {
            self.open
                .max
                .min(u32::try_from(self.rooms.len()).unwrap_or(u32::MAX))
        };
        let wanted = [total.slices, total.vcpus, opened].map(i64::from);
        let mut slope = [0; 3];
        for index in 0..3 {
            value += i128::from(prices[index]) * i128::from(wanted[index]);
            slope[index] = (wanted[index] << SLOPE_PLACES) - given[index];
        }
        Point {
            value,
            slope,
            given,
        }
    }

    /// A domain's part: the top over its own prices, which make its nodes
    /// dearer.
    fn domain_value(
        &self,
        index: usize,
        nodes: &[usize],
        prices: &Prices,
        at: &mut Prices,
    ) -> Point {
        let domain = &self.problem.domains[index];
        let mut value = |own: &Prices| {
            let net = [
                prices[SLICE] - own[SLICE],
                prices[VCPU] - own[VCPU],
                prices[OPEN],
            ];
            let sum = self.sum(nodes, &net);
            let (slices, most_slices) = best_count(&domain.slices, own[SLICE]);
            let (vcpus, most_vcpus) = best_count(&domain.vcpus, own[VCPU]);
            Point {
                value: sum.value + slices + vcpus,
                slope: [
                    (sum.given[SLICE] - most_slices) << SLOPE_PLACES,
                    (sum.given[VCPU] - most_vcpus) << SLOPE_PLACES,
                    0,
                ],
                given: sum.given.map(|sum| sum << SLOPE_PLACES),
            }
        };
        let ends = Ends {
            lowest: 0,
            enough: i128::MAX,
        };
        ascend(&mut value, at, 2, ends)
    }

    fn sum(&self, nodes: &[usize], prices: &Prices) -> Cheapest {
        let mut sum = Cheapest::default();
        for node in nodes {
            let (worth, vertex) = cheapest(&self.hulls[*node], prices);
            sum.value += i128::from(worth);
            sum.given[SLICE] += i64::from(vertex.share.slices);
            sum.given[VCPU] += i64::from(vertex.share.vcpus);
            sum.given[OPEN] += i64::from(vertex.share.is_open());
        }
        sum
    }

    /// The prices that hold for each node: its domain's own taken off.
    pub(crate) fn net_prices(&self) -> Vec<Prices> {
        let mut net = alloc::vec![self.prices; self.rooms.len()];
        for ((_, nodes), own) in self.scarce.iter().zip(&self.domain_prices) {
            for node in nodes {
                net[*node][SLICE] -= own[SLICE];
                net[*node][VCPU] -= own[VCPU];
            }
        }
        net
    }

    /// The share that is cheapest for a node at prices, and its worth there.
    pub(crate) fn pick(&self, node: usize, prices: &Prices) -> (i64, Share) {
        let (worth, vertex) = cheapest(&self.hulls[node], prices);
        (worth, vertex.share)
    }

    /// The best prices found last.
    pub(crate) fn all_prices(&self) -> RootPrices {
        let mut domains = alloc::vec![[0; 3]; self.problem.domains.len()];
        for ((index, _), own) in self.scarce.iter().zip(&self.domain_prices) {
            domains[*index] = *own;
        }
        RootPrices {
            common: self.prices,
            domains,
        }
    }

    pub(crate) fn domain_prices(&self) -> &[Prices] {
        &self.domain_prices
    }

    pub(crate) fn set_prices(&mut self, prices: Prices, domains: &[Prices]) {
        self.prices = prices;
        self.domain_prices.copy_from_slice(domains);
    }
}
