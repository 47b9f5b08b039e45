//! Random racks and VMs, from a seed.

use control_plane::optimise::{Bounds, DomainTerms, Hinge, Limit, NodeTerms, Problem, Share, Side};

/// A small generator of random numbers (SplitMix64): the same instances on
/// every machine.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From `low` to `high`.
    pub(crate) fn within(&mut self, low: u32, high: u32) -> u32 {
        let span = u64::from(high - low) + 1;
        low + u32::try_from(self.next() % span).expect("below the span")
    }

    fn one_of(&mut self, choices: &[u32]) -> u32 {
        let last = u32::try_from(choices.len() - 1).expect("a few choices");
        choices[self.within(0, last) as usize]
    }

    fn percent(&mut self, chance: u32) -> bool {
        self.within(1, 100) <= chance
    }
}

/// A rack in use and what a VM wants of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    /// Nodes.
    pub(crate) nodes: u32,
    /// Percent of cores and slices that others have.
    pub(crate) used: u32,
    /// Slices of each node; of the choices, if there are several.
    pub(crate) slices: &'static [u32],
    /// What the VM wants; else a random part of what is free.
    pub(crate) total: Option<Share>,
}

struct Rules {
    open: u32,
    far: u32,
    spread: u32,
    vcpu_move: u32,
    slice_move: u32,
    headroom: u32,
    domain_hard: bool,
    domain_weight: u32,
    domain_percent: u32,
}

/// How much of `size` is free where on average `used` percent are not.
fn free(random: &mut Random, size: u32, used: u32) -> u32 {
    let (low, high) = if used <= 50 {
        (0, 2 * used)
    } else {
        (2 * used - 100, 100)
    };
    let percent = random.within(low, high);
    size - size * percent / 100
}

fn hinge(at: u32, weight: u32, side: Side) -> Option<Hinge> {
    (weight > 0).then_some(Hinge {
        at,
        weight,
        side,
        rule: 0,
    })
}

/// An instance that has a solution.
pub(crate) fn instance(seed: u64, kind: Kind) -> Problem {
    let mut random = Random::new(seed);
    loop {
        let problem = attempt(&mut random, kind);
        if problem.is_possible() {
            return problem;
        }
    }
}

fn attempt(random: &mut Random, kind: Kind) -> Problem {
    let pack = random.percent(50);
    let limits_domains = random.percent(60);
    let rules = Rules {
        open: if pack { random.within(5, 200) } else { 0 },
        far: random.within(1, 8),
        spread: if pack { 0 } else { random.within(1, 10) },
        vcpu_move: random.within(1, 20),
        slice_move: random.within(1, 4),
        headroom: if random.percent(50) {
            random.within(1, 10)
        } else {
            0
        },
        domain_hard: random.percent(50),
        domain_weight: if limits_domains {
            random.within(1, 12)
        } else {
            0
        },
        domain_percent: random.within(30, 60),
    };
    let domains = kind.nodes.div_ceil(4);
    let equal = random
        .percent(40)
        .then(|| (random.one_of(&[16, 32, 64]), random.one_of(kind.slices)));
    let room: Vec<Share> = (0..kind.nodes)
        .map(|_| {
            let (cores, slices) =
                equal.unwrap_or_else(|| (random.one_of(&[16, 32, 64]), random.one_of(kind.slices)));
            Share::new(
                free(random, cores, kind.used),
                free(random, slices, kind.used),
            )
        })
        .collect();
    // Half of the VMs run already, on some of the nodes, and are resized.
    let runs = random.percent(50);
    let current: Vec<Share> = room
        .iter()
        .map(|room| {
            let here = runs && random.percent(40);
            let mut part = |of: u32| if here { random.within(0, of / 2) } else { 0 };
            Share::new(part(room.vcpus), part(room.slices))
        })
        .collect();
    let percent = random.within(10, 80);
    let ask = |room: u32| (room * percent / 100).max(1);
    let some = Share::new(
        ask(room.iter().map(|room| room.vcpus).sum()),
        ask(room.iter().map(|room| room.slices).sum()),
    );
    let total = kind.total.unwrap_or(some);
    let fair = Share::new(
        total.vcpus.div_ceil(kind.nodes),
        total.slices.div_ceil(kind.nodes),
    );
    let nodes = (0..kind.nodes)
        .zip(room.iter().zip(&current))
        .map(|(node, (room, current))| {
            let list = |fair: u32, current: u32, moved: u32, room: u32, reserve: u32| {
                [
                    hinge(fair, rules.spread, Side::Above),
                    hinge(current, moved, Side::Below).filter(|_| current > 0),
                    hinge(room.saturating_sub(reserve), rules.headroom, Side::Above),
                ]
                .into_iter()
                .flatten()
                .collect()
            };
            NodeTerms {
                vcpus: Bounds::new(0, room.vcpus),
                slices: Bounds::new(0, room.slices),
                open_weight: rules.open,
                vcpu_hinges: list(fair.vcpus, current.vcpus, rules.vcpu_move, room.vcpus, 1),
                slice_hinges: list(
                    fair.slices,
                    current.slices,
                    rules.slice_move,
                    room.slices,
                    32,
                ),
                domain: u16::try_from(node % domains).expect("few domains"),
            }
        })
        .collect();
    let limit = |total: u32| {
        let most = (total * rules.domain_percent).div_ceil(100);
        match (rules.domain_weight, rules.domain_hard) {
            (0, _) => Limit::NONE,
            (_, true) => Limit {
                max: most,
                ..Limit::NONE
            },
            (weight, false) => Limit {
                soft_max: most,
                weight,
                ..Limit::NONE
            },
        }
    };
    let terms = DomainTerms {
        vcpus: limit(total.vcpus),
        slices: limit(total.slices),
    };
    Problem {
        total,
        ratio: total.slices.div_ceil(total.vcpus).max(1),
        far_weight: rules.far.into(),
        nodes,
        domains: vec![terms; domains as usize],
    }
}
