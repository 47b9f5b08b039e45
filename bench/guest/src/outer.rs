//! The first process of the outer guest: loads KVM and runs the measured
//! guest under it.
//!
//! `/bench/modules` lists the modules to load, `/bench/command` the inner
//! QEMU and its arguments, one a line.

mod machine;

use std::fs::{self, File};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use rustix::mount::{MountFlags, mount};
use rustix::system::finit_module;

use machine::{power_off, tell};

/// The kernel is to decompress the module (`linux/module.h`).
const MODULE_INIT_COMPRESSED_FILE: i32 = 4;

fn main() {
    if let Err(error) = run() {
        tell(&format!("failed outer guest: {error:#}"));
    }
    tell("end");
    power_off()
}

fn run() -> Result<()> {
    for kind in ["proc", "sysfs", "devtmpfs"] {
        let target = match kind {
            "devtmpfs" => "/dev",
            "sysfs" => "/sys",
            _ => "/proc",
        };
        mount(kind, target, kind, MountFlags::empty(), None)
            .with_context(|| format!("can't mount {kind}"))?;
    }
    for path in fs::read_to_string("/bench/modules")?.lines() {
        let file = File::open(path).with_context(|| format!("can't open {path}"))?;
        // Debian compresses modules from release 13 on.
        let flags = if path.ends_with(".ko") {
            0
        } else {
            MODULE_INIT_COMPRESSED_FILE
        };
        finit_module(file, c"", flags).with_context(|| format!("can't load {path}"))?;
    }
    let command = fs::read_to_string("/bench/command").context("no command to run")?;
    let mut words = command.lines();
    let program = words.next().context("no program to run")?;
    tell("launch");
    let status = Command::new(program)
        .args(words)
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("can't start {program}"))?;
    ensure!(status.success(), "the inner QEMU ended with {status}");
    Ok(())
}
