//! Plans for wishes, and what is to be done next.

use alloc::vec::Vec;
use core::fmt;

use vmm_shared::addr::NodeId;
use vmm_shared::log::Clock;
use zerocopy::IntoBytes;

use super::blocks;
use super::draft::{Ask, Draft, draft};
use super::explain::{Conflict, Explanation, conflict, explain};
use super::steps::steps;
use super::{Cause, broken};
use crate::cluster::{
    Change, Cluster, Job, JobId, JobState, Op, Refusal, Step, StepKind, Trial, Vm, VmId, VmPhase,
    Wish,
};
use crate::optimise::{Budget, NoSolution, Share, Solution, solve, solve_few};
use crate::policy::ANY;

/// From so many nodes on, growing looks at few of them.
const MANY_NODES: usize = 64;

/// What a plan takes: for `--dry-run`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effort {
    /// vCPUs that are plugged.
    pub vcpus_added: u32,
    /// vCPUs that are unplugged.
    pub vcpus_removed: u32,
    /// vCPUs that change nodes: each stops for moments.
    pub vcpus_moved: u32,
    /// Slices that are plugged.
    pub slices_added: u32,
    /// Slices that are unplugged.
    pub slices_removed: u32,
    /// Slices that change nodes: each is copied, 2 MiB.
    pub slices_moved: u32,
}

/// What is planned for one VM, and why.
#[derive(Clone, Debug)]
pub struct Part {
    /// Which.
    pub vm: VmId,
    /// What each node will give.
    pub shares: Vec<(NodeId, Share)>,
    /// What the placement costs by the policy.
    pub cost: i64,
    /// No placement costs less.
    pub bound: i64,
    /// Why it is as it is.
    pub explanation: Explanation,
}

/// The plan of a wish.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Its steps.
    pub steps: Vec<Step>,
    /// What they take.
    pub effort: Effort,
    /// What the optimiser decided; nothing for moves that say where to.
    pub parts: Vec<Part>,
}

impl Plan {
    fn new(steps: Vec<Step>, parts: Vec<Part>) -> Self {
        let mut effort = Effort::default();
        for step in &steps {
            let (vcpus, slices) = match step.kind {
                StepKind::Add => (&mut effort.vcpus_added, &mut effort.slices_added),
                StepKind::Remove => (&mut effort.vcpus_removed, &mut effort.slices_removed),
                StepKind::Move => (&mut effort.vcpus_moved, &mut effort.slices_moved),
                StepKind::Lease | StepKind::Release => continue,
            };
            let share = step.share();
            *vcpus += share.vcpus;
            *slices += share.slices;
        }
        Self {
            steps,
            effort,
            parts,
        }
    }

    /// The operation that starts a waiting job with this plan, and its
    /// payload.
    #[must_use]
    pub fn into_op(&self, job: JobId) -> (Op, &[u8]) {
        (Op::from(Change::Plan { job }), self.steps.as_bytes())
    }
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoPlan {
    /// It names a VM, node or vCPU that is not there.
    Gone,
    /// No placement satisfies all constraints.
    Conflict(Conflict),
    /// What was asked in so many words breaks a hard constraint.
    Breaks(Cause),
    /// The guest takes memory, and gives it up, in whole blocks.
    NotWhole {
        /// The nearest numbers of slices that it can have.
        below: u32,
        /// Above what was asked.
        above: u32,
    },
    /// No placement was found in time; there may be one.
    TimedOut,
    /// The steps don't fit: two VMs changed at once. Ask again.
    Stale,
}

impl fmt::Display for NoPlan {
    /// One line, for the operator.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone => f.write_str("it names a VM, node or vCPU that is not there"),
            Self::Conflict(conflict) => conflict.fmt(f),
            Self::Breaks(cause) => write!(f, "{cause} does not allow it"),
            Self::NotWhole { below, above } => {
                let (below, above) = (*below, *above);
                Refusal::NotWhole { below, above }.fmt(f)
            }
            Self::TimedOut => f.write_str("no placement was found in time; there may be one"),
            Self::Stale => f.write_str("the tables have changed meanwhile; ask again"),
        }
    }
}

/// Plans a wish, with the tables as they are. Also a dry run: nothing is
/// changed.
///
/// # Errors
/// If there is no plan.
pub fn plan<C: Clock>(
    cluster: &Cluster,
    wish: Wish,
    budget: Budget,
    clock: &C,
) -> Result<Plan, NoPlan> {
    match wish {
        Wish::Resize { vm, to } => {
            let row = cluster.vms().get(&vm).ok_or(NoPlan::Gone)?;
            if let Some((below, above)) = row.whole_around(to.slices) {
                return Err(NoPlan::NotWhole { below, above });
            }
            let ask = Ask {
                vm,
                total: to,
                leave: None,
                may_move: false,
            };
            place(cluster, &[ask], budget, clock)
        }
        Wish::Rebalance { vm } => {
            let ask = Ask {
                vm,
                total: cluster.vms().get(&vm).ok_or(NoPlan::Gone)?.granted(),
                leave: None,
                may_move: true,
            };
            place(cluster, &[ask], budget, clock)
        }
        Wish::Drain { node } => drain(cluster, node, budget, clock),
        Wish::PlaceVcpu { vm, vcpu, to } => {
            let from = cluster.vms().get(&vm).ok_or(NoPlan::Gone)?.home(vcpu);
            let kind = match (from, to) {
                (Some(_), Some(_)) => StepKind::Move,
                (None, Some(_)) => StepKind::Add,
                (Some(_), None) => StepKind::Remove,
                (None, None) => return Ok(Plan::new(Vec::new(), Vec::new())),
            };
            let step = Step {
                vcpu: vcpu.0,
                from: from.map_or(ANY, |node| node.0),
                to: to.map_or(ANY, |node| node.0),
                ..Step::new(kind, vm)
            };
            as_told(cluster, step)
        }
        Wish::MoveSlices {
            vm,
            from,
            to,
            count,
        } => {
            let step = Step {
                from: from.0,
                to: to.0,
                slices: count,
                ..Step::new(StepKind::Move, vm)
            };
            as_told(cluster, step)
        }
    }
}

/// A step that says what and where: nothing is left to decide.
fn as_told(cluster: &Cluster, step: Step) -> Result<Plan, NoPlan> {
    let id = VmId(step.vm);
    let share = step.share();
    let ledger = |kind, from: u16, to: u16| Step {
        from,
        to,
        cores: share.vcpus,
        slices: share.slices,
        ..Step::new(kind, id)
    };
    let lease = ledger(StepKind::Lease, ANY, step.to);
    let release = ledger(StepKind::Release, step.from, ANY);
    let steps: Vec<Step> = match step.kind {
        StepKind::Add => [lease, step].into(),
        StepKind::Remove => [step, release].into(),
        _ => [lease, step, release].into(),
    };
    let mut trial = Trial::new(cluster);
    for step in &steps {
        let room = |node: u16| trial.free(NodeId(node));
        if step.kind == StepKind::Lease
            && (room(step.to).vcpus < share.vcpus || room(step.to).slices < share.slices)
        {
            return Err(NoPlan::Breaks(Cause::Capacity));
        }
        trial.step(step).map_err(|_| NoPlan::Gone)?;
    }
    if let Some(after) = trial.vms().get(&id)
        && let Some(cause) = broken(cluster, id, after, &|node| trial.free(node))
    {
        return Err(NoPlan::Breaks(cause));
    }
    Ok(Plan::new(steps, Vec::new()))
}

/// Empties a node. The VMs on it are placed one after the other; if one finds
/// nothing, it is placed first instead.
fn drain<C: Clock>(
    cluster: &Cluster,
    node: NodeId,
    budget: Budget,
    clock: &C,
) -> Result<Plan, NoPlan> {
    let on = |vm: &&(VmId, Share)| vm.1 != Share::NONE;
    let vms = cluster
        .vms()
        .iter()
        .map(|(id, vm)| (*id, vm.granted_at(node)));
    let vms: Vec<(VmId, Share)> = vms.collect();
    let mut asks: Vec<Ask> = vms
        .iter()
        .filter(on)
        .filter_map(|(vm, _)| {
            Some(Ask {
                vm: *vm,
                total: cluster.vms().get(vm)?.granted(),
                leave: Some(node),
                may_move: false,
            })
        })
        .collect();
    let share = Budget {
        time_ns: budget.time_ns / (1 + asks.len() as u64),
        ..budget
    };
    let mut outcome = place(cluster, &asks, share, clock);
    for index in 1..asks.len() {
        if !matches!(outcome, Err(NoPlan::Conflict(_))) {
            break;
        }
        asks[..=index].rotate_right(1);
        outcome = place(cluster, &asks, share, clock);
    }
    outcome
}

fn place<C: Clock>(
    cluster: &Cluster,
    asks: &[Ask],
    budget: Budget,
    clock: &C,
) -> Result<Plan, NoPlan> {
    let mut all = Vec::new();
    let mut parts = Vec::new();
    let mut trial = Trial::new(cluster);
    for ask in asks {
        let (draft, ask, solution) = answer(cluster, &trial, *ask, budget, clock)?;
        let nodes = draft.nodes.iter().zip(&solution.shares);
        let shares: Vec<(NodeId, Share)> = nodes
            .filter(|(_, share)| share.is_open())
            .map(|(node, share)| (*node, *share))
            .collect();
        let steps = steps(cluster, ask.vm, &shares).ok_or(NoPlan::Gone)?;
        for step in &steps {
            trial.step(step).map_err(|_| NoPlan::Stale)?;
        }
        all.extend(steps);
        parts.push(Part {
            vm: ask.vm,
            shares,
            cost: solution.cost,
            bound: solution.bound,
            explanation: explain(cluster, &draft, &ask, &solution.shares),
        });
    }
    // Stable: each VM's own order stays.
    all.sort_by_key(|step| step.kind);
    Ok(Plan::new(all, parts))
}

/// The best answer that moves nothing, or else the best of all.
fn answer<C: Clock>(
    cluster: &Cluster,
    trial: &Trial<'_>,
    ask: Ask,
    budget: Budget,
    clock: &C,
) -> Result<(Draft, Ask, Solution), NoPlan> {
    let free = Ask {
        may_move: true,
        ..ask
    };
    let asks = if ask.may_move {
        &[free][..]
    } else {
        &[ask, free][..]
    };
    for ask in asks {
        let draft = draft(cluster, trial, ask, &[]).ok_or(NoPlan::Gone)?;
        let grows = !ask.may_move && draft.nodes.len() >= MANY_NODES;
        let solution = if grows {
            solve_few(&draft.problem, budget, clock)
        } else {
            solve(&draft.problem, budget, clock)
        };
        match solution {
            Ok(solution) => {
                let vm = cluster.vms().get(&ask.vm).ok_or(NoPlan::Gone)?;
                let whole = blocks::round(&draft, vm, ask, solution);
                return Ok((draft, *ask, whole.ok_or(NoPlan::TimedOut)?));
            }
            Err(NoSolution::Impossible) => {}
            Err(NoSolution::TimedOut) => return Err(NoPlan::TimedOut),
            Err(NoSolution::Malformed) => return Err(NoPlan::Gone),
        }
    }
    match conflict(cluster, trial, &free) {
        Some(conflict) => Err(NoPlan::Conflict(conflict)),
        None => Err(NoPlan::TimedOut),
    }
}

/// What the control role has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Todo {
    /// [`plan`] the job's wish and append [`Plan::into_op`]; if there is none,
    /// [`Change::Refuse`].
    Plan(JobId),
    /// Execute the step, if it is no [bookkeeping](Step::is_bookkeeping), and
    /// append [`Change::Step`].
    Execute {
        /// Of which job.
        job: JobId,
        /// By which index it is reported.
        index: u32,
        /// What to do.
        step: Step,
    },
}

/// What is to be done now, of each job at most one thing. It follows from the
/// tables alone: a control role that takes over just goes on.
pub fn todo(cluster: &Cluster) -> impl Iterator<Item = Todo> {
    cluster.jobs().values().filter_map(|job| match job.state() {
        JobState::Waiting => is_due(cluster, job).then_some(Todo::Plan(job.id())),
        _ => job.current().map(|(index, step)| Todo::Execute {
            job: job.id(),
            index,
            step,
        }),
    })
}

/// A job for a VM whose guest boots waits, unless it gives the VM what it
/// boots with.
fn is_due(cluster: &Cluster, job: &Job) -> bool {
    let boots = |vm: &Vm| vm.phase() == VmPhase::Booting && vm.granted() != Share::NONE;
    !cluster
        .vms()
        .iter()
        .any(|(id, vm)| boots(vm) && cluster.job_of(*id).is_some_and(|own| own.id() == job.id()))
}
