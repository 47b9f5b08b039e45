//! Processes and threads: clone, exec, exit and wait.

use linux_raw_sys::general::{
    CLONE_VFORK, CLONE_VM, CSIGNAL, SIGCHLD, WCONTINUED, WEXITED, WNOHANG, WNOWAIT, WSTOPPED,
};
use zerocopy::IntoBytes;

use super::HERE;
use crate::errno::{Errno, Outcome, Result, Stop};
use crate::kernel::Kernel;
use crate::process::exec::MOST_ARGUMENTS;
use crate::process::life::CloneRequest;
use crate::process::{Ending, Pid, State, Times};
use crate::wait::{Key, Tid};

/// A child that `wait` has found.
struct Found {
    pid: Pid,
    /// As in the status word of wait4.
    status: u32,
    /// As in `si_code` and `si_status`.
    code: i32,
    value: u32,
    times: Times,
}

impl Kernel {
    pub(crate) fn fork(&mut self, tid: Tid) -> Outcome {
        let request = CloneRequest {
            exit_signal: 17,
            ..CloneRequest::default()
        };
        Ok(self.clone_thread(tid, request)?.into())
    }

    pub(crate) fn vfork(&mut self, tid: Tid) -> Outcome {
        let flags = u64::from(CLONE_VFORK | CLONE_VM);
        self.clone_and_wait(
            tid,
            CloneRequest {
                flags,
                exit_signal: 17,
                ..CloneRequest::default()
            },
        )
    }

    pub(crate) fn clone_call(&mut self, tid: Tid, a: [u64; 6]) -> Outcome {
        let [flags, stack, parent_tid, child_tid, tls, _] = a;
        let [exit_signal, ..] = (flags & u64::from(CSIGNAL)).to_le_bytes();
        self.clone_and_wait(
            tid,
            CloneRequest {
                flags: flags & 0xffff_ff00,
                exit_signal,
                stack,
                parent_tid,
                child_tid,
                tls,
            },
        )
    }

    pub(crate) fn clone3(&mut self, tid: Tid, address: u64, size: u64) -> Outcome {
        if size < 64 {
            return Err(Errno::EINVAL.into());
        }
        let [
            flags,
            _pidfd,
            child_tid,
            parent_tid,
            exit_signal,
            stack,
            stack_size,
            tls,
        ]: [u64; 8] = self.get(tid, address)?;
        let [exit_signal, ..] = exit_signal.to_le_bytes();
        self.clone_and_wait(
            tid,
            CloneRequest {
                flags,
                exit_signal,
                stack: stack.wrapping_add(stack_size),
                parent_tid,
                child_tid,
                tls,
            },
        )
    }

    /// With CLONE_VFORK the caller waits for the child's exec or end.
    fn clone_and_wait(&mut self, tid: Tid, request: CloneRequest) -> Outcome {
        let child = match self.thread(tid).vfork_child {
            Some(child) => child,
            None => self.clone_thread(tid, request)?,
        };
        if self.thread(tid).vfork_child.is_some() {
            let borrowed = self
                .processes
                .get(&child)
                .is_some_and(|child| child.borrowed);
            if borrowed {
                return Err(self.block(tid, &[Key::Vfork(child)], None));
            }
            self.thread(tid).vfork_child = None;
        }
        Ok(child.into())
    }

    pub(crate) fn execve(
        &mut self,
        tid: Tid,
        directory: u32,
        path: u64,
        arguments: u64,
        environment: u64,
        flags: u32,
    ) -> Outcome {
        let mut path = self.path(tid, path)?;
        let arguments = self.strings(tid, arguments, MOST_ARGUMENTS)?;
        let environment = self.strings(tid, environment, MOST_ARGUMENTS)?;
        if directory != HERE && !path.starts_with(b"/") {
            // The name that /proc has for the descriptor's file.
            let prefix = alloc::format!("/proc/self/fd/{directory}");
            let empty = path.is_empty() && flags != 0;
            let mut whole = prefix.into_bytes();
            if !empty {
                whole.push(b'/');
                whole.extend_from_slice(&path);
            }
            path = whole;
        }
        let arguments = match arguments.is_empty() {
            true => alloc::vec![alloc::vec![]],
            false => arguments,
        };
        self.exec(tid, &path, arguments, environment)
    }

    pub(crate) fn exit_call(&mut self, tid: Tid, code: u32) -> Outcome {
        let [code, ..] = code.to_le_bytes();
        self.end_thread(tid, Ending::Exit(code));
        Err(Stop::Done)
    }

    pub(crate) fn exit_group(&mut self, tid: Tid, code: u32) -> Outcome {
        let [code, ..] = code.to_le_bytes();
        let pid = self.pid_of(tid);
        self.end_all(pid, Ending::Exit(code));
        Err(Stop::Done)
    }

    /// A child of the process that has news of the kinds wanted; `Ok(None)`
    /// if it must be waited for.
    fn find_child(&mut self, parent: Pid, which: i32, options: u32) -> Result<Option<Found>> {
        let group = self
            .processes
            .get(&parent)
            .map_or(0, |process| process.group);
        let matches = |pid: Pid, child_group: Pid| match which {
            -1 => true,
            0 => child_group == group,
            1.. => pid == which.unsigned_abs(),
            _ => child_group == which.unsigned_abs(),
        };
        let mut any = false;
        for (pid, process) in &self.processes {
            if process.parent != parent || !matches(*pid, process.group) {
                continue;
            }
            any = true;
            let (status, code, value) = match process.state {
                State::Ended(ending) if options & WEXITED != 0 => match ending {
                    Ending::Exit(code) => (ending.status(), 1, u32::from(code)),
                    Ending::Signal(signal) => (ending.status(), 2, u32::from(signal)),
                },
                State::Stopped(signal) if process.news && options & WSTOPPED != 0 => {
                    (u32::from(signal) << 8 | 0x7f, 5, u32::from(signal))
                }
                State::Running if process.continued && options & WCONTINUED != 0 => (0xffff, 6, 18),
                _ => continue,
            };
            let mut times = process.times;
            times.user += process.children.user;
            times.system += process.children.system;
            return Ok(Some(Found {
                pid: *pid,
                status,
                code,
                value,
                times,
            }));
        }
        if any { Ok(None) } else { Err(Errno::ECHILD) }
    }

    fn told_of(&mut self, pid: Pid, options: u32) {
        if options & WNOWAIT != 0 {
            return;
        }
        let Some(process) = self.processes.get_mut(&pid) else {
            return;
        };
        if matches!(process.state, State::Ended(_)) {
            self.reap(pid);
        } else {
            (process.news, process.continued) = (false, false);
        }
    }

    pub(crate) fn wait4(
        &mut self,
        tid: Tid,
        which: i32,
        status: u64,
        options: u32,
        usage: u64,
    ) -> Outcome {
        let parent = self.pid_of(tid);
        let Some(found) = self.find_child(parent, which, options | WEXITED)? else {
            if options & WNOHANG != 0 {
                return Ok(0);
            }
            return Err(self.block(tid, &[Key::Children(parent)], None));
        };
        self.put_if(tid, status, &found.status)?;
        self.put_if(tid, usage, &usage_words(found.times))?;
        self.told_of(found.pid, options);
        Ok(found.pid.into())
    }

    pub(crate) fn waitid(
        &mut self,
        tid: Tid,
        kind: u32,
        id: u32,
        info: u64,
        options: u32,
        usage: u64,
    ) -> Outcome {
        let which = match kind {
            0 => -1,
            1 => id.cast_signed(),
            2 if id == 0 => 0,
            2 => id.cast_signed().checked_neg().ok_or(Errno::EINVAL)?,
            3 => match self.process_behind(tid, id) {
                Err(Errno::ESRCH) => return Err(Errno::ECHILD.into()),
                pid => pid?.cast_signed(),
            },
            _ => return Err(Errno::EINVAL.into()),
        };
        if options & (WEXITED | WSTOPPED | WCONTINUED) == 0 {
            return Err(Errno::EINVAL.into());
        }
        let parent = self.pid_of(tid);
        let Some(found) = self.find_child(parent, which, options)? else {
            if options & WNOHANG != 0 {
                self.put_if(tid, info, &[0_u8; 128])?;
                return Ok(0);
            }
            return Err(self.block(tid, &[Key::Children(parent)], None));
        };
        let words = [
            SIGCHLD,
            0,
            found.code.cast_unsigned(),
            0,
            found.pid,
            0,
            found.value,
            0,
        ];
        if info != 0 {
            let mut bytes = [0; 128];
            bytes[..32].copy_from_slice(words.as_bytes());
            self.put(tid, info, &bytes)?;
        }
        self.put_if(tid, usage, &usage_words(found.times))?;
        self.told_of(found.pid, options);
        Ok(0)
    }
}

/// A `struct rusage`, of which only the times are known.
pub(super) fn usage_words(times: Times) -> [u64; 18] {
    const NS: u64 = 1_000_000_000;
    let mut words = [0; 18];
    words[0] = times.user / NS;
    words[1] = times.user % NS / 1000;
    words[2] = times.system / NS;
    words[3] = times.system % NS / 1000;
    words
}
