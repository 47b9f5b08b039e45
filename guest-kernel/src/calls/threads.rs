//! What concerns one thread: its identity and lists, futexes, its name, where
//! it runs.

use linux_raw_sys::general::{
    FUTEX_BITSET_MATCH_ANY, FUTEX_CLOCK_REALTIME, FUTEX_CMP_REQUEUE, FUTEX_LOCK_PI, FUTEX_LOCK_PI2,
    FUTEX_PRIVATE_FLAG, FUTEX_REQUEUE, FUTEX_TRYLOCK_PI, FUTEX_UNLOCK_PI, FUTEX_WAIT,
    FUTEX_WAIT_BITSET, FUTEX_WAKE, FUTEX_WAKE_BITSET,
};
use linux_raw_sys::prctl::{
    PR_CAPBSET_READ, PR_GET_DUMPABLE, PR_GET_KEEPCAPS, PR_GET_NAME, PR_GET_NO_NEW_PRIVS,
    PR_SET_DUMPABLE, PR_SET_NAME, PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG,
};

use super::low;
use crate::errno::{Errno, Outcome};
use crate::futex::{ANY, Scope};
use crate::kernel::Kernel;
use crate::pi::{OWNER_DIED, WAITERS};
use crate::process::Call;
use crate::sched::CpuSet;
use crate::wait::Tid;

/// Addresses that segment bases may have.
const USER_LIMIT: u64 = crate::mem::tables::USER_END;
/// Most locks that are looked at: the list is the program's, and may have no
/// end.
const MOST_LOCKS: u32 = 2048;

impl Kernel {
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
                self.end_lock(tid, entry, offset);
            }
            let Ok(next) = self.get::<u64>(tid, entry & !1) else {
                break;
            };
            entry = next;
            left -= 1;
        }
        if pending & !1 != 0 {
            self.end_lock(tid, pending, offset);
        }
    }

    /// The lowest bit of an entry says that the lock is handed on by the
    /// kernel.
    fn end_lock(&mut self, tid: Tid, entry: u64, offset: u64) {
        let address = (entry & !1).wrapping_add(offset);
        if entry & 1 != 0 {
            // A lock is used in one scope; which one, only who waits tells.
            let shared = self.futex_place(tid, address, Scope::Shared);
            let scope = match shared {
                Ok((word, ..)) if self.futexes.has(word) => Scope::Shared,
                _ => Scope::Private,
            };
            // Not its own after all, or the page is gone.
            let _ = self.hand_on(tid, address, scope, OWNER_DIED);
            return;
        }
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

    pub(crate) fn get_robust_list(
        &mut self,
        tid: Tid,
        which: u32,
        address: u64,
        len: u64,
    ) -> Outcome {
        let which = self.thread_named(tid, which)?;
        let pid = self.pid_of(which);
        if !self.may_signal(tid, pid) {
            return Err(Errno::EPERM.into());
        }
        let head = self.thread(which).robust_list;
        self.put(tid, len, &24_u64)?;
        self.put(tid, address, &head)?;
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
            FUTEX_LOCK_PI | FUTEX_LOCK_PI2 | FUTEX_TRYLOCK_PI => {
                let deadline = match (call.deadline, timeout) {
                    (None, at) if at != 0 && command != FUTEX_TRYLOCK_PI => {
                        let time = self.timespec(tid, at)?;
                        let of_wall =
                            command == FUTEX_LOCK_PI || operation & FUTEX_CLOCK_REALTIME != 0;
                        let start = if of_wall { self.boot_wall_ns } else { 0 };
                        Some(time.saturating_sub(start))
                    }
                    (settled, _) => settled,
                };
                self.lock_owned(tid, address, scope, command != FUTEX_TRYLOCK_PI, deadline)
            }
            FUTEX_UNLOCK_PI => self.unlock_owned(tid, address, scope),
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

    pub(crate) fn sched_yield(&mut self, tid: Tid) -> Outcome {
        self.thread(tid).yields = true;
        Ok(0)
    }

    /// The thread that a call means; 0 is the caller.
    fn thread_named(&self, tid: Tid, which: u32) -> Result<Tid, Errno> {
        let which = if which == 0 { tid } else { which };
        match self.threads.contains_key(&which) {
            true => Ok(which),
            false => Err(Errno::ESRCH),
        }
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
        let which = self.thread_named(tid, which)?;
        let allowed = self.thread(which).allowed.0 & self.scheduler.all().0;
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
        let which = self.thread_named(tid, which)?;
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
