//! That a node's vertices are enough, and that bounds are bounds.

use proptest::prelude::*;

use super::cost::{Room, vertices};
use super::dual::{PLACES, Relaxation, cheapest, worth};
use super::{
    Bounds, DomainTerms, Hinge, HingeList, Limit, NodeTerms, Problem, Share, Side, Vertex,
};

fn hinges(most: u32) -> impl Strategy<Value = HingeList> {
    let hinge = (0..=most, 0_u32..8, any::<bool>()).prop_map(|(at, weight, above)| Hinge {
        at,
        weight,
        side: if above { Side::Above } else { Side::Below },
        rule: 0,
    });
    prop::collection::vec(hinge, 0..4).prop_map(|hinges| hinges.into_iter().collect())
}

fn bounds(most: u32) -> impl Strategy<Value = Bounds> {
    (0..=most).prop_flat_map(|max| (0..=max).prop_map(move |min| Bounds::new(min / 2, max)))
}

prop_compose! {
    fn nodes()(
        vcpus in bounds(6),
        slices in bounds(20),
        open_weight in 0_u32..30,
        vcpu_hinges in hinges(6),
        slice_hinges in hinges(20),
        domain in 0_u16..2,
    ) -> NodeTerms {
        NodeTerms { vcpus, slices, open_weight, vcpu_hinges, slice_hinges, domain }
    }
}

fn all_shares(node: &NodeTerms) -> impl Iterator<Item = Share> {
    let (vcpus, slices) = (node.vcpus, node.slices);
    (vcpus.min..=vcpus.max)
        .flat_map(move |x| (slices.min..=slices.max).map(move |y| Share::new(x, y)))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn at_any_prices_a_vertex_is_cheapest(
        node in nodes(),
        ratio in 1_u32..8,
        far_weight in 0_i64..5,
        open in any::<bool>(),
        prices in prop::array::uniform3(-30_i64 << PLACES..30 << PLACES),
    ) {
        let problem = Problem { ratio, far_weight, ..Problem::default() };
        let room = Room { open, ..Room::of(&node) };
        let mut hull = Vec::new();
        vertices(&problem, &node, &room, &mut hull);
        let all = all_shares(&node).filter(|share| room.contains(*share));
        let least = all
            .map(|share| {
                let cost = problem.node_cost(&node, share);
                worth(&Vertex { share, cost }, &prices)
            })
            .min();
        let found = (!hull.is_empty()).then(|| cheapest(&hull, &prices).0);
        prop_assert_eq!(found, least);
    }

    #[test]
    fn the_bound_is_below_every_placement(
        one in nodes(),
        two in nodes(),
        ratio in 1_u32..8,
        far_weight in 0_i64..5,
        max in 1_u32..8,
        soft_max in 1_u32..20,
        weight in 0_u32..6,
        totals in (0_u32..100, 0_u32..100),
    ) {
        let between = |bounds: fn(&NodeTerms) -> Bounds, percent: u32| {
            let (one, two) = (bounds(&one), bounds(&two));
            one.min + two.min + (one.max + two.max - one.min - two.min) * percent / 100
        };
        let total = Share::new(
            between(|node| node.vcpus, totals.0),
            between(|node| node.slices, totals.1),
        );
        let domain = DomainTerms {
            vcpus: Limit { max, ..Limit::NONE },
            slices: Limit { soft_max, weight, ..Limit::NONE },
        };
        let nodes = vec![one, two];
        let problem = Problem { total, ratio, far_weight, nodes, domains: vec![domain; 2] };
        prop_assume!(problem.is_possible());
        let mut least = i64::MAX;
        for first in all_shares(&problem.nodes[0]) {
            let Some(second) = total.vcpus.checked_sub(first.vcpus).zip(total.slices.checked_sub(first.slices)) else {
                continue;
            };
            let shares = [first, Share::new(second.0, second.1)];
            if problem.allows(&shares) {
                least = least.min(problem.cost(&shares));
            }
        }
        let bound = Relaxation::new(&problem).bound(i64::MAX);
        prop_assert!(bound <= least, "{bound} > {least}");
    }
}
