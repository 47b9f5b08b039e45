//! The cluster's tables, and what operators change of them, as the process
//! that holds a rack tells them.

use control_plane::cluster::{
    Change, Cluster, Job, JobId, JobState, Reason, Step, StepKind, Vm, VmPhase, Wish,
};
use control_plane::optimise::Share;
use control_plane::place::plan::{NoPlan, Plan};
use control_plane::policy::ANY;
use rack::{Rack, RackError, VM};
use serde::{Deserialize, Serialize};
use vmm_shared::addr::{LARGE_PAGE_SIZE, NodeId, VcpuId};
use vmm_shared::control::{BLOCK_SIZE, BlockOrder, Order, Place};
use vmm_shared::rpc::console::{Answer, Verdict};

/// What operators ask for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Wanted {
    /// vCPUs, and memory in bytes; what is not said stays as it is desired now.
    Resize {
        vcpus: Option<u32>,
        memory: Option<u64>,
    },
    MoveVcpu {
        vcpu: u16,
        to: u16,
    },
    /// One that the guest does not have; without a node, to the one that the
    /// guest takes it to be near to.
    AddVcpu {
        vcpu: u16,
        on: Option<u16>,
    },
    RemoveVcpu {
        vcpu: u16,
    },
    Rebalance,
    Cordon {
        node: u16,
        on: bool,
    },
    Drain {
        node: u16,
    },
    Leave {
        node: u16,
    },
    Cancel {
        job: u32,
        /// Without waiting for the guest.
        force: bool,
    },
    /// The policy's binary form.
    Policy {
        bytes: Vec<u8>,
    },
}

/// What came of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Changed {
    /// "applied", "started", "joined", "nothing", "refused" or "unknown".
    pub verdict: String,
    /// Of a refusal: its stable number, 0 if it has none.
    pub code: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job: Option<u32>,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Of a dry run: what would be done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<PlanReport>,
}

/// A plan and its cost.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct PlanReport {
    /// Each step in words.
    pub steps: Vec<String>,
    pub vcpus_added: u32,
    pub vcpus_removed: u32,
    pub vcpus_moved: u32,
    pub memory_added_bytes: u64,
    pub memory_removed_bytes: u64,
    pub memory_moved_bytes: u64,
    /// What the placement costs by the policy, and what any would at least.
    pub cost: i64,
    pub bound: i64,
    /// Why each node gives what it gives, a line each.
    pub explanation: Vec<String>,
    /// Why there is no plan; the rest is empty then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub conflict: Option<String>,
}

/// The tables.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ClusterReport {
    /// The node that decides, if it takes part, and how often somebody took
    /// over.
    pub controller: Option<u16>,
    pub term: u32,
    /// The log position behind the last operation, and a digest of the tables
    /// there; see `replica` of each node.
    pub position: u64,
    pub digest: String,
    pub vm: Option<Shape>,
    pub nodes: Vec<NodeRow>,
    /// Nodes that have left and may live on.
    pub left: Vec<u16>,
    pub jobs: Vec<JobReport>,
}

/// Three truths about the VM's size, and where it is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Shape {
    /// "booting" or "running".
    pub phase: String,
    pub desired: Amount,
    pub granted: Amount,
    pub seen: Amount,
    pub least: Amount,
    pub most: Amount,
    /// The node of each vCPU, if it is there.
    pub homes: Vec<Option<u16>>,
    /// The node that the guest takes each to be near to.
    pub seats: Vec<u16>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Amount {
    pub vcpus: u32,
    pub memory_bytes: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct NodeRow {
    pub id: u16,
    pub cordoned: bool,
    pub failure_domain: u16,
    pub has: Amount,
    pub free: Amount,
    /// What the VM has of it.
    pub gives: Amount,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct JobReport {
    pub id: u32,
    pub wish: String,
    /// "waiting", "running", "rolling-back", "finished", "rolled-back",
    /// "refused" or "stuck".
    pub state: String,
    pub ended: bool,
    /// All is as it was asked for.
    pub fulfilled: bool,
    pub steps: usize,
    pub done: u32,
    /// Why it did not end as asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What it needs of the guest to go on, if it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waits_for: Option<String>,
    /// vCPUs that it should have taken away and the guest kept.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub kept_vcpus: Vec<u16>,
    /// Memory that the guest did not take, or give up; in bytes.
    #[serde(skip_serializing_if = "is_zero", default)]
    pub short_bytes: u64,
    /// The blocks that it is in, as long as nobody has asked for them again.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub refused_blocks: Vec<RefusedBlock>,
}

/// A block of memory that the guest has refused to take, or to give up.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RefusedBlock {
    pub block: u16,
    /// What a Linux guest calls it.
    pub guest_name: String,
    /// The node that the guest takes it to be near to.
    pub home: u16,
    pub reason: String,
}

/// A line of the journal.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Event {
    pub position: u64,
    pub text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job: Option<u32>,
    /// The number of the refusal, if it took no effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refusal: Option<u8>,
}

fn amount(share: Share) -> Amount {
    Amount {
        vcpus: share.vcpus,
        memory_bytes: u64::from(share.slices) * LARGE_PAGE_SIZE,
    }
}

/// The tables as they are in the launcher's replica.
pub(crate) fn report(rack: &Rack) -> Result<ClusterReport, RackError> {
    let controller = rack.cluster().controller().ok().map(|node| node.0);
    rack.cluster().read(|cluster| {
        let digest = cluster.digest();
        ClusterReport {
            controller: controller.filter(|_| cluster.controller().0.is_some()),
            term: cluster.controller().1,
            position: digest.position,
            digest: format!("{:016x}", digest.value),
            vm: cluster.vms().get(&VM).map(shape),
            nodes: nodes(cluster),
            left: cluster.left().map(|node| node.0).collect(),
            jobs: cluster.jobs().values().map(|it| job(it, rack)).collect(),
        }
    })
}

fn shape(vm: &Vm) -> Shape {
    Shape {
        phase: match vm.phase() {
            VmPhase::Booting => "booting",
            VmPhase::Running => "running",
        }
        .to_owned(),
        desired: amount(vm.desired()),
        granted: amount(vm.granted()),
        seen: amount(vm.seen()),
        least: amount(vm.least()),
        most: amount(vm.most()),
        homes: vm
            .homes()
            .iter()
            .map(|home| home.map(|node| node.0))
            .collect(),
        seats: (0..)
            .map_while(|vcpu| vm.seat(VcpuId(vcpu)))
            .map(|node| node.0)
            .collect(),
    }
}

fn nodes(cluster: &Cluster) -> Vec<NodeRow> {
    let vm = cluster.vms().get(&VM);
    let rows = cluster.nodes().iter();
    rows.map(|(id, node)| NodeRow {
        id: id.0,
        cordoned: node.is_cordoned(),
        failure_domain: node.domain(),
        has: amount(node.size()),
        free: amount(node.free()),
        gives: amount(vm.map_or(Share::NONE, |vm| vm.granted_at(*id))),
    })
    .collect()
}

fn why(reason: u16) -> String {
    Reason::from_code(reason).to_string()
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
const fn is_zero(bytes: &u64) -> bool {
    *bytes == 0
}

/// What of a job that has ended stayed as it was, and why.
fn left_over(job: &Job, short: u32, reason: u16, blocks: &[RefusedBlock]) -> Option<String> {
    let name = |block: &RefusedBlock| format!("{} of node {}", block.guest_name, block.home);
    let names: Vec<String> = blocks.iter().map(name).collect();
    let names = match names.is_empty() {
        true => String::new(),
        false => format!(" ({})", names.join(", ")),
    };
    let vcpus = job
        .kept()
        .map(|(vcpu, why)| format!("vCPU {} stayed: {why}", vcpu.0));
    let memory =
        (short > 0).then(|| format!("{}M stayed as they were{names}: {}", short * 2, why(reason)));
    let all: Vec<String> = vcpus.chain(memory).collect();
    (!all.is_empty()).then(|| all.join("; "))
}

/// What the guest has been asked for by the step at hand and has not done.
fn waits_for(job: &Job, rack: &Rack) -> Option<String> {
    let (_, step) = job.current()?;
    if step.vcpu == ANY {
        return waits_for_blocks(rack);
    }
    let record = rack.record(VcpuId(step.vcpu))?;
    let what = match (step.kind, record.order(), record.place()?) {
        // Who undoes waits for the answer to what was asked first.
        (StepKind::Add | StepKind::Remove, Some(Order::Reclaim), _) => "give up",
        (StepKind::Add | StepKind::Remove, Some(Order::Grant(_)), Place::At(_)) => "take",
        (StepKind::Add, None, Place::At(_)) if !record.has_started() => "start",
        _ => return None,
    };
    Some(format!("the guest to {what} vCPU {}", step.vcpu))
}

fn waits_for_blocks(rack: &Rack) -> Option<String> {
    let asked = rack.asked_blocks();
    let count = |is_it: fn(&BlockOrder) -> bool| {
        let blocks = asked.iter().filter(|(_, order)| is_it(order)).count();
        rack::Size(blocks as u64 * BLOCK_SIZE)
    };
    let takes = count(|order| matches!(order, BlockOrder::Grant(_)));
    let gives = count(|order| matches!(order, BlockOrder::Reclaim));
    match (takes, gives) {
        (rack::Size(1..), _) => Some(format!("the guest to take {takes}")),
        (_, rack::Size(1..)) => Some(format!("the guest to give up {gives}")),
        _ => None,
    }
}

fn job(job: &Job, rack: &Rack) -> JobReport {
    let refused = rack.refused_blocks(job).into_iter();
    let refused = refused.map(|(place, why)| RefusedBlock {
        block: place.id.0,
        guest_name: format!("memory{}", place.linux_number()),
        home: place.home.0,
        reason: why.to_string(),
    });
    let refused: Vec<RefusedBlock> = refused.collect();
    let mut short_bytes = 0;
    let (state, fulfilled, reason) = match job.state() {
        JobState::Waiting => ("waiting", false, None),
        JobState::Running => ("running", false, None),
        JobState::RollingBack { reason } => ("rolling-back", false, Some(why(reason))),
        JobState::Finished { short, reason } => {
            short_bytes = u64::from(short) * LARGE_PAGE_SIZE;
            let left = left_over(job, short, reason, &refused);
            ("finished", left.is_none(), left)
        }
        JobState::RolledBack { reason } => ("rolled-back", false, Some(why(reason))),
        JobState::Refused => ("refused", false, Some("it has no placement".to_owned())),
        JobState::Stuck { reason } => ("stuck", false, Some(why(reason))),
    };
    JobReport {
        id: job.id().0,
        wish: job.wish().to_string(),
        state: state.to_owned(),
        ended: job.state().has_ended(),
        fulfilled,
        steps: job.steps().len(),
        done: job.done(),
        reason,
        waits_for: waits_for(job, rack),
        kept_vcpus: job.kept().map(|(vcpu, _)| vcpu.0).collect(),
        short_bytes,
        refused_blocks: refused,
    }
}

/// The journal from a position on.
pub(crate) fn events(rack: &Rack, since: u64) -> Result<Vec<Event>, RackError> {
    rack.cluster().read(|cluster| {
        let records = cluster.journal().since(since);
        records
            .map(|record| Event {
                position: record.position(),
                text: record.to_string(),
                job: record.job(),
                refusal: record.refusal(),
            })
            .collect()
    })
}

/// Waits for the end of a job; what it is like then, or after `limit`.
pub(crate) fn wait(
    rack: &Rack,
    id: u32,
    limit: std::time::Duration,
) -> Result<Option<JobReport>, RackError> {
    let find = |cluster: &Cluster| {
        let found = cluster.jobs().get(&JobId(id))?;
        Some(job(found, rack))
    };
    let ended = |cluster: &Cluster| match find(cluster) {
        Some(job) if !job.ended => None,
        other => Some(other),
    };
    match rack.cluster().wait(limit, ended)? {
        Some(ended) => {
            // Who is told that it has ended finds all three columns so.
            rack.cluster().observe()?;
            Ok(ended)
        }
        None => rack.cluster().read(find),
    }
}

/// Lets a node come back that has left, or a control node that has ended.
pub(crate) fn join(rack: &Rack, node: NodeId, dry_run: bool) -> Result<Changed, RackError> {
    let cluster = rack.cluster();
    let answer = match cluster.read(|tables| tables.has_left(node))? {
        true => cluster.change(0, Change::Admit { node }, &[], dry_run)?,
        false => {
            let started = match dry_run {
                true => rack.can_restart(node),
                false => rack.restart(node),
            };
            match started {
                Ok(()) => Answer::new(Verdict::Applied, 0),
                Err(why @ RackError::NoJoin { .. }) => {
                    Answer::new(Verdict::Refused, 0).with_sentence(0, &why.to_string())
                }
                Err(why) => return Err(why),
            }
        }
    };
    Ok(changed(&answer, None))
}

impl Wanted {
    fn change(&self, request: u64, cluster: &Cluster) -> Change {
        let ask = |wish| Change::Ask { request, wish };
        match self {
            Self::Cordon { node, on } => Change::Cordon {
                node: NodeId(*node),
                on: *on,
            },
            Self::Leave { node } => Change::Leave {
                node: NodeId(*node),
            },
            Self::Cancel { job, force: false } => Change::Cancel { job: JobId(*job) },
            Self::Cancel { job, force: true } => Change::Abandon { job: JobId(*job) },
            Self::Policy { .. } => Change::LoadPolicy,
            other => ask(other.wish(cluster).expect("one of the wishes")),
        }
    }

    /// What is wished, if it takes a job.
    fn wish(&self, cluster: &Cluster) -> Option<Wish> {
        Some(match self {
            Self::Resize { vcpus, memory } => {
                let now = cluster.vms().get(&VM).map_or(Share::NONE, Vm::desired);
                let slices = memory.map(|bytes| bytes / LARGE_PAGE_SIZE);
                let slices = slices.map(|count| u32::try_from(count).unwrap_or(u32::MAX));
                Wish::Resize {
                    vm: VM,
                    to: Share::new(vcpus.unwrap_or(now.vcpus), slices.unwrap_or(now.slices)),
                }
            }
            Self::MoveVcpu { vcpu, to } => place(*vcpu, Some(NodeId(*to))),
            Self::AddVcpu { vcpu, on } => {
                let seat = || cluster.vms().get(&VM)?.seat(VcpuId(*vcpu));
                place(*vcpu, on.map(NodeId).or_else(seat).or(Some(NodeId(0))))
            }
            Self::RemoveVcpu { vcpu } => place(*vcpu, None),
            Self::Rebalance => Wish::Rebalance { vm: VM },
            Self::Drain { node } => Wish::Drain {
                node: NodeId(*node),
            },
            _ => return None,
        })
    }

    /// Why it can't be meant so, as far as the tables alone can tell.
    fn misled(&self, cluster: &Cluster) -> Option<String> {
        let home = |vcpu: u16| cluster.vms().get(&VM)?.home(VcpuId(vcpu));
        match self {
            Self::MoveVcpu { vcpu, .. } if home(*vcpu).is_none() => Some(format!(
                "the VM has no vCPU {vcpu}; viaduct vcpus shows those that it has"
            )),
            Self::AddVcpu { vcpu, on } => {
                let there = home(*vcpu).filter(|node| on.is_some_and(|on| on != node.0))?;
                Some(format!(
                    "vCPU {vcpu} is on node {} already; use viaduct vcpu move",
                    there.0
                ))
            }
            Self::Resize {
                memory: Some(memory),
                ..
            } if !memory.is_multiple_of(LARGE_PAGE_SIZE) => {
                let vm = cluster.vms().get(&VM)?;
                let size = |slices: u32| rack::Size(u64::from(slices) * LARGE_PAGE_SIZE);
                let (least, most) = (vm.least().slices, vm.most().slices);
                let slices = u32::try_from(memory / LARGE_PAGE_SIZE).unwrap_or(most);
                let slices = slices.clamp(least, most);
                let (below, above) = vm
                    .whole_around(slices)
                    .unwrap_or((slices, slices.saturating_add(vm.block())));
                Some(format!(
                    "{} is no size that the VM can have; use {} or {}",
                    rack::Size(*memory),
                    size(below),
                    size(above.min(most))
                ))
            }
            _ => None,
        }
    }

    fn payload(&self) -> &[u8] {
        match self {
            Self::Policy { bytes } => bytes,
            _ => &[],
        }
    }
}

fn place(vcpu: u16, to: Option<NodeId>) -> Wish {
    let (vm, vcpu) = (VM, VcpuId(vcpu));
    Wish::PlaceVcpu { vm, vcpu, to }
}

/// Brings it to who decides. Of a dry run nothing is left but the plan.
pub(crate) fn change(
    rack: &Rack,
    wanted: &Wanted,
    request: u64,
    dry_run: bool,
) -> Result<Changed, RackError> {
    let cluster = rack.cluster();
    if let Some(why) = cluster.read(|tables| wanted.misled(tables))? {
        let answer = Answer::new(Verdict::Refused, 0).with_sentence(0, &why);
        return Ok(changed(&answer, None));
    }
    let change = cluster.read(|tables| wanted.change(request, tables))?;
    let answer = cluster.change(request, change, wanted.payload(), dry_run)?;
    let plan = match change {
        Change::Ask { wish, .. } if dry_run => Some(plan_report(&cluster.plan(wish)?)),
        _ => None,
    };
    Ok(changed(&answer, plan))
}

fn changed(answer: &Answer, plan: Option<PlanReport>) -> Changed {
    let verdict = match Verdict::from_number(answer.verdict) {
        Some(Verdict::Applied) => "applied",
        Some(Verdict::Started) => "started",
        Some(Verdict::Joined) => "joined",
        Some(Verdict::Nothing) => "nothing",
        Some(Verdict::Refused) => "refused",
        Some(Verdict::Unknown) | None => "unknown",
    };
    let sentence = answer.sentence();
    Changed {
        verdict: verdict.to_owned(),
        code: answer.code,
        job: Some(answer.job).filter(|job| *job != 0),
        reason: (!sentence.is_empty()).then(|| sentence.to_owned()),
        plan,
    }
}

/// Why the VM is where it is, or what another size would take.
pub(crate) fn explain(rack: &Rack, wanted: Option<&Wanted>) -> Result<PlanReport, RackError> {
    let cluster = rack.cluster();
    let wish = cluster.read(|tables| wanted.and_then(|wanted| wanted.wish(tables)))?;
    let wish = wish.unwrap_or(Wish::Rebalance { vm: VM });
    Ok(plan_report(&cluster.plan(wish)?))
}

fn plan_report(plan: &Result<Plan, NoPlan>) -> PlanReport {
    let plan = match plan {
        Ok(plan) => plan,
        Err(why) => {
            return PlanReport {
                conflict: Some(why.to_string()),
                ..PlanReport::default()
            };
        }
    };
    let bytes = |slices: u32| u64::from(slices) * LARGE_PAGE_SIZE;
    let lines = plan
        .parts
        .iter()
        .flat_map(|part| lines(&part.explanation.to_string()));
    PlanReport {
        steps: plan.steps.iter().map(step).collect(),
        vcpus_added: plan.effort.vcpus_added,
        vcpus_removed: plan.effort.vcpus_removed,
        vcpus_moved: plan.effort.vcpus_moved,
        memory_added_bytes: bytes(plan.effort.slices_added),
        memory_removed_bytes: bytes(plan.effort.slices_removed),
        memory_moved_bytes: bytes(plan.effort.slices_moved),
        cost: plan.parts.iter().map(|part| part.cost).sum(),
        bound: plan.parts.iter().map(|part| part.bound).sum(),
        explanation: lines.collect(),
        conflict: None,
    }
}

fn lines(text: &str) -> Vec<String> {
    text.lines().map(str::to_owned).collect()
}

/// A step in words.
fn step(step: &Step) -> String {
    let memory = format!("{}M", u64::from(step.slices) * 2);
    let (vcpu, from, to) = (step.vcpu, step.from, step.to);
    let what = match vcpu {
        ANY if step.cores > 0 && step.slices > 0 => format!("{} core(s) and {memory}", step.cores),
        ANY if step.cores > 0 => format!("{} core(s)", step.cores),
        ANY => memory,
        vcpu => format!("vCPU {vcpu}"),
    };
    match step.kind {
        StepKind::Lease => format!("lease {what} of node {to}"),
        StepKind::Add => format!("add {what} on node {to}"),
        StepKind::Move => format!("move {what} from node {from} to node {to}"),
        StepKind::Remove => format!("remove {what} from node {from}"),
        StepKind::Release => format!("release {what} of node {from}"),
    }
}
