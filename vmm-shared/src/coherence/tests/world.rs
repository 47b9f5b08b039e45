//! A rack in miniature: what the module protects, modelled so that a mistake
//! shows.
//!
//! Each node has nested page tables, per-core TLBs and an emulator's cache of
//! translations; guest memory is one version number per frame. Everything
//! happens in small steps of one core at a time, so any interleaving of the
//! steps can be tried.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::addr::NodeId;
use crate::coherence::layout::Layout;
use crate::coherence::*;

/// Frames in guest memory: two pieces.
pub(super) const FRAMES: usize = 2 * FRAMES_PER_PIECE;
/// The frames that the model looks at.
pub(super) const WATCHED: [usize; 5] = [0, 1, 511, 512, 1023];

/// Memory on which a node can die: when the fuel is used up, the access does
/// not happen and the node's code goes no further.
#[derive(Clone, Debug)]
pub(crate) struct Mortal {
    pub(crate) words: Arc<Vec<AtomicU64>>,
    fuel: Arc<AtomicU64>,
}

/// What unwinds when the fuel is used up.
struct Died;

impl Mortal {
    pub(crate) fn new(bytes: usize) -> Self {
        Self {
            words: Arc::new((0..bytes / 8).map(|_| AtomicU64::new(0)).collect()),
            fuel: Arc::new(AtomicU64::new(u64::MAX)),
        }
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        match self.fuel.load(Ordering::Relaxed) {
            u64::MAX => {}
            0 => resume_unwind(Box::new(Died)),
            left => self.fuel.store(left - 1, Ordering::Relaxed),
        }
        &self.words[at]
    }

    /// Runs `action`, which dies when it has used the fuel up; `None` if it
    /// did. What is left of the fuel stays in `fuel`.
    pub(crate) fn with_fuel<T>(&self, fuel: &mut u64, action: impl FnOnce() -> T) -> Option<T> {
        self.fuel.store(*fuel, Ordering::Relaxed);
        let result = catch_unwind(AssertUnwindSafe(action));
        *fuel = self.fuel.swap(u64::MAX, Ordering::Relaxed);
        match result {
            Ok(value) => Some(value),
            Err(cause) if cause.is::<Died>() => None,
            Err(cause) => resume_unwind(cause),
        }
    }
}

impl Words for Mortal {
    fn count(&self) -> usize {
        self.words.len()
    }
    fn load(&self, at: usize, order: Ordering) -> u64 {
        self.word(at).load(order)
    }
    fn store(&self, at: usize, value: u64, order: Ordering) {
        self.word(at).store(value, order);
    }
    fn compare_exchange(
        &self,
        at: usize,
        current: u64,
        new: u64,
        success: Ordering,
    ) -> Result<u64, u64> {
        self.word(at)
            .compare_exchange(current, new, success, Ordering::Acquire)
    }
    fn fetch_or(&self, at: usize, bits: u64, order: Ordering) -> u64 {
        self.word(at).fetch_or(bits, order)
    }
    fn fetch_and(&self, at: usize, bits: u64, order: Ordering) -> u64 {
        self.word(at).fetch_and(bits, order)
    }
    fn fetch_max(&self, at: usize, value: u64, order: Ordering) -> u64 {
        self.word(at).fetch_max(value, order)
    }
}

/// A repeatable source of choices.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }

    pub(super) fn index(&mut self, limit: usize) -> usize {
        self.below(limit as u64) as usize
    }

    pub(super) fn one_in(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }

    pub(super) fn access(&mut self) -> Access {
        [Access::Read, Access::Write, Access::Execute][self.index(3)]
    }
}

/// A duty that the model's hypervisor neglects, to show that the checks see
/// it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Neglect {
    Nothing,
    Refresh,
    FlushOnGrant,
    FlushOnRevocation,
    ReducingFirst,
    Holding,
}

#[derive(Default)]
struct Core {
    fault: Option<(Fault<Mortal>, Place)>,
    installed: bool,
    /// A revocation being served, and whether the rights are gone.
    serving: Option<(Revocation, bool)>,
    tlb: [Rights; WATCHED.len()],
    hold: Hold,
}

/// How long node 0 may hold what it was granted, in steps; node n, n + 1 times
/// as long.
const HOLD_LIMIT: u64 = 60;

/// Where a guest is that makes these accesses next.
fn place(accesses: &[(usize, Access)]) -> Place {
    let (frame, access) = accesses[0];
    Place {
        rip: frame as u64,
        rcx: access as u64,
    }
}

struct Node {
    id: NodeId,
    epoch: u32,
    member: Option<Member>,
    alive: bool,
    tables: [Rights; WATCHED.len()],
    /// The memory version that the emulator has translated.
    translated: [Option<u64>; WATCHED.len()],
    cores: Vec<Core>,
}

pub(super) struct World {
    pub(super) map: CoherenceMap<Mortal>,
    pub(super) words: Mortal,
    nodes: Vec<Node>,
    memory: [u64; WATCHED.len()],
    clock: u64,
    steps: u64,
    pub(super) counters: Counters,
    pub(super) neglect: Neglect,
}

/// What went wrong.
pub(super) type Verdict<T = ()> = Result<T, String>;

fn fatal(error: CoherenceError) -> String {
    format!("{error:?}")
}

fn at_of(frame: usize) -> usize {
    WATCHED
        .iter()
        .position(|watched| *watched == frame)
        .expect("a watched frame")
}

impl World {
    pub(super) fn new(nodes: u16, cores: usize) -> Self {
        let geometry = Geometry {
            frames: FRAMES,
            nodes: usize::from(nodes),
            slots: 2,
        };
        let words = Mortal::new(geometry.table_size().expect("a legal geometry"));
        let map = CoherenceMap::new(words.clone(), geometry).expect("large enough");
        let mut world = Self {
            map,
            words,
            nodes: (0..nodes)
                .map(|id| Node {
                    id: NodeId(id),
                    epoch: 0,
                    member: None,
                    alive: false,
                    tables: Default::default(),
                    translated: Default::default(),
                    cores: (0..cores).map(|_| Core::default()).collect(),
                })
                .collect(),
            memory: [0; WATCHED.len()],
            clock: 0,
            steps: 0,
            counters: Counters::default(),
            neglect: Neglect::Nothing,
        };
        for node in 0..usize::from(nodes) {
            world.join(node).expect("a fresh map");
        }
        world
    }

    pub(super) fn member(&self, node: usize) -> Member {
        self.nodes[node].member.expect("a member")
    }

    pub(super) fn is_alive(&self, node: usize) -> bool {
        self.nodes[node].alive
    }

    /// A new process for a node that takes no part.
    pub(super) fn join(&mut self, node: usize) -> Verdict {
        let node = &mut self.nodes[node];
        node.epoch += 1;
        node.member = Some(self.map.join(node.id, node.epoch).map_err(fatal)?);
        node.alive = true;
        Ok(())
    }

    /// The node's process ends; nobody knows yet.
    pub(super) fn kill(&mut self, node: usize) {
        let node = &mut self.nodes[node];
        node.alive = false;
        node.tables = Default::default();
        node.translated = Default::default();
        node.cores.fill_with(Core::default);
    }

    /// A dead node is put out.
    pub(super) fn fence(&mut self, node: usize) {
        assert!(!self.nodes[node].alive, "only the dead");
        if let Some(member) = self.nodes[node].member.take() {
            self.map.fence(member).expect("a known node");
        }
    }

    /// The guest on a core accesses a frame; true if it succeeds, else a
    /// fault has begun.
    pub(super) fn access(
        &mut self,
        node: usize,
        core: usize,
        frame: usize,
        access: Access,
    ) -> Verdict<bool> {
        self.instruction(node, core, &[(frame, access)])
    }

    /// The same for an instruction that needs all of these accesses at once.
    pub(super) fn instruction(
        &mut self,
        node: usize,
        core: usize,
        accesses: &[(usize, Access)],
    ) -> Verdict<bool> {
        let member = self.member(node);
        let own = &mut self.nodes[node];
        for (frame, access) in accesses.iter().copied() {
            let (at, needs) = (at_of(frame), access.needs());
            if own.cores[core].tlb[at].contains(needs) {
                continue;
            }
            if !own.tables[at].contains(needs) {
                let fault = self.map.fault(member, frame, access).map_err(fatal)?;
                own.cores[core].fault = Some((fault, place(accesses)));
                own.cores[core].installed = false;
                own.cores[core].hold.asks();
                return Ok(false);
            }
            own.cores[core].tlb[at] = own.tables[at];
        }
        own.cores[core].hold.end();
        for (frame, access) in accesses.iter().copied() {
            self.perform(node, frame, access)?;
        }
        Ok(true)
    }

    fn perform(&mut self, node: usize, frame: usize, access: Access) -> Verdict {
        let at = at_of(frame);
        let own = &mut self.nodes[node];
        match access {
            Access::Read => {}
            Access::Write => {
                self.clock += 1;
                self.memory[at] = self.clock;
                // The emulator notices its own guest's stores.
                own.translated[at] = None;
            }
            Access::Execute => {
                let executed = *own.translated[at].get_or_insert(self.memory[at]);
                if executed != self.memory[at] {
                    return Err(format!(
                        "node {node} executed version {executed} of frame {frame}, not {}",
                        self.memory[at]
                    ));
                }
            }
        }
        Ok(())
    }

    pub(super) fn has_fault(&self, node: usize, core: usize) -> bool {
        self.nodes[node].cores[core].fault.is_some()
    }

    /// Lets so many steps' time pass in which no node gets to do anything.
    pub(super) fn starve(&mut self, steps: u64) {
        self.steps += steps;
    }

    /// One step of a core's fault; what it waits for, if anything.
    pub(super) fn advance(&mut self, node: usize, core: usize) -> Verdict<Option<Step>> {
        self.steps += 1;
        let Some((mut fault, place)) = self.nodes[node].cores[core].fault.take() else {
            return Ok(None);
        };
        let step = fault.poll().map_err(fatal)?;
        if let Step::Granted(grant) = step {
            if self.nodes[node].cores[core].installed {
                fault.complete().map_err(fatal)?;
                self.counters.note(&grant);
                let now = self.steps;
                let hold = &mut self.nodes[node].cores[core].hold;
                hold.granted(grant.unit, place, now);
                return Ok(None);
            }
            self.install(node, &grant)?;
            self.nodes[node].cores[core].installed = true;
        }
        self.nodes[node].cores[core].fault = Some((fault, place));
        Ok(Some(step))
    }

    fn install(&mut self, node: usize, grant: &Grant) -> Verdict {
        if grant.must_refresh && !matches!(grant.unit, Unit::Frame(_)) {
            return Err(format!("a refresh of more than a frame: {grant:?}"));
        }
        let neglect = self.neglect;
        let own = &mut self.nodes[node];
        for (at, frame) in WATCHED.into_iter().enumerate() {
            if !grant.unit.contains(frame) {
                continue;
            }
            if grant.must_refresh && neglect != Neglect::Refresh {
                own.translated[at] = None;
            }
            own.tables[at] = grant.rights;
            if grant.must_flush && neglect != Neglect::FlushOnGrant {
                own.cores
                    .iter_mut()
                    .for_each(|core| core.tlb[at] = Rights::NONE);
            }
        }
        Ok(())
    }

    /// Takes neighbours that cost nobody anything.
    pub(super) fn join_around(&mut self, node: usize) -> Verdict<usize> {
        let member = self.member(node);
        let map = self.map.clone();
        let mut joined = 0;
        for (at, frame) in WATCHED.into_iter().enumerate() {
            map.join_around(member, frame..frame + 1, |unit, rights| {
                assert_eq!(unit, Unit::Frame(frame));
                self.nodes[node].tables[at] = rights;
                joined += 1;
            })
            .map_err(fatal)?;
        }
        Ok(joined)
    }

    pub(super) fn nudge(&mut self, node: usize, core: usize) {
        if let Some((fault, _)) = &self.nodes[node].cores[core].fault {
            let _ = fault.nudge();
        }
    }

    /// One step of serving revocations on a core: take one, reduce, answer;
    /// false if there is none. With `again`, the answered one is kept, to be
    /// served once more at some later time.
    pub(super) fn serve(&mut self, node: usize, core: usize, again: bool) -> Verdict<bool> {
        let member = self.member(node);
        self.steps += 1;
        let Some((revocation, reduced)) = self.nodes[node].cores[core].serving else {
            let next = self.next_revocation(node, member).map_err(fatal)?;
            self.nodes[node].cores[core].serving = next.map(|revocation| (revocation, false));
            if self.neglect == Neglect::ReducingFirst
                && let Some(revocation) = next
            {
                self.map.acknowledge(member, &revocation);
            }
            return Ok(next.is_some());
        };
        let own = &mut self.nodes[node];
        if reduced {
            self.map.acknowledge(member, &revocation);
            self.counters.note_served();
            own.cores[core].serving = again.then_some((revocation, false));
            return Ok(true);
        }
        for (at, frame) in WATCHED.into_iter().enumerate() {
            if !revocation.unit.contains(frame) {
                continue;
            }
            own.tables[at] = own.tables[at] & revocation.keep;
            if self.neglect != Neglect::FlushOnRevocation {
                own.cores
                    .iter_mut()
                    .for_each(|core| core.tlb[at] = Rights::NONE);
            }
        }
        own.cores[core].serving = Some((revocation, true));
        Ok(true)
    }

    /// What a node has to give up and is not held by any of its cores.
    fn next_revocation(
        &mut self,
        node: usize,
        member: Member,
    ) -> Result<Option<Revocation>, CoherenceError> {
        let (now, limit) = (self.steps, HOLD_LIMIT * (node as u64 + 1));
        let neglect = self.neglect;
        let cores = &mut self.nodes[node].cores;
        self.map.next_revocation_if(member, |revocation| {
            // All of them: each call ends what is too old.
            let held = cores
                .iter_mut()
                .filter_map(|core| core.hold.covers(revocation.unit, now, limit).then_some(()))
                .count();
            held == 0 || neglect == Neglect::Holding
        })
    }

    /// Loses all hints on their way to a node.
    pub(super) fn lose_hints(&self, node: usize) {
        self.words.words[Layout::inbox(NodeId(node as u16))].store(0, Ordering::Relaxed);
    }

    fn rights(&self, node: usize, at: usize) -> Rights {
        let own = &self.nodes[node];
        own.cores
            .iter()
            .fold(own.tables[at], |rights, core| rights | core.tlb[at])
    }

    /// That nobody conflicts and the table tells the truth.
    pub(super) fn check(&self) -> Verdict {
        for (at, frame) in WATCHED.into_iter().enumerate() {
            let view = self.map.view(frame).map_err(fatal)?;
            let free = view.holder.is_none();
            for (node, own) in self.nodes.iter().enumerate() {
                let rights = self.rights(node, at);
                for other in 0..self.nodes.len() {
                    if other != node
                        && rights.contains(Rights::WRITE)
                        && self.rights(other, at).contains(Rights::EXECUTE)
                    {
                        return Err(format!("{node} writes what {other} executes: {view:?}"));
                    }
                }
                if rights.is_empty() {
                    continue;
                }
                if free && !view.state.rights().contains(rights) {
                    return Err(format!("{node} has {rights:?} beyond {view:?}"));
                }
                if free && !view.mapped.contains(own.id) {
                    return Err(format!("{node} is not known to have {rights:?}: {view:?}"));
                }
                if free && view.stale.contains(own.id) && rights.contains(Rights::EXECUTE) {
                    return Err(format!("{node} is stale and has {rights:?}: {view:?}"));
                }
            }
        }
        Ok(())
    }

    /// Lets all cores work fairly until no fault is left.
    pub(super) fn drain(&mut self) -> Verdict {
        for round in 0..1000 {
            let mut busy = false;
            for node in 0..self.nodes.len() {
                if !self.nodes[node].alive {
                    self.fence(node);
                    continue;
                }
                for core in 0..self.nodes[node].cores.len() {
                    while self.serve(node, core, false)? {}
                    self.advance(node, core)?;
                    if round % 10 == 9 {
                        self.nudge(node, core);
                    }
                    busy |= self.has_fault(node, core);
                    self.check()?;
                }
            }
            if !busy {
                return Ok(());
            }
        }
        Err("faults that never end".into())
    }

    /// Accesses until it works, everybody cooperating; the grants it took.
    pub(super) fn accomplish(&mut self, node: usize, frame: usize, access: Access) -> Verdict<u32> {
        for grants in 0..10 {
            if self.access(node, 0, frame, access)? {
                return Ok(grants);
            }
            self.drain()?;
        }
        Err(format!("node {node} never gets to {access:?} {frame}"))
    }

    /// One random step of a random core.
    pub(super) fn step(&mut self, dice: &mut Dice) -> Verdict {
        let node = dice.index(self.nodes.len());
        if !self.nodes[node].alive {
            if self.nodes[node].member.is_some() {
                if dice.one_in(20) {
                    self.fence(node);
                }
            } else if dice.one_in(40) {
                self.join(node)?;
            }
            return Ok(());
        }
        let core = dice.index(self.nodes[node].cores.len());
        match dice.below(100) {
            0..40 => {
                let again = dice.one_in(4);
                self.serve(node, core, again)?;
            }
            40..98 if self.has_fault(node, core) => {
                self.advance(node, core)?;
                if dice.one_in(10) {
                    self.nudge(node, core);
                }
            }
            40..98 => {
                // Frames have habits, so that all paths are taken.
                let at = dice.index(WATCHED.len());
                let access = match (at, dice.below(8)) {
                    (0, 1..) => Access::Execute,
                    (3, 1..) => Access::Write,
                    _ => dice.access(),
                };
                self.access(node, core, WATCHED[at], access)?;
            }
            98 => self.lose_hints(node),
            _ => {
                self.join_around(node)?;
            }
        }
        Ok(())
    }
}
