//! Starting a child that never outlives the launcher.
#![expect(unsafe_code, reason = "the child is prepared between fork and exec")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use rustix::io::FdFlags;
use rustix::process::{Signal, getppid, set_parent_process_death_signal, setsid};

/// Starts `command` in a session of its own, with the descriptors in `inherit`
/// open under their present numbers. The kernel kills it when the calling
/// *thread* ends: that thread must wait for it.
///
/// So a terminal's Ctrl-C reaches only the launcher. And Linux shares
/// processors out by sessions (sched(7), autogroup): in that of a shell where
/// much else runs, a node can wait for one for seconds and be taken for dead.
pub(crate) fn spawn(mut command: Command, inherit: Vec<OwnedFd>) -> io::Result<Child> {
    let parent = rustix::process::getpid();
    let prepare = move || {
        setsid()?;
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The launcher may have died before the line above took effect.
        if getppid() != Some(parent) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        for descriptor in &inherit {
            rustix::io::fcntl_setfd(descriptor, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: the closure only makes system calls that are async-signal-safe
    // and allocates nothing.
    unsafe { command.pre_exec(prepare) };
    command.spawn()
}

/// The name by which a child opens a descriptor that it has inherited.
pub(crate) fn inherited_path(descriptor: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", descriptor.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::process::Stdio;

    #[test]
    fn a_child_gets_the_named_descriptors_and_a_session_of_its_own() {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(b"inherited").expect("writable");
        let descriptor = OwnedFd::from(file);
        let mut command = Command::new("cat");
        command
            .arg(inherited_path(&descriptor))
            .stdout(Stdio::piped());
        let mut child = spawn(command, vec![descriptor]).expect("started");
        let session = rustix::process::Pid::from_child(&child);
        assert_eq!(rustix::process::getsid(Some(session)), Ok(session));
        let mut text = String::new();
        let mut stdout = child.stdout.take().expect("piped");
        stdout.read_to_string(&mut text).expect("readable");
        assert_eq!(text, "inherited");
        child.wait().expect("ends");
    }

    #[test]
    fn a_child_dies_with_the_thread_that_started_it() {
        let mut command = Command::new("sleep");
        command.arg("1000");
        let thread = std::thread::spawn(move || spawn(command, Vec::new()).expect("started"));
        let mut child = thread.join().expect("no panic");
        let status = child.wait().expect("ends");
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(9)
        );
    }
}
