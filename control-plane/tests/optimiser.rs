//! The optimiser against a solver that shares nothing with it.

use std::time::Instant;

use control_plane::optimise::{
    Bounds, Budget, DomainTerms, Hinge, HingeList, Limit, NoSolution, NodeTerms, Problem, Share,
    Side, solve, solve_few,
};
use microlp::{ComparisonOp, OptimizationDirection, Variable};
use proptest::prelude::*;
use vmm_shared::log::Clock;

struct Wall(Instant);

impl Clock for Wall {
    fn now_ns(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).expect("not for centuries")
    }
}

fn wall() -> Wall {
    Wall(Instant::now())
}

/// Catches hangs only.
const LONG: Budget = Budget::exact(60_000_000_000);

fn hinges(most: u32) -> impl Strategy<Value = HingeList> {
    let hinge = (0..=most, 0_u32..8, any::<bool>()).prop_map(|(at, weight, above)| Hinge {
        at,
        weight,
        side: if above { Side::Above } else { Side::Below },
        rule: 0,
    });
    prop::collection::vec(hinge, 0..3).prop_map(|hinges| hinges.into_iter().collect())
}

fn bounds(most: u32) -> impl Strategy<Value = Bounds> {
    (0..=most, prop::bool::weighted(0.2)).prop_flat_map(|(max, least)| {
        let min = if least { 0..=max } else { 0..=0 };
        min.prop_map(move |min| Bounds::new(min, max))
    })
}

fn limit(most: u32) -> impl Strategy<Value = Limit> {
    prop_oneof![
        2 => Just(Limit::NONE),
        1 => (1..=most).prop_map(|max| Limit { max, ..Limit::NONE }),
        1 => (1..=most, 1_u32..6).prop_map(|(soft_max, weight)| Limit {
            soft_max,
            weight,
            ..Limit::NONE
        }),
    ]
}

fn problems(nodes: usize) -> impl Strategy<Value = Problem> {
    let node = (
        bounds(6),
        bounds(20),
        0_u32..30,
        hinges(6),
        hinges(20),
        0_u16..2,
    )
        .prop_map(
            |(vcpus, slices, open_weight, vcpu_hinges, slice_hinges, domain)| NodeTerms {
                vcpus,
                slices,
                open_weight,
                vcpu_hinges,
                slice_hinges,
                domain,
            },
        );
    let nodes = prop::collection::vec(node, 1..=nodes);
    let domain = (limit(10), limit(30)).prop_map(|(vcpus, slices)| DomainTerms { vcpus, slices });
    let domains = prop::collection::vec(domain, 2);
    (nodes, domains, 0_u32..=100, 0_u32..=100, 0_i64..6).prop_map(
        |(nodes, domains, vcpus, slices, far_weight)| {
            let between = |bounds: fn(&NodeTerms) -> Bounds, percent: u32| {
                let least: u32 = nodes.iter().map(|node| bounds(node).min).sum();
                let most: u32 = nodes.iter().map(|node| bounds(node).max).sum();
                least + (most - least) * percent / 100
            };
            let total = Share::new(
                between(|node| node.vcpus, vcpus),
                between(|node| node.slices, slices),
            );
            Problem {
                total,
                ratio: total.slices.div_ceil(total.vcpus.max(1)).max(1),
                far_weight,
                nodes,
                domains,
            }
        },
    )
}

/// The problem as a mixed-integer program.
struct Program {
    program: microlp::Problem,
}

impl Program {
    /// `weight * max(0, Σ terms − at)` more to pay.
    fn excess(&mut self, weight: f64, terms: &[(Variable, f64)], at: f64) {
        if weight > 0.0 {
            let over = self.program.add_var(weight, (0.0, f64::INFINITY));
            let mut row = terms.to_vec();
            row.push((over, -1.0));
            self.program.add_constraint(&row[..], ComparisonOp::Le, at);
        }
    }

    fn hinges(&mut self, hinges: &[Hinge], count: Variable) {
        for hinge in hinges {
            let sign = match hinge.side {
                Side::Above => 1.0,
                Side::Below => -1.0,
            };
            let at = sign * f64::from(hinge.at);
            self.excess(hinge.weight.into(), &[(count, sign)], at);
        }
    }

    fn limit(&mut self, limit: &Limit, counts: &[(Variable, f64)]) {
        if counts.is_empty() {
            return;
        }
        if limit.max < u32::MAX {
            self.program
                .add_constraint(counts, ComparisonOp::Le, f64::from(limit.max));
        }
        self.excess(limit.weight.into(), counts, f64::from(limit.soft_max));
    }
}

/// What the reference solver finds the least cost to be.
fn least_cost(problem: &Problem) -> Option<i64> {
    let mut program = Program {
        program: microlp::Problem::new(OptimizationDirection::Minimize),
    };
    let range = |bounds: Bounds| {
        let end = |count: u32| i32::try_from(count).expect("small");
        (end(bounds.min), end(bounds.max))
    };
    let (mut vcpus, mut slices) = (Vec::new(), Vec::new());
    for node in &problem.nodes {
        let x = program.program.add_integer_var(0.0, range(node.vcpus));
        let y = program.program.add_integer_var(0.0, range(node.slices));
        let open = program
            .program
            .add_integer_var(node.open_weight.into(), (0, 1));
        for (count, most) in [(x, node.vcpus.max), (y, node.slices.max)] {
            program.program.add_constraint(
                [(count, 1.0), (open, -f64::from(most))],
                ComparisonOp::Le,
                0.0,
            );
        }
        let far = i32::try_from(problem.far_weight).expect("small");
        let line = [(y, 1.0), (x, -f64::from(problem.ratio))];
        program.excess(far.into(), &line, 0.0);
        program.hinges(&node.vcpu_hinges, x);
        program.hinges(&node.slice_hinges, y);
        vcpus.push((x, 1.0));
        slices.push((y, 1.0));
    }
    for (counts, total) in [
        (&vcpus, problem.total.vcpus),
        (&slices, problem.total.slices),
    ] {
        program
            .program
            .add_constraint(&counts[..], ComparisonOp::Eq, total.into());
    }
    for (index, domain) in problem.domains.iter().enumerate() {
        let of_domain = |counts: &[(Variable, f64)]| -> Vec<(Variable, f64)> {
            let nodes = problem.nodes.iter().zip(counts);
            let inside = nodes.filter(|(node, _)| usize::from(node.domain) == index);
            inside.map(|(_, count)| *count).collect()
        };
        program.limit(&domain.vcpus, &of_domain(&vcpus));
        program.limit(&domain.slices, &of_domain(&slices));
    }
    let microlp::SolveOutcome::Solution(solution) = program.program.solve().ok()? else {
        unreachable!("no limit of time was set");
    };
    let cost = solution.objective().round();
    // Costs of small problems are exact in floating point.
    format!("{cost:.0}").parse().ok()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn the_answer_is_the_reference_solvers(problem in problems(5)) {
        match solve(&problem, LONG, &wall()) {
            Ok(solution) => {
                prop_assert!(problem.allows(&solution.shares));
                prop_assert_eq!(problem.cost(&solution.shares), solution.cost);
                prop_assert!(solution.is_optimal());
                prop_assert_eq!(Some(solution.cost), least_cost(&problem));
            }
            Err(error) => {
                prop_assert_eq!(error, NoSolution::Impossible);
                prop_assert_eq!(least_cost(&problem), None);
            }
        }
    }

    #[test]
    fn without_time_the_bound_still_is_one(problem in problems(8)) {
        let Ok(best) = solve(&problem, LONG, &wall()) else {
            return Ok(());
        };
        match solve(&problem, Budget::exact(0), &wall()) {
            Ok(hasty) => {
                prop_assert!(problem.allows(&hasty.shares));
                prop_assert!(hasty.bound <= best.cost, "{} > {}", hasty.bound, best.cost);
                prop_assert!(hasty.cost >= best.cost);
            }
            Err(error) => prop_assert_eq!(error, NoSolution::TimedOut),
        }
    }

    #[test]
    fn small_requests_are_placed_within_their_bound(
        problem in problems(60),
        vcpus in 0_u32..4,
        slices in 0_u32..10,
    ) {
        let Ok(now) = solve(&problem, Budget::exact(5_000_000), &wall()) else {
            return Ok(());
        };
        // All that is placed stays, and a little is added.
        let mut grown = problem;
        for (node, share) in grown.nodes.iter_mut().zip(&now.shares) {
            node.vcpus.min = share.vcpus;
            node.slices.min = share.slices;
        }
        grown.total.vcpus += vcpus;
        grown.total.slices += slices;
        let full = solve(&grown, Budget::exact(50_000_000), &wall());
        match solve_few(&grown, Budget::exact(50_000_000), &wall()) {
            Ok(few) => {
                prop_assert!(grown.allows(&few.shares));
                prop_assert_eq!(grown.cost(&few.shares), few.cost);
                let full = full.expect("there is a placement");
                prop_assert!(few.bound <= full.cost, "{} > {}", few.bound, full.cost);
                prop_assert!(full.bound <= few.cost, "{} > {}", full.bound, few.cost);
            }
            Err(error) => prop_assert_eq!(Err(error), full),
        }
    }
}

#[test]
fn problems_beyond_the_limits_are_refused() {
    let node = NodeTerms {
        vcpus: Bounds::new(0, 4),
        slices: Bounds::new(0, 4),
        ..NodeTerms::default()
    };
    let fine = Problem {
        total: Share::new(2, 2),
        ratio: 1,
        far_weight: 1,
        nodes: vec![node.clone(); 2],
        domains: vec![DomainTerms::NONE],
    };
    assert!(solve(&fine, LONG, &wall()).is_ok());
    let break_it: [fn(&mut Problem); 5] = [
        |problem| problem.ratio = 0,
        |problem| problem.domains.clear(),
        |problem| problem.nodes[0].open_weight = u32::MAX,
        |problem| problem.nodes[1].vcpus.max = u32::MAX,
        |problem| problem.far_weight = -1,
    ];
    for change in break_it {
        let mut broken = fine.clone();
        change(&mut broken);
        assert_eq!(solve(&broken, LONG, &wall()), Err(NoSolution::Malformed));
    }
    let mut crossed = fine;
    crossed.nodes[0].slices = Bounds::new(3, 2);
    assert_eq!(solve(&crossed, LONG, &wall()), Err(NoSolution::Impossible));
}
