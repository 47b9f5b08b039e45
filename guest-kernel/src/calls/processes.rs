//! Processes and threads: clone, exec, exit, wait, and who they are.

use linux_raw_sys::general::{
    CLONE_VFORK, CLONE_VM, CSIGNAL, FUTEX_BITSET_MATCH_ANY, FUTEX_CLOCK_REALTIME,
    FUTEX_CMP_REQUEUE, FUTEX_PRIVATE_FLAG, FUTEX_REQUEUE, FUTEX_WAIT, FUTEX_WAIT_BITSET,
    FUTEX_WAKE, FUTEX_WAKE_BITSET, RLIM_NLIMITS, SIGCHLD, WCONTINUED, WEXITED, WNOHANG, WNOWAIT,
    WSTOPPED,
};
use linux_raw_sys::prctl::{
    PR_CAPBSET_READ, PR_GET_DUMPABLE, PR_GET_KEEPCAPS, PR_GET_NAME, PR_GET_NO_NEW_PRIVS,
    PR_SET_DUMPABLE, PR_SET_NAME, PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG,
};
use zerocopy::IntoBytes;

use super::{HERE, low, signed};
use crate::errno::{Errno, Outcome, Result, Stop};
use crate::futex::{ANY, Scope};
use crate::kernel::Kernel;
use crate::process::exec::MOST_ARGUMENTS;
use crate::process::life::CloneRequest;
use crate::process::{Call, Ending, Limit, Pid, State, Times};
use crate::sched::CpuSet;
use crate::wait::{Key, Tid};

/// Addresses that segment bases may have.
const USER_LIMIT: u64 = crate::mem::tables::USER_END;
/// A word that a robust lock's dead owner leaves, and that of its waiters.
const OWNER_DIED: u32 = 1 << 30;
const WAITERS: u32 = 1 << 31;
/// Most locks that are looked at: the list is the program's, and may have no
/// end.
const MOST_LOCKS: u32 = 2048;

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

    /// Marks the locks that a thread holds as its last act.
    pub(crate) fn end_robust_list(&mut self, tid: Tid) {
        let head = core::mem::take(&mut self.thread(tid).robust_list);
        if head == 0 {
            return;
        }
        let Ok([first, offset, pending]) = self.get::<[u64; 3]>(tid, head) else {
            return;
        };
        let mut entry = first;
        let mut left = MOST_LOCKS;
        while entry & !1 != head && left > 0 {
            if entry & !1 != pending & !1 {
                self.end_lock(tid, (entry & !1).wrapping_add(offset));
            }
            let Ok(next) = self.get::<u64>(tid, entry & !1) else {
                break;
            };
            entry = next;
            left -= 1;
        }
        if pending & !1 != 0 {
            self.end_lock(tid, (pending & !1).wrapping_add(offset));
        }
    }

    fn end_lock(&mut self, tid: Tid, address: u64) {
        let Ok(word) = self.get::<u32>(tid, address) else {
            return;
        };
        if word & !(OWNER_DIED | WAITERS) != tid {
            return;
        }
        if self
            .put(tid, address, &(word & WAITERS | OWNER_DIED))
            .is_ok()
            && word & WAITERS != 0
        {
            for scope in [Scope::Private, Scope::Shared] {
                // Nobody waits, or the page is gone.
                let _ = self.futex_wake(tid, address, scope, 1, ANY);
            }
        }
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

    /// The process that a number means, 0 being the caller's.
    fn meant(&mut self, tid: Tid, pid: Pid) -> Result<Pid> {
        let pid = if pid == 0 { self.pid_of(tid) } else { pid };
        match self.processes.contains_key(&pid) {
            true => Ok(pid),
            false => Err(Errno::ESRCH),
        }
    }

    pub(crate) fn getpgid(&mut self, tid: Tid, pid: Pid) -> Outcome {
        let pid = self.meant(tid, pid)?;
        Ok(self.processes[&pid].group.into())
    }

    pub(crate) fn getsid(&mut self, tid: Tid, pid: Pid) -> Outcome {
        let pid = self.meant(tid, pid)?;
        Ok(self.processes[&pid].session.into())
    }

    pub(crate) fn setpgid(&mut self, tid: Tid, pid: Pid, group: Pid) -> Outcome {
        let me = self.pid_of(tid);
        let pid = self.meant(tid, pid)?;
        let group = if group == 0 { pid } else { group };
        if group.cast_signed() < 0 {
            return Err(Errno::EINVAL.into());
        }
        let session = self.processes[&me].session;
        let target = &self.processes[&pid];
        if pid != me {
            if target.parent != me {
                return Err(Errno::ESRCH.into());
            }
            if target.executed {
                return Err(Errno::EACCES.into());
            }
        }
        let exists = group == pid
            || self
                .processes
                .values()
                .any(|other| other.group == group && other.session == session);
        if target.session != session || target.session == pid || !exists {
            return Err(Errno::EPERM.into());
        }
        if let Some(process) = self.processes.get_mut(&pid) {
            process.group = group;
        }
        Ok(0)
    }

    pub(crate) fn setsid(&mut self, tid: Tid) -> Outcome {
        let pid = self.pid_of(tid);
        if self.processes.values().any(|process| process.group == pid) {
            return Err(Errno::EPERM.into());
        }
        let process = self.process_of(tid);
        (process.group, process.session) = (pid, pid);
        process.terminal = None;
        Ok(pid.into())
    }

    pub(crate) fn getres(&mut self, tid: Tid, a: [u64; 6], group: bool) -> Outcome {
        let owner = &self.process_of(tid).owner;
        let ids = match group {
            false => [owner.uid, owner.effective_uid, owner.saved_uid],
            true => [owner.gid, owner.effective_gid, owner.saved_gid],
        };
        for (address, id) in a.into_iter().zip(ids) {
            self.put(tid, address, &id)?;
        }
        Ok(0)
    }

    pub(crate) fn setuid(&mut self, tid: Tid, uid: u32) -> Outcome {
        let owner = &mut self.process_of(tid).owner;
        if owner.effective_uid == 0 {
            (owner.uid, owner.saved_uid) = (uid, uid);
        } else if ![owner.uid, owner.saved_uid].contains(&uid) {
            return Err(Errno::EPERM.into());
        }
        owner.effective_uid = uid;
        Ok(0)
    }

    pub(crate) fn setgid(&mut self, tid: Tid, gid: u32) -> Outcome {
        let owner = &mut self.process_of(tid).owner;
        if owner.effective_uid == 0 {
            (owner.gid, owner.saved_gid) = (gid, gid);
        } else if ![owner.gid, owner.saved_gid].contains(&gid) {
            return Err(Errno::EPERM.into());
        }
        owner.effective_gid = gid;
        Ok(0)
    }

    pub(crate) fn setresuid(&mut self, tid: Tid, real: u32, effective: u32, saved: u32) -> Outcome {
        let owner = &mut self.process_of(tid).owner;
        let known = [owner.uid, owner.effective_uid, owner.saved_uid, u32::MAX];
        let all = [real, effective, saved];
        if owner.effective_uid != 0 && !all.iter().all(|id| known.contains(id)) {
            return Err(Errno::EPERM.into());
        }
        set_ids(
            &all,
            [
                &mut owner.uid,
                &mut owner.effective_uid,
                &mut owner.saved_uid,
            ],
        );
        Ok(0)
    }

    pub(crate) fn setresgid(&mut self, tid: Tid, real: u32, effective: u32, saved: u32) -> Outcome {
        let owner = &mut self.process_of(tid).owner;
        let known = [owner.gid, owner.effective_gid, owner.saved_gid, u32::MAX];
        let all = [real, effective, saved];
        if owner.effective_uid != 0 && !all.iter().all(|id| known.contains(id)) {
            return Err(Errno::EPERM.into());
        }
        set_ids(
            &all,
            [
                &mut owner.gid,
                &mut owner.effective_gid,
                &mut owner.saved_gid,
            ],
        );
        Ok(0)
    }

    pub(crate) fn getgroups(&mut self, tid: Tid, count: u64, address: u64) -> Outcome {
        let groups = self.process_of(tid).owner.groups.clone();
        if count > 0 {
            if count < groups.len() as u64 {
                return Err(Errno::EINVAL.into());
            }
            self.write_user(tid, address, groups.as_bytes())?;
        }
        Ok(groups.len() as u64)
    }

    pub(crate) fn setgroups(&mut self, tid: Tid, count: u64, address: u64) -> Outcome {
        if self.process_of(tid).owner.effective_uid != 0 {
            return Err(Errno::EPERM.into());
        }
        let count = usize::try_from(count).ok().filter(|count| *count <= 65_536);
        let mut groups = alloc::vec![0_u32; count.ok_or(Errno::EINVAL)?];
        self.read_user(tid, address, groups.as_mut_bytes())?;
        self.process_of(tid).owner.groups = groups;
        Ok(0)
    }

    pub(crate) fn set_tid_address(&mut self, tid: Tid, address: u64) -> Outcome {
        self.thread(tid).clear_tid = address;
        Ok(tid.into())
    }

    pub(crate) fn set_robust_list(&mut self, tid: Tid, address: u64, len: u64) -> Outcome {
        if len != 24 {
            return Err(Errno::EINVAL.into());
        }
        self.thread(tid).robust_list = address;
        Ok(0)
    }

    pub(crate) fn futex(&mut self, tid: Tid, call: &Call) -> Outcome {
        let [address, operation, value, timeout, second, third] = call.arguments;
        let operation = low(operation);
        let scope = match operation & FUTEX_PRIVATE_FLAG {
            0 => Scope::Shared,
            _ => Scope::Private,
        };
        let command = operation & !(FUTEX_PRIVATE_FLAG | FUTEX_CLOCK_REALTIME);
        let count = |value: u64| u64::from(low(value)).min(i32::MAX.unsigned_abs().into());
        match command {
            FUTEX_WAIT | FUTEX_WAIT_BITSET => {
                let bits = match command {
                    FUTEX_WAIT => FUTEX_BITSET_MATCH_ANY,
                    _ => low(third),
                };
                let deadline = match (call.deadline, timeout) {
                    (Some(at), _) => Some(at),
                    (None, 0) => None,
                    (None, at) => {
                        let time = self.timespec(tid, at)?;
                        Some(match command {
                            FUTEX_WAIT => self.now().saturating_add(time),
                            _ if operation & FUTEX_CLOCK_REALTIME != 0 => {
                                time.saturating_sub(self.boot_wall_ns)
                            }
                            _ => time,
                        })
                    }
                };
                self.futex_wait(tid, address, scope, low(value), bits, deadline)
            }
            FUTEX_WAKE => Ok(self.futex_wake(tid, address, scope, count(value), ANY)?),
            FUTEX_WAKE_BITSET => {
                Ok(self.futex_wake(tid, address, scope, count(value), low(third))?)
            }
            FUTEX_REQUEUE | FUTEX_CMP_REQUEUE => {
                let expected = (command == FUTEX_CMP_REQUEUE).then(|| low(third));
                let counts = (count(value), count(timeout));
                Ok(self.futex_requeue(tid, address, second, scope, counts, expected)?)
            }
            _ => Err(Errno::ENOSYS.into()),
        }
    }

    pub(crate) fn arch_prctl(&mut self, tid: Tid, code: u32, value: u64) -> Outcome {
        const SET_GS: u32 = 0x1001;
        const SET_FS: u32 = 0x1002;
        const GET_FS: u32 = 0x1003;
        const GET_GS: u32 = 0x1004;
        let sets = [SET_FS, SET_GS].contains(&code);
        if sets && value >= USER_LIMIT {
            return Err(Errno::EPERM.into());
        }
        let thread = self.thread(tid);
        match code {
            SET_FS => thread.fs_base = value,
            SET_GS => thread.gs_base = value,
            GET_FS => {
                let base = thread.fs_base;
                self.put(tid, value, &base)?;
            }
            GET_GS => {
                let base = thread.gs_base;
                self.put(tid, value, &base)?;
            }
            _ => return Err(Errno::EINVAL.into()),
        }
        Ok(0)
    }

    pub(crate) fn prctl(&mut self, tid: Tid, a: [u64; 6]) -> Outcome {
        const LAST_CAPABILITY: u64 = 40;
        match low(a[0]) {
            PR_SET_NAME => {
                let mut name = self.string(tid, a[1], 16).or_else(|errno| match errno {
                    Errno::ENAMETOOLONG => self.bytes(tid, a[1], 15),
                    other => Err(other),
                })?;
                name.resize(16, 0);
                self.thread(tid).name.copy_from_slice(&name);
                Ok(0)
            }
            PR_GET_NAME => {
                let name = self.thread(tid).name;
                self.write_user(tid, a[1], &name)?;
                Ok(0)
            }
            PR_CAPBSET_READ if a[1] <= LAST_CAPABILITY => Ok(1),
            PR_GET_DUMPABLE => Ok(1),
            PR_GET_KEEPCAPS | PR_GET_NO_NEW_PRIVS => Ok(0),
            PR_SET_DUMPABLE | PR_SET_NO_NEW_PRIVS | PR_SET_PDEATHSIG => Ok(0),
            _ => Err(Errno::EINVAL.into()),
        }
    }

    pub(crate) fn prlimit(
        &mut self,
        tid: Tid,
        pid: Pid,
        resource: u32,
        new: u64,
        old: u64,
    ) -> Outcome {
        if resource >= RLIM_NLIMITS {
            return Err(Errno::EINVAL.into());
        }
        let pid = self.meant(tid, pid)?;
        let wanted: Option<[u64; 2]> = match new {
            0 => None,
            address => Some(self.get(tid, address)?),
        };
        let privileged = self.process_of(tid).owner.effective_uid == 0;
        let slot: &mut Limit = match self.processes.get_mut(&pid) {
            Some(process) => &mut process.limits[resource as usize],
            None => return Err(Errno::ESRCH.into()),
        };
        let before = *slot;
        if let Some([soft, hard]) = wanted {
            if soft > hard {
                return Err(Errno::EINVAL.into());
            }
            if hard > before.1 && !privileged {
                return Err(Errno::EPERM.into());
            }
            *slot = (soft, hard);
        }
        self.put_if(tid, old, &[before.0, before.1])?;
        Ok(0)
    }

    pub(crate) fn getrusage(&mut self, tid: Tid, who: u32, address: u64) -> Outcome {
        let process = self.process_of(tid);
        let times = match signed(who.into()) {
            0 | 1 => process.times,
            -1 => process.children,
            _ => return Err(Errno::EINVAL.into()),
        };
        self.put(tid, address, &usage_words(times))?;
        Ok(0)
    }

    pub(crate) fn getpriority(&mut self, tid: Tid, kind: u32, who: u32) -> Outcome {
        if kind != 0 {
            return Ok(20);
        }
        let pid = self.meant(tid, who)?;
        let nice = self.processes[&pid].nice;
        Ok(u64::from((20 - nice).unsigned_abs()))
    }

    pub(crate) fn setpriority(&mut self, tid: Tid, kind: u32, who: u32, nice: i32) -> Outcome {
        if kind == 0 {
            let pid = self.meant(tid, who)?;
            if let Some(process) = self.processes.get_mut(&pid) {
                process.nice = nice.clamp(-20, 19);
            }
        }
        Ok(0)
    }

    pub(crate) fn sched_yield(&mut self, tid: Tid) -> Outcome {
        self.thread(tid).yields = true;
        Ok(0)
    }

    pub(crate) fn sched_getaffinity(
        &mut self,
        tid: Tid,
        which: u32,
        len: u64,
        address: u64,
    ) -> Outcome {
        if len < 8 || !len.is_multiple_of(8) {
            return Err(Errno::EINVAL.into());
        }
        let which = if which == 0 { tid } else { which };
        let thread = self.threads.get(&which).ok_or(Errno::ESRCH)?;
        let allowed = thread.allowed.0 & self.scheduler.all().0;
        self.put(tid, address, &allowed)?;
        Ok(8)
    }

    pub(crate) fn sched_setaffinity(
        &mut self,
        tid: Tid,
        which: u32,
        len: u64,
        address: u64,
    ) -> Outcome {
        let which = if which == 0 { tid } else { which };
        if !self.threads.contains_key(&which) {
            return Err(Errno::ESRCH.into());
        }
        // What is shorter or longer than ours says nothing of the rest.
        let mut word = [0; 8];
        let len = usize::try_from(len).map_or(8, |len| len.min(8));
        self.read_user(tid, address, &mut word[..len])?;
        let all = self.scheduler.all();
        let wanted = CpuSet(u64::from_le_bytes(word) & all.0);
        if wanted == CpuSet::NONE {
            return Err(Errno::EINVAL.into());
        }
        // All is all that there will ever be.
        self.thread(which).allowed = if wanted == all { CpuSet::ALL } else { wanted };
        // Who runs is moved when its processor looks again.
        if self.scheduler.forget(which) {
            self.make_ready(which);
        }
        Ok(0)
    }

    pub(crate) fn getcpu(&mut self, tid: Tid, cpu: u64, node: u64) -> Outcome {
        let here = self.machine.cpu();
        let number = u32::try_from(here).unwrap_or(u32::MAX);
        let of_node = self.scheduler.node(here);
        self.put_if(tid, cpu, &number)?;
        self.put_if(tid, node, &of_node)?;
        Ok(0)
    }
}

fn set_ids(wanted: &[u32; 3], places: [&mut u32; 3]) {
    for (id, place) in wanted.iter().zip(places) {
        if *id != u32::MAX {
            *place = *id;
        }
    }
}

/// A `struct rusage`, of which only the times are known.
fn usage_words(times: Times) -> [u64; 18] {
    const NS: u64 = 1_000_000_000;
    let mut words = [0; 18];
    words[0] = times.user / NS;
    words[1] = times.user % NS / 1000;
    words[2] = times.system / NS;
    words[3] = times.system % NS / 1000;
    words
}
