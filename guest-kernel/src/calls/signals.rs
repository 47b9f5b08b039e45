//! Signals: actions, masks, sending.

use linux_raw_sys::general::{SIG_BLOCK, SIG_SETMASK, SIG_UNBLOCK, SS_DISABLE, SS_ONSTACK};

use super::low;
use crate::errno::{Errno, Outcome, Result};
use crate::kernel::Kernel;
use crate::process::signal::{Action, Info, SIGNALS, UNBLOCKABLE, bit};
use crate::process::{Pid, SignalStack, State};
use crate::wait::{Key, Tid};

/// Smallest alternate stack.
const LEAST_STACK: u64 = 2048;

pub(super) fn signal_number(number: u32) -> Result<u8> {
    u8::try_from(number)
        .ok()
        .filter(|signal| *signal <= SIGNALS)
        .ok_or(Errno::EINVAL)
}

impl Kernel {
    pub(crate) fn sigaction(
        &mut self,
        tid: Tid,
        number: u32,
        new: u64,
        old: u64,
        size: u64,
    ) -> Outcome {
        let signal = signal_number(number)?;
        let fixed = bit(signal) & UNBLOCKABLE != 0;
        if size != 8 || signal == 0 || fixed && new != 0 {
            return Err(Errno::EINVAL.into());
        }
        let wanted: Option<Action> = match new {
            0 => None,
            address => Some(self.get(tid, address)?),
        };
        let action = self.process_of(tid).actions.get_mut(signal);
        let action = action.ok_or(Errno::EINVAL)?;
        let before = *action;
        if let Some(wanted) = wanted {
            *action = wanted;
        }
        self.put_if(tid, old, &before)?;
        let pid = self.pid_of(tid);
        if self.ignores(pid, signal) {
            self.process_of(tid).pending.drop(bit(signal));
            self.thread(tid).pending.drop(bit(signal));
        }
        Ok(0)
    }

    pub(crate) fn sigprocmask(
        &mut self,
        tid: Tid,
        how: u64,
        new: u64,
        old: u64,
        size: u64,
    ) -> Outcome {
        if size != 8 {
            return Err(Errno::EINVAL.into());
        }
        let set: Option<u64> = match new {
            0 => None,
            address => Some(self.get(tid, address)?),
        };
        let before = self.thread(tid).mask;
        if let Some(set) = set {
            let mask = match low(how) {
                SIG_BLOCK => before | set,
                SIG_UNBLOCK => before & !set,
                SIG_SETMASK => set,
                _ => return Err(Errno::EINVAL.into()),
            };
            self.thread(tid).mask = mask & !UNBLOCKABLE;
        }
        self.put_if(tid, old, &before)?;
        Ok(0)
    }

    pub(crate) fn sigpending(&mut self, tid: Tid, address: u64) -> Outcome {
        let shared = self.process_of(tid).pending.set();
        let thread = self.thread(tid);
        let set = (thread.pending.set() | shared) & thread.mask;
        self.put(tid, address, &set)?;
        Ok(0)
    }

    /// Another mask for the time of a call, which a signal's handler, or the
    /// end of the call, puts back.
    pub(crate) fn mask_for_call(&mut self, tid: Tid, address: u64) -> Result<()> {
        if self.thread(tid).saved_mask.is_some() {
            return Ok(());
        }
        let mask: u64 = self.get(tid, address)?;
        let thread = self.thread(tid);
        thread.saved_mask = Some(thread.mask);
        thread.mask = mask & !UNBLOCKABLE;
        Ok(())
    }

    pub(crate) fn sigsuspend(&mut self, tid: Tid, address: u64) -> Outcome {
        self.mask_for_call(tid, address)?;
        Err(self.block(tid, &[Key::Time], None))
    }

    pub(crate) fn pause(&mut self, tid: Tid) -> Outcome {
        Err(self.block(tid, &[Key::Time], None))
    }

    pub(crate) fn sigtimedwait(&mut self, tid: Tid, set: u64, info: u64, timeout: u64) -> Outcome {
        let set: u64 = self.get(tid, set)?;
        let found = match self.thread(tid).pending.take(set) {
            Some(found) => Some(found),
            None => self.process_of(tid).pending.take(set),
        };
        if let Some(found) = found {
            self.put_if(tid, info, &found.to_bytes())?;
            return Ok(found.signal.into());
        }
        let deadline = match (
            self.thread(tid).call.and_then(|call| call.deadline),
            timeout,
        ) {
            (Some(at), _) => Some(at),
            (None, 0) => None,
            (None, address) => {
                let time = self.timespec(tid, address)?;
                Some(self.now().saturating_add(time))
            }
        };
        if deadline.is_some_and(|at| at <= self.now()) {
            return Err(Errno::EAGAIN.into());
        }
        let pid = self.pid_of(tid);
        Err(self.block(tid, &[Key::Signals(pid)], deadline))
    }

    pub(crate) fn sigaltstack(&mut self, tid: Tid, new: u64, old: u64) -> Outcome {
        let thread = self.thread(tid);
        let before = thread.stack;
        let on_it = thread.registers.rsp.wrapping_sub(before.base) < before.len;
        let flags = match (before.len, on_it) {
            (0, _) => SS_DISABLE,
            (_, true) => SS_ONSTACK,
            _ => 0,
        };
        if new != 0 {
            let [base, flags, len]: [u64; 3] = self.get(tid, new)?;
            if on_it {
                return Err(Errno::EPERM.into());
            }
            self.thread(tid).stack = if low(flags) & SS_DISABLE != 0 {
                SignalStack::default()
            } else if len < LEAST_STACK {
                return Err(Errno::ENOMEM.into());
            } else {
                SignalStack { base, len }
            };
        }
        self.put_if(tid, old, &[before.base, flags.into(), before.len])?;
        Ok(0)
    }

    /// Whether a process may send another a signal.
    pub(super) fn may_signal(&mut self, tid: Tid, pid: Pid) -> bool {
        let me = self.process_of(tid).owner.clone();
        let Some(target) = self.processes.get(&pid) else {
            return false;
        };
        let theirs = [target.owner.user.real, target.owner.user.saved];
        me.user.effective == 0
            || theirs.contains(&me.user.real)
            || theirs.contains(&me.user.effective)
    }

    pub(crate) fn kill(&mut self, tid: Tid, which: i32, number: u32) -> Outcome {
        let signal = signal_number(number)?;
        let me = self.pid_of(tid);
        let group = self.process_of(tid).group;
        let targets: alloc::vec::Vec<Pid> = match which {
            1.. => alloc::vec![which.unsigned_abs()],
            0 | ..-1 => {
                let group = if which == 0 {
                    group
                } else {
                    which.unsigned_abs()
                };
                let all = self.processes.iter();
                all.filter(|(_, process)| process.group == group)
                    .map(|(pid, _)| *pid)
                    .collect()
            }
            -1 => {
                let all = self.processes.keys().copied();
                all.filter(|pid| ![1, me].contains(pid)).collect()
            }
        };
        let mut known = false;
        let mut sent = false;
        for pid in targets {
            if !self.processes.contains_key(&pid) {
                continue;
            }
            known = true;
            if self.may_signal(tid, pid) {
                sent = true;
                self.send_from(tid, pid, signal);
            }
        }
        match (known, sent) {
            (_, true) => Ok(0),
            (true, false) => Err(Errno::EPERM.into()),
            (false, false) => Err(Errno::ESRCH.into()),
        }
    }

    fn send_from(&mut self, tid: Tid, pid: Pid, signal: u8) {
        if signal == 0 {
            return;
        }
        let me = self.pid_of(tid);
        let uid = self.process_of(tid).owner.user.real;
        self.send_to_process(pid, Info::from_process(signal, 0, me, uid));
    }

    pub(crate) fn tgkill(&mut self, tid: Tid, pid: Pid, target: Tid, number: u32) -> Outcome {
        const SI_TKILL: i32 = -6;
        let signal = signal_number(number)?;
        let found = self.threads.get(&target).ok_or(Errno::ESRCH)?.pid;
        if pid != 0 && found != pid {
            return Err(Errno::ESRCH.into());
        }
        if !self.may_signal(tid, found) {
            return Err(Errno::EPERM.into());
        }
        if signal != 0 {
            let me = self.pid_of(tid);
            let uid = self.process_of(tid).owner.user.real;
            self.send_to_thread(target, Info::from_process(signal, SI_TKILL, me, uid));
        }
        Ok(0)
    }

    /// A background process that uses its terminal is stopped.
    pub(crate) fn check_background(
        &mut self,
        tid: Tid,
        terminal: u32,
        signal: u8,
    ) -> Result<(), crate::errno::Stop> {
        let process = self.process_of(tid);
        let (group, own) = (process.group, process.terminal == Some(terminal));
        let foreground = self
            .terminals
            .get(terminal)
            .map_or(0, |terminal| terminal.foreground);
        if !own || foreground == group || foreground == 0 {
            return Ok(());
        }
        let pid = self.pid_of(tid);
        let blocked = self.thread(tid).mask & bit(signal) != 0;
        if blocked || self.ignores(pid, signal) {
            // Reading fails, writing is let through.
            return match signal {
                21 => Err(Errno::EIO.into()),
                _ => Ok(()),
            };
        }
        self.send_to_group(group, Info::from_kernel(signal));
        let stopped = matches!(self.process_of(tid).state, State::Stopped(_));
        debug_assert!(!stopped, "signals act when a thread is about to run");
        Err(self.block_for_signal(tid))
    }

    /// Has a call made again after the signal that it has caused.
    fn block_for_signal(&mut self, tid: Tid) -> crate::errno::Stop {
        let stop = self.block(tid, &[Key::Time], None);
        self.wake_thread(tid);
        stop
    }
}
