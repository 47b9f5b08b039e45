//! `run`: a rack and a VM for the time of one command.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use rack::{ConsoleLog, ConsoleRead, LogSink, NodeEnd, RackEnd, RingWriter};
use vmm_shared::control::VmState;

use crate::attach::{self, Detached};
use crate::bare::{self, Watchdog};
use crate::cli::RunArgs;
use crate::machine::{Machine, Plan, bare_image};
use crate::server::Server;
use crate::session::{self, Outcome};
use crate::{progress, signals, supervise};

pub(crate) fn run(args: &RunArgs) -> Result<u8> {
    let bare = bare_image(&args.vm)?.is_some();
    let request = match args.console || bare {
        true => None,
        false => Some(session::request(&args.command, args.tty)?),
    };
    if bare && args.tty {
        bail!("--tty is for commands; this image has the serial console");
    }
    if !bare && args.timeout.is_some() {
        bail!("--timeout is for multiboot and PVH images; leave it out");
    }
    if let Some(name) = &args.name {
        supervise::check_free(name)?;
    }
    let plan = Plan::make(&args.rack, &args.vm, &args.command)?;
    let held = args.name.as_ref().map(supervise::hold).transpose()?;
    if let Some(held) = held.clone() {
        signals::at_end(move || held.clear());
    }
    let name = match &args.name {
        Some(name) => name.to_string(),
        None => format!("run-{}", std::process::id()),
    };
    let log: Option<LogSink> = plan.verbose.then(|| {
        let print: LogSink = Arc::new(|node, line| {
            progress::print_line(&format!("node {}: {line}", node.0));
        });
        print
    });
    let machine = Arc::new(Machine::start(&plan, &name, log)?);
    let aborted = Arc::clone(&machine);
    signals::at_end(move || aborted.power_off(Duration::ZERO));
    if plan.verbose && !args.console {
        let console = machine.rack.console();
        std::thread::spawn(move || copy_console(&console));
    }

    match request {
        None => {
            machine.wait_entered(&plan)?;
            progress::clear();
            let limit = args.timeout.map(Duration::from_secs);
            watch(&machine, limit)
        }
        Some(request) => {
            machine.wait_up(&plan)?;
            if let Some(held) = held {
                let for_server = Arc::clone(&machine);
                Server::start(name, for_server, held, || {})?;
            }
            progress::clear();
            command(&machine, &request)
        }
    }
}

fn command(
    machine: &Machine,
    request: &guest_linux_config::agent_client::ExecRequest,
) -> Result<u8> {
    match session::run(&machine.agent, request)? {
        Outcome::Status(status) => Ok(status),
        Outcome::NotStarted(status, why) => {
            eprintln!("viaduct: {why}");
            Ok(status)
        }
        Outcome::Lost(error) => {
            machine.explain()?;
            bail!(error)
        }
    }
}

/// The serial console until the VM's end.
fn watch(machine: &Machine, limit: Option<Duration>) -> Result<u8> {
    let watchdog = limit
        .map(|limit| Watchdog::start(&machine.rack, limit))
        .transpose()?;
    let output = ConsoleReader {
        log: machine.rack.console(),
        position: 0,
    };
    let input = ConsoleWriter(machine.rack.console_input());
    let rack = Arc::clone(&machine.rack);
    if attach::attach(output, input, move || rack.kill())? == Detached::ByOperator {
        return Ok(0);
    }
    if let Some(report) = watchdog.and_then(|watchdog| watchdog.report()) {
        eprintln!("viaduct: {report}");
        return Ok(bare::TIMED_OUT);
    }
    match machine.rack.wait_end(Duration::from_secs(5)) {
        Some(RackEnd {
            exit_value: Some(value),
            ..
        }) => Ok(bare::exit_status(value)),
        Some(end) if end.how == NodeEnd::Orderly && end.vm == VmState::PoweredOff => Ok(0),
        Some(end) => Err(machine.rack.failure(&end).into()),
        // Nobody reads our output any more.
        None => Ok(0),
    }
}

/// The console's log as a stream.
struct ConsoleReader {
    log: Arc<ConsoleLog>,
    position: u64,
}

impl Read for ConsoleReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let wait = Duration::from_secs(60);
            match self.log.read(&mut self.position, into, wait) {
                ConsoleRead::Bytes(count) => return Ok(count),
                ConsoleRead::Timeout => {}
                ConsoleRead::Closed => return Ok(0),
            }
        }
    }
}

/// The console's input; what the guest does not take waits here.
struct ConsoleWriter(RingWriter);

impl Write for ConsoleWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Shows the guest's console line by line on standard error.
fn copy_console(log: &Arc<ConsoleLog>) {
    use io::BufRead;
    let reader = ConsoleReader {
        log: Arc::clone(log),
        position: 0,
    };
    for line in io::BufReader::new(reader)
        .split(b'\n')
        .map_while(Result::ok)
    {
        let line = String::from_utf8_lossy(&line);
        progress::print_line(&format!("guest: {}", line.trim_end()));
    }
}
