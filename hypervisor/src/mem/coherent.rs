//! Guest memory as one node maps it.
//!
//! Where a piece is, [`pieces`](vmm_shared::pieces) says; who may write a page
//! and who may execute it, [`coherence`](vmm_shared::coherence) where
//! instruction fetch is not coherent between hosts. Elsewhere every node has
//! all rights. This is where all that meets the nested page tables. Whoever
//! waits here serves the other nodes meanwhile, so nodes never wait for each
//! other in a circle.

use core::sync::atomic::AtomicU64;

use spin::Mutex;
use vmm_shared::addr::{Gpa, Hpa, NodeId, PAGE_SIZE};
use vmm_shared::coherence::{
    Access, CoherenceError, CoherenceMap, Counters, FRAMES_PER_PIECE, Grant, Hold, Member, NodeSet,
    Place, Rights, Step, Unit, refresh,
};
use vmm_shared::control::{NodeCounter, NodeCounters};
use vmm_shared::pieces::{PieceError, Seen, Whereabouts};

use super::barrier::EntryBarrier;
use super::guest::{GuestMemory, GuestMemoryError};
use super::holds::Holds;
use super::slices::Slices;
use crate::arch::cpu;
use crate::arch::paging::zeroed_page;
use crate::arch::svm::npt::{GuestPage, NestedTables};
use crate::fabric::proof::Fetch;

/// When nodes that have not answered are reminded first, and how far apart the
/// reminders get.
const REMIND_FIRST_US: u64 = 200;
const REMIND_LAST_US: u64 = 10_000;

/// How this node reaches others and its own cores.
pub trait Bells: core::fmt::Debug {
    /// This node.
    fn node(&self) -> NodeId;
    /// Makes a core of this node leave the guest.
    fn kick_core(&self, core: usize);
    /// Makes other nodes look at their revocations.
    fn ring_nodes(&self, nodes: NodeSet);
    /// The nodes that have died. Who waits for others asks again and again.
    fn lost(&self) -> NodeSet;
    /// Whether this node has been put out.
    fn is_out(&self) -> bool;
}

/// This node's part in what nodes ask of each other about guest memory.
#[derive(Debug)]
pub struct Membership {
    /// The state that all nodes share.
    pub map: CoherenceMap,
    /// This node in it.
    pub member: Member,
    /// Whether the state says who may do what, or everybody may do all.
    pub fetch: Fetch,
}

/// Why this node can't do anything more with guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// The shared state is damaged, or this node has been fenced.
    #[error("instruction coherence: {0}")]
    Coherence(#[from] CoherenceError),
    /// The map of guest memory is damaged.
    #[error("{0}")]
    Pieces(#[from] PieceError),
}

/// What has become of a nested page fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// The access can be tried again.
    Mapped,
    /// The address is not guest memory.
    NotMemory,
}

/// When nodes that are waited for were rung.
#[derive(Debug)]
pub(super) struct Reminder {
    rung_at: Option<u64>,
    /// TSC ticks until they are rung again.
    interval: u64,
}

/// Guest memory and its mappings on this node.
#[derive(Debug)]
pub struct MappedMemory<B> {
    pub(super) slices: Slices,
    tables: Mutex<NestedTables>,
    /// Who runs the guest on which nested tables.
    pub barrier: EntryBarrier,
    pub(super) membership: Option<Membership>,
    holds: Holds,
    /// Bits of the nodes whose memory is lost.
    pub(super) parted: AtomicU64,
    /// The page that is mapped in its place.
    pub(super) nothing: Hpa,
    pub(super) bells: B,
    counters: NodeCounters,
    tsc_khz: u32,
}

/// What guest memory is made of.
#[derive(Debug)]
pub struct MemoryParts<B> {
    /// The memory.
    pub slices: Slices,
    /// Tables that map none of it.
    pub tables: NestedTables,
    /// This node's part in what nodes ask of each other; one that is alone has
    /// none.
    pub membership: Option<Membership>,
    /// The way to other nodes and cores.
    pub bells: B,
    /// What this node counts.
    pub counters: NodeCounters,
    /// Cores of this node.
    pub cores: usize,
    /// Rate of their TSCs in kHz.
    pub tsc_khz: u32,
}

impl<B: Bells> MappedMemory<B> {
    /// Memory. Unless instruction coherence decides on that, all that is there
    /// is mapped; what comes later, when it is touched.
    pub fn new(parts: MemoryParts<B>) -> Self {
        let memory = Self {
            holds: Holds::new(parts.bells.node(), parts.cores, parts.tsc_khz),
            slices: parts.slices,
            tables: Mutex::new(parts.tables),
            barrier: EntryBarrier::new(parts.cores),
            membership: parts.membership,
            parted: AtomicU64::new(0),
            nothing: zeroed_page(),
            bells: parts.bells,
            counters: parts.counters,
            tsc_khz: parts.tsc_khz,
        };
        if memory.tracked().is_none() {
            (0..memory.slices.map().pieces()).for_each(|piece| {
                // A piece that is absent now comes by a fault.
                let _ = memory.map_all_of(piece);
            });
        }
        memory
    }

    /// The state that says who may do what, if any does.
    pub(super) fn tracked(&self) -> Option<&Membership> {
        let membership = self.membership.as_ref();
        membership.filter(|own| own.fetch == Fetch::Stale)
    }

    /// Changes what the nested tables say about a piece, and publishes how
    /// much they map. The change is told where the piece is: if anything of it
    /// is mapped, it is from there.
    pub(super) fn change_tables<R>(
        &self,
        piece: usize,
        change: impl FnOnce(&mut NestedTables, Seen) -> R,
    ) -> Result<R, PieceError> {
        let mut tables = self.tables.lock();
        // Under the lock: see the rules of the map.
        let seen = self.slices.look(piece)?;
        let before = tables.mapped();
        let result = change(&mut tables, seen);
        let after = tables.mapped();
        drop(tables);
        let count = |counter, before, after: u64| {
            if before != after {
                self.counters.add(counter, after.wrapping_sub(before));
            }
        };
        count(NodeCounter::MemoryMappedLarge, before.large, after.large);
        let (before, after) = (before.bytes(), after.bytes());
        count(NodeCounter::MemoryMapped, before, after);
        if seen
            .host()
            .is_some_and(|host| host.node != self.bells.node())
        {
            count(NodeCounter::MemoryMappedRemote, before, after);
        }
        Ok(result)
    }

    /// Makes all cores of this node forget what the tables said before.
    pub(super) fn flush(&self) {
        let kicked = self.barrier.advance(|core| self.bells.kick_core(core));
        self.counters.add(NodeCounter::Shootdowns, 1);
        self.counters.add(NodeCounter::ShootdownExits, kicked);
    }

    /// The way to other nodes and cores.
    pub fn bells(&self) -> &B {
        &self.bells
    }

    /// What this node counts.
    pub fn counters(&self) -> &NodeCounters {
        &self.counters
    }

    /// Takes all memory that is there and that nobody has touched, for the node
    /// that has loaded the guest and will run it alone for a while.
    ///
    /// # Errors
    /// If the shared state is damaged.
    pub fn claim_all(&self) -> Result<(), MemoryError> {
        let Some(Membership { map, member, .. }) = self.tracked() else {
            return Ok(());
        };
        let mut installed = Ok(true);
        // What comes later lies behind all that.
        let is_there = |piece: &usize| {
            let seen = self.slices.look(*piece);
            seen.is_ok_and(|seen| seen.host().is_some())
        };
        let pieces = (0..self.slices.map().pieces()).take_while(is_there);
        map.claim(*member, 0..pieces.count(), |unit| {
            installed = installed.and(self.install(unit, Rights::ALL, None));
        })?;
        Ok(installed.map(drop)?)
    }

    /// Where the guest sees a unit, and its offset in its piece in bytes.
    fn page(&self, unit: Unit) -> Option<(GuestPage, u64)> {
        let gpa = self.slices.gpa(unit.piece())?;
        let frame = unit.first_frame() % FRAMES_PER_PIECE;
        let offset = frame as u64 * PAGE_SIZE;
        let page = match unit {
            Unit::Piece(_) => GuestPage::Large(gpa),
            Unit::Frame(_) => GuestPage::Small(Gpa(gpa.0 + offset)),
        };
        Some((page, offset))
    }

    /// Where this node sees a unit of a piece that is where it was seen, and
    /// has been neither claimed nor lost.
    fn place(&self, unit: Unit, seen: Seen) -> Option<(GuestPage, Hpa)> {
        let (page, offset) = self.page(unit)?;
        match seen.whereabouts() {
            Whereabouts::At(_) if self.is_lost(seen) => None,
            Whereabouts::At(host) => Some((page, self.slices.hpa(host, offset)?)),
            Whereabouts::Absent | Whereabouts::Moving { .. } => None,
        }
    }

    /// Maps a unit, unless its piece is not where it was seen or is being
    /// moved: whether it is mapped now.
    fn install(&self, unit: Unit, rights: Rights, at: Option<Seen>) -> Result<bool, PieceError> {
        self.change_tables(unit.piece(), |tables, seen| {
            let place = self.place(unit, seen);
            let place = place.filter(|_| at.is_none_or(|at| at == seen));
            if let Some((page, hpa)) = place {
                tables.map(page, hpa, rights);
            }
            place.is_some()
        })
    }

    fn map_all_of(&self, piece: usize) -> Result<bool, PieceError> {
        self.install(Unit::Piece(piece), Rights::ALL, None)
    }

    /// Leaves this node no more than these rights on a unit.
    pub(super) fn restrict(&self, unit: Unit, keep: Rights) -> Result<(), PieceError> {
        if let Some((page, _)) = self.page(unit) {
            self.change_tables(unit.piece(), |tables, _| tables.restrict(page, keep))?;
        }
        self.flush();
        Ok(())
    }

    /// Makes an access of a core's guest possible that the nested tables have
    /// refused. The core holds what it is granted until its guest gets on.
    ///
    /// # Errors
    /// If the shared state is damaged or this node has been fenced.
    pub fn guest_fault(
        &self,
        core: usize,
        place: Place,
        gpa: Gpa,
        access: Access,
    ) -> Result<Resolution, MemoryError> {
        self.holds.asks(core);
        self.fault(gpa, access, |frame| {
            let unit = Unit::Frame(frame);
            self.holds.granted(core, unit, place, cpu::rdtsc());
        })
    }

    /// Makes an access possible that the nested tables refuse; `granted` is
    /// told the frame before other nodes can ask for it.
    fn fault(
        &self,
        gpa: Gpa,
        access: Access,
        granted: impl Fn(usize),
    ) -> Result<Resolution, MemoryError> {
        let Some((piece, offset)) = self.slices.piece(gpa) else {
            return Ok(Resolution::NotMemory);
        };
        let page = usize::try_from(PAGE_SIZE).expect("small");
        let frame = piece * FRAMES_PER_PIECE + offset / page;
        loop {
            // Another core of this node may have been faster.
            if self.tables.lock().rights(gpa).contains(access.needs()) {
                granted(frame);
                return Ok(Resolution::Mapped);
            }
            if !self.wait_until_there(piece)? {
                return Ok(Resolution::NotMemory);
            }
            if self.is_lost(self.slices.look(piece)?) {
                self.map_nothing(piece, gpa)?;
                granted(frame);
                return Ok(Resolution::Mapped);
            }
            let is_mapped = match self.tracked() {
                Some(own) => self.ask(own, frame, access, &granted)?,
                None => self.map_all_of(piece)?,
            };
            if is_mapped {
                return Ok(Resolution::Mapped);
            }
        }
    }

    /// Waits while a piece is being moved; whether there is such a piece.
    fn wait_until_there(&self, piece: usize) -> Result<bool, MemoryError> {
        loop {
            match self.slices.look(piece)?.whereabouts() {
                Whereabouts::Absent => return Ok(false),
                Whereabouts::At(_) => return Ok(true),
                Whereabouts::Moving { by, .. } if self.bells.lost().contains(by) => {
                    self.slices.map().forget_at(piece, by);
                }
                Whereabouts::Moving { .. } => {}
            }
            self.serve()?;
            core::hint::spin_loop();
        }
    }

    /// Gets rights on a frame; false if its piece has begun to move meanwhile.
    fn ask(
        &self,
        own: &Membership,
        frame: usize,
        access: Access,
        granted: impl Fn(usize),
    ) -> Result<bool, MemoryError> {
        let mut fault = own.map.fault(own.member, frame, access)?;
        let mut reminder = self.reminder();
        loop {
            match fault.poll()? {
                Step::Granted(grant) => {
                    if !self.apply(&grant)? {
                        fault.abandon()?;
                        return Ok(false);
                    }
                    granted(frame);
                    let mut counted = Counters::default();
                    counted.note(&grant);
                    self.counters.add_coherence(&counted);
                    fault.complete()?;
                    return Ok(true);
                }
                Step::Revoking(nodes) => self.remind(&mut reminder, nodes, || fault.nudge()),
                Step::Busy => {}
            }
            self.wait_for_others(own)?;
        }
    }

    pub(super) fn reminder(&self) -> Reminder {
        Reminder {
            rung_at: None,
            interval: self.ticks(REMIND_FIRST_US),
        }
    }

    fn ticks(&self, us: u64) -> u64 {
        us * u64::from(self.tsc_khz) / 1000
    }

    /// Rings nodes that have not answered, if it is time to.
    pub(super) fn remind(
        &self,
        reminder: &mut Reminder,
        nodes: NodeSet,
        nudge: impl FnOnce() -> NodeSet,
    ) {
        let now = cpu::rdtsc();
        match reminder.rung_at {
            None => self.bells.ring_nodes(nodes),
            Some(then) if now.wrapping_sub(then) > reminder.interval => {
                reminder.interval = (2 * reminder.interval).min(self.ticks(REMIND_LAST_US));
                self.bells.ring_nodes(nudge());
            }
            Some(_) => return,
        }
        reminder.rung_at = Some(now);
    }

    /// What a core does between two looks whether others have answered.
    pub(super) fn wait_for_others(&self, own: &Membership) -> Result<(), MemoryError> {
        for node in self.bells.lost() {
            // As this one, in its first life.
            let epoch = own.member.epoch;
            own.map.fence(Member { node, epoch })?;
        }
        self.serve()?;
        core::hint::spin_loop();
        Ok(())
    }

    /// Makes a grant so; false if the piece has begun to move: then this node
    /// has no right on the unit at all, and must not complete the fault.
    fn apply(&self, grant: &Grant) -> Result<bool, PieceError> {
        let seen = self.slices.look(grant.unit.piece())?;
        if grant.must_refresh
            && let Some(memory) = seen.host().and_then(|host| self.slices.memory(host))
            && let Some((_, offset)) = self.page(grant.unit)
        {
            let offset = usize::try_from(offset).expect("64-bit");
            refresh(&memory, offset).expect("frames lie inside pieces");
        }
        if !self.install(grant.unit, grant.rights, Some(seen))? {
            self.restrict(grant.unit, Rights::NONE)?;
            return Ok(false);
        }
        if grant.must_flush {
            self.flush();
        }
        Ok(true)
    }

    /// A core's guest has left it for an interrupt, at `place`.
    ///
    /// # Errors
    /// As [`serve`](Self::serve).
    pub fn guest_was_interrupted(&self, core: usize, place: Place) -> Result<(), MemoryError> {
        self.change_hold(core, |hold| hold.interrupted(place))
    }

    /// A core's guest has executed an instruction.
    ///
    /// # Errors
    /// As [`serve`](Self::serve).
    pub fn guest_got_on(&self, core: usize) -> Result<(), MemoryError> {
        self.change_hold(core, Hold::end)
    }

    /// Whoever waits for what the core has held is served when it ends.
    fn change_hold(&self, core: usize, change: impl FnOnce(&mut Hold)) -> Result<(), MemoryError> {
        if self.membership.is_some() && self.holds.ends(core, change) {
            self.serve()?;
        }
        Ok(())
    }

    /// Whether other nodes may have asked for something.
    #[must_use]
    pub fn is_asked(&self) -> bool {
        let membership = self.membership.as_ref();
        membership.is_some_and(|own| own.map.has_revocations(own.member))
    }

    /// Gives up what other nodes have asked for and no core holds. Never waits
    /// for them.
    ///
    /// # Errors
    /// If a request makes no sense.
    pub fn serve(&self) -> Result<(), MemoryError> {
        let Some(Membership { map, member, .. }) = &self.membership else {
            return Ok(());
        };
        if !map.has_revocations(*member) {
            return Ok(());
        }
        while let Some(revocation) =
            map.next_revocation_if(*member, |it| self.may_serve(it.unit))?
        {
            self.restrict(revocation.unit, revocation.keep)?;
            map.acknowledge(*member, &revocation);
            let mut counted = Counters::default();
            counted.note_served();
            self.counters.add_coherence(&counted);
        }
        Ok(())
    }

    fn may_serve(&self, unit: Unit) -> bool {
        let free = self.holds.release(unit, cpu::rdtsc(), |core| {
            if self.barrier.is_inside(core) {
                self.bells.kick_core(core);
            }
        });
        if !free {
            self.counters.add(NodeCounter::Holds, 1);
        }
        free
    }

    /// Stores bytes that lie in one frame, if this node may write there.
    fn store(&self, gpa: Gpa, from: &[u8]) -> Option<Result<(), GuestMemoryError>> {
        // Under the lock: a revocation is answered after this or seen here.
        let tables = self.tables.lock();
        tables
            .rights(gpa)
            .contains(Rights::WRITE)
            .then(|| self.slices.write_bytes(gpa, from))
    }

    /// Splits bytes at the frames' borders.
    fn by_frame(gpa: Gpa, mut bytes: &[u8]) -> impl Iterator<Item = (Gpa, &[u8])> {
        let mut at = gpa;
        core::iter::from_fn(move || {
            let left = usize::try_from(PAGE_SIZE - at.0 % PAGE_SIZE).expect("64-bit");
            let (here, rest) = bytes.split_at(left.min(bytes.len()));
            let part = (at, here);
            at = Gpa(at.0.wrapping_add(here.len() as u64));
            bytes = rest;
            (!here.is_empty()).then_some(part)
        })
    }
}

impl<B: Bells> GuestMemory for MappedMemory<B> {
    fn read_bytes(&self, gpa: Gpa, into: &mut [u8]) -> Result<(), GuestMemoryError> {
        self.slices.read_bytes(gpa, into)
    }

    /// What the hypervisor writes for a device may be code elsewhere, or be
    /// about to move: it needs the right to write like the guest itself.
    fn write_bytes(&self, gpa: Gpa, from: &[u8]) -> Result<(), GuestMemoryError> {
        self.slices.check(gpa, from.len())?;
        for (at, part) in Self::by_frame(gpa, from) {
            loop {
                if let Some(stored) = self.store(at, part) {
                    stored?;
                    break;
                }
                // It may be taken away meanwhile.
                let error = GuestMemoryError {
                    gpa,
                    len: from.len(),
                };
                match self.fault(at, Access::Write, |_| ()) {
                    Ok(Resolution::Mapped) => {}
                    Ok(Resolution::NotMemory) | Err(_) => return Err(error),
                }
            }
        }
        Ok(())
    }

    fn write_bytes_now(&self, gpa: Gpa, from: &[u8]) -> Result<(), GuestMemoryError> {
        let error = GuestMemoryError {
            gpa,
            len: from.len(),
        };
        // Callers write single words, which no frame's border cuts in two.
        let one = Self::by_frame(gpa, from).count() == 1;
        one.then(|| self.store(gpa, from)).flatten().ok_or(error)?
    }
}

#[cfg(test)]
mod tests;
