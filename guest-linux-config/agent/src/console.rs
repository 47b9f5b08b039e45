//! The shell on the guest's serial console.
//!
//! It is started when somebody types, not before: a prompt that nobody reads
//! costs time in the hypervisor, and a shell costs memory.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use rustix::process::Pid;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::spawn;

const SHELLS: [&str; 2] = ["/bin/bash", "/bin/sh"];

#[derive(Debug)]
pub(crate) struct Console {
    path: PathBuf,
    tty: File,
    /// How the terminal was set before a shell changed it.
    modes: Option<Termios>,
    shell: Option<Pid>,
}

fn open_terminal(path: &Path) -> Option<File> {
    File::options().read(true).write(true).open(path).ok()
}

impl Console {
    /// The console that the kernel prints on last, if it is a terminal.
    pub(crate) fn open() -> Option<Self> {
        let active = fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
        let name = active.split_ascii_whitespace().last().unwrap_or("console");
        // Opened as itself: /dev/console can't become a controlling terminal.
        let path = Path::new("/dev").join(name);
        let tty = open_terminal(&path)?;
        let mut console = Self {
            path,
            modes: tcgetattr(&tty).ok(),
            tty,
            shell: None,
        };
        console.say("viaduct: the guest is up; press Enter for a shell");
        Some(console)
    }

    fn say(&mut self, text: &str) {
        // A console that can't be written to has nobody to tell.
        let _ = self.tty.write_all(format!("{text}\r\n").as_bytes());
    }

    /// Where to wait for somebody to type.
    pub(crate) fn wants_to_read(&self) -> Option<BorrowedFd<'_>> {
        self.shell.is_none().then(|| self.tty.as_fd())
    }

    /// Somebody has typed. The shell gets what it was.
    pub(crate) fn start_shell(&mut self) {
        if let Some(modes) = &self.modes {
            let _ = tcsetattr(&self.tty, OptionalActions::Now, modes);
        }
        match self.spawn() {
            Ok(pid) => self.shell = Some(pid),
            Err(error) => {
                self.say(&format!("viaduct: can't start a shell: {error}"));
                // Else the same input would bring us here for ever.
                let _ = rustix::termios::tcflush(&self.tty, rustix::termios::QueueSelector::IFlush);
            }
        }
    }

    fn spawn(&self) -> std::io::Result<Pid> {
        let shell = SHELLS.iter().find(|path| Path::new(path).exists());
        let shell = shell.ok_or(std::io::ErrorKind::NotFound)?;
        let mut command = spawn::command(OsStr::new(shell));
        if Path::new("/root").is_dir() {
            command.current_dir("/root");
        }
        command
            .env("TERM", "linux")
            .stdin(self.tty.try_clone()?)
            .stdout(self.tty.try_clone()?)
            .stderr(self.tty.try_clone()?);
        spawn::lead_session(&mut command, true);
        Ok(Pid::from_child(&command.spawn()?))
    }

    /// A child has ended: if it was the shell, the next input starts another.
    pub(crate) fn child_ended(&mut self, pid: Pid) {
        if self.shell == Some(pid) {
            self.shell = None;
            // The kernel hangs up on everybody who has the terminal open
            // when the leader of its session ends.
            if let Some(tty) = open_terminal(&self.path) {
                self.tty = tty;
            }
            self.say("viaduct: the shell has ended; press Enter for another");
        }
    }
}
