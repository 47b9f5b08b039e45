//! What a share costs, and which shares can be best at some prices.

use alloc::vec::Vec;

use arrayvec::ArrayVec;

use super::{MAX_COUNT, MAX_PROBLEM_NODES, MAX_WEIGHT, Problem, Share};

/// A cost that begins at a count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hinge {
    /// Up to here, or from here on, it is free.
    pub at: u32,
    /// Cost of each unit beyond.
    pub weight: u32,
    /// Which side of `at` costs.
    pub side: Side,
    /// Whose cost it is: an index into the policy's rules.
    pub rule: u16,
}

/// A side of a hinge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// Units above cost.
    Above,
    /// Units missing below cost.
    Below,
}

impl Hinge {
    /// What `count` costs.
    #[must_use]
    pub fn cost(&self, count: u32) -> i64 {
        let units = match self.side {
            Side::Above => count.saturating_sub(self.at),
            Side::Below => self.at.saturating_sub(count),
        };
        i64::from(units) * i64::from(self.weight)
    }
}

/// The hinges of one count; each rule adds one at most.
pub type HingeList = ArrayVec<Hinge, 4>;

/// The least and the most of a count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bounds {
    /// Least.
    pub min: u32,
    /// Most.
    pub max: u32,
}

impl Bounds {
    /// From `min` to `max`.
    #[must_use]
    pub const fn new(min: u32, max: u32) -> Self {
        Self { min, max }
    }

    pub(crate) const fn contains(self, count: u32) -> bool {
        self.min <= count && count <= self.max
    }
}

/// What a node may give, and at what cost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeTerms {
    /// vCPUs.
    pub vcpus: Bounds,
    /// Slices.
    pub slices: Bounds,
    /// Cost of giving anything.
    pub open_weight: u32,
    /// Costs of vCPUs.
    pub vcpu_hinges: HingeList,
    /// Costs of slices.
    pub slice_hinges: HingeList,
    /// Its failure domain.
    pub domain: u16,
}

/// What the nodes of a failure domain may give together of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Never more than this.
    pub max: u32,
    /// More than this costs …
    pub soft_max: u32,
    /// … so much per unit.
    pub weight: u32,
    /// Whose cost it is: an index into the policy's rules.
    pub rule: u16,
}

impl Limit {
    /// No limit.
    pub const NONE: Self = Self {
        max: u32::MAX,
        soft_max: u32::MAX,
        weight: 0,
        rule: 0,
    };

    /// What it costs if the domain gives `count`.
    #[must_use]
    pub fn cost(&self, count: u32) -> i64 {
        i64::from(count.saturating_sub(self.soft_max)) * i64::from(self.weight)
    }

    /// Whether it can change anything where at most `most` are given.
    pub(crate) const fn binds(&self, most: u64) -> bool {
        (self.max as u64) < most || (self.weight > 0 && (self.soft_max as u64) < most)
    }
}

/// What the nodes of a failure domain may give together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainTerms {
    /// vCPUs.
    pub vcpus: Limit,
    /// Slices.
    pub slices: Limit,
}

impl DomainTerms {
    /// No limits.
    pub const NONE: Self = Self {
        vcpus: Limit::NONE,
        slices: Limit::NONE,
    };
}

fn hinge_cost(hinges: &[Hinge], count: u32) -> i64 {
    hinges.iter().map(|hinge| hinge.cost(count)).sum()
}

impl Problem {
    /// Whether all parts are within the limits of this module.
    #[must_use]
    pub fn is_well_formed(&self) -> bool {
        let weight = |weight: u32| weight <= MAX_WEIGHT;
        let bounds = |bounds: Bounds| bounds.max <= MAX_COUNT;
        let hinges = |hinges: &[Hinge]| {
            let fine = |hinge: &Hinge| weight(hinge.weight) && hinge.at <= MAX_COUNT;
            hinges.iter().all(fine)
        };
        self.nodes.len() <= MAX_PROBLEM_NODES
            && self.total.vcpus <= MAX_COUNT
            && self.total.slices <= MAX_COUNT
            && (1..=MAX_COUNT).contains(&self.ratio)
            && (0..=i64::from(MAX_WEIGHT)).contains(&self.far_weight)
            && self.nodes.iter().all(|node| {
                bounds(node.vcpus)
                    && bounds(node.slices)
                    && weight(node.open_weight)
                    && hinges(&node.vcpu_hinges)
                    && hinges(&node.slice_hinges)
                    && usize::from(node.domain) < self.domains.len()
            })
            && self
                .domains
                .iter()
                .all(|domain| weight(domain.vcpus.weight) && weight(domain.slices.weight))
    }

    /// Whether the bounds leave room for what is asked. They bind vCPUs and
    /// slices each for itself, so sums decide.
    #[must_use]
    pub fn is_possible(&self) -> bool {
        let room = |bounds: fn(&NodeTerms) -> Bounds, limit: fn(&DomainTerms) -> Limit| {
            let (mut least, mut most) = (0_u64, 0_u64);
            let mut sums = alloc::vec![(0_u64, 0_u64); self.domains.len()];
            for node in &self.nodes {
                let bounds = bounds(node);
                if bounds.min > bounds.max {
                    return None;
                }
                let sum = &mut sums[usize::from(node.domain)];
                sum.0 += u64::from(bounds.min);
                sum.1 += u64::from(bounds.max);
            }
            for (sum, domain) in sums.iter().zip(&self.domains) {
                let max = u64::from(limit(domain).max);
                if sum.0 > max {
                    return None;
                }
                least += sum.0;
                most += sum.1.min(max);
            }
            Some(least..=most)
        };
        let fits = |range: Option<core::ops::RangeInclusive<u64>>, total: u32| {
            range.is_some_and(|range| range.contains(&u64::from(total)))
        };
        fits(
            room(|node| node.vcpus, |domain| domain.vcpus),
            self.total.vcpus,
        ) && fits(
            room(|node| node.slices, |domain| domain.slices),
            self.total.slices,
        )
    }

    /// What a node's share costs.
    #[must_use]
    pub fn node_cost(&self, node: &NodeTerms, share: Share) -> i64 {
        let open = if share.is_open() { node.open_weight } else { 0 };
        i64::from(open)
            + self.far_weight * i64::from(self.far_slices(share))
            + hinge_cost(&node.vcpu_hinges, share.vcpus)
            + hinge_cost(&node.slice_hinges, share.slices)
    }

    /// Slices of a share that are near none of its vCPUs.
    #[must_use]
    pub fn far_slices(&self, share: Share) -> u32 {
        share
            .slices
            .saturating_sub(self.ratio.saturating_mul(share.vcpus))
    }

    /// What a placement costs in all.
    #[must_use]
    pub fn cost(&self, shares: &[Share]) -> i64 {
        let nodes = self.nodes.iter().zip(shares);
        let nodes: i64 = nodes
            .map(|(node, share)| self.node_cost(node, *share))
            .sum();
        let sums = self.domain_sums(shares);
        let domains = self
            .domains
            .iter()
            .zip(&sums)
            .map(|(domain, sum)| domain.vcpus.cost(sum.vcpus) + domain.slices.cost(sum.slices));
        nodes + domains.sum::<i64>()
    }

    /// What each domain gives.
    #[must_use]
    pub fn domain_sums(&self, shares: &[Share]) -> Vec<Share> {
        let mut sums = alloc::vec![Share::NONE; self.domains.len()];
        for (node, share) in self.nodes.iter().zip(shares) {
            let sum = &mut sums[usize::from(node.domain)];
            sum.vcpus += share.vcpus;
            sum.slices += share.slices;
        }
        sums
    }

    /// Whether a placement gives what is asked within all bounds.
    #[must_use]
    pub fn allows(&self, shares: &[Share]) -> bool {
        let sums = self.domain_sums(shares);
        let total = |count: fn(&Share) -> u32| -> u32 { shares.iter().map(count).sum() };
        shares.len() == self.nodes.len()
            && self.nodes.iter().zip(shares).all(|(node, share)| {
                node.vcpus.contains(share.vcpus) && node.slices.contains(share.slices)
            })
            && self.domains.iter().zip(&sums).all(|(domain, sum)| {
                sum.vcpus <= domain.vcpus.max && sum.slices <= domain.slices.max
            })
            && total(|share| share.vcpus) == self.total.vcpus
            && total(|share| share.slices) == self.total.slices
    }

    /// Every cost is a multiple of this: the greatest common divisor of all
    /// weights. So a bound may be rounded up to one.
    pub(crate) fn cost_step(&self) -> i64 {
        let mut step = self.far_weight;
        let mut add = |weight: u32| step = gcd(step, i64::from(weight));
        for node in &self.nodes {
            add(node.open_weight);
            let hinges = node.vcpu_hinges.iter().chain(&node.slice_hinges);
            hinges.for_each(|hinge| add(hinge.weight));
        }
        for domain in &self.domains {
            add(domain.vcpus.weight);
            add(domain.slices.weight);
        }
        step.max(1)
    }
}

const fn gcd(mut a: i64, mut b: i64) -> i64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// A share that may be a node's cheapest at some prices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Vertex {
    pub(crate) share: Share,
    pub(crate) cost: i64,
}

/// What is left of a node's possibilities in one branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Room {
    pub(crate) vcpus: Bounds,
    pub(crate) slices: Bounds,
    /// It has to give something.
    pub(crate) open: bool,
}

impl Room {
    pub(crate) fn of(node: &NodeTerms) -> Self {
        Self {
            vcpus: node.vcpus,
            slices: node.slices,
            open: false,
        }
    }

    pub(crate) fn contains(&self, share: Share) -> bool {
        self.vcpus.contains(share.vcpus)
            && self.slices.contains(share.slices)
            && (!self.open || share.is_open())
    }

    pub(crate) const fn may_close(&self) -> bool {
        !self.open && self.vcpus.min == 0 && self.slices.min == 0
    }
}

/// Counts at which a cost can bend, within `bounds`, sorted.
fn bends(bounds: Bounds, hinges: &[Hinge], out: &mut ArrayVec<u32, 32>) {
    out.push(bounds.min);
    out.push(bounds.max);
    if bounds.min == 0 && bounds.max > 0 {
        // Nothing at all costs less than the line through the rest says.
        out.push(1);
    }
    let inside = hinges.iter().map(|hinge| hinge.at);
    out.extend(inside.filter(|at| bounds.contains(*at)));
}

fn sort(counts: &mut ArrayVec<u32, 32>) {
    counts.sort_unstable();
    let mut kept = 0;
    for index in 0..counts.len() {
        if kept == 0 || counts[index] != counts[kept - 1] {
            counts[kept] = counts[index];
            kept += 1;
        }
    }
    counts.truncate(kept);
}

/// Appends all shares in `room` that can be a node's cheapest.
///
/// For fixed vCPUs the cost is convex in the slices and bends at `bends` and
/// at the ratio's line; along a bend in the slices, and along the line, it is
/// convex in the vCPUs and bends where these cross. What is left out lies on or
/// above a line between two others. A closed node stands apart, since only
/// open ones pay, or are paid, for being open.
pub(crate) fn vertices(problem: &Problem, node: &NodeTerms, room: &Room, out: &mut Vec<Vertex>) {
    let ratio = problem.ratio;
    let (mut xs, mut ys) = (ArrayVec::new(), ArrayVec::new());
    bends(room.slices, &node.slice_hinges, &mut ys);
    bends(room.vcpus, &node.vcpu_hinges, &mut xs);
    if problem.far_weight > 0 {
        for y in &ys {
            let below = y / ratio;
            for x in [below, below + 1] {
                if room.vcpus.contains(x) && !xs.is_full() {
                    xs.push(x);
                }
            }
        }
    }
    sort(&mut xs);
    sort(&mut ys);
    if room.may_close() {
        let share = Share::NONE;
        let cost = problem.node_cost(node, share);
        out.push(Vertex { share, cost });
    }
    let open = out.len();
    for x in &xs {
        let row = out.len();
        let line = ratio.saturating_mul(*x);
        let diagonal = (problem.far_weight > 0 && room.slices.contains(line)).then_some(line);
        let mut add = |y: u32| {
            let share = Share::new(*x, y);
            if share.is_open() && room.contains(share) {
                let cost = problem.node_cost(node, share);
                let vertex = Vertex { share, cost };
                keep_convex(out, row, vertex);
            }
        };
        let mut diagonal = diagonal.filter(|line| !ys.contains(line));
        for y in &ys {
            if let Some(line) = diagonal.take_if(|line| *line < *y) {
                add(line);
            }
            add(*y);
        }
    }
    drop_columns(out, open);
}

/// Appends a vertex of the same row, and drops the one before if the lower
/// hull passes it by.
fn keep_convex(out: &mut Vec<Vertex>, row: usize, vertex: Vertex) {
    while out.len() >= row + 2 {
        let (a, b) = (out[out.len() - 2], out[out.len() - 1]);
        let at = |vertex: Vertex| i128::from(vertex.share.slices);
        let left = i128::from(b.cost - a.cost) * (at(vertex) - at(b));
        let right = i128::from(vertex.cost - b.cost) * (at(b) - at(a));
        if left < right {
            break;
        }
        out.pop();
    }
    out.push(vertex);
}

/// Drops vertices that lie on or above the line between two others of the
/// same column.
fn drop_columns(out: &mut Vec<Vertex>, start: usize) {
    let mut index = start;
    while index < out.len() {
        let middle = out[index];
        let same = |vertex: &&Vertex| vertex.share.slices == middle.share.slices;
        let left = out[start..index].iter().rev().find(same).copied();
        let right = out[index + 1..].iter().find(same).copied();
        let dominated = left.zip(right).is_some_and(|(left, right)| {
            let at = |vertex: Vertex| i128::from(vertex.share.vcpus);
            i128::from(middle.cost - left.cost) * (at(right) - at(middle))
                >= i128::from(right.cost - middle.cost) * (at(middle) - at(left))
        });
        if dominated {
            out.remove(index);
        } else {
            index += 1;
        }
    }
}
