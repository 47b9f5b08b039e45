//! A running rack.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use control_plane::cluster::Cluster;
use vmm_shared::addr::{LARGE_PAGE_SIZE, NodeId};
use vmm_shared::coherence::NodeSet;
use vmm_shared::control::{
    BUNDLE_OFFSET, ControlRegion, Counter, Digest, NodeShare, NodeState, Place, RingId, VmState,
};
use vmm_shared::pieces::PieceMap;
use vmm_shared::region::RegionKind;

use crate::boot::BootFiles;
use crate::cluster::{self, ClusterMember, HostClock, Ticker};
use crate::console::ConsoleLog;
use crate::doorbell::{BellThread, Doorbells, Plug};
use crate::elastic::VcpuStatus;
use crate::error::RackError;
use crate::fault::{FaultKind, Faults};
use crate::fleet::{Fleet, Stake};
use crate::founding::{VM, found};
use crate::image::Image;
use crate::memory::Memory;
use crate::node::{Audience, Node, NodeEnd, NodeShared, Sink};
use crate::preflight::{Accelerator, Programs};
use crate::qemu::{Atomics, NodeConfig, arguments};
use crate::region::Region;
use crate::size::Size;
use crate::spec::{RackSpec, Role, VmSpec};
use crate::status::{MemoryNumbers, NodeStatus, RackStatus, VcpuCounters, VcpuNumbers};
use crate::stream::{Link, RingReader, RingWriter};
use crate::watch::Watcher;

/// How long a node gets to join the rack, without the time that it waits for
/// a processor of this host. An idle host needs less than a second; the
/// operator hears of a node that fails within ten.
pub const JOIN_LIMIT: Duration = Duration::from_secs(8);

/// The node that owns all devices of a VM on one node.
const FIRST: NodeId = NodeId(0);

/// What is called with every line of every node's log.
pub type LogSink = Sink;

/// How to start a rack, apart from its shape.
pub struct StartOptions {
    /// The rack's name, as seen in `ps`.
    pub name: String,
    /// The programs to run.
    pub programs: Programs,
    /// How nodes execute code.
    pub accelerator: Accelerator,
    /// Where the nodes' logs go as they are written, if anywhere.
    pub log: Option<LogSink>,
    /// What is to go wrong, to try it.
    pub faults: Faults,
}

/// A rack whose nodes have been started. Dropping it ends them.
#[derive(Debug)]
pub struct Rack {
    // Fields drop in this order: first the nodes end, then their memory goes.
    /// None watches a node that is alone.
    _watcher: Option<Watcher>,
    _ticker: Ticker,
    cluster: Arc<ClusterMember>,
    nodes: Mutex<Vec<Node>>,
    starter: Starter,
    fleet: Arc<Fleet>,
    _bell_thread: BellThread,
    doorbells: Arc<Doorbells>,
    /// Server's ends of connections beyond one for each node.
    servers: Mutex<Vec<UnixStream>>,
    bell: Arc<crate::doorbell::Bell>,
    console: Arc<ConsoleLog>,
    memory: Memory,
    /// What each node gives.
    shares: Vec<NodeShare>,
    /// Where the VM's memory is.
    pieces: PieceMap,
    vm: VmSpec,
    started: Instant,
}

/// Starts nodes' processes, at first and again.
struct Starter {
    name: String,
    programs: Programs,
    accelerator: Accelerator,
    faults: Faults,
    /// The most cores of a node.
    vectors: u32,
    image: Option<Image>,
    audience: Audience,
}

impl std::fmt::Debug for Starter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Starter").finish_non_exhaustive()
    }
}

impl Starter {
    fn start(
        &self,
        node: NodeId,
        cores: u32,
        client: UnixStream,
        memory: &Memory,
    ) -> Result<Node, RackError> {
        let faulty = |kind| self.faults.has(kind, node);
        let windows = memory.windows(self.image.as_ref())?;
        let doorbell = match faulty(FaultKind::Doorbell) {
            true => orphan()?,
            false => client,
        };
        let doorbell = OwnedFd::from(doorbell);
        let config = NodeConfig {
            node,
            rack: &self.name,
            cores,
            vectors: self.vectors,
            accelerator: self.accelerator,
            atomics: match faulty(FaultKind::Atomics) {
                true => Atomics::Broken,
                false => Atomics::Exact,
            },
            hypervisor: &self.programs.hypervisor,
            doorbell: &doorbell,
            regions: &windows,
        };
        let mut command = Command::new(&self.programs.qemu);
        command.args(arguments(&config));
        if faulty(FaultKind::Paused) {
            command.arg("-S");
        }
        let mut inherit: Vec<_> = windows.into_iter().map(|window| window.file).collect();
        inherit.push(doorbell);
        Node::start(node, command, inherit, self.audience.clone())
    }
}

/// How and where a rack's VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RackEnd {
    /// The node that ended it.
    pub node: NodeId,
    /// How.
    pub how: NodeEnd,
    /// What had become of the VM.
    pub vm: VmState,
    /// What the guest wrote to its exit port, if it did.
    pub exit_value: Option<u32>,
}

impl Rack {
    /// Starts a rack and in it a VM. Returns as soon as the nodes' processes
    /// run; see [`wait_ready`](Self::wait_ready).
    ///
    /// # Errors
    /// Something does not fit, is missing, or the host refuses it. Nothing is
    /// left running.
    pub fn start(
        spec: &RackSpec,
        vm: &VmSpec,
        boot: &BootFiles,
        options: StartOptions,
    ) -> Result<Self, RackError> {
        spec.check(vm)?;
        let bundle = boot.read()?;
        let uuid = fresh_uuid()?;
        let image = match &boot.image {
            Some(path) => Some(Image::open(path, uuid)?),
            None => None,
        };
        options.programs.check()?;

        let founding = found(spec, vm, &HostClock::new())?;
        let shares = founding.shares.clone();
        let memory = Memory::create(uuid, &bundle, &shares, spec.control_nodes())?;
        let (layout, area) = memory.cluster();
        let log = cluster::create(layout, &area)?;
        let strange = Region::create(RegionKind::Control, uuid, 0, BUNDLE_OFFSET)?;
        strange.change_header(|header| header.version = header.version.wrapping_add(1))?;
        let faulty = |kind, node| options.faults.has(kind, node);
        let plug = |(node, share): (NodeId, &NodeShare)| Plug {
            cores: share.cores,
            control: if faulty(FaultKind::Version, node) {
                strange.file().as_fd()
            } else {
                memory.control_file()
            },
        };
        let plugs: Vec<_> = (0..).map(NodeId).zip(&shares).map(plug).collect();
        let (doorbells, clients) = Doorbells::new(&plugs)?;
        let doorbells = Arc::new(doorbells);
        let bell_thread = BellThread::start(&doorbells)?;
        let pieces = memory.pieces(&shares, &bundle);
        let members = (0..).map(NodeId).zip(&shares);
        let members = members.fold(NodeSet::EMPTY, |set, (node, _)| set.with(node));
        let stake = Stake {
            control: memory.control,
            doorbells: Arc::clone(&doorbells),
            nodes: members,
            pieces,
            log: log.clone(),
        };
        let audience = Audience {
            fleet: Arc::new(Fleet::new(stake)),
            bell: bell_thread.bell(),
            sink: options.log.clone(),
        };

        memory.configure(vm, &shares, boot, &bundle, image.as_ref());
        let bell = bell_thread.bell();
        let parts = (layout, &area, &log);
        let member = ClusterMember::found(&founding, parts, memory.control, &doorbells, &bell)?;
        let member = Arc::new(member);
        let ticker = Ticker::start(&member)?;
        for (node, region) in (0..).map(NodeId).zip(&memory.given) {
            options.faults.apply_to_header(node, region)?;
        }
        options.faults.apply_to_homes(&memory.control, &shares);
        let started = Instant::now();
        let mut running = Vec::new();
        let starter = Starter {
            name: options.name,
            programs: options.programs,
            accelerator: options.accelerator,
            vectors: shares.iter().map(|share| share.cores).max().unwrap_or(1),
            faults: options.faults,
            image,
            audience,
        };
        let faulty = |kind, node| starter.faults.has(kind, node);
        let mut clients: Vec<_> = (0..).map(NodeId).zip(clients).collect();
        let mut servers = Vec::new();
        for node in members.filter(|node| faulty(FaultKind::Twice, *node)) {
            let (server, client) = doorbells.again(node, memory.control_file())?;
            servers.push(server);
            clients.push((node, client));
        }
        for (node, client) in clients {
            let cores = shares[usize::from(node.0)].cores;
            running.push(starter.start(node, cores, client, &memory)?);
        }

        let fleet = Arc::clone(&starter.audience.fleet);
        let link = Link {
            bell: Arc::clone(&bell),
            doorbells: Arc::clone(&doorbells),
            node: Arc::clone(running[0].shared()),
            id: FIRST,
            fleet: Arc::clone(&fleet),
        };
        let ring = memory.control.ring(RingId::ConsoleOut);
        let console = ConsoleLog::start(RingReader::new(ring, link))?;
        let (watched, rung) = (Arc::clone(&fleet), Arc::clone(&bell));
        let watcher = match members.len() {
            1 => None,
            _ => Some(Watcher::start(memory.control, members, watched, rung)?),
        };
        Ok(Self {
            _watcher: watcher,
            _ticker: ticker,
            cluster: member,
            nodes: Mutex::new(running),
            starter,
            fleet,
            _bell_thread: bell_thread,
            doorbells,
            servers: Mutex::new(servers),
            bell,
            console,
            memory,
            pieces,
            shares,
            vm: vm.clone(),
            started,
        })
    }

    fn nodes(&self) -> MutexGuard<'_, Vec<Node>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What all processes of a node have in common, of the last that was
    /// started; the node must exist.
    fn shared_of(&self, node: NodeId) -> Arc<NodeShared> {
        Arc::clone(self.nodes()[usize::from(node.0)].shared())
    }

    /// The cluster's tables, and the way to who changes them.
    #[must_use]
    pub fn cluster(&self) -> &Arc<ClusterMember> {
        &self.cluster
    }

    /// Tells the cluster that the guest answers, and what it has taken into
    /// use: the vCPUs that it has started, and memory.
    ///
    /// # Errors
    /// The log does not take it.
    pub fn guest_is_up(&self) -> Result<(), RackError> {
        self.cluster.guest_is_up()
    }

    /// Whether [`restart`](Self::restart) would start this node.
    ///
    /// # Errors
    /// As for that.
    pub fn can_restart(&self, node: NodeId) -> Result<(), RackError> {
        self.cores_to_restart(node, &self.nodes()).map(drop)
    }

    /// The cores of a node that may be started anew.
    fn cores_to_restart(&self, node: NodeId, nodes: &[Node]) -> Result<u32, RackError> {
        let refused = |why| Err(RackError::NoJoin { node, why });
        let Some(share) = self.shares.get(usize::from(node.0)) else {
            return refused("is not one of this rack");
        };
        let config = self.memory.control.boot_config();
        if !config.control_nodes().contains(node) {
            return refused("gives cores or memory, and this version can't bring such a node back");
        }
        if self.vm_state() != VmState::Running {
            return refused("can't join: the VM does not run");
        }
        if nodes[usize::from(node.0)].shared().ended().is_none() {
            return refused("takes part already");
        }
        Ok(share.cores)
    }

    /// Starts a node anew whose process has ended, while the VM goes on. The
    /// control role alone can come back so: others would have to prove their
    /// platform and clocks to a VM that runs.
    ///
    /// # Errors
    /// It is no such node, or its process can't be started.
    pub fn restart(&self, node: NodeId) -> Result<(), RackError> {
        let mut nodes = self.nodes();
        let cores = self.cores_to_restart(node, &nodes)?;
        let (server, client) = self.doorbells.again(node, self.memory.control_file())?;
        if let Some(state) = self.memory.control.node_state(node) {
            state.store(NodeState::Absent as u32, Ordering::Release);
        }
        nodes[usize::from(node.0)] = self.starter.start(node, cores, client, &self.memory)?;
        drop(nodes);
        self.servers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(server);
        let deadline = Instant::now() + JOIN_LIMIT;
        loop {
            let rings = self.bell.rings();
            let state = self.status().nodes[usize::from(node.0)].state;
            match state {
                Some(NodeState::Ready) => return Ok(()),
                Some(NodeState::Stopped) => {
                    return Err(self.silent(node, "has ended", JOIN_LIMIT));
                }
                _ if Instant::now() >= deadline => {
                    return Err(self.silent(node, "has not joined the rack", JOIN_LIMIT));
                }
                _ => self.bell.wait(rings, Duration::from_millis(50)),
            }
        }
    }

    /// Waits until every node is in service and the VM has been entered.
    ///
    /// # Errors
    /// A node ended, has not joined within [`JOIN_LIMIT`], or is not in
    /// service within `limit`.
    pub fn wait_ready(&self, limit: Duration) -> Result<(), RackError> {
        loop {
            let rings = self.bell.rings();
            if let Some(end) = self.ended() {
                return match (end.how, end.vm) {
                    (
                        NodeEnd::Orderly,
                        VmState::PoweredOff | VmState::Reset | VmState::Crashed | VmState::Exited,
                    ) => Ok(()),
                    _ => Err(self.failure(&end)),
                };
            }
            let status = self.status();
            let mut all_ready = true;
            for node in &status.nodes {
                all_ready &= self.in_service(node, limit)?;
            }
            if all_ready && status.vm != VmState::NotStarted {
                return Ok(());
            }
            if self.started.elapsed() >= limit {
                return Err(self.silent(FIRST, "has not started the VM", limit));
            }
            self.bell.wait(rings, Duration::from_millis(50));
        }
    }

    /// Whether a node is in service; an error if it should be by now.
    fn in_service(&self, status: &NodeStatus, limit: Duration) -> Result<bool, RackError> {
        let passed = self.started.elapsed();
        let node = status.id;
        match status.state {
            Some(NodeState::Ready | NodeState::Stopped) => Ok(true),
            Some(NodeState::Joined) if passed >= limit => {
                Err(self.silent(node, "has joined, but is not in service", limit))
            }
            Some(NodeState::Joined) => Ok(false),
            Some(NodeState::Absent) | None => {
                // A node that is ending closes its connection, too.
                let soon = Duration::from_millis(300);
                if self.doorbells.is_broken(node) && self.wait_end(soon).is_none() {
                    return Err(RackError::NoDoorbell { node });
                }
                let joining = limit.min(JOIN_LIMIT);
                // A busy host is no fault of the node's, within reason.
                let starved = || self.nodes()[usize::from(node.0)].starved();
                if passed >= limit
                    || passed >= joining && passed.saturating_sub(starved()) >= joining
                {
                    return Err(self.silent(node, "has not joined the rack", joining));
                }
                Ok(false)
            }
        }
    }

    fn silent(&self, node: NodeId, what: &'static str, limit: Duration) -> RackError {
        let seconds = limit.as_secs();
        let cause = self.shared_of(node).last_words();
        RackError::NodeSilent {
            node,
            what,
            seconds,
            cause,
        }
    }

    /// How the VM ended, if it has: with all its nodes, or frozen.
    #[must_use]
    pub fn ended(&self) -> Option<RackEnd> {
        let (node, how) = self.fleet.first_end()?;
        let vm = self.vm_state();
        // Relaxed: behind the state's Acquire.
        let value = self
            .memory
            .control
            .vm()
            .exit_value()
            .load(Ordering::Relaxed);
        let value = u32::try_from(value).ok();
        Some(RackEnd {
            node,
            how,
            vm,
            exit_value: value.filter(|_| vm == VmState::Exited),
        })
    }

    /// Waits up to `limit` for the VM's end.
    #[must_use]
    pub fn wait_end(&self, limit: Duration) -> Option<RackEnd> {
        let deadline = Instant::now() + limit;
        loop {
            let rings = self.bell.rings();
            if let Some(end) = self.ended() {
                return Some(end);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            self.bell.wait(rings, left);
        }
    }

    /// An unexpected end as an error that quotes the node's last words.
    #[must_use]
    pub fn failure(&self, end: &RackEnd) -> RackError {
        // If two run as one node, it is the one that has ended.
        let of_it = |node: &&Node| node.id() == end.node;
        let has_ended = |node: &&Node| node.shared().ended().is_some();
        let nodes = self.nodes();
        let its = || nodes.iter().filter(of_it);
        let node = its().find(has_ended).or_else(|| its().next());
        let shared = Arc::clone(node.expect("it was started").shared());
        drop(nodes);
        let (what, cause) = match (end.how, end.vm) {
            (NodeEnd::Orderly, VmState::Crashed) => {
                ("stopped the VM: the guest crashed", self.guest_words())
            }
            (NodeEnd::Orderly, VmState::Reset) => {
                ("stopped the VM: the guest reset itself", self.guest_words())
            }
            (NodeEnd::Orderly, VmState::PoweredOff) => (
                "stopped the VM: the guest switched itself off",
                self.guest_words(),
            ),
            (NodeEnd::Orderly, VmState::Exited) => (
                "stopped the VM: the guest wrote to its exit port",
                self.guest_words(),
            ),
            (how, VmState::Frozen) => {
                let cause = format!(
                    "the VM is frozen, as {}; it last said: {}",
                    self.needed_for(end.node),
                    shared.last_words()
                );
                (how.what(), cause)
            }
            (how, _) => (how.what(), shared.last_words()),
        };
        let node = end.node;
        match self.memory.damage() {
            Some((region, damage)) if end.how != NodeEnd::Orderly => RackError::RegionDamaged {
                region,
                damage,
                node,
                what,
                cause,
            },
            _ => RackError::NodeFailed { node, what, cause },
        }
    }

    /// Why the VM can't go on without a node.
    fn needed_for(&self, node: NodeId) -> String {
        let share = self.shares[usize::from(node.0)];
        let devices = if node == FIRST {
            ", and its devices"
        } else {
            ""
        };
        let memory = Size(share.memory);
        format!(
            "the node gave {} vCPU(s) and {memory} of its memory{devices}",
            share.vcpus
        )
    }

    /// What the console says of a guest that has ended.
    fn guest_words(&self) -> String {
        self.console.wait_closed(Duration::from_secs(1));
        let line = self.console.verdict();
        line.unwrap_or_else(|| "its console is empty".into())
    }

    fn vm_state(&self) -> VmState {
        // Acquire: pairs with the node's Release, so that what it wrote
        // before is visible.
        let raw = self.memory.control.vm_state().load(Ordering::Acquire);
        VmState::from_raw(raw).unwrap_or(VmState::NotStarted)
    }

    /// The rack as it is now.
    #[must_use]
    pub fn status(&self) -> RackStatus {
        let state = |node: &Node| match node.shared().ended() {
            Some(_) => Some(NodeState::Stopped),
            None => self
                .memory
                .control
                .node_state(node.id())
                // Acquire: as in `vm_state`.
                .and_then(|state| NodeState::from_raw(state.load(Ordering::Acquire))),
        };
        let counters = |node: &Node| {
            let counters = self.memory.control.node_counters(node.id());
            counters.expect("the spec has checked how many nodes there are")
        };
        let nodes = self.nodes();
        let count = nodes.len();
        let deciding = self.memory.control.boot_config().control_nodes();
        let places: Vec<_> = self
            .vcpus()
            .iter()
            .filter_map(|vcpu| vcpu.place.location())
            .collect();
        let on_node = |node| {
            let here = places.iter().filter(|at| at.node == node);
            u32::try_from(here.count()).expect("few")
        };
        let memory = self.memory_status();
        let node_status = |(node, share): (&Node, &NodeShare)| NodeStatus {
            id: node.id(),
            state: state(node),
            cores: share.cores,
            vcpus: on_node(node.id()),
            memory: memory[usize::from(node.id().0)],
            hot_memory: self.hot_memory(node.id()),
            pid: node.pid(),
            is_out: self.memory.control.membership().is_out(node.id()),
            role: match deciding.contains(node.id()) {
                true => Role::Control,
                false => Role::Data,
            },
            digest: self.digest(node.id()),
            counters: counters(node).values().collect(),
            ipis_to: counters(node).ipis(count).collect(),
        };
        RackStatus {
            accelerator: self.starter.accelerator,
            nodes: nodes.iter().zip(&self.shares).map(node_status).collect(),
            vm: self.vm_state(),
            vm_spec: self.vm.clone(),
            vcpus: self.vcpu_numbers(),
            metadata: self.memory.metadata(),
            memory: self.memory_numbers(),
            uptime: self.started.elapsed(),
        }
    }

    /// What a node says of its replica of the tables, once it has one.
    fn digest(&self, node: NodeId) -> Option<Digest> {
        self.memory.control.node(node)?.digest().get()
    }

    fn memory_numbers(&self) -> MemoryNumbers {
        let given: u64 = self.shares.iter().map(|share| share.memory).sum();
        // Without jobs, what was asked for last by the developers' command.
        let direct = || self.control().vm().desired_memory().load(Ordering::Relaxed);
        let tables = |cluster: &Cluster| Some(cluster.vms().get(&VM)?.desired().slices);
        let has_control = !self.control().boot_config().control_nodes().is_empty();
        let desired = has_control.then(|| self.cluster.read(tables).ok().flatten());
        let mut sums = MemoryNumbers {
            desired: desired
                .flatten()
                .map_or_else(direct, |slices| u64::from(slices) * LARGE_PAGE_SIZE),
            granted: given,
            seen: given,
            most: self.shares.iter().map(NodeShare::home).sum(),
        };
        for (node, _) in (0..).map(NodeId).zip(&self.shares) {
            let hot = self.hot_memory(node);
            sums.granted += hot.granted;
            sums.seen += hot.seen;
        }
        sums
    }

    fn vcpu_numbers(&self) -> VcpuNumbers {
        let vcpus = self.vcpus();
        let number = |count: usize| u32::try_from(count).expect("few");
        let desired = |cluster: &Cluster| Some(cluster.vms().get(&VM)?.desired().vcpus);
        let desired = self.cluster.read(desired).ok().flatten();
        VcpuNumbers {
            desired: desired.unwrap_or(self.vm.vcpus),
            granted: number(vcpus.len()),
            seen: number(vcpus.iter().filter(|vcpu| vcpu.has_started).count()),
            most: self.max_vcpus(),
        }
    }

    /// What each vCPU has counted so far.
    #[must_use]
    pub fn counters(&self) -> Vec<VcpuCounters> {
        let value = |id, counter| {
            let cell = self.memory.control.counter(id, counter);
            cell.map_or(0, |cell| cell.load(Ordering::Relaxed))
        };
        let here = |vcpu: VcpuStatus| Some((vcpu, vcpu.place.location()?));
        self.vcpus()
            .into_iter()
            .filter_map(here)
            .map(|(vcpu, at)| (vcpu.id, vcpu, at))
            .map(|(id, vcpu, at)| VcpuCounters {
                id,
                node: at.node,
                core: at.core.into(),
                state: match vcpu.place {
                    Place::Moving(_) => "moving",
                    _ if vcpu.has_started => "started",
                    _ => "granted",
                },
                moves: vcpu.moves,
                blackout_us: vcpu.blackout_us,
                rip: self.memory.control.last_rip(id).load(Ordering::Relaxed),
                values: Counter::ALL
                    .iter()
                    .map(|(counter, name)| (*name, value(id, *counter)))
                    .collect(),
            })
            .collect()
    }

    /// The guest's console output.
    #[must_use]
    pub fn console(&self) -> Arc<ConsoleLog> {
        Arc::clone(&self.console)
    }

    /// The last lines of a node's log.
    #[must_use]
    pub fn log(&self, node: NodeId) -> Vec<String> {
        let nodes = self.nodes();
        let node = nodes.get(usize::from(node.0));
        node.map_or_else(Vec::new, |node| node.shared().log())
    }

    pub(crate) fn control(&self) -> &ControlRegion {
        &self.memory.control
    }

    pub(crate) fn shares(&self) -> &[NodeShare] {
        &self.shares
    }

    /// Makes the devices' node look at shared memory.
    pub(crate) fn ring_devices(&self) {
        self.ring(FIRST);
    }

    /// Makes a node look at shared memory.
    pub(crate) fn ring(&self, node: NodeId) {
        self.doorbells.kick(node);
    }

    /// Where the VM's memory is.
    pub(crate) const fn pieces(&self) -> &PieceMap {
        &self.pieces
    }

    /// How often nodes have rung the launcher.
    pub(crate) fn rings(&self) -> u64 {
        self.bell.rings()
    }

    /// Waits until they have rung since `seen`, or `timeout` is over.
    pub(crate) fn wait_ring(&self, seen: u64, timeout: Duration) {
        self.bell.wait(seen, timeout);
    }

    fn link(&self) -> Link {
        Link {
            bell: Arc::clone(&self.bell),
            doorbells: Arc::clone(&self.doorbells),
            node: self.shared_of(FIRST),
            id: FIRST,
            fleet: Arc::clone(&self.fleet),
        }
    }

    /// The guest's console input. One writer at a time.
    #[must_use]
    pub fn console_input(&self) -> RingWriter {
        RingWriter::new(self.memory.control.ring(RingId::ConsoleIn), self.link())
    }

    /// The bytes from and to the agent in the guest. One user at a time.
    #[must_use]
    pub fn agent(&self) -> (RingReader, RingWriter) {
        let ring = |id| self.memory.control.ring(id);
        (
            RingReader::new(ring(RingId::AgentOut), self.link()),
            RingWriter::new(ring(RingId::AgentIn), self.link()),
        )
    }

    /// Ends all nodes at once.
    pub fn kill(&self) {
        self.fleet.kill();
    }

    /// Ends all nodes at once and waits up to `limit` until they are gone.
    pub fn stop(&self, limit: Duration) {
        self.kill();
        self.fleet.wait_gone(limit);
    }
}

impl Drop for Rack {
    fn drop(&mut self) {
        // All of them before any is waited for.
        self.kill();
    }
}

/// A connection whose other end is gone.
fn orphan() -> Result<UnixStream, RackError> {
    UnixStream::pair()
        .map(|(orphan, _)| orphan)
        .map_err(RackError::host("make doorbells"))
}

fn fresh_uuid() -> Result<[u8; 16], RackError> {
    let mut uuid = [0; 16];
    rustix::rand::getrandom(&mut uuid, rustix::rand::GetRandomFlags::empty())
        .map_err(RackError::host_errno("make a rack id"))?;
    Ok(uuid)
}
