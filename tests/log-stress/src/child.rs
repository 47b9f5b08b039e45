//! A process that joins, works, and is killed.

use std::fs::OpenOptions;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vmm_shared::log::{Log, Replica, ReplicaError};

use crate::ledger::{Ledger, Step};
use crate::shared::{Board, HostClock, Stage, client, config, log_part, map};

/// The exit status of a process that was evicted although it lived.
pub(crate) const EVICTED: u8 = 3;

type ChildReplica = Replica<Ledger, HostClock>;

pub(crate) fn run(path: &Path, slot: usize, generation: u32, threads: usize) -> ExitCode {
    let parent = std::os::unix::process::parent_id();
    let file = OpenOptions::new().read(true).write(true).open(path);
    let memory = map(&file.expect("the parent made the file")).expect("mapped");
    let board = Board(memory);
    let log = Log::attach(log_part(memory)).expect("the parent made the log");
    let node = config(generation);
    let replica = match Replica::join(log, Ledger::default(), HostClock::new(), node) {
        Ok(replica) => replica,
        Err(error) => {
            eprintln!("generation {generation} could not join: {error:?}");
            return ExitCode::from(EVICTED);
        }
    };
    board
        .stage(slot)
        .store(Stage::Running as u64, Ordering::SeqCst);
    let evicted = AtomicBool::new(false);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                if replica.tick() == Err(ReplicaError::Ended) {
                    evicted.store(true, Ordering::SeqCst);
                    break;
                }
                if std::os::unix::process::parent_id() != parent {
                    // Nobody is left to judge.
                    std::process::abort();
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                let replica = &replica;
                scope.spawn(move || work(replica, board, slot, thread, client(generation, thread)))
            })
            .collect();
        let kept = workers
            .into_iter()
            .all(|worker| worker.join().expect("workers don't panic"));
        board
            .stage(slot)
            .store(Stage::Stopped as u64, Ordering::SeqCst);
        while kept && board.command().load(Ordering::SeqCst) < 2 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut seat = replica.thread().expect("a seat");
        match seat.read(Ledger::digest) {
            Ok(digest) => board.digest(slot).store(digest, Ordering::SeqCst),
            Err(_) => evicted.store(true, Ordering::SeqCst),
        }
        done.store(true, Ordering::SeqCst);
    });
    if evicted.load(Ordering::SeqCst) {
        return ExitCode::from(EVICTED);
    }
    board
        .stage(slot)
        .store(Stage::Reported as u64, Ordering::SeqCst);
    ExitCode::SUCCESS
}

/// Works until told to stop; says whether this process still is a member.
fn work(replica: &ChildReplica, board: Board, slot: usize, thread: usize, client: u64) -> bool {
    let mut seat = replica.thread().expect("a seat");
    let mut number = 1;
    while board.command().load(Ordering::SeqCst) == 0 {
        board.issued(slot, thread).store(number, Ordering::SeqCst);
        match seat.update(Step { client, number }) {
            Ok(expected) => {
                assert!(expected, "client {client}: {number} is not the next one");
                board.answered(slot, thread).store(number, Ordering::SeqCst);
            }
            // In the log, answer unknown: done as far as this client knows.
            Err(ReplicaError::OutcomeUnknown { .. }) => {}
            Err(ReplicaError::Full | ReplicaError::TimedOut | ReplicaError::Loading) => continue,
            Err(ReplicaError::Ended) => return false,
            Err(error) => panic!("client {client}: {error:?}"),
        }
        if number % 16 == 0 {
            match seat.read(|ledger| ledger.last_of(client)) {
                Ok(last) => assert_eq!(last, number, "client {client} reads what it wrote"),
                Err(ReplicaError::Ended) => return false,
                Err(_) => {}
            }
        }
        number += 1;
    }
    true
}
