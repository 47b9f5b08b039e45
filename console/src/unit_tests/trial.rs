//! One test on one machine: a process with a time limit and bounded output.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::config::Test;

/// More output than any test prints: what follows is a flood.
const MOST_OUTPUT: usize = 1 << 20;
/// Extra time for a machine to start and stop.
const GRACE: Duration = Duration::from_secs(20);
/// What `exit` of these tests' library writes if the test can't run here, so
/// that 77 comes of it.
const SKIPPED: u32 = 77 >> 1;

/// How a test ended on a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    Pass,
    /// It says that it has nothing to test here.
    Skip,
    /// It says that something is wrong.
    Fail,
    /// It did not end.
    Hang,
    /// It printed without end.
    Flood,
    /// It ended without a verdict: the reason.
    Broken(String),
}

/// What a test did on a machine.
#[derive(Clone, Debug)]
pub(crate) struct Trial {
    pub ending: Ending,
    pub output: String,
    pub took: Duration,
}

impl Trial {
    /// The lines in which the test reports failures, without their numbers'
    /// changing parts.
    pub(crate) fn failures(&self) -> Vec<&str> {
        let lines = self.output.lines().map(str::trim_end);
        lines.filter(|line| line.starts_with("FAIL")).collect()
    }

    /// The line that says most about a failure.
    pub(crate) fn essence(&self) -> String {
        let last = || {
            self.output
                .lines()
                .rev()
                .find(|line| !line.trim().is_empty())
        };
        let line = match &self.ending {
            Ending::Broken(why) => return why.clone(),
            Ending::Hang => self
                .output
                .lines()
                .rev()
                .find(|line| line.contains("vCPU 0 was")),
            _ => self.failures().first().copied(),
        };
        line.or_else(last).unwrap_or("no output").trim().to_owned()
    }
}

/// How a rack for the tests looks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub nodes: u32,
}

/// The least memory that a VM has here, and QEMU's default.
const MEMORY_MIB: u64 = 128;

/// Runs a test under Viaduct, by this program itself.
pub(crate) fn here(image: &Path, test: &Test, shape: Shape, limit: Duration) -> Result<Trial> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let nodes = shape.nodes.min(test.smp);
    let memory = test.memory_mib().unwrap_or(MEMORY_MIB).max(MEMORY_MIB);
    let mut command = Command::new(program);
    command
        .args(["run", "--platform", "legacy", "--guest"])
        .arg(image)
        .args(["--nodes", &nodes.to_string()])
        .args(["--cores", &test.smp.div_ceil(nodes).to_string()])
        .args(["--vcpus", &test.smp.to_string()])
        .args(["--memory", &format!("{memory}M")])
        .args(["--timeout", &limit.as_secs().to_string()])
        .arg("--")
        .args(test.arguments());
    run(command, limit + GRACE)
}

/// Runs it under plain QEMU, as the tree's own scripts do.
pub(crate) fn reference(
    qemu: &Path,
    accelerator: &str,
    image: &Path,
    test: &Test,
    limit: Duration,
) -> Result<Trial> {
    let mut command = Command::new(qemu);
    command
        .args(["--no-reboot", "-nodefaults", "-display", "none"])
        .args(["-serial", "stdio", "-device", "pc-testdev"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x4"])
        .args(["-device", "pci-testdev"])
        .args(["-machine", &format!("accel={accelerator}")])
        .arg("-kernel")
        .arg(image)
        .args(["-smp", &test.smp.to_string()]);
    let arguments = test.arguments();
    if !arguments.is_empty() {
        command.args(["-append", &arguments.join(" ")]);
    }
    command.args(&test.options);
    run(command, limit)
}

fn run(mut command: Command, limit: Duration) -> Result<Trial> {
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start a test")?;
    let output = Arc::new(Mutex::new(Vec::new()));
    let readers = [
        child.stdout.take().map(|pipe| collect(pipe, &output)),
        child.stderr.take().map(|pipe| collect(pipe, &output)),
    ];
    let ending = wait(&mut child, &output, started + limit)?;
    for reader in readers.into_iter().flatten() {
        drop(reader.join());
    }
    let bytes = output.lock().unwrap_or_else(PoisonError::into_inner);
    let output = String::from_utf8_lossy(&bytes).into_owned();
    let ending = match ending {
        Ending::Broken(why) if why.is_empty() => Ending::Broken(last_line(&output)),
        ending => ending,
    };
    Ok(Trial {
        ending,
        output,
        took: started.elapsed(),
    })
}

fn last_line(output: &str) -> String {
    let line = output.lines().rev().find(|line| !line.trim().is_empty());
    line.unwrap_or("it ended without a word").trim().to_owned()
}

fn collect(
    mut pipe: impl Read + Send + 'static,
    into: &Arc<Mutex<Vec<u8>>>,
) -> thread::JoinHandle<()> {
    let into = Arc::clone(into);
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = pipe.read(&mut buffer) {
            let mut bytes = into.lock().unwrap_or_else(PoisonError::into_inner);
            let room = MOST_OUTPUT.saturating_sub(bytes.len());
            bytes.extend_from_slice(&buffer[..count.min(room)]);
        }
    })
}

fn wait(child: &mut Child, output: &Mutex<Vec<u8>>, deadline: Instant) -> Result<Ending> {
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for a test")? {
            return Ok(match status.code() {
                Some(code) => ending(code),
                None => Ending::Broken(format!("it was killed ({status})")),
            });
        }
        let printed = output.lock().unwrap_or_else(PoisonError::into_inner).len();
        let stop = match printed >= MOST_OUTPUT {
            true => Some(Ending::Flood),
            false => (Instant::now() >= deadline).then_some(Ending::Hang),
        };
        if let Some(ending) = stop {
            drop(child.kill());
            child.wait().context("cannot wait for a test")?;
            return Ok(ending);
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// The machine's exit status is 2v + 1 if the test wrote v to the exit port.
fn ending(status: i32) -> Ending {
    const SKIP: i32 = ((SKIPPED << 1 | 1) & 0xff).cast_signed();
    match status {
        1 => Ending::Pass,
        SKIP => Ending::Skip,
        124 => Ending::Hang,
        125 | 0 => Ending::Broken(String::new()),
        odd if odd & 1 == 1 => Ending::Fail,
        _ => Ending::Broken(String::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: u64) -> Trial {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        run(command, Duration::from_secs(limit)).expect("there is a shell")
    }

    #[test]
    fn statuses_are_the_tests_verdicts() {
        let cases = [
            (1, Ending::Pass),
            (3, Ending::Fail),
            (77, Ending::Skip),
            (124, Ending::Hang),
        ];
        for (status, expected) in cases {
            let trial = shell(&format!("exit {status}"), 60);
            assert_eq!(trial.ending, expected, "{status}");
        }
        let trial = shell("echo; echo why >&2; exit 125", 60);
        assert_eq!(trial.ending, Ending::Broken("why".into()));
    }

    #[test]
    fn what_never_ends_is_ended() {
        assert_eq!(shell("exec sleep 1000", 1).ending, Ending::Hang);
        let flood = shell("exec yes FAIL: again", 60);
        assert_eq!(flood.ending, Ending::Flood);
        assert!(flood.output.len() <= MOST_OUTPUT);
        assert_eq!(flood.essence(), "FAIL: again");
    }

    #[test]
    fn failures_are_quoted() {
        let trial = shell(
            "printf 'PASS: a\\r\\nFAIL: b\\r\\nFAIL: c\\r\\n'; exit 3",
            60,
        );
        assert_eq!(trial.failures(), ["FAIL: b", "FAIL: c"]);
        assert_eq!(trial.essence(), "FAIL: b");
    }
}
