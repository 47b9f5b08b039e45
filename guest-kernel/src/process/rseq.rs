//! Restartable sequences: rseq(2), as Linux 6.1 has them.
//!
//! A thread tells where it wants to read which processor it is on, and names
//! there the sequence of instructions that it is in, which must not go on if
//! another thread has run on that processor, or a handler in the thread. So
//! whenever a thread begins to run on a processor or takes a signal, its
//! sequence is looked at before the program sees anything.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::signal::Info;
use crate::errno::{Errno, Outcome, Result};
use crate::kernel::Kernel;
use crate::mem::tables::USER_END;
use crate::wait::Tid;

/// Bytes of `struct rseq` as first defined, and its alignment.
const AREA: u32 = 32;
/// Where it names the sequence, behind the processor as two words: one that
/// is always a processor, and one that may say that there is none.
const SECTION: u64 = 8;
const UNREGISTER: u32 = 1;
/// No processor: the thread has nothing registered.
const NONE: u32 = u32::MAX;
/// Bytes of the signature right before the instructions to go on with.
const SIGNATURE: u64 = 4;

/// What a thread has registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rseq {
    address: u64,
    signature: u32,
    /// What it has been told.
    cpu: u32,
}

/// `struct rseq_cs`: a sequence.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Section {
    version: u32,
    flags: u32,
    start: u64,
    len: u64,
    abort: u64,
}

impl Section {
    /// Whether an instruction is in it.
    fn holds(&self, rip: u64) -> bool {
        rip.wrapping_sub(self.start) < self.len
    }

    /// Its flags are of no use any more, and refused as by Linux.
    fn is_sound(&self) -> bool {
        let end = self.start.checked_add(self.len);
        self.version == 0
            && self.flags == 0
            && end.is_some_and(|end| end < USER_END)
            && (SIGNATURE..USER_END).contains(&self.abort)
            && !self.holds(self.abort)
    }
}

impl Kernel {
    /// The call.
    pub(crate) fn rseq(
        &mut self,
        tid: Tid,
        address: u64,
        len: u32,
        flags: u32,
        signature: u32,
    ) -> Outcome {
        let known = self.thread(tid).rseq;
        let wrong = len != AREA || known.is_some_and(|known| known.address != address);
        let unregisters = flags == UNREGISTER;
        match known {
            _ if flags & !UNREGISTER != 0 || wrong => return Err(Errno::EINVAL.into()),
            None if unregisters => return Err(Errno::EINVAL.into()),
            Some(known) if known.signature != signature => return Err(Errno::EPERM.into()),
            Some(_) if !unregisters => return Err(Errno::EBUSY.into()),
            _ if !address.is_multiple_of(AREA.into()) => return Err(Errno::EINVAL.into()),
            _ => {}
        }
        if unregisters {
            self.put(tid, address, &[0, NONE])?;
            self.thread(tid).rseq = None;
            return Ok(0);
        }
        let cpu = u32::try_from(self.machine.cpu()).unwrap_or(u32::MAX);
        self.put(tid, address, &[cpu, cpu])?;
        self.thread(tid).rseq = Some(Rseq {
            address,
            signature,
            cpu,
        });
        Ok(0)
    }

    /// A thread begins to run on a processor: it is told so, and leaves the
    /// sequence that it is in. If it can't, a signal says so; whether it can.
    pub(crate) fn restart_sequence(&mut self, tid: Tid, cpu: usize) -> bool {
        let Some(rseq) = self.thread(tid).rseq else {
            return true;
        };
        let cpu = u32::try_from(cpu).unwrap_or(u32::MAX);
        let told = match rseq.cpu == cpu {
            true => Ok(()),
            false => self.put(tid, rseq.address, &[cpu, cpu]),
        };
        self.thread(tid).rseq = Some(Rseq { cpu, ..rseq });
        let done = told.and_then(|()| self.leave_sequence(tid));
        if done.is_err() {
            let signal = self.memory_signal(tid, rseq.address);
            self.force_signal(tid, Info::from_kernel(signal));
        }
        done.is_ok()
    }

    /// Takes a thread out of the sequence that it is in, if it is in one.
    pub(crate) fn leave_sequence(&mut self, tid: Tid) -> Result<()> {
        let Some(rseq) = self.thread(tid).rseq else {
            return Ok(());
        };
        let named = rseq.address + SECTION;
        let at: u64 = self.get(tid, named)?;
        if at == 0 {
            return Ok(());
        }
        let section: Section = self.get(tid, at)?;
        if !section.is_sound() {
            return Err(Errno::EINVAL);
        }
        let signature: u32 = self.get(tid, section.abort - SIGNATURE)?;
        if signature != rseq.signature {
            return Err(Errno::EINVAL);
        }
        // A sequence that is left behind need not be looked at again.
        self.put(tid, named, &0_u64)?;
        let registers = &mut self.thread(tid).registers;
        if section.holds(registers.rip) {
            registers.rip = section.abort;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOUND: Section = Section {
        version: 0,
        flags: 0,
        start: 0x1000,
        len: 0x10,
        abort: 0x2000,
    };

    #[test]
    fn a_sequence_is_its_instructions_and_none_other() {
        assert!(SOUND.holds(0x1000) && SOUND.holds(0x100f));
        assert!(!SOUND.holds(0xfff) && !SOUND.holds(0x1010) && !SOUND.holds(0));
    }

    #[test]
    fn who_would_go_on_inside_or_outside_of_programs_is_refused() {
        assert!(SOUND.is_sound());
        let sections = [
            Section {
                version: 1,
                ..SOUND
            },
            Section { flags: 1, ..SOUND },
            Section {
                len: u64::MAX,
                ..SOUND
            },
            Section {
                start: USER_END,
                ..SOUND
            },
            Section {
                abort: 0x1008,
                ..SOUND
            },
            Section {
                abort: USER_END,
                ..SOUND
            },
            Section { abort: 3, ..SOUND },
        ];
        for section in sections {
            assert!(!section.is_sound(), "{section:?}");
        }
    }
}
