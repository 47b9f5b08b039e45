//! Booking steps: what each does to the rows, to a VM, and, tried out
//! beforehand, to all that a plan touches.

use alloc::collections::BTreeMap;

use arrayvec::ArrayVec;
use vmm_shared::addr::NodeId;

use super::{Cluster, Holder, Placement, Refusal, Step, StepKind, Vm, VmId, Wish};
use crate::optimise::Share;
use crate::policy::ANY;

/// What happens to the rows of a node when a step is booked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RowChange {
    pub(crate) node: NodeId,
    pub(crate) share: Share,
    pub(crate) from: Holder,
    pub(crate) to: Holder,
}

/// A step changes the rows of two nodes at most.
type RowChanges = ArrayVec<RowChange, 2>;

fn minus(a: Share, b: Share) -> Option<Share> {
    Some(Share {
        vcpus: a.vcpus.checked_sub(b.vcpus)?,
        slices: a.slices.checked_sub(b.slices)?,
    })
}

fn plus(a: Share, b: Share) -> Option<Share> {
    Some(Share {
        vcpus: a.vcpus.checked_add(b.vcpus)?,
        slices: a.slices.checked_add(b.slices)?,
    })
}

impl Vm {
    /// Books a step. `free` is what a node has left.
    pub(crate) fn book(
        &mut self,
        step: &Step,
        free: impl Fn(NodeId) -> Option<Share>,
    ) -> Result<RowChanges, Refusal> {
        if step.is_kept() {
            return Ok(RowChanges::new());
        }
        let share = step.share();
        let id = VmId(step.vm);
        let (used, leased) = (Holder::Vm(id), Holder::Leased(id));
        let change = |node, share, from, to| RowChange {
            node,
            share,
            from,
            to,
        };
        let one = |change| RowChanges::from_iter([change]);
        let (from, to) = (NodeId(step.from), NodeId(step.to));
        match step.kind {
            StepKind::Lease => {
                let left = free(to).ok_or(Refusal::NoNode { node: to })?;
                minus(left, share).ok_or(Refusal::NoRoom { node: to })?;
                let placement = self.placements.entry(to).or_default();
                placement.held = plus(placement.held, share).ok_or(Refusal::BadPlan)?;
                Ok(one(change(to, share, Holder::Free, leased)))
            }
            StepKind::Release => {
                // Of what was planned, that which was not given up stays.
                let Some(placement) = self.placements.get_mut(&from) else {
                    return Ok(RowChanges::new());
                };
                let unused = minus(placement.held, placement.granted).ok_or(Refusal::BadPlan)?;
                let freed = Share {
                    vcpus: share.vcpus.min(unused.vcpus),
                    slices: share.slices.min(unused.slices),
                };
                placement.held = minus(placement.held, freed).ok_or(Refusal::BadPlan)?;
                if placement.held == Share::NONE {
                    self.placements.remove(&from);
                }
                Ok(one(change(from, freed, leased, Holder::Free)))
            }
            StepKind::Add => {
                self.grant(step, to)?;
                Ok(one(change(to, share, leased, used)))
            }
            StepKind::Remove => {
                self.withdraw(step, from)?;
                Ok(one(change(from, share, used, leased)))
            }
            StepKind::Move => {
                let mut after = self.clone();
                after.withdraw(step, from)?;
                after.grant(step, to)?;
                *self = after;
                let both = [
                    change(from, share, used, leased),
                    change(to, share, leased, used),
                ];
                Ok(both.into())
            }
        }
    }

    fn placement(&mut self, node: NodeId) -> Result<&mut Placement, Refusal> {
        self.placements.get_mut(&node).ok_or(Refusal::BadPlan)
    }

    fn home_of(&mut self, vcpu: u16) -> Result<&mut Option<NodeId>, Refusal> {
        let vcpu = usize::from(vcpu);
        self.homes.get_mut(vcpu).ok_or(Refusal::BadPlan)
    }

    fn grant(&mut self, step: &Step, node: NodeId) -> Result<(), Refusal> {
        let placement = self.placement(node)?;
        let granted = plus(placement.granted, step.share()).ok_or(Refusal::BadPlan)?;
        minus(placement.held, granted).ok_or(Refusal::BadPlan)?;
        if step.vcpu == ANY {
            if step.cores > 0 {
                return Err(Refusal::BadPlan);
            }
        } else {
            let home = self.home_of(step.vcpu)?;
            if home.is_some() {
                return Err(Refusal::BadPlan);
            }
            *home = Some(node);
        }
        self.placement(node)?.granted = granted;
        Ok(())
    }

    fn withdraw(&mut self, step: &Step, node: NodeId) -> Result<(), Refusal> {
        let placement = self.placement(node)?;
        let granted = minus(placement.granted, step.share()).ok_or(Refusal::BadPlan)?;
        if step.vcpu == ANY {
            if step.cores > 0 {
                return Err(Refusal::BadPlan);
            }
        } else {
            let home = self.home_of(step.vcpu)?;
            if *home != Some(node) {
                return Err(Refusal::BadPlan);
            }
            *home = None;
        }
        self.placement(node)?.granted = granted;
        Ok(())
    }
}

/// The VMs and free rows as a plan would leave them, step by step.
#[derive(Clone, Debug)]
pub struct Trial<'a> {
    cluster: &'a Cluster,
    /// Those that the plan has touched so far.
    vms: BTreeMap<VmId, Vm>,
    free: BTreeMap<NodeId, Share>,
}

impl<'a> Trial<'a> {
    /// A plan's beginning.
    #[must_use]
    pub const fn new(cluster: &'a Cluster) -> Self {
        Self {
            cluster,
            vms: BTreeMap::new(),
            free: BTreeMap::new(),
        }
    }

    /// Takes one step.
    ///
    /// # Errors
    /// If it can't be taken.
    pub fn step(&mut self, step: &Step) -> Result<(), Refusal> {
        let id = VmId(step.vm);
        let row = self.cluster.vms.get(&id).ok_or(Refusal::NoVm { vm: id })?;
        let vm = self.vms.entry(id).or_insert_with(|| row.clone());
        let nodes = &self.cluster.nodes;
        let left = |node: NodeId| {
            let real = nodes.get(&node)?.free;
            Some(self.free.get(&node).copied().unwrap_or(real))
        };
        for change in vm.book(step, left)? {
            let now = self.free(change.node);
            let now = match (change.from, change.to) {
                (Holder::Free, _) => minus(now, change.share),
                (_, Holder::Free) => plus(now, change.share),
                _ => continue,
            };
            self.free.insert(change.node, now.ok_or(Refusal::BadPlan)?);
        }
        Ok(())
    }

    /// The VMs that were touched, as they are now.
    #[must_use]
    pub const fn vms(&self) -> &BTreeMap<VmId, Vm> {
        &self.vms
    }

    /// What a node has left now.
    #[must_use]
    pub fn free(&self, node: NodeId) -> Share {
        let real = self.cluster.nodes.get(&node).map(|node| node.free);
        let changed = self.free.get(&node).copied();
        changed.or(real).unwrap_or_default()
    }

    fn vm(&self, vm: VmId) -> Option<&Vm> {
        self.vms.get(&vm).or_else(|| self.cluster.vms.get(&vm))
    }

    /// Whether a wish is fulfilled now.
    pub(crate) fn fulfils(&self, wish: Wish) -> bool {
        match wish {
            Wish::Resize { vm, to } => self.vm(vm).is_some_and(|vm| vm.granted() == to),
            Wish::PlaceVcpu { vm, vcpu, to } => self.vm(vm).is_some_and(|vm| vm.home(vcpu) == to),
            Wish::MoveSlices {
                vm, from, count, ..
            } => {
                let before = self.cluster.vms.get(&vm);
                let before = before.map_or(0, |vm| vm.granted_at(from).slices);
                self.vm(vm)
                    .is_some_and(|vm| vm.granted_at(from).slices == before.saturating_sub(count))
            }
            Wish::Drain { node } => {
                let mut vms = self.cluster.vms.keys();
                vms.all(|vm| {
                    self.vm(*vm)
                        .is_some_and(|vm| !vm.placements.contains_key(&node))
                })
            }
            Wish::Rebalance { vm } => {
                let before = self.cluster.vms.get(&vm).map(Vm::granted);
                self.vm(vm).map(Vm::granted) == before
            }
        }
    }
}
