//! The kernel's state, and what happens when a thread exits to it.
//!
//! ```text
//!   exit of a thread ──> system call · fault · interrupt ──┐
//!     ▲                                                    ▼
//!   run it <── deliver signals <── go on with its call <── pick a thread
//! ```

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use linux_raw_sys::general::{SIGBUS, SIGFPE, SIGILL, SIGKILL, SIGSEGV, SIGTRAP};
use vmm_shared::ring::ByteRing;

use crate::calls;
use crate::errno::{Errno, Result, Stop};
use crate::fs::node::{Maker, NodeId, Objects};
use crate::fs::walk::Viewer;
use crate::futex::Futexes;
use crate::machine::{CALL_VECTOR, Fpu, Machine, Registers, ns_per_tick};
use crate::mem::frames::{Frame, Frames};
pub use crate::mem::space::Flush;
use crate::mem::space::{Access, Fault, Space};
use crate::process::files::OpenFile;
use crate::process::signal::Info;
use crate::process::{Call, Pid, Process, Thread};
use crate::streams::pipe::Pipe;
use crate::streams::terminal::Terminal;
use crate::table::Table;
use crate::wait::{Key, Queues, Tid};

/// How long a thread runs while others are ready, in ns.
const SLICE_NS: u64 = 10_000_000;
/// Frames and heap kept for the kernel's own needs: who would take from them
/// is refused.
const RESERVED_FRAMES: usize = 1024;
const RESERVED_HEAP: usize = 2 << 20;
/// Vectors of exceptions.
mod vector {
    pub(super) const DIVIDE: u64 = 0;
    pub(super) const DEBUG: u64 = 1;
    pub(super) const BREAKPOINT: u64 = 3;
    pub(super) const INVALID: u64 = 6;
    pub(super) const PAGE_FAULT: u64 = 14;
    pub(super) const FLOATING: u64 = 16;
    pub(super) const ALIGNMENT: u64 = 17;
    pub(super) const SIMD: u64 = 19;
    pub(super) const INTERRUPTS: u64 = 32;
}
/// Bits of a page fault's error code.
const FAULT_WRITE: u64 = 1 << 1;
const FAULT_FETCH: u64 = 1 << 4;

/// What the kernel starts from.
#[derive(Debug)]
pub struct Start {
    /// Guest physical addresses of RAM that are free.
    pub usable: Vec<core::ops::Range<u64>>,
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
    /// To the operator's console.
    pub console: ByteRing,
    /// To the launcher and from it.
    pub to_launcher: ByteRing,
    /// See `to_launcher`.
    pub from_launcher: ByteRing,
}

/// What to do next.
#[derive(Debug)]
pub enum Next {
    /// Run this thread.
    Run(u32),
    /// Wait for an interrupt, at most until this time in ns.
    Idle(Option<u64>),
    /// Switch off.
    PowerOff,
}

/// A thread's state for the processor.
#[derive(Debug)]
#[expect(missing_docs, reason = "named for the registers they are for")]
pub struct Context<'a> {
    pub root: u64,
    pub flush: Flush,
    pub fs_base: u64,
    pub gs_base: u64,
    pub registers: &'a mut Registers,
    pub fpu: &'a mut Fpu,
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
    pub(crate) events: Table<u64>,
    pub(crate) queues: Queues,
    pub(crate) futexes: Futexes,
    ready: VecDeque<Tid>,
    /// The thread that runs, and when its slice ends.
    current: Option<Tid>,
    slice_end: u64,
    /// When the kernel was entered, or left: for processor times.
    since: u64,
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
        let frames = Frames::new(start.ram, &start.usable, start.image, start.image_base);
        let mut objects = Objects::new(frames);
        let now = start.boot_wall_ns;
        let root = crate::fs::setup::root(&mut objects, now)
            .ok_or("the root image is missing, or no ext4 file system that can be read")?;
        let ns_per_tick = ns_per_tick(machine.ticks_khz());
        let mut kernel = Self {
            ns_per_tick,
            machine,
            objects,
            model: Frame(start.model),
            root,
            boot_wall_ns: start.boot_wall_ns,
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
            queues: Queues::default(),
            futexes: Futexes::default(),
            ready: VecDeque::new(),
            current: None,
            slice_end: 0,
            since: 0,
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
        let ns = u128::from(self.machine.ticks()) * u128::from(self.ns_per_tick);
        u64::try_from(ns >> 32).unwrap_or(u64::MAX)
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
            let in_use = self.threads.contains_key(&pid)
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
            uid: process.owner.effective_uid,
            gid: process.owner.effective_gid,
        }
    }

    /// Who makes things for a thread.
    pub(crate) fn maker(&mut self, tid: Tid) -> Maker {
        let now = self.wall();
        let owner = &self.process_of(tid).owner;
        Maker {
            uid: owner.effective_uid,
            gid: owner.effective_gid,
            now,
        }
    }

    /// Whether there is memory for something new.
    pub(crate) fn check_memory(&self) -> Result<()> {
        let enough = self.objects.frames.available() > RESERVED_FRAMES
            && self.machine.heap_free() > RESERVED_HEAP;
        if enough { Ok(()) } else { Err(Errno::ENOMEM) }
    }

    /// Puts a thread on the run queue.
    pub(crate) fn make_ready(&mut self, tid: Tid) {
        self.ready.push_back(tid);
    }

    /// Lets others run before a thread goes on.
    pub(crate) fn end_slice(&mut self, tid: Tid) {
        if self.current == Some(tid) || !self.ready.contains(&tid) {
            self.slice_end = 0;
        }
    }

    /// Takes a thread off the run queue.
    pub(crate) fn forget_ready(&mut self, tid: Tid) {
        self.ready.retain(|other| *other != tid);
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
        let Some(thread) = self.threads.get_mut(&tid) else {
            return;
        };
        if !core::mem::take(&mut thread.waits) {
            return;
        }
        let keys = core::mem::take(&mut thread.keys);
        let deadline = thread.call.and_then(|call| call.deadline);
        self.queues.remove(tid, &keys, deadline);
        self.ready.push_back(tid);
    }

    /// Lets all that wait for `key` look again.
    pub(crate) fn wake(&mut self, key: Key) {
        for tid in self.queues.waiting(key) {
            self.wake_thread(tid);
        }
    }

    /// What to do next. Called whenever the processor is free.
    pub fn run_next(&mut self) -> Next {
        loop {
            if self.powered_off {
                return Next::PowerOff;
            }
            let now = self.now();
            self.run_timers(now);
            let go_on = self.current.take().filter(|tid| {
                let may = |thread: &Thread| !thread.waits;
                self.threads.get(tid).is_some_and(may)
            });
            let tid = match go_on {
                Some(tid) if now < self.slice_end || self.ready.is_empty() => tid,
                Some(tid) => {
                    self.ready.push_back(tid);
                    self.pick(now)
                }
                None if self.ready.is_empty() => {
                    return Next::Idle(self.next_event());
                }
                None => self.pick(now),
            };
            if !self.prepare(tid) {
                continue;
            }
            self.current = Some(tid);
            self.charge_system(tid);
            return Next::Run(tid);
        }
    }

    fn pick(&mut self, now: u64) -> Tid {
        self.slice_end = now + SLICE_NS;
        self.ready.pop_front().expect("checked not to be empty")
    }

    /// When a running thread must be interrupted, in ns.
    #[must_use]
    pub fn interrupt_at(&self) -> Option<u64> {
        let slice = (!self.ready.is_empty()).then_some(self.slice_end);
        [slice, self.next_event()].into_iter().flatten().min()
    }

    fn next_event(&self) -> Option<u64> {
        let alarms = self
            .processes
            .values()
            .filter_map(|process| process.alarm.at);
        alarms.chain(self.queues.next_deadline()).min()
    }

    fn run_timers(&mut self, now: u64) {
        while let Some(tid) = self.queues.due(now) {
            self.wake_thread(tid);
        }
        self.run_alarms(now);
    }

    /// Goes on with a thread's call and delivers its signals; whether it can
    /// run then.
    fn prepare(&mut self, tid: Tid) -> bool {
        if !self.threads.contains_key(&tid) {
            return false;
        }
        loop {
            if self.has_signal(tid) {
                if !self.deliver_signals(tid) {
                    return false;
                }
                continue;
            }
            let Some(call) = self.thread(tid).call else {
                break;
            };
            if !self.make_call(tid, call) {
                return false;
            }
        }
        true
    }

    /// Makes a system call; whether the thread can go on.
    fn make_call(&mut self, tid: Tid, call: Call) -> bool {
        let outcome = calls::make(self, tid, &call);
        let result = match outcome {
            Ok(value) => value,
            Err(Stop::Failed(errno)) => u64::from(errno.0).wrapping_neg(),
            Err(Stop::Block) => return false,
            Err(Stop::Done) => {
                let Some(thread) = self.threads.get_mut(&tid) else {
                    return false;
                };
                thread.call = None;
                return true;
            }
        };
        let thread = self.thread(tid);
        thread.call = None;
        thread.registers.rax = result;
        // A mask that only held for the call; a signal that it let in has
        // been delivered by now.
        if let Some(mask) = thread.saved_mask.take() {
            thread.mask = mask;
        }
        true
    }

    /// A thread's state for the processor.
    ///
    /// # Panics
    /// If it is not one that [`Kernel::run_next`] has said to run.
    pub fn context(&mut self, tid: u32) -> Context<'_> {
        if let Some(owner) = self.machine.fpu_owner()
            && owner != tid
            && let Some(other) = self.threads.get_mut(&owner)
        {
            self.machine.save_fpu(owner, &mut other.fpu);
        }
        let thread = self.threads.get_mut(&tid).expect("it is to run");
        let process = self.processes.get(&thread.pid).expect("it runs");
        let space = process.space.and_then(|space| self.spaces.get_mut(space));
        let space = space.expect("running processes have memory");
        Context {
            root: space.root().0,
            flush: core::mem::take(&mut space.flush),
            fs_base: thread.fs_base,
            gs_base: thread.gs_base,
            registers: &mut thread.registers,
            fpu: &mut thread.fpu,
        }
    }

    fn charge_system(&mut self, tid: Tid) {
        let now = self.now();
        let spent = now.saturating_sub(core::mem::replace(&mut self.since, now));
        self.process_of(tid).times.system += spent;
    }

    /// Time that the processor has slept is nobody's.
    pub fn slept(&mut self) {
        self.since = self.now();
    }

    /// The thread that was run has come back. `address` is that of a fault.
    pub fn exit(&mut self, tid: u32, address: u64) {
        let now = self.now();
        let spent = now.saturating_sub(core::mem::replace(&mut self.since, now));
        self.process_of(tid).times.user += spent;
        let registers = self.thread(tid).registers;
        match registers.vector {
            CALL_VECTOR => {
                // Numbers are 32 bits wide: the rest of the register is
                // ignored.
                let [a, b, c, d, ..] = registers.rax.to_le_bytes();
                let call = Call {
                    number: u32::from_le_bytes([a, b, c, d]),
                    arguments: [
                        registers.rdi,
                        registers.rsi,
                        registers.rdx,
                        registers.r10,
                        registers.r8,
                        registers.r9,
                    ],
                    deadline: None,
                    done: 0,
                    woken: false,
                };
                self.thread(tid).call = Some(call);
            }
            vector::PAGE_FAULT => self.page_fault(tid, address, registers.error),
            number if number >= vector::INTERRUPTS => {}
            number => self.exception(tid, number),
        }
    }

    /// The launcher has rung.
    pub fn doorbell(&mut self) {
        self.wake(Key::Launcher);
    }

    fn page_fault(&mut self, tid: Tid, address: u64, error: u64) {
        let access = if error & FAULT_FETCH != 0 {
            Access::Execute
        } else if error & FAULT_WRITE != 0 {
            Access::Write
        } else {
            Access::Read
        };
        if self.objects.frames.available() <= RESERVED_FRAMES / 2 {
            self.kill_for_memory(tid);
            return;
        }
        let Some((objects, space)) = self.memory_of(tid) else {
            return;
        };
        let (signal, code) = match space.fault(objects, address, access) {
            Ok(_) => return,
            Err(Fault::Unmapped) => (SIGSEGV, 1),
            Err(Fault::Denied) => (SIGSEGV, 2),
            Err(Fault::BeyondEnd) => (SIGBUS, 2),
            Err(Fault::NoMemory) => return self.kill_for_memory(tid),
        };
        self.fault_signal(tid, signal, code, address);
    }

    fn kill_for_memory(&mut self, tid: Tid) {
        let pid = self.pid_of(tid);
        self.say(&alloc::format!("out of memory: process {pid} killed\n"));
        self.fault_signal(tid, SIGKILL, 0x80, 0);
    }

    fn exception(&mut self, tid: Tid, number: u64) {
        let rip = self.thread(tid).registers.rip;
        let (signal, code, address) = match number {
            vector::DIVIDE => (SIGFPE, 1, rip),
            vector::FLOATING | vector::SIMD => (SIGFPE, 7, rip),
            vector::DEBUG => (SIGTRAP, 2, rip),
            vector::BREAKPOINT => (SIGTRAP, 0x80, 0),
            vector::INVALID => (SIGILL, 2, rip),
            vector::ALIGNMENT => (SIGBUS, 1, 0),
            _ => (SIGSEGV, 0x80, 0),
        };
        self.fault_signal(tid, signal, code, address);
    }

    /// A signal for what a thread has done itself: it can't be held off.
    fn fault_signal(&mut self, tid: Tid, signal: u32, code: i32, address: u64) {
        let signal = u8::try_from(signal).expect("a small number");
        let info = Info {
            signal,
            code,
            words: [address, 0, 0],
        };
        self.force_signal(tid, info);
    }

    /// The memory of a thread's process.
    pub(crate) fn memory_of(&mut self, tid: Tid) -> Option<(&mut Objects, &mut Space)> {
        let pid = self.threads.get(&tid)?.pid;
        let space = self.processes.get(&pid)?.space?;
        Some((&mut self.objects, self.spaces.get_mut(space)?))
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
