//! What happens when a thread exits to the kernel, until one runs again.
//!
//! ```text
//!   exit of a thread ──> system call · fault · interrupt ──┐
//!     ▲                                                    ▼
//!   run it <── deliver signals <── go on with its call <── pick a thread
//! ```

use alloc::sync::Arc;

use linux_raw_sys::general::{SIGBUS, SIGFPE, SIGILL, SIGKILL, SIGSEGV, SIGTRAP};

use crate::calls;
use crate::errno::Stop;
use crate::kernel::{Kernel, RESERVED_FRAMES};
use crate::machine::{CALL_VECTOR, Fpu, Registers};
use crate::mem::pages::Pages;
use crate::mem::regions::Access;
use crate::mem::space::{Fault, Flush};
use crate::process::signal::Info;
use crate::process::{Call, Pid};
use crate::sched::CpuSet;
use crate::wait::Tid;

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

fn fault_access(error: u64) -> Access {
    if error & FAULT_FETCH != 0 {
        Access::Execute
    } else if error & FAULT_WRITE != 0 {
        Access::Write
    } else {
        Access::Read
    }
}

/// Whether the exit of a program with these registers was a page fault that
/// is settled by its pages alone: then it just goes on. Needs no lock.
#[must_use]
pub fn settles(pages: &Pages, node: usize, registers: &Registers, address: u64) -> bool {
    registers.vector == vector::PAGE_FAULT
        && pages.serve(node, address, fault_access(registers.error))
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Run this thread.
    Run(u32),
    /// Wait for an interrupt.
    Idle,
    /// Switch off.
    PowerOff,
}

/// A thread's state for the processor.
#[derive(Debug)]
#[expect(missing_docs, reason = "named for the registers they are for")]
pub struct Context<'a> {
    pub root: u64,
    pub node: usize,
    pub pages: &'a Arc<Pages>,
    pub flush: Flush,
    pub fs_base: u64,
    pub gs_base: u64,
    pub registers: &'a Registers,
    pub fpu: &'a mut Fpu,
}

impl Kernel {
    /// A processor comes into the kernel, from wherever it was.
    pub fn begin(&mut self) {
        self.take_losses_in();
        let here = self.machine.cpu();
        self.scheduler.enter(here);
        self.objects.frames.enter(self.scheduler.node(here));
    }

    /// What this processor does next. The others have been told all that they
    /// must know when this returns.
    pub fn run_next(&mut self) -> Next {
        let here = self.machine.cpu();
        let last = self.scheduler.current(here);
        self.scheduler.set_current(here, None);
        let next = self.choose_next(here, last);
        // What it ran may run elsewhere from now on.
        if let Some(tid) = last
            && next != Some(tid)
            && let Some(thread) = self.threads.get_mut(&tid)
        {
            self.machine.save_fpu(tid, &mut thread.fpu);
        }
        if let Some(tid) = next {
            self.thread(tid).cpu = here;
            self.charge_system(here, tid);
        } else {
            self.scheduler.sleep(here);
        }
        self.scheduler.set_current(here, next);
        self.tell_others(here);
        match next {
            _ if self.powered_off => Next::PowerOff,
            Some(tid) => Next::Run(tid),
            None => Next::Idle,
        }
    }

    /// The thread to run, ready to; `last` is the one that ran.
    fn choose_next(&mut self, here: usize, last: Option<Tid>) -> Option<Tid> {
        // Before the timers run: who waits is queued by what wakes it, and in
        // the queue and here as well it would run twice.
        let goes_on = |tid: &Tid| self.threads.get(tid).is_some_and(|thread| !thread.waits);
        let before = last;
        let mut last = last.filter(goes_on);
        while !self.powered_off {
            let now = self.now();
            self.run_timers(now);
            let mut go_on = last.take().map(|tid| (tid, self.may_run(tid)));
            if let Some((tid, _)) = go_on.take_if(|(_, allowed)| !allowed.has(here)) {
                self.make_ready(tid);
            }
            let tid = self.scheduler.pick(here, go_on, now)?;
            if !self.prepare(tid) {
                continue;
            }
            if self.thread(tid).yields || !self.may_run(tid).has(here) {
                self.thread(tid).yields = false;
                self.thread(tid).cpu = here;
                self.scheduler.end_slice(here);
                last = Some(tid);
                continue;
            }
            if before != Some(tid) && !self.restart_sequence(tid, here) {
                last = Some(tid);
                continue;
            }
            return Some(tid);
        }
        None
    }

    /// Makes other processors see what has changed for them, and then lets
    /// frames that they may have used until now be used again.
    fn tell_others(&mut self, here: usize) {
        let (mut stale, mut gone) = (CpuSet::NONE, CpuSet::NONE);
        for cpu in (0..self.scheduler.count()).filter(|cpu| *cpu != here) {
            // Without a thread it has no program's tables loaded.
            let Some(tid) = self.scheduler.current(cpu) else {
                if self.scheduler.call(cpu, false) {
                    self.machine.call(cpu);
                }
                continue;
            };
            match self.memory_of(tid) {
                None => {
                    gone.add(cpu);
                    self.scheduler.set_current(cpu, None);
                }
                Some((_, space)) if space.flush != Flush::None => stale.add(cpu),
                Some(_) => {}
            }
            let recalled = self.powered_off || !self.goes_on(tid, cpu);
            if self.scheduler.call(cpu, recalled) {
                self.machine.call(cpu);
            }
        }
        self.machine.flush(stale, gone);
        // All others are done with what was changed. This one is, too, once
        // it has loaded the tables of the thread that it runs next.
        let mine = self
            .scheduler
            .current(here)
            .and_then(|tid| self.space_of(tid));
        for cpu in (0..self.scheduler.count()).filter(|cpu| *cpu != here) {
            let theirs = self
                .scheduler
                .current(cpu)
                .and_then(|tid| self.space_of(tid));
            if theirs != mine
                && let Some(space) = theirs.and_then(|id| self.spaces.get_mut(id))
            {
                space.flush = Flush::None;
            }
        }
        self.objects.frames.settle();
    }

    /// Whether a thread that runs on a processor may stay there undisturbed.
    fn goes_on(&mut self, tid: Tid, cpu: usize) -> bool {
        let exists = self.threads.get(&tid);
        exists.is_some_and(|thread| !thread.waits)
            && self.may_run(tid).has(cpu)
            && !self.has_signal(tid)
    }

    fn space_of(&self, tid: Tid) -> Option<u32> {
        let pid = self.threads.get(&tid)?.pid;
        self.processes.get(&pid)?.space
    }

    /// When this processor must be interrupted, in ns.
    pub fn interrupt_at(&mut self) -> Option<u64> {
        let (here, now) = (self.machine.cpu(), self.now());
        let event = self.next_event();
        self.scheduler.interrupt_at(here, now, event)
    }

    fn next_event(&self) -> Option<u64> {
        let timer = self.running_timers.next();
        timer.into_iter().chain(self.queues.next_deadline()).min()
    }

    fn run_timers(&mut self, now: u64) {
        while let Some(tid) = self.queues.due(now) {
            self.wake_thread(tid);
        }
        self.run_due_timers(now);
    }

    /// Goes on with a thread's call and delivers its signals; whether it can
    /// run then.
    fn prepare(&mut self, tid: Tid) -> bool {
        if !self.threads.contains_key(&tid) {
            return false;
        }
        loop {
            // A call is begun even if a signal has come by then, as it may
            // not have to wait.
            let untried = self.thread(tid).call.is_some_and(|call| !call.tried);
            if !untried && self.has_signal(tid) {
                if !self.deliver_signals(tid) {
                    return false;
                }
                continue;
            }
            let Some(call) = &mut self.thread(tid).call else {
                return true;
            };
            call.tried = true;
            let call = *call;
            // Nobody wakes it for a signal that is there already.
            if !self.make_call(tid, call) && !self.is_interrupted(tid) {
                return false;
            }
        }
    }

    /// Whether a thread that has just begun to wait has a signal, which ends
    /// that.
    fn is_interrupted(&mut self, tid: Tid) -> bool {
        if !self.threads.contains_key(&tid) || !self.has_signal(tid) {
            return false;
        }
        let shared = self.process_of(tid).pending.set();
        let pending = self.thread(tid).pending.set() | shared;
        let is_killed = pending & 1 << (SIGKILL - 1) != 0;
        (is_killed || !self.ignores_signals(tid)) && self.stop_waiting(tid)
    }

    /// Makes a system call; whether the thread can go on.
    fn make_call(&mut self, tid: Tid, call: Call) -> bool {
        let outcome = calls::make(self, tid, &call);
        if outcome != Err(Stop::Block) {
            self.give_up_opening(tid);
        }
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

    /// A thread's state for the processor, which loads it before anybody else
    /// enters the kernel.
    ///
    /// # Panics
    /// If it is not one that [`Kernel::run_next`] has said to run.
    pub fn context(&mut self, tid: u32) -> Context<'_> {
        let node = self.objects.frames.here();
        let thread = self.threads.get_mut(&tid).expect("it is to run");
        let process = self.processes.get(&thread.pid).expect("it runs");
        let space = process.space.and_then(|space| self.spaces.get_mut(space));
        let space = space.expect("running processes have memory");
        Context {
            root: space.pages().root(node, process.threads.len() > 1).0,
            node,
            flush: core::mem::take(&mut space.flush),
            pages: space.pages(),
            fs_base: thread.fs_base,
            gs_base: thread.gs_base,
            registers: &thread.registers,
            fpu: &mut thread.fpu,
        }
    }

    pub(crate) fn charge_user(&mut self, here: usize, tid: Tid) {
        let now = self.now();
        let spent = self.scheduler.spend(here, now);
        self.thread(tid).times.user += spent;
        self.process_of(tid).times.user += spent;
    }

    /// Charges a process what it has used so far on processors that run it,
    /// of which none may come into the kernel for long.
    pub(crate) fn charge_others(&mut self, pid: Pid) {
        let here = self.machine.cpu();
        for cpu in (0..self.scheduler.count()).filter(|cpu| *cpu != here) {
            let tid = self.scheduler.current(cpu);
            let is_its = |tid: &Tid| self.threads.get(tid).is_some_and(|it| it.pid == pid);
            if let Some(tid) = tid.filter(is_its) {
                self.charge_user(cpu, tid);
            }
        }
    }

    fn charge_system(&mut self, here: usize, tid: Tid) {
        let now = self.now();
        let spent = self.scheduler.spend(here, now);
        self.thread(tid).times.system += spent;
        self.process_of(tid).times.system += spent;
    }

    /// Time that the processor has slept is nobody's.
    pub fn slept(&mut self) {
        let (here, now) = (self.machine.cpu(), self.now());
        self.scheduler.spend(here, now);
    }

    /// Makes the system call that a thread has come back with, if that is all
    /// there is to do: then the thread just goes on with the result. Else all
    /// is as after [`Kernel::exit`].
    ///
    /// What others want of the thread comes by an interrupt, which is let in
    /// as soon as it goes on. So a call that concerns nobody else needs no
    /// look at the others, the clock or the queues.
    pub fn call(&mut self, tid: u32, registers: &Registers) -> Option<u64> {
        let has_news = self.has_lost();
        let plain = || self.begin_plain(tid, registers);
        let Some(space) = (!has_news).then(plain).flatten() else {
            self.exit(tid, registers, 0);
            return None;
        };
        let call = self.thread(tid).call.expect("it has just begun");
        let is_done = self.make_call(tid, call) || self.is_interrupted(tid);
        let space = self.spaces.get(space);
        if is_done
            && !self.disturbed
            && space.is_some_and(|space| space.flush == Flush::None)
            && !self.objects.frames.must_settle()
        {
            return Some(self.thread(tid).registers.rax);
        }
        self.charge_user(self.machine.cpu(), tid);
        None
    }

    /// Begins a plain call of a thread of which nobody wants anything; its
    /// address space.
    fn begin_plain(&mut self, tid: Tid, registers: &Registers) -> Option<u32> {
        let here = self.machine.cpu();
        let call = Call::new(registers);
        if self.scheduler.current(here) != Some(tid) || !calls::is_plain(call.number) {
            return None;
        }
        let thread = self.threads.get_mut(&tid)?;
        let process = self.processes.get(&thread.pid)?;
        if thread.waits || thread.pending.set() | process.pending.set() != 0 {
            return None;
        }
        thread.registers = *registers;
        thread.call = Some(Call {
            tried: true,
            ..call
        });
        self.objects.frames.enter(self.scheduler.node(here));
        self.disturbed = false;
        process.space
    }

    /// The thread that was run has come back with these registers. `address`
    /// is that of a fault.
    pub fn exit(&mut self, tid: u32, registers: &Registers, address: u64) {
        self.take_losses_in();
        let here = self.machine.cpu();
        self.objects.frames.enter(self.scheduler.node(here));
        // Its process may have ended meanwhile.
        let Some(thread) = self.threads.get_mut(&tid) else {
            self.slept();
            return;
        };
        thread.registers = *registers;
        self.charge_user(here, tid);
        match registers.vector {
            CALL_VECTOR => self.thread(tid).call = Some(Call::new(registers)),
            vector::PAGE_FAULT => self.page_fault(tid, address, registers.error),
            number if number >= vector::INTERRUPTS => {}
            number => self.exception(tid, number),
        }
    }

    fn page_fault(&mut self, tid: Tid, address: u64, error: u64) {
        let access = fault_access(error);
        if self.objects.frames.available() <= RESERVED_FRAMES / 2 {
            self.kill_for_memory(tid);
            return;
        }
        let Some((objects, space)) = self.memory_of(tid) else {
            return;
        };
        let here = objects.frames.here();
        space.pages().count(here, |counts| &counts.locked);
        let (signal, code) = match space.fault(objects, address, access) {
            Ok(_) => return,
            Err(Fault::Unmapped) => (SIGSEGV, 1),
            Err(Fault::Denied) => (SIGSEGV, 2),
            Err(Fault::BeyondEnd) => (SIGBUS, 2),
            // As Linux says of memory that has failed.
            Err(Fault::Lost) => (SIGBUS, 4),
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
}
