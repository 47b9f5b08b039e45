//! Processes as files, and signals that bring a word along.

use linux_raw_sys::general::{O_CLOEXEC, O_NONBLOCK, O_RDWR};

use super::signals::signal_number;
use crate::errno::{Errno, Outcome, Result};
use crate::fs::Place;
use crate::fs::proc::ProcPlace;
use crate::kernel::Kernel;
use crate::process::files::{Object, OpenFile};
use crate::process::signal::Info;
use crate::process::{Pid, State};
use crate::wait::Tid;

/// As `si_code`: sent by tgkill.
const SI_TKILL: i32 = -6;

impl Kernel {
    /// Whether a process is no longer, or only waits to be asked for its end.
    pub(super) fn has_ended(&self, pid: Pid, started: u64) -> bool {
        let process = self.processes.get(&pid);
        process.is_none_or(|process| {
            process.started != started || matches!(process.state, State::Ended(_))
        })
    }

    pub(crate) fn pidfd_open(&mut self, tid: Tid, pid: u32, flags: u32) -> Outcome {
        if flags & !O_NONBLOCK != 0 || pid.cast_signed() <= 0 {
            return Err(Errno::EINVAL.into());
        }
        let Some(process) = self.processes.get(&pid) else {
            return match self.threads.contains_key(&pid) {
                true => Err(Errno::EINVAL.into()),
                false => Err(Errno::ESRCH.into()),
            };
        };
        let started = process.started;
        self.check_memory()?;
        let file = OpenFile::new(Object::Process { pid, started }, None, O_RDWR | flags);
        Ok(self.add_file(tid, file, O_CLOEXEC)?.into())
    }

    /// The process that a descriptor stands for, if it is still there.
    pub(super) fn process_behind(&mut self, tid: Tid, number: u32) -> Result<Pid> {
        let id = self.file_id(tid, number)?;
        let file = self.file(id);
        let (pid, started) = match (&file.object, file.place) {
            (Object::Process { pid, started }, _) => (*pid, Some(*started)),
            (_, Some(Place::Proc(ProcPlace::Process(pid)))) => (pid, None),
            _ => return Err(Errno::EBADF),
        };
        match self.processes.get(&pid) {
            Some(process) if started.is_none_or(|at| at == process.started) => Ok(pid),
            _ => Err(Errno::ESRCH),
        }
    }

    pub(crate) fn pidfd_send_signal(
        &mut self,
        tid: Tid,
        number: u32,
        signal: u32,
        info: u64,
        flags: u32,
    ) -> Outcome {
        if flags != 0 {
            return Err(Errno::EINVAL.into());
        }
        let pid = self.process_behind(tid, number)?;
        match info {
            0 => self.kill(tid, pid.cast_signed(), signal),
            info => self.sigqueueinfo(tid, pid, signal, info),
        }
    }

    /// The caller's `siginfo_t`, if it may send this.
    fn info(&mut self, tid: Tid, pid: Pid, signal: u32, address: u64) -> Result<Info> {
        let signal = signal_number(signal)?;
        let bytes: [u8; 40] = self.get(tid, address)?;
        let code = i32::from_le_bytes(*bytes[8..].first_chunk().expect("long enough"));
        // Nobody but itself may take a signal for the kernel's.
        if (code >= 0 || code == SI_TKILL) && pid != self.pid_of(tid) {
            return Err(Errno::EPERM);
        }
        let word = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().expect("long enough"));
        let words = [word(16), word(24), word(32)];
        Ok(Info {
            signal,
            code,
            words,
        })
    }

    pub(crate) fn sigqueueinfo(&mut self, tid: Tid, pid: Pid, signal: u32, info: u64) -> Outcome {
        let info = self.info(tid, pid, signal, info)?;
        if !self.processes.contains_key(&pid) {
            return Err(Errno::ESRCH.into());
        }
        if !self.may_signal(tid, pid) {
            return Err(Errno::EPERM.into());
        }
        if signal != 0 {
            self.send_to_process(pid, info);
        }
        Ok(0)
    }

    pub(crate) fn tgsigqueueinfo(
        &mut self,
        tid: Tid,
        pid: Pid,
        target: Tid,
        signal: u32,
        info: u64,
    ) -> Outcome {
        let info = self.info(tid, pid, signal, info)?;
        match self.threads.get(&target) {
            Some(thread) if thread.pid == pid => {}
            _ => return Err(Errno::ESRCH.into()),
        }
        if !self.may_signal(tid, pid) {
            return Err(Errno::EPERM.into());
        }
        if signal != 0 {
            self.send_to_thread(target, info);
        }
        Ok(0)
    }
}
