//! How processes and threads begin and end.

use alloc::vec;
use alloc::vec::Vec;

use linux_raw_sys::general::{
    CLONE_CHILD_CLEARTID, CLONE_CHILD_SETTID, CLONE_PARENT_SETTID, CLONE_SETTLS, CLONE_THREAD,
    CLONE_VFORK, CLONE_VM, O_CLOEXEC, O_RDWR, RLIMIT_NPROC, SIGCHLD, SIGCONT, SIGHUP,
};

use super::files::{Descriptor, Descriptors, Device, Object, OpenFile};
use super::signal::{Actions, Effect, Info, Pending, SIG_IGNORE};
use super::{
    Ending, Owner, Pid, Process, Program, SignalStack, State, Thread, Times, default_limits,
};
use crate::errno::{Errno, Result, Stop};
use crate::fs::Place;
use crate::futex::{ANY, Scope};
use crate::kernel::Kernel;
use crate::machine::{Fpu, Registers};
use crate::mem::frames::For;
use crate::mem::space::Space;
use crate::sched::CpuSet;
use crate::timers::ProcessTimers;
use crate::wait::{Key, Tid};

/// Process 1, which adopts orphans.
pub(crate) const INIT: Pid = 1;
const SA_NOCLDWAIT: u64 = 2;
/// CLONE_CLEAR_SIGHAND, which only clone3 can pass.
const CLEAR_HANDLERS: u64 = 1 << 32;

/// What a new thread or process is to be.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct CloneRequest {
    pub(crate) flags: u64,
    pub(crate) exit_signal: u8,
    /// Top of its stack; 0 for the caller's.
    pub(crate) stack: u64,
    pub(crate) parent_tid: u64,
    pub(crate) child_tid: u64,
    pub(crate) tls: u64,
}

impl Kernel {
    /// Makes process 1 from the program that came with the kernel.
    pub(crate) fn start_init(&mut self, program: &[u8]) -> Result<()> {
        let now = self.now();
        let memory = self.objects.frames.total() as u64 * 4096;
        let space = Space::new(&self.objects.frames, self.model, For::Machine)?;
        let space = self.spaces.insert(space);
        let pid = self.new_pid();
        let path = self.install_init(program)?;
        self.objects.hold(self.root);
        self.objects.hold(self.root);
        let process = Process {
            parent: 0,
            group: pid,
            session: pid,
            threads: vec![pid],
            state: State::Running,
            news: false,
            continued: false,
            exit_signal: 0,
            space: Some(space),
            files: Descriptors::default(),
            root: self.root,
            directory: Place::Node(self.root),
            umask: 0o022,
            actions: Actions::default(),
            pending: Pending::default(),
            owner: Owner::default(),
            limits: default_limits(memory),
            program: Program::default(),
            terminal: None,
            started: now,
            times: Times::default(),
            children: Times::default(),
            timers: ProcessTimers::default(),
            borrowed: false,
            executed: false,
            nice: 0,
        };
        self.processes.insert(pid, process);
        let thread = Thread {
            pid,
            registers: Registers::default(),
            fpu: Fpu::new(self.machine.fpu_len()),
            fs_base: 0,
            gs_base: 0,
            waits: false,
            keys: Vec::new(),
            allowed: CpuSet::ALL,
            cpu: self.machine.cpu(),
            yields: false,
            call: None,
            mask: 0,
            saved_mask: None,
            pending: Pending::default(),
            stack: SignalStack::default(),
            clear_tid: 0,
            robust_list: 0,
            rseq: None,
            name: [0; 16],
            vfork_child: None,
            times: Times::default(),
            opening: None,
        };
        self.threads.insert(pid, thread);
        let console = OpenFile::new(Object::Device(Device::Console), None, O_RDWR);
        let console = self.files.insert(console);
        for number in 0..3 {
            self.hold_file(console);
            let descriptor = Descriptor {
                file: console,
                close_on_exec: false,
            };
            self.process_of(pid).files.put(number, descriptor);
        }
        let environment = vec![b"HOME=/".to_vec(), b"TERM=linux".to_vec()];
        match self.exec(pid, &path, vec![path.clone()], environment) {
            Err(Stop::Failed(errno)) => return Err(errno),
            // A new program leaves no result.
            Ok(_) | Err(Stop::Block | Stop::Done) => {}
        }
        self.make_ready(pid);
        Ok(())
    }

    /// Makes a thread or a process; returns its number for the caller.
    pub(crate) fn clone_thread(&mut self, tid: Tid, request: CloneRequest) -> Result<Tid> {
        let has = |flag: u32| request.flags & u64::from(flag) != 0;
        if has(CLONE_THREAD) && !has(CLONE_VM) {
            return Err(Errno::EINVAL);
        }
        self.check_memory()?;
        let parent_pid = self.pid_of(tid);
        let limit = self.process_of(tid).limits[RLIMIT_NPROC as usize].0;
        if self.threads.len() as u64 >= limit {
            return Err(Errno::EAGAIN);
        }
        let new = self.new_pid();
        let parent = self.thread(tid);
        let mut registers = parent.registers;
        registers.rax = 0;
        if request.stack != 0 {
            registers.rsp = request.stack;
        }
        let mut thread = Thread {
            pid: if has(CLONE_THREAD) { parent_pid } else { new },
            registers,
            fpu: parent.fpu.clone(),
            fs_base: parent.fs_base,
            gs_base: parent.gs_base,
            waits: false,
            keys: Vec::new(),
            allowed: parent.allowed,
            cpu: parent.cpu,
            yields: false,
            call: None,
            mask: parent.mask,
            saved_mask: None,
            pending: Pending::default(),
            stack: SignalStack::default(),
            clear_tid: 0,
            robust_list: 0,
            rseq: parent.rseq.filter(|_| !has(CLONE_VM)),
            name: parent.name,
            vfork_child: None,
            times: Times::default(),
            opening: None,
        };
        if !has(CLONE_VM) || has(CLONE_VFORK) {
            thread.stack = parent.stack;
        }
        // The processor may hold newer registers than were copied.
        self.machine.save_fpu(tid, &mut thread.fpu);
        if has(CLONE_SETTLS) {
            thread.fs_base = request.tls;
        }
        if has(CLONE_CHILD_CLEARTID) {
            thread.clear_tid = request.child_tid;
        }
        if has(CLONE_THREAD) {
            self.process_of(tid).threads.push(new);
        } else {
            self.fork_process(tid, new, &request)?;
        }
        self.threads.insert(new, thread);
        if has(CLONE_PARENT_SETTID) {
            // A bad address is the caller's own loss.
            let _ = self.put(tid, request.parent_tid, &new);
        }
        if has(CLONE_CHILD_SETTID) {
            let _ = self.put(new, request.child_tid, &new);
        }
        self.forks += 1;
        self.make_ready(new);
        if has(CLONE_VFORK) && !has(CLONE_THREAD) {
            self.thread(tid).vfork_child = Some(new);
        }
        Ok(new)
    }

    /// The process of a new first thread.
    fn fork_process(&mut self, tid: Tid, pid: Pid, request: &CloneRequest) -> Result<()> {
        let has = |flag: u32| request.flags & u64::from(flag) != 0;
        let now = self.now();
        let model = self.model;
        let parent_pid = self.pid_of(tid);
        let space = self.process_of(tid).space.ok_or(Errno::ESRCH)?;
        let space = if has(CLONE_VM) {
            if let Some(space) = self.spaces.get_mut(space) {
                space.uses += 1;
            }
            space
        } else {
            let (objects, parent) = self.memory_of(tid).ok_or(Errno::ESRCH)?;
            let child = parent.fork(objects, model)?;
            self.spaces.insert(child)
        };
        let parent = self.process_of(tid);
        let mut actions = parent.actions.clone();
        if request.flags & CLEAR_HANDLERS != 0 {
            actions.exec();
        }
        let child = Process {
            parent: parent_pid,
            group: parent.group,
            session: parent.session,
            threads: vec![pid],
            state: State::Running,
            news: false,
            continued: false,
            exit_signal: request.exit_signal,
            space: Some(space),
            files: parent.files.clone(),
            root: parent.root,
            directory: parent.directory,
            umask: parent.umask,
            actions,
            pending: Pending::default(),
            owner: parent.owner.clone(),
            limits: parent.limits,
            program: parent.program.clone(),
            terminal: parent.terminal,
            started: now,
            times: Times::default(),
            children: Times::default(),
            timers: ProcessTimers::default(),
            borrowed: has(CLONE_VFORK),
            executed: false,
            nice: parent.nice,
        };
        let (root, directory) = (child.root, child.directory);
        let files: Vec<_> = child.files.iter().map(|(_, slot)| slot.file).collect();
        for file in files {
            self.hold_file(file);
        }
        self.objects.hold(root);
        self.hold_place(directory);
        self.processes.insert(pid, child);
        Ok(())
    }

    pub(crate) fn hold_place(&mut self, place: Place) {
        if let Place::Node(id) = place {
            self.objects.hold(id);
        }
    }

    pub(crate) fn release_place(&mut self, place: Place) {
        if let Place::Node(id) = place {
            self.objects.release(id);
        }
    }

    /// One user of an address space less.
    pub(crate) fn release_space(&mut self, id: u32) {
        let Some(space) = self.spaces.get_mut(id) else {
            return;
        };
        space.uses -= 1;
        if space.uses == 0
            && let Some(space) = self.spaces.remove(id)
        {
            let roots: Vec<_> = space.pages().roots().collect();
            self.machine.leave_tables(&roots);
            space.free(&mut self.objects);
        }
    }

    /// Tells a parent that waits since vfork that its memory is its own again.
    pub(crate) fn give_memory_back(&mut self, pid: Pid) {
        if let Some(process) = self.processes.get_mut(&pid)
            && core::mem::take(&mut process.borrowed)
        {
            self.wake(Key::Vfork(pid));
        }
    }

    /// Ends one thread; the last ends its process.
    pub(crate) fn end_thread(&mut self, tid: Tid, ending: Ending) {
        let pid = self.pid_of(tid);
        self.end_robust_list(tid);
        let clear = core::mem::take(&mut self.thread(tid).clear_tid);
        let shared = self
            .process_of(tid)
            .space
            .and_then(|space| self.spaces.get(space))
            .is_some_and(|space| space.uses > 1);
        let others = self.process_of(tid).threads.len() > 1;
        // Nobody is left to see it otherwise.
        if clear != 0 && (others || shared) && self.put(tid, clear, &0_u32).is_ok() {
            for scope in [Scope::Private, Scope::Shared] {
                let _ = self.futex_wake(tid, clear, scope, 1, ANY);
            }
        }
        self.drop_thread(tid);
        let process = self.processes.get_mut(&pid);
        if process.is_some_and(|process| process.threads.is_empty()) {
            self.end_process(pid, ending);
        }
    }

    fn drop_thread(&mut self, tid: Tid) {
        self.futex_forget(tid);
        self.give_up_opening(tid);
        let Some(thread) = self.threads.remove(&tid) else {
            return;
        };
        let deadline = thread.call.and_then(|call| call.deadline);
        self.queues.remove(tid, &thread.keys, deadline);
        self.scheduler.forget(tid);
        self.machine.forget_fpu(tid);
        if let Some(process) = self.processes.get_mut(&thread.pid) {
            process.threads.retain(|other| *other != tid);
        }
    }

    /// Ends a process with all its threads.
    pub(crate) fn end_all(&mut self, pid: Pid, ending: Ending) {
        let threads = match self.processes.get(&pid) {
            Some(process) => process.threads.clone(),
            None => return,
        };
        for tid in threads {
            self.end_robust_list(tid);
            self.drop_thread(tid);
        }
        self.end_process(pid, ending);
    }

    /// What happens to all but the number and the ending of a process.
    fn end_process(&mut self, pid: Pid, ending: Ending) {
        let Some(process) = self.processes.get_mut(&pid) else {
            return;
        };
        if matches!(process.state, State::Ended(_)) {
            return;
        }
        process.state = State::Ended(ending);
        process.news = true;
        let files = core::mem::take(&mut process.files);
        let space = process.space.take();
        let (root, directory) = (process.root, process.directory);
        let (parent, exit_signal) = (process.parent, process.exit_signal);
        let leads = process.session == pid;
        let terminal = process.terminal;
        self.drop_timers(pid, true);
        for (_, descriptor) in files.iter() {
            self.drop_descriptor(pid, descriptor);
        }
        if let Some(space) = space {
            self.release_space(space);
        }
        self.release_place(directory);
        self.objects.release(root);
        self.give_memory_back(pid);
        self.wake(Key::End(pid));
        if leads && let Some(terminal) = terminal {
            self.leave_terminal(terminal, pid);
        }
        self.adopt_children(pid);
        if pid == INIT {
            self.say("process 1 has ended\n");
            self.powered_off = true;
            return;
        }
        self.tell_parent(pid, parent, exit_signal, ending);
    }

    fn adopt_children(&mut self, pid: Pid) {
        let mut ended = false;
        for child in self.processes.values_mut() {
            if child.parent == pid {
                child.parent = INIT;
                child.exit_signal = u8::try_from(SIGCHLD).expect("a small number");
                ended |= matches!(child.state, State::Ended(_));
            }
        }
        if ended {
            self.send_to_process(INIT, Info::from_kernel(child_signal()));
            self.wake(Key::Children(INIT));
        }
    }

    fn tell_parent(&mut self, pid: Pid, parent: Pid, signal: u8, ending: Ending) {
        let Some(process) = self.processes.get_mut(&parent) else {
            self.reap(pid);
            return;
        };
        let action = process
            .actions
            .get_mut(child_signal())
            .copied()
            .unwrap_or_default();
        let ignores = action.handler == SIG_IGNORE || action.flags & SA_NOCLDWAIT != 0;
        if ignores && u32::from(signal) == SIGCHLD {
            self.reap(pid);
        }
        if signal != 0 {
            let (code, status) = match ending {
                Ending::Exit(code) => (1, code),
                Ending::Signal(number) => (2, number),
            };
            let uid = 0;
            let mut info = Info::from_process(signal, code, pid, uid);
            info.words[1] = status.into();
            self.send_to_process(parent, info);
        }
        self.wake(Key::Children(parent));
    }

    /// Forgets a process that has ended.
    pub(crate) fn reap(&mut self, pid: Pid) {
        let Some(process) = self.processes.remove(&pid) else {
            return;
        };
        if let Some(parent) = self.processes.get_mut(&process.parent) {
            let all = &mut parent.children;
            all.user += process.times.user + process.children.user;
            all.system += process.times.system + process.children.system;
        }
    }

    /// The head of a session has ended: its terminal is nobody's.
    pub(crate) fn leave_terminal(&mut self, id: u32, session: Pid) {
        let Some(terminal) = self.terminals.get_mut(id) else {
            return;
        };
        if terminal.session != Some(session) {
            return;
        }
        terminal.session = None;
        let group = core::mem::take(&mut terminal.foreground);
        for process in self.processes.values_mut() {
            if process.terminal == Some(id) {
                process.terminal = None;
            }
        }
        for signal in [SIGHUP, SIGCONT] {
            let signal = u8::try_from(signal).expect("a small number");
            self.send_to_group(group, Info::from_kernel(signal));
        }
    }

    /// Whether a process does nothing about a signal.
    pub(crate) fn ignores(&self, pid: Pid, signal: u8) -> bool {
        let process = self.processes.get(&pid);
        process.is_none_or(|process| process.actions.effect(signal) == Effect::Ignore)
    }
}

fn child_signal() -> u8 {
    u8::try_from(SIGCHLD).expect("a small number")
}

/// `O_CLOEXEC`, as calls take it.
pub(crate) fn closes_on_exec(flags: u32) -> bool {
    flags & O_CLOEXEC != 0
}
