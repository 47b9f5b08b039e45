//! A rack as it is seen from outside.

use std::time::Duration;

use vmm_shared::addr::{NodeId, VcpuId};
use vmm_shared::control::{Digest, NodeState, VmState};

use crate::hot_memory::HotMemory;
use crate::preflight::Accelerator;
use crate::spec::{Role, VmSpec};

/// A rack as it is now.
#[derive(Clone, Debug)]
pub struct RackStatus {
    /// How nodes execute code.
    pub accelerator: Accelerator,
    /// Its nodes.
    pub nodes: Vec<NodeStatus>,
    /// What the VM is doing.
    pub vm: VmState,
    /// The size that it was started with.
    pub vm_spec: VmSpec,
    /// Its vCPUs now.
    pub vcpus: VcpuNumbers,
    /// Bytes of shared memory that only serve to share the rest: what has
    /// been touched of the control region, without the files to boot.
    pub metadata: u64,
    /// Its memory now.
    pub memory: MemoryNumbers,
    /// Since the rack was started.
    pub uptime: Duration,
}

/// How many vCPUs a VM has, as each side sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuNumbers {
    /// What the operator wants.
    pub desired: u32,
    /// What the nodes have given it.
    pub granted: u32,
    /// What the guest has started.
    pub seen: u32,
    /// What there is room for.
    pub most: u32,
}

/// How much memory a VM has, in bytes, as each side sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryNumbers {
    /// What the operator wants.
    pub desired: u64,
    /// What the nodes have given it.
    pub granted: u64,
    /// What the guest has taken into use.
    pub seen: u64,
    /// What there is room for.
    pub most: u64,
}

/// A node as it is now.
#[derive(Clone, Debug)]
pub struct NodeStatus {
    /// Which.
    pub id: NodeId,
    /// How far it has come; `None` if it wrote nonsense.
    pub state: Option<NodeState>,
    /// Its cores.
    pub cores: u32,
    /// vCPUs that it runs.
    pub vcpus: u32,
    /// The VM's memory on it.
    pub memory: NodeMemory,
    /// What has come since the start, or could.
    pub hot_memory: HotMemory,
    /// The process that is the node.
    pub pid: i32,
    /// It has been put out of the rack.
    pub is_out: bool,
    /// What it is for.
    pub role: Role,
    /// What it says of its replica of the cluster's tables, once it has one.
    pub digest: Option<Digest>,
    /// Names and values of what it has counted, in the order of
    /// [`NodeCounters::values`](vmm_shared::control::NodeCounters::values).
    pub counters: Vec<(&'static str, u64)>,
    /// Interrupts that its vCPUs have sent to vCPUs on each node.
    pub ipis_to: Vec<u64>,
}

/// Memory of the VM, as far as it has to do with a node. In bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeMemory {
    /// What the node gives now.
    pub gives: u64,
    /// What the VM was started with and the guest takes to be near the node, as
    /// it was told when it booted; that stays, wherever the memory moves.
    pub home: u64,
    /// Where that begins in the VM's memory; the gap below 4 GiB is not
    /// counted.
    pub home_offset: u64,
    /// What other nodes give now of that, and of what has come since.
    pub away: u64,
    /// What the node could give in all.
    pub room: u64,
    /// What it has taken over from other nodes so far.
    pub taken: u64,
    /// For how long copying that took, in µs.
    pub copying_us: u64,
    /// The longest time for which a piece of it was out of the guest's reach,
    /// in µs.
    pub longest_us: u64,
}

/// What one vCPU has counted.
#[derive(Clone, Debug)]
pub struct VcpuCounters {
    /// Which.
    pub id: VcpuId,
    /// The node that runs it.
    pub node: NodeId,
    /// The core of that node, counted from 0.
    pub core: u32,
    /// "granted", "started" (by the guest) or "moving".
    pub state: &'static str,
    /// How often it has moved.
    pub moves: u64,
    /// For how long its last move kept it from running, in µs.
    pub blackout_us: u64,
    /// Where it was at its last exit.
    pub rip: u64,
    /// Names and values, in the order of
    /// [`Counter::ALL`](vmm_shared::control::Counter::ALL).
    pub values: Vec<(&'static str, u64)>,
}
