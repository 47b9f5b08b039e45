//! Starts programs, each as the leader of a session of its own.
#![expect(unsafe_code, reason = "code between fork and exec needs pre_exec")]

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::Pid;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use vmm_shared::agent::{Exec, FailReason, Failure, WindowSize};

use crate::wire::set_nonblocking;

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const HOME: &str = "/root";

/// A started command and our ends of its standard streams.
pub(crate) struct Started {
    pub(crate) pid: Pid,
    pub(crate) stdin: OwnedFd,
    pub(crate) stdout: OwnedFd,
    /// `None` on a terminal, where it is the same as `stdout`.
    pub(crate) stderr: Option<OwnedFd>,
}

/// A command with the agent's default environment, in its home directory.
pub(crate) fn command(program: &OsStr) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", HOME)
        .env("LANG", "C.UTF-8");
    command
}

/// Makes the child lead a new session; with a terminal as its standard input
/// if `terminal`.
pub(crate) fn lead_session(command: &mut Command, terminal: bool) {
    let prepare = move || {
        rustix::process::setsid()?;
        if terminal {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe calls may be made:
    // both are bare system calls that touch no memory of ours.
    unsafe { command.pre_exec(prepare) };
}

fn failure(reason: FailReason, error: &io::Error) -> Failure {
    let errno = error.raw_os_error().unwrap_or(0);
    Failure { reason, errno }
}

/// Starts what `exec` asks for.
pub(crate) fn start(exec: &Exec<'_>) -> Result<Started, Failure> {
    let mut argv = exec.argv.map(OsStr::from_bytes);
    let no_program = Failure {
        reason: FailReason::NotFound,
        errno: Errno::NOENT.raw_os_error(),
    };
    let program = argv.next().ok_or(no_program)?;
    if program.is_empty() {
        return Err(no_program);
    }
    let mut command = command(program);
    command.args(argv);
    if exec.tty.is_some() {
        command.env("TERM", "linux");
    }
    for entry in exec.env {
        // A name may not be empty, so the first byte is none of the value.
        let split = entry.iter().skip(1).position(|byte| *byte == b'=');
        if let Some(at) = split {
            let (name, value) = (&entry[..=at], &entry[at + 2..]);
            command.env(OsStr::from_bytes(name), OsStr::from_bytes(value));
        }
    }
    command.current_dir(directory(exec.cwd)?);
    lead_session(&mut command, exec.tty.is_some());
    match exec.tty {
        Some(size) => on_terminal(command, size),
        None => on_pipes(command),
    }
}

/// The directory to start in, entered once to see that this works: the
/// child's own failure could not be told from a missing program.
fn directory(asked: &[u8]) -> Result<&Path, Failure> {
    let enter = |path: &Path| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty())?;
        rustix::fs::accessat(
            &directory,
            ".",
            rustix::fs::Access::EXEC_OK,
            rustix::fs::AtFlags::empty(),
        )
    };
    if asked.is_empty() {
        let home = Path::new(HOME);
        return Ok(enter(home).map_or(Path::new("/"), |()| home));
    }
    let path = Path::new(OsStr::from_bytes(asked));
    enter(path).map_err(|error| failure(FailReason::BadDirectory, &error.into()))?;
    Ok(path)
}

fn spawn(command: &mut Command) -> Result<Child, Failure> {
    command.spawn().map_err(|error| {
        let reason = match Errno::from_io_error(&error) {
            Some(Errno::NOENT | Errno::NOTDIR) => FailReason::NotFound,
            Some(Errno::AGAIN | Errno::NOMEM | Errno::MFILE | Errno::NFILE) => {
                FailReason::NoResources
            }
            _ => FailReason::CannotRun,
        };
        failure(reason, &error)
    })
}

fn on_pipes(mut command: Command) -> Result<Started, Failure> {
    let mut child = spawn(
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped()),
    )?;
    let mut ends = || {
        Some((
            OwnedFd::from(child.stdin.take()?),
            OwnedFd::from(child.stdout.take()?),
            OwnedFd::from(child.stderr.take()?),
        ))
    };
    let (stdin, stdout, stderr) = ends().expect("all three were asked for");
    for fd in [&stdin, &stdout, &stderr] {
        set_nonblocking(fd).expect("pipes can be made non-blocking");
    }
    Ok(Started {
        pid: Pid::from_child(&child),
        stdin,
        stdout,
        stderr: Some(stderr),
    })
}

fn on_terminal(mut command: Command, size: WindowSize) -> Result<Started, Failure> {
    let no_terminal = |error: Errno| failure(FailReason::NoResources, &error.into());
    let open = || -> rustix::io::Result<(OwnedFd, OwnedFd)> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        unlockpt(&master)?;
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = ioctl_tiocgptpeer(&master, flags)?;
        tcsetwinsize(&master, window(size))?;
        set_nonblocking(&master)?;
        Ok((master, slave))
    };
    let (master, slave) = open().map_err(no_terminal)?;
    let copy = |fd: &OwnedFd| {
        fd.try_clone()
            .map_err(|error| failure(FailReason::NoResources, &error))
    };
    command
        .stdin(copy(&slave)?)
        .stdout(copy(&slave)?)
        .stderr(slave);
    let stdin = copy(&master)?;
    let child = spawn(&mut command)?;
    Ok(Started {
        pid: Pid::from_child(&child),
        stdin,
        stdout: master,
        stderr: None,
    })
}

/// The kernel's form of a window size.
pub(crate) fn window(size: WindowSize) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
