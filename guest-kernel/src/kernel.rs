//! The kernel's state, and how threads wait and wake.
//!
//! One lock guards all of it: a processor holds it whenever it is in the
//! kernel (see [`crate::arch`]).

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use vmm_shared::ring::ByteRing;

use crate::calls::system::Names;
use crate::errno::{Errno, Result, Stop};
use crate::fs::locks::{Lock, Locks};
use crate::fs::node::{Maker, NodeId, Objects};
use crate::fs::walk::Viewer;
use crate::futex::Futexes;
use crate::machine::{Machine, ns_per_tick};
use crate::mem::frames::{Frame, Frames};
use crate::mem::losses::Sources;
use crate::mem::places::Places;
use crate::mem::space::Space;
use crate::process::files::OpenFile;
use crate::process::{Pid, Process, Thread};
use crate::sched::Scheduler;
use crate::streams::counter::Counter;
use crate::streams::epoll::Epoll;
use crate::streams::pipe::Pipe;
use crate::streams::socket::Sockets;
use crate::streams::terminal::Terminal;
use crate::table::Table;
use crate::timers::{Running, TimerFile};
use crate::vdso::{Vdso, nanoseconds};
use crate::wait::{Key, Queues, Tid};

/// Frames and heap kept for the kernel's own needs: who would take from them
/// is refused.
pub(crate) const RESERVED_FRAMES: usize = 1024;
const RESERVED_HEAP: usize = 2 << 20;

/// What the kernel starts from.
#[derive(Debug)]
pub struct Start {
    /// Guest physical addresses of RAM that are free, and the nodes that give
    /// them.
    pub usable: Vec<(core::ops::Range<u64>, u32)>,
    /// The node of each processor.
    pub cpu_nodes: Vec<u32>,
    /// RAM from guest physical address 0 on.
    pub ram: vmm_shared::shm::SharedMem,
    /// The root image, and its guest physical address.
    pub image: Option<vmm_shared::shm::SharedMem>,
    /// See `image`.
    pub image_base: u64,
    /// A page table root with the kernel in its upper half.
    pub model: u64,
    /// Wall-clock time when ticks were 0, in ns.
    pub boot_wall_ns: u64,
    /// The command line.
    pub command_line: Vec<u8>,
    /// The first program.
    pub init: Vec<u8>,
    /// How the machine tells of nodes that are lost; none if none can be.
    pub losses: Option<Sources>,
    /// To the operator's console.
    pub console: ByteRing,
    /// To the launcher and from it.
    pub to_launcher: ByteRing,
    /// See `to_launcher`.
    pub from_launcher: ByteRing,
}

/// The kernel.
pub struct Kernel {
    pub(crate) machine: Box<dyn Machine>,
    pub(crate) objects: Objects,
    pub(crate) model: Frame,
    pub(crate) root: NodeId,
    /// Nanoseconds of a tick, times 2^32: each call asks for the time, and a
    /// division of this width would be most of it.
    ns_per_tick: u64,
    pub(crate) boot_wall_ns: u64,
    pub(crate) vdso: Vdso,
    pub(crate) names: Names,
    pub(crate) command_line: Vec<u8>,
    pub(crate) console: ByteRing,
    pub(crate) to_launcher: ByteRing,
    pub(crate) from_launcher: ByteRing,
    pub(crate) processes: BTreeMap<Pid, Process>,
    pub(crate) threads: BTreeMap<Tid, Thread>,
    pub(crate) spaces: Table<Space>,
    pub(crate) files: Table<OpenFile>,
    pub(crate) pipes: Table<Pipe>,
    pub(crate) terminals: Table<Terminal>,
    pub(crate) events: Table<Counter>,
    pub(crate) timer_files: Table<TimerFile>,
    pub(crate) epolls: Table<Epoll>,
    pub(crate) sockets: Sockets,
    pub(crate) running_timers: Running,
    pub(crate) queues: Queues,
    pub(crate) futexes: Futexes,
    /// By `fcntl`, and by `flock`: they don't see each other.
    pub(crate) record_locks: Locks,
    pub(crate) whole_locks: Locks,
    /// Which record locks threads wait for, or have until a while ago.
    pub(crate) lock_waits: BTreeMap<Tid, (NodeId, Lock)>,
    pub(crate) scheduler: Scheduler,
    /// A thread was woken, or sent a signal, since this was last cleared.
    pub(crate) disturbed: bool,
    next_pid: Pid,
    pub(crate) powered_off: bool,
    pub(crate) forks: u64,
    /// Calls that this kernel does not know, by number.
    pub(crate) unknown_calls: BTreeMap<u32, u64>,
}

impl core::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Kernel")
            .field("processes", &self.processes.len())
            .finish_non_exhaustive()
    }
}

impl Kernel {
    /// A kernel with its first process ready to run.
    ///
    /// # Errors
    /// Why there is no first process, in words for the operator.
    pub fn new(start: Start, machine: Box<dyn Machine>) -> Result<Self, String> {
        let places = Places::new(&start.cpu_nodes, machine.clock(), start.losses);
        let frames = Frames::new(
            start.ram,
            &start.usable,
            start.image,
            start.image_base,
            places,
        );
        let mut objects = Objects::new(frames);
        let now = start.boot_wall_ns;
        let root = crate::fs::setup::root(&mut objects, &start.cpu_nodes, now)
            .ok_or("the root image is missing, or no ext4 file system that can be read")?;
        let ns_per_tick = ns_per_tick(machine.ticks_khz());
        let vdso = Vdso::new(&mut objects, ns_per_tick, now)
            .map_err(|why| format!("there is no room for the vDSO: {why:?}"))?;
        let mut kernel = Self {
            ns_per_tick,
            vdso,
            machine,
            objects,
            model: Frame(start.model),
            root,
            boot_wall_ns: start.boot_wall_ns,
            names: Names::default(),
            command_line: start.command_line,
            console: start.console,
            to_launcher: start.to_launcher,
            from_launcher: start.from_launcher,
            processes: BTreeMap::new(),
            threads: BTreeMap::new(),
            spaces: Table::default(),
            files: Table::default(),
            pipes: Table::default(),
            terminals: Table::default(),
            events: Table::default(),
            timer_files: Table::default(),
            epolls: Table::default(),
            sockets: Sockets::default(),
            running_timers: Running::default(),
            queues: Queues::default(),
            futexes: Futexes::default(),
            record_locks: Locks::default(),
            whole_locks: Locks::default(),
            lock_waits: BTreeMap::new(),
            scheduler: Scheduler::new(&start.cpu_nodes),
            disturbed: false,
            next_pid: 1,
            powered_off: false,
            forks: 0,
            unknown_calls: BTreeMap::new(),
        };
        kernel
            .start_init(&start.init)
            .map_err(|why| format!("the first program cannot be started: {why:?}"))?;
        Ok(kernel)
    }

    /// Nanoseconds since the VM was made.
    #[must_use]
    pub fn now(&self) -> u64 {
        nanoseconds(self.machine.ticks(), self.ns_per_tick)
    }

    /// Nanoseconds since 1970.
    pub(crate) fn wall(&self) -> u64 {
        self.boot_wall_ns.saturating_add(self.now())
    }

    /// A number for a new process or thread.
    pub(crate) fn new_pid(&mut self) -> Pid {
        const MOST: Pid = 1 << 22;
        loop {
            let pid = self.next_pid;
            self.next_pid = if pid >= MOST { 300 } else { pid + 1 };
            let taken = |process: &Process| process.group == pid || process.session == pid;
            // A processor may still be on its way back from one that ended.
            let in_use = self.threads.contains_key(&pid)
                || self.scheduler.runs(pid)
                || self.processes.contains_key(&pid)
                || self.processes.values().any(taken);
            if !in_use {
                return pid;
            }
        }
    }

    /// A thread that exists.
    pub(crate) fn thread(&mut self, tid: Tid) -> &mut Thread {
        self.threads.get_mut(&tid).expect("the caller has seen it")
    }

    /// The process of a thread that exists.
    pub(crate) fn process_of(&mut self, tid: Tid) -> &mut Process {
        let pid = self.thread(tid).pid;
        self.processes
            .get_mut(&pid)
            .expect("threads have processes")
    }

    /// The process number of a thread that exists.
    pub(crate) fn pid_of(&mut self, tid: Tid) -> Pid {
        self.thread(tid).pid
    }

    /// Who a thread looks names up as.
    pub(crate) fn viewer(&mut self, tid: Tid) -> Viewer {
        let process = self.process_of(tid);
        Viewer {
            root: process.root,
            directory: process.directory,
            uid: process.owner.user.effective,
            gid: process.owner.group.effective,
        }
    }

    /// Who makes things for a thread.
    pub(crate) fn maker(&mut self, tid: Tid) -> Maker {
        let now = self.wall();
        let owner = &self.process_of(tid).owner;
        Maker {
            uid: owner.user.effective,
            gid: owner.group.effective,
            now,
        }
    }

    /// Whether there is memory for something new.
    pub(crate) fn check_memory(&self) -> Result<()> {
        let enough = self.objects.frames.available() > RESERVED_FRAMES
            && self.machine.heap_free() > RESERVED_HEAP;
        if enough { Ok(()) } else { Err(Errno::ENOMEM) }
    }

    /// Lets a thread run, unless a processor is about to go on with it.
    pub(crate) fn make_ready(&mut self, tid: Tid) {
        self.disturbed = true;
        if self.scheduler.runs(tid) {
            return;
        }
        let here = self.machine.cpu();
        let (allowed, last) = (self.may_run(tid), self.thread(tid).cpu);
        self.scheduler.make_ready(tid, allowed, last, here);
    }

    /// Makes a thread wait. Its call is made again when it is woken.
    pub(crate) fn block(&mut self, tid: Tid, keys: &[Key], deadline: Option<u64>) -> Stop {
        let thread = self.thread(tid);
        thread.waits = true;
        thread.keys = keys.to_vec();
        if let Some(call) = &mut thread.call {
            call.deadline = deadline;
        }
        self.queues.add(tid, keys, deadline);
        Stop::Block
    }

    /// Lets a waiting thread go on.
    pub(crate) fn wake_thread(&mut self, tid: Tid) {
        if self.stop_waiting(tid) {
            self.make_ready(tid);
        }
    }

    /// Takes a thread off what it waits for; whether it waited.
    pub(crate) fn stop_waiting(&mut self, tid: Tid) -> bool {
        let Some(thread) = self.threads.get_mut(&tid) else {
            return false;
        };
        if !core::mem::take(&mut thread.waits) {
            return false;
        }
        let keys = core::mem::take(&mut thread.keys);
        let deadline = thread.call.and_then(|call| call.deadline);
        self.queues.remove(tid, &keys, deadline);
        true
    }

    /// Lets all that wait for `key` look again.
    pub(crate) fn wake(&mut self, key: Key) {
        self.queues.note_change(key);
        for tid in self.queues.waiting(key) {
            self.wake_thread(tid);
        }
    }

    /// The launcher has rung.
    pub fn doorbell(&mut self) {
        self.wake(Key::Launcher);
    }

    /// The memory of a thread's process.
    pub(crate) fn memory_of(&mut self, tid: Tid) -> Option<(&mut Objects, &mut Space)> {
        let pid = self.threads.get(&tid)?.pid;
        let process = self.processes.get(&pid)?;
        let space = self.spaces.get_mut(process.space?)?;
        space.alone = process.threads.len() == 1 && space.uses == 1;
        Some((&mut self.objects, space))
    }

    /// Prints on the operator's console, which loses what it has no room for.
    pub fn say(&mut self, text: &str) {
        self.print(text.as_bytes());
    }

    /// See [`Kernel::say`].
    pub(crate) fn print(&mut self, bytes: &[u8]) {
        self.console.write(bytes);
        if self.console.must_wake_consumer() {
            self.machine.ring_launcher();
        }
    }
}
