//! What a guest is found to have, or not to have any more, though no job waits
//! for it: because an operator of the guest's own has told it to give something
//! up, or in answer to a job that has not waited or has lost a node.

use alloc::vec::Vec;
use core::cmp::Ordering;

use control_plane::cluster::{Change, Cluster, Vm, VmId, VmPhase};
use vmm_shared::addr::{NodeId, VcpuId};
use vmm_shared::control::{Order, PIECES_PER_BLOCK, Place, blocks};

use super::NodeExecutor;

impl NodeExecutor<'_> {
    /// The first thing in which the tables and a guest differ.
    pub(super) fn differs(&self, cluster: &Cluster) -> Option<Change> {
        let runs = |vm: &Vm| vm.phase() == VmPhase::Running;
        let mut idle = cluster
            .vms()
            .iter()
            .filter(|(id, vm)| runs(vm) && cluster.job_of(**id).is_none());
        idle.find_map(|(id, vm)| {
            self.other_vcpu(cluster, *id, vm)
                .or_else(|| self.other_memory(cluster, *id, vm))
        })
    }

    fn other_vcpu(&self, cluster: &Cluster, id: VmId, vm: &Vm) -> Option<Change> {
        let mut homes = (0..).map(VcpuId).zip(vm.homes());
        homes.find_map(|(vcpu, home)| {
            let record = self.control.vcpu(vcpu)?;
            let is_coming = matches!(record.order(), Some(Order::Grant(_)));
            let (slices, changed) = (0, Some(vcpu));
            match (*home, record.place()?) {
                (Some(node), Place::Absent) if !record.is_busy() => Some(Change::GivenUp {
                    vm: id,
                    vcpu: changed,
                    node,
                    slices,
                }),
                (None, Place::At(at)) if !record.is_busy() || is_coming => {
                    let node = at.node;
                    let free = cluster.nodes().get(&node)?.free().vcpus;
                    (free > 0).then_some(Change::Got {
                        vm: id,
                        vcpu: changed,
                        node,
                        slices,
                    })
                }
                _ => None,
            }
        })
    }

    fn other_memory(&self, cluster: &Cluster, id: VmId, vm: &Vm) -> Option<Change> {
        let nodes = usize::try_from(self.config.nodes).ok()?;
        let shares = self.config.shares.get(..nodes)?;
        let is_there = |id| self.control.block(id).is_some_and(|it| it.is_present());
        let there = blocks(shares).filter(|block| is_there(block.id)).count();
        let there = u32::try_from(there * PIECES_PER_BLOCK).ok()?;
        let has = there.saturating_add(vm.least().slices);
        let granted = vm.granted().slices;
        if has == granted {
            return None;
        }
        let map = self.control.pieces(self.config)?;
        let on = |node: NodeId| u32::try_from(map.pieces_on(node).count()).unwrap_or(u32::MAX);
        let gives: Vec<(NodeId, u32)> = cluster.nodes().keys().map(|id| (*id, on(*id))).collect();
        // While any is on its way, nobody knows.
        if gives.iter().map(|(_, slices)| slices).sum::<u32>() != has {
            return None;
        }
        let most = has.abs_diff(granted);
        gives.into_iter().find_map(|(node, gives)| {
            let granted_at = vm.granted_at(node).slices;
            let slices = gives.abs_diff(granted_at).min(most);
            let (vm, vcpu) = (id, None);
            match (has.cmp(&granted), gives.cmp(&granted_at)) {
                (Ordering::Less, Ordering::Less) => Some(Change::GivenUp {
                    vm,
                    vcpu,
                    node,
                    slices,
                }),
                (Ordering::Greater, Ordering::Greater) => {
                    let free = cluster.nodes().get(&node)?.free().slices;
                    (slices <= free).then_some(Change::Got {
                        vm,
                        vcpu,
                        node,
                        slices,
                    })
                }
                _ => None,
            }
        })
    }
}

#[cfg(test)]
mod tests;
