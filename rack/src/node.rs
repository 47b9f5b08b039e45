//! One node: its QEMU process, its log and its end.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal};
use vmm_shared::addr::NodeId;

use crate::doorbell::Bell;
use crate::error::RackError;
use crate::fleet::Fleet;
use crate::spawn::spawn;

/// Lines of a node's log that are kept.
const LOG_LINES: usize = 1000;
/// A line that is longer is cut: a node may write anything.
const LOG_LINE_BYTES: u64 = 4096;

/// How a node ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeEnd {
    /// Its VM stopped; the control region says how.
    Orderly,
    /// Its hypervisor could not boot.
    BootFailure,
    /// Its hypervisor panicked.
    Panic,
    /// QEMU ended without being told to: an error of its own, or a CPU of
    /// the node shut down.
    Exited(i32),
    /// QEMU was killed by a signal.
    Killed(i32),
    /// It gave no sign of life, and was put out.
    Silent,
    /// It has found out that it was put out.
    Fenced,
}

impl NodeEnd {
    /// The value v written to the exit port becomes status 2v+1.
    fn from_status(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(0x21), _) => Self::Orderly,
            (Some(0x23), _) => Self::BootFailure,
            (Some(0x25), _) => Self::Panic,
            (Some(0x27), _) => Self::Fenced,
            (Some(code), _) => Self::Exited(code),
            (None, signal) => Self::Killed(signal.unwrap_or_default()),
        }
    }

    /// What the node did, as in "node 0 …".
    #[must_use]
    pub const fn what(self) -> &'static str {
        match self {
            Self::Orderly => "ended",
            Self::BootFailure => "could not boot its hypervisor",
            Self::Panic => "stopped: its hypervisor panicked",
            Self::Exited(0) => "reset itself",
            Self::Exited(_) => "lost its QEMU process",
            Self::Killed(_) => "was killed",
            Self::Silent => "gave no sign of life",
            Self::Fenced => "stopped, as it had been put out",
        }
    }
}

/// What other threads know of a node.
#[derive(Debug, Default)]
pub(crate) struct NodeShared {
    log: Mutex<VecDeque<String>>,
    end: Mutex<Option<NodeEnd>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl NodeShared {
    /// How the node ended, if it has.
    pub(crate) fn ended(&self) -> Option<NodeEnd> {
        *lock(&self.end)
    }

    pub(crate) fn set_ended(&self, end: NodeEnd) {
        *lock(&self.end) = Some(end);
    }

    /// The last lines of its log.
    pub(crate) fn log(&self) -> Vec<String> {
        lock(&self.log).iter().cloned().collect()
    }

    /// What it said last, or that it said nothing.
    pub(crate) fn last_words(&self) -> String {
        let log = lock(&self.log);
        log.iter()
            .rev()
            .find(|line| !line.trim().is_empty())
            .map_or_else(|| "it said nothing".into(), |line| line.trim().to_owned())
    }
}

/// What is called with every line of every node's log.
pub(crate) type Sink = Arc<dyn Fn(NodeId, &str) + Send + Sync>;

/// Who hears of what happens to a node.
#[derive(Clone, Default)]
pub(crate) struct Audience {
    /// All nodes of the rack.
    pub fleet: Arc<Fleet>,
    /// Rung when the node has ended.
    pub bell: Arc<Bell>,
    /// Where its log goes as it is written, if anywhere.
    pub sink: Option<Sink>,
}

/// A started node.
#[derive(Debug)]
pub(crate) struct Node {
    id: NodeId,
    pid: Pid,
    /// Signals through it reach this process or none.
    pidfd: OwnedFd,
    shared: Arc<NodeShared>,
    keeper: Option<JoinHandle<()>>,
}

impl Node {
    /// Starts `command` as node `id`; `inherit` are the descriptors that its
    /// arguments name.
    pub(crate) fn start(
        id: NodeId,
        command: Command,
        inherit: Vec<OwnedFd>,
        audience: Audience,
    ) -> Result<Self, RackError> {
        let failed = || RackError::host("start QEMU");
        let shared = Arc::new(NodeShared::default());
        let known = Arc::clone(&shared);
        let (started, outcome) = mpsc::channel();
        let keeper = std::thread::Builder::new()
            .name(format!("node{}", id.0))
            .spawn(move || keep(id, command, inherit, &known, &audience, &started))
            .map_err(failed())?;
        let (pid, pidfd) = outcome
            .recv()
            .map_err(|_| std::io::ErrorKind::Other.into())
            .flatten()
            .map_err(failed())?;
        Ok(Self {
            id,
            pid,
            pidfd,
            shared,
            keeper: Some(keeper),
        })
    }

    pub(crate) fn id(&self) -> NodeId {
        self.id
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    pub(crate) fn shared(&self) -> &Arc<NodeShared> {
        &self.shared
    }

    /// How long it has waited for a processor of this host, which is no fault
    /// of its own. Zero where the kernel doesn't tell.
    pub(crate) fn starved(&self) -> Duration {
        let tasks = format!("/proc/{}/task", self.pid());
        let waited = |task: std::io::Result<std::fs::DirEntry>| {
            // "Time on the CPU, time waiting for one, time slices", in ns.
            let text = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
            text.split_whitespace().nth(1)?.parse().ok()
        };
        let tasks = std::fs::read_dir(tasks).into_iter().flatten();
        Duration::from_nanos(tasks.filter_map(waited).max().unwrap_or(0))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Fails only if the process is gone, which is what is wanted.
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        if let Some(keeper) = self.keeper.take() {
            drop(keeper.join());
        }
    }
}

/// The life of a node's keeper: this thread starts QEMU and must live as long
/// as it, since the kernel kills a child with the *thread* that made it.
fn keep(
    id: NodeId,
    mut command: Command,
    inherit: Vec<OwnedFd>,
    shared: &Arc<NodeShared>,
    audience: &Audience,
    started: &mpsc::Sender<std::io::Result<(Pid, OwnedFd)>>,
) {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = match spawn(command, inherit) {
        Ok(child) => child,
        Err(error) => return drop(started.send(Err(error))),
    };
    let pid = Pid::from_child(&child);
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(Into::into);
    let usable = pidfd.is_ok();
    if let Some(pidfd) = pidfd
        .as_ref()
        .ok()
        .and_then(|fd: &OwnedFd| fd.try_clone().ok())
    {
        audience.fleet.started(id, pidfd);
    }
    let sink = audience.sink.as_ref();
    drop(started.send(pidfd.map(|pidfd| (pid, pidfd))));
    if !usable {
        drop(child.kill());
    }
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    std::thread::scope(|scope| {
        if let Some(stderr) = stderr {
            scope.spawn(move || pump(id, stderr, "qemu: ", shared, sink));
        }
        if let Some(stdout) = stdout {
            pump(id, stdout, "", shared, sink);
        }
    });
    let end = match child.wait() {
        Ok(status) => NodeEnd::from_status(status),
        Err(_) => NodeEnd::Killed(0),
    };
    // The fleet first: who sees that a node has ended finds out who was first.
    audience.fleet.ended(id, end);
    shared.set_ended(end);
    audience.bell.ring();
    audience.fleet.follow(id, end);
}

/// Copies lines to the log until the writer is gone.
fn pump(id: NodeId, from: impl Read, prefix: &str, shared: &NodeShared, sink: Option<&Sink>) {
    let mut from = BufReader::new(from);
    loop {
        let mut line = Vec::new();
        match from
            .by_ref()
            .take(LOG_LINE_BYTES)
            .read_until(b'\n', &mut line)
        {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line);
        let text = format!("{prefix}{}", text.trim_end_matches(['\n', '\r']));
        if let Some(sink) = sink {
            sink(id, &text);
        }
        let mut log = lock(&shared.log);
        if log.len() == LOG_LINES {
            log.pop_front();
        }
        log.push_back(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(script: &str) -> (NodeEnd, Arc<NodeShared>) {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let audience = Audience::default();
        let bell = Arc::clone(&audience.bell);
        let node = Node::start(NodeId(2), command, Vec::new(), audience).expect("starts");
        let end = loop {
            let rings = bell.rings();
            if let Some(end) = node.shared().ended() {
                break end;
            }
            bell.wait(rings, Duration::from_secs(1));
        };
        (end, Arc::clone(node.shared()))
    }

    #[test]
    fn exit_statuses_are_read_by_the_convention() {
        assert_eq!(run("exit 33").0, NodeEnd::Orderly);
        assert_eq!(run("exit 35").0, NodeEnd::BootFailure);
        assert_eq!(run("exit 37").0, NodeEnd::Panic);
        assert_eq!(run("exit 39").0, NodeEnd::Fenced);
        assert_eq!(run("exit 0").0, NodeEnd::Exited(0));
        assert_eq!(run("exit 1").0, NodeEnd::Exited(1));
        assert_eq!(run("kill -9 $$").0, NodeEnd::Killed(9));
    }

    #[test]
    fn the_log_holds_both_outputs_and_the_last_words() {
        let (_, shared) = run("echo one; echo two >&2; sleep 0.2; echo; echo ' three '; echo");
        assert_eq!(shared.last_words(), "three");
        let log = shared.log();
        assert!(log.contains(&"one".to_owned()));
        assert!(log.contains(&"qemu: two".to_owned()));
    }

    #[test]
    fn a_node_that_never_ends_its_line_is_cut() {
        let (_, shared) = run("head -c 100000 /dev/zero");
        assert!(shared.log().iter().all(|line| line.len() <= 4096));
    }

    #[test]
    fn a_dropped_node_is_gone() {
        let mut command = Command::new("sleep");
        command.arg("1000");
        let node =
            Node::start(NodeId(0), command, Vec::new(), Audience::default()).expect("starts");
        let shared = Arc::clone(node.shared());
        drop(node);
        assert_eq!(shared.ended(), Some(NodeEnd::Killed(9)));
    }

    #[test]
    fn when_a_node_ends_the_others_end_and_the_first_is_to_blame() {
        let audience = Audience::default();
        let start = |id, script| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            Node::start(NodeId(id), command, Vec::new(), audience.clone()).expect("starts")
        };
        let other = start(0, "exec sleep 1000");
        let first = start(1, "sleep 0.1; exit 35");
        while other.shared().ended().is_none() {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(other.shared().ended(), Some(NodeEnd::Killed(9)));
        let blamed = Some((NodeId(1), NodeEnd::BootFailure));
        assert_eq!(audience.fleet.first_end(), blamed);
        // Too late: a node that is started now ends at once.
        let late = start(2, "exec sleep 1000");
        while late.shared().ended().is_none() {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(audience.fleet.first_end(), blamed);
        drop(first);
    }

    #[test]
    fn nodes_of_a_vm_that_has_ended_may_end_by_themselves() {
        let audience = Audience::default();
        let start = |id, script| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            Node::start(NodeId(id), command, Vec::new(), audience.clone()).expect("starts")
        };
        let other = start(0, "sleep 0.4; exit 33");
        let _first = start(1, "sleep 0.1; exit 33");
        while other.shared().ended().is_none() {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(other.shared().ended(), Some(NodeEnd::Orderly));
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        let command = Command::new("/nonexistent/qemu");
        assert!(Node::start(NodeId(0), command, Vec::new(), Audience::default()).is_err());
    }
}
