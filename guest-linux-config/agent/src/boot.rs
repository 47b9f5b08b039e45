//! Brings the guest up: file systems, modules, the root.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, symlink};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::net::{AddressFamily, SendFlags, SocketType, send, socket};
use rustix::system::{RebootCommand, finit_module, reboot, sethostname};

use crate::params::{Params, Root};

/// The modules to load, in order, one path a line; behind it may stand what
/// must exist for the module to be of use.
const MODULE_LIST: &str = "/lib/modules/load.list";
/// Where the root's device appears.
const ROOT_DEVICE: &str = "/dev/pmem0";
/// Only a machine that hangs takes so long to find its memory.
const ROOT_TIMEOUT: Duration = Duration::from_secs(120);

/// Why the guest can't be brought up.
#[derive(Debug)]
pub(crate) struct BootError(String);

impl BootError {
    pub(crate) fn new(what: &str, reason: &dyn std::fmt::Display) -> Self {
        Self(format!("{what}: {reason}"))
    }
}

/// Prints a line on the console.
pub(crate) fn say(text: &str) {
    // With nobody to tell, there is nothing left to do.
    let _ = io::stdout().write_all(format!("{text}\n").as_bytes());
}

/// Tells the operator why there is no guest, and switches off so that the
/// launcher sees it.
pub(crate) fn give_up(error: &BootError) -> ! {
    say(&format!("viaduct: the guest can't come up: {}", error.0));
    power_off()
}

/// Writes everything back and switches the machine off.
pub(crate) fn power_off() -> ! {
    rustix::fs::sync();
    loop {
        // It returns only if the machine has no way to switch itself off.
        let _ = reboot(RebootCommand::PowerOff);
        let _ = reboot(RebootCommand::Halt);
        thread::sleep(Duration::from_secs(1));
    }
}

fn mount_at(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    options: &str,
) -> Result<(), BootError> {
    let options = CString::new(options).expect("our own options have no zero byte");
    fs::create_dir_all(target)
        .map_err(|error| BootError::new(&format!("can't make {target}"), &error))?;
    mount(source, target, kind, flags, options.as_c_str())
        .map_err(|error| BootError::new(&format!("can't mount {kind} on {target}"), &error))
}

const PLAIN: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);

/// What this program itself needs from the first moment.
pub(crate) fn mount_basics() -> Result<(), BootError> {
    mount_at("proc", "/proc", "proc", PLAIN, "")?;
    mount_at("sysfs", "/sys", "sysfs", PLAIN, "")?;
    mount_at(
        "devtmpfs",
        "/dev",
        "devtmpfs",
        MountFlags::NOSUID,
        "mode=755",
    )
}

/// From there to a system that commands can run in.
pub(crate) fn bring_up(params: &Params) -> Result<(), BootError> {
    load_modules();
    if params.root == Root::Pmem {
        enter_root()?;
    }
    mount_at(
        "devpts",
        "/dev/pts",
        "devpts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        "gid=5,mode=620,ptmxmode=666",
    )?;
    let shared = MountFlags::NOSUID | MountFlags::NODEV;
    mount_at("tmpfs", "/dev/shm", "tmpfs", shared, "mode=1777")?;
    mount_at("tmpfs", "/tmp", "tmpfs", shared, "mode=1777")?;
    mount_at("tmpfs", "/run", "tmpfs", shared, "mode=755")?;
    for (target, name) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        // A kernel that makes them itself is welcome to.
        let _ = symlink(target, name);
    }
    let comforts = [
        ("set the host's name", sethostname(b"viaduct")),
        ("bring up the loopback interface", loopback_up()),
    ];
    for (what, result) in comforts {
        if let Err(error) = result {
            say(&format!("viaduct: can't {what}: {error}"));
        }
    }
    Ok(())
}

/// Loads what the builder put into the initial RAM file system. A module
/// that fails is reported and passed over: whether it was needed shows soon.
fn load_modules() {
    let Ok(list) = fs::read_to_string(MODULE_LIST) else {
        return;
    };
    for line in list.lines() {
        let (path, condition) = line.split_once(' ').unwrap_or((line, "/"));
        if !Path::new(condition).exists() {
            continue;
        }
        let result = File::open(path)
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
            .and_then(|file| finit_module(file, c"", 0));
        match result {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(Errno::NOEXEC) => {
                say(&format!(
                    "viaduct: {path} is not for this kernel; build its drivers in"
                ));
                return;
            }
            Err(error) => say(&format!("viaduct: can't load {path}: {error}")),
        }
    }
}

/// Mounts the image below, memory above, and goes there.
fn enter_root() -> Result<(), BootError> {
    let deadline = Instant::now() + ROOT_TIMEOUT;
    // The name is there a moment before the device can be opened.
    while File::open(ROOT_DEVICE).is_err() {
        if Instant::now() > deadline {
            return Err(BootError(format!(
                "no {ROOT_DEVICE}: the machine has no persistent memory, or its kernel no driver \
                 for it (nd_e820 or nfit, nd_pmem)"
            )));
        }
        thread::sleep(Duration::from_millis(2));
    }
    // Without DAX, each page of the image would be copied into guest memory.
    mount_at(
        ROOT_DEVICE,
        "/image",
        "ext4",
        MountFlags::RDONLY,
        "dax=always",
    )
    .map_err(|error| {
        BootError(format!(
            "{} (the root image must be ext4 with 4 KiB blocks, and the kernel must have \
             CONFIG_FS_DAX)",
            error.0
        ))
    })?;
    mount_at("tmpfs", "/above", "tmpfs", MountFlags::empty(), "mode=755")?;
    for directory in ["/above/data", "/above/work"] {
        fs::create_dir(directory)
            .map_err(|error| BootError::new(&format!("can't make {directory}"), &error))?;
    }
    mount_at(
        "root",
        "/root.new",
        "overlay",
        MountFlags::empty(),
        "lowerdir=/image,upperdir=/above/data,workdir=/above/work",
    )?;
    switch_root("/root.new")
}

fn switch_root(new: &str) -> Result<(), BootError> {
    let fail = |what: &str, error: Errno| BootError::new(&format!("can't {what}"), &error);
    for place in ["/proc", "/sys", "/dev"] {
        let target = format!("{new}{place}");
        fs::create_dir_all(&target)
            .map_err(|error| BootError::new(&format!("can't make {target}"), &error))?;
        mount_move(place, &target).map_err(|error| fail(&format!("move {place}"), error))?;
    }
    // Nothing of the initial RAM file system is needed any more; this very
    // program stays in memory until it ends, which is never.
    for path in fs::read_dir("/").into_iter().flatten().flatten() {
        let path = path.path();
        if path.starts_with("/lib") || path.starts_with("/bin") {
            let _ = fs::remove_dir_all(path);
        }
    }
    rustix::process::chdir(new).map_err(|error| fail("enter the root", error))?;
    mount_move(".", "/").map_err(|error| fail("move the root", error))?;
    rustix::process::chroot(".").map_err(|error| fail("change the root", error))?;
    rustix::process::chdir("/").map_err(|error| fail("enter the root", error))?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    Ok(())
}

/// Sets IFF_UP on interface 1, which is the loopback one on every Linux: a
/// NEWLINK request of rtnetlink(7) with nothing but its fixed part.
fn loopback_up() -> rustix::io::Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const NLM_F_REQUEST: u16 = 1;
    const IFF_UP: u32 = 1;
    let mut request = Vec::with_capacity(32);
    request.extend(32_u32.to_ne_bytes());
    request.extend(RTM_NEWLINK.to_ne_bytes());
    request.extend(NLM_F_REQUEST.to_ne_bytes());
    request.extend([0; 8]); // sequence number, port: the kernel's
    request.extend([0; 4]); // address family, padding, device type: any
    request.extend(1_i32.to_ne_bytes());
    request.extend(IFF_UP.to_ne_bytes());
    request.extend(IFF_UP.to_ne_bytes()); // what of the flags to change
    // Protocol 0 is NETLINK_ROUTE.
    let kernel = socket(AddressFamily::NETLINK, SocketType::RAW, None)?;
    send(&kernel, &request, SendFlags::empty())?;
    Ok(())
}
