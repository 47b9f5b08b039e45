//! What is counted, and how it is printed.

use std::collections::BTreeMap;
use std::fmt;

use control_plane::optimise::Solution;

use crate::reference::Answer;

/// Numbers of which only ranks are of interest.
#[derive(Debug, Default)]
struct Sample(Vec<f64>);

impl Sample {
    fn add(&mut self, value: f64) {
        let place = self.0.partition_point(|known| *known < value);
        self.0.insert(place, value);
    }

    /// The value that so many percent are below or at.
    fn percentile(&self, percent: usize) -> f64 {
        let rank = (self.0.len() * percent).div_ceil(100).max(1);
        self.0.get(rank - 1).copied().unwrap_or(f64::NAN)
    }

    fn sum(&self) -> f64 {
        self.0.iter().sum()
    }
}

#[derive(Debug, Default)]
struct Group {
    same: usize,
    better: usize,
    worse: usize,
    proven: usize,
    proven_by_reference: usize,
    ours: Sample,
    theirs: Sample,
    ratios: Sample,
}

impl Group {
    fn row(&self, f: &mut fmt::Formatter<'_>, name: &str) -> fmt::Result {
        writeln!(
            f,
            "| {name} | {} | {} | {} | {} | {} | {} | {:.3} | {:.3} | {:.1} | {:.0} | {:.0} |",
            self.ours.0.len(),
            self.same,
            self.better,
            self.worse,
            self.proven,
            self.proven_by_reference,
            self.ours.percentile(50) * 1e3,
            self.ours.percentile(95) * 1e3,
            self.theirs.percentile(50) * 1e3,
            self.ratios.percentile(50),
            self.theirs.sum() / self.ours.sum(),
        )
    }
}

/// The optimiser and CP-SAT, by use and size.
#[derive(Debug, Default)]
pub(crate) struct Comparison {
    groups: BTreeMap<(u32, u32), Group>,
    all: Group,
}

impl Comparison {
    pub(crate) fn add(
        &mut self,
        nodes: u32,
        used: u32,
        (ours, our_seconds): (&Solution, f64),
        (theirs, their_seconds): (&Answer, f64),
    ) {
        let group = self.groups.entry((used, nodes)).or_default();
        for group in [group, &mut self.all] {
            group.same += usize::from(ours.cost == theirs.cost);
            group.better += usize::from(ours.cost < theirs.cost);
            group.worse += usize::from(ours.cost > theirs.cost);
            group.proven += usize::from(ours.is_optimal());
            group.proven_by_reference += usize::from(theirs.status == "OPTIMAL");
            group.ours.add(our_seconds);
            group.theirs.add(their_seconds);
            group.ratios.add(their_seconds / our_seconds);
        }
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "| used, nodes | instances | same cost | ours less | ours more | proven by us | \
             proven by CP-SAT | median ms | p95 ms | CP-SAT median ms | median ratio | ratio of sums |"
        )?;
        writeln!(
            f,
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
        )?;
        for ((used, nodes), group) in &self.groups {
            group.row(f, &format!("{used} %, {nodes}"))?;
        }
        self.all.row(f, "all")?;
        let ratios = &self.all.ratios;
        writeln!(
            f,
            "ratios: p5 {:.1}, p25 {:.0}, median {:.0}, p75 {:.0}, p95 {:.0}",
            ratios.percentile(5),
            ratios.percentile(25),
            ratios.percentile(50),
            ratios.percentile(75),
            ratios.percentile(95)
        )
    }
}

/// Times and gaps of one kind of problem.
#[derive(Debug, Default)]
pub(crate) struct Large {
    seconds: Sample,
    gaps: Sample,
}

impl Large {
    pub(crate) fn add(&mut self, solution: &Solution, seconds: f64) {
        self.seconds.add(seconds);
        let gap = i32::try_from(solution.gap_permille()).unwrap_or(i32::MAX);
        self.gaps.add(f64::from(gap) / 10.0);
    }
}

impl fmt::Display for Large {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} times, median {:.3} ms, max {:.3} ms; proven gap median {:.1} %, {} within 2 %, \
             max {:.1} %",
            self.seconds.0.len(),
            self.seconds.percentile(50) * 1e3,
            self.seconds.percentile(100) * 1e3,
            self.gaps.percentile(50),
            self.gaps.0.partition_point(|gap| *gap <= 2.0),
            self.gaps.percentile(100)
        )
    }
}
