//! Timers that run out: whose they are, and what happens then.

use alloc::collections::{BTreeMap, BTreeSet};

use linux_raw_sys::general::{SIGALRM, SIGPROF, SIGVTALRM};

use crate::kernel::Kernel;
use crate::process::signal::Info;
use crate::process::{Pid, Process};
use crate::wait::{Key, Tid};

/// A timer: when it runs out next, and how often, in ns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Timer {
    pub(crate) at: Option<u64>,
    pub(crate) interval: u64,
}

impl Timer {
    /// Goes on to the next time after `now`; how often it has run out.
    fn advance(&mut self, now: u64) -> u64 {
        let Some(at) = self.at.filter(|at| *at <= now) else {
            return 0;
        };
        let Some(periods) = (now - at).checked_div(self.interval) else {
            self.at = None;
            return 1;
        };
        self.at = at.checked_add((periods + 1).saturating_mul(self.interval));
        periods + 1
    }

    /// What is left at `now`, and the interval.
    pub(crate) fn left(self, now: u64) -> (u64, u64) {
        let left = self.at.map_or(0, |at| at.saturating_sub(now).max(1));
        (left, self.interval)
    }
}

/// Whom a POSIX timer tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notify {
    Nobody,
    /// By this signal.
    Process(u8),
    Thread(u8, Tid),
}

/// A timer of `timer_create`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PosixTimer {
    pub(crate) timer: Timer,
    pub(crate) notify: Notify,
    /// The program's own word, passed with the signal.
    pub(crate) value: u64,
    /// How often it had run out unseen when its last signal was sent.
    pub(crate) overrun: u64,
    pub(crate) clock: u32,
}

/// The timers of a process.
#[derive(Clone, Debug, Default)]
pub(crate) struct ProcessTimers {
    pub(crate) alarm: Timer,
    /// In processor time: of the program alone, and with the kernel's for it.
    pub(crate) used: [Timer; 2],
    /// When to look at those next.
    look: Option<u64>,
    pub(crate) posix: BTreeMap<u32, PosixTimer>,
}

/// A timer that can be read.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct TimerFile {
    pub(crate) timer: Timer,
    pub(crate) clock: u32,
    /// How often it has run out since it was read.
    pub(crate) expired: u64,
}

/// Whose timer it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Owner {
    Alarm(Pid),
    /// It is time to look how much time a process has used.
    Used(Pid),
    Posix(Pid, u32),
    File(u32),
}

/// Timers that run, by the time when they run out.
#[derive(Debug, Default)]
pub(crate) struct Running(BTreeSet<(u64, Owner)>);

impl Running {
    /// When the next one runs out.
    pub(crate) fn next(&self) -> Option<u64> {
        Some(self.0.first()?.0)
    }

    /// One timer instead of another of the same owner.
    fn change(&mut self, owner: Owner, old: Option<u64>, new: Option<u64>) {
        if let Some(at) = old {
            self.0.remove(&(at, owner));
        }
        self.0.extend(new.map(|at| (at, owner)));
    }

    fn take_due(&mut self, now: u64) -> Option<(u64, Owner)> {
        let first = *self.0.first()?;
        (first.0 <= now && self.0.remove(&first)).then_some(first)
    }
}

/// Processor time used, as the two timers of it count.
fn used(process: &Process) -> [u64; 2] {
    [
        process.times.user,
        process.times.user + process.times.system,
    ]
}

impl Kernel {
    fn timer_mut(&mut self, owner: Owner) -> Option<&mut Timer> {
        Some(match owner {
            Owner::Alarm(pid) => &mut self.processes.get_mut(&pid)?.timers.alarm,
            Owner::Posix(pid, id) => {
                let process = self.processes.get_mut(&pid)?;
                &mut process.timers.posix.get_mut(&id)?.timer
            }
            Owner::File(id) => &mut self.timer_files.get_mut(id)?.timer,
            Owner::Used(_) => return None,
        })
    }

    /// Sets a timer; returns what it was.
    pub(crate) fn set_timer(&mut self, owner: Owner, new: Timer) -> Timer {
        let Some(timer) = self.timer_mut(owner) else {
            return Timer::default();
        };
        let old = core::mem::replace(timer, new);
        self.running_timers.change(owner, old.at, new.at);
        old
    }

    /// Sets a timer of used time, 0 or 1; returns what it was.
    pub(crate) fn set_used_timer(&mut self, pid: Pid, which: usize, new: Timer) -> Timer {
        let Some(process) = self.processes.get_mut(&pid) else {
            return Timer::default();
        };
        let old = core::mem::replace(&mut process.timers.used[which], new);
        self.check_used(pid);
        old
    }

    /// Processor time that a process has used, as the timers of it count.
    pub(crate) fn used_time(&self, pid: Pid, which: usize) -> u64 {
        self.processes
            .get(&pid)
            .map_or(0, |process| used(process)[which])
    }

    /// Stops all timers of a process.
    pub(crate) fn drop_timers(&mut self, pid: Pid, with_alarms: bool) {
        let Some(process) = self.processes.get_mut(&pid) else {
            return;
        };
        let posix = core::mem::take(&mut process.timers.posix);
        for (id, timer) in posix {
            let owner = Owner::Posix(pid, id);
            self.running_timers.change(owner, timer.timer.at, None);
        }
        if with_alarms {
            self.set_timer(Owner::Alarm(pid), Timer::default());
            if let Some(process) = self.processes.get_mut(&pid) {
                process.timers.used = Default::default();
                let look = process.timers.look.take();
                self.running_timers.change(Owner::Used(pid), look, None);
            }
        }
    }

    /// Timers whose time has come.
    pub(crate) fn run_due_timers(&mut self, now: u64) {
        while let Some((_, owner)) = self.running_timers.take_due(now) {
            if let Owner::Used(pid) = owner {
                self.charge_others(pid);
                self.check_used(pid);
                continue;
            }
            let Some(timer) = self.timer_mut(owner) else {
                continue;
            };
            let times = timer.advance(now);
            let next = timer.at;
            self.running_timers.change(owner, None, next);
            match owner {
                Owner::Alarm(pid) => self.send_to_process(pid, from_kernel(SIGALRM)),
                Owner::Posix(pid, id) => self.notify(pid, id, times),
                Owner::File(id) => {
                    if let Some(file) = self.timer_files.get_mut(id) {
                        file.expired += times;
                    }
                    self.wake(Key::Timer(id));
                }
                Owner::Used(_) => {}
            }
        }
    }

    fn notify(&mut self, pid: Pid, id: u32, times: u64) {
        const SI_TIMER: i32 = -2;
        let Some(process) = self.processes.get_mut(&pid) else {
            return;
        };
        let Some(timer) = process.timers.posix.get_mut(&id) else {
            return;
        };
        let (signal, target) = match timer.notify {
            Notify::Nobody => return,
            Notify::Process(signal) => (signal, None),
            Notify::Thread(signal, tid) => (signal, Some(tid)),
        };
        let pending = match target {
            None => &mut process.pending,
            Some(tid) => match self.threads.get_mut(&tid) {
                Some(thread) if thread.pid == pid => &mut thread.pending,
                _ => return,
            },
        };
        let word = |overrun: u64| u64::from(id) | overrun.min(i32::MAX as u64) << 32;
        // One signal at a time: what comes meanwhile is counted.
        let waiting = pending.find(|info| {
            (info.signal, info.code) == (signal, SI_TIMER)
                && info.words[0] & u64::from(u32::MAX) == u64::from(id)
        });
        if let Some(info) = waiting {
            timer.overrun += times;
            info.words[0] = word(timer.overrun);
            return;
        }
        timer.overrun = times - 1;
        let info = Info {
            signal,
            code: SI_TIMER,
            words: [word(timer.overrun), timer.value, 0],
        };
        match target {
            None => self.send_to_process(pid, info),
            Some(tid) => self.send_to_thread(tid, info),
        }
    }

    /// Looks whether a process has used as much time as it wants to know of,
    /// and when to look again.
    fn check_used(&mut self, pid: Pid) {
        /// Not more often than this, in ns.
        const LEAST: u64 = 1_000_000;
        let now = self.now();
        let Some(process) = self.processes.get_mut(&pid) else {
            return;
        };
        let so_far = used(process);
        let mut due = [false; 2];
        let mut wait = None;
        for ((timer, due), so_far) in process.timers.used.iter_mut().zip(&mut due).zip(so_far) {
            *due = timer.advance(so_far) > 0;
            let rest = timer.at.map(|at| at - so_far);
            wait = wait.into_iter().chain(rest).min();
        }
        // All its threads use time at once.
        let threads = process.threads.len().max(1) as u64;
        let next = wait.map(|wait| now.saturating_add((wait / threads).max(LEAST)));
        let before = core::mem::replace(&mut process.timers.look, next);
        self.running_timers.change(Owner::Used(pid), before, next);
        for (due, signal) in due.into_iter().zip([SIGVTALRM, SIGPROF]) {
            if due {
                self.send_to_process(pid, from_kernel(signal));
            }
        }
    }
}

fn from_kernel(signal: u32) -> Info {
    Info::from_kernel(u8::try_from(signal).expect("a small number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_that_was_missed_says_how_often() {
        let mut timer = Timer {
            at: Some(100),
            interval: 10,
        };
        assert_eq!((timer.advance(99), timer.at), (0, Some(100)));
        assert_eq!((timer.advance(100), timer.at), (1, Some(110)));
        assert_eq!((timer.advance(135), timer.at), (3, Some(140)));
        timer.interval = 0;
        assert_eq!((timer.advance(1000), timer.at), (1, None));
        assert_eq!(timer.advance(u64::MAX), 0);
    }

    #[test]
    fn timers_run_out_in_order_and_once() {
        let mut running = Running::default();
        running.change(Owner::File(1), None, Some(20));
        running.change(Owner::Alarm(1), None, Some(10));
        running.change(Owner::File(1), Some(20), Some(5));
        assert_eq!((running.next(), running.take_due(4)), (Some(5), None));
        assert_eq!(running.take_due(30), Some((5, Owner::File(1))));
        assert_eq!(running.take_due(30), Some((10, Owner::Alarm(1))));
        assert_eq!(running.take_due(30), None);
    }
}
