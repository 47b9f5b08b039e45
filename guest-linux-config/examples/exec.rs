//! Runs a command in a guest on plain QEMU, for comparisons with one under
//! the hypervisor: `exec SOCKET COMMAND ARG…`, where SOCKET is the chardev
//! behind the virtserialport named viaduct.agent. Without a command: switches
//! the guest off.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use guest_linux_config::agent_client::{AgentClient, Event, ExecRequest, Session};

/// A boot under emulation on a busy machine.
const BOOT: Duration = Duration::from_secs(300);

fn main() -> ExitCode {
    match run(std::env::args_os().skip(1).collect()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("exec: {error}");
            ExitCode::from(125)
        }
    }
}

fn run(arguments: Vec<OsString>) -> Result<u8, Box<dyn std::error::Error>> {
    let Some((socket, command)) = arguments.split_first() else {
        return Err("usage: exec SOCKET [COMMAND ARG…]".into());
    };
    let stream = UnixStream::connect(socket)?;
    let client = AgentClient::new(stream.try_clone()?, stream);
    client.wait_hello(BOOT)?;
    if command.is_empty() {
        client.power_off()?;
        return Ok(0);
    }
    let Session {
        mut stdin,
        events,
        control: _,
    } = client.exec(&ExecRequest::new(command))?;
    // Ends with the program: nobody waits for input that never comes.
    thread::spawn(move || {
        let mut chunk = vec![0; 64 * 1024];
        while let Ok(len @ 1..) = io::stdin().read(&mut chunk) {
            if stdin.write_all(&chunk[..len]).is_err() {
                break;
            }
        }
    });
    for event in events {
        match event {
            Event::Stdout(bytes) => io::stdout().write_all(&bytes)?,
            Event::Stderr(bytes) => io::stderr().write_all(&bytes)?,
            Event::StdoutEof | Event::StderrEof => {}
            Event::Exited(status) => return Ok(status.shell_status()),
            Event::Failed(failure) => return Ok(failure.shell_status()),
            Event::Lost(error) => return Err(error.into()),
        }
    }
    Err("the session ended without a status".into())
}
