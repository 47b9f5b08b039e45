//! Which node of the rack gives what to the VM, and what follows from it for
//! the guest: the numbers of its vCPUs and the places of its memory.
//!
//! To the guest a node is a proximity domain and a CPU package. vCPUs are
//! counted through all nodes in order. Software finds the package of a CPU by a
//! shift of its APIC id, so the ids have gaps unless all nodes but the last
//! give equally many vCPUs, and those a power of two:
//!
//! ```text
//!   APIC id = domain << core bits | core      core bits: enough for any node
//! ```
//!
//! With one node, APIC ids are the vCPUs' numbers.

use alloc::vec;
use alloc::vec::Vec;

use vmm_shared::addr::{ApicId, Gpa, LARGE_PAGE_SIZE, MAX_NODES, MAX_VCPUS, VcpuId};
use vmm_shared::control::{BLOCK_SIZE, BlockId, MAX_BLOCKS};

use super::RamRange;
use super::layout::{self, MemorySizeError};

/// The first APIC id that is no CPU's: 255 means all CPUs where ids have 8
/// bits, as in the IOAPIC.
const APIC_ID_LIMIT: u32 = 255;

/// What one node of the rack gives to the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlatformNode {
    /// vCPUs that it has room for; none if the node only gives memory.
    pub vcpus: u16,
    /// RAM in bytes, a multiple of 2 MiB; 0 if the node only gives vCPUs.
    pub memory: u64,
}

/// A node as the guest knows it: its place in the VM's list of nodes, which is
/// the number of its proximity domain and of its package.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Domain(pub u16);

/// The VM's shape, as far as it is possible: see [`TopologyError`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    nodes: Vec<PlatformNode>,
    /// For each node, how many vCPUs come before its own; then all vCPUs.
    first_vcpu: Vec<u16>,
    /// For each node, how many of its vCPUs are there from the start.
    present: Vec<u16>,
    /// For each node, how many blocks of memory it may give later.
    blocks: Vec<u32>,
    core_bits: u32,
}

/// Why there can be no VM of some shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    /// More than [`MAX_NODES`].
    #[error("{nodes} nodes are too many")]
    TooManyNodes {
        /// Nodes asked for.
        nodes: usize,
    },
    /// No node gives a vCPU.
    #[error("no node gives a vCPU")]
    NoVcpus,
    /// More than [`MAX_VCPUS`].
    #[error("{vcpus} vCPUs are too many")]
    TooManyVcpus {
        /// vCPUs asked for.
        vcpus: u32,
    },
    /// So unequal nodes that some vCPU's APIC id would not be below 255.
    #[error(
        "the nodes are so unequal that a vCPU would have the APIC id {apic_id}, and 254 is the last; spread the vCPUs more evenly"
    )]
    ApicIdTooLarge {
        /// The largest id.
        apic_id: u32,
    },
    /// The VM's RAM, or one node's part of it, has an impossible size.
    #[error("{0}")]
    Memory(MemorySizeError),
    /// More memory may come than there are devices or addresses for.
    #[error("there is no room for {blocks} blocks of memory to come; give the nodes less memory")]
    TooManyBlocks {
        /// Blocks asked for.
        blocks: u64,
    },
}

impl Topology {
    /// The shape of a VM to which these nodes give something.
    ///
    /// # Errors
    /// Why that is not possible.
    pub fn new(nodes: Vec<PlatformNode>) -> Result<Self, TopologyError> {
        if nodes.len() > MAX_NODES {
            return Err(TopologyError::TooManyNodes { nodes: nodes.len() });
        }
        let vcpus: u32 = nodes.iter().map(|node| u32::from(node.vcpus)).sum();
        if vcpus == 0 {
            return Err(TopologyError::NoVcpus);
        }
        if vcpus as usize > MAX_VCPUS {
            return Err(TopologyError::TooManyVcpus { vcpus });
        }
        check_memory(&nodes).map_err(TopologyError::Memory)?;

        let mut first_vcpu = vec![0];
        first_vcpu.extend(nodes.iter().scan(0, |next, node| {
            *next += node.vcpus;
            Some(*next)
        }));
        let largest = nodes.iter().map(|node| node.vcpus).max().unwrap_or(0);
        let core_bits = largest.next_power_of_two().trailing_zeros();
        let topology = Self {
            present: nodes.iter().map(|node| node.vcpus).collect(),
            blocks: vec![0; nodes.len()],
            nodes,
            first_vcpu,
            core_bits,
        };
        let ApicId(apic_id) = topology.apic_id(VcpuId(topology.vcpus() - 1));
        if apic_id >= APIC_ID_LIMIT {
            return Err(TopologyError::ApicIdTooLarge { apic_id });
        }
        Ok(topology)
    }

    /// The shape of a VM on a single node.
    ///
    /// # Errors
    /// Why that is not possible.
    pub fn one_node(vcpus: u16, memory: u64) -> Result<Self, TopologyError> {
        Self::new(vec![PlatformNode { vcpus, memory }])
    }

    /// The same, but of each node only the first so many vCPUs are there from
    /// the start.
    #[must_use]
    pub fn starting_with(mut self, present: impl IntoIterator<Item = u16>) -> Self {
        for (number, present) in self.present.iter_mut().zip(present) {
            *number = present.min(*number);
        }
        self
    }

    /// The same, but each node may give so many blocks of memory later.
    ///
    /// # Errors
    /// There is no room for so many.
    pub fn with_blocks(
        mut self,
        blocks: impl IntoIterator<Item = u32>,
    ) -> Result<Self, TopologyError> {
        for (room, blocks) in self.blocks.iter_mut().zip(blocks) {
            *room = blocks;
        }
        let blocks: u64 = self.blocks.iter().copied().map(u64::from).sum();
        let base = layout::first_block(self.memory());
        let fits = layout::PMEM_BASE.0.saturating_sub(base.0) / BLOCK_SIZE;
        if blocks > fits.min(MAX_BLOCKS as u64) {
            return Err(TopologyError::TooManyBlocks { blocks });
        }
        Ok(self)
    }

    /// All blocks of memory that may come, and the node that the guest takes each
    /// to be near: one node after the other, as in the guest's addresses.
    pub fn blocks(&self) -> impl Iterator<Item = (BlockId, Domain)> + Clone {
        let of_node = |(domain, count): (Domain, &u32)| (0..*count).map(move |_| domain);
        let domains = (0..).map(Domain).zip(&self.blocks).flat_map(of_node);
        (0..).map(BlockId).zip(domains)
    }

    /// Where a block is when it has come.
    #[must_use]
    pub fn block_range(&self, block: BlockId) -> RamRange {
        let base = layout::first_block(self.memory());
        RamRange {
            gpa: Gpa(base.0 + u64::from(block.0) * BLOCK_SIZE),
            len: BLOCK_SIZE,
        }
    }

    /// The addresses where memory of each node may come, lowest first; none of
    /// nodes that give no more than at the start.
    pub fn windows(&self) -> impl Iterator<Item = (Domain, RamRange)> + Clone {
        let base = layout::first_block(self.memory());
        let ends = self.blocks.iter().scan(0, |end, count| {
            *end += u64::from(*count) * BLOCK_SIZE;
            Some(*end)
        });
        let sizes = self
            .blocks
            .iter()
            .map(|count| u64::from(*count) * BLOCK_SIZE);
        let window = move |(end, len)| RamRange {
            gpa: Gpa(base.0 + end - len),
            len,
        };
        let windows = (0..).map(Domain).zip(ends.zip(sizes).map(window));
        windows.filter(|(_, window)| window.len > 0)
    }

    /// Whether a node gives memory, now or perhaps later.
    #[must_use]
    pub fn gives_memory(&self, domain: Domain) -> bool {
        let node = usize::from(domain.0);
        let memory = self.nodes.get(node).is_some_and(|node| node.memory > 0);
        memory || self.blocks.get(node).is_some_and(|blocks| *blocks > 0)
    }

    /// Whether a vCPU is there from the start.
    ///
    /// # Panics
    /// If there is no room for such a vCPU.
    #[must_use]
    pub fn is_present(&self, vcpu: VcpuId) -> bool {
        let Domain(node) = self.domain(vcpu);
        vcpu.0 - self.first_vcpu[usize::from(node)] < self.present[usize::from(node)]
    }

    /// What each node gives, in the order of their domains.
    #[must_use]
    pub fn nodes(&self) -> &[PlatformNode] {
        &self.nodes
    }

    /// The same with their domains.
    pub fn domains(&self) -> impl Iterator<Item = (Domain, PlatformNode)> + Clone {
        (0..).map(Domain).zip(self.nodes.iter().copied())
    }

    /// All vCPUs that there is room for.
    #[must_use]
    pub fn vcpus(&self) -> u16 {
        *self.first_vcpu.last().expect("starts with a zero")
    }

    /// All RAM in bytes.
    #[must_use]
    pub fn memory(&self) -> u64 {
        self.nodes.iter().map(|node| node.memory).sum()
    }

    /// The pieces of RAM, lowest first, and which node gives each; two of one
    /// node if the hole for devices divides its memory.
    pub fn ram_ranges(&self) -> impl Iterator<Item = (Domain, RamRange)> + Clone {
        layout::node_ranges(self.nodes.iter().map(|node| node.memory))
    }

    /// Bits of an APIC id that tell the core; those above tell the package.
    #[must_use]
    pub const fn core_bits(&self) -> u32 {
        self.core_bits
    }

    /// vCPUs of the node that gives most of them.
    #[must_use]
    pub fn most_vcpus(&self) -> u16 {
        self.nodes.iter().map(|node| node.vcpus).max().unwrap_or(0)
    }

    /// The node that a vCPU belongs to.
    ///
    /// # Panics
    /// If there is no such vCPU.
    #[must_use]
    pub fn domain(&self, vcpu: VcpuId) -> Domain {
        assert!(vcpu.0 < self.vcpus(), "{vcpu:?} of {}", self.vcpus());
        // The last of those that start at or before it: one that starts
        // where the next does gives no vCPU.
        let after = self.first_vcpu.partition_point(|first| *first <= vcpu.0);
        Domain(u16::try_from(after - 1).expect("at most 64 nodes"))
    }

    /// The APIC id of a vCPU.
    ///
    /// # Panics
    /// If there is no such vCPU.
    #[must_use]
    pub fn apic_id(&self, vcpu: VcpuId) -> ApicId {
        let domain = self.domain(vcpu);
        let core = vcpu.0 - self.first_vcpu[usize::from(domain.0)];
        ApicId(u32::from(domain.0) << self.core_bits | u32::from(core))
    }

    /// The vCPU with an APIC id.
    #[must_use]
    pub fn vcpu(&self, apic_id: ApicId) -> Option<VcpuId> {
        let package = self.package(apic_id)?;
        let core = u16::try_from(self.core(apic_id)).ok()?;
        let first = self.first_vcpu[usize::from(package.0)];
        (core < self.nodes[usize::from(package.0)].vcpus).then(|| VcpuId(first + core))
    }

    /// The package that an APIC id is of.
    #[must_use]
    pub fn package(&self, apic_id: ApicId) -> Option<Domain> {
        let package = u16::try_from(apic_id.0 >> self.core_bits).ok()?;
        (usize::from(package) < self.nodes.len()).then_some(Domain(package))
    }

    /// The number of the core in its package that an APIC id is of.
    #[must_use]
    pub const fn core(&self, apic_id: ApicId) -> u32 {
        apic_id.0 & ((1 << self.core_bits) - 1)
    }

    /// All vCPUs, in order.
    pub fn vcpu_ids(&self) -> impl Iterator<Item = VcpuId> + Clone + use<> {
        (0..self.vcpus()).map(VcpuId)
    }
}

fn check_memory(nodes: &[PlatformNode]) -> Result<(), MemorySizeError> {
    let mut total = 0_u64;
    for node in nodes {
        let bytes = node.memory;
        if !bytes.is_multiple_of(LARGE_PAGE_SIZE) {
            return Err(MemorySizeError::Uneven { bytes });
        }
        total = total.saturating_add(bytes);
    }
    layout::check_memory_size(total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::layout::{MAX_MEMORY, MIN_MEMORY};

    /// Nodes with these vCPUs and 128 MiB each.
    fn of(vcpus: &[u16]) -> Result<Topology, TopologyError> {
        let node = |vcpus: &u16| PlatformNode {
            vcpus: *vcpus,
            memory: MIN_MEMORY,
        };
        Topology::new(vcpus.iter().map(node).collect())
    }

    fn ids(topology: &Topology) -> Vec<u32> {
        topology
            .vcpu_ids()
            .map(|vcpu| topology.apic_id(vcpu).0)
            .collect()
    }

    #[test]
    fn on_one_node_apic_ids_are_the_vcpus_numbers() {
        for vcpus in 1..=254_u16 {
            let topology = Topology::one_node(vcpus, MIN_MEMORY).expect("possible");
            assert_eq!(ids(&topology), (0..u32::from(vcpus)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn ids_have_gaps_where_nodes_are_unequal() {
        assert_eq!(ids(&of(&[2, 2]).expect("possible")), [0, 1, 2, 3]);
        assert_eq!(ids(&of(&[1, 1, 1]).expect("possible")), [0, 1, 2]);
        assert_eq!(ids(&of(&[3, 3]).expect("possible")), [0, 1, 2, 4, 5, 6]);
        assert_eq!(ids(&of(&[1, 3, 2]).expect("possible")), [0, 4, 5, 6, 8, 9]);
        assert_eq!(ids(&of(&[0, 2, 0, 1]).expect("possible")), [2, 3, 6]);
    }

    #[test]
    fn ids_and_vcpus_are_one_to_one() {
        // All shapes of up to four nodes with up to six vCPUs each.
        for shape in 0..7_u16.pow(4) {
            let counts = [shape / 343, shape / 49 % 7, shape / 7 % 7, shape % 7];
            let Ok(topology) = of(&counts) else {
                assert_eq!(counts, [0; 4]);
                continue;
            };
            assert_eq!(topology.vcpus(), counts.iter().sum());
            let ids = ids(&topology);
            assert!(ids.is_sorted_by(|a, b| a < b), "{counts:?}: {ids:?}");
            let mut found = 0;
            for id in 0..0x100 {
                if let Some(vcpu) = topology.vcpu(ApicId(id)) {
                    assert_eq!(topology.apic_id(vcpu), ApicId(id));
                    assert_eq!(topology.package(ApicId(id)), Some(topology.domain(vcpu)));
                    found += 1;
                }
            }
            assert_eq!(found, topology.vcpus(), "{counts:?}");
            for (domain, node) in topology.domains() {
                let here = topology
                    .vcpu_ids()
                    .filter(|vcpu| topology.domain(*vcpu) == domain);
                assert_eq!(here.count(), usize::from(node.vcpus));
            }
        }
    }

    #[test]
    fn of_each_node_the_first_are_there() {
        let topology = of(&[3, 0, 2]).expect("possible").starting_with([1, 0, 9]);
        let present: Vec<_> = topology
            .vcpu_ids()
            .filter(|vcpu| topology.is_present(*vcpu))
            .collect();
        assert_eq!(present, [VcpuId(0), VcpuId(3), VcpuId(4)]);
        assert_eq!(ids(&topology), ids(&of(&[3, 0, 2]).expect("possible")));
    }

    #[test]
    fn blocks_fill_the_windows_of_their_nodes() {
        let topology = of(&[1, 0, 1]).expect("possible");
        let topology = topology.with_blocks([2, 0, 3]).expect("room");
        let at = |block: u64| Gpa((4 << 30) + block * BLOCK_SIZE);
        let window = |first, count| RamRange {
            gpa: at(first),
            len: count * BLOCK_SIZE,
        };
        let windows: Vec<_> = topology.windows().collect();
        let expected = [(Domain(0), window(0, 2)), (Domain(2), window(2, 3))];
        assert_eq!(windows, expected);
        let blocks: Vec<_> = topology.blocks().collect();
        let domains: Vec<_> = blocks.iter().map(|(_, domain)| domain.0).collect();
        assert_eq!(domains, [0, 0, 2, 2, 2]);
        for (number, (block, domain)) in (0..).zip(&blocks) {
            let range = topology.block_range(*block);
            assert_eq!(range, window(number, 1));
            let mut windows = windows.iter();
            assert!(windows.any(|(owner, window)| {
                owner == domain && window.gpa <= range.gpa && range.end() <= window.end()
            }));
        }
    }

    #[test]
    fn more_blocks_than_there_is_room_for_are_refused() {
        let topology = |memory| Topology::one_node(1, memory).expect("possible");
        let most = u32::try_from(MAX_BLOCKS).expect("few");
        assert!(topology(MIN_MEMORY).with_blocks([most]).is_ok());
        let too_many = |blocks| Err(TopologyError::TooManyBlocks { blocks });
        let refused = topology(MIN_MEMORY).with_blocks([most + 1]);
        assert_eq!(refused, too_many(u64::from(most) + 1));
        let refused = of(&[1, 1]).expect("possible").with_blocks([u32::MAX; 2]);
        assert_eq!(refused, too_many(2 * u64::from(u32::MAX)));
        let large = MAX_MEMORY - 3 * BLOCK_SIZE;
        assert!(topology(large).with_blocks([3]).is_ok());
        assert_eq!(topology(large).with_blocks([4]), too_many(4));
        assert_eq!(topology(MAX_MEMORY).with_blocks([1]), too_many(1));
    }

    #[test]
    fn ids_that_no_cpu_has_are_nobodys() {
        let topology = of(&[3, 2]).expect("possible");
        for id in [3, 6, 7, 8, 0xff, 0x1_0000, u32::MAX] {
            assert_eq!(topology.vcpu(ApicId(id)), None, "id {id:#x}");
        }
        assert_eq!(topology.package(ApicId(8)), None);
        assert_eq!(topology.package(ApicId(u32::MAX)), None);
    }

    #[test]
    fn impossible_shapes_are_refused_with_their_reason() {
        assert_eq!(of(&[]), Err(TopologyError::NoVcpus));
        assert_eq!(of(&[0, 0]), Err(TopologyError::NoVcpus));
        assert_eq!(of(&[1; 65]), Err(TopologyError::TooManyNodes { nodes: 65 }));
        assert_eq!(
            of(&[200, 55]),
            Err(TopologyError::TooManyVcpus { vcpus: 255 })
        );
        assert_eq!(
            of(&[u16::MAX; 64]),
            Err(TopologyError::TooManyVcpus { vcpus: 64 * 65535 })
        );
        // 64 vCPUs would do, but one node's five make packages of eight ids.
        let mut unequal = [1; 60];
        unequal[0] = 5;
        assert_eq!(
            of(&unequal),
            Err(TopologyError::ApicIdTooLarge { apic_id: 472 })
        );
        // 256 ids, the last of which means all CPUs.
        let mut full = [4; 64];
        full[0] = 2;
        assert_eq!(
            of(&full),
            Err(TopologyError::ApicIdTooLarge { apic_id: 255 })
        );
        full[63] = 3;
        assert_eq!(of(&full).map(|topology| topology.vcpus()), Ok(253));
    }

    #[test]
    fn impossible_memory_is_refused_with_its_reason() {
        let with = |memory: &[u64]| {
            let node = |memory: &u64| PlatformNode {
                vcpus: 1,
                memory: *memory,
            };
            Topology::new(memory.iter().map(node).collect()).map(|topology| topology.memory())
        };
        let small = MIN_MEMORY / 2;
        let bytes = 1;
        let uneven = TopologyError::Memory(MemorySizeError::Uneven { bytes });
        assert_eq!(with(&[MIN_MEMORY, bytes]), Err(uneven));
        // Two uneven parts are not made good by an even sum.
        let bytes = MIN_MEMORY + 4096;
        let uneven = TopologyError::Memory(MemorySizeError::Uneven { bytes });
        assert_eq!(with(&[bytes, MIN_MEMORY - 4096]), Err(uneven));
        let too_small = MemorySizeError::TooSmall { bytes: small };
        assert_eq!(with(&[small]), Err(TopologyError::Memory(too_small)));
        assert_eq!(with(&[small, small]), Ok(MIN_MEMORY));
        assert_eq!(with(&[0, MAX_MEMORY]), Ok(MAX_MEMORY));
        let bytes = u64::MAX;
        let too_large = MemorySizeError::TooLarge { bytes };
        let huge = !(LARGE_PAGE_SIZE - 1);
        assert_eq!(with(&[huge, huge]), Err(TopologyError::Memory(too_large)));
    }

    #[test]
    #[should_panic(expected = "VcpuId(2) of 2")]
    fn a_vcpu_that_is_not_there_has_no_id() {
        let _ = of(&[1, 1]).expect("possible").apic_id(VcpuId(2));
    }
}
