//! Who processes are: users and groups, process groups and sessions, limits.

use linux_raw_sys::general::RLIM_NLIMITS;
use zerocopy::IntoBytes;

use super::processes::usage_words;
use super::signed;
use crate::errno::{Errno, Outcome, Result};
use crate::kernel::Kernel;
use crate::process::{Ids, Limit, Owner, Pid};
use crate::wait::Tid;

/// Whose ids are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    User,
    Group,
}

fn ids(owner: &mut Owner, kind: Kind) -> &mut Ids {
    match kind {
        Kind::User => &mut owner.user,
        Kind::Group => &mut owner.group,
    }
}

impl Kernel {
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

    pub(crate) fn get_ids(&mut self, tid: Tid, kind: Kind, a: [u64; 6]) -> Outcome {
        let ids = *ids(&mut self.process_of(tid).owner, kind);
        for (address, id) in a.into_iter().zip([ids.real, ids.effective, ids.saved]) {
            self.put(tid, address, &id)?;
        }
        Ok(0)
    }

    pub(crate) fn set_id(&mut self, tid: Tid, kind: Kind, id: u32) -> Outcome {
        let owner = &mut self.process_of(tid).owner;
        let privileged = owner.is_privileged();
        ids(owner, kind).set(id, privileged)?;
        Ok(0)
    }

    pub(crate) fn set_ids(&mut self, tid: Tid, kind: Kind, wanted: [u32; 3]) -> Outcome {
        let owner = &mut self.process_of(tid).owner;
        let privileged = owner.is_privileged();
        ids(owner, kind).set_all(wanted, privileged)?;
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
        if !self.process_of(tid).owner.is_privileged() {
            return Err(Errno::EPERM.into());
        }
        let count = usize::try_from(count).ok().filter(|count| *count <= 65_536);
        let mut groups = alloc::vec![0_u32; count.ok_or(Errno::EINVAL)?];
        self.read_user(tid, address, groups.as_mut_bytes())?;
        self.process_of(tid).owner.groups = groups;
        Ok(0)
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
        let privileged = self.process_of(tid).owner.is_privileged();
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
            0 => process.times,
            1 => self.thread(tid).times,
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
}
