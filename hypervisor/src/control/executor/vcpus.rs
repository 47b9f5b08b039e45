//! Steps about a vCPU: an order in its record for each, see [`VcpuRecord`].
//!
//! ```text
//!   an order stands ──> wait; want it back if it is to be undone
//!   the guest has seen it, or it is another's, and it is not waited for ──> as it is
//!   it is so ──> Done
//!   it has this step's ticket, and an outcome ──> that
//!   else ──> leave the order, ring the devices' node
//! ```

use control_plane::cluster::{Job, Reason, Step, StepKind, StepResult};
use vmm_shared::addr::{Location, MAX_VCPUS, NodeId, VcpuId};
use vmm_shared::control::{BootBy, Order, Outcome, Place, Standing, Ticket, VcpuRecord};

use super::{NodeExecutor, reason};
use crate::vm::DEVICE_NODE;

/// What a job orders for a vCPU: one thing, and perhaps its undoing.
fn ticket(job: &Job, is_undoing: bool) -> Ticket {
    Ticket::new(job.id().0 << 1 | u32::from(is_undoing))
}

const fn failed(reason: Reason) -> StepResult {
    StepResult::Failed {
        reason: reason.code(),
    }
}

impl NodeExecutor<'_> {
    /// Whether such a step can be done at all.
    pub(super) fn can_change_vcpu(&self, step: &Step) -> Result<(), &'static str> {
        let is_pv = BootBy::from_raw(self.config.boot_by) == Some(BootBy::Paravirtual);
        match step.kind {
            StepKind::Add | StepKind::Remove if is_pv => {
                Err("cannot change the number of vCPUs of the paravirtual guest")
            }
            _ => Ok(()),
        }
    }

    /// Goes on with one.
    pub(super) fn drive_vcpu(&self, job: &Job, step: &Step) -> Option<StepResult> {
        let Some(record) = self.control.vcpu(VcpuId(step.vcpu)) else {
            return Some(failed(Reason::Misplaced));
        };
        let is_so = || is_so(&record, job, step).then_some(StepResult::Done);
        // What the guest may have is the VM's.
        let as_it_is = || is_so().unwrap_or(failed(Reason::Unanswered));
        let tickets = [ticket(job, false), ticket(job, true)];
        let standing = self.standing(record.orders(), job, tickets);
        if standing != Standing::Nothing {
            // Who has left it may not have lived to say so.
            self.tell_devices();
        }
        match standing {
            Standing::Nothing => {}
            Standing::Seen | Standing::Others if job.is_abandoned() => return Some(as_it_is()),
            // There is nothing to undo.
            Standing::Others if job.is_undoing() => return is_so(),
            Standing::Own | Standing::Seen | Standing::Others => return None,
        }
        if let Some(done) = is_so() {
            return Some(done);
        }
        match record.outcome_of(ticket(job, job.is_undoing())) {
            // The guest has it, and will start it.
            Some(Outcome::Done) if is_coming(&record, step) => None,
            Some(outcome) => Some(end(outcome, job, step)),
            None if job.is_abandoned() && step.kind != StepKind::Move => Some(as_it_is()),
            None => self.order(&record, job, step),
        }
    }

    fn order(&self, record: &VcpuRecord, job: &Job, step: &Step) -> Option<StepResult> {
        let order = match step.kind {
            StepKind::Remove => Order::Reclaim,
            kind => {
                let Some(at) = self.emptiest_core(NodeId(step.to)) else {
                    return Some(failed(Reason::NoCore));
                };
                match kind {
                    StepKind::Add => Order::Grant(at),
                    _ => Order::Move(at),
                }
            }
        };
        // One that was put out while it looked must not order anything.
        let ticket = ticket(job, job.is_undoing());
        if (self.may_ask)() && record.ask(order, ticket).is_ok() {
            self.tell_devices();
        }
        None
    }

    pub(super) fn tell_devices(&self) {
        self.control.vm().count_order();
        (self.ring)(DEVICE_NODE);
    }

    /// The core of a node that has, or is to get, the fewest vCPUs.
    fn emptiest_core(&self, node: NodeId) -> Option<Location> {
        let share = self.config.shares.get(usize::from(node.0))?;
        let cores = u16::try_from(share.cores).unwrap_or(u16::MAX);
        let vcpus = (0..).map(VcpuId).take(MAX_VCPUS);
        let at = |vcpu| self.control.vcpu(vcpu)?.place()?.location();
        let taken: alloc::vec::Vec<u16> = vcpus
            .filter_map(at)
            .filter(|at| at.node == node)
            .map(|at| at.core)
            .collect();
        let load = |core: &u16| taken.iter().filter(|taken| *taken == core).count();
        let core = (0..cores).min_by_key(load)?;
        Some(Location { node, core })
    }
}

/// Whether all is as the step says.
fn is_so(record: &VcpuRecord, job: &Job, step: &Step) -> bool {
    let is_there = |at: Location| at.node == NodeId(step.to);
    match (step.kind, record.place()) {
        (StepKind::Remove, Some(Place::Absent)) => true,
        // A vCPU that was never taken away need not have been started, either.
        (StepKind::Add, Some(Place::At(at))) => {
            is_there(at) && (record.has_started() || job.is_undoing())
        }
        (StepKind::Move, Some(Place::At(at))) => is_there(at),
        _ => false,
    }
}

/// Whether it is where it is to come, and the guest need only start it.
fn is_coming(record: &VcpuRecord, step: &Step) -> bool {
    step.kind == StepKind::Add && matches!(record.place(), Some(Place::At(_)))
}

/// How a step has ended whose order had this outcome.
fn end(outcome: Outcome, job: &Job, step: &Step) -> StepResult {
    match reason(outcome, step) {
        // The rest of the job does not depend on it.
        kept @ Reason::Kept(_) if !job.is_undoing() => StepResult::Short {
            slices: 0,
            reason: kept.code(),
        },
        other => failed(other),
    }
}

#[cfg(test)]
mod tests;
