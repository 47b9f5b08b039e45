//! Guest memory as one node maps it.
//!
//! Where instruction fetch is coherent between hosts, or there is one host,
//! everything is mapped with all rights from the start. Elsewhere
//! [`coherence`](vmm_shared::coherence) decides which node may write a page
//! and which may execute it; this is where its decisions meet the nested page
//! tables. Whoever waits here serves the other nodes meanwhile, so nodes never
//! wait for each other in a circle.

use core::sync::atomic::{AtomicU64, Ordering};

use spin::Mutex;
use vmm_shared::addr::{Gpa, Hpa, PAGE_SIZE};
use vmm_shared::coherence::{
    Access, CoherenceError, CoherenceMap, Grant, Member, NodeSet, Rights, Step, Unit, refresh,
};

use super::barrier::EntryBarrier;
use super::guest::{GuestMemory, GuestMemoryError};
use super::slices::{Slice, Slices};
use crate::arch::svm::npt::{GuestPage, NestedTables};

/// Polls after which nodes that have not answered are reminded.
const REMIND_AFTER: u32 = 1 << 20;

/// How this node reaches others and its own cores.
pub trait Bells: core::fmt::Debug {
    /// Makes a core of this node leave the guest.
    fn kick_core(&self, core: usize);
    /// Makes other nodes look at their revocations.
    fn ring_nodes(&self, nodes: NodeSet);
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
    bells: B,
    transitions: AtomicU64,
    served: AtomicU64,
}

impl<B: Bells> MappedMemory<B> {
    /// Memory under these tables; with a membership, the tables map only what
    /// it says.
    pub fn new(
        slices: Slices,
        tables: NestedTables,
        cores: usize,
        membership: Option<Membership>,
        bells: B,
    ) -> Self {
        Self {
            slices,
            tables: Mutex::new(tables),
            barrier: EntryBarrier::new(cores),
            membership,
            bells,
            transitions: AtomicU64::new(0),
            served: AtomicU64::new(0),
        }
    }

    /// The way to other nodes and cores.
    pub fn bells(&self) -> &B {
        &self.bells
    }

    /// Changes of state that cost other nodes something, and revocations
    /// served for them, since the start.
    pub fn counts(&self) -> (u64, u64) {
        (
            self.transitions.load(Ordering::Relaxed),
            self.served.load(Ordering::Relaxed),
        )
    }

    /// Takes all memory that nobody has touched, for the node that has loaded
    /// the guest and will run it alone for a while.
    ///
    /// # Errors
    /// If the shared state is damaged.
    pub fn claim_all(&self) -> Result<(), CoherenceError> {
        let Some(Membership { map, member }) = &self.membership else {
            return Ok(());
        };
        let frames = self
            .slices
            .iter()
            .map(|slice| slice.memory.len() as u64)
            .sum::<u64>();
        let pieces = usize::try_from(frames / vmm_shared::addr::LARGE_PAGE_SIZE).unwrap_or(0);
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
            let hpa = Hpa(slice.memory.as_ptr().addr() as u64 + offset);
            self.tables.lock().map(page, hpa, rights);
        }
    }

    /// Makes an access possible that the nested tables have refused.
    ///
    /// # Errors
    /// If the shared state is damaged or this node has been fenced.
    pub fn fault(&self, gpa: Gpa, access: Access) -> Result<Resolution, CoherenceError> {
        let (Some(Membership { map, member }), Some(linear)) =
            (&self.membership, self.slices.linear(gpa))
        else {
            return Ok(Resolution::NotMemory);
        };
        // Another core of this node may have been faster.
        if self.tables.lock().rights(gpa).contains(access.needs()) {
            return Ok(Resolution::Mapped);
        }
        let frame = usize::try_from(linear / PAGE_SIZE).expect("64-bit");
        let mut fault = map.fault(*member, frame, access)?;
        let mut polls = 0_u32;
        let mut asked = NodeSet::EMPTY;
        loop {
            match fault.poll()? {
                Step::Granted(grant) => {
                    self.apply(&grant);
                    return fault.complete().map(|()| Resolution::Mapped);
                }
                Step::Revoking(nodes) if asked.is_empty() => {
                    asked = nodes;
                    self.bells.ring_nodes(nodes);
                }
                Step::Revoking(_) | Step::Busy => {}
            }
            self.serve()?;
            for node in self.bells.lost() {
                // As this one, in its first life.
                let epoch = member.epoch;
                map.fence(Member { node, epoch })?;
            }
            polls = polls.wrapping_add(1);
            if polls.is_multiple_of(REMIND_AFTER) {
                self.bells.ring_nodes(fault.nudge());
            }
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
            self.barrier.advance(|core| self.bells.kick_core(core));
        }
        if !grant.asked.is_empty() {
            self.transitions.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Gives up what other nodes have asked for. Never waits for them.
    ///
    /// # Errors
    /// If a request makes no sense.
    pub fn serve(&self) -> Result<(), CoherenceError> {
        let Some(Membership { map, member }) = &self.membership else {
            return Ok(());
        };
        while map.has_revocations(*member)
            && let Some(revocation) = map.next_revocation(*member)?
        {
            if let Some((page, ..)) = self.page(revocation.unit) {
                self.tables.lock().restrict(page, revocation.keep);
            }
            self.barrier.advance(|core| self.bells.kick_core(core));
            map.acknowledge(*member, &revocation);
            self.served.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl<B: Bells> GuestMemory for MappedMemory<B> {
    fn read_bytes(&self, gpa: Gpa, into: &mut [u8]) -> Result<(), GuestMemoryError> {
        self.slices.read_bytes(gpa, into)
    }

    /// What the hypervisor writes for a device may be code elsewhere, or have
    /// been: it needs the right to write like the guest itself.
    fn write_bytes(&self, gpa: Gpa, from: &[u8]) -> Result<(), GuestMemoryError> {
        if self.membership.is_some() && !from.is_empty() {
            let error = GuestMemoryError {
                gpa,
                len: from.len(),
            };
            let end = gpa.checked_add(from.len() as u64).ok_or(error)?;
            let mut frame = gpa.align_down(PAGE_SIZE);
            while frame < end {
                match self.fault(frame, Access::Write) {
                    Ok(Resolution::Mapped) => {}
                    Ok(Resolution::NotMemory) | Err(_) => return Err(error),
                }
                frame = Gpa(frame.0 + PAGE_SIZE);
            }
        }
        self.slices.write_bytes(gpa, from)
    }
}
