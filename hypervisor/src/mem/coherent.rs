//! Guest memory as one node maps it.
//!
//! Where instruction fetch is coherent between hosts, or there is one host,
//! everything is mapped with all rights from the start. Elsewhere
//! [`coherence`](vmm_shared::coherence) decides which node may write a page
//! and which may execute it; this is where its decisions meet the nested page
//! tables. Whoever waits here serves the other nodes meanwhile, so nodes never
//! wait for each other in a circle.

use spin::Mutex;
use vmm_shared::addr::{Gpa, LARGE_PAGE_SIZE, NodeId, PAGE_SIZE};
use vmm_shared::coherence::{
    Access, CoherenceError, CoherenceMap, Counters, Grant, Hold, Member, NodeSet, Place, Rights,
    Step, Unit, refresh,
};
use vmm_shared::control::{ControlRegion, NodeCounter, NodeCounters};

use super::barrier::EntryBarrier;
use super::guest::{GuestMemory, GuestMemoryError};
use super::holds::Holds;
use super::slices::{Slice, Slices};
use super::withdrawals::Withdrawals;
use crate::arch::cpu;
use crate::arch::svm::npt::{GuestPage, NestedTables};

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
    /// Tells the devices' node that this one maps no memory any more that was
    /// withdrawn.
    fn tell_withdrawn(&self);
    /// The nodes that have died. Who waits for others asks again and again.
    fn lost(&self) -> NodeSet;
}

/// This node's part in instruction coherence.
#[derive(Debug)]
pub struct Membership {
    /// The state that all nodes share.
    pub map: CoherenceMap,
    /// This node in it.
    pub member: Member,
}

/// What has become of a nested page fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// The access can be tried again.
    Mapped,
    /// The address is not guest memory.
    NotMemory,
}

/// Guest memory and its mappings on this node.
#[derive(Debug)]
pub struct MappedMemory<B> {
    slices: Slices,
    tables: Mutex<NestedTables>,
    /// Who runs the guest on which nested tables.
    pub barrier: EntryBarrier,
    membership: Option<Membership>,
    /// What is taken away from the guest.
    pub withdrawals: Withdrawals,
    holds: Holds,
    bells: B,
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
    /// This node's part in instruction coherence, if there is such a thing:
    /// then the tables map only what it says.
    pub membership: Option<Membership>,
    /// The way to other nodes and cores.
    pub bells: B,
    /// Where memory is withdrawn.
    pub control: ControlRegion,
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
    ///
    /// # Panics
    /// If the control region has no record of this node.
    pub fn new(parts: MemoryParts<B>) -> Self {
        let record = parts.control.node(parts.bells.node());
        let record = record.expect("this node has joined");
        let memory = Self {
            withdrawals: Withdrawals::new(parts.control.vm(), record),
            holds: Holds::new(parts.bells.node(), parts.cores, parts.tsc_khz),
            slices: parts.slices,
            tables: Mutex::new(parts.tables),
            barrier: EntryBarrier::new(parts.cores),
            membership: parts.membership,
            bells: parts.bells,
            counters: parts.counters,
            tsc_khz: parts.tsc_khz,
        };
        if memory.membership.is_none() {
            for slice in memory.slices.iter().filter(|slice| slice.is_present()) {
                let len = slice.memory.len() as u64;
                memory.change_tables(slice.node, |tables| {
                    tables.map_range(slice.gpa, slice.hpa(0), len, Rights::ALL);
                });
            }
        }
        memory
    }

    /// Changes what the nested tables say about memory that `giver` gives, and
    /// publishes how much they map.
    fn change_tables(&self, giver: NodeId, change: impl FnOnce(&mut NestedTables)) {
        let mut tables = self.tables.lock();
        let before = tables.mapped();
        change(&mut tables);
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
        if giver != self.bells.node() {
            count(NodeCounter::MemoryMappedRemote, before, after);
        }
    }

    /// Makes all cores of this node forget what the tables said before.
    fn flush(&self) {
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
    pub fn claim_all(&self) -> Result<(), CoherenceError> {
        let Some(Membership { map, member }) = &self.membership else {
            return Ok(());
        };
        // What comes later lies behind all that.
        let bytes = self
            .slices
            .iter()
            .filter(|slice| slice.block.is_none())
            .map(|slice| slice.memory.len() as u64)
            .sum::<u64>();
        let pieces = usize::try_from(bytes / LARGE_PAGE_SIZE).unwrap_or(0);
        map.claim(*member, 0..pieces, |unit| self.install(unit, Rights::ALL))
    }

    fn page(&self, unit: Unit) -> Option<(GuestPage, &Slice, u64)> {
        let (slice, offset) = self
            .slices
            .at_linear(unit.first_frame() as u64 * PAGE_SIZE)?;
        let gpa = Gpa(slice.gpa.0 + offset);
        let page = match unit {
            Unit::Piece(_) => GuestPage::Large(gpa),
            Unit::Frame(_) => GuestPage::Small(gpa),
        };
        Some((page, slice, offset))
    }

    fn install(&self, unit: Unit, rights: Rights) {
        if let Some((page, slice, offset)) = self.page(unit) {
            self.map(slice, page, offset, rights);
        }
    }

    /// Maps a page unless its memory is being taken away. That is asked under
    /// the tables' lock, so a withdrawal finds it there or prevents it.
    fn map(&self, slice: &Slice, page: GuestPage, offset: u64, rights: Rights) {
        self.change_tables(slice.node, |tables| {
            if slice.is_present() {
                tables.map(page, slice.hpa(offset), rights);
            }
        });
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
    ) -> Result<Resolution, CoherenceError> {
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
        granted: impl FnOnce(usize),
    ) -> Result<Resolution, CoherenceError> {
        let Some((slice, offset)) = self.slices.present(gpa) else {
            return Ok(Resolution::NotMemory);
        };
        let (Some(Membership { map, member }), Some(linear)) =
            (&self.membership, self.slices.linear(gpa))
        else {
            let within = offset % LARGE_PAGE_SIZE;
            let page = GuestPage::Large(Gpa(gpa.0 - within));
            self.map(slice, page, offset - within, Rights::ALL);
            return Ok(Resolution::Mapped);
        };
        let frame = usize::try_from(linear / PAGE_SIZE).expect("64-bit");
        // Another core of this node may have been faster.
        if self.tables.lock().rights(gpa).contains(access.needs()) {
            granted(frame);
            return Ok(Resolution::Mapped);
        }
        let mut fault = map.fault(*member, frame, access)?;
        let ticks = |us: u64| us * u64::from(self.tsc_khz) / 1000;
        let mut interval = ticks(REMIND_FIRST_US);
        let mut rung_at: Option<u64> = None;
        loop {
            match fault.poll()? {
                Step::Granted(grant) => {
                    self.apply(&grant);
                    granted(frame);
                    let mut counted = Counters::default();
                    counted.note(&grant);
                    self.counters.add_coherence(&counted);
                    return fault.complete().map(|()| Resolution::Mapped);
                }
                Step::Revoking(nodes) if rung_at.is_none() => {
                    rung_at = Some(cpu::rdtsc());
                    self.bells.ring_nodes(nodes);
                }
                Step::Revoking(_) | Step::Busy => {}
            }
            for node in self.bells.lost() {
                // As this one, in its first life.
                let epoch = member.epoch;
                map.fence(Member { node, epoch })?;
            }
            let now = cpu::rdtsc();
            if rung_at.is_some_and(|then| now.wrapping_sub(then) > interval) {
                rung_at = Some(now);
                interval = (2 * interval).min(ticks(REMIND_LAST_US));
                self.bells.ring_nodes(fault.nudge());
            }
            self.serve()?;
            core::hint::spin_loop();
        }
    }

    fn apply(&self, grant: &Grant) {
        if grant.must_refresh
            && let Some((_, slice, offset)) = self.page(grant.unit)
        {
            let offset = usize::try_from(offset).expect("64-bit");
            refresh(&slice.memory, offset).expect("frames lie inside slices");
        }
        self.install(grant.unit, grant.rights);
        if grant.must_flush {
            self.flush();
        }
    }

    /// A core's guest has left it for an interrupt, at `place`.
    ///
    /// # Errors
    /// As [`serve`](Self::serve).
    pub fn guest_was_interrupted(&self, core: usize, place: Place) -> Result<(), CoherenceError> {
        self.change_hold(core, |hold| hold.interrupted(place))
    }

    /// A core's guest has executed an instruction.
    ///
    /// # Errors
    /// As [`serve`](Self::serve).
    pub fn guest_got_on(&self, core: usize) -> Result<(), CoherenceError> {
        self.change_hold(core, Hold::end)
    }

    /// Whoever waits for what the core has held is served when it ends.
    fn change_hold(
        &self,
        core: usize,
        change: impl FnOnce(&mut Hold),
    ) -> Result<(), CoherenceError> {
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
            || self.withdrawals.next().is_some()
    }

    /// Unmaps what is being taken away from the guest.
    fn withdraw(&self) {
        let Some(number) = self.withdrawals.next() else {
            return;
        };
        for slice in self.slices.iter().filter(|slice| slice.is_leaving()) {
            let pieces = slice.memory.len() as u64 / LARGE_PAGE_SIZE;
            self.change_tables(slice.node, |tables| {
                for piece in 0..pieces {
                    let gpa = Gpa(slice.gpa.0 + piece * LARGE_PAGE_SIZE);
                    tables.restrict(GuestPage::Large(gpa), Rights::NONE);
                }
            });
        }
        self.flush();
        if self.withdrawals.done(number) {
            self.bells.tell_withdrawn();
        }
    }

    /// Gives up what is taken away from the guest, and what other nodes have
    /// asked for and no core holds. Never waits for them.
    ///
    /// # Errors
    /// If a request makes no sense.
    pub fn serve(&self) -> Result<(), CoherenceError> {
        self.withdraw();
        let Some(Membership { map, member }) = &self.membership else {
            return Ok(());
        };
        if !map.has_revocations(*member) {
            return Ok(());
        }
        while let Some(revocation) =
            map.next_revocation_if(*member, |it| self.may_serve(it.unit))?
        {
            if let Some((page, slice, _)) = self.page(revocation.unit) {
                self.change_tables(slice.node, |tables| tables.restrict(page, revocation.keep));
            }
            self.flush();
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

    /// What the hypervisor writes for a device may be code elsewhere, or have
    /// been: it needs the right to write like the guest itself.
    fn write_bytes(&self, gpa: Gpa, from: &[u8]) -> Result<(), GuestMemoryError> {
        if self.membership.is_none() {
            return self.slices.write_bytes(gpa, from);
        }
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
        if self.membership.is_none() {
            return self.slices.write_bytes(gpa, from);
        }
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
