//! Linearizability: what threads on several members were told, while members
//! come, go and are evicted, must be what one map would have told them one
//! after the other, each within the time of its call.

use std::collections::HashSet;
use std::sync::Mutex;
use std::thread;

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use proptest::prelude::*;

use super::super::testing::{Map, op};
use super::super::{Config, Log, Replica, ReplicaError, Thread};
use super::{FakeClock, TINY, log};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Add { key: u64, amount: u64 },
    Read { key: u64 },
}

/// A call that was, or may have been, carried out between two moments.
#[derive(Clone, Copy, Debug)]
struct Event {
    call: Call,
    begun: u64,
    /// When the answer came, and the sum it told; `None` if none did: then the
    /// call may take effect at any time, or never.
    told: Option<(u64, u64)>,
}

impl Event {
    const fn key(&self) -> u64 {
        match self.call {
            Call::Add { key, .. } | Call::Read { key } => key,
        }
    }

    fn ended(&self) -> u64 {
        self.told.map_or(u64::MAX, |(at, _)| at)
    }
}

/// Whether the events of one key have an order that explains them. (Keys are
/// independent, so each can be judged by itself.) The search of Wing and Gong:
/// next comes any event that began before all that are left had ended.
fn is_linearizable(events: &[Event]) -> bool {
    assert!(events.len() <= 128, "one bit each");
    let mut seen = HashSet::new();
    let mut open = vec![(0_u128, 0_u64)];
    while let Some((done, sum)) = open.pop() {
        let left = || (0..events.len()).filter(move |index| done & (1 << index) == 0);
        if left().all(|index| events[index].told.is_none()) {
            return true;
        }
        let first_end = left().map(|index| events[index].ended()).min();
        for index in left() {
            let event = &events[index];
            let possible =
                Some(event.begun) < first_end && event.told.is_none_or(|(_, answer)| answer == sum);
            let next = match event.call {
                Call::Add { amount, .. } => sum + amount,
                Call::Read { .. } => sum,
            };
            if possible && seen.insert((done | (1 << index), next)) {
                open.push((done | (1 << index), next));
            }
        }
    }
    false
}

/// Records what all threads do.
#[derive(Default)]
struct Recorder {
    time: AtomicU64,
    amounts: AtomicU64,
    events: Mutex<Vec<Event>>,
}

impl Recorder {
    fn now(&self) -> u64 {
        self.time.fetch_add(1, Ordering::SeqCst)
    }

    /// Carries out one step; says whether the member goes on.
    fn step(&self, seat: &mut Thread<'_, Map, &FakeClock>, step: Step) -> bool {
        let key = u64::from(step.key);
        let begun = self.now();
        let (call, result) = if step.reads {
            (Call::Read { key }, seat.read(|map| map.get(key)))
        } else {
            // No two are alike, so that an answer tells which came before.
            let amount = 1 + self.amounts.fetch_add(1, Ordering::Relaxed);
            (Call::Add { key, amount }, seat.update(op(key, amount)))
        };
        let ended = self.now();
        let told = match result {
            Ok(sum) => Some((ended, sum)),
            Err(ReplicaError::OutcomeUnknown { .. }) => None,
            // By their word nothing was done: such a call is no event, and if
            // it had an effect, nothing explains what others saw.
            Err(ReplicaError::Ended) => return false,
            Err(ReplicaError::Full | ReplicaError::TimedOut | ReplicaError::Loading) => {
                return true;
            }
            Err(error) => panic!("{error:?}"),
        };
        let event = Event { call, begun, told };
        self.events.lock().expect("no panic").push(event);
        true
    }

    fn check(&self) {
        let events = self.events.lock().expect("no panic");
        for key in 0..KEYS {
            let mut of_key: Vec<Event> = events.iter().copied().collect();
            of_key.retain(|event| event.key() == u64::from(key));
            of_key.sort_by_key(|event| event.begun);
            assert!(is_linearizable(&of_key), "key {key}: {of_key:#?}");
        }
    }
}

const KEYS: u8 = 2;

#[derive(Clone, Copy, Debug)]
struct Step {
    key: u8,
    reads: bool,
    yields: bool,
}

/// What happens beside the threads of two members that stay.
#[derive(Clone, Debug)]
struct Script {
    /// For each of three members two threads.
    threads: [[Vec<Step>; 2]; 3],
    /// Members that join one after the other, work, and leave.
    visitors: Vec<Vec<Step>>,
    /// After so many calls, the last of the three members is evicted.
    evict_after: u64,
    /// How soon a writer goes on without a slow member.
    patience_ns: u64,
}

fn script() -> impl Strategy<Value = Script> {
    let step = || {
        (0..KEYS, any::<bool>(), any::<bool>()).prop_map(|(key, reads, yields)| Step {
            key,
            reads,
            yields,
        })
    };
    let steps = move |most| prop::collection::vec(step(), 1..most);
    let member = move || [steps(16), steps(16)];
    (
        [member(), member(), member()],
        prop::collection::vec(steps(6), 0..4),
        0..120_u64,
        prop_oneof![Just(100_000), Just(2_000_000), Just(u64::MAX / 4)],
    )
        .prop_map(|(threads, visitors, evict_after, patience_ns)| Script {
            threads,
            visitors,
            evict_after,
            patience_ns,
        })
}

fn work(recorder: &Recorder, replica: &Replica<Map, &FakeClock>, steps: &[Step]) {
    let mut seat = replica.thread().expect("a seat");
    for step in steps {
        if !recorder.step(&mut seat, *step) {
            break;
        }
        if step.yields {
            thread::yield_now();
        }
    }
}

fn visit(recorder: &Recorder, log: &Log, clock: &FakeClock, config: Config, steps: &[Step]) {
    // All slots may be taken, or in quarantine: then there is no visit.
    if let Ok(replica) = Replica::join(log.clone(), Map::default(), clock, config) {
        work(recorder, &replica, steps);
        let _ = replica.leave();
    }
}

fn run(script: &Script) {
    let (log, clock) = (log(TINY), FakeClock::default());
    let config = Config {
        // Fake time runs fast: nobody is taken for dead, waits are long.
        lease_ns: u64::MAX / 4,
        wait_ns: 2_000_000_000,
        patience_ns: script.patience_ns,
        copies: 1,
        ..Config::default()
    };
    let recorder = Recorder::default();
    let members: Vec<_> = (0..3)
        .map(|_| Replica::join(log.clone(), Map::default(), &clock, config).expect("room"))
        .collect();
    let workers = AtomicUsize::new(8);
    let done = || {
        workers.fetch_sub(1, Ordering::SeqCst);
    };
    thread::scope(|scope| {
        let (recorder, log, clock, members, workers) =
            (&recorder, &log, &clock, &members, &workers);
        for (member, threads) in members.iter().zip(&script.threads) {
            for steps in threads {
                scope.spawn(move || {
                    work(recorder, member, steps);
                    done();
                });
            }
        }
        scope.spawn(move || {
            for steps in &script.visitors {
                visit(recorder, log, clock, config, steps);
            }
            done();
        });
        scope.spawn(move || {
            let victim = &members[2];
            while recorder.time.load(Ordering::SeqCst) < script.evict_after
                && workers.load(Ordering::SeqCst) > 1
            {
                thread::yield_now();
            }
            let evicted = members[0].evict(victim.member(), victim.epoch());
            assert!(
                !matches!(evicted, Err(ReplicaError::Corrupt { .. })),
                "{evicted:?}"
            );
            done();
        });
        // Keeps up the members whose threads wait or are done.
        scope.spawn(move || {
            while workers.load(Ordering::SeqCst) > 0 {
                for member in members {
                    let _ = member.tick();
                }
                thread::yield_now();
            }
        });
    });
    recorder.check();
    let sums = |replica: &Replica<Map, &FakeClock>| {
        let mut seat = replica.thread().expect("a seat");
        seat.read(|map| map.sums.clone())
    };
    // The two that stay are equal, unless one of them still waits for a
    // snapshot, which takes ticks of the other.
    if let (Ok(first), Ok(second)) = (sums(&members[0]), sums(&members[1])) {
        assert_eq!(first, second);
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 1 } else { 25 },
        // A failure depends on the threads' timing: smaller ones are luck.
        max_shrink_iters: 0,
        ..ProptestConfig::default()
    })]

    #[test]
    fn what_threads_are_told_is_linearizable(script in script()) {
        run(&script);
    }
}

/// The checker itself: it must find what it is there to find.
mod checker {
    use super::*;

    const fn add(amount: u64, begun: u64, told: Option<(u64, u64)>) -> Event {
        let call = Call::Add { key: 0, amount };
        Event { call, begun, told }
    }

    const fn read(begun: u64, ended: u64, sum: u64) -> Event {
        Event {
            call: Call::Read { key: 0 },
            begun,
            told: Some((ended, sum)),
        }
    }

    #[test]
    fn calls_at_once_may_take_effect_in_any_order() {
        let both = [add(1, 0, Some((9, 2))), add(2, 1, Some((8, 0)))];
        assert!(is_linearizable(&both));
        assert!(is_linearizable(&[both[0], both[1], read(2, 7, 2)]));
        assert!(is_linearizable(&[both[0], both[1], read(2, 7, 0)]));
        assert!(!is_linearizable(&[both[0], both[1], read(2, 7, 1)]));
    }

    #[test]
    fn a_stale_read_is_found() {
        let answered = add(1, 0, Some((1, 0)));
        assert!(is_linearizable(&[answered, read(2, 3, 1)]));
        assert!(!is_linearizable(&[answered, read(2, 3, 0)]));
    }

    #[test]
    fn a_lost_and_a_doubled_update_are_found() {
        let first = add(1, 0, Some((1, 0)));
        assert!(!is_linearizable(&[first, add(2, 2, Some((3, 0)))]));
        assert!(!is_linearizable(&[first, add(2, 2, Some((3, 2)))]));
        assert!(is_linearizable(&[first, add(2, 2, Some((3, 1)))]));
    }

    #[test]
    fn reads_never_go_back() {
        let open = add(1, 0, None);
        assert!(is_linearizable(&[open, read(1, 2, 0), read(3, 4, 1)]));
        assert!(!is_linearizable(&[open, read(1, 2, 1), read(3, 4, 0)]));
    }

    #[test]
    fn an_update_of_unknown_outcome_happens_once_or_never() {
        let open = add(1, 0, None);
        assert!(is_linearizable(&[open, read(5, 6, 0)]));
        assert!(is_linearizable(&[open, read(5, 6, 1)]));
        assert!(!is_linearizable(&[open, read(5, 6, 2)]));
    }
}
