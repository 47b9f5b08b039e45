//! A region in which somebody writes anything, anywhere, at any time.

use proptest::prelude::*;

use super::super::testing::{Map, op};
use super::super::{Config, Log, Replica};
use super::{FakeClock, TINY, memory};

/// Words of the header, which is read once, are not touched.
const FIRST: usize = 8;
const WORDS: usize = TINY.total_bytes() / 8;
/// Words before the lanes: where most harm can be done.
const COHERENT: usize = TINY.coherent_bytes() / 8;

#[derive(Clone, Debug)]
enum Damage {
    Set(u64),
    Add(u64),
    Flip(u32),
}

fn damage() -> impl Strategy<Value = (usize, Damage)> {
    let place = prop_oneof![3 => FIRST..COHERENT, 1 => COHERENT..WORDS];
    let what = prop_oneof![
        any::<u64>().prop_map(Damage::Set),
        (0..16_u64).prop_map(Damage::Set),
        Just(Damage::Set(u64::MAX)),
        (1..64_u64).prop_map(Damage::Add),
        (0..64_u32).prop_map(Damage::Flip),
    ];
    (place, what)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 400 }))]

    #[test]
    fn garbage_leads_to_errors_and_never_to_a_panic(
        damages in prop::collection::vec(damage(), 1..30),
    ) {
        let memory = memory(TINY);
        let log = Log::create(memory, TINY).expect("large enough");
        let clock = FakeClock::default();
        let config = Config {
            lease_ns: 2_000_000,
            patience_ns: 500_000,
            wait_ns: 3_000_000,
            copies: 1,
            ..Config::default()
        };
        let join = || Replica::join(log.clone(), Map::default(), &clock, config);
        let mut replicas = vec![join().ok(), join().ok()];
        for (step, (place, what)) in damages.into_iter().enumerate() {
            let word: u64 = memory.read(place * 8).expect("inside");
            let word = match what {
                Damage::Set(word) => word,
                Damage::Add(more) => word.wrapping_add(more),
                Damage::Flip(bit) => word ^ (1 << bit),
            };
            memory.write(place * 8, &word).expect("inside");
            for replica in replicas.iter().flatten() {
                let mut seat = replica.thread().expect("a seat");
                let _ = seat.update_with(op(step as u64, 1), &[1; 40]);
                let _ = seat.read(|map| map.get(0));
                let _ = replica.tick();
            }
            if step % 8 == 7 {
                let _ = replicas.remove(0).map(Replica::leave);
                replicas.push(join().ok());
            }
        }
        let _ = Log::attach(memory);
    }
}
