//! Timers: alarms, `setitimer`, `timer_create` and its relatives, timers and
//! signals that are read like files.

use linux_raw_sys::general::{
    CLOCK_BOOTTIME, CLOCK_MONOTONIC, CLOCK_REALTIME, ITIMER_PROF, ITIMER_REAL, ITIMER_VIRTUAL,
    O_CLOEXEC, O_NONBLOCK, O_RDWR, SIGALRM, SIGEV_NONE, SIGEV_SIGNAL, SIGEV_THREAD_ID,
    TFD_TIMER_ABSTIME, TIMER_ABSTIME,
};

use super::low;
use super::signals::signal_number;
use crate::errno::{Errno, Outcome, Result};
use crate::kernel::Kernel;
use crate::process::Pid;
use crate::process::files::{FileId, Object, OpenFile};
use crate::process::signal::{Info, UNBLOCKABLE};
use crate::timers::{Notify, Owner, PosixTimer, Timer, TimerFile};
use crate::wait::Tid;

const NS: u64 = 1_000_000_000;
/// Most timers of one process.
const MOST_TIMERS: usize = 1024;

impl Kernel {
    pub(crate) fn alarm(&mut self, tid: Tid, seconds: u32) -> Outcome {
        let now = self.now();
        let pid = self.pid_of(tid);
        let at = (seconds > 0).then(|| now + u64::from(seconds) * NS);
        let old = self.set_timer(Owner::Alarm(pid), Timer { at, interval: 0 });
        Ok(old.left(now).0.div_ceil(NS))
    }

    fn put_interval(&mut self, tid: Tid, address: u64, left: (u64, u64)) -> Result<()> {
        let (left, interval) = left;
        // Not 0 for a timer that runs.
        let left = left.next_multiple_of(1000);
        let words = [
            interval / NS,
            interval % NS / 1000,
            left / NS,
            left % NS / 1000,
        ];
        self.put_if(tid, address, &words)
    }

    pub(crate) fn setitimer(&mut self, tid: Tid, which: u32, new: u64, old: u64) -> Outcome {
        let words: [u64; 4] = match new {
            0 => [0; 4],
            address => self.get(tid, address)?,
        };
        let time = |seconds: u64, us: u64| seconds.saturating_mul(NS).saturating_add(us * 1000);
        if words[1] >= 1_000_000 || words[3] >= 1_000_000 {
            return Err(Errno::EINVAL.into());
        }
        let (interval, value) = (time(words[0], words[1]), time(words[2], words[3]));
        let pid = self.pid_of(tid);
        let now = self.timer_clock(pid, which)?;
        let at = (value > 0).then(|| now.saturating_add(value));
        let new = Timer { at, interval };
        let before = match which {
            ITIMER_REAL => self.set_timer(Owner::Alarm(pid), new),
            _ => self.set_used_timer(pid, usize::from(which == ITIMER_PROF), new),
        };
        self.put_interval(tid, old, before.left(now))?;
        Ok(0)
    }

    /// What the clock of one of a process's three timers says.
    fn timer_clock(&mut self, pid: Pid, which: u32) -> Result<u64> {
        match which {
            ITIMER_REAL => Ok(self.now()),
            ITIMER_VIRTUAL => Ok(self.used_time(pid, 0)),
            ITIMER_PROF => Ok(self.used_time(pid, 1)),
            _ => Err(Errno::EINVAL),
        }
    }

    pub(crate) fn getitimer(&mut self, tid: Tid, which: u32, address: u64) -> Outcome {
        let pid = self.pid_of(tid);
        let now = self.timer_clock(pid, which)?;
        let timers = &self.process_of(tid).timers;
        let timer = match which {
            ITIMER_REAL => timers.alarm,
            _ => timers.used[usize::from(which == ITIMER_PROF)],
        };
        self.put_interval(tid, address, timer.left(now))?;
        Ok(0)
    }

    /// Interval and value of an `itimerspec` as a timer; `absolute` if its
    /// value is a time of the clock.
    fn timer_spec(&mut self, tid: Tid, address: u64, clock: u32, absolute: bool) -> Result<Timer> {
        let interval = self.timespec(tid, address)?;
        let value = self.timespec(tid, address.checked_add(16).ok_or(Errno::EFAULT)?)?;
        let at = match (absolute, clock) {
            _ if value == 0 => None,
            (true, CLOCK_REALTIME) => Some(value.saturating_sub(self.boot_wall_ns).max(1)),
            (true, _) => Some(value),
            (false, _) => Some(self.now().saturating_add(value)),
        };
        Ok(Timer { at, interval })
    }

    fn put_timer_spec(&mut self, tid: Tid, address: u64, timer: Timer) -> Result<()> {
        if address == 0 {
            return Ok(());
        }
        let (left, interval) = timer.left(self.now());
        self.put(
            tid,
            address,
            &[interval / NS, interval % NS, left / NS, left % NS],
        )
    }

    pub(crate) fn timer_create(
        &mut self,
        tid: Tid,
        clock: u32,
        event: u64,
        address: u64,
    ) -> Outcome {
        if ![CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_BOOTTIME].contains(&clock) {
            // Those of processor time are not there.
            return Err(match clock {
                2 | 3 => Errno::EOPNOTSUPP,
                _ => Errno::EINVAL,
            }
            .into());
        }
        let pid = self.pid_of(tid);
        let posix = &self.process_of(tid).timers.posix;
        let id = (0..)
            .find(|id| !posix.contains_key(id))
            .ok_or(Errno::EAGAIN)?;
        if posix.len() >= MOST_TIMERS {
            return Err(Errno::EAGAIN.into());
        }
        let (notify, value) = match event {
            0 => {
                let signal = u8::try_from(SIGALRM).expect("a small number");
                (Notify::Process(signal), u64::from(id))
            }
            address => self.notification(tid, pid, address)?,
        };
        self.put(tid, address, &id)?;
        let timer = PosixTimer {
            timer: Timer::default(),
            notify,
            value,
            overrun: 0,
            clock,
        };
        self.process_of(tid).timers.posix.insert(id, timer);
        Ok(0)
    }

    /// What a `sigevent` asks for.
    fn notification(&mut self, tid: Tid, pid: Pid, address: u64) -> Result<(Notify, u64)> {
        let [value, kinds, target]: [u64; 3] = self.get(tid, address)?;
        let signal = || match signal_number(low(kinds))? {
            0 => Err(Errno::EINVAL),
            signal => Ok(signal),
        };
        let notify = match low(kinds >> 32) {
            SIGEV_NONE => Notify::Nobody,
            SIGEV_SIGNAL => Notify::Process(signal()?),
            SIGEV_THREAD_ID => {
                let target = low(target);
                let thread = self.threads.get(&target);
                if thread.is_none_or(|thread| thread.pid != pid) {
                    return Err(Errno::EINVAL);
                }
                Notify::Thread(signal()?, target)
            }
            _ => return Err(Errno::EINVAL),
        };
        Ok((notify, value))
    }

    fn posix_timer(&mut self, tid: Tid, id: u32) -> Result<PosixTimer> {
        let timers = &self.process_of(tid).timers.posix;
        timers.get(&id).copied().ok_or(Errno::EINVAL)
    }

    pub(crate) fn timer_settime(
        &mut self,
        tid: Tid,
        id: u32,
        flags: u32,
        new: u64,
        old: u64,
    ) -> Outcome {
        let clock = self.posix_timer(tid, id)?.clock;
        let new = self.timer_spec(tid, new, clock, flags & TIMER_ABSTIME != 0)?;
        let pid = self.pid_of(tid);
        let before = self.set_timer(Owner::Posix(pid, id), new);
        self.put_timer_spec(tid, old, before)?;
        Ok(0)
    }

    pub(crate) fn timer_gettime(&mut self, tid: Tid, id: u32, address: u64) -> Outcome {
        let timer = self.posix_timer(tid, id)?.timer;
        self.put_timer_spec(tid, address, timer)?;
        Ok(0)
    }

    pub(crate) fn timer_getoverrun(&mut self, tid: Tid, id: u32) -> Outcome {
        Ok(self.posix_timer(tid, id)?.overrun.min(i32::MAX as u64))
    }

    pub(crate) fn timer_delete(&mut self, tid: Tid, id: u32) -> Outcome {
        self.posix_timer(tid, id)?;
        let pid = self.pid_of(tid);
        self.set_timer(Owner::Posix(pid, id), Timer::default());
        self.process_of(tid).timers.posix.remove(&id);
        Ok(0)
    }

    pub(crate) fn timerfd_create(&mut self, tid: Tid, clock: u32, flags: u32) -> Outcome {
        let known = [CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_BOOTTIME].contains(&clock);
        if !known || flags & !(O_CLOEXEC | O_NONBLOCK) != 0 {
            return Err(Errno::EINVAL.into());
        }
        self.check_memory()?;
        let timer = self.timer_files.insert(TimerFile {
            clock,
            ..TimerFile::default()
        });
        let file = OpenFile::new(Object::Timer(timer), None, O_RDWR | flags & O_NONBLOCK);
        Ok(self.add_file(tid, file, flags)?.into())
    }

    fn timer_file(&mut self, tid: Tid, number: u32) -> Result<(u32, TimerFile)> {
        let id = self.file_id(tid, number)?;
        let Object::Timer(timer) = self.file(id).object else {
            return Err(Errno::EINVAL);
        };
        let file = self.timer_files.get(timer).ok_or(Errno::EBADF)?;
        Ok((timer, *file))
    }

    pub(crate) fn timerfd_settime(
        &mut self,
        tid: Tid,
        number: u32,
        flags: u32,
        new: u64,
        old: u64,
    ) -> Outcome {
        const CANCEL_ON_SET: u32 = 2;
        if flags & !(TFD_TIMER_ABSTIME | CANCEL_ON_SET) != 0 {
            return Err(Errno::EINVAL.into());
        }
        let (id, file) = self.timer_file(tid, number)?;
        let new = self.timer_spec(tid, new, file.clock, flags & TFD_TIMER_ABSTIME != 0)?;
        let before = self.set_timer(Owner::File(id), new);
        if let Some(file) = self.timer_files.get_mut(id) {
            file.expired = 0;
        }
        self.put_timer_spec(tid, old, before)?;
        Ok(0)
    }

    pub(crate) fn timerfd_gettime(&mut self, tid: Tid, number: u32, address: u64) -> Outcome {
        let (_, file) = self.timer_file(tid, number)?;
        self.put_timer_spec(tid, address, file.timer)?;
        Ok(0)
    }

    /// `signalfd4`: a new file, or another set for one that is there.
    pub(crate) fn signalfd(
        &mut self,
        tid: Tid,
        number: u32,
        set: u64,
        size: u64,
        flags: u32,
    ) -> Outcome {
        if size != 8 || flags & !(O_CLOEXEC | O_NONBLOCK) != 0 {
            return Err(Errno::EINVAL.into());
        }
        let set: u64 = self.get(tid, set)?;
        let set = set & !UNBLOCKABLE;
        if number == u32::MAX {
            self.check_memory()?;
            let file = OpenFile::new(Object::Signals(set), None, O_RDWR | flags & O_NONBLOCK);
            return Ok(self.add_file(tid, file, flags)?.into());
        }
        let id = self.file_id(tid, number)?;
        match &mut self.file(id).object {
            Object::Signals(old) => *old = set,
            _ => return Err(Errno::EINVAL.into()),
        }
        Ok(number.into())
    }

    /// Signals of a set that the caller has, to be read.
    pub(crate) fn pending_of(&mut self, tid: Tid, set: u64) -> u64 {
        let shared = self.process_of(tid).pending.set();
        (self.thread(tid).pending.set() | shared) & set
    }

    /// Takes one of them, as a `signalfd_siginfo`.
    pub(crate) fn take_signal(&mut self, tid: Tid, id: FileId) -> Option<[u8; 128]> {
        let Object::Signals(set) = self.file(id).object else {
            return None;
        };
        let info = match self.thread(tid).pending.take(set) {
            Some(info) => info,
            None => self.process_of(tid).pending.take(set)?,
        };
        Some(signal_record(&info))
    }
}

/// The kernel's `signalfd_siginfo`. Sender and timer share their place, as in
/// `siginfo_t`.
fn signal_record(info: &Info) -> [u8; 128] {
    const SI_TIMER: i32 = -2;
    const SIGCHLD: u8 = 17;
    let mut bytes = [0; 128];
    let mut put = |at: usize, value: u32| {
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    };
    put(0, info.signal.into());
    put(8, info.code.cast_unsigned());
    let (first, second) = (low(info.words[0]), low(info.words[0] >> 32));
    if info.code == SI_TIMER {
        put(24, first);
        put(32, second);
    } else {
        put(12, first);
        put(16, second);
    }
    if info.signal == SIGCHLD {
        put(40, low(info.words[1]));
    } else {
        put(44, low(info.words[1]));
        put(48, low(info.words[1]));
        put(52, low(info.words[1] >> 32));
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_that_is_read_says_who_sent_it() {
        let mut info = Info::from_process(17, 1, 42, 1000);
        info.words[1] = 3;
        let bytes = signal_record(&info);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"));
        assert_eq!(
            [word(0), word(8), word(12), word(16), word(40)],
            [17, 1, 42, 1000, 3]
        );
    }
}
