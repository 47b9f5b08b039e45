//! Signals on their way: to whom, when, and the frame that a handler gets.
//!
//! Layout of the frame: Linux, arch/x86/include/uapi/asm/{ucontext,
//! sigcontext}.h.

use alloc::vec::Vec;

use linux_raw_sys::general::{
    SA_NODEFER, SA_ONSTACK, SA_RESETHAND, SA_RESTART, SIGCONT, SIGKILL, SIGSTOP,
};

use super::signal::{Action, Effect, Info, STOPPING, UNBLOCKABLE, bit};
use super::{Ending, Pid, State};
use crate::calls::{Restart, restart_rule};
use crate::errno::{Errno, Outcome, Result, Stop};
use crate::kernel::Kernel;
use crate::machine::{FIXED_FLAGS, FPU_LEGACY, Registers, USER_CODE, USER_DATA, USER_FLAGS};
use crate::wait::{Key, Tid};

/// Bytes below a program's stack pointer that are its own.
const RED_ZONE: u64 = 128;
/// Return address, ucontext, siginfo.
const FRAME: usize = 8 + CONTEXT + INFO;
const CONTEXT: usize = 304;
const INFO: usize = 128;
/// Offsets in the ucontext.
const STACK: usize = 16;
const MACHINE: usize = 40;
const FPU_POINTER: usize = MACHINE + 184;
const MASK: usize = 296;
/// Says that the FPU state has an extended part, before it and behind it.
const FPU_MAGIC: (u32, u32) = (0x4650_5853, 0x4650_5845);
const FPU_SOFTWARE: usize = 464;

impl Kernel {
    /// Whether a thread has a signal to take.
    pub(crate) fn has_signal(&mut self, tid: Tid) -> bool {
        let shared = self.process_of(tid).pending.set();
        let thread = self.thread(tid);
        (thread.pending.set() | shared) & !thread.mask != 0
    }

    /// Sends a signal to one thread.
    pub(crate) fn send_to_thread(&mut self, tid: Tid, info: Info) {
        let Some(thread) = self.threads.get(&tid) else {
            return;
        };
        let pid = thread.pid;
        let blocked = thread.mask & bit(info.signal) != 0;
        self.before_signal(pid, info.signal);
        if !blocked && self.ignores(pid, info.signal) {
            return;
        }
        let thread = self.thread(tid);
        thread.pending.add(info);
        if !blocked {
            self.wake_for_signal(tid, info.signal);
        } else {
            self.wake(Key::Signals(pid));
        }
    }

    /// Sends a signal to a process: any thread that doesn't block it gets it.
    pub(crate) fn send_to_process(&mut self, pid: Pid, info: Info) {
        let Some(process) = self.processes.get(&pid) else {
            return;
        };
        if matches!(process.state, State::Ended(_)) {
            return;
        }
        let open = |tid: &&Tid| {
            let thread = self.threads.get(*tid);
            thread.is_some_and(|thread| thread.mask & bit(info.signal) == 0)
        };
        let taker = process.threads.iter().find(open).copied();
        self.before_signal(pid, info.signal);
        if taker.is_some() && self.ignores(pid, info.signal) {
            return;
        }
        if let Some(process) = self.processes.get_mut(&pid) {
            process.pending.add(info);
        }
        if let Some(tid) = taker {
            self.wake_for_signal(tid, info.signal);
        } else {
            self.wake(Key::Signals(pid));
        }
    }

    /// Sends a signal to all processes of a group; whether there are any.
    pub(crate) fn send_to_group(&mut self, group: Pid, info: Info) -> bool {
        let pids: Vec<_> = self
            .processes
            .iter()
            .filter(|(_, process)| process.group == group)
            .map(|(pid, _)| *pid)
            .collect();
        for pid in &pids {
            self.send_to_process(*pid, info);
        }
        !pids.is_empty()
    }

    /// Stopping and continuing undo each other, and continuing takes effect
    /// at once.
    fn before_signal(&mut self, pid: Pid, signal: u8) {
        self.disturbed = true;
        let is = |other: u32| u32::from(signal) == other;
        let drop = if is(SIGCONT) {
            STOPPING
        } else if bit(signal) & STOPPING != 0 {
            bit(u8::try_from(SIGCONT).expect("a small number"))
        } else {
            0
        };
        let Some(process) = self.processes.get_mut(&pid) else {
            return;
        };
        process.pending.drop(drop);
        let threads = process.threads.clone();
        let was_stopped = matches!(process.state, State::Stopped(_));
        if was_stopped && (is(SIGCONT) || is(SIGKILL)) {
            process.state = State::Running;
            process.news = false;
            process.continued = is(SIGCONT);
            let parent = process.parent;
            for tid in &threads {
                self.wake_thread(*tid);
            }
            self.child_changed(pid, parent, 6, 18);
        }
        for tid in threads {
            if let Some(thread) = self.threads.get_mut(&tid) {
                thread.pending.drop(drop);
            }
        }
    }

    /// Tells a parent that a child has stopped or goes on.
    fn child_changed(&mut self, pid: Pid, parent: Pid, code: i32, status: u64) {
        const SA_NOCLDSTOP: u64 = 1;
        const SIGCHLD: u8 = 17;
        let Some(process) = self.processes.get_mut(&parent) else {
            return;
        };
        let action = process.actions.get_mut(SIGCHLD).copied();
        let wants = action.is_none_or(|action| action.flags & SA_NOCLDSTOP == 0);
        if wants {
            let mut info = Info::from_process(SIGCHLD, code, pid, 0);
            info.words[1] = status;
            self.send_to_process(parent, info);
        }
        self.wake(Key::Children(parent));
    }

    /// Lets a thread look at its signals, unless its process is stopped.
    fn wake_for_signal(&mut self, tid: Tid, signal: u8) {
        if u32::from(signal) == SIGKILL || !self.ignores_signals(tid) {
            self.wake_thread(tid);
        }
    }

    /// Whether a thread waits such that only SIGKILL ends it: it is stopped,
    /// or has lent its memory.
    pub(crate) fn ignores_signals(&mut self, tid: Tid) -> bool {
        let is_vfork = |key: &Key| matches!(key, Key::Vfork(_));
        matches!(self.process_of(tid).state, State::Stopped(_))
            || self.thread(tid).keys.iter().any(is_vfork)
    }

    /// A signal for what a thread has done itself: if it is blocked or
    /// ignored, the process ends.
    pub(crate) fn force_signal(&mut self, tid: Tid, info: Info) {
        self.disturbed = true;
        let set = bit(info.signal);
        let blocked = self.thread(tid).mask & set != 0;
        let ignored = self.process_of(tid).actions.effect(info.signal) == Effect::Ignore;
        if blocked || ignored {
            if let Some(action) = self.process_of(tid).actions.get_mut(info.signal) {
                *action = Action::default();
            }
            self.thread(tid).mask &= !set;
        }
        self.thread(tid).pending.add(info);
    }

    /// Does what a thread's signals ask for; whether it can go on.
    pub(crate) fn deliver_signals(&mut self, tid: Tid) -> bool {
        let pid = self.pid_of(tid);
        let allowed = !self.thread(tid).mask;
        let info = match self.thread(tid).pending.take(allowed) {
            Some(info) => info,
            None => match self.process_of(tid).pending.take(allowed) {
                Some(info) => info,
                None => return true,
            },
        };
        let mut effect = self.process_of(tid).actions.effect(info.signal);
        if bit(info.signal) & UNBLOCKABLE != 0 {
            effect = match u32::from(info.signal) == SIGSTOP {
                true => Effect::Stop,
                false => Effect::Terminate,
            };
        }
        match effect {
            Effect::Ignore => true,
            // Process 1 has no default actions: it would end the machine.
            Effect::Terminate if pid == super::life::INIT && info.code <= 0 => true,
            Effect::Terminate => {
                self.end_all(pid, Ending::Signal(info.signal));
                false
            }
            Effect::Stop => {
                self.stop_process(pid, info.signal);
                false
            }
            Effect::Handle(action) => {
                self.interrupt_call(tid, &action);
                let left = self.leave_sequence(tid);
                let pushed = left.and_then(|()| self.push_frame(tid, info, &action));
                if pushed.is_err() {
                    self.force_default(tid);
                }
                true
            }
        }
    }

    fn force_default(&mut self, tid: Tid) {
        let stack = self.thread(tid).registers.rsp;
        let signal = self.memory_signal(tid, stack.wrapping_sub(8));
        if let Some(action) = self.process_of(tid).actions.get_mut(signal) {
            *action = Action::default();
        }
        self.thread(tid).mask &= !bit(signal);
        self.thread(tid).pending.add(Info::from_kernel(signal));
    }

    fn stop_process(&mut self, pid: Pid, signal: u8) {
        let Some(process) = self.processes.get_mut(&pid) else {
            return;
        };
        process.state = State::Stopped(signal);
        process.news = true;
        process.continued = false;
        let (threads, parent) = (process.threads.clone(), process.parent);
        for tid in threads {
            self.scheduler.forget(tid);
            let thread = self.thread(tid);
            if !thread.waits {
                thread.waits = true;
            } else {
                // It goes back to waiting when it is continued.
                let keys = core::mem::take(&mut thread.keys);
                let deadline = thread.call.and_then(|call| call.deadline);
                self.queues.remove(tid, &keys, deadline);
            }
        }
        self.child_changed(pid, parent, 5, signal.into());
    }

    /// Ends the call that a thread is in, or has it made again after the
    /// handler.
    fn interrupt_call(&mut self, tid: Tid, action: &Action) {
        let Some(call) = self.thread(tid).call.take() else {
            return;
        };
        self.futex_forget(tid);
        self.give_up_opening(tid);
        let restarts = match restart_rule(call.number) {
            Restart::Never => false,
            Restart::IfWanted => {
                action.flags & u64::from(SA_RESTART) != 0 && call.deadline.is_none()
            }
        };
        let registers = &mut self.thread(tid).registers;
        if call.woken {
            registers.rax = 0;
        } else if call.done > 0
            && restart_rule(call.number) == Restart::IfWanted
            && is_transfer(call.number)
        {
            registers.rax = call.done;
        } else if restarts {
            registers.rax = call.number.into();
            // The instruction is two bytes long.
            registers.rip = registers.rip.wrapping_sub(2);
        } else {
            registers.rax = u64::from(Errno::EINTR.0).wrapping_neg();
        }
    }

    /// Puts a frame on the stack and the thread into its handler.
    fn push_frame(&mut self, tid: Tid, info: Info, action: &Action) -> Result<()> {
        self.update_fpu(tid);
        let len = self.machine.fpu_len();
        let mask_of_components = self.machine.fpu_mask();
        let thread = self.thread(tid);
        let registers = thread.registers;
        let stack = thread.stack;
        let on_stack = registers.rsp.wrapping_sub(stack.base) < stack.len;
        let switches = action.flags & u64::from(SA_ONSTACK) != 0 && stack.len > 0 && !on_stack;
        let top = match switches {
            true => stack.base.wrapping_add(stack.len),
            false => registers.rsp.wrapping_sub(RED_ZONE),
        };
        let mut fpu: Vec<u8> = thread.fpu.bytes().collect();
        let put = |bytes: &mut [u8], at: usize, word: u32| {
            bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
        };
        let size = u32::try_from(len).expect("a small area");
        put(&mut fpu, FPU_SOFTWARE, FPU_MAGIC.0);
        put(&mut fpu, FPU_SOFTWARE + 4, size + 4);
        fpu[FPU_SOFTWARE + 8..FPU_SOFTWARE + 16].copy_from_slice(&mask_of_components.to_le_bytes());
        put(&mut fpu, FPU_SOFTWARE + 16, size);
        fpu.extend(FPU_MAGIC.1.to_le_bytes());
        let fpu_at = top.wrapping_sub(fpu.len() as u64) & !63;
        let frame_at = (fpu_at.wrapping_sub(FRAME as u64) & !15).wrapping_sub(8);

        let old_mask = thread.saved_mask.take().unwrap_or(thread.mask);
        let mut frame = [0; FRAME];
        let word = |frame: &mut [u8], at: usize, value: u64| {
            frame[at..at + 8].copy_from_slice(&value.to_le_bytes());
        };
        word(&mut frame, 0, action.restorer);
        let context = &mut frame[8..8 + CONTEXT];
        word(context, STACK, stack.base);
        let stack_flags: u32 = match (stack.len, on_stack) {
            (0, _) => 2,
            (_, true) => 1,
            _ => 0,
        };
        put(context, STACK + 8, stack_flags);
        word(context, STACK + 16, stack.len);
        for (number, value) in context_registers(&registers).into_iter().enumerate() {
            word(context, MACHINE + number * 8, value);
        }
        let selectors = registers.cs | registers.ss << 48;
        word(context, MACHINE + 144, selectors);
        word(context, MACHINE + 152, registers.error);
        word(context, MACHINE + 160, registers.vector);
        word(context, MACHINE + 168, old_mask);
        word(context, MACHINE + 176, info.words[0]);
        word(context, FPU_POINTER, fpu_at);
        word(context, MASK, old_mask);
        frame[8 + CONTEXT..].copy_from_slice(&info.to_bytes());
        self.write_user(tid, fpu_at, &fpu)?;
        self.write_user(tid, frame_at, &frame)?;

        let mut mask = action.mask;
        if action.flags & u64::from(SA_NODEFER) == 0 {
            mask |= bit(info.signal);
        }
        if action.flags & u64::from(SA_RESETHAND) != 0
            && let Some(action) = self.process_of(tid).actions.get_mut(info.signal)
        {
            *action = Action::default();
        }
        let thread = self.thread(tid);
        thread.mask = (thread.mask | mask) & !UNBLOCKABLE;
        thread.registers = Registers {
            rip: action.handler,
            rsp: frame_at,
            rdi: info.signal.into(),
            rsi: frame_at + 8 + CONTEXT as u64,
            rdx: frame_at + 8,
            rax: 0,
            rflags: FIXED_FLAGS,
            cs: USER_CODE,
            ss: USER_DATA,
            vector: 0,
            ..registers
        };
        Ok(())
    }

    /// Goes back to where a signal has interrupted the thread.
    pub(crate) fn return_from_signal(&mut self, tid: Tid) -> Outcome {
        let at = self.thread(tid).registers.rsp.wrapping_sub(8);
        let mut frame = [0; FRAME];
        if self.read_user(tid, at, &mut frame).is_err() {
            self.force_default(tid);
            return Err(Stop::Done);
        }
        let context = &frame[8..8 + CONTEXT];
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&context[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let fpu_at = word(FPU_POINTER);
        let mask = self.machine.fpu_mask();
        if fpu_at != 0 {
            let mut bytes = alloc::vec![0; self.machine.fpu_len()];
            let legacy = bytes.len().min(FPU_LEGACY);
            let whole = self.read_user(tid, fpu_at, &mut bytes[..legacy]).is_ok();
            let magic = bytes[FPU_SOFTWARE..FPU_SOFTWARE + 4] == FPU_MAGIC.0.to_le_bytes();
            let extended = whole && magic && self.read_user(tid, fpu_at, &mut bytes).is_ok();
            if !whole {
                self.force_default(tid);
                return Err(Stop::Done);
            }
            if !extended {
                bytes.truncate(legacy);
                // X87 and SSE, which the legacy part holds.
                bytes.extend(3_u64.to_le_bytes());
            }
            self.machine.forget_fpu(tid);
            self.thread(tid).fpu.restore(&bytes, mask);
        }
        let thread = self.thread(tid);
        thread.mask = word(MASK) & !UNBLOCKABLE;
        restore_registers(&mut thread.registers, |number| word(MACHINE + number * 8));
        Err(Stop::Done)
    }

    /// Brings a thread's saved FPU state up to date.
    pub(crate) fn update_fpu(&mut self, tid: Tid) {
        let thread = self.threads.get_mut(&tid).expect("the caller has seen it");
        self.machine.save_fpu(tid, &mut thread.fpu);
    }
}

/// Calls whose progress is a number of bytes.
fn is_transfer(number: u32) -> bool {
    use linux_raw_sys::general as nr;
    [
        nr::__NR_write,
        nr::__NR_writev,
        nr::__NR_sendto,
        nr::__NR_sendmsg,
    ]
    .contains(&number)
}

/// The registers in the order of the frame.
fn context_registers(registers: &Registers) -> [u64; 18] {
    let r = registers;
    [
        r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rdi, r.rsi, r.rbp, r.rbx, r.rdx,
        r.rax, r.rcx, r.rsp, r.rip, r.rflags,
    ]
}

fn restore_registers(registers: &mut Registers, word: impl Fn(usize) -> u64) {
    let r = registers;
    let places = [
        &mut r.r8, &mut r.r9, &mut r.r10, &mut r.r11, &mut r.r12, &mut r.r13, &mut r.r14,
        &mut r.r15, &mut r.rdi, &mut r.rsi, &mut r.rbp, &mut r.rbx, &mut r.rdx, &mut r.rax,
        &mut r.rcx, &mut r.rsp, &mut r.rip,
    ];
    for (number, place) in places.into_iter().enumerate() {
        *place = word(number);
    }
    r.rflags = word(17) & USER_FLAGS | FIXED_FLAGS;
    (r.cs, r.ss) = (USER_CODE, USER_DATA);
    // All registers count: it was not a system call that is returned from.
    r.vector = 0;
}
