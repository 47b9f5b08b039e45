//! Operators' requests: from bytes that anybody may have written to a change
//! of the tables, or a sentence that says why not.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use vmm_shared::log::{At, Clock, MemberId, ReplicaError, StateMachine};
use vmm_shared::rpc::console::{Answer, ChangeRequest, MAX_UPLOAD, Method, Part, Verdict};
use zerocopy::FromBytes;

use super::{Executor, PLANNING, Role, Tables};
use crate::cluster::{Change, Cluster, Done, Op, Refusal, Wish};
use crate::place::plan::plan;

/// What a call is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// This.
    Answer(Answer),
    /// Nothing but that it has come.
    Taken,
    /// There is no such method.
    NoSuchMethod,
    /// These bytes are no arguments.
    BadArguments,
}

/// The payload of a change to come.
#[derive(Clone, Debug, Default)]
pub(super) struct Upload {
    request: u64,
    bytes: Vec<u8>,
}

impl Upload {
    /// Takes a part; `None` if it does not follow on the last.
    fn take(&mut self, part: &Part) -> Option<()> {
        let bytes = part.bytes.get(..usize::try_from(part.len).ok()?)?;
        if part.offset == 0 {
            self.request = part.request;
            self.bytes.clear();
        }
        let fits = self.request == part.request
            && self.bytes.len() as u64 == u64::from(part.offset)
            && self.bytes.len() + bytes.len() <= MAX_UPLOAD;
        fits.then(|| self.bytes.extend_from_slice(bytes))
    }

    /// What has come for a request, if it is all there.
    fn of(&self, request: u64, len: u32) -> Option<Vec<u8>> {
        match len {
            0 => Some(Vec::new()),
            _ if request == self.request && self.bytes.len() as u64 == u64::from(len) => {
                Some(self.bytes.clone())
            }
            _ => None,
        }
    }
}

impl Role {
    /// Answers a call of an operator's.
    pub fn answer<T: Tables, C: Clock>(
        &mut self,
        method: u32,
        body: &[u8],
        tables: &mut T,
        executor: &impl Executor,
        clock: &C,
    ) -> Reply {
        match Method::from_number(method) {
            None => Reply::NoSuchMethod,
            Some(Method::Part) => match Part::read_from_bytes(body) {
                Ok(part) if self.upload.take(&part).is_some() => Reply::Taken,
                _ => Reply::BadArguments,
            },
            Some(Method::Change) => {
                let Ok(request) = ChangeRequest::read_from_bytes(body) else {
                    return Reply::BadArguments;
                };
                let Some(payload) = self.upload.of(request.request, request.upload_len) else {
                    return Reply::BadArguments;
                };
                let op = Op::read_from_bytes(&request.op).expect("as many bytes");
                let dry_run = request.dry_run != 0;
                Reply::Answer(change(op, &payload, dry_run, tables, executor, clock))
            }
        }
    }
}

fn change<T: Tables, C: Clock>(
    op: Op,
    payload: &[u8],
    dry_run: bool,
    tables: &mut T,
    executor: &impl Executor,
    clock: &C,
) -> Answer {
    if let Err(why) = may_ask(&op) {
        return refused(0, why);
    }
    let tried = tables.read(|cluster| try_out(cluster, &op, payload, executor, clock));
    match tried {
        Err(error) => return trouble(error),
        Ok(Err(why)) => return refused(0, &why),
        Ok(Ok(outcome)) if dry_run => return told(&outcome, true),
        // The tables' own refusals go into the journal, too.
        Ok(Ok(_)) => {}
    }
    match tables.append(op, payload) {
        Ok(outcome) => told(&outcome, false),
        Err(error) => trouble(error),
    }
}

/// What operators change by themselves; the rest is the control role's.
fn may_ask(op: &Op) -> Result<(), &'static str> {
    match op.change() {
        Some(
            Change::Ask { .. }
            | Change::Cancel { .. }
            | Change::Abandon { .. }
            | Change::Cordon { .. }
            | Change::Leave { .. }
            | Change::Admit { .. }
            | Change::LoadPolicy,
        ) => Ok(()),
        Some(_) => Err("this is not for operators to change"),
        None => Err("this is no request of this version"),
    }
}

/// What would come of it; in words if there is no way to do it.
fn try_out<C: Clock>(
    cluster: &Cluster,
    op: &Op,
    payload: &[u8],
    executor: &impl Executor,
    clock: &C,
) -> Result<Result<Done, Refusal>, String> {
    let mut after = cluster.clone();
    let at = At {
        position: 0,
        member: MemberId::new(0).expect("the first"),
    };
    let outcome = after.apply(op, payload, at);
    if let (Ok(Done::Started { .. }), Some(Change::Ask { wish, .. })) = (outcome, op.change()) {
        can_be_done(&after, wish, executor, clock)?;
    }
    Ok(outcome)
}

fn can_be_done<C: Clock>(
    cluster: &Cluster,
    wish: Wish,
    executor: &impl Executor,
    clock: &C,
) -> Result<(), String> {
    let plan = plan(cluster, wish, PLANNING, clock).map_err(|why| why.to_string())?;
    for step in &plan.steps {
        if !step.is_bookkeeping() {
            let sentence = |what| format!("this version {what}");
            executor.can(step).map_err(sentence)?;
        }
    }
    Ok(())
}

fn refused(code: u32, why: &str) -> Answer {
    Answer::new(Verdict::Refused, 0).with_sentence(code, why)
}

fn told(outcome: &Result<Done, Refusal>, dry_run: bool) -> Answer {
    match outcome {
        // The job of a dry run is nobody's.
        Ok(Done::Started { .. }) if dry_run => Answer::new(Verdict::Applied, 0),
        Ok(Done::Started { job }) => Answer::new(Verdict::Started, job.0),
        Ok(Done::Joined { job }) => Answer::new(Verdict::Joined, job.0),
        Ok(Done::Nothing) => Answer::new(Verdict::Nothing, 0),
        Ok(Done::Applied) => Answer::new(Verdict::Applied, 0),
        Err(refusal) => refused(refusal.code().0.into(), &refusal.to_string()),
    }
}

fn trouble(error: ReplicaError) -> Answer {
    let verdict = match error {
        ReplicaError::OutcomeUnknown { .. } => Verdict::Unknown,
        _ => Verdict::Refused,
    };
    let why = format!("the cluster's log does not take it now: {error:?}");
    Answer::new(verdict, 0).with_sentence(0, &why)
}
