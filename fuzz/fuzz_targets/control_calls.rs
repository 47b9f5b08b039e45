//! Calls to the control role, as a hostile launcher or node would make them.
//!
//! The input is a list of calls: a byte for the method, two for the length of
//! the body, the body. Whatever comes, the tables stay whole, and every answer
//! is one.

#![no_main]

use control_plane::cluster::{Change, Cluster, Done, Job, Op, Refusal, Step, StepResult, VmId, VmPhase};
use control_plane::optimise::Share;
use control_plane::role::{Executor, Reply, Role, Tables};
use libfuzzer_sys::fuzz_target;
use vmm_shared::addr::NodeId;
use vmm_shared::log::{At, Clock, MemberId, ReplicaError, StateMachine};
use vmm_shared::rpc::console::Verdict;

struct Held(Cluster, u64);

impl Tables for Held {
    fn append(&mut self, op: Op, payload: &[u8]) -> Result<Result<Done, Refusal>, ReplicaError> {
        self.1 += 1;
        let at = At {
            position: self.1,
            member: MemberId::new(0).expect("a small number"),
        };
        Ok(self.0.apply(&op, payload, at))
    }

    fn read<R>(&mut self, query: impl FnOnce(&Cluster) -> R) -> Result<R, ReplicaError> {
        Ok(query(&self.0))
    }
}

struct Obedient;

impl Executor for Obedient {
    fn can(&self, _: &Step) -> Result<(), &'static str> {
        Ok(())
    }

    fn drive(&mut self, _: &Cluster, _: &Job, _: &Step) -> Option<StepResult> {
        Some(StepResult::Done)
    }

    fn found(&self, _: &Cluster) -> Option<Change> {
        None
    }
}

/// Time that stands still: nothing may depend on its passing.
struct Still;

impl Clock for Still {
    fn now_ns(&self) -> u64 {
        0
    }
}

fn start() -> Held {
    let mut held = Held(Cluster::default(), 0);
    let join = |node| Change::Join {
        node: NodeId(node),
        domain: node,
        size: Share::new(4, 16),
    };
    let vm = VmId(0);
    let create = Change::CreateVm {
        vm,
        most: Share::new(8, 32),
        least: Share::new(1, 1),
        block: 1,
    };
    let runs = Change::Phase {
        vm,
        phase: VmPhase::Running,
    };
    for change in [join(0), join(1), create, runs] {
        let done = held.append(change.into(), &[]).expect("no log");
        done.expect("legal");
    }
    held
}

fn next_call<'a>(data: &mut &'a [u8]) -> Option<(u32, &'a [u8])> {
    let (head, rest) = data.split_first_chunk::<3>()?;
    let len = usize::from(u16::from_le_bytes([head[1], head[2]])) % 217;
    let (body, rest) = rest.split_at_checked(len)?;
    *data = rest;
    Some((u32::from(head[0]) % 4, body))
}

fuzz_target!(|data: &[u8]| {
    let mut data = data;
    let (mut held, mut role) = (start(), Role::default());
    while let Some((method, body)) = next_call(&mut data) {
        let reply = role.answer(method, body, &mut held, &Obedient, &Still);
        if let Reply::Answer(answer) = reply {
            let verdict = Verdict::from_number(answer.verdict).expect("a verdict");
            assert_ne!(verdict, Verdict::Unknown);
            assert_eq!(verdict == Verdict::Refused, !answer.sentence().is_empty());
        }
        for _ in 0..8 {
            let _ = role.turn(&mut held, &mut Obedient, &Still);
        }
        held.0.check().expect("whole tables");
    }
});
