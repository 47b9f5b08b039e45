//! Jobs: from a wish over a plan to an end that is one of a few.
//!
//! ```text
//!            Refuse                       Failed, Cancel
//!   Waiting ────────▶ Refused    Running ────────────────▶ RollingBack
//!      │ Plan                     ▲ │ last step             │ first step undone
//!      └──────────────────────────┘ └──▶ Finished           └──▶ RolledBack
//! ```
//!
//! A plan leases before it adds, adds before it moves, moves before it
//! removes, and releases last. The leases are taken when the plan is accepted,
//! so nobody can take the rows in between. Up to the first release all can be undone, in
//! reverse; from then on only bookkeeping is left, which can't fail. So a job
//! that is found in mid-way after a restart goes on where it was, in the
//! direction it had. Steps name what shall be, not what to change ("vCPU 5 is
//! on node 2"), so executing one twice does no harm, nor does undoing one that
//! was never begun.
//!
//! A vCPU that the guest does not give up stays, and the job goes on without
//! that step: it is *kept*.
//!
//! Undoing waits for what the guest has been asked, since it may do that any
//! moment. An *abandoned* job does not: what the guest may still have is the
//! VM's, and the job is stuck.

use alloc::vec::Vec;

use vmm_shared::addr::VcpuId;
use vmm_shared::control::Ticket;
use zerocopy::{Immutable, IntoBytes, KnownLayout, TryFromBytes};

use super::{Cluster, JobId, Placement, Reason, Refusal, StepResult, Trial, VmId, VmPhase, Wish};
use crate::optimise::Share;
use crate::policy::ANY;

/// What a step does; in the order in which a plan does it.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    TryFromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(u8)]
pub enum StepKind {
    /// Rows of a node are leased to the VM.
    Lease = 1,
    /// The VM gets a vCPU, or slices, out of what it holds.
    Add = 2,
    /// A vCPU, or slices, change nodes while the guest runs.
    Move = 3,
    /// The guest gives a vCPU, or slices, up.
    Remove = 4,
    /// What the VM holds of a node beyond what it uses is free again.
    Release = 5,
}

/// A step of a plan, as it stands in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, TryFromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Step {
    /// What to do.
    pub kind: StepKind,
    /// 1 if the guest did not let it be done: the vCPU stays where it was.
    pub kept: u8,
    /// To which VM.
    pub vm: u16,
    /// With which vCPU, or [`ANY`] for slices and leases.
    pub vcpu: u16,
    /// The node that gives up; of `Move`, `Remove` and `Release`.
    pub from: u16,
    /// The node that gives; of `Lease`, `Add` and `Move`.
    pub to: u16,
    /// Why the guest did not let it be done.
    pub why: u16,
    /// Cores that are leased or released.
    pub cores: u32,
    /// Slices.
    pub slices: u32,
}

const _: () = assert!(size_of::<Step>() == 20, "part of the log's format");

impl Step {
    /// A step of a kind for a VM, with nothing in it yet.
    #[must_use]
    pub const fn new(kind: StepKind, vm: VmId) -> Self {
        Self {
            kind,
            kept: 0,
            vm: vm.0,
            vcpu: ANY,
            from: ANY,
            to: ANY,
            why: 0,
            cores: 0,
            slices: 0,
        }
    }

    /// What it leases or releases, or grants and takes.
    #[must_use]
    pub const fn share(&self) -> Share {
        let vcpus = if self.vcpu == ANY { self.cores } else { 1 };
        Share::new(vcpus, self.slices)
    }

    /// Whether only the tables change, not the guest.
    #[must_use]
    pub const fn is_bookkeeping(&self) -> bool {
        matches!(self.kind, StepKind::Lease | StepKind::Release) || self.is_kept()
    }

    /// Whether the guest did not let it be done.
    #[must_use]
    pub const fn is_kept(&self) -> bool {
        self.kept != 0
    }

    /// What undoes it.
    #[must_use]
    pub const fn undone(self) -> Self {
        let kind = match self.kind {
            StepKind::Lease => StepKind::Release,
            StepKind::Add => StepKind::Remove,
            StepKind::Move => StepKind::Move,
            StepKind::Remove => StepKind::Add,
            StepKind::Release => StepKind::Lease,
        };
        Self {
            kind,
            from: self.to,
            to: self.from,
            ..self
        }
    }
}

/// How far a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobState {
    /// For its plan.
    Waiting,
    /// Its steps are done one by one.
    Running,
    /// Its steps are undone one by one.
    RollingBack {
        /// Why: the code of a [`Reason`](super::Reason).
        reason: u16,
    },
    /// All is as wished, but for slices that the guest did not take or give,
    /// and vCPUs that it [kept](Job::kept).
    Finished {
        /// How many slices stayed as they were.
        short: u32,
        /// Why the last of all that did: the code of a reason.
        reason: u16,
    },
    /// All is as it was before.
    RolledBack {
        /// Why: the code of a reason.
        reason: u16,
    },
    /// There is no placement: nothing was done.
    Refused,
    /// A step could be neither done nor undone, or a node was lost. What the
    /// VM has is what the tables say.
    Stuck {
        /// Why: the code of a reason.
        reason: u16,
    },
}

/// The reason of a job that was cancelled.
pub const CANCELLED: u16 = Reason::Cancelled.code();
/// The reason of a job that lost a node.
pub const NODE_LOST: u16 = Reason::NodeLost.code();

impl JobState {
    /// Whether nothing more happens.
    #[must_use]
    pub const fn has_ended(self) -> bool {
        !matches!(
            self,
            Self::Waiting | Self::Running | Self::RollingBack { .. }
        )
    }
}

/// A job's row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    pub(crate) id: JobId,
    pub(crate) request: u64,
    pub(crate) wish: Wish,
    pub(crate) state: JobState,
    pub(crate) steps: Vec<Step>,
    pub(crate) done: u32,
    pub(crate) short: u32,
    pub(crate) reason: u16,
    /// What was desired of the VM before.
    pub(crate) before: Share,
    /// The guest is not waited for.
    pub(crate) abandoned: bool,
}

impl Job {
    /// Its number.
    #[must_use]
    pub const fn id(&self) -> JobId {
        self.id
    }

    /// The number of the request that started it.
    #[must_use]
    pub const fn request(&self) -> u64 {
        self.request
    }

    /// What it is for.
    #[must_use]
    pub const fn wish(&self) -> Wish {
        self.wish
    }

    /// How far it is.
    #[must_use]
    pub const fn state(&self) -> JobState {
        self.state
    }

    /// Its plan, once it has one; steps done in part say what was done.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The vCPUs that it should have removed and the guest kept.
    pub fn kept(&self) -> impl Iterator<Item = (VcpuId, Reason)> {
        let kept = self.steps.iter().filter(|step| step.is_kept());
        kept.map(|step| (VcpuId(step.vcpu), Reason::from_code(step.why)))
    }

    /// What the order of one of its steps for a block of memory is known by.
    #[must_use]
    pub const fn block_ticket(&self, step: u32, is_undoing: bool) -> Ticket {
        Ticket::new(self.id.0 << 9 | (step & 0xff) << 1 | is_undoing as u32)
    }

    /// Whether it is to do what it is for.
    pub(crate) const fn is_wanted(&self) -> bool {
        matches!(self.state, JobState::Waiting | JobState::Running)
    }

    /// Whether its steps are undone now.
    #[must_use]
    pub const fn is_undoing(&self) -> bool {
        matches!(self.state, JobState::RollingBack { .. })
    }

    /// Whether it asks the guest for nothing more, nor waits for it.
    #[must_use]
    pub const fn is_abandoned(&self) -> bool {
        self.abandoned
    }

    /// How many of its steps are done, and not undone.
    #[must_use]
    pub const fn done(&self) -> u32 {
        self.done
    }

    /// The step to be executed now, and the index to report it by.
    #[must_use]
    pub fn current(&self) -> Option<(u32, Step)> {
        match self.state {
            JobState::Running => {
                let step = self.steps.get(self.done as usize)?;
                Some((self.done, *step))
            }
            JobState::RollingBack { .. } => {
                let index = self.done.checked_sub(1)?;
                Some((index, self.steps.get(index as usize)?.undone()))
            }
            _ => None,
        }
    }

    /// Whether it changes a VM.
    pub(crate) fn touches(&self, cluster: &Cluster, vm: VmId) -> bool {
        match self.wish {
            Wish::Resize { vm: own, .. }
            | Wish::PlaceVcpu { vm: own, .. }
            | Wish::MoveSlices { vm: own, .. }
            | Wish::Rebalance { vm: own } => own == vm,
            Wish::Drain { node } => {
                let planned = |step: &Step| step.vm == vm.0;
                let row = cluster.vms.get(&vm);
                self.steps.iter().any(planned)
                    || row.is_some_and(|row| row.placements.contains_key(&node))
            }
        }
    }

    fn is_past_return(&self) -> bool {
        let mut done = self.steps.iter().take(self.done as usize);
        done.next_back()
            .is_some_and(|step| step.kind == StepKind::Release)
    }
}

impl Cluster {
    pub(crate) fn plan(&mut self, id: JobId, payload: &[u8]) -> Result<(), Refusal> {
        let job = self.jobs.get(&id).ok_or(Refusal::NoJob { job: id })?;
        if job.state != JobState::Waiting {
            return Err(Refusal::WrongState { job: id });
        }
        let mut steps: Vec<Step> = Vec::new();
        let mut rest = payload;
        while !rest.is_empty() {
            let (step, tail) = Step::try_read_from_prefix(rest).map_err(|_| Refusal::BadPlan)?;
            steps.push(step);
            rest = tail;
        }
        let is_sorted = steps.is_sorted_by_key(|step| step.kind);
        if !is_sorted || steps.iter().any(Step::is_kept) {
            return Err(Refusal::BadPlan);
        }
        if !steps.iter().all(|step| self.is_whole(step)) {
            return Err(Refusal::BadPlan);
        }
        let mut trial = Trial::new(self);
        for step in &steps {
            trial.step(step)?;
        }
        if !trial.fulfils(job.wish) {
            return Err(Refusal::BadPlan);
        }
        for (vm, after) in trial.vms() {
            let before = &self.vms[vm];
            if self.job_of(*vm).is_some_and(|other| other.id != id) {
                return Err(Refusal::Busy { job: id });
            }
            if before.phase == VmPhase::Booting && before.granted() != Share::NONE {
                return Err(Refusal::StillBooting { vm: *vm });
            }
            let spare = |placement: &Placement| placement.unused() != Share::NONE;
            if after.placements.values().any(spare) {
                return Err(Refusal::BadPlan);
            }
            if let Some(cause) = crate::place::broken(self, *vm, after, &|node| trial.free(node)) {
                return Err(Refusal::Breaks { cause });
            }
        }
        let job = self.jobs.get_mut(&id).ok_or(Refusal::NoJob { job: id })?;
        job.steps = steps;
        job.state = JobState::Running;
        while let Some((index, step)) = self.jobs.get(&id).and_then(Job::current)
            && step.kind == StepKind::Lease
        {
            self.step(id, index, StepResult::Done)?;
        }
        self.settle(id);
        Ok(())
    }

    /// Whether a guest can take what a step adds: in whole blocks, once it has
    /// anything.
    fn is_whole(&self, step: &Step) -> bool {
        let vm = self.vms.get(&VmId(step.vm));
        let runs = vm.filter(|vm| step.kind == StepKind::Add && vm.granted() != Share::NONE);
        runs.is_none_or(|vm| step.slices.is_multiple_of(vm.block()))
    }

    pub(crate) fn step(
        &mut self,
        id: JobId,
        index: u32,
        result: StepResult,
    ) -> Result<(), Refusal> {
        let job = self.jobs.get_mut(&id).ok_or(Refusal::NoJob { job: id })?;
        let Some((current, mut step)) = job.current() else {
            return Err(Refusal::WrongState { job: id });
        };
        if current != index {
            return Err(Refusal::WrongState { job: id });
        }
        let back = job.is_undoing();
        match result {
            StepResult::Failed { reason } => {
                if step.is_bookkeeping() {
                    return Err(Refusal::BadPlan);
                }
                job.state = if back {
                    JobState::Stuck { reason }
                } else {
                    JobState::RollingBack { reason }
                };
                self.forget_wish(id);
                self.settle(id);
                return Ok(());
            }
            StepResult::Short { slices: 0, reason } if step.vcpu != ANY => {
                if step.kind != StepKind::Remove || back || step.is_kept() {
                    return Err(Refusal::BadPlan);
                }
                job.reason = reason;
                step.kept = 1;
                step.why = reason;
                job.steps[index as usize] = step;
            }
            StepResult::Short { slices, reason } => {
                let partial = step.vcpu == ANY && !step.is_bookkeeping() && slices < step.slices;
                if !partial {
                    return Err(Refusal::BadPlan);
                }
                job.short += step.slices - slices;
                job.reason = reason;
                step.slices = slices;
                if back {
                    // What could not be undone stays: the VM holds it.
                    job.state = JobState::Stuck { reason };
                } else {
                    job.steps[index as usize].slices = slices;
                }
            }
            StepResult::Done => {}
        }
        self.book(&step)?;
        if let Some(job) = self.jobs.get_mut(&id) {
            job.done = if back { index } else { index + 1 };
        }
        self.settle(id);
        Ok(())
    }

    fn book(&mut self, step: &Step) -> Result<(), Refusal> {
        let id = VmId(step.vm);
        let vm = self.vms.get_mut(&id).ok_or(Refusal::NoVm { vm: id })?;
        let nodes = &mut self.nodes;
        for change in vm.book(step, |node| nodes.get(&node).map(|node| node.free))? {
            if let Some(node) = nodes.get_mut(&change.node) {
                node.pass(change.share, change.from, change.to);
            }
        }
        Ok(())
    }

    pub(crate) fn cancel(&mut self, id: JobId) -> Result<(), Refusal> {
        let job = self.jobs.get(&id).ok_or(Refusal::NoJob { job: id })?;
        if job.is_undoing() {
            return Err(Refusal::Undoing { job: id });
        }
        if job.state.has_ended() || job.is_past_return() {
            return Err(Refusal::TooLate { job: id });
        }
        // The step at hand may have been begun: it counts as done, so that it
        // is undone, too.
        let at_hand = job.current().filter(|(_, step)| !step.is_bookkeeping());
        if let Some((_, step)) = &at_hand {
            self.book(step)?;
        }
        if let Some(job) = self.jobs.get_mut(&id) {
            job.done += u32::from(at_hand.is_some());
            job.state = JobState::RollingBack { reason: CANCELLED };
        }
        self.forget_wish(id);
        self.settle(id);
        Ok(())
    }

    pub(crate) fn abandon(&mut self, id: JobId) -> Result<(), Refusal> {
        let job = self.jobs.get(&id).ok_or(Refusal::NoJob { job: id })?;
        if !job.is_undoing() {
            self.cancel(id)?;
        }
        if let Some(job) = self.jobs.get_mut(&id) {
            job.abandoned = true;
        }
        Ok(())
    }

    pub(crate) fn refuse(&mut self, id: JobId) -> Result<(), Refusal> {
        let job = self.jobs.get_mut(&id).ok_or(Refusal::NoJob { job: id })?;
        if job.state != JobState::Waiting {
            return Err(Refusal::WrongState { job: id });
        }
        job.state = JobState::Refused;
        self.forget_wish(id);
        self.settle(id);
        Ok(())
    }

    /// What a job was to do is not desired any more: it has no plan, or is
    /// undone.
    fn forget_wish(&mut self, id: JobId) {
        if let Some(job) = self.jobs.get(&id)
            && let Wish::Resize { vm, .. } | Wish::PlaceVcpu { vm, .. } = job.wish
            && let Some(vm) = self.vms.get_mut(&vm)
        {
            vm.desired = job.before;
        }
    }

    /// Ends a job that has nothing left to do, and forgets the oldest ended.
    pub(crate) fn settle(&mut self, id: JobId) {
        let Some(job) = self.jobs.get_mut(&id) else {
            return;
        };
        match job.state {
            JobState::Running if job.done as usize == job.steps.len() => {
                job.state = JobState::Finished {
                    short: job.short,
                    reason: job.reason,
                };
            }
            JobState::RollingBack { reason } if job.done == 0 => {
                job.state = JobState::RolledBack { reason };
            }
            _ => {}
        }
        if !job.state.has_ended() {
            return;
        }
        // After a step done in part, or undone in part, some may be left.
        self.release_unused(id);
        let ended = self.jobs.values().filter(|job| job.state.has_ended());
        let ended: Vec<JobId> = ended.map(|job| job.id).collect();
        for old in ended
            .iter()
            .take(ended.len().saturating_sub(super::KEPT_JOBS))
        {
            self.jobs.remove(old);
        }
    }
}
