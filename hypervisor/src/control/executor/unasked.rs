//! What a guest has given up though no job asked for it: because an operator of
//! the guest's own has told it to, or in answer to a job that has not waited.

use control_plane::cluster::{Change, Cluster, Vm, VmId, VmPhase};
use vmm_shared::addr::{NodeId, VcpuId};
use vmm_shared::control::{BlockPlace, BlockState, PIECES_PER_BLOCK, Place, blocks};

use super::NodeExecutor;

impl NodeExecutor<'_> {
    /// The first thing that the tables have and the guest has not.
    pub(super) fn unasked(&self, cluster: &Cluster) -> Option<Change> {
        let runs = |vm: &Vm| vm.phase() == VmPhase::Running;
        let mut idle = cluster
            .vms()
            .iter()
            .filter(|(id, vm)| runs(vm) && cluster.job_of(**id).is_none());
        idle.find_map(|(id, vm)| {
            self.lost_vcpu(*id, vm)
                .or_else(|| self.lost_memory(*id, vm))
        })
    }

    fn lost_vcpu(&self, id: VmId, vm: &Vm) -> Option<Change> {
        let homes = (0..).map(VcpuId).zip(vm.homes());
        let is_gone = |vcpu: &VcpuId| {
            let record = self.control.vcpu(*vcpu);
            record.is_some_and(|it| !it.is_busy() && it.place() == Some(Place::Absent))
        };
        let (vcpu, node) = homes
            .filter_map(|(vcpu, home)| Some((vcpu, (*home)?)))
            .find(|(vcpu, _)| is_gone(vcpu))?;
        Some(Change::GivenUp {
            vm: id,
            vcpu: Some(vcpu),
            node,
            slices: 0,
        })
    }

    fn lost_memory(&self, id: VmId, vm: &Vm) -> Option<Change> {
        let nodes = usize::try_from(self.config.nodes).ok()?;
        let shares = self.config.shares.get(..nodes)?;
        let state = |block: BlockPlace| {
            let record = self.control.block(block.id)?;
            record.state().filter(|_| !record.is_busy())
        };
        // While any is on its way, nobody knows.
        let states: Option<alloc::vec::Vec<BlockState>> = blocks(shares).map(state).collect();
        let states = states?;
        if states.contains(&BlockState::Leaving) {
            return None;
        }
        let is_there = |state: &&BlockState| state.is_present();
        let there = states.iter().filter(is_there).count() * PIECES_PER_BLOCK;
        let has = u32::try_from(there).ok()?.saturating_add(vm.least().slices);
        let lost = vm.granted().slices.saturating_sub(has);
        if lost == 0 {
            return None;
        }
        let map = self.control.pieces(self.config)?;
        let lost_of = |node: NodeId| {
            let has = u32::try_from(map.pieces_on(node).count()).unwrap_or(u32::MAX);
            vm.granted_at(node).slices.saturating_sub(has).min(lost)
        };
        let of = vm.placements().keys().map(|node| (*node, lost_of(*node)));
        let (node, slices) = of.into_iter().find(|(_, slices)| *slices > 0)?;
        Some(Change::GivenUp {
            vm: id,
            vcpu: None,
            node,
            slices,
        })
    }
}

#[cfg(test)]
mod tests;
