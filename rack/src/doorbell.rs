//! Doorbells: how nodes and the launcher wake each other.
//!
//! This is the server side of QEMU's ivshmem protocol (QEMU documentation,
//! "Device Specification for Inter-VM shared memory device"). A node has an
//! eventfd for each core, its vectors, and the launcher has one; whoever holds
//! a copy wakes the core or the launcher by writing to it. The
//! server only hands out the copies: rings never pass through it, so all of
//! its messages to a node are queued in the socket before the node starts and
//! no thread has to serve.
//!
//! A doorbell is a hint. Whoever waits for one also looks at shared memory
//! and has a timeout.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vmm_shared::addr::NodeId;
use vmm_shared::control::LAUNCHER_PEER;

use crate::error::RackError;

const PROTOCOL_VERSION: i64 = 0;
/// "The descriptor that comes with this is the shared memory."
const SHARED_MEMORY: i64 = -1;

/// The doorbells of a rack.
#[derive(Debug)]
pub(crate) struct Doorbells {
    launcher: OwnedFd,
    nodes: Vec<NodePort>,
}

#[derive(Debug)]
struct NodePort {
    /// One for each core.
    bells: Vec<OwnedFd>,
    socket: UnixStream,
}

/// What a node is connected with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plug<'a> {
    pub cores: u32,
    /// The control region, as this node is to see it.
    pub control: BorrowedFd<'a>,
}

impl Doorbells {
    /// Doorbells for the launcher and these nodes, and each node's end of its
    /// connection.
    pub(crate) fn new(nodes: &[Plug<'_>]) -> Result<(Self, Vec<UnixStream>), RackError> {
        let failed = || RackError::host_errno("make doorbells");
        let bell = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let launcher = bell().map_err(failed())?;
        let mut ports = Vec::new();
        let mut clients = Vec::new();
        for node in nodes {
            let (socket, client) = UnixStream::pair().map_err(RackError::host("make doorbells"))?;
            let bells = (0..node.cores).map(|_| bell()).collect::<Result<_, _>>();
            let bells = bells.map_err(failed())?;
            ports.push(NodePort { bells, socket });
            clients.push(client);
        }
        let doorbells = Self {
            launcher,
            nodes: ports,
        };
        make_room();
        for (id, node) in (0..).zip(nodes) {
            let socket = &doorbells.nodes[usize::from(id)].socket;
            let introduced = doorbells.introduce(id, socket, node.control);
            introduced.map_err(failed())?;
        }
        Ok((doorbells, clients))
    }

    /// A second connection for a node, and the server's end of it.
    pub(crate) fn again(
        &self,
        node: NodeId,
        control: BorrowedFd<'_>,
    ) -> Result<(UnixStream, UnixStream), RackError> {
        let (socket, client) = UnixStream::pair().map_err(RackError::host("make doorbells"))?;
        self.introduce(node.0, &socket, control)
            .map_err(RackError::host_errno("make doorbells"))?;
        Ok((socket, client))
    }

    /// Queues all that a node has to know about its peers.
    fn introduce(
        &self,
        node: u16,
        socket: &UnixStream,
        memory: BorrowedFd<'_>,
    ) -> rustix::io::Result<()> {
        let own = &self.nodes[usize::from(node)];
        send(socket, PROTOCOL_VERSION, None)?;
        send(socket, i64::from(node), None)?;
        send(socket, SHARED_MEMORY, Some(memory))?;
        let launcher = Some(self.launcher.as_fd());
        send(socket, i64::from(LAUNCHER_PEER), launcher)?;
        let peers = (0_u16..).zip(&self.nodes).filter(|(id, _)| *id != node);
        for (id, port) in peers.chain([(node, own)]) {
            // The n-th descriptor for a peer is that of its vector n.
            for bell in &port.bells {
                send(socket, i64::from(id), Some(bell.as_fd()))?;
            }
        }
        Ok(())
    }

    /// Whether a node's connection has no other end any more.
    pub(crate) fn is_broken(&self, node: NodeId) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let Some(port) = self.nodes.get(usize::from(node.0)) else {
            return true;
        };
        let mut socket = [PollFd::new(&port.socket, PollFlags::empty())];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut socket, Some(&now)).is_ok() && socket[0].revents().contains(PollFlags::HUP)
    }

    /// Wakes a node's first core.
    pub(crate) fn kick(&self, node: NodeId) {
        let port = self.nodes.get(usize::from(node.0));
        if let Some(bell) = port.and_then(|port| port.bells.first()) {
            ring(bell.as_fd());
        }
    }
}

/// Raises the limit on open files as far as may be: it also bounds the
/// descriptors that are on their way in sockets, and a wide rack has many.
/// Where it can't be raised, introducing a node may fail, and says so.
fn make_room() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let most = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    let _ = setrlimit(Resource::Nofile, most);
}

/// A full counter means that the doorbell is ringing already.
fn ring(bell: BorrowedFd<'_>) {
    let _ = rustix::io::write(bell, &1_u64.to_ne_bytes());
}

fn send(
    socket: &UnixStream,
    number: i64,
    descriptor: Option<BorrowedFd<'_>>,
) -> rustix::io::Result<()> {
    let bytes = number.to_le_bytes();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<_> = descriptor.into_iter().collect();
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    // Nothing else is in the socket's buffer, so 8 bytes go whole.
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    sendmsg(socket, &[IoSlice::new(&bytes)], &mut ancillary, flags).map(drop)
}

/// Where threads of the launcher wait for its doorbell.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    rings: Mutex<u64>,
    changed: Condvar,
    closing: AtomicBool,
}

impl Bell {
    /// How often the bell has rung. Read it, look at shared memory, then
    /// [`wait`](Self::wait) for the next ring.
    pub(crate) fn rings(&self) -> u64 {
        *self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the bell has rung since `seen`, or `timeout` is over.
    pub(crate) fn wait(&self, seen: u64, timeout: Duration) {
        let rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        let unchanged = |rings: &mut u64| *rings == seen;
        drop(self.changed.wait_timeout_while(rings, timeout, unchanged));
    }

    /// Wakes every waiting thread of the launcher.
    pub(crate) fn ring(&self) {
        *self.rings.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.changed.notify_all();
    }
}

/// The thread that turns the launcher's doorbell into rings of its [`Bell`].
#[derive(Debug)]
pub(crate) struct BellThread {
    bell: Arc<Bell>,
    eventfd: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl BellThread {
    pub(crate) fn start(doorbells: &Doorbells) -> Result<Self, RackError> {
        let failed = || RackError::host("start the doorbell thread");
        let bell = Arc::new(Bell::default());
        let eventfd = doorbells.launcher.try_clone().map_err(failed())?;
        let listener = doorbells.launcher.try_clone().map_err(failed())?;
        let rung = Arc::clone(&bell);
        let thread = std::thread::Builder::new()
            .name("doorbell".into())
            .spawn(move || listen(&listener, &rung))
            .map_err(failed())?;
        Ok(Self {
            bell,
            eventfd,
            thread: Some(thread),
        })
    }

    pub(crate) fn bell(&self) -> Arc<Bell> {
        Arc::clone(&self.bell)
    }
}

impl Drop for BellThread {
    fn drop(&mut self) {
        // Release: pairs with the Acquire in `listen`.
        self.bell.closing.store(true, Ordering::Release);
        ring(self.eventfd.as_fd());
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn listen(eventfd: &OwnedFd, bell: &Bell) {
    use rustix::event::{PollFd, PollFlags, poll};
    // Acquire: pairs with the Release in `drop`.
    while !bell.closing.load(Ordering::Acquire) {
        match poll(&mut [PollFd::new(eventfd, PollFlags::IN)], None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
        let mut count = [0; 8];
        if rustix::io::read(eventfd, &mut count).is_ok() {
            bell.ring();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    use std::io::{IoSliceMut, Read};
    use std::time::Instant;

    /// Receives one message as QEMU does: 8 bytes, then its descriptor.
    fn receive(socket: &UnixStream) -> (i64, Option<OwnedFd>) {
        let mut bytes = [0; 8];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )
        .expect("a message");
        assert_eq!(received.bytes, 8);
        let descriptor = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        (i64::from_le_bytes(bytes), descriptor)
    }

    #[test]
    fn a_node_is_told_everything_in_the_protocols_order() {
        let memory = tempfile::tempfile().expect("a file");
        let plug = |cores| Plug {
            cores,
            control: memory.as_fd(),
        };
        let (doorbells, clients) = Doorbells::new(&[plug(1), plug(2), plug(3)]).expect("made");
        let mut seen = Vec::new();
        let mut bells = Vec::new();
        for _ in 0..10 {
            let (number, descriptor) = receive(&clients[1]);
            seen.push((number, descriptor.is_some()));
            bells.push(descriptor);
        }
        let expected = [
            (0, false),
            (1, false),
            (-1, true),
            (64, true),
            (0, true),
            (2, true),
            (2, true),
            (2, true),
            (1, true),
            (1, true),
        ];
        assert_eq!(seen, expected);
        doorbells.kick(NodeId(1));
        let own = bells[8].take().expect("its first core's bell");
        let mut count = [0; 8];
        rustix::io::read(&own, &mut count).expect("rung");
        assert_eq!(u64::from_ne_bytes(count), 1);
    }

    #[test]
    fn the_widest_rack_is_introduced_before_anyone_listens() {
        let memory = tempfile::tempfile().expect("a file");
        let plug = |cores| Plug {
            cores,
            control: memory.as_fd(),
        };
        let cores = [64, 64, 64, 58, 1, 1, 1, 1].map(plug);
        let (_, clients) = Doorbells::new(&cores).expect("made");
        for _ in 0..4 + 254 {
            receive(&clients[7]);
        }
        clients[7].set_nonblocking(true).expect("possible");
        assert!((&clients[7]).read(&mut [0]).is_ok_and(|count| count == 0));
    }

    #[test]
    fn the_launchers_doorbell_wakes_a_waiting_thread() {
        let memory = tempfile::tempfile().expect("a file");
        let plug = Plug {
            cores: 1,
            control: memory.as_fd(),
        };
        let (doorbells, _clients) = Doorbells::new(&[plug]).expect("made");
        let thread = BellThread::start(&doorbells).expect("started");
        let bell = thread.bell();
        let seen = bell.rings();
        ring(doorbells.launcher.as_fd());
        let start = Instant::now();
        bell.wait(seen, Duration::from_secs(30));
        assert!(start.elapsed() < Duration::from_secs(20));
        assert!(bell.rings() > seen);
    }

    #[test]
    fn a_lost_doorbell_only_costs_the_timeout() {
        let bell = Bell::default();
        let start = Instant::now();
        bell.wait(bell.rings(), Duration::from_millis(20));
        assert!(start.elapsed() >= Duration::from_millis(20));
    }
}
