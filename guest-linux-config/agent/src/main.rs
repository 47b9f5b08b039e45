//! First process of the stock Linux guest.
//!
//! As process 1 it brings the guest up ([`boot`]), then stays as its init:
//! it reaps orphans, keeps a shell for the serial console, and runs commands
//! for the launcher ([`server`]). With `--serve` it only runs commands, for
//! whoever holds its standard input and output: that is how it is tested on
//! any Linux host.
//!
//! One thread, one `poll`: no state is shared, and a child's status is
//! collected in one place.

mod boot;
mod console;
mod params;
mod processors;
mod server;
mod session;
mod spawn;
mod wire;

use std::ffi::OsStr;
use std::fs;
use std::os::fd::AsFd;
use std::process::ExitCode;

use rustix::time::{ClockId, clock_gettime};

use crate::params::{Bench, Params, Root};
use crate::processors::Processors;
use crate::server::{Server, Stop};
use crate::wire::Wire;

fn main() -> ExitCode {
    let started = clock_gettime(ClockId::Boottime);
    if rustix::process::getpid().is_init() {
        let Err(error) = run_as_init(started);
        boot::give_up(&error)
    }
    if std::env::args_os().nth(1).as_deref() != Some(OsStr::new("--serve")) {
        eprintln!("viaduct-agent: run me as process 1, or with --serve");
        return ExitCode::from(2);
    }
    match serve_stdio() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("viaduct-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Never returns but with the reason why the guest can't be brought up.
fn run_as_init(
    started: rustix::time::Timespec,
) -> Result<std::convert::Infallible, boot::BootError> {
    let command_line = || fs::read("/proc/cmdline").unwrap_or_default();
    // Only a kernel that mounts everything itself has it already.
    let mut params = Params::parse(&command_line());
    if params.root != Root::Ready {
        boot::mount_basics()?;
        params = Params::parse(&command_line());
    }
    if params.bench != Bench::No {
        // The line that benchmarks look for: guest time since power-on.
        boot::say(&format!(
            "viaduct-bench: init at {}.{:06} s",
            started.tv_sec,
            started.tv_nsec / 1000
        ));
    }
    if params.bench == Bench::Boot {
        boot::power_off();
    }
    if params.root != Root::Ready {
        boot::bring_up(&params)?;
    }
    let console = console::Console::open();
    let processors = Processors::new();
    let mut server = Server::new(None, console, processors)
        .map_err(|error| boot::BootError::new("can't catch signals", &error))?;
    match server.run() {
        Ok(Stop::PowerOff | Stop::Closed) => boot::power_off(),
        Err(error) => Err(boot::BootError::new("can't wait for events", &error)),
    }
}

fn serve_stdio() -> std::io::Result<()> {
    let input = std::io::stdin().as_fd().try_clone_to_owned()?;
    let output = std::io::stdout().as_fd().try_clone_to_owned()?;
    Server::new(Some(Wire::new(input, output)?), None, None)?.run()?;
    Ok(())
}
