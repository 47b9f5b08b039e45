//! The system as a whole.

use linux_raw_sys::general::{
    LINUX_REBOOT_CMD_HALT, LINUX_REBOOT_CMD_POWER_OFF, LINUX_REBOOT_CMD_RESTART,
};

use super::{BUILD, RELEASE};
use crate::errno::{Errno, Outcome, Stop};
use crate::kernel::Kernel;
use crate::wait::Tid;

/// Bytes of each field of `struct utsname`.
const FIELD: usize = 65;

impl Kernel {
    pub(crate) fn uname(&mut self, tid: Tid, address: u64) -> Outcome {
        let mut bytes = [0; 6 * FIELD];
        let fields = ["Linux", "viaduct", RELEASE, BUILD, "x86_64", "(none)"];
        for (place, text) in bytes.chunks_mut(FIELD).zip(fields) {
            place[..text.len()].copy_from_slice(text.as_bytes());
        }
        self.write_user(tid, address, &bytes)?;
        Ok(0)
    }

    pub(crate) fn sysinfo(&mut self, tid: Tid, address: u64) -> Outcome {
        let frames = &self.objects.frames;
        let (total, free) = (
            frames.total() as u64 * 4096,
            frames.available() as u64 * 4096,
        );
        let processes = self.processes.len() as u64;
        let uptime = self.now() / 1_000_000_000;
        let unit = 1_u64;
        let words = [
            uptime,
            0,
            0,
            0,
            total,
            free,
            0,
            0,
            0,
            0,
            processes & 0xffff,
            0,
            0,
            unit,
        ];
        self.put(tid, address, &words)?;
        Ok(0)
    }

    pub(crate) fn fill_random(&mut self, into: &mut [u8]) {
        for piece in into.chunks_mut(8) {
            let word = self.machine.random().to_le_bytes();
            piece.copy_from_slice(&word[..piece.len()]);
        }
    }

    pub(crate) fn getrandom(&mut self, tid: Tid, address: u64, len: u64) -> Outcome {
        let len = len.min(1 << 20);
        let mut done = 0;
        while done < len {
            let mut bytes = [0; 256];
            let count = bytes.len().min(crate::mem::index(len - done));
            self.fill_random(&mut bytes[..count]);
            self.write_user(tid, address + done, &bytes[..count])?;
            done += count as u64;
        }
        Ok(done)
    }

    pub(crate) fn reboot(&mut self, tid: Tid, command: u32) -> Outcome {
        if !self.process_of(tid).owner.is_privileged() {
            return Err(Errno::EPERM.into());
        }
        match command {
            LINUX_REBOOT_CMD_POWER_OFF | LINUX_REBOOT_CMD_HALT | LINUX_REBOOT_CMD_RESTART => {
                self.powered_off = true;
                Err(Stop::Done)
            }
            // Ctrl-Alt-Del: there is no such key.
            0 | 0x89ab_cdef => Ok(0),
            _ => Err(Errno::EINVAL.into()),
        }
    }
}
