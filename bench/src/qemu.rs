//! QEMU without Viaduct: the command lines of the systems it is compared with.

use std::process::Stdio;

use anyhow::Result;
use rack::Size;

use crate::child;
use crate::console::{Outcome, Watch};
use crate::images::{BenchImages, utf8};
use crate::system::Guest;

/// A machine to boot Linux in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Machine<'a> {
    /// How it executes code.
    pub engine: Engine,
    pub vcpus: u32,
    pub memory: Size,
    pub kernel: &'a str,
    pub initramfs: &'a str,
    pub command_line: &'a str,
}

/// How a machine executes code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Engine {
    /// Emulation, with everything that it knows: SVM too.
    Tcg,
    /// KVM, with all that the outer machine offers.
    Kvm,
}

/// QEMU's arguments: the smallest machine it has, the fastest to boot.
pub(crate) fn arguments(machine: &Machine<'_>) -> Vec<String> {
    let (accel, cpu) = match machine.engine {
        Engine::Tcg => ("tcg,thread=multi", "max"),
        Engine::Kvm => ("kvm", "host"),
    };
    let mut arguments: Vec<String> = ["-no-user-config", "-nodefaults", "-no-reboot"]
        .map(Into::into)
        .into();
    let pairs = [
        ("-display", "none"),
        // The timer: without KVM's clock the kernel calibrates by it, and
        // hangs without. The RTC: the kernel would poll a dead one for 15 s.
        ("-machine", "microvm,pit=on,pic=on,rtc=on,isa-serial=on"),
        ("-accel", accel),
        ("-cpu", cpu),
        ("-smp", &machine.vcpus.to_string()),
        ("-m", &format!("{}M", machine.memory.0 >> 20)),
        ("-kernel", machine.kernel),
        ("-initrd", machine.initramfs),
        ("-append", machine.command_line),
        ("-chardev", "stdio,id=console,signal=off"),
        ("-serial", "chardev:console"),
    ];
    for (name, value) in pairs {
        arguments.extend([name.to_owned(), value.to_owned()]);
    }
    arguments
}

/// QEMU's arguments for vmexit of kvm-unit-tests under KVM, as its own scripts
/// have them: a PC, and the port at which it exits.
pub(crate) fn bare_arguments(guest: &Guest, image: &str, words: &str) -> Vec<String> {
    [
        "-no-user-config -nodefaults -no-reboot -display none -machine pc -accel kvm -cpu host",
        "-serial stdio -device isa-debug-exit,iobase=0xf4,iosize=0x4",
        &format!(
            "-smp {} -m {}M -kernel {image}",
            guest.vcpus,
            guest.memory.0 >> 20
        ),
    ]
    .iter()
    .flat_map(|line| line.split(' '))
    .map(str::to_owned)
    .chain(["-append".to_owned(), words.to_owned()])
    .collect()
}

/// Runs a machine on the host until its guest has told everything.
pub(crate) fn run(machine: &Machine<'_>, images: &BenchImages, verbose: bool) -> Result<Outcome> {
    let program = rack::Programs::find().qemu;
    let watch = Watch::new(verbose, Vec::new).of(images);
    child::follow(utf8(&program)?, arguments(machine), Stdio::null(), watch)
}
