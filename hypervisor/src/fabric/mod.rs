//! What this node shares with the launcher and the other nodes.

pub mod clock;
pub mod cluster;
pub mod forward;
pub mod keeper;
pub mod proof;

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ptr::NonNull;
use core::sync::atomic::Ordering;

use vmm_shared::addr::{Location, NodeId, VcpuId};
use vmm_shared::coherence::NodeSet;
use vmm_shared::control::{
    BootConfig, ControlRegion, Counter, LAUNCHER_PEER, NodeShare, NodeState, RingId, VmState,
};
use vmm_shared::membership::JoinError;
use vmm_shared::pieces::PieceMap;
use vmm_shared::region::{CONTENT_OFFSET, RegionError, RegionHeader, RegionKind};
use vmm_shared::shm::SharedMem;

use self::cluster::ClusterMember;
use self::keeper::{Held, Keeper};
use crate::arch::descriptors::{DOORBELL_VECTOR, KICK_VECTOR};
use crate::arch::pci::{self, Window, WindowKind};
use crate::arch::time::Clocks;
use crate::arch::{apic, cpu};
use crate::mem::coherent::Bells;
use crate::vcpu::posted::PostedInterrupts;
use crate::vm::DEVICE_CORE;

/// Why a node can't take part in its rack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FabricError {
    /// No region of this kind among the node's devices.
    #[error("the {0} is missing")]
    Missing(RegionKind),
    /// A region whose header is not acceptable.
    #[error("{0}")]
    Region(RegionError),
    /// The regions are not all of one rack.
    #[error("the {0} belongs to another rack")]
    ForeignRegion(RegionKind),
    /// The control region is too small to be one.
    #[error("the control region is too small to be one")]
    ControlTooSmall,
    /// The others would not have this node.
    #[error("{0}")]
    Join(JoinError),
    /// The doorbell knows this node by another id.
    #[error("the doorbell server knows this node as {given}")]
    PeerId {
        /// The id it has given.
        given: u32,
    },
    /// The map of guest memory is not the VM's.
    #[error("the map of guest memory does not fit the VM")]
    NoPieces,
    /// No memory region of this node.
    #[error("the memory region of node {} is missing", .0.0)]
    NoMemoryOf(NodeId),
    /// Two memory regions of one node.
    #[error("node {} gives two memory regions", .0.0)]
    TwoMemoriesOf(NodeId),
}

/// The regions of the rack as mapped here.
#[derive(Debug)]
pub struct Regions {
    /// The control region.
    pub control: ControlRegion,
    /// Memory for the VM, without the header, of each node in order.
    pub memories: Vec<SharedMem>,
    /// The root image without its header, if there is one.
    pub image: Option<SharedMem>,
}

/// Control region and doorbell of this node.
#[derive(Debug)]
pub struct Fabric {
    node: NodeId,
    /// APIC ids of this node's cores.
    cores: Vec<u8>,
    control: ControlRegion,
    doorbell: Option<Window>,
    keeper: Keeper,
    /// A node that is alone has none.
    cluster: Option<Box<ClusterMember>>,
    /// What each node gives.
    shares: Vec<NodeShare>,
    /// Where guest memory is.
    pieces: PieceMap,
    /// The nodes that run no vCPUs.
    deciding: NodeSet,
}

fn content(region: SharedMem, header: &RegionHeader) -> Option<SharedMem> {
    let offset = usize::try_from(CONTENT_OFFSET).ok()?;
    region.window(offset, usize::try_from(header.content_len).ok()?)
}

#[expect(unsafe_code, reason = "a window becomes a region")]
fn shared_memory(window: &Window) -> Option<SharedMem> {
    let base = usize::try_from(window.range.start.0).ok()?;
    let len = usize::try_from(window.range.end.0 - window.range.start.0).ok()?;
    let base = NonNull::new(core::ptr::with_exposed_provenance_mut(base))?;
    // SAFETY: 1. boot has mapped all region windows, for ever; 2. windows are
    // page-aligned; 3. only `SharedMem` looks into them.
    Some(unsafe { SharedMem::new(base, len) })
}

/// Recognises the regions among the windows by their headers.
///
/// # Errors
/// Says which region is missing or unfit.
pub fn find_regions(windows: &[Window]) -> Result<Regions, FabricError> {
    let mut found: Vec<(RegionKind, RegionHeader, SharedMem)> = Vec::new();
    for window in windows
        .iter()
        .filter(|window| matches!(window.kind, WindowKind::Region))
    {
        let Some(memory) = shared_memory(window) else {
            continue;
        };
        let (kind, header) = RegionHeader::check(&memory).map_err(FabricError::Region)?;
        found.push((kind, header, memory));
    }
    let find = |wanted| found.iter().find(|(kind, ..)| *kind == wanted);
    let need = |kind| find(kind).ok_or(FabricError::Missing(kind));

    let (_, control_header, control) = need(RegionKind::Control)?;
    let truncated = FabricError::Region(RegionError::NotARegion);
    let control = ControlRegion::new(*control).ok_or(FabricError::ControlTooSmall)?;
    let nodes = u16::try_from(control.boot_config().nodes).unwrap_or(u16::MAX);
    let memories = (0..nodes)
        .map(|node| {
            let is_its = |(kind, header, _): &&(RegionKind, RegionHeader, SharedMem)| {
                *kind == RegionKind::Memory && header.owner == u32::from(node)
            };
            let mut its = found.iter().filter(is_its);
            let (_, header, memory) = its.next().ok_or(FabricError::NoMemoryOf(NodeId(node)))?;
            if its.next().is_some() {
                return Err(FabricError::TwoMemoriesOf(NodeId(node)));
            }
            if header.uuid != control_header.uuid {
                return Err(FabricError::ForeignRegion(RegionKind::Memory));
            }
            content(*memory, header).ok_or(truncated)
        })
        .collect::<Result<_, _>>()?;
    let image = match find(RegionKind::Image) {
        Some((_, header, image)) => Some(content(*image, header).ok_or(truncated)?),
        None => None,
    };
    Ok(Regions {
        control,
        memories,
        image,
    })
}

impl Bells for Fabric {
    fn node(&self) -> NodeId {
        self.node
    }

    fn kick_core(&self, core: usize) {
        if let Some(apic_id) = self.cores.get(core) {
            apic::kick(*apic_id);
        }
    }

    fn ring_nodes(&self, nodes: NodeSet) {
        for node in nodes {
            self.kick(Location { node, core: 0 });
        }
    }

    fn lost(&self) -> NodeSet {
        self.attend();
        self.keeper.lost()
    }

    fn is_out(&self) -> bool {
        self.keeper.is_out()
    }
}

impl Fabric {
    /// Joins the rack: from now on peers can ring this node's doorbells, one
    /// for each of its cores (APIC ids).
    ///
    /// # Errors
    /// If the node's id has no place in the control region, is taken, or is
    /// not the one by which peers would ring it.
    pub fn join(
        node: NodeId,
        control: ControlRegion,
        windows: &[Window],
        cores: Vec<u8>,
        clocks: &Clocks,
        config: &BootConfig,
    ) -> Result<Self, FabricError> {
        let find =
            |wanted: fn(&WindowKind) -> bool| windows.iter().find(|window| wanted(&window.kind));
        let doorbell = find(|kind| matches!(kind, WindowKind::Doorbell)).cloned();
        if let Some(doorbell) = &doorbell
            && pci::peer_id(doorbell) != u32::from(node.0)
        {
            return Err(FabricError::PeerId {
                given: pci::peer_id(doorbell),
            });
        }
        let membership = control.membership();
        let life = membership.join(node).map_err(FabricError::Join)?;
        if let Some(table) = find(|kind| matches!(kind, WindowKind::InterruptTable { .. })) {
            pci::enable_interrupts(table, DOORBELL_VECTOR, KICK_VECTOR, &cores);
        }
        let nodes = u16::try_from(config.nodes).unwrap_or(0);
        let shares = config.shares.get(..usize::from(nodes)).unwrap_or_default();
        let pieces = control.pieces(config).ok_or(FabricError::NoPieces)?;
        // What an earlier life of this node has begun is over.
        pieces.forget(node);
        let cluster = ClusterMember::attach(life, &control, config, clocks, doorbell.as_ref());
        let fabric = Self {
            node,
            cores,
            control,
            doorbell,
            cluster,
            keeper: Keeper::new(membership, life, clocks.tsc_khz),
            shares: shares.to_vec(),
            pieces,
            deciding: config.control_nodes(),
        };
        fabric.set_state(NodeState::Joined);
        Ok(fabric)
    }

    /// The pages in which a node of this rack proves its platform.
    ///
    /// # Panics
    /// If there is no such node.
    #[must_use]
    pub fn proof(&self, node: NodeId) -> proof::Pages {
        let memory = self.control.proof(node).expect("nodes have been counted");
        proof::Pages::new(memory).expect("two pages are enough")
    }

    /// The nodes of the rack.
    pub fn nodes(&self) -> impl Iterator<Item = NodeId> + Clone + use<> {
        let nodes = u16::try_from(self.shares.len()).expect("at most 64");
        (0..nodes).map(NodeId)
    }

    /// Where the pieces of guest memory are.
    #[must_use]
    pub const fn pieces(&self) -> &PieceMap {
        &self.pieces
    }

    /// Begins to watch the others, which have all joined, and to follow the
    /// cluster's log.
    pub fn start_watch(&self) {
        let others = self
            .nodes()
            .filter(|node| *node != self.node)
            .fold(NodeSet::EMPTY, NodeSet::with);
        self.keeper.start(others, cpu::rdtsc());
        if let Some(cluster) = &self.cluster {
            cluster.join();
        }
    }

    /// Gives a sign of life and looks at the others', when it is time.
    pub fn attend(&self) {
        if let Some(lost) = self.keeper.attend(cpu::rdtsc()) {
            self.report(lost);
            self.follow_cluster();
        }
    }

    /// Does what a ring of the doorbell may be about: somebody has been put
    /// out, or waits for this node to follow the log.
    pub fn look_for_losses(&self) {
        self.report(self.keeper.look());
        self.follow_cluster();
    }

    fn follow_cluster(&self) {
        if let Some(cluster) = &self.cluster {
            cluster.tick();
        }
    }

    /// This node's part in the cluster; none if it is alone.
    #[must_use]
    pub fn cluster(&self) -> Option<&ClusterMember> {
        self.cluster.as_deref()
    }

    fn report(&self, lost: NodeSet) {
        if lost.is_empty() {
            return;
        }
        for node in lost {
            log::warn!("node {} is lost", node.0);
            self.note_loss(node);
        }
        // Waits for the log; the guest is told of all before.
        if let Some(cluster) = &self.cluster {
            lost.for_each(|node| cluster.evict(node));
        }
        if self.held().is_some() {
            self.control.freeze_vm();
            (0..self.cores.len()).for_each(|core| self.kick_core(core));
        }
        self.ring_launcher();
    }

    /// Notes what the guest has lost with a node, if it goes on without it.
    fn note_loss(&self, node: NodeId) {
        let goes_on = self.control.vm().vital_pieces().is_some();
        if goes_on && !self.control.needs(node, &self.pieces) {
            let vcpus = self.control.vcpus_on(node);
            self.control.losses().note(node, vcpus);
        }
    }

    /// Why no vCPU may run here, if none may.
    #[must_use]
    pub fn held(&self) -> Option<Held> {
        self.keeper
            .held(|node| self.control.needs(node, &self.pieces))
    }

    /// The TSC at which [`attend`](Self::attend) has something to do, if ever.
    #[must_use]
    pub fn next_due(&self) -> Option<u64> {
        self.keeper.next_due()
    }

    /// Which node this is.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// Makes a core leave the guest or its sleep, wherever it is.
    pub fn kick(&self, core: Location) {
        let share = self.shares.get(usize::from(core.node.0));
        if share.is_none_or(|share| u32::from(core.core) >= share.cores) {
            self.refuse_garbage(1);
        } else if core.node != self.node {
            if let Some(doorbell) = &self.doorbell {
                pci::ring(doorbell, core.node.0, core.core);
            }
        } else if let Some(apic_id) = self.cores.get(usize::from(core.core)) {
            apic::kick(*apic_id);
        }
    }

    /// Counts what this node has found in shared memory, and refused.
    pub fn refuse_garbage(&self, words: u64) {
        self.control.count_garbage(self.node, words);
    }

    /// What is requested of a vCPU; the id must be one of the VM's.
    ///
    /// # Panics
    /// If the id is beyond the control region's table.
    #[must_use]
    pub fn posted(&self, vcpu: VcpuId) -> PostedInterrupts {
        let home = self
            .control
            .vcpu_home(vcpu)
            .expect("the VM's vCPUs have homes");
        PostedInterrupts::new(home).expect("homes are large enough")
    }

    /// Room for all the state of a vCPU that moves.
    ///
    /// # Panics
    /// If the id is beyond the control region's table.
    #[must_use]
    pub fn image(&self, vcpu: VcpuId) -> SharedMem {
        let image = self.control.vcpu_image(vcpu);
        image.expect("the VM's vCPUs have room for images")
    }

    /// How many vCPUs have been sent to cores of this node.
    #[must_use]
    pub fn arrivals(&self) -> u64 {
        let record = self.control.node(self.node);
        let record = record.expect("`join` has checked the id");
        // Acquire: the records that say so are visible.
        record.arrivals().load(Ordering::Acquire)
    }

    /// Tells a core that a record says that a vCPU has been sent to it.
    pub fn announce_arrival(&self, at: Location) {
        if let Some(record) = self.control.node(at.node) {
            // Release: who sees the count sees the record.
            record.arrivals().fetch_add(1, Ordering::Release);
        }
        self.kick(at);
    }

    /// Makes the devices' node look at the orders.
    pub fn tell_devices(&self) {
        self.control.vm().count_order();
        self.kick(DEVICE_CORE);
    }

    /// The nodes that run the VM and have not been lost.
    #[must_use]
    pub fn running(&self) -> NodeSet {
        let lost = self.keeper.lost();
        self.nodes()
            .filter(|node| !self.deciding.contains(*node) && !lost.contains(*node))
            .fold(NodeSet::EMPTY, NodeSet::with)
    }

    /// Whether a core is one of this rack, and its node has not been lost.
    #[must_use]
    pub fn has_core(&self, at: Location) -> bool {
        let share = self.shares.get(usize::from(at.node.0));
        share.is_some_and(|share| u32::from(at.core) < share.cores)
            && !self.deciding.contains(at.node)
            && !self.keeper.lost().contains(at.node)
    }

    /// Another vCPU's slot for device accesses.
    ///
    /// # Panics
    /// If the id is beyond the control region's table.
    #[must_use]
    pub fn slot(&self, vcpu: VcpuId) -> forward::Slot {
        let home = self
            .control
            .vcpu_home(vcpu)
            .expect("the VM's vCPUs have homes");
        forward::Slot::new(home).expect("homes are large enough")
    }

    /// The control region.
    #[must_use]
    pub fn control(&self) -> &ControlRegion {
        &self.control
    }

    /// Publishes how far this node has come.
    pub fn set_state(&self, state: NodeState) {
        let word = self
            .control
            .node_state(self.node)
            .expect("`join` has checked the id");
        // Release: what the node did before is visible to who sees the state.
        word.store(state as u32, Ordering::Release);
        self.ring_launcher();
    }

    /// Publishes what has become of the VM.
    pub fn set_vm_state(&self, state: VmState) {
        self.control
            .vm_state()
            .store(state as u32, Ordering::Release);
        self.ring_launcher();
    }

    /// Wakes the launcher.
    pub fn ring_launcher(&self) {
        if let Some(doorbell) = &self.doorbell {
            pci::ring(doorbell, LAUNCHER_PEER, 0);
        }
    }

    /// Wakes those who wait for what becomes of orders: the launcher, and the
    /// nodes that decide.
    pub fn tell_of_orders(&self) {
        self.ring_launcher();
        self.ring_nodes(self.deciding);
    }

    /// Appends to a ring that the launcher reads; returns how much fitted.
    pub fn write(&self, ring: RingId, bytes: &[u8]) -> usize {
        let ring = self.control.ring(ring);
        let written = ring.write(bytes);
        if ring.must_wake_consumer() {
            self.ring_launcher();
        }
        written
    }

    /// Takes from a ring that the launcher fills; returns how much there was.
    pub fn read(&self, ring: RingId, into: &mut [u8]) -> usize {
        let ring = self.control.ring(ring);
        let read = ring.read(into);
        if ring.must_wake_producer() {
            self.ring_launcher();
        }
        read
    }

    /// Counts an event of a vCPU. Only the node that runs the vCPU does.
    pub fn count(&self, vcpu: VcpuId, counter: Counter) {
        if let Some(word) = self.control.counter(vcpu, counter) {
            // One writer: no atomic addition is needed. A peer's garbage may
            // be anything.
            let count = word.load(Ordering::Relaxed).wrapping_add(1);
            word.store(count, Ordering::Relaxed);
        }
    }
}
