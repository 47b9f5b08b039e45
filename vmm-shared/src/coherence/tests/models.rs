//! Every interleaving, and every value that a weakly ordered load may see, of
//! the races that matter, explored by loom.
//!
//! Guest memory is one word, accessed Relaxed. A node that executes remembers
//! what it translated when it got the right, and looks again before it gives
//! the right up: if a writer of another node was not kept off, or its stores
//! were not ordered before the grant, some interleaving shows another value.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use loom::sync::Mutex;
use loom::sync::atomic::AtomicU64;
use loom::thread;

use super::modelled::Modelled;
use crate::addr::NodeId;
use crate::coherence::*;

type Map = CoherenceMap<Modelled>;

/// What the cores of one node share.
struct Node {
    map: Map,
    me: Member,
    memory: Arc<AtomicU64>,
    /// Rights, and what is translated under them.
    tables: Mutex<(Rights, Option<u64>)>,
}

impl Node {
    fn rack(nodes: u16, slots: usize) -> Vec<Arc<Self>> {
        let geometry = Geometry {
            frames: 1,
            nodes: usize::from(nodes),
            slots,
        };
        let size = geometry.table_size().expect("a legal geometry");
        let words = Modelled(Arc::new((0..size / 8).map(|_| AtomicU64::new(0)).collect()));
        let map = Map::new(words, geometry).expect("large enough");
        let memory = Arc::new(AtomicU64::new(0));
        (0..nodes)
            .map(|node| {
                Arc::new(Self {
                    map: map.clone(),
                    me: map.join(NodeId(node), 1).expect("a fresh map"),
                    memory: memory.clone(),
                    tables: Mutex::new((Rights::NONE, None)),
                })
            })
            .collect()
    }

    fn bytes(&self) -> u64 {
        self.memory.load(Ordering::Relaxed)
    }

    /// The emulator checks itself: what it has translated is what is there.
    fn look(&self, tables: (Rights, Option<u64>)) {
        if let (true, Some(translated)) = (tables.0.contains(Rights::EXECUTE), tables.1) {
            assert_eq!(translated, self.bytes(), "stale code");
        }
    }

    fn serve(&self) {
        while let Some(revocation) = self.map.next_revocation(self.me).expect("sound") {
            self.serve_one(&revocation);
        }
    }

    fn serve_one(&self, revocation: &Revocation) {
        let mut tables = self.tables.lock().expect("no panic");
        self.look(*tables);
        tables.0 = tables.0 & revocation.keep;
        drop(tables);
        self.map.acknowledge(self.me, revocation);
    }

    /// Resolves a fault and uses the right once.
    fn accomplish(&self, access: Access, value: u64) {
        let mut fault = self.map.fault(self.me, 0, access).expect("a member");
        loop {
            if let Step::Granted(grant) = fault.poll().expect("sound") {
                let mut tables = self.tables.lock().expect("no panic");
                // The guest's other cores run on the old rights until now.
                self.look(*tables);
                if grant.must_refresh {
                    tables.1 = None;
                }
                tables.0 = grant.rights;
                drop(tables);
                fault.complete().expect("granted");
                break;
            }
            self.serve();
            thread::yield_now();
        }
        let mut tables = self.tables.lock().expect("no panic");
        // Another core may have given the right up already.
        if !tables.0.contains(access.needs()) {
            return;
        }
        match access {
            Access::Read => {}
            Access::Write => {
                self.memory.store(value, Ordering::Relaxed);
                tables.1 = None;
            }
            Access::Execute => {
                let bytes = tables.1.unwrap_or_else(|| self.bytes());
                tables.1 = Some(bytes);
                self.look(*tables);
            }
        }
    }

    /// Serves until `count` cores have said that they are done.
    fn serve_until(&self, done: &AtomicU64, count: u64) {
        while done.load(Ordering::Relaxed) < count {
            self.serve();
            thread::yield_now();
        }
        let tables = self.tables.lock().expect("no panic");
        self.look(*tables);
    }
}

/// `PREEMPTIONS` unforced switches at most: what loom's authors found to show
/// practically all errors, and what ends in seconds.
fn explore(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 20_000;
    builder.check(model);
}

/// Two nodes, both of which access the unit at once after `before`.
fn pair(before: &'static [(usize, Access)], accesses: [Access; 2]) {
    explore(2, move || {
        let nodes = Node::rack(2, 1);
        for (node, access) in before {
            // Alone in the model: the other node's part is done for it.
            let fault = nodes[*node].map.fault(nodes[*node].me, 0, *access);
            resolve_alone(&nodes, *node, fault.expect("a member"));
        }
        let done = Arc::new(AtomicU64::new(0));
        let run = move |node: Arc<Node>, access, value, done: Arc<AtomicU64>| {
            node.accomplish(access, value);
            done.fetch_add(1, Ordering::Relaxed);
            node.serve_until(&done, 2);
        };
        let second = nodes[1].clone();
        let told = done.clone();
        let other = thread::spawn(move || run(second, accesses[1], 2, told));
        run(nodes[0].clone(), accesses[0], 1, done);
        other.join().expect("no panic");
    });
}

fn resolve_alone(nodes: &[Arc<Node>], node: usize, mut fault: Fault<Modelled>) {
    loop {
        match fault.poll().expect("sound") {
            Step::Granted(grant) => {
                let mut tables = nodes[node].tables.lock().expect("no panic");
                tables.0 = grant.rights;
                tables.1 = grant
                    .rights
                    .contains(Rights::EXECUTE)
                    .then(|| nodes[node].bytes());
                drop(tables);
                return fault.complete().expect("granted");
            }
            _ => nodes.iter().for_each(|node| node.serve()),
        }
    }
}

#[test]
fn two_nodes_touch_first_at_once() {
    pair(&[], [Access::Write, Access::Execute]);
}

#[test]
fn a_writer_and_an_executor_want_shared_code_at_once() {
    pair(
        &[(0, Access::Read), (1, Access::Execute)],
        [Access::Write, Access::Execute],
    );
}

#[test]
fn both_nodes_write_what_both_execute() {
    pair(
        &[(0, Access::Execute), (1, Access::Execute)],
        [Access::Write, Access::Write],
    );
}

/// A core of node 0 takes a revocation up and serves it at any later time,
/// while the story goes on without it: another core serves, node 1 writes,
/// node 0 gets the code back, and node 1 asks again in the same slot.
#[test]
fn a_late_answer_counts_for_no_later_request() {
    explore(2, || {
        let nodes = Node::rack(2, 1);
        let fault = |node: usize, access| {
            let member = nodes[node].me;
            nodes[node].map.fault(member, 0, access).expect("a member")
        };
        resolve_alone(&nodes, 0, fault(0, Access::Execute));
        resolve_alone(&nodes, 1, fault(1, Access::Read));
        let mut first = fault(1, Access::Write);
        assert!(matches!(first.poll(), Ok(Step::Granted(_))));
        first.complete().expect("granted");
        resolve_alone(&nodes, 0, fault(0, Access::Execute));
        let mut first = fault(1, Access::Write);
        assert!(matches!(first.poll(), Ok(Step::Revoking(_))));
        let late = {
            let node = nodes[0].clone();
            thread::spawn(move || {
                if let Some(revocation) = node.map.next_revocation(node.me).expect("sound") {
                    node.serve_one(&revocation);
                }
            })
        };
        resolve_alone(&nodes, 1, first);
        resolve_alone(&nodes, 0, fault(0, Access::Execute));
        let mut second = fault(1, Access::Write);
        if let Step::Granted(_) = second.poll().expect("sound") {
            // The late core can have served this one, too: then it is gone.
            let rights = nodes[0].tables.lock().expect("no panic").0;
            assert!(!rights.contains(Rights::EXECUTE), "a late answer counted");
        }
        late.join().expect("no panic");
        second.abandon().expect("sound");
    });
}

/// The holder of the lock has died; one node fences it while both want in.
#[test]
fn two_nodes_take_a_dead_nodes_lock_over() {
    explore(2, || {
        let nodes = Node::rack(3, 1);
        let fault = nodes[2].map.fault(nodes[2].me, 0, Access::Write);
        let mut fault = fault.expect("a member");
        assert!(matches!(fault.poll(), Ok(Step::Granted(_))));
        drop(fault);
        let done = Arc::new(AtomicU64::new(0));
        let other = {
            let (node, done) = (nodes[1].clone(), done.clone());
            thread::spawn(move || {
                node.accomplish(Access::Write, 1);
                done.fetch_add(1, Ordering::Relaxed);
                node.serve_until(&done, 2);
            })
        };
        nodes[0].map.fence(nodes[2].me).expect("a node");
        nodes[0].accomplish(Access::Execute, 0);
        done.fetch_add(1, Ordering::Relaxed);
        nodes[0].serve_until(&done, 2);
        other.join().expect("no panic");
    });
}
