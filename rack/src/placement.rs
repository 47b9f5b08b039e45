//! Which node gives what to a VM.
//!
//! The launcher decides once, before anything starts. This function is the
//! seam where the control plane will take over.

use vmm_shared::addr::LARGE_PAGE_SIZE;
use vmm_shared::control::NodeShare;

use crate::spec::{RackSpec, VmSpec};

/// What each node gives to a VM that [fits](RackSpec::check): vCPUs in
/// proportion to its cores, in blocks; equal parts of the memory as far as
/// its own reaches, the first node taking what does not divide.
#[must_use]
pub fn placement(rack: &RackSpec, vm: &VmSpec) -> Vec<NodeShare> {
    let vcpus = proportional(vm.vcpus, rack);
    let memory = equal(vm.memory.0 / LARGE_PAGE_SIZE, rack);
    rack.nodes
        .iter()
        .zip(vcpus)
        .zip(memory)
        .map(|((node, vcpus), units)| NodeShare {
            memory: units * LARGE_PAGE_SIZE,
            cores: node.cores,
            vcpus,
        })
        .collect()
}

/// Splits the vCPUs so that the first n nodes have together their part,
/// rounded up, of the whole: the first node always has one, and none has more
/// vCPUs than cores.
fn proportional(vcpus: u32, rack: &RackSpec) -> Vec<u32> {
    let total = u64::from(rack.cores()).max(1);
    let mut cores = 0;
    let mut placed = 0;
    let share = |node: &crate::spec::NodeSpec| {
        cores += u64::from(node.cores);
        let upto = (u64::from(vcpus) * cores).div_ceil(total);
        let share = upto - placed;
        placed = upto;
        u32::try_from(share).expect("at most all vCPUs")
    };
    rack.nodes.iter().map(share).collect()
}

/// Splits large pages evenly, except that no node gives more than it has:
/// then the others give more.
fn equal(pages: u64, rack: &RackSpec) -> Vec<u64> {
    let room = |node: &crate::spec::NodeSpec| match node.memory {
        Some(memory) => memory.0 / LARGE_PAGE_SIZE,
        None => u64::MAX,
    };
    let rooms: Vec<u64> = rack.nodes.iter().map(room).collect();
    let mut shares = vec![0; rooms.len()];
    let mut left = pages;
    while left > 0 {
        let open = |(share, room): &(&mut u64, &u64)| **share < **room;
        let count = shares.iter_mut().zip(&rooms).filter(open).count() as u64;
        if count == 0 {
            break;
        }
        let (each, mut odd) = (left / count, left % count);
        for (share, room) in shares.iter_mut().zip(&rooms).filter(open) {
            let more = (each + odd).min(room - *share);
            odd = 0;
            *share += more;
            left -= more;
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::size::Size;
    use crate::spec::NodeSpec;

    fn rack(nodes: &[(u32, Option<u64>)]) -> RackSpec {
        let node = |(cores, mib): &(u32, Option<u64>)| NodeSpec {
            cores: *cores,
            memory: mib.map(Size::mib),
        };
        RackSpec {
            nodes: nodes.iter().map(node).collect(),
        }
    }

    fn vcpus(cores: &[u32], vcpus: u32) -> Vec<u32> {
        let nodes: Vec<_> = cores.iter().map(|cores| (*cores, None)).collect();
        let vm = VmSpec {
            vcpus,
            memory: Size::mib(1024),
        };
        let shares = placement(&rack(&nodes), &vm);
        shares.iter().map(|share| share.vcpus).collect()
    }

    fn mib(limits: &[Option<u64>], memory: u64) -> Vec<u64> {
        let nodes: Vec<_> = limits.iter().map(|limit| (1, *limit)).collect();
        let vm = VmSpec {
            vcpus: 1,
            memory: Size::mib(memory),
        };
        let shares = placement(&rack(&nodes), &vm);
        shares.iter().map(|share| share.memory >> 20).collect()
    }

    #[test]
    fn vcpus_go_where_the_cores_are() {
        assert_eq!(vcpus(&[1, 1], 2), [1, 1]);
        assert_eq!(vcpus(&[2, 2], 3), [2, 1]);
        assert_eq!(vcpus(&[2, 2, 2], 6), [2, 2, 2]);
        assert_eq!(vcpus(&[1, 8], 9), [1, 8]);
        assert_eq!(vcpus(&[1, 3], 2), [1, 1]);
        assert_eq!(vcpus(&[1, 1, 1], 1), [1, 0, 0]);
        assert_eq!(vcpus(&[4], 2), [2]);
    }

    #[test]
    fn every_vcpu_has_a_core_and_the_first_node_the_first_vcpu() {
        for cores in [&[1, 1][..], &[3, 1, 2], &[1, 7, 5, 64], &[9, 1, 1, 1, 1]] {
            let total: u32 = cores.iter().sum();
            for asked in 1..=total {
                let placed = vcpus(cores, asked);
                assert_eq!(placed.iter().sum::<u32>(), asked);
                assert!(placed[0] >= 1, "{cores:?} {asked}");
                let fits = placed
                    .iter()
                    .zip(cores)
                    .all(|(vcpus, cores)| vcpus <= cores);
                assert!(fits, "{cores:?} {asked}: {placed:?}");
            }
        }
    }

    #[test]
    fn memory_is_split_evenly_and_the_first_node_takes_the_rest() {
        assert_eq!(mib(&[None], 1024), [1024]);
        assert_eq!(mib(&[None, None], 1024), [512, 512]);
        assert_eq!(mib(&[None, None, None], 1024), [344, 340, 340]);
    }

    #[test]
    fn a_small_node_gives_all_and_the_others_the_rest() {
        assert_eq!(mib(&[Some(512), Some(512)], 1024), [512, 512]);
        assert_eq!(mib(&[Some(128), None], 1024), [128, 896]);
        assert_eq!(mib(&[None, Some(100), Some(200)], 1024), [724, 100, 200]);
        assert_eq!(
            mib(&[Some(342), Some(342), Some(340)], 1024),
            [342, 342, 340]
        );
    }
}
