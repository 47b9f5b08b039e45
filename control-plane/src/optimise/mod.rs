//! The optimiser: which node gives how many vCPUs and slices to one VM.
//!
//! The slices of a node are interchangeable, and so are its cores. So the
//! unknowns are two counts per node, and the problem is separable: each node
//! has its own cost of giving a [`Share`], failure domains add a convex cost
//! of what their nodes give together, and only two equations couple it all.
//!
//! ```text
//! minimise  Σ_n f_n(x_n, y_n) + Σ_d g_d(Σ_{n in d} x_n, Σ_{n in d} y_n)
//! so that   Σ_n x_n = vCPUs,   Σ_n y_n = slices,   each share within its bounds
//! f_n(x, y) = open_n [x + y > 0] + far max(0, y − ratio x) + hinges in x, in y
//! ```
//!
//! 1. *Bound.* With a price on a vCPU and on a slice (and on an open node, and
//!    on what a scarce domain gives) the nodes fall apart: each takes the share
//!    that is cheapest at these prices, and the sum is a lower bound at **any**
//!    prices ([`dual`]). A node's cheapest share is a vertex of the hull of its
//! 2. *Answer.* The shares at the best prices add up to nearly what is asked;
//!    repairing and polishing them gives a placement ([`primal`]).
//! 3. *Proof.* If bound and answer differ, the node whose shares the prices
//!    can't tell apart is split in two, best bound first ([`branch`]), until the
//!    answer is proven or the time is up. Then the gap is known.
//!
//! All arithmetic is in integers: replicas could solve alike, and the
//! hypervisor has no floating point.

pub(crate) mod branch;
pub(crate) mod cost;
pub(crate) mod dual;
pub(crate) mod few;
pub(crate) mod primal;
#[cfg(test)]
mod tests;

use alloc::vec::Vec;

use vmm_shared::log::Clock;

pub(crate) use cost::Vertex;
pub use cost::{Bounds, DomainTerms, Hinge, HingeList, Limit, NodeTerms, Side};

/// Most vCPUs, and most slices, of a VM and of a node; of 2 MiB each, that
/// many slices are 2 TiB.
pub const MAX_COUNT: u32 = 1 << 20;
/// Most that a unit may weigh: what keeps sums of costs within 64 bits.
pub const MAX_WEIGHT: u32 = 100_000;
/// Most nodes of a problem.
pub const MAX_PROBLEM_NODES: usize = 4096;

/// What one node gives to a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Share {
    /// Cores, for as many vCPUs.
    pub vcpus: u32,
    /// Slices of memory.
    pub slices: u32,
}

impl Share {
    /// Nothing at all.
    pub const NONE: Self = Self::new(0, 0);

    /// So many vCPUs and slices.
    #[must_use]
    pub const fn new(vcpus: u32, slices: u32) -> Self {
        Self { vcpus, slices }
    }

    /// Whether the node gives anything.
    #[must_use]
    pub const fn is_open(self) -> bool {
        self.vcpus > 0 || self.slices > 0
    }
}

/// One VM to be placed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problem {
    /// What all nodes give together.
    pub total: Share,
    /// Slices that are near a vCPU of their node: a vCPU's part of the memory,
    /// rounded up.
    pub ratio: u32,
    /// Cost of each slice beyond that.
    pub far_weight: i64,
    /// What each node may give, and at what cost.
    pub nodes: Vec<NodeTerms>,
    /// Failure domains; [`NodeTerms::domain`] is an index into this.
    pub domains: Vec<DomainTerms>,
}

/// A placement, and how good it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Solution {
    /// What each node gives.
    pub shares: Vec<Share>,
    /// Its cost.
    pub cost: i64,
    /// No placement costs less than this.
    pub bound: i64,
    /// Parts into which the problem was split before this was known.
    pub branches: u32,
}

impl Solution {
    /// Whether no placement is better.
    #[must_use]
    pub const fn is_optimal(&self) -> bool {
        self.cost == self.bound
    }

    /// How much better a placement might be at most, in 1/1000 of this one's
    /// cost.
    #[must_use]
    pub fn gap_permille(&self) -> i64 {
        let gap = i128::from(self.cost - self.bound) * 1000;
        let gap = gap / i128::from(self.cost.max(1));
        i64::try_from(gap).unwrap_or(i64::MAX)
    }
}

/// When to stop looking for something better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Nanoseconds after which the best answer so far is given.
    pub time_ns: u64,
    /// A gap that is good enough, in 1/1000 of the cost.
    pub gap_permille: i64,
}

impl Budget {
    /// Prove the optimum, if that takes no longer than `time_ns`.
    #[must_use]
    pub const fn exact(time_ns: u64) -> Self {
        Self {
            time_ns,
            gap_permille: 0,
        }
    }
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoSolution {
    /// The problem has a part that is beyond the limits above, or a node
    /// without its domain.
    Malformed,
    /// No placement satisfies all bounds.
    Impossible,
    /// There may be one, but none was found in time.
    TimedOut,
}

/// Finds a placement of least cost.
///
/// # Errors
/// If there is none, or none was found within the budget.
pub fn solve<C: Clock>(
    problem: &Problem,
    budget: Budget,
    clock: &C,
) -> Result<Solution, NoSolution> {
    check(problem)?;
    branch::search(problem, budget, clock).map(|(solution, _)| solution)
}

/// What can be told of a problem before any search.
fn check(problem: &Problem) -> Result<(), NoSolution> {
    if !problem.is_well_formed() {
        return Err(NoSolution::Malformed);
    }
    if !problem.is_possible() {
        return Err(NoSolution::Impossible);
    }
    Ok(())
}

pub use few::solve_few;
