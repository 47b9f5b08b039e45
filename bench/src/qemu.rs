//! QEMU without Viaduct: the command lines of the systems it is compared
//! with, and a process that ends with this one.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rack::Size;

use crate::console::{Heard, Outcome, Watch};
use crate::images::BenchImages;
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

/// A process that is killed when it is dropped, or when this one dies.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // It fails only if the process has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a machine on the host until its guest has told everything.
pub(crate) fn run(machine: &Machine<'_>, images: &BenchImages, verbose: bool) -> Result<Outcome> {
    let program = rack::Programs::find().qemu;
    // setpriv: however this process ends, QEMU ends too.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--"])
        .arg(&program)
        .args(arguments(machine))
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut watch = Watch::new(verbose, Vec::new).of(images);
    let child = command
        .spawn()
        .context("cannot start setpriv; install util-linux")?;
    let mut child = Guard(child);
    let output = child.0.stdout.take().context("stdout is piped")?;
    let pieces = read_in_thread(output);
    loop {
        match pieces.recv_timeout(Duration::from_secs(1)) {
            Ok(piece) => {
                if watch.feed(&piece)? == Heard::End {
                    return Ok(watch.finish());
                }
            }
            Err(RecvTimeoutError::Timeout) => watch.check_time()?,
            Err(RecvTimeoutError::Disconnected) => {
                let status = child.0.wait()?;
                bail!("QEMU has ended ({status}); {}", watch.last_words());
            }
        }
    }
}

/// Reads in a thread, which ends with the writer or the receiver.
fn read_in_thread(mut from: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            if sender.send(buffer[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}
