//! The operator at the VM's serial console.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::thread;

use anyhow::{Context, Result};

use crate::stdio::Output;
use crate::terminal::{self, RawMode};

/// Ctrl-], as in telnet and virsh.
const ESCAPE: u8 = 0x1d;

/// Why an attachment ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Detached {
    /// The operator wanted it.
    ByOperator,
    /// There will be no more output.
    ByEnd,
}

/// Joins `output` and `input` of a console to our standard streams.
pub(crate) fn attach(
    mut output: impl Read,
    input: impl Write + Send + 'static,
    hang_up: impl Fn() + Send + 'static,
) -> Result<Detached> {
    let mut stdout = Output::stdout()?;
    let raw = terminal::on_stdin()
        .then(|| {
            eprintln!("Ctrl-] detaches.");
            RawMode::enter()
        })
        .transpose()?;
    let (told, escape) = std::sync::mpsc::channel();
    let raw_keys = raw.is_some();
    thread::Builder::new()
        .name("keys".into())
        .spawn(move || {
            if type_keys(input, raw_keys) == Detached::ByOperator {
                let _ = told.send(());
                hang_up();
            }
        })
        .context("cannot start the input thread")?;
    let mut buffer = vec![0; 16 << 10];
    loop {
        match output.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => match stdout.write(&buffer[..count]) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
                Err(error) => return Err(error).context("cannot write the console's output"),
            },
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    drop(raw);
    Ok(match escape.try_recv() {
        Ok(()) => Detached::ByOperator,
        Err(_) => Detached::ByEnd,
    })
}

/// Passes keys on until the escape key; says who ended it.
fn type_keys(mut input: impl Write, raw: bool) -> Detached {
    let Ok(own) = io::stdin().as_fd().try_clone_to_owned() else {
        return Detached::ByEnd;
    };
    let mut own = std::fs::File::from(own);
    let mut buffer = [0; 512];
    loop {
        let count = match own.read(&mut buffer) {
            Ok(0) => return Detached::ByEnd,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return Detached::ByEnd,
        };
        let keys = &buffer[..count];
        let escape = keys.iter().position(|key| raw && *key == ESCAPE);
        if input.write_all(&keys[..escape.unwrap_or(count)]).is_err() {
            return Detached::ByEnd;
        }
        if escape.is_some() {
            return Detached::ByOperator;
        }
    }
}

/// Prints what a console has kept.
pub(crate) fn print(mut output: impl Read) -> Result<()> {
    let mut stdout = Output::stdout()?;
    let mut buffer = vec![0; 16 << 10];
    while let Ok(count @ 1..) = output.read(&mut buffer) {
        match stdout.write(&buffer[..count]) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
            result => result.context("cannot write the console's output")?,
        }
    }
    Ok(())
}
