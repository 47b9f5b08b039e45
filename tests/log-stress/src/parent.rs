//! The process that starts the others, kills them, and judges.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vmm_shared::log::{Log, Replica, ReplicaError, State};

use crate::child::EVICTED;
use crate::ledger::Ledger;
use crate::shared::{BOARD_BYTES, Board, GEOMETRY, HostClock, LEASE, Stage, client, config};
use crate::shared::{log_part, map};

/// What to do.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) kills: usize,
    pub(crate) processes: usize,
    pub(crate) threads: usize,
    pub(crate) seed: u64,
    pub(crate) directory: PathBuf,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            kills: 1000,
            processes: 3,
            threads: 2,
            seed: 1,
            directory: PathBuf::from("/dev/shm"),
        }
    }
}

/// A thread that no longer runs, and how far it had come.
struct Ended {
    client: u64,
    issued: u64,
    answered: u64,
}

struct Running {
    process: Child,
    generation: u32,
}

/// A killed process whose eviction is awaited.
struct Killed {
    generation: u32,
    at: Instant,
}

/// Removes the file, however the run ends.
struct Cleanup(PathBuf);

impl Drop for Cleanup {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

struct Rack<'a> {
    plan: &'a Plan,
    path: &'a Path,
    board: Board,
    log: Log,
    running: Vec<Running>,
    ended: Vec<Ended>,
    generations: u32,
    random: u64,
    unconfirmed: Vec<Killed>,
    evictions: Vec<Duration>,
    evicted_alive: usize,
}

pub(crate) fn run(plan: &Plan) -> Result<(), String> {
    let path = plan
        .directory
        .join(format!("log-stress-{}", std::process::id()));
    let _cleanup = Cleanup(path.clone());
    let file = make_file(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let memory = map(&file).map_err(|error| format!("{}: {error}", path.display()))?;
    let log = Log::create(log_part(memory), GEOMETRY).expect("the file is large enough");
    let keeper = join(&log)?;
    let mut rack = Rack {
        plan,
        path: &path,
        board: Board(memory),
        log,
        running: Vec::new(),
        ended: Vec::new(),
        generations: 0,
        random: plan.seed,
        unconfirmed: Vec::new(),
        evictions: Vec::new(),
        evicted_alive: 0,
    };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let keeping = scope.spawn(|| keep(keeper, &done));
        let result = rack.work().and_then(|()| rack.judge());
        done.store(true, Ordering::SeqCst);
        let kept = keeping.join().expect("the keeper does not panic");
        let result = result.and(kept).map(|evicted| {
            println!(
                "evicted although alive: {} processes, {evicted} times the parent",
                rack.evicted_alive
            );
        });
        for running in &mut rack.running {
            let _ = running.process.kill();
            let _ = running.process.wait();
        }
        result
    })
}

type OwnReplica = Replica<Ledger, HostClock>;

fn join(log: &Log) -> Result<OwnReplica, String> {
    Replica::join(log.clone(), Ledger::default(), HostClock::new(), config(0))
        .map_err(|error| format!("the parent can't join: {error:?}"))
}

/// Takes part as the one member that is never killed, so that there always is
/// one that holds the state. On a loaded machine it may be taken for dead,
/// and then joins again; returns how often.
fn keep(mut own: OwnReplica, done: &AtomicBool) -> Result<usize, String> {
    let mut evicted = 0;
    while !done.load(Ordering::SeqCst) {
        match own.tick() {
            Err(ReplicaError::Ended) => {
                evicted += 1;
                let log = own.log().clone();
                drop(own.leave());
                own = join(&log)?;
            }
            Ok(()) | Err(ReplicaError::Full | ReplicaError::Loading) => {}
            Err(error) => return Err(format!("the parent's replica: {error:?}")),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(evicted)
}

fn make_file(path: &Path) -> std::io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)?;
    file.set_len((BOARD_BYTES + GEOMETRY.total_bytes()) as u64)?;
    Ok(file)
}

impl Rack<'_> {
    fn next_random(&mut self, below: u64) -> u64 {
        // xorshift64*
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % below.max(1)
    }

    fn start(&mut self, slot: usize) -> Result<Running, String> {
        self.generations += 1;
        let board = self.board;
        board
            .stage(slot)
            .store(Stage::Starting as u64, Ordering::SeqCst);
        for thread in 0..self.plan.threads {
            board.issued(slot, thread).store(0, Ordering::SeqCst);
            board.answered(slot, thread).store(0, Ordering::SeqCst);
        }
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let process = Command::new(program)
            .arg("--child")
            .arg(self.path)
            .args(["--slot", &slot.to_string()])
            .args(["--generation", &self.generations.to_string()])
            .args(["--threads", &self.plan.threads.to_string()])
            .spawn()
            .map_err(|error| error.to_string())?;
        Ok(Running {
            process,
            generation: self.generations,
        })
    }

    /// Notes how far the reaped process in `slot` had come.
    fn note_end(&mut self, slot: usize) {
        for thread in 0..self.plan.threads {
            self.ended.push(Ended {
                client: client(self.running[slot].generation, thread),
                issued: self.board.issued(slot, thread).load(Ordering::SeqCst),
                answered: self.board.answered(slot, thread).load(Ordering::SeqCst),
            });
        }
    }

    fn replace(&mut self, slot: usize) -> Result<(), String> {
        self.note_end(slot);
        self.running[slot] = self.start(slot)?;
        Ok(())
    }

    fn work(&mut self) -> Result<(), String> {
        for slot in 0..self.plan.processes {
            let running = self.start(slot)?;
            self.running.push(running);
        }
        let mut kills = 0;
        while kills < self.plan.kills {
            let pause = self.next_random(40_000);
            std::thread::sleep(Duration::from_micros(pause));
            self.look_after()?;
            let slot = usize::try_from(self.next_random(self.plan.processes as u64))
                .expect("below the number of processes");
            // Mostly kill what runs, now and then what is still joining.
            let stage = self.board.stage(slot).load(Ordering::SeqCst);
            if stage == Stage::Starting as u64 && self.next_random(8) != 0 {
                continue;
            }
            // One failure at a time: the log keeps two copies of the state, so
            // there must be two before one may go.
            if self.holders() < 2 {
                continue;
            }
            let victim = &mut self.running[slot];
            victim.process.kill().map_err(|error| error.to_string())?;
            victim.process.wait().map_err(|error| error.to_string())?;
            let generation = victim.generation;
            kills += 1;
            if kills % 2 == 0 {
                self.log.confirm_node_dead(generation);
            } else {
                // Let the lease run out, and see how long it takes.
                self.unconfirmed.push(Killed {
                    generation,
                    at: Instant::now(),
                });
            }
            self.replace(slot)?;
            if kills % 100 == 0 {
                eprintln!("{kills} kills");
            }
        }
        self.settle()
    }

    /// Members that hold the state and were not killed.
    fn holders(&self) -> usize {
        let lives = |node: u32| {
            self.unconfirmed
                .iter()
                .all(|killed| killed.generation != node)
        };
        self.log
            .holders()
            .filter(|&member| lives(self.log.status(member).node))
            .count()
    }

    /// Reaps processes that ended by themselves, and opens the slots of those
    /// whose lease has run out.
    fn look_after(&mut self) -> Result<(), String> {
        for slot in 0..self.running.len() {
            let ended = self.running[slot].process.try_wait();
            if let Some(status) = ended.map_err(|error| error.to_string())? {
                if status.code() != Some(i32::from(EVICTED)) {
                    return Err(format!("a process failed: {status}"));
                }
                self.evicted_alive += 1;
                self.log.confirm_node_dead(self.running[slot].generation);
                self.replace(slot)?;
            }
        }
        let log = &self.log;
        let evictions = &mut self.evictions;
        self.unconfirmed.retain(|killed| {
            let still_member = log.members().any(|member| {
                let status = log.status(member);
                status.node == killed.generation
                    && !matches!(status.state, State::Evicted | State::Free)
            });
            if !still_member {
                evictions.push(killed.at.elapsed());
                log.confirm_node_dead(killed.generation);
            }
            still_member
        });
        Ok(())
    }

    fn wait_for(&mut self, stage: Stage) -> Result<(), String> {
        let started = Instant::now();
        loop {
            let ready = (0..self.plan.processes)
                .all(|slot| self.board.stage(slot).load(Ordering::SeqCst) >= stage as u64);
            if ready {
                return Ok(());
            }
            if started.elapsed() > Duration::from_secs(60) {
                return Err(format!("not every process came to {stage:?}"));
            }
            if stage == Stage::Running {
                self.look_after()?;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn settle(&mut self) -> Result<(), String> {
        self.wait_for(Stage::Running)?;
        let started = Instant::now();
        while !self.unconfirmed.is_empty() {
            if started.elapsed() > 20 * LEASE {
                return Err("a killed process was never evicted".into());
            }
            std::thread::sleep(Duration::from_millis(1));
            self.look_after()?;
        }
        self.board.command().store(1, Ordering::SeqCst);
        self.wait_for(Stage::Stopped)?;
        self.board.command().store(2, Ordering::SeqCst);
        self.wait_for(Stage::Reported)
    }

    fn judge(&mut self) -> Result<(), String> {
        for slot in 0..self.running.len() {
            self.note_end(slot);
        }
        // A fresh replica: what a snapshot holds is judged as well.
        let own = join(&self.log)?;
        let mut seat = own.thread().expect("a seat");
        let ledger = seat
            .read(Ledger::clone)
            .map_err(|error| format!("the parent's replica: {error:?}"))?;
        if ledger.violations > 0 {
            return Err(format!("{} lost or doubled", ledger.violations));
        }
        for slot in 0..self.plan.processes {
            if self.board.digest(slot).load(Ordering::SeqCst) != ledger.digest() {
                return Err(format!("the replica of process {slot} differs"));
            }
        }
        let mut operations = 0;
        for ended in &self.ended {
            let last = ledger.last_of(ended.client);
            operations += last;
            if last < ended.answered || last > ended.issued {
                return Err(format!(
                    "client {}: {} answered, {} issued, {last} applied",
                    ended.client, ended.answered, ended.issued
                ));
            }
        }
        self.evictions.sort_unstable();
        let at = |percent: usize| {
            let index = self.evictions.len().saturating_sub(1) * percent / 100;
            self.evictions
                .get(index)
                .map_or(0.0, |time| time.as_secs_f64() * 1e3)
        };
        println!(
            "kills {} processes {} threads {} operations {operations} clients {}",
            self.plan.kills,
            self.plan.processes,
            self.plan.threads,
            self.ended.len()
        );
        println!("replicas equal, no operation lost or doubled");
        println!(
            "eviction after the kill, lease {} ms: median {:.0} ms, 99 % {:.0} ms, most {:.0} ms",
            LEASE.as_millis(),
            at(50),
            at(99),
            at(100)
        );
        Ok(())
    }
}
