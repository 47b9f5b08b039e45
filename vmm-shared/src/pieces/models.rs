//! Moves against everything that can come in between: every interleaving and
//! every value that a weakly ordered load may see, explored by loom; and the
//! mover's death at each of its accesses.
//!
//! The bytes of a host piece are one word, accessed Relaxed.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use loom::sync::Mutex;
use loom::sync::atomic::{AtomicBool, AtomicU64};
use loom::thread;

use super::*;
use crate::coherence::tests::modelled::Modelled;
use crate::coherence::tests::world::Mortal;

const GIVER: NodeId = NodeId(0);
const TAKER: NodeId = NodeId(1);
const GEOMETRY: MapGeometry = MapGeometry {
    pieces: 2,
    nodes: 2,
    host_pieces: 1,
};
/// What the piece holds before anybody writes it.
const BEFORE: u64 = 7;

/// Two nodes with a host piece each; guest piece 0 is at the giver's.
struct Rack {
    map: PieceMap<Modelled>,
    /// By the node that has it.
    bytes: [AtomicU64; 2],
    /// Where the giver's nested tables map the piece.
    tables: Mutex<Option<HostPiece>>,
    /// The taker takes part.
    is_in: AtomicBool,
}

impl Rack {
    fn new() -> Arc<Self> {
        let size = GEOMETRY.size().expect("legal") / 8;
        let words = Modelled(Arc::new((0..size).map(|_| AtomicU64::new(0)).collect()));
        let map = PieceMap::new(words, GEOMETRY).expect("large enough");
        assert!(map.add(0, host(GIVER, 0)));
        Arc::new(Self {
            map,
            bytes: [AtomicU64::new(BEFORE), AtomicU64::new(0)],
            tables: Mutex::new(None),
            is_in: AtomicBool::new(true),
        })
    }

    fn bytes(&self, host: HostPiece) -> &AtomicU64 {
        &self.bytes[usize::from(host.node.0)]
    }

    /// The giver's core that serves a recall.
    fn give_up(&self) {
        *self.tables.lock().expect("no panic") = None;
    }

    fn copy(&self, from: HostPiece, to: HostPiece) {
        let value = self.bytes(from).load(Ordering::Relaxed);
        self.bytes(to).store(value, Ordering::Relaxed);
    }

    /// The taker's move; whether the piece is there.
    fn take_over(&self) -> bool {
        let to = self.map.take_host(TAKER, 0).expect("free");
        let claim = self
            .map
            .claim(0, TAKER)
            .expect("sound")
            .expect("not claimed");
        if !self.is_in.load(Ordering::Acquire) {
            self.map.release(&claim);
            return false;
        }
        self.give_up();
        self.copy(claim.from(), to);
        self.map.publish(&claim, to)
    }

    /// The hypervisor's read.
    fn read(&self) -> u64 {
        loop {
            let seen = self.map.look(0).expect("sound");
            let value = self.bytes(seen.host().expect("somewhere"));
            let value = value.load(Ordering::Relaxed);
            if self.map.is_still(0, seen) {
                return value;
            }
            thread::yield_now();
        }
    }

    /// The giver's guest, or its hypervisor for a device, writes by its
    /// tables, which a fault fills first.
    fn write(&self, value: u64) {
        loop {
            let mut tables = self.tables.lock().expect("no panic");
            let seen = self.map.look(0).expect("sound");
            if let Whereabouts::At(host) = seen.whereabouts() {
                tables.get_or_insert(host);
            }
            if let Some(host) = *tables {
                self.bytes(host).store(value, Ordering::Relaxed);
                return;
            }
            drop(tables);
            thread::yield_now();
        }
    }
}

fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.max_branches = 20_000;
    builder.check(model);
}

#[test]
fn a_read_sees_no_byte_of_who_has_the_place_next() {
    explore(|| {
        let rack = Rack::new();
        let mover = rack.clone();
        let mover = thread::spawn(move || {
            assert!(mover.take_over());
            let next = mover.map.take_host(GIVER, 1).expect("given back");
            mover.bytes(next).store(99, Ordering::Relaxed);
            assert!(mover.map.add(1, next));
        });
        assert_eq!(rack.read(), BEFORE);
        mover.join().expect("no panic");
        assert_eq!(rack.read(), BEFORE);
    });
}

#[test]
fn a_write_is_where_the_piece_is_then() {
    explore(|| {
        let rack = Rack::new();
        let mover = rack.clone();
        let mover = thread::spawn(move || assert!(mover.take_over()));
        rack.write(8);
        mover.join().expect("no panic");
        assert_eq!(rack.read(), 8);
    });
}

/// Somebody puts the mover out while it moves, and then decides whether the VM
/// can go on without it.
#[test]
fn who_is_put_out_and_not_needed_gets_no_piece_later() {
    explore(|| {
        let rack = Rack::new();
        let mover = rack.clone();
        let mover = thread::spawn(move || mover.take_over());
        rack.is_in.store(false, Ordering::Release);
        rack.map.forget(TAKER);
        let is_needed = rack.map.pieces_on(TAKER).next().is_some();
        let published = mover.join().expect("no panic");
        assert_eq!(published, is_needed);
        let at = rack.map.look(0).expect("sound").whereabouts();
        let expected = if is_needed { TAKER } else { GIVER };
        assert_eq!(at, Whereabouts::At(host(expected, 0)));
        assert_eq!(rack.read(), BEFORE);
    });
}

/// A claim that was forgotten and taken by another is not the first's any
/// more.
#[test]
fn two_claims_of_a_piece_never_both_hold() {
    explore(|| {
        let rack = Rack::new();
        let other = rack.clone();
        let claims = |rack: &Rack, by| rack.map.claim(0, by).expect("sound");
        let other = thread::spawn(move || claims(&other, TAKER));
        let mine = claims(&rack, GIVER);
        let theirs = other.join().expect("no panic");
        assert!(mine.is_some() != theirs.is_some());
        rack.map.forget(TAKER);
        if let Some(claim) = theirs {
            assert!(!rack.map.remove(&claim), "forgotten");
        }
        if let Some(claim) = mine {
            assert!(rack.map.remove(&claim));
        }
    });
}

/// Wherever the mover dies, the piece has its bytes, somebody can move it on,
/// and only a mover that has published is needed.
#[test]
fn a_mover_may_die_at_any_access() {
    let mut outcomes = [0, 0];
    for fuel in 0.. {
        let words = Mortal::new(GEOMETRY.size().expect("legal"));
        let map = PieceMap::new(words.clone(), GEOMETRY).expect("large enough");
        assert!(map.add(0, host(GIVER, 0)));
        let bytes = std::cell::Cell::new([BEFORE, 0]);
        let mut left = fuel;
        let finished = words.with_fuel(&mut left, || {
            let to = map.take_host(TAKER, 0).expect("free");
            let claim = map.claim(0, TAKER).expect("sound").expect("not claimed");
            let [from, _] = bytes.get();
            bytes.set([from, from]);
            assert!(map.publish(&claim, to));
        });
        map.forget(TAKER);
        let is_needed = map.pieces_on(TAKER).next().is_some();
        let Whereabouts::At(at) = map.look(0).expect("sound").whereabouts() else {
            panic!("claimed by the dead");
        };
        assert_eq!(is_needed, at.node == TAKER);
        assert_eq!(bytes.get()[usize::from(at.node.0)], BEFORE);
        let claim = map.claim(0, GIVER).expect("sound").expect("free");
        map.release(&claim);
        outcomes[usize::from(is_needed)] += 1;
        if finished.is_some() {
            break;
        }
    }
    assert!(outcomes[0] > 2 && outcomes[1] > 1, "{outcomes:?}");
}
