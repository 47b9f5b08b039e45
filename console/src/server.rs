//! The process that holds a rack takes requests on its socket.

use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use control_plane::cluster::Cluster;
use control_plane::policy::text;
use rack::{ConsoleLog, ConsoleRead, NodeStatus, RackError, RackStatus, RingWriter, Role};
use vmm_shared::addr::NodeId;
use vmm_shared::control::{NodeState, VmState};

use crate::machine::Machine;
use crate::names::HeldDir;
use crate::protocol::{
    Direct, Envelope, NodeReport, ReplicaReport, Reply, Report, Request, RunReport, VERSION,
    VcpuReport, VmReport, receive, send,
};
use crate::{relay, tables};

/// Clients served at the same time.
const MAX_CLIENTS: usize = 64;
/// How long a client may take to say what it wants.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);

/// A rack that takes requests under its name.
pub(crate) struct Server {
    name: String,
    machine: Arc<Machine>,
    held: Arc<HeldDir>,
    console_input: Mutex<RingWriter>,
    clients: AtomicUsize,
    /// What to do when a client has asked for the end.
    stop: Box<dyn Fn() + Send + Sync>,
}

impl Server {
    /// Starts to serve; `stop` is called after a client's request has taken
    /// the rack down.
    pub(crate) fn start(
        name: String,
        machine: Arc<Machine>,
        held: Arc<HeldDir>,
        stop: impl Fn() + Send + Sync + 'static,
    ) -> Result<()> {
        let path = held.dir().socket();
        let listener = UnixListener::bind(&path)
            .and_then(|listener| {
                std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600))?;
                Ok(listener)
            })
            .with_context(|| {
                let path = path.display();
                format!("cannot listen on {path}; set XDG_RUNTIME_DIR to a shorter path")
            })?;
        let server = Arc::new(Self {
            name,
            console_input: Mutex::new(machine.rack.console_input()),
            machine,
            held,
            clients: AtomicUsize::new(0),
            stop: Box::new(stop),
        });
        thread::Builder::new()
            .name("server".into())
            .spawn(move || server.accept(&listener))
            .context("cannot start the server thread")?;
        Ok(())
    }

    fn accept(self: &Arc<Self>, listener: &UnixListener) {
        for client in listener.incoming() {
            let Ok(client) = client else {
                // Out of descriptors: some client will go.
                thread::sleep(Duration::from_millis(100));
                continue;
            };
            // Relaxed: a mere count; only this thread adds.
            if self.clients.load(Ordering::Relaxed) >= MAX_CLIENTS {
                let busy = "too many clients at the same time; try again later".to_owned();
                let mut client = client;
                let _ = send(&mut client, &Reply::Refused(busy));
                continue;
            }
            self.clients.fetch_add(1, Ordering::Relaxed);
            let server = Arc::clone(self);
            thread::spawn(move || {
                // A client that breaks off, or talks nonsense, ends only its
                // own connection.
                let _ = server.serve(client);
                server.clients.fetch_sub(1, Ordering::Relaxed);
            });
        }
    }

    fn serve(&self, mut client: UnixStream) -> io::Result<()> {
        client.set_read_timeout(Some(REQUEST_LIMIT))?;
        client.set_write_timeout(Some(REQUEST_LIMIT))?;
        let envelope: Envelope = match receive(&mut client) {
            Ok(envelope) => envelope,
            Err(error) => {
                let what = "this is no request; use the viaduct command".to_owned();
                send(&mut client, &Reply::Refused(what))?;
                return Err(error);
            }
        };
        if envelope.version != VERSION {
            let what = "this rack was started by another version of viaduct; use that one";
            return send(&mut client, &Reply::Refused(what.to_owned()));
        }
        match envelope.request {
            Request::Status => {
                let report = self.report();
                send(&mut client, &Reply::Status(Box::new(report)))
            }
            Request::Cluster => {
                let told = tables::report(&self.machine.rack);
                answer(&mut client, told.map(|it| Reply::Cluster(Box::new(it))))
            }
            Request::Events { since } => {
                let told = tables::events(&self.machine.rack, since);
                answer(&mut client, told.map(Reply::Events))
            }
            Request::Explain { wanted } => {
                let told = tables::explain(&self.machine.rack, wanted.as_ref());
                answer(&mut client, told.map(|it| Reply::Plan(Box::new(it))))
            }
            Request::Policy => {
                let read = |cluster: &Cluster| text::print(cluster.policy());
                let told = self.machine.rack.cluster().read(read);
                answer(&mut client, told.map(Reply::Policy))
            }
            Request::Change {
                wanted,
                request,
                dry_run,
            } => {
                let told = tables::change(&self.machine.rack, &wanted, request, dry_run);
                answer(&mut client, told.map(|it| Reply::Changed(Box::new(it))))
            }
            Request::Wait { job, milliseconds } => {
                let limit = Duration::from_millis(milliseconds).min(REQUEST_LIMIT);
                let told = tables::wait(&self.machine.rack, job, limit);
                if let Ok(Some(job)) = &told
                    && job.ended
                {
                    // Its agent takes a vCPU into service in one go: when it
                    // answers, that is over. If it does not, the job has
                    // ended all the same.
                    let _ = self.machine.agent.ping(limit);
                }
                answer(&mut client, told.map(Reply::Job))
            }
            Request::Join { node, dry_run } => {
                let told = tables::join(&self.machine.rack, NodeId(node), dry_run);
                answer(&mut client, told.map(|it| Reply::Changed(Box::new(it))))
            }
            Request::Exec => {
                if let Some(reason) = self.reason() {
                    return send(&mut client, &Reply::Refused(reason));
                }
                if self.machine.agent.wait_hello(Duration::ZERO).is_err() {
                    let what = "the guest is still booting; try again when viaduct up is done";
                    return send(&mut client, &Reply::Refused(what.to_owned()));
                }
                send(&mut client, &Reply::Ready)?;
                client.set_read_timeout(None)?;
                client.set_write_timeout(None)?;
                relay::serve(client, &self.machine.agent)
            }
            Request::Console { follow } => {
                send(&mut client, &Reply::Ready)?;
                client.set_read_timeout(None)?;
                client.set_write_timeout(None)?;
                self.console(client, follow)
            }
            Request::Direct { change, seconds } => {
                client.set_read_timeout(None)?;
                let reply = match self.direct(change, Duration::from_secs(seconds)) {
                    Ok(()) => Reply::Ready,
                    Err(why) => Reply::Refused(why),
                };
                send(&mut client, &reply)
            }
            Request::Down { seconds } => {
                self.machine.power_off(Duration::from_secs(seconds));
                // The name is free before the client hears of it.
                self.held.clear();
                let told = send(&mut client, &Reply::Stopped);
                (self.stop)();
                told
            }
        }
    }

    /// Changes the VM's memory, until the guest has confirmed it.
    fn direct(&self, change: Direct, limit: Duration) -> Result<(), String> {
        if let Some(reason) = self.reason() {
            return Err(reason);
        }
        let rack = &self.machine.rack;
        let size = rack::Size;
        let done = match change {
            Direct::AddMemory { node, bytes } => rack.add_memory(NodeId(node), size(bytes), limit),
            Direct::RemoveMemory { node, bytes } => {
                rack.remove_memory(NodeId(node), size(bytes), limit)
            }
            Direct::Slices { from, to, count } => {
                let moved = rack.move_memory((NodeId(from), NodeId(to)), count, limit);
                return moved.map(drop).map_err(|why| why.to_string());
            }
        };
        done.map_err(|why| why.to_string())
    }

    /// Why the VM takes no commands, if it has ended.
    fn reason(&self) -> Option<String> {
        let end = self.machine.rack.ended()?;
        let failure = self.machine.rack.failure(&end);
        Some(format!("{failure}; use viaduct down, then up again"))
    }

    fn report(&self) -> Report {
        let rack = &self.machine.rack;
        let status = rack.status();
        let counters = rack.counters();
        Report {
            name: self.name.clone(),
            accelerator: status.accelerator.name().to_owned(),
            pid: std::process::id(),
            uptime_seconds: status.uptime.as_secs_f64(),
            vm: vm_report(&status, self.reason()),
            cluster: tables::report(rack).ok(),
            nodes: status
                .nodes
                .iter()
                .map(|node| NodeReport {
                    id: node.id.0,
                    state: node_state(node).to_owned(),
                    role: match node.role {
                        Role::Data => "data",
                        Role::Control => "control",
                    }
                    .to_owned(),
                    replica: node.digest.map(|digest| ReplicaReport {
                        position: digest.position,
                        digest: format!("{:016x}", digest.value),
                    }),
                    cores: node.cores,
                    vcpus: node.vcpus,
                    memory_bytes: node.memory.gives,
                    memory_offset_bytes: node.memory.home_offset,
                    memory_home_bytes: node.memory.home,
                    memory_away_bytes: node.memory.away,
                    memory_added_bytes: node.hot_memory.granted,
                    memory_added_seen_bytes: node.hot_memory.seen,
                    memory_free_bytes: node.hot_memory.free,
                    memory_room_bytes: node.memory.room,
                    memory_taken_bytes: node.memory.taken,
                    memory_copying_us: node.memory.copying_us,
                    memory_longest_us: node.memory.longest_us,
                    pid: node.pid,
                    counters: named(&node.counters),
                    ipis_to: node.ipis_to.clone(),
                })
                .collect(),
            memory: rack
                .memory_runs()
                .into_iter()
                .map(|run| RunReport {
                    bytes: run.len,
                    home: run.home.0,
                    node: run.node.0,
                })
                .collect(),
            vcpus: counters
                .into_iter()
                .map(|vcpu| VcpuReport {
                    id: vcpu.id.0,
                    node: vcpu.node.0,
                    core: vcpu.core,
                    state: vcpu.state.to_owned(),
                    moves: vcpu.moves,
                    blackout_us: vcpu.blackout_us,
                    counters: named(&vcpu.values),
                })
                .collect(),
        }
    }

    /// Joins a client to the serial console.
    fn console(&self, client: UnixStream, follow: bool) -> io::Result<()> {
        let log = self.machine.rack.console();
        let output = client.try_clone()?;
        let printer = thread::spawn(move || print_console(&log, output, follow));
        let mut input = client;
        let mut buffer = [0; 512];
        while let Ok(count @ 1..) = input.read(&mut buffer) {
            self.type_in(&buffer[..count]);
        }
        // The client is gone, or has all it wanted: wakes the printer, too.
        let _ = input.shutdown(std::net::Shutdown::Both);
        drop(printer.join());
        Ok(())
    }

    /// Types into the console. What a guest doesn't take for a second is
    /// lost, as on a real serial line.
    fn type_in(&self, mut bytes: &[u8]) {
        for _ in 0..50 {
            let mut input = self
                .console_input
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            bytes = &bytes[input.write_now(bytes)..];
            drop(input);
            if bytes.is_empty() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Answers, or says why not.
fn answer(client: &mut UnixStream, reply: Result<Reply, RackError>) -> io::Result<()> {
    let reply = reply.unwrap_or_else(|error| Reply::Refused(error.to_string()));
    send(client, &reply)
}

fn print_console(log: &ConsoleLog, mut client: UnixStream, follow: bool) {
    let mut position = 0;
    let mut buffer = vec![0; 16 << 10];
    loop {
        let wait = if follow { 500 } else { 0 };
        match log.read(&mut position, &mut buffer, Duration::from_millis(wait)) {
            ConsoleRead::Bytes(count) => {
                if client.write_all(&buffer[..count]).is_err() {
                    return;
                }
            }
            ConsoleRead::Timeout if follow => {
                // A client that is gone shows as an error on the socket.
                if client.take_error().map_or(true, |error| error.is_some()) || hung_up(&client) {
                    return;
                }
            }
            ConsoleRead::Timeout | ConsoleRead::Closed => {
                let _ = client.shutdown(std::net::Shutdown::Both);
                return;
            }
        }
    }
}

fn hung_up(client: &UnixStream) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut poll_fd = [PollFd::new(client, PollFlags::empty())];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut poll_fd, Some(&now)).is_ok_and(|_| poll_fd[0].revents().contains(PollFlags::HUP))
}

fn vm_report(status: &RackStatus, reason: Option<String>) -> VmReport {
    let state = match status.vm {
        VmState::PoweredOff => "powered-off",
        VmState::Reset => "reset",
        VmState::Crashed => "crashed",
        VmState::Frozen => "frozen",
        VmState::Exited => "exited",
        VmState::NotStarted | VmState::Running if reason.is_some() => "failed",
        VmState::NotStarted => "starting",
        VmState::Running => "running",
    };
    VmReport {
        state: state.to_owned(),
        vcpus: status.vcpus.desired,
        vcpus_granted: status.vcpus.granted,
        vcpus_seen: status.vcpus.seen,
        vcpus_max: status.vcpus.most,
        metadata_bytes: status.metadata,
        memory_bytes: status.memory.desired,
        memory_granted_bytes: status.memory.granted,
        memory_seen_bytes: status.memory.seen,
        memory_max_bytes: status.memory.most,
        reason,
    }
}

fn named(counters: &[(&'static str, u64)]) -> Vec<(String, u64)> {
    counters
        .iter()
        .map(|(name, value)| ((*name).to_owned(), *value))
        .collect()
}

fn node_state(node: &NodeStatus) -> &'static str {
    match node.state {
        Some(NodeState::Joined | NodeState::Ready) if node.is_out => "fenced",
        Some(NodeState::Absent) => "absent",
        Some(NodeState::Joined) => "joined",
        Some(NodeState::Ready) => "ready",
        Some(NodeState::Stopped) => "stopped",
        None => "unknown",
    }
}
