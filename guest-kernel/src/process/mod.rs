//! Processes and threads: plain data.

pub(crate) mod elf;
pub(crate) mod exec;
pub(crate) mod files;
pub(crate) mod frame;
pub(crate) mod life;
pub(crate) mod rseq;
pub(crate) mod signal;

use alloc::vec::Vec;

use linux_raw_sys::general::{
    RLIM_NLIMITS, RLIMIT_CORE, RLIMIT_MEMLOCK, RLIMIT_NOFILE, RLIMIT_NPROC, RLIMIT_STACK,
};

use crate::errno::{Errno, Result};
use crate::fs::Place;
use crate::fs::node::NodeId;
use crate::machine::{Fpu, Registers};
use crate::sched::CpuSet;
use crate::timers::ProcessTimers;
use crate::wait::{Key, Tid};
use files::Descriptors;
use rseq::Rseq;
use signal::{Actions, Pending};

/// A process by its number, which is that of its first thread.
pub(crate) type Pid = u32;

/// Soft and hard limit of one resource.
pub(crate) type Limit = (u64, u64);

/// How a process ended, as `wait` reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    Exit(u8),
    Signal(u8),
}

impl Ending {
    pub(crate) fn status(self) -> u32 {
        match self {
            Self::Exit(code) => u32::from(code) << 8,
            Self::Signal(signal) => signal.into(),
        }
    }
}

/// Whether a process goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Running,
    /// By this signal.
    Stopped(u8),
    /// Waits to be asked for its end.
    Ended(Ending),
}

/// The ids of a user or a group that a process has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ids {
    pub(crate) real: u32,
    pub(crate) effective: u32,
    pub(crate) saved: u32,
}

impl Ids {
    /// As setuid and setgid: all three if the caller may do anything, else
    /// the effective one to another of its own.
    pub(crate) fn set(&mut self, id: u32, privileged: bool) -> Result<()> {
        if privileged {
            (self.real, self.saved) = (id, id);
        } else if ![self.real, self.saved].contains(&id) {
            return Err(Errno::EPERM);
        }
        self.effective = id;
        Ok(())
    }

    /// As setresuid and setresgid: real, effective and saved, each left alone
    /// if it is `u32::MAX`.
    pub(crate) fn set_all(&mut self, wanted: [u32; 3], privileged: bool) -> Result<()> {
        let known = [self.real, self.effective, self.saved, u32::MAX];
        if !privileged && !wanted.iter().all(|id| known.contains(id)) {
            return Err(Errno::EPERM);
        }
        let places = [&mut self.real, &mut self.effective, &mut self.saved];
        for (id, place) in wanted.into_iter().zip(places) {
            if id != u32::MAX {
                *place = id;
            }
        }
        Ok(())
    }
}

/// User and groups.
#[derive(Clone, Debug, Default)]
pub(crate) struct Owner {
    pub(crate) user: Ids,
    pub(crate) group: Ids,
    pub(crate) groups: Vec<u32>,
}

impl Owner {
    /// Whether it may do what is not everybody's.
    pub(crate) fn is_privileged(&self) -> bool {
        self.user.effective == 0
    }
}

/// Processor time in ns.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Times {
    pub(crate) user: u64,
    pub(crate) system: u64,
}

impl Times {
    /// Both.
    pub(crate) fn all(self) -> u64 {
        self.user + self.system
    }
}

/// What the program is, for /proc and later execs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Program {
    pub(crate) path: Vec<u8>,
    /// The arguments, each with a zero byte behind it.
    pub(crate) arguments: Vec<u8>,
    pub(crate) environment: Vec<u8>,
}

/// A process.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) parent: Pid,
    pub(crate) group: Pid,
    pub(crate) session: Pid,
    pub(crate) threads: Vec<Tid>,
    pub(crate) state: State,
    /// A change of state that nobody has been told of yet.
    pub(crate) news: bool,
    /// It was continued and nobody has been told of it yet.
    pub(crate) continued: bool,
    /// Sent to the parent at the end; 0 for none.
    pub(crate) exit_signal: u8,
    /// The address space; none after the end.
    pub(crate) space: Option<u32>,
    pub(crate) files: Descriptors,
    pub(crate) root: NodeId,
    pub(crate) directory: Place,
    pub(crate) umask: u32,
    pub(crate) actions: Actions,
    pub(crate) pending: Pending,
    pub(crate) owner: Owner,
    pub(crate) limits: [Limit; RLIM_NLIMITS as usize],
    pub(crate) program: Program,
    /// The controlling terminal.
    pub(crate) terminal: Option<u32>,
    pub(crate) started: u64,
    pub(crate) times: Times,
    pub(crate) children: Times,
    pub(crate) timers: ProcessTimers,
    /// It runs in its parent's memory until it starts a program or ends.
    pub(crate) borrowed: bool,
    pub(crate) executed: bool,
    pub(crate) nice: i32,
}

/// The limits of the first process.
pub(crate) fn default_limits(memory: u64) -> [Limit; RLIM_NLIMITS as usize] {
    let mut limits = [(u64::MAX, u64::MAX); RLIM_NLIMITS as usize];
    let processes = memory >> 17;
    limits[RLIMIT_CORE as usize].0 = 0;
    limits[RLIMIT_STACK as usize].0 = 8 << 20;
    limits[RLIMIT_NOFILE as usize] = (1024, 1 << 16);
    limits[RLIMIT_NPROC as usize] = (processes, processes);
    limits[RLIMIT_MEMLOCK as usize] = (8 << 20, 8 << 20);
    limits
}

/// A system call that a thread is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) number: u32,
    pub(crate) arguments: [u64; 6],
    /// It has been made once, so that a signal may end it.
    pub(crate) tried: bool,
    /// When it gives up, in ns; settled when it first waits.
    pub(crate) deadline: Option<u64>,
    /// How much it has done.
    pub(crate) done: u64,
    /// A wake-up was meant for it alone (see [`crate::futex`]).
    pub(crate) woken: bool,
}

impl Call {
    /// The call that a thread with these registers makes.
    pub(crate) fn new(registers: &Registers) -> Self {
        // Numbers are 32 bits wide: the rest of the register is ignored.
        let [a, b, c, d, ..] = registers.rax.to_le_bytes();
        Self {
            number: u32::from_le_bytes([a, b, c, d]),
            arguments: [
                registers.rdi,
                registers.rsi,
                registers.rdx,
                registers.r10,
                registers.r8,
                registers.r9,
            ],
            tried: false,
            deadline: None,
            done: 0,
            woken: false,
        }
    }
}

/// An alternate stack for signals.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SignalStack {
    pub(crate) base: u64,
    pub(crate) len: u64,
}

/// A thread.
#[derive(Debug)]
pub(crate) struct Thread {
    pub(crate) pid: Pid,
    pub(crate) registers: Registers,
    pub(crate) fpu: Fpu,
    pub(crate) fs_base: u64,
    pub(crate) gs_base: u64,
    /// It waits, or its process is stopped: it is not on the run queue.
    pub(crate) waits: bool,
    pub(crate) keys: Vec<Key>,
    /// Where it may run, and where it did last.
    pub(crate) allowed: CpuSet,
    pub(crate) cpu: usize,
    /// It lets others run first.
    pub(crate) yields: bool,
    pub(crate) call: Option<Call>,
    /// Blocked signals, one bit each from bit 0 for signal 1.
    pub(crate) mask: u64,
    /// The mask to put back when a call that changed it ends.
    pub(crate) saved_mask: Option<u64>,
    pub(crate) pending: Pending,
    pub(crate) stack: SignalStack,
    /// Zeroed and woken when the thread ends.
    pub(crate) clear_tid: u64,
    pub(crate) robust_list: u64,
    pub(crate) rseq: Option<Rseq>,
    pub(crate) name: [u8; 16],
    /// The process it has borrowed its memory to runs in it.
    pub(crate) vfork_child: Option<Pid>,
    pub(crate) times: Times,
    /// The named pipe that it waits to open, and the mode: it counts as one of
    /// its ends meanwhile.
    pub(crate) opening: Option<(u32, u32)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_gave_its_rights_up_gets_back_only_what_it_kept() {
        let mut ids = Ids::default();
        assert_eq!(ids.set_all([1000, 1000, 0], true), Ok(()));
        assert_eq!(ids.set(7, false), Err(Errno::EPERM));
        assert_eq!(ids.set(0, false), Ok(()));
        assert_eq!((ids.real, ids.effective, ids.saved), (1000, 0, 0));
        assert_eq!(ids.set(1000, true), Ok(()));
        assert_eq!(ids.set(0, false), Err(Errno::EPERM));
        let same = [u32::MAX, 1000, u32::MAX];
        assert_eq!(ids.set_all(same, false), Ok(()));
        assert_eq!(
            ids.set_all([0, u32::MAX, u32::MAX], false),
            Err(Errno::EPERM)
        );
        assert_eq!((ids.real, ids.effective, ids.saved), (1000, 1000, 1000));
    }
}
