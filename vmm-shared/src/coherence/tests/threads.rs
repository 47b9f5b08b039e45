//! Real threads as cores, over the memory that nodes use.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, RwLock};
use std::thread;

use super::world::Dice;
use crate::addr::NodeId;
use crate::coherence::*;
use crate::shm::testing::leaked;

const NODES: usize = 3;
const CORES: usize = 2;
const ACCESSES: usize = 20_000;
/// One piece of these is split early, the other late.
const WATCHED: [usize; 3] = [0, 1, 512];

#[derive(Default)]
struct Node {
    /// Readers are cores in their guest: who has the write lock has flushed.
    tables: RwLock<[Rights; WATCHED.len()]>,
    /// The emulator's translations; 0 for none.
    translated: [Mutex<u64>; WATCHED.len()],
}

struct Site {
    map: CoherenceMap,
    memory: [AtomicU64; WATCHED.len()],
    clock: AtomicU64,
    nodes: [Node; NODES],
    cores_at_work: AtomicUsize,
    failed: AtomicBool,
}

/// A core that works; also when it panics, which the others must not outlive.
struct AtWork<'a>(&'a Site);

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.failed.store(true, Ordering::Relaxed);
        }
        self.0.cores_at_work.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Site {
    fn serve(&self, me: Member) {
        assert!(!self.failed.load(Ordering::Relaxed), "another core failed");
        let own = &self.nodes[usize::from(me.node.0)];
        while let Some(revocation) = self.map.next_revocation(me).expect("a sound table") {
            let mut tables = own.tables.write().expect("no core panicked");
            for (at, frame) in WATCHED.into_iter().enumerate() {
                if revocation.unit.contains(frame) {
                    tables[at] = tables[at] & revocation.keep;
                }
            }
            drop(tables);
            self.map.acknowledge(me, &revocation);
        }
    }

    /// True if the guest has the right and used it.
    fn access(&self, me: Member, at: usize, access: Access) -> bool {
        let own = &self.nodes[usize::from(me.node.0)];
        let tables = own.tables.read().expect("no core panicked");
        if !tables[at].contains(access.needs()) {
            return false;
        }
        // One emulator: its stores and translations don't overtake each other.
        let mut translated = own.translated[at].lock().expect("no core panicked");
        match access {
            Access::Read => {}
            Access::Write => {
                let version = self.clock.fetch_add(1, Ordering::Relaxed) + 1;
                // Relaxed: the protocol alone has to order guests' accesses.
                self.memory[at].store(version, Ordering::Relaxed);
                *translated = 0;
            }
            Access::Execute => {
                if *translated == 0 {
                    *translated = self.memory[at].load(Ordering::Relaxed);
                }
                for _ in 0..3 {
                    let bytes = self.memory[at].load(Ordering::Relaxed);
                    assert_eq!(*translated, bytes, "{me:?} executes stale code");
                    thread::yield_now();
                }
            }
        }
        true
    }

    fn resolve(&self, me: Member, at: usize, access: Access) {
        let own = &self.nodes[usize::from(me.node.0)];
        let mut fault = self.map.fault(me, WATCHED[at], access).expect("a member");
        loop {
            if let Step::Granted(grant) = fault.poll().expect("a sound table") {
                let mut tables = own.tables.write().expect("no core panicked");
                for (at, frame) in WATCHED.into_iter().enumerate() {
                    if !grant.unit.contains(frame) {
                        continue;
                    }
                    if grant.must_refresh {
                        *own.translated[at].lock().expect("no core panicked") = 0;
                    }
                    tables[at] = grant.rights;
                }
                drop(tables);
                return fault.complete().expect("granted");
            }
            self.serve(me);
            thread::yield_now();
        }
    }

    fn core(&self, me: Member, seed: u64) {
        let at_work = AtWork(self);
        let mut dice = Dice(seed);
        for _ in 0..ACCESSES {
            let at = dice.index(WATCHED.len());
            let access = dice.access();
            while !self.access(me, at, access) {
                self.resolve(me, at, access);
            }
            self.serve(me);
        }
        drop(at_work);
        while self.cores_at_work.load(Ordering::Relaxed) > 0 {
            self.serve(me);
            thread::yield_now();
        }
    }
}

#[test]
fn cores_of_three_nodes_never_execute_stale_code() {
    let geometry = Geometry {
        frames: 2 * FRAMES_PER_PIECE,
        nodes: NODES,
        slots: CORES,
    };
    let size = geometry.table_size().expect("a legal geometry");
    let site = Site {
        map: CoherenceMap::new(leaked(size / 64), geometry).expect("large enough"),
        memory: [const { AtomicU64::new(1) }; WATCHED.len()],
        clock: AtomicU64::new(1),
        nodes: Default::default(),
        cores_at_work: AtomicUsize::new(NODES * CORES),
        failed: AtomicBool::new(false),
    };
    thread::scope(|scope| {
        for node in 0..NODES {
            let id = NodeId(u16::try_from(node).expect("few"));
            let me = site.map.join(id, 1).expect("a fresh map");
            for core in 0..CORES {
                let seed = 0x9e37_79b9_7f4a_7c15 ^ (node * CORES + core) as u64;
                let site = &site;
                scope.spawn(move || site.core(me, seed));
            }
        }
    });
    let splits = WATCHED.map(|frame| site.map.view(frame).expect("in range").unit);
    assert_eq!(splits, WATCHED.map(Unit::Frame), "all of it was contended");
}
