//! The classic shapes of memory ordering. x86-TSO allows one relaxation, a
//! load before an older store to another place; everything else seen here is
//! an error (Owens, Sarkar, Sewell: A Better x86 Memory Model).

use std::sync::atomic::{AtomicU32, Ordering, fence};

use crate::Outcome;
use crate::machine::{Cpus, Meeting};

/// Instances of a shape that run between two meetings.
const BATCH: u32 = 64;

/// A word on a line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Word(AtomicU32);

impl Word {
    fn set(&self) {
        self.0.store(1, Ordering::Release);
    }
    fn get(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }
}

/// The locations of one instance.
type Locations = [Word; 2];
/// What a role has loaded.
type Loads = [u32; 2];

/// Runs a shape: each role on all instances of a batch, then everybody looks
/// for an outcome. Returns how often there was one.
fn outcomes(
    cpus: &Cpus,
    rounds: u32,
    roles: usize,
    act: impl Fn(usize, &Locations) -> Loads + Sync,
    seen: impl Fn(&[Loads]) -> bool + Sync,
) -> u32 {
    let instances: Vec<Locations> = (0..BATCH).map(|_| Locations::default()).collect();
    let results: Vec<Vec<[AtomicU32; 2]>> = (0..roles)
        .map(|_| (0..BATCH).map(|_| Default::default()).collect())
        .collect();
    let meeting = Meeting::new(roles);
    let batches = rounds.div_ceil(BATCH);
    let counts = cpus.run(roles, |role| {
        let mut count = 0;
        for batch in 0..batches {
            meeting.meet();
            for (locations, result) in instances.iter().zip(&results[role]) {
                // A little unrest, so that the roles meet at all offsets.
                for _ in 0..(batch as usize * 7 + 13 * role) % 11 {
                    std::hint::spin_loop();
                }
                let loads = act(role, locations);
                result[0].store(loads[0], Ordering::Relaxed);
                result[1].store(loads[1], Ordering::Relaxed);
            }
            meeting.meet();
            if role == 0 {
                for (instance, locations) in instances.iter().enumerate() {
                    let loads: Vec<Loads> = results
                        .iter()
                        .map(|result| {
                            result[instance]
                                .each_ref()
                                .map(|load| load.load(Ordering::Relaxed))
                        })
                        .collect();
                    count += u32::from(seen(&loads));
                    for word in locations {
                        word.0.store(0, Ordering::Relaxed);
                    }
                }
            }
        }
        count
    });
    counts[0]
}

fn never(count: u32) -> Outcome {
    match count {
        0 => Ok(String::new()),
        _ => Err(format!("a forbidden outcome, {count} times")),
    }
}

fn store_then_load(role: usize, locations: &Locations) -> Loads {
    locations[role].set();
    [locations[1 - role].get(), 0]
}

fn both_loaded_nothing(loads: &[Loads]) -> bool {
    loads.iter().all(|loads| loads[0] == 0)
}

/// Each stores to its own place and loads the other's: both may miss.
pub(crate) fn store_buffering(cpus: &Cpus, rounds: u32) -> Outcome {
    let count = outcomes(cpus, rounds, 2, store_then_load, both_loaded_nothing);
    Ok(format!(
        "both loads before the stores {count} times, as allowed"
    ))
}

/// The same with fences: one must see the other.
pub(crate) fn store_buffering_fenced(cpus: &Cpus, rounds: u32) -> Outcome {
    let act = |role: usize, locations: &Locations| {
        locations[role].set();
        fence(Ordering::SeqCst);
        [locations[1 - role].get(), 0]
    };
    never(outcomes(cpus, rounds, 2, act, both_loaded_nothing))
}

/// Who sees the second store sees the first.
pub(crate) fn message_passing(cpus: &Cpus, rounds: u32) -> Outcome {
    let act = |role: usize, locations: &Locations| {
        if role == 0 {
            locations[0].set();
            locations[1].set();
            return [0, 0];
        }
        [locations[1].get(), locations[0].get()]
    };
    never(outcomes(cpus, rounds, 2, act, |loads| loads[1] == [1, 0]))
}

/// Stores don't overtake older loads.
pub(crate) fn load_buffering(cpus: &Cpus, rounds: u32) -> Outcome {
    let act = |role: usize, locations: &Locations| {
        let load = locations[role].get();
        locations[1 - role].set();
        [load, 0]
    };
    never(outcomes(cpus, rounds, 2, act, |loads| {
        loads.iter().all(|loads| loads[0] == 1)
    }))
}

fn write_or_read(role: usize, locations: &Locations, between: impl Fn()) -> Loads {
    match role {
        0 | 1 => {
            locations[role].set();
            [0, 0]
        }
        _ => {
            let first = locations[role - 2].get();
            between();
            [first, locations[3 - role].get()]
        }
    }
}

fn disagree(loads: &[Loads]) -> bool {
    loads[2] == [1, 0] && loads[3] == [1, 0]
}

/// Two readers agree on the order of two writers.
pub(crate) fn iriw(cpus: &Cpus, rounds: u32) -> Outcome {
    let act = |role: usize, locations: &Locations| write_or_read(role, locations, || ());
    never(outcomes(cpus, rounds, 4, act, disagree))
}

/// And with fences between the reads.
pub(crate) fn iriw_fenced(cpus: &Cpus, rounds: u32) -> Outcome {
    let between = || fence(Ordering::SeqCst);
    let act = |role: usize, locations: &Locations| write_or_read(role, locations, between);
    never(outcomes(cpus, rounds, 4, act, disagree))
}
