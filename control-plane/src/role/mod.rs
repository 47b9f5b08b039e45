//! What the control role does: it answers operators, and goes on with jobs.
//!
//! A [`Role`] remembers nothing that matters: all decisions are in the log, and
//! whoever takes over goes on from there. Time, the log and the nodes are its
//! caller's ([`Tables`], [`Executor`]), so that it runs on any host.

mod requests;

use vmm_shared::addr::NodeId;
use vmm_shared::log::{Clock, ReplicaError, Thread};

use crate::cluster::{Change, Cluster, Done, Job, Op, Refusal, Step, StepResult};
use crate::optimise::Budget;
use crate::place::plan::{Todo, plan, todo};

pub use requests::Reply;

/// How long a plan may take: the control role also has to show that it lives.
const PLANNING: Budget = Budget::exact(100_000_000);

/// The cluster's tables, as their holder reads and changes them.
pub trait Tables {
    /// Appends an operation; what came of it.
    ///
    /// # Errors
    /// If the log did not take it, or lost its answer.
    fn append(&mut self, op: Op, payload: &[u8]) -> Result<Result<Done, Refusal>, ReplicaError>;

    /// Reads the tables as they are now.
    ///
    /// # Errors
    /// If this member follows the log no more.
    fn read<R>(&mut self, query: impl FnOnce(&Cluster) -> R) -> Result<R, ReplicaError>;
}

impl<C: Clock> Tables for Thread<'_, Cluster, C> {
    fn append(&mut self, op: Op, payload: &[u8]) -> Result<Result<Done, Refusal>, ReplicaError> {
        self.update_with(op, payload)
    }

    fn read<R>(&mut self, query: impl FnOnce(&Cluster) -> R) -> Result<R, ReplicaError> {
        Thread::read(self, query)
    }
}

/// Who makes steps so.
pub trait Executor {
    /// Whether such steps can be done at all.
    ///
    /// # Errors
    /// What can't be done, for the operator: the end of "this version …".
    fn can(&self, step: &Step) -> Result<(), &'static str>;

    /// Goes on with a job's step, or with [undoing](Job::is_undoing) one,
    /// without waiting; how it ended, once it has. It need not have been begun,
    /// nor is it known who has begun it: what shall be follows from the step
    /// and the tables, which still are as before it.
    fn drive(&mut self, cluster: &Cluster, job: &Job, step: &Step) -> Option<StepResult>;

    /// What a guest that no job changes is found to have got or given up: the
    /// tables follow.
    fn found(&self, cluster: &Cluster) -> Option<Change>;
}

/// The control role of one node.
#[derive(Clone, Debug, Default)]
pub struct Role {
    upload: requests::Upload,
    /// It has taken over in this life.
    has_begun: bool,
}

impl Role {
    /// Takes over, if the one in charge is gone: `is_alive` says of a node that
    /// it takes part. Whether this node is in charge now.
    ///
    /// # Errors
    /// As for [`Tables`].
    pub fn take_over<T: Tables>(
        &mut self,
        me: NodeId,
        is_alive: impl Fn(NodeId) -> bool,
        tables: &mut T,
    ) -> Result<bool, ReplicaError> {
        match tables.read(|cluster| cluster.controller().0)? {
            Some(node) if node == me && self.has_begun => return Ok(true),
            Some(node) if node != me && is_alive(node) => {
                self.has_begun = false;
                return Ok(false);
            }
            // Nobody is in charge, or this node was in an earlier life.
            _ => {}
        }
        let change = Change::TakeOver { node: me };
        tables.append(Op::from(change), &[])?.ok();
        self.has_begun = true;
        Ok(true)
    }

    /// Does the next thing that the tables ask for; whether there was one.
    ///
    /// # Errors
    /// As for [`Tables`]. It is found again in the tables.
    pub fn turn<T: Tables, C: Clock>(
        &mut self,
        tables: &mut T,
        executor: &mut impl Executor,
        clock: &C,
    ) -> Result<bool, ReplicaError> {
        let next = tables.read(|cluster| next(cluster, executor, clock))?;
        let Some((op, payload)) = next else {
            return Ok(false);
        };
        let outcome = match tables.append(op, &payload) {
            Ok(Ok(_)) => return Ok(true),
            // Its time will come.
            Ok(Err(Refusal::Busy { .. } | Refusal::StillBooting { .. })) => return Ok(false),
            // The plan does not fit the tables, or the log.
            Ok(Err(_)) | Err(ReplicaError::TooLarge { .. }) => op.change(),
            Err(error) => return Err(error),
        };
        if let Some(Change::Plan { job }) = outcome {
            // The job may have ended meanwhile: then this is refused, too.
            let _ = tables.append(Op::from(Change::Refuse { job }), &[])?;
        }
        Ok(false)
    }
}

/// The operation that carries on with the first job that can be carried on
/// with.
fn next<C: Clock>(
    cluster: &Cluster,
    executor: &mut impl Executor,
    clock: &C,
) -> Option<(Op, alloc::vec::Vec<u8>)> {
    let todo = todo(cluster).find_map(|todo| match todo {
        Todo::Plan(job) => {
            let wish = cluster.jobs().get(&job)?.wish();
            match plan(cluster, wish, PLANNING, clock) {
                Ok(plan) if plan.steps.iter().all(|step| executor.can(step).is_ok()) => {
                    let (op, payload) = plan.into_op(job);
                    Some((op, payload.to_vec()))
                }
                _ => Some((Op::from(Change::Refuse { job }), alloc::vec::Vec::new())),
            }
        }
        Todo::Execute { job, index, step } => {
            let result = match step.is_bookkeeping() {
                true => StepResult::Done,
                false => executor.drive(cluster, cluster.jobs().get(&job)?, &step)?,
            };
            let change = Change::Step { job, index, result };
            Some((Op::from(change), alloc::vec::Vec::new()))
        }
    });
    let found = || {
        let change = executor.found(cluster)?;
        Some((Op::from(change), alloc::vec::Vec::new()))
    };
    todo.or_else(found)
}
