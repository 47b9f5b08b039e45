//! Running the console in an environment of the test's own.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::{LIMIT, Turn, text, viaduct};

/// Variables that change what the console does; a test that wants one sets
/// it.
const SETTINGS: [&str; 6] = [
    "VIADUCT_QEMU",
    "VIADUCT_ACCEL",
    "VIADUCT_CPU",
    "VIADUCT_HYPERVISOR",
    "VIADUCT_AGENT",
    "TMPDIR",
];

/// A runtime directory and a place for files, all of them the test's own, and
/// the right to boot racks.
#[derive(Debug)]
pub struct Bench {
    folder: TempDir,
    shm: BTreeSet<OsString>,
    _turn: Turn,
}

/// How a run of the console ended.
#[derive(Debug)]
pub struct Finished {
    /// Its exit status, or 128 + n if signal n killed it.
    pub status: i32,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Finished {
    /// Standard output as text.
    #[must_use]
    pub fn out(&self) -> String {
        text(&self.stdout)
    }

    /// Standard error as text.
    #[must_use]
    pub fn err(&self) -> String {
        text(&self.stderr)
    }

    /// Fails unless it ended well and said nothing on standard error.
    ///
    /// # Panics
    /// With both.
    #[track_caller]
    pub fn well(self) -> Self {
        assert_eq!((self.status, self.err().as_str()), (0, ""));
        self
    }
}

/// A command line being put together.
#[derive(Debug)]
pub struct Line<'a> {
    bench: &'a Bench,
    command: Command,
    input: Option<Vec<u8>>,
}

/// A running console.
#[derive(Debug)]
pub struct Started {
    child: Child,
    feeder: Option<JoinHandle<()>>,
    stdout: JoinHandle<Vec<u8>>,
    stderr: JoinHandle<Vec<u8>>,
    output: mpsc::Receiver<()>,
    complaints: mpsc::Receiver<Vec<u8>>,
}

impl Bench {
    /// Waits for its turn and sets everything up.
    ///
    /// # Panics
    /// If the host has no room for a few files.
    #[must_use]
    pub fn new() -> Self {
        let turn = Turn::wait();
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["run", "tmp"] {
            let path = folder.path().join(name);
            std::fs::create_dir(&path).expect("writable");
            std::fs::set_permissions(path, PermissionsExt::from_mode(0o700)).expect("ours");
        }
        Self {
            folder,
            shm: entries(Path::new("/dev/shm")),
            _turn: turn,
        }
    }

    /// A path for a file of the test's.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file of the test's.
    ///
    /// # Panics
    /// If it can't be written.
    #[must_use]
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).expect("writable");
        path
    }

    /// Writes a shell script of the test's that can be run.
    ///
    /// # Panics
    /// If it can't be written.
    #[must_use]
    pub fn script(&self, name: &str, body: &str) -> PathBuf {
        let path = self.file(name, format!("#!/bin/sh\n{body}\n").as_bytes());
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("ours");
        path
    }

    /// `viaduct WORDS…`
    #[must_use]
    pub fn line<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Line<'_> {
        let mut command = Command::new(viaduct());
        self.settle(&mut command);
        command.args(words);
        Line {
            bench: self,
            command,
            input: None,
        }
    }

    /// Gives a command the environment of this bench.
    pub(crate) fn settle(&self, command: &mut Command) {
        for name in SETTINGS {
            command.env_remove(name);
        }
        command
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("TMPDIR", self.path("tmp"));
    }

    /// Runs `viaduct WORDS…` with no standard input.
    #[must_use]
    pub fn viaduct<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Finished {
        self.line(words).finish()
    }

    /// Runs a command in a VM of its own, on the small root.
    #[must_use]
    pub fn run(&self, command: &[&str]) -> Finished {
        self.line(["run", "--rootfs", "busybox"])
            .guest(command)
            .finish()
    }

    /// Runs a line of shell in this environment.
    #[must_use]
    pub fn shell(&self, line: &str) -> Finished {
        let mut command = Command::new("bash");
        self.settle(&mut command);
        command.args(["-c", line]);
        Line {
            bench: self,
            command,
            input: None,
        }
        .finish()
    }

    /// Brings a rack up; [`Bench::exec`] runs commands in it.
    ///
    /// # Panics
    /// If it does not come up.
    pub fn up(&self, name: &str, words: &[&str]) {
        let up = ["up", "--name", name].into_iter();
        let done = self.viaduct(up.chain(words.iter().copied())).well();
        assert_eq!(done.out(), "");
    }

    /// A command in a rack that is up.
    #[must_use]
    pub fn exec(&self, name: &str, command: &[&str]) -> Line<'_> {
        self.line(["exec", "--name", name]).guest(command)
    }

    /// Takes a rack down.
    ///
    /// # Panics
    /// If that fails.
    pub fn down(&self, name: &str) {
        self.viaduct(["down", "--name", name]).well();
    }

    /// All processes that were started in this environment and live.
    #[must_use]
    pub fn processes(&self) -> Vec<(Pid, String)> {
        let run = self.path("run").into_os_string().into_encoded_bytes();
        let mark = [b"XDG_RUNTIME_DIR=".as_slice(), &run].concat();
        let folders = std::fs::read_dir("/proc").expect("a /proc");
        let found = folders.flatten().filter_map(|folder| {
            let pid = folder.file_name().to_str()?.parse().ok()?;
            let variables = std::fs::read(folder.path().join("environ")).ok()?;
            let name = std::fs::read_to_string(folder.path().join("comm")).ok()?;
            let ours = variables.split(|byte| *byte == 0).any(|each| each == mark);
            let pid = ours.then(|| Pid::from_raw(pid)).flatten()?;
            Some((pid, name.trim().to_owned()))
        });
        found.collect()
    }

    /// Waits until something is so.
    ///
    /// # Panics
    /// If it never is.
    #[track_caller]
    pub fn wait_until(&self, what: &str, condition: impl Fn() -> bool) {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < LIMIT, "{what}: {:?}", self.processes());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until a node's process runs.
    #[track_caller]
    pub fn wait_for_node(&self) {
        self.wait_until("a node starts", || {
            let all = self.processes();
            all.iter().any(|(_, name)| name.starts_with("qemu"))
        });
    }

    /// Fails if anything is left of what was started: a process, a file, an
    /// entry in shared memory.
    ///
    /// # Panics
    /// With what is left.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        // The kernel takes a moment to end a process whose parent has ended.
        self.wait_until("no process is left", || self.processes().is_empty());
        assert_eq!(entries(&self.path("run/viaduct")), BTreeSet::new());
        assert_eq!(entries(&self.path("tmp")), BTreeSet::new());
        // Others on this host may use shared memory meanwhile.
        let shm = entries(Path::new("/dev/shm"));
        let ours = |name: &&OsString| {
            let name = name.to_string_lossy();
            name.contains("viaduct") || name.contains("ivshmem") || name.contains("qemu")
        };
        let left: Vec<_> = shm.difference(&self.shm).filter(ours).collect();
        assert_eq!(left, Vec::<&OsString>::new());
    }
}

impl Default for Bench {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Bench {
    /// A test that has failed may leave racks.
    fn drop(&mut self) {
        for (pid, _) in self.processes() {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

fn entries(folder: &Path) -> BTreeSet<OsString> {
    let found = std::fs::read_dir(folder).into_iter().flatten().flatten();
    found.map(|entry| entry.file_name()).collect()
}

impl Line<'_> {
    /// More words.
    #[must_use]
    pub fn words<S: AsRef<OsStr>>(mut self, words: impl IntoIterator<Item = S>) -> Self {
        self.command.args(words);
        self
    }

    /// `-- COMMAND ARG…`
    #[must_use]
    pub fn guest<S: AsRef<OsStr>>(mut self, command: impl IntoIterator<Item = S>) -> Self {
        self.command.arg("--").args(command);
        self
    }

    /// Sets a variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// What comes on standard input.
    #[must_use]
    pub fn input(mut self, bytes: Vec<u8>) -> Self {
        self.input = Some(bytes);
        self
    }

    /// Starts it.
    ///
    /// # Panics
    /// If it can't be started.
    #[must_use]
    pub fn start(mut self) -> Started {
        let stdin = match self.input {
            Some(_) => Stdio::piped(),
            None => Stdio::null(),
        };
        self.command
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = self.command.spawn().expect("viaduct starts");
        let stdin = child.stdin.take();
        let feeder = self.input.zip(stdin).map(|(bytes, mut stdin)| {
            // A command that ends early leaves some of it unread.
            std::thread::spawn(move || drop(stdin.write_all(&bytes)))
        });
        let (tell_output, output) = mpsc::channel();
        let (tell_complaint, complaints) = mpsc::channel();
        let stdout = child.stdout.take().expect("piped");
        let stderr = child.stderr.take().expect("piped");
        Started {
            child,
            feeder,
            stdout: collect(stdout, move |_| {
                let _ = tell_output.send(());
            }),
            stderr: collect(stderr, move |bytes| {
                let _ = tell_complaint.send(bytes.to_vec());
            }),
            output,
            complaints,
        }
    }

    /// Runs it to its end.
    #[must_use]
    #[track_caller]
    pub fn finish(self) -> Finished {
        self.start().finish()
    }

    /// The bench it runs in.
    #[must_use]
    pub fn bench(&self) -> &Bench {
        self.bench
    }
}

/// Reads a stream to its end, telling of every piece that comes.
fn collect(
    mut stream: impl Read + Send + 'static,
    tell: impl Fn(&[u8]) + Send + 'static,
) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        let mut buffer = [0; 16 << 10];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            all.extend(&buffer[..count]);
            tell(&buffer[..count]);
        }
        all
    })
}

impl Started {
    /// Waits until something more comes on its standard output.
    ///
    /// # Panics
    /// If nothing comes.
    #[track_caller]
    pub fn wait_for_output(&self) {
        let came = self.output.recv_timeout(LIMIT);
        came.expect("there is output");
    }

    /// Waits until these words come on its standard error.
    ///
    /// # Panics
    /// If they don't come.
    #[track_caller]
    pub fn wait_for_complaint(&self, words: &str) {
        let mut seen = Vec::new();
        while !text(&seen).contains(words) {
            let came = self.complaints.recv_timeout(LIMIT);
            seen.extend(came.unwrap_or_else(|_| panic!("no {words:?} in {}", text(&seen))));
        }
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// If it has ended and was waited for.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("not waited for");
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it does not end.
    #[must_use]
    #[track_caller]
    pub fn finish(mut self) -> Finished {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("our child") {
                break status;
            }
            if start.elapsed() > LIMIT {
                let _ = self.child.kill();
                let _ = self.child.wait();
                panic!("viaduct hangs; stderr: {}", text(&join(self.stderr)));
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        if let Some(feeder) = self.feeder {
            feeder.join().expect("the feeder does not panic");
        }
        let signal = || status.signal().map(|number| 128 + number);
        Finished {
            status: status.code().or_else(signal).expect("one or the other"),
            stdout: join(self.stdout),
            stderr: join(self.stderr),
        }
    }
}

fn join(reader: JoinHandle<Vec<u8>>) -> Vec<u8> {
    reader.join().expect("the reader does not panic")
}
