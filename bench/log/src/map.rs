//! The structure that is measured, and the ways to share it.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, RwLock};

use dashmap::DashMap;
use node_replication::{Dispatch, Log as NrLog, Replica as NrReplica, ReplicaToken};
use vmm_shared::log::{At, BadSnapshot, Config, Geometry, Replica, StateMachine, Thread};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::region::{HostClock, new_log};

/// One multiplication, the same for all: the maps' own cost should not hide
/// that of sharing them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }
    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0 ^ word)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(32);
    }
}

pub(crate) type Hash = BuildHasherDefault<Mix>;

/// The sequential map.
#[derive(Clone, Debug, Default)]
pub(crate) struct Map(pub(crate) HashMap<u64, u64, Hash>);

impl Map {
    pub(crate) fn filled(keys: u64) -> Self {
        Self((0..keys).map(|key| (key, key)).collect())
    }
}

/// "Put `value` under `key`."
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Put {
    pub(crate) key: u64,
    pub(crate) value: u64,
}

impl StateMachine for Map {
    type Op = Put;
    type Answer = Option<u64>;

    fn apply(&mut self, put: &Put, _: &[u8], _: At) -> Option<u64> {
        self.0.insert(put.key, put.value)
    }
    // Joins from the log's start find the map filled: it is part of the
    // initial state.
    fn reset(&mut self) {}
    fn save(&self, _: u64, _: usize, _: &mut Vec<u8>) -> Option<u64> {
        None
    }
    fn load(&mut self, _: u64, _: &[u8]) -> Result<(), BadSnapshot> {
        Err(BadSnapshot)
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Modify {
    Put(u64, u64),
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Access {
    Get(u64),
}

impl Dispatch for Map {
    type ReadOperation = Access;
    type WriteOperation = Modify;
    type Response = Option<u64>;

    fn dispatch(&self, Access::Get(key): Access) -> Option<u64> {
        self.0.get(&key).copied()
    }
    fn dispatch_mut(&mut self, Modify::Put(key, value): Modify) -> Option<u64> {
        self.0.insert(key, value)
    }
}

impl Default for Modify {
    fn default() -> Self {
        Self::Put(0, 0)
    }
}

/// A way to share the map among threads.
pub(crate) trait Shared: Sync {
    type Seat<'a>: Seat
    where
        Self: 'a;
    /// The access of thread `index`.
    fn seat(&self, index: usize) -> Self::Seat<'_>;
}

/// One thread's access.
pub(crate) trait Seat {
    fn put(&mut self, key: u64, value: u64);
    fn get(&mut self, key: u64) -> Option<u64>;
    /// Called while others still work.
    fn keep_up(&mut self) {}
}

/// Our log.
pub(crate) struct Viaduct(Vec<Replica<Map, HostClock>>);

pub(crate) const GEOMETRY: Geometry = Geometry {
    order_slots: 1 << 16,
    members: 4,
    lane_lines: 1 << 16,
    entry_bytes: 32,
    stage_lines: 1 << 12,
};

impl Viaduct {
    pub(crate) fn new(replicas: usize, keys: u64) -> Self {
        let log = new_log(GEOMETRY);
        let config = Config {
            // No other thread ticks here.
            lease_ns: 1 << 60,
            wait_ns: 1 << 40,
            patience_ns: 1 << 40,
            ..Config::default()
        };
        let join = |_| {
            Replica::join(log.clone(), Map::filled(keys), HostClock::new(), config)
                .unwrap_or_else(|error| panic!("join: {error:?}"))
        };
        Self((0..replicas).map(join).collect())
    }
}

impl Shared for Viaduct {
    type Seat<'a> = (&'a Replica<Map, HostClock>, Thread<'a, Map, HostClock>);
    fn seat(&self, index: usize) -> Self::Seat<'_> {
        let replica = &self.0[index % self.0.len()];
        (replica, replica.thread().expect("a seat"))
    }
}

impl Seat for (&Replica<Map, HostClock>, Thread<'_, Map, HostClock>) {
    fn put(&mut self, key: u64, value: u64) {
        self.1.update(Put { key, value }).expect("applied");
    }
    fn get(&mut self, key: u64) -> Option<u64> {
        self.1.read(|map| map.0.get(&key).copied()).expect("read")
    }
    fn keep_up(&mut self) {
        self.0.tick().expect("alive");
    }
}

/// The node-replication crate, with its default log of 32 MiB.
pub(crate) struct NodeReplication {
    replicas: Vec<Arc<NrReplica<'static, Map>>>,
    /// One per thread: they can't be given back.
    tokens: Vec<ReplicaToken>,
}

impl NodeReplication {
    pub(crate) fn new(replicas: usize, threads: usize, keys: u64) -> Self {
        let log = Arc::new(NrLog::<Modify>::default());
        let replicas: Vec<_> = (0..replicas).map(|_| NrReplica::new(&log)).collect();
        let tokens: Vec<ReplicaToken> = (0..threads)
            .map(|thread| {
                replicas[thread % replicas.len()]
                    .register()
                    .expect("a token")
            })
            .collect();
        // Its replicas start from Default: filled by operations.
        for key in 0..keys {
            replicas[0].execute_mut(Modify::Put(key, key), tokens[0]);
            if key % 1024 == 0 {
                for (replica, token) in replicas.iter().zip(&tokens) {
                    replica.sync(*token);
                }
            }
        }
        Self { replicas, tokens }
    }
}

impl Shared for NodeReplication {
    type Seat<'a> = (&'a NrReplica<'static, Map>, ReplicaToken);
    fn seat(&self, index: usize) -> Self::Seat<'_> {
        let replica = &*self.replicas[index % self.replicas.len()];
        (replica, self.tokens[index])
    }
}

impl Seat for (&NrReplica<'static, Map>, ReplicaToken) {
    fn put(&mut self, key: u64, value: u64) {
        self.0.execute_mut(Modify::Put(key, value), self.1);
    }
    fn get(&mut self, key: u64) -> Option<u64> {
        self.0.execute(Access::Get(key), self.1)
    }
    fn keep_up(&mut self) {
        self.0.sync(self.1);
    }
}

/// The map behind std's reader-writer lock.
pub(crate) struct Locked(RwLock<Map>);

impl Locked {
    pub(crate) fn new(keys: u64) -> Self {
        Self(RwLock::new(Map::filled(keys)))
    }
}

impl Shared for Locked {
    type Seat<'a> = &'a RwLock<Map>;
    fn seat(&self, _: usize) -> Self::Seat<'_> {
        &self.0
    }
}

impl Seat for &RwLock<Map> {
    fn put(&mut self, key: u64, value: u64) {
        self.write().expect("no panic").0.insert(key, value);
    }
    fn get(&mut self, key: u64) -> Option<u64> {
        self.read().expect("no panic").0.get(&key).copied()
    }
}

/// dashmap.
pub(crate) struct Dash(DashMap<u64, u64, Hash>);

impl Dash {
    pub(crate) fn new(keys: u64) -> Self {
        Self((0..keys).map(|key| (key, key)).collect())
    }
}

impl Shared for Dash {
    type Seat<'a> = &'a DashMap<u64, u64, Hash>;
    fn seat(&self, _: usize) -> Self::Seat<'_> {
        &self.0
    }
}

impl Seat for &DashMap<u64, u64, Hash> {
    fn put(&mut self, key: u64, value: u64) {
        self.insert(key, value);
    }
    fn get(&mut self, key: u64) -> Option<u64> {
        DashMap::get(self, &key).map(|value| *value)
    }
}
