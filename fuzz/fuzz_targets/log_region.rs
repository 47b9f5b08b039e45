//! A replicated log whose region somebody writes at any place with anything:
//! no replica panics or leaves the region, and every call ends.
#![no_main]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use vmm_shared::log::{
    At, BadSnapshot, Clock, Config, Geometry, Log, MemberChange, MemberId, Replica, StateMachine,
};
use vmm_shared::shm::SharedMem;

/// So small that it wraps all the time.
const GEOMETRY: Geometry = Geometry {
    order_slots: 8,
    members: 4,
    lane_lines: 32,
    entry_bytes: 32,
    stage_lines: 4,
};

#[derive(Arbitrary, Debug)]
enum Step {
    /// Over any word, the header's too; the first half is the coherent part.
    Write {
        word: u16,
        value: Value,
    },
    Update {
        replica: u8,
        key: u8,
        payload: u8,
    },
    Read {
        replica: u8,
    },
    Tick {
        replica: u8,
    },
    Evict {
        replica: u8,
        member: u8,
        epoch: u8,
    },
    Join,
    Leave,
    Attach,
}

#[derive(Arbitrary, Debug)]
enum Value {
    Set(u64),
    Small(u8),
    Add(u8),
    Flip(u8),
}

/// Time passes with every look, so that every wait is short.
#[derive(Default)]
struct FastClock(AtomicU64);

impl Clock for FastClock {
    fn now_ns(&self) -> u64 {
        self.0.fetch_add(10_000, Ordering::Relaxed)
    }
    fn pause(&self, _: u32) {
        self.0.fetch_add(50_000, Ordering::Relaxed);
    }
}

/// Sums by key.
#[derive(Default)]
struct Sums([u64; 8]);

impl StateMachine for Sums {
    type Op = u64;
    type Answer = u64;

    fn apply(&mut self, key: &u64, payload: &[u8], at: At) -> u64 {
        let sum = &mut self.0[usize::try_from(key % 8).expect("below 8")];
        let more: u64 = payload.iter().map(|byte| u64::from(*byte)).sum();
        *sum = sum.wrapping_add(more).wrapping_add(at.position);
        *sum
    }
    fn member_changed(&mut self, change: &MemberChange) {
        self.0[0] = self.0[0].wrapping_add(u64::from(change.epoch));
    }
    fn reset(&mut self) {
        *self = Self::default();
    }
    fn save(&self, from: u64, _: usize, out: &mut Vec<u8>) -> Option<u64> {
        let index = usize::try_from(from).ok().filter(|index| *index < 8)?;
        out.extend_from_slice(&self.0[index].to_le_bytes());
        (index < 7).then_some(from + 1)
    }
    fn load(&mut self, from: u64, part: &[u8]) -> Result<(), BadSnapshot> {
        let index = usize::try_from(from).map_err(|_| BadSnapshot)?;
        let bytes = part.try_into().map_err(|_| BadSnapshot)?;
        *self.0.get_mut(index).ok_or(BadSnapshot)? = u64::from_le_bytes(bytes);
        Ok(())
    }
    fn apply_below(&mut self, bound: u64, key: &u64, payload: &[u8], at: At) {
        if key % 8 < bound {
            self.apply(key, payload, at);
        }
    }
}

fn damage(memory: &SharedMem, word: u16, value: &Value) {
    let coherent = GEOMETRY.coherent_bytes() / 8;
    let word = usize::from(word);
    // The coherent part is small, and where most harm can be done.
    let index = if word % 2 == 0 {
        word / 2 % coherent
    } else {
        word / 2 % (memory.len() / 8)
    };
    let old: u64 = memory.read(index * 8).expect("inside");
    let new = match *value {
        Value::Set(word) => word,
        Value::Small(word) => u64::from(word),
        Value::Add(more) => old.wrapping_add(u64::from(more)),
        Value::Flip(bit) => old ^ (1 << (bit % 64)),
    };
    memory.write(index * 8, &new).expect("inside");
}

fuzz_target!(|steps: Vec<Step>| {
    let mut words = vec![0_u64; GEOMETRY.total_bytes() / 8];
    let base = NonNull::new(words.as_mut_ptr()).expect("not null").cast();
    // SAFETY: 1. `words` lives longer than all that uses the window; 2. words
    // are aligned; 3. nothing touches `words` meanwhile.
    let memory = unsafe { SharedMem::new(base, words.len() * 8) };
    let log = Log::create(memory, GEOMETRY).expect("large enough");
    let clock = FastClock::default();
    let config = Config {
        lease_ns: 2_000_000,
        patience_ns: 500_000,
        wait_ns: 3_000_000,
        copies: 1,
        part_bytes: 8,
        ..Config::default()
    };
    let join = || Replica::join(log.clone(), Sums::default(), &clock, config);
    let mut replicas: Vec<_> = (0..2).filter_map(|_| join().ok()).collect();
    for step in steps.iter().take(64) {
        let chosen = |index: u8| replicas.get(usize::from(index) % replicas.len().max(1));
        match step {
            Step::Write { word, value } => damage(&memory, *word, value),
            Step::Update {
                replica,
                key,
                payload,
            } => {
                if let Some(mut seat) = chosen(*replica).and_then(Replica::thread) {
                    let payload = vec![1; usize::from(*payload)];
                    let _ = seat.update_with(u64::from(*key), &payload);
                }
            }
            Step::Read { replica } => {
                if let Some(mut seat) = chosen(*replica).and_then(Replica::thread) {
                    let _ = seat.read(|sums| sums.0[0]);
                }
            }
            Step::Tick { replica } => {
                let _ = chosen(*replica).map(Replica::tick);
            }
            Step::Evict {
                replica,
                member,
                epoch,
            } => {
                let member = MemberId::new(usize::from(*member % 8)).expect("small");
                let _ = chosen(*replica).map(|it| it.evict(member, u32::from(*epoch)));
            }
            Step::Join => replicas.extend(join()),
            Step::Leave => {
                if !replicas.is_empty() {
                    let _ = replicas.remove(0).leave();
                }
            }
            Step::Attach => {
                let _ = Log::attach(memory);
            }
        }
    }
});
