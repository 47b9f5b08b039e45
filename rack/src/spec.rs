//! What rack and what VM the operator asks for, and whether they fit.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use vmm_shared::addr::{LARGE_PAGE_SIZE, MAX_NODES, MAX_VCPUS, NodeId};
use vmm_shared::coherence::NodeSet;
use vmm_shared::control::BLOCK_SIZE;

use crate::error::RackError;
use crate::size::Size;

/// The least memory that a guest boots in.
pub(crate) const LEAST_MEMORY: Size = Size::mib(128);
/// The most memory of a VM, what may come later included, so that the guest's
/// addresses have room for it: 256 GiB less the hole and a block.
pub(crate) const MOST_MEMORY: u64 = (255 << 30) - BLOCK_SIZE;
/// The most cores of one node: xAPIC ids must address them all.
const MOST_CORES: u32 = 64;
/// The most vCPUs of a VM.
const MOST_VCPUS: u32 = 254;
const _: () = assert!(MOST_VCPUS as usize == MAX_VCPUS);
/// The most vCPUs that may share a core.
const VCPUS_PER_CORE: u32 = 8;
/// The most nodes of an emulated rack. Shared layouts have room for
/// [`MAX_NODES`]; a node needs a PCI slot for each, and there are 32 on a bus.
const MOST_NODES: u32 = 8;
const _: () = assert!(MOST_NODES as usize <= MAX_NODES);

/// The hosts of a rack, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RackSpec {
    /// Its nodes.
    pub nodes: Vec<NodeSpec>,
}

/// What a node is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// It gives cores and memory to the VM.
    #[default]
    Data,
    /// It decides which node gives what, and gives nothing itself.
    Control,
}

/// One host of a rack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSpec {
    /// What it is for.
    pub role: Role,
    /// Its cores.
    pub cores: u32,
    /// The most memory that it gives; `None` is twice what the VM starts with.
    /// Any node but the first may give none.
    pub memory: Option<Size>,
}

impl Default for RackSpec {
    fn default() -> Self {
        Self {
            nodes: vec![NodeSpec::data(2, None)],
        }
    }
}

/// A virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// Its vCPUs.
    pub vcpus: u32,
    /// vCPUs that it has room for while it runs.
    pub max_vcpus: u32,
    /// Its memory.
    pub memory: Size,
}

/// What runs in the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Guest {
    /// The distribution's stock Linux kernel.
    Linux,
    /// Our own paravirtual kernel.
    Pv,
    /// A kernel image of the operator's.
    Image(PathBuf),
}

impl FromStr for Guest {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "linux" => Self::Linux,
            "pv" => Self::Pv,
            path => Self::Image(path.into()),
        })
    }
}

/// Who says by which protocol the guest is booted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum BootBySpec {
    /// Its image.
    #[default]
    Image,
    /// The operator: it is the paravirtual guest.
    Paravirtual,
}

/// The devices of the VM besides those that every VM has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PlatformSpec {
    /// None.
    #[default]
    Lean,
    /// A PC's interval timer, interrupt controllers, clock and ACPI timer.
    Legacy,
}

impl FromStr for PlatformSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "lean" => Ok(Self::Lean),
            "legacy" => Ok(Self::Legacy),
            _ => Err(format!("{text:?} is not known; use lean or legacy")),
        }
    }
}

/// The root file system of the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootFs {
    /// A busybox in the initial RAM file system.
    Busybox,
    /// A stock Debian.
    Debian,
    /// An ext4 image of the operator's.
    Path(PathBuf),
}

impl FromStr for RootFs {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "busybox" => Self::Busybox,
            "debian" => Self::Debian,
            path => Self::Path(path.into()),
        })
    }
}

impl RackSpec {
    /// A rack of equal nodes.
    ///
    /// # Errors
    /// There are more than a rack can have.
    pub fn equal(nodes: u32, node: NodeSpec) -> Result<Self, RackError> {
        // Before the list is made: the number is the operator's.
        check_count(nodes)?;
        Ok(Self {
            nodes: (0..nodes).map(|_| node).collect(),
        })
    }

    /// Adds nodes that decide, of one core each.
    ///
    /// # Errors
    /// There are more than a rack can have.
    pub fn with_control(mut self, count: u32) -> Result<Self, RackError> {
        let nodes = u32::try_from(self.nodes.len()).unwrap_or(u32::MAX);
        check_count(nodes.saturating_add(count))?;
        self.nodes.extend((0..count).map(|_| NodeSpec::control(1)));
        Ok(self)
    }

    /// The nodes that decide.
    #[must_use]
    pub fn control_nodes(&self) -> NodeSet {
        let nodes = (0..).map(NodeId).zip(&self.nodes);
        nodes
            .filter(|(_, node)| node.role == Role::Control)
            .fold(NodeSet::EMPTY, |set, (node, _)| set.with(node))
    }

    fn data_nodes(&self) -> impl Iterator<Item = &NodeSpec> {
        self.nodes.iter().filter(|node| node.role == Role::Data)
    }

    /// Cores of all nodes that give any together.
    #[must_use]
    pub fn cores(&self) -> u32 {
        let cores = self.data_nodes().map(|node| node.cores);
        cores.fold(0, u32::saturating_add)
    }

    /// The most memory that all nodes give together, for a VM of `vm`'s size.
    #[must_use]
    pub fn memory(&self, vm: &VmSpec) -> Size {
        let each = self.data_nodes().map(|node| node.most_memory(vm));
        Size(each.fold(0, |sum, memory| sum.saturating_add(memory.0)))
    }

    /// Checks that the rack can exist and that `vm` fits into it.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self, vm: &VmSpec) -> Result<(), RackError> {
        check_count(u32::try_from(self.nodes.len()).unwrap_or(u32::MAX))?;
        for (id, node) in (0..).map(NodeId).zip(&self.nodes) {
            node.check(id)?;
        }
        if self.control_nodes().contains(NodeId(0)) {
            return Err(RackError::FirstIsControl);
        }
        let cores = self.cores();
        if cores as usize > MAX_VCPUS {
            return Err(RackError::TooManyCoresInAll {
                cores,
                most: MAX_VCPUS,
            });
        }
        if vm.vcpus == 0 {
            return Err(RackError::NoVcpus);
        }
        let most = cores.saturating_mul(VCPUS_PER_CORE).min(MOST_VCPUS);
        if vm.vcpus > most {
            return Err(RackError::TooManyVcpus {
                vcpus: vm.vcpus,
                cores,
                most,
            });
        }
        if vm.max_vcpus < vm.vcpus || vm.max_vcpus > most {
            return Err(RackError::MaxVcpus {
                max_vcpus: vm.max_vcpus,
                least: vm.vcpus,
                most,
            });
        }
        if vm.memory < LEAST_MEMORY {
            return Err(RackError::MemoryTooSmall {
                memory: vm.memory,
                least: LEAST_MEMORY,
            });
        }
        if let Some((below, above)) = large_pages_around(vm.memory) {
            return Err(RackError::MemoryNotAligned {
                memory: vm.memory,
                below: below.max(LEAST_MEMORY),
                above,
            });
        }
        let total = self.memory(vm);
        if vm.memory > total {
            return Err(RackError::MemoryTooLarge {
                memory: vm.memory,
                total,
            });
        }
        Ok(())
    }
}

impl NodeSpec {
    /// A node that gives so many cores, and that much memory at most.
    #[must_use]
    pub const fn data(cores: u32, memory: Option<Size>) -> Self {
        Self {
            role: Role::Data,
            cores,
            memory,
        }
    }

    /// A node that decides.
    #[must_use]
    pub const fn control(cores: u32) -> Self {
        Self {
            role: Role::Control,
            cores,
            memory: Some(Size(0)),
        }
    }

    /// The most memory that it gives to a VM of `vm`'s size.
    pub(crate) fn most_memory(&self, vm: &VmSpec) -> Size {
        let twice = Size(vm.memory.0.saturating_mul(2));
        self.memory.unwrap_or(twice)
    }

    fn check(&self, node: NodeId) -> Result<(), RackError> {
        if self.cores == 0 {
            return Err(RackError::NoCores { node });
        }
        if self.cores > MOST_CORES {
            return Err(RackError::TooManyCores {
                node,
                asked: self.cores,
                most: MOST_CORES,
            });
        }
        let Some(memory) = self.memory else {
            return Ok(());
        };
        let least = Size(LARGE_PAGE_SIZE);
        let (below, above) = match large_pages_around(memory) {
            // A spare node, or one that gives vCPUs alone. The guest's first
            // memory is the first node's.
            _ if memory == Size(0) && node != NodeId(0) => return Ok(()),
            _ if memory < least => (least, least),
            Some(around) => around,
            None => return Ok(()),
        };
        Err(RackError::NodeMemory {
            node,
            memory,
            below,
            above,
        })
    }
}

fn check_count(nodes: u32) -> Result<(), RackError> {
    match nodes {
        0 => Err(RackError::EmptyRack),
        1..=MOST_NODES => Ok(()),
        asked => Err(RackError::TooManyNodes {
            asked,
            most: MOST_NODES,
        }),
    }
}

/// The nearest multiples of a large page, unless `memory` is one itself.
fn large_pages_around(memory: Size) -> Option<(Size, Size)> {
    if memory.0.is_multiple_of(LARGE_PAGE_SIZE) {
        return None;
    }
    let below = memory.0 / LARGE_PAGE_SIZE * LARGE_PAGE_SIZE;
    Some((Size(below), Size(below.saturating_add(LARGE_PAGE_SIZE))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(vcpus: u32, memory: Size) -> VmSpec {
        VmSpec {
            vcpus,
            max_vcpus: vcpus,
            memory,
        }
    }

    fn uniform(nodes: u32, cores: u32, mib: Option<u64>) -> RackSpec {
        let memory = mib.map(Size::mib);
        RackSpec::equal(nodes, NodeSpec::data(cores, memory)).expect("few enough")
    }

    fn refusal(rack: &RackSpec, vm: &VmSpec) -> String {
        rack.check(vm).expect_err("must be refused").to_string()
    }

    #[test]
    fn the_default_rack_takes_a_usual_vm() {
        let rack = RackSpec::default();
        assert!(rack.check(&vm(2, Size::mib(1024))).is_ok());
        assert!(rack.check(&vm(1, LEAST_MEMORY)).is_ok());
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_nearest_legal_value() {
        let rack = RackSpec::default();
        let usual = Size::mib(1024);
        assert!(rack.check(&vm(16, usual)).is_ok(), "eight share a core");
        assert!(refusal(&rack, &vm(17, usual)).contains("--vcpus 16 or fewer"));
        let room = |max_vcpus| VmSpec {
            max_vcpus,
            ..vm(2, usual)
        };
        assert!(rack.check(&room(16)).is_ok());
        for max_vcpus in [1, 17] {
            let refusal = refusal(&rack, &room(max_vcpus));
            assert!(refusal.contains("--max-vcpus from 2 to 16"), "{refusal}");
        }
        assert!(refusal(&rack, &vm(0, usual)).contains("--vcpus 1"));
        assert!(refusal(&rack, &vm(1, Size::mib(64))).contains("--memory 128M"));
        assert!(refusal(&rack, &vm(1, Size::mib(1023))).contains("--memory 1022M or 1G"));
        let small = uniform(1, 2, Some(512));
        assert!(refusal(&small, &vm(1, usual)).contains("--memory 512M or less"));
        let small = uniform(3, 2, Some(256));
        assert!(refusal(&small, &vm(1, usual)).contains("--memory 768M or less"));
        let odd = RackSpec {
            nodes: vec![NodeSpec::data(1, Some(Size(3 << 20)))],
        };
        assert!(refusal(&odd, &vm(1, usual)).contains("2M or 4M"));
    }

    #[test]
    fn racks_that_cannot_be_are_refused() {
        let usual = vm(1, Size::mib(1024));
        let node = NodeSpec::data(1, None);
        for (nodes, hint) in [(0, "--nodes"), (9, "--nodes 8"), (u32::MAX, "--nodes 8")] {
            let error = RackSpec::equal(nodes, node).expect_err("refused");
            assert!(error.to_string().contains(hint), "{error}");
        }
        assert!(uniform(8, 1, None).check(&usual).is_ok());
        assert!(refusal(&uniform(2, 0, None), &usual).contains("node 0 has no cores"));
        assert!(refusal(&uniform(1, 65, None), &usual).contains("64 or fewer"));
        assert!(refusal(&uniform(8, 64, None), &usual).contains("254"));
        assert!(refusal(&uniform(2, 1, Some(0)), &usual).contains("node 0"));
        let many = vm(17, usual.memory);
        assert!(refusal(&uniform(2, 1, None), &many).contains("--vcpus 16 or fewer"));
    }

    #[test]
    fn control_nodes_give_nothing_and_are_not_the_first() {
        let rack = uniform(2, 2, None).with_control(1).expect("few enough");
        assert_eq!((rack.nodes.len(), rack.cores()), (3, 4));
        assert_eq!(rack.control_nodes(), NodeSet::only(NodeId(2)));
        assert!(rack.check(&vm(4, Size::mib(1024))).is_ok());
        assert!(refusal(&rack, &vm(33, Size::mib(1024))).contains("--vcpus 32 or fewer"));
        assert!(uniform(7, 1, None).with_control(2).is_err());
        let alone = RackSpec {
            nodes: vec![NodeSpec::control(1)],
        };
        assert!(refusal(&alone, &vm(1, Size::mib(1024))).contains("node 0"));
    }

    #[test]
    fn every_refusal_is_one_line() {
        let rack = RackSpec::default();
        for vcpus in [0, 1, 9] {
            for memory in [0, 1, 127 << 20, (1 << 30) + 1, u64::MAX] {
                if let Err(error) = rack.check(&vm(vcpus, Size(memory))) {
                    assert_eq!(error.to_string().lines().count(), 1);
                }
            }
        }
    }
}
