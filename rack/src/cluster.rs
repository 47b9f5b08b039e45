//! The launcher's part in its rack's cluster: a replica of the tables, the
//! facts that only it knows, and calls to the control role.
//!
//! The launcher decides nothing. It founds the log, reads its replica for
//! operators, whoever else has died, and brings their wishes to the control
//! role.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use control_plane::cluster::{Change, Cluster, Op, Vm, VmPhase};
use control_plane::optimise::Share;
use control_plane::place::plan::NoPlan;
use vmm_shared::addr::{LARGE_PAGE_SIZE, MAX_NODES, MAX_VCPUS, NodeId, VcpuId};
use vmm_shared::control::cluster::{ClusterLayout, LAUNCHER_EPOCH, MAX_PEERS};
use vmm_shared::control::{
    BlockPlace, BlockState, ControlRegion, LAUNCHER_PEER, PIECES_PER_BLOCK, VcpuRecord, blocks,
};
use vmm_shared::log::{Clock, Config, Log, MemberId, Replica, ReplicaError};
use vmm_shared::rpc::console::{Answer, ChangeRequest, Method, OP_BYTES, PART_BYTES, Part};
use vmm_shared::rpc::{CallResult, Doorbell, Endpoint, Queue, Refused};
use vmm_shared::shm::SharedMem;
use zerocopy::{FromBytes, IntoBytes};

use crate::doorbell::{Bell, Doorbells};
use crate::error::RackError;
use crate::founding::{Founding, VM};

/// How often the launcher shows the log's other members that it lives.
const TICK: Duration = Duration::from_millis(100);
/// How long the control role may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How long a lost doorbell can delay an answer.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Time and wake-ups as the launcher has them.
#[derive(Clone, Debug)]
pub(crate) struct HostClock {
    start: Instant,
    log: Option<Log>,
    doorbells: Option<Arc<Doorbells>>,
}

impl HostClock {
    /// A clock of one's own.
    pub(crate) fn new() -> Self {
        Self {
            start: Instant::now(),
            log: None,
            doorbells: None,
        }
    }
}

impl Clock for HostClock {
    fn now_ns(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn pause(&self, round: u32) {
        match round {
            0..64 => std::hint::spin_loop(),
            64..256 => std::thread::yield_now(),
            _ => std::thread::sleep(Duration::from_micros(200)),
        }
    }

    fn nudge(&self, member: MemberId) {
        let (Some(log), Some(doorbells)) = (&self.log, &self.doorbells) else {
            return;
        };
        if let Ok(node) = u16::try_from(log.status(member).node) {
            doorbells.kick(NodeId(node));
        }
    }
}

/// Rings the nodes that messages are for.
#[derive(Debug)]
struct NodeBells(Arc<Doorbells>);

impl Doorbell for NodeBells {
    fn ring(&self, peer: usize) {
        if let Ok(node) = u16::try_from(peer) {
            self.0.kick(NodeId(node));
        }
    }

    fn sleep(&self, timeout_ns: u64) {
        std::thread::sleep(Duration::from_nanos(timeout_ns));
    }
}

type Follower = Replica<Cluster, HostClock>;
type Calls = Endpoint<NodeBells, MAX_PEERS, 4>;

/// The cluster as the launcher takes part in it.
pub struct ClusterMember {
    clock: HostClock,
    log: Log,
    replica: Mutex<Arc<Follower>>,
    calls: Mutex<Calls>,
    control: ControlRegion,
    bell: Arc<Bell>,
    has_control: bool,
}

impl std::fmt::Debug for ClusterMember {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClusterMember").finish_non_exhaustive()
    }
}

fn trouble(why: impl std::fmt::Debug) -> RackError {
    RackError::Log {
        reason: format!("{why:?}"),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes an empty log and the inboxes in `area`.
pub(crate) fn create(layout: ClusterLayout, area: &SharedMem) -> Result<Log, RackError> {
    let window = layout.log_window(area).ok_or_else(|| trouble("no room"))?;
    let log = Log::create(window, layout.log()).map_err(trouble)?;
    for peer in 0..=layout.launcher() {
        let window = layout.inbox_window(area, peer);
        let window = window.ok_or_else(|| trouble("no room"))?;
        Queue::create(window, layout.inbox()).map_err(trouble)?;
    }
    Ok(log)
}

impl ClusterMember {
    /// Joins the log and founds it.
    pub(crate) fn found(
        founding: &Founding,
        (layout, area, log): (ClusterLayout, &SharedMem, &Log),
        control: ControlRegion,
        doorbells: &Arc<Doorbells>,
        bell: &Arc<Bell>,
    ) -> Result<Self, RackError> {
        let clock = HostClock {
            log: Some(log.clone()),
            doorbells: Some(Arc::clone(doorbells)),
            ..HostClock::new()
        };
        let replica = join(log, &clock).map_err(trouble)?;
        for (op, payload) in &founding.entries {
            let mut thread = replica.thread().ok_or_else(|| trouble("no seat"))?;
            let outcome = thread.update_with(*op, payload).map_err(trouble)?;
            outcome.map_err(trouble)?;
        }
        let me = layout.launcher();
        let inbox = |peer| {
            let window = layout.inbox_window(area, peer);
            let window = window.ok_or_else(|| trouble("no room"))?;
            Queue::attach(window).map_err(trouble)
        };
        let bells = NodeBells(Arc::clone(doorbells));
        let mut calls = Calls::new(inbox(me)?, LAUNCHER_EPOCH, bells);
        for node in 0..me {
            let way = inbox(node)?.producer(me).map_err(trouble)?;
            calls.set_peer(node, Some(way)).map_err(trouble)?;
        }
        Ok(Self {
            clock,
            log: log.clone(),
            replica: Mutex::new(Arc::new(replica)),
            calls: Mutex::new(calls),
            control,
            bell: Arc::clone(bell),
            has_control: !control.boot_config().control_nodes().is_empty(),
        })
    }

    fn replica(&self) -> Arc<Follower> {
        Arc::clone(&lock(&self.replica))
    }

    /// Shows that the launcher lives, and follows the log. If the nodes have
    /// put it out, as after a long sleep of the host, it joins again.
    fn tick(&self) {
        if self.replica().tick().is_err()
            && let Ok(replica) = join(&self.log, &self.clock)
        {
            *lock(&self.replica) = Arc::new(replica);
        }
    }

    /// Tells the cluster that the guest answers, and what it sees.
    pub(crate) fn guest_is_up(&self) -> Result<(), RackError> {
        let share = self.in_use();
        self.tell(Change::Seen { vm: VM, share })?;
        let phase = VmPhase::Running;
        self.tell(Change::Phase { vm: VM, phase })
    }

    /// vCPUs that the guest has started.
    fn started_vcpus(&self) -> u32 {
        let records = (0..).map(VcpuId).take(MAX_VCPUS);
        let records = records.filter_map(|vcpu| self.control.vcpu(vcpu));
        let started = records.filter(VcpuRecord::has_started).count();
        u32::try_from(started).expect("few")
    }

    /// What the guest has taken into use.
    fn in_use(&self) -> Share {
        let config = self.control.boot_config();
        let nodes = usize::try_from(config.nodes).unwrap_or(usize::MAX);
        let shares = config.shares.get(..nodes).unwrap_or_default();
        let is_used = |block: &BlockPlace| {
            let record = self.control.block(block.id);
            record.is_some_and(|record| record.state() == Some(BlockState::Used))
        };
        let pieces = blocks(shares).filter(is_used).count() * PIECES_PER_BLOCK;
        let slices = config.memory / LARGE_PAGE_SIZE + pieces as u64;
        let slices = u32::try_from(slices).unwrap_or(u32::MAX);
        Share::new(self.started_vcpus(), slices)
    }

    /// Tells the cluster what a running guest sees, if that has changed.
    ///
    /// # Errors
    /// The log can't be followed.
    pub fn observe(&self) -> Result<(), RackError> {
        let is_up = |vm: &&Vm| vm.phase() == VmPhase::Running;
        let known = |cluster: &Cluster| cluster.vms().get(&VM).filter(is_up).map(Vm::seen);
        let Some(known) = self.read(known)? else {
            return Ok(());
        };
        let share = self.in_use();
        match share == known {
            true => Ok(()),
            false => self.tell(Change::Seen { vm: VM, share }),
        }
    }

    /// Reads the tables as they are now.
    ///
    /// # Errors
    /// The log can't be followed.
    pub fn read<R>(&self, query: impl FnOnce(&Cluster) -> R) -> Result<R, RackError> {
        let replica = self.replica();
        let mut thread = replica.thread().ok_or_else(|| trouble("no seat"))?;
        thread.read(query).map_err(trouble)
    }

    /// Appends what is no decision: what has become of the VM.
    ///
    /// # Errors
    /// The log does not take it.
    pub fn tell(&self, fact: Change) -> Result<(), RackError> {
        let replica = self.replica();
        let mut thread = replica.thread().ok_or_else(|| trouble("no seat"))?;
        thread.update(Op::from(fact)).map_err(trouble)?.ok();
        Ok(())
    }

    /// What a wish would take, with the tables as they are now.
    ///
    /// # Errors
    /// The log can't be followed. The inner error is the scheduler's.
    pub fn plan(
        &self,
        wish: control_plane::cluster::Wish,
    ) -> Result<Result<control_plane::place::plan::Plan, NoPlan>, RackError> {
        let budget = control_plane::optimise::Budget::exact(1_000_000_000);
        let clock = self.clock.clone();
        self.read(|cluster| control_plane::place::plan::plan(cluster, wish, budget, &clock))
    }

    /// The node that decides, if it is there.
    ///
    /// # Errors
    /// There is none, or it is gone.
    pub fn controller(&self) -> Result<NodeId, RackError> {
        if !self.has_control {
            return Err(RackError::NoControl);
        }
        let node = self.read(|cluster| cluster.controller().0)?;
        let config = self.control.boot_config();
        let node = node.or_else(|| config.control_nodes().next());
        let node = node.ok_or(RackError::NoControl)?;
        match self.control.membership().life(node) {
            Some(_) => Ok(node),
            None => Err(RackError::ControlGone { node }),
        }
    }

    /// Brings a change, and the bytes that belong to it, to the control role.
    ///
    /// # Errors
    /// There is none, or it does not answer.
    pub fn change(
        &self,
        request: u64,
        change: Change,
        payload: &[u8],
        dry_run: bool,
    ) -> Result<Answer, RackError> {
        let node = self.controller()?;
        let mut calls = lock(&self.calls);
        let deadline = Instant::now() + ANSWER_LIMIT;
        let parts = payload.chunks(PART_BYTES).zip((0..).step_by(PART_BYTES));
        for (bytes, offset) in parts {
            let mut part = Part {
                request,
                offset,
                len: u32::try_from(bytes.len()).expect("a part"),
                bytes: [0; PART_BYTES],
            };
            part.bytes[..bytes.len()].copy_from_slice(bytes);
            self.call(&mut calls, node, Method::Part, part.as_bytes(), deadline)?;
        }
        let mut op = [0; OP_BYTES];
        op.copy_from_slice(Op::from(change).as_bytes());
        let body = ChangeRequest {
            request,
            upload_len: u32::try_from(payload.len()).unwrap_or(u32::MAX),
            dry_run: dry_run.into(),
            op,
        };
        let body = body.as_bytes();
        let answer = self.call(&mut calls, node, Method::Change, body, deadline)?;
        Answer::read_from_bytes(&answer).map_err(|_| RackError::ControlSilent { node })
    }

    fn call(
        &self,
        calls: &mut Calls,
        node: NodeId,
        method: Method,
        body: &[u8],
        deadline: Instant,
    ) -> Result<Vec<u8>, RackError> {
        let membership = self.control.membership();
        let is_member = |peer: usize, epoch: u32| {
            let node = u16::try_from(peer).ok().map(NodeId);
            let life = node.and_then(|node| membership.life(node));
            life.is_some_and(|life| life.number() & u64::from(u32::MAX) == u64::from(epoch))
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let deadline_ns = self.clock.now_ns() + u64::try_from(left.as_nanos()).unwrap_or(0);
        let call = calls
            .call(usize::from(node.0), method as u32, body, deadline_ns)
            .map_err(|_| RackError::ControlSilent { node })?;
        let mut answer = vec![0; vmm_shared::rpc::BODY_BYTES];
        loop {
            let rings = self.bell.rings();
            // Nobody calls the launcher.
            while let Some((_, request)) = calls.poll(is_member) {
                let _ = calls.refuse(&request, Refused::NO_SUCH_METHOD);
            }
            match calls.result(call, self.clock.now_ns(), &mut answer) {
                CallResult::Pending if calls.rest() => self.bell.wait(rings, LOOK_AGAIN),
                CallResult::Pending => {}
                CallResult::Answered(len) => {
                    answer.truncate(len);
                    return Ok(answer);
                }
                CallResult::Refused(Refused::BUSY) => return Err(RackError::NoControl),
                CallResult::Refused(why) => return Err(trouble(why)),
                CallResult::TimedOut | CallResult::Unknown => {
                    return Err(RackError::ControlSilent { node });
                }
            }
        }
    }

    /// Waits until the tables satisfy `is_so`, and returns what it found; `None`
    /// if they don't within `limit`.
    ///
    /// # Errors
    /// The log can't be followed.
    pub fn wait<R>(
        &self,
        limit: Duration,
        is_so: impl Fn(&Cluster) -> Option<R>,
    ) -> Result<Option<R>, RackError> {
        let deadline = Instant::now() + limit;
        loop {
            let rings = self.bell.rings();
            if let Some(found) = self.read(&is_so)? {
                return Ok(Some(found));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.bell.wait(rings, left.min(LOOK_AGAIN));
        }
    }
}

fn join(log: &Log, clock: &HostClock) -> Result<Follower, ReplicaError> {
    let config = Config {
        node: u32::from(LAUNCHER_PEER),
        ..vmm_shared::control::cluster::MEMBER
    };
    Replica::join(log.clone(), Cluster::default(), clock.clone(), config)
}

const _: () = assert!(LAUNCHER_PEER as usize >= MAX_NODES, "no node's number");

/// The thread that takes part for the launcher. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Ticker {
    closing: Arc<AtomicBool>,
    bell: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
}

impl Ticker {
    pub(crate) fn start(member: &Arc<ClusterMember>) -> Result<Self, RackError> {
        let closing = Arc::new(AtomicBool::new(false));
        let (closed, ticking) = (Arc::clone(&closing), Arc::clone(member));
        let thread = std::thread::Builder::new()
            .name("cluster".into())
            .spawn(move || {
                // Acquire: pairs with the Release in `drop`.
                while !closed.load(Ordering::Acquire) {
                    let rings = ticking.bell.rings();
                    ticking.tick();
                    // A log that can't be followed is joined again.
                    let _ = ticking.observe();
                    ticking.bell.wait(rings, TICK);
                }
            })
            .map_err(RackError::host("start the cluster's thread"))?;
        Ok(Self {
            closing,
            bell: Arc::clone(&member.bell),
            thread: Some(thread),
        })
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        // Release: pairs with the Acquire in the thread.
        self.closing.store(true, Ordering::Release);
        self.bell.ring();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}
