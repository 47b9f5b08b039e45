//! Clocks and sleeping.

use linux_raw_sys::general::{
    CLOCK_BOOTTIME, CLOCK_MONOTONIC, CLOCK_MONOTONIC_COARSE, CLOCK_MONOTONIC_RAW,
    CLOCK_PROCESS_CPUTIME_ID, CLOCK_REALTIME, CLOCK_REALTIME_COARSE, CLOCK_THREAD_CPUTIME_ID,
    TIMER_ABSTIME,
};

use crate::errno::{Errno, Outcome, Result};
use crate::kernel::Kernel;
use crate::wait::{Key, Tid};

const NS: u64 = 1_000_000_000;
/// Negative clocks count processor time: the low two bits say which, the third
/// that it is a thread's, the rest is the complement of its number, or of 0 for
/// the caller's.
const WHICH_TIME: u32 = 3;
const ALL_TICKS: u32 = 0;
const USER_TIME: u32 = 1;
const ALL_TIME: u32 = 2;
const OF_THREAD: u32 = 4;
const OWN_PROCESS: u32 = !0 << 3 | ALL_TIME;
const OWN_THREAD: u32 = OWN_PROCESS | OF_THREAD;

impl Kernel {
    /// A time in a thread's memory, in ns.
    pub(crate) fn timespec(&mut self, tid: Tid, address: u64) -> Result<u64> {
        let [seconds, ns]: [u64; 2] = self.get(tid, address)?;
        if ns >= NS || seconds.cast_signed() < 0 {
            return Err(Errno::EINVAL);
        }
        Ok(seconds.saturating_mul(NS).saturating_add(ns))
    }

    pub(crate) fn put_timespec(&mut self, tid: Tid, address: u64, time: u64) -> Result<()> {
        self.put_if(tid, address, &[time / NS, time % NS])
    }

    fn clock(&mut self, tid: Tid, clock: u32) -> Result<u64> {
        Ok(match clock {
            CLOCK_REALTIME | CLOCK_REALTIME_COARSE => self.wall(),
            CLOCK_MONOTONIC | CLOCK_MONOTONIC_COARSE | CLOCK_MONOTONIC_RAW | CLOCK_BOOTTIME => {
                self.now()
            }
            CLOCK_PROCESS_CPUTIME_ID => self.used(tid, OWN_PROCESS)?,
            CLOCK_THREAD_CPUTIME_ID => self.used(tid, OWN_THREAD)?,
            clock if clock.cast_signed() < 0 => self.used(tid, clock)?,
            _ => return Err(Errno::EINVAL),
        })
    }

    /// A clock of somebody's processor time: see `WHICH_TIME`.
    fn used(&mut self, tid: Tid, clock: u32) -> Result<u64> {
        let here = self.machine.cpu();
        if self.scheduler.current(here) == Some(tid) {
            // Not all calls are charged when they begin.
            self.charge_user(here, tid);
        }
        let me = self.pid_of(tid);
        let whose = (!(clock.cast_signed() >> 3)).cast_unsigned();
        let times = match (clock & OF_THREAD, whose) {
            (0, 0) => self.process_of(tid).times,
            (0, pid) => self.processes.get(&pid).ok_or(Errno::EINVAL)?.times,
            (_, 0) => self.thread(tid).times,
            (_, other) => match self.threads.get(&other) {
                Some(thread) if thread.pid == me => thread.times,
                _ => return Err(Errno::EINVAL),
            },
        };
        match clock & WHICH_TIME {
            USER_TIME => Ok(times.user),
            ALL_TICKS | ALL_TIME => Ok(times.all()),
            _ => Err(Errno::EINVAL),
        }
    }

    pub(crate) fn clock_gettime(&mut self, tid: Tid, clock: u32, address: u64) -> Outcome {
        let time = self.clock(tid, clock)?;
        self.put_timespec(tid, address, time)?;
        Ok(0)
    }

    /// Only the wall clock can be set.
    pub(crate) fn clock_settime(&mut self, tid: Tid, clock: u32, address: u64) -> Outcome {
        let time = self.timespec(tid, address)?;
        if clock != CLOCK_REALTIME {
            return Err(Errno::EINVAL.into());
        }
        if !self.process_of(tid).owner.is_privileged() {
            return Err(Errno::EPERM.into());
        }
        // It can't be before the VM was made.
        let start = time.checked_sub(self.now()).ok_or(Errno::EINVAL)?;
        self.boot_wall_ns = start;
        self.vdso.set_clock(&self.objects.frames, start);
        Ok(0)
    }

    pub(crate) fn clock_getres(&mut self, tid: Tid, clock: u32, address: u64) -> Outcome {
        self.clock(tid, clock)?;
        self.put_timespec(tid, address, 1)?;
        Ok(0)
    }

    /// The zone is that of Greenwich.
    pub(crate) fn gettimeofday(&mut self, tid: Tid, address: u64, zone: u64) -> Outcome {
        let time = self.wall();
        self.put_if(tid, address, &[time / NS, time % NS / 1000])?;
        self.put_if(tid, zone, &[0_u32; 2])?;
        Ok(0)
    }

    pub(crate) fn time(&mut self, tid: Tid, address: u64) -> Outcome {
        let seconds = self.wall() / NS;
        self.put_if(tid, address, &seconds)?;
        Ok(seconds)
    }

    pub(crate) fn times(&mut self, tid: Tid, address: u64) -> Outcome {
        let ticks = |ns: u64| ns / (NS / 100);
        let process = self.process_of(tid);
        let words = [
            ticks(process.times.user),
            ticks(process.times.system),
            ticks(process.children.user),
            ticks(process.children.system),
        ];
        self.put_if(tid, address, &words)?;
        Ok(ticks(self.now()))
    }

    pub(crate) fn sleep(
        &mut self,
        tid: Tid,
        clock: u32,
        flags: u32,
        time: u64,
        left: u64,
    ) -> Outcome {
        let call = self.thread(tid).call.ok_or(Errno::EINVAL)?;
        let deadline = match call.deadline {
            Some(at) => at,
            None => {
                let time = self.timespec(tid, time)?;
                let now = self.clock(tid, clock)?;
                let wait = match flags & TIMER_ABSTIME {
                    0 => time,
                    _ => time.saturating_sub(now),
                };
                self.now().saturating_add(wait)
            }
        };
        if deadline <= self.now() {
            return Ok(0);
        }
        // What is left if a signal comes: stored now, as nothing runs then.
        if flags & TIMER_ABSTIME == 0 && left != 0 {
            let rest = deadline - self.now();
            self.put_timespec(tid, left, rest)?;
        }
        Err(self.block(tid, &[Key::Time], Some(deadline)))
    }
}
