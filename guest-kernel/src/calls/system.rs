//! The system as a whole.

use alloc::vec::Vec;

use linux_raw_sys::general::{
    LINUX_REBOOT_CMD_HALT, LINUX_REBOOT_CMD_POWER_OFF, LINUX_REBOOT_CMD_RESTART,
};

use super::{BUILD, RELEASE};
use crate::errno::{Errno, Outcome, Stop};
use crate::kernel::Kernel;
use crate::wait::Tid;

/// Bytes of each field of `struct utsname`, of which a zero byte is the last.
const FIELD: usize = 65;

/// What the machine is called.
#[derive(Debug)]
pub(crate) struct Names {
    pub(crate) host: Vec<u8>,
    pub(crate) domain: Vec<u8>,
}

impl Default for Names {
    fn default() -> Self {
        Self {
            host: b"viaduct".to_vec(),
            domain: b"(none)".to_vec(),
        }
    }
}

/// Which of the names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Name {
    Host,
    Domain,
}

impl Kernel {
    pub(crate) fn uname(&mut self, tid: Tid, address: u64) -> Outcome {
        let mut bytes = [0; 6 * FIELD];
        let Names { host, domain } = &self.names;
        let [release, build] = [RELEASE, BUILD].map(str::as_bytes);
        let fields = [&b"Linux"[..], host, release, build, b"x86_64", domain];
        for (place, text) in bytes.chunks_mut(FIELD).zip(fields) {
            place[..text.len()].copy_from_slice(text);
        }
        self.write_user(tid, address, &bytes)?;
        Ok(0)
    }

    pub(crate) fn set_name(&mut self, tid: Tid, name: Name, address: u64, len: i32) -> Outcome {
        if !self.process_of(tid).owner.is_privileged() {
            return Err(Errno::EPERM.into());
        }
        let len = usize::try_from(len).map_err(|_| Errno::EINVAL)?;
        if len >= FIELD {
            return Err(Errno::EINVAL.into());
        }
        let mut text = self.bytes(tid, address, len)?;
        let end = text.iter().position(|byte| *byte == 0).unwrap_or(len);
        text.truncate(end);
        match name {
            Name::Host => self.names.host = text,
            Name::Domain => self.names.domain = text,
        }
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
