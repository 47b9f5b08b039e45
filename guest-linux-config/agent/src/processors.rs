//! Takes CPUs into service that come while the guest runs.
//!
//! The kernel tells of a CPU that has come and leaves it to user space to
//! switch it on; on this machine that is us. A CPU that somebody has switched
//! off later stays so.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

const CPUS: &str = "/sys/devices/system/cpu";
/// Where the kernel itself sends its events to; udev's go elsewhere.
const KERNEL_GROUP: u32 = 1;
/// Longer than any event of the kernel's.
const EVENT_SIZE: usize = 8192;

/// The kernel's events.
#[derive(Debug)]
pub(crate) struct Processors {
    events: OwnedFd,
}

impl Processors {
    /// Begins to listen, and switches on what has come before. `None` where
    /// the kernel has no events.
    pub(crate) fn new() -> Option<Self> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let kind = SocketType::DGRAM;
        let events = socket_with(AddressFamily::NETLINK, kind, flags, Some(KOBJECT_UEVENT)).ok()?;
        bind(&events, &SocketAddrNetlink::new(0, KERNEL_GROUP)).ok()?;
        for entry in fs::read_dir(CPUS).into_iter().flatten().flatten() {
            if let Some(name) = entry.file_name().to_str().filter(|name| is_cpu(name)) {
                switch_on(name);
            }
        }
        Some(Self { events })
    }

    /// Readable when there are events.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// Takes the events that are there.
    pub(crate) fn take(&self) {
        let mut event = [0; EVENT_SIZE];
        loop {
            match recv(&self.events, &mut event, RecvFlags::empty()) {
                Ok((count, _)) => {
                    if let Some(name) = added_cpu(&event[..count]) {
                        switch_on(name);
                    }
                }
                // More events than there was room for: some are lost, and
                // there is no telling which.
                Err(Errno::NOBUFS | Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }
}

/// The name of the CPU that an event says has come.
fn added_cpu(event: &[u8]) -> Option<&str> {
    let head = event.split(|byte| *byte == 0).next()?;
    let path = str::from_utf8(head).ok()?.strip_prefix("add@")?;
    let name = path.strip_prefix("/devices/system/cpu/")?;
    is_cpu(name).then_some(name)
}

fn is_cpu(name: &str) -> bool {
    let number = name.strip_prefix("cpu").unwrap_or_default();
    !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
}

/// Returns when the CPU runs, or the kernel has refused: what it says of that
/// is in its own log.
fn switch_on(name: &str) {
    let path = format!("{CPUS}/{name}/online");
    let is_off = fs::read(&path).is_ok_and(|state| state.first() == Some(&b'0'));
    if is_off {
        let _ = fs::write(&path, "1");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_cpus_that_come_are_switched_on() {
        let event = |head: &str| {
            let bytes = [head, "ACTION=add", "SUBSYSTEM=cpu"].join("\0");
            added_cpu(bytes.as_bytes()).map(str::to_owned)
        };
        assert_eq!(event("add@/devices/system/cpu/cpu12"), Some("cpu12".into()));
        for other in [
            "remove@/devices/system/cpu/cpu1",
            "online@/devices/system/cpu/cpu1",
            "add@/devices/system/cpu/cpu1/cache",
            "add@/devices/system/cpu/cpu",
            "add@/devices/system/cpu/cpufreq",
            "add@/devices/system/cpu/cpu1/../../x",
            "add@/module/loop",
            "",
        ] {
            assert_eq!(event(other), None, "{other}");
        }
        assert_eq!(added_cpu(b"add@\xff\xfe"), None);
    }
}
