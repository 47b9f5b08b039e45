//! What this node shares with the launcher and the other nodes.

use alloc::vec::Vec;
use core::ptr::NonNull;
use core::sync::atomic::Ordering;

use vmm_shared::addr::{NodeId, VcpuId};
use vmm_shared::control::{ControlRegion, Counter, LAUNCHER_PEER, NodeState, RingId, VmState};
use vmm_shared::region::{CONTENT_OFFSET, RegionError, RegionHeader, RegionKind};
use vmm_shared::shm::SharedMem;

use crate::arch::descriptors::DOORBELL_VECTOR;
use crate::arch::pci::{self, Window, WindowKind};

/// Why a node can't take part in its rack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FabricError {
    /// No region of this kind among the node's devices.
    Missing(RegionKind),
    /// A region whose header is not acceptable.
    Region(RegionError),
    /// The regions are not all of one rack.
    ForeignRegion(RegionKind),
    /// The control region is too small to be one.
    ControlTooSmall,
    /// The launcher has placed this node's id beyond the table.
    BadNodeId(NodeId),
}

/// The regions of the rack as mapped here.
#[derive(Debug)]
pub struct Regions {
    /// The control region.
    pub control: ControlRegion,
    /// Memory for the VM, without the header.
    pub memory: SharedMem,
    /// The root image without its header, if there is one.
    pub image: Option<SharedMem>,
}

/// Control region and doorbell of this node.
#[derive(Debug)]
pub struct Fabric {
    node: NodeId,
    control: ControlRegion,
    doorbell: Option<Window>,
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
    let (_, memory_header, memory) = need(RegionKind::Memory)?;
    if memory_header.uuid != control_header.uuid {
        return Err(FabricError::ForeignRegion(RegionKind::Memory));
    }
    let truncated = FabricError::Region(RegionError::NotARegion);
    let image = match find(RegionKind::Image) {
        Some((_, header, image)) => Some(content(*image, header).ok_or(truncated)?),
        None => None,
    };
    Ok(Regions {
        control: ControlRegion::new(*control).ok_or(FabricError::ControlTooSmall)?,
        memory: content(*memory, memory_header).ok_or(truncated)?,
        image,
    })
}

impl Fabric {
    /// Joins the rack: from now on peers can ring this node's doorbell, on
    /// the core `apic_id`.
    ///
    /// # Errors
    /// If the node's id has no place in the control region.
    pub fn join(
        node: NodeId,
        control: ControlRegion,
        windows: &[Window],
        apic_id: u8,
    ) -> Result<Self, FabricError> {
        let find =
            |wanted: fn(&WindowKind) -> bool| windows.iter().find(|window| wanted(&window.kind));
        let doorbell = find(|kind| matches!(kind, WindowKind::Doorbell)).cloned();
        if let Some(table) = find(|kind| matches!(kind, WindowKind::InterruptTable { .. })) {
            pci::enable_interrupt(table, DOORBELL_VECTOR, apic_id);
        }
        let fabric = Self {
            node,
            control,
            doorbell,
        };
        if control.node_state(node).is_none() {
            return Err(FabricError::BadNodeId(node));
        }
        fabric.set_state(NodeState::Joined);
        Ok(fabric)
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
            pci::ring(doorbell, LAUNCHER_PEER);
        }
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
            // One writer: no atomic addition is needed.
            word.store(word.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
    }
}
