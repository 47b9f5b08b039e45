//! A running rack.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use vmm_shared::addr::{MAX_NODES, NodeId, VcpuId};
use vmm_shared::control::{
    BUNDLE_OFFSET, Blob, BootConfig, ControlRegion, Counter, MAX_COMMAND_LINE, NodeShare,
    NodeState, RingId, VmState,
};
use vmm_shared::region::RegionKind;
use zerocopy::FromZeros;

use crate::boot::{BootFiles, Bundle};
use crate::console::ConsoleLog;
use crate::doorbell::{BellThread, Doorbells};
use crate::error::RackError;
use crate::image::Image;
use crate::node::{Node, NodeEnd, Sink};
use crate::preflight::{Accelerator, Programs};
use crate::qemu::{NodeConfig, RegionWindow, Sharing, arguments};
use crate::region::Region;
use crate::spec::{RackSpec, VmSpec};
use crate::stream::{Link, RingReader, RingWriter};

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
}

/// A rack whose nodes have been started. Dropping it ends them.
#[derive(Debug)]
pub struct Rack {
    // Fields drop in this order: first the nodes end, then their memory goes.
    nodes: Vec<Node>,
    _bell_thread: BellThread,
    doorbells: Arc<Doorbells>,
    bell: Arc<crate::doorbell::Bell>,
    console: Arc<ConsoleLog>,
    memory: Memory,
    spec: RackSpec,
    vm: VmSpec,
    accelerator: Accelerator,
    started: Instant,
}

#[derive(Debug)]
struct Memory {
    control: ControlRegion,
    control_region: Region,
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.control_region.release();
    }
}

/// How and where a rack ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RackEnd {
    /// The node that ended first.
    pub node: NodeId,
    /// How.
    pub how: NodeEnd,
    /// What had become of the VM.
    pub vm: VmState,
}

/// A rack as it is now.
#[derive(Clone, Debug)]
pub struct RackStatus {
    /// How nodes execute code.
    pub accelerator: Accelerator,
    /// Its nodes.
    pub nodes: Vec<NodeStatus>,
    /// What the VM is doing.
    pub vm: VmState,
    /// Its size.
    pub vm_spec: VmSpec,
    /// Since the rack was started.
    pub uptime: Duration,
}

/// A node as it is now.
#[derive(Clone, Debug)]
pub struct NodeStatus {
    /// Which.
    pub id: NodeId,
    /// How far it has come; `None` if it wrote nonsense.
    pub state: Option<NodeState>,
    /// Its cores.
    pub cores: u32,
    /// Memory that it gives, in bytes.
    pub memory: u64,
    /// The process that is the node.
    pub pid: i32,
}

/// What one vCPU has counted, in [`Counter::ALL`]'s order.
#[derive(Clone, Debug)]
pub struct VcpuCounters {
    /// Which.
    pub id: VcpuId,
    /// Names and values.
    pub values: Vec<(&'static str, u64)>,
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

        let memory = Memory::create(uuid, &bundle)?;
        let nodes = u16::try_from(spec.nodes).expect("checked to be few");
        let control_fd = memory.control_region.file().as_fd();
        let (doorbells, clients) = Doorbells::new(nodes, control_fd)?;
        let doorbells = Arc::new(doorbells);
        let bell_thread = BellThread::start(&doorbells)?;
        let bell = bell_thread.bell();

        memory.configure(spec, vm, boot, &bundle, image.as_ref());
        let started = Instant::now();
        let mut running = Vec::new();
        for (node, client) in (0..nodes).map(NodeId).zip(clients) {
            let own = Region::create(RegionKind::Memory, uuid, node.0, vm.memory.0)?;
            let windows = windows(&own, image.as_ref())?;
            let doorbell = OwnedFd::from(client);
            let config = NodeConfig {
                node,
                rack: &options.name,
                cores: spec.cores,
                accelerator: options.accelerator,
                hypervisor: &options.programs.hypervisor,
                doorbell: &doorbell,
                regions: &windows,
            };
            let command = command(&options.programs.qemu, &config);
            let mut inherit: Vec<_> = windows.into_iter().map(|window| window.file).collect();
            inherit.push(doorbell);
            let sink = options.log.clone();
            running.push(Node::start(
                node,
                command,
                inherit,
                Arc::clone(&bell),
                sink,
            )?);
        }

        let link = Link {
            bell: Arc::clone(&bell),
            doorbells: Arc::clone(&doorbells),
            node: Arc::clone(running[0].shared()),
            id: FIRST,
        };
        let ring = memory.control.ring(RingId::ConsoleOut);
        let console = ConsoleLog::start(RingReader::new(ring, link))?;
        Ok(Self {
            nodes: running,
            _bell_thread: bell_thread,
            doorbells,
            bell,
            console,
            memory,
            spec: spec.clone(),
            vm: vm.clone(),
            accelerator: options.accelerator,
            started,
        })
    }

    /// Waits until every node is in service and the VM has been entered.
    ///
    /// # Errors
    /// A node ended, or has not joined within `limit`.
    pub fn wait_ready(&self, limit: Duration) -> Result<(), RackError> {
        let deadline = Instant::now() + limit;
        loop {
            let rings = self.bell.rings();
            if let Some(end) = self.ended() {
                return match end.how {
                    NodeEnd::Orderly => Ok(()),
                    _ => Err(self.failure(&end)),
                };
            }
            let status = self.status();
            let joined = |node: &NodeStatus| {
                matches!(node.state, Some(NodeState::Ready | NodeState::Stopped))
            };
            if status.nodes.iter().all(joined) && status.vm != VmState::NotStarted {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let silent = status.nodes.iter().find(|node| !joined(node));
                let node = silent.map_or(FIRST, |node| node.id);
                return Err(RackError::NodeSilent {
                    node,
                    seconds: limit.as_secs(),
                    cause: self.nodes[usize::from(node.0)].shared().last_words(),
                });
            }
            self.bell.wait(rings, left.min(Duration::from_millis(50)));
        }
    }

    /// How the rack ended, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<RackEnd> {
        self.nodes.iter().find_map(|node| {
            node.shared().ended().map(|how| RackEnd {
                node: node.id(),
                how,
                vm: self.vm_state(),
            })
        })
    }

    /// Waits up to `limit` for the rack's end.
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
        let shared = self.nodes[usize::from(end.node.0)].shared();
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
            (how, _) => (how.what(), shared.last_words()),
        };
        RackError::NodeFailed {
            node: end.node,
            what,
            cause,
        }
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
        let node_status = |node: &Node| NodeStatus {
            id: node.id(),
            state: match node.shared().ended() {
                Some(_) => Some(NodeState::Stopped),
                None => self
                    .memory
                    .control
                    .node_state(node.id())
                    // Acquire: as in `vm_state`.
                    .and_then(|state| NodeState::from_raw(state.load(Ordering::Acquire))),
            },
            cores: self.spec.cores,
            memory: self.vm.memory.0,
            pid: node.pid(),
        };
        RackStatus {
            accelerator: self.accelerator,
            nodes: self.nodes.iter().map(node_status).collect(),
            vm: self.vm_state(),
            vm_spec: self.vm.clone(),
            uptime: self.started.elapsed(),
        }
    }

    /// What each vCPU has counted so far.
    #[must_use]
    pub fn counters(&self) -> Vec<VcpuCounters> {
        let vcpus = u16::try_from(self.vm.vcpus).expect("checked to be few");
        let value = |id, counter| {
            let cell = self.memory.control.counter(id, counter);
            cell.map_or(0, |cell| cell.load(Ordering::Relaxed))
        };
        (0..vcpus)
            .map(VcpuId)
            .map(|id| VcpuCounters {
                id,
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
        let node = self.nodes.get(usize::from(node.0));
        node.map_or_else(Vec::new, |node| node.shared().log())
    }

    fn link(&self) -> Link {
        Link {
            bell: Arc::clone(&self.bell),
            doorbells: Arc::clone(&self.doorbells),
            node: Arc::clone(self.nodes[0].shared()),
            id: FIRST,
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
        for node in &self.nodes {
            node.kill();
        }
    }
}

impl Memory {
    /// Makes the control region and puts the boot bundle into it.
    fn create(uuid: [u8; 16], bundle: &Bundle) -> Result<Self, RackError> {
        let end = bundle.initramfs_blob().offset + bundle.initramfs.len() as u64;
        let region = Region::create(RegionKind::Control, uuid, 0, end)?;
        let control = ControlRegion::new(region.map()?).expect("made large enough");
        for (blob, bytes) in [
            (bundle.kernel_blob(), &bundle.kernel),
            (bundle.initramfs_blob(), &bundle.initramfs),
        ] {
            control
                .blob(blob)
                .and_then(|to| to.write_bytes(0, bytes))
                .expect("made large enough");
        }
        Ok(Self {
            control,
            control_region: region,
        })
    }

    /// Writes the boot configuration, the last thing before nodes start.
    fn configure(
        &self,
        spec: &RackSpec,
        vm: &VmSpec,
        boot: &BootFiles,
        bundle: &Bundle,
        image: Option<&Image>,
    ) {
        let words = boot.command_line.as_bytes();
        let mut command_line = [0; MAX_COMMAND_LINE];
        command_line[..words.len()].copy_from_slice(words);
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
        let wall_clock_ns = u64::try_from(since_1970.unwrap_or_default().as_nanos());
        self.control.set_boot_config(&BootConfig {
            nodes: spec.nodes,
            vcpus: vm.vcpus,
            memory: vm.memory.0,
            wall_clock_ns: wall_clock_ns.unwrap_or(u64::MAX),
            kernel: bundle.kernel_blob(),
            initramfs: bundle.initramfs_blob(),
            image_len: image.map_or(0, |image| image.content_len),
            command_line_len: u32::try_from(words.len()).expect("checked to be short"),
            reserved: 0,
            command_line,
            shares: shares(spec, vm),
        });
    }
}

/// What each node gives: the one node gives everything.
fn shares(spec: &RackSpec, vm: &VmSpec) -> [NodeShare; MAX_NODES] {
    let mut shares = [NodeShare::new_zeroed(); MAX_NODES];
    shares[0] = NodeShare {
        memory: vm.memory.0,
        cores: spec.cores,
        vcpus: vm.vcpus,
    };
    shares
}

impl Bundle {
    fn kernel_blob(&self) -> Blob {
        Blob {
            offset: BUNDLE_OFFSET,
            len: self.kernel.len() as u64,
        }
    }

    /// Behind the kernel, on a page of its own.
    fn initramfs_blob(&self) -> Blob {
        let kernel = self.kernel_blob();
        Blob {
            offset: (kernel.offset + kernel.len).next_multiple_of(vmm_shared::addr::PAGE_SIZE),
            len: self.initramfs.len() as u64,
        }
    }
}

/// The windows of a node: the memory that it gives, and the root image.
fn windows(own: &Region, image: Option<&Image>) -> Result<Vec<RegionWindow>, RackError> {
    let window = |region: &Region, sharing| {
        let file = region.file().try_clone();
        Ok(RegionWindow {
            file: file
                .map_err(RackError::host("share a memory region"))?
                .into(),
            len: region.len(),
            sharing,
        })
    };
    let mut windows = vec![window(own, Sharing::Shared)?];
    if let Some(image) = image {
        windows.push(window(&image.region, image.sharing)?);
    }
    Ok(windows)
}

fn command(qemu: &Path, config: &NodeConfig<'_>) -> Command {
    let mut command = Command::new(qemu);
    command.args(arguments(config));
    command
}

fn fresh_uuid() -> Result<[u8; 16], RackError> {
    let mut uuid = [0; 16];
    rustix::rand::getrandom(&mut uuid, rustix::rand::GetRandomFlags::empty())
        .map_err(RackError::host_errno("make a rack id"))?;
    Ok(uuid)
}
