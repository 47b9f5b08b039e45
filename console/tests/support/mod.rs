//! A place to try the console in: its own runtime directory, stand-ins for
//! what a rack is made of, and a watch over what is left behind.
#![expect(dead_code, reason = "each test program uses a part")]

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Nothing that these tests do may take longer.
const LIMIT: Duration = Duration::from_secs(60);

pub(crate) fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("text")
}

pub(crate) struct Bench {
    folder: tempfile::TempDir,
}

/// Takes a rack down when it goes out of scope.
pub(crate) struct Up<'a>(&'a Bench, String);

impl Drop for Up<'_> {
    fn drop(&mut self) {
        let out = self.0.viaduct(&["down", "--name", &self.1], &[]);
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    }
}

fn build_folder() -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_viaduct"));
    program.parent().expect("a folder").to_owned()
}

impl Bench {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut kernel = vec![0; 8192];
        kernel[0x1f1] = 4;
        kernel[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        kernel[0x202..0x206].copy_from_slice(b"HdrS");
        kernel[0x206..0x208].copy_from_slice(&[0x0f, 0x02]);
        kernel[0x236] = 1;
        for (name, bytes) in [
            ("kernel", kernel.as_slice()),
            ("initramfs", b"x"),
            ("hv", b"x"),
        ] {
            std::fs::write(folder.path().join(name), bytes).expect("writable");
        }
        let runtime = folder.path().join("run");
        std::fs::create_dir(&runtime).expect("writable");
        let private = PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(&runtime, private).expect("ours");
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `viaduct WORDS… -- COMMAND…`, with files to boot where it needs them.
    pub(crate) fn command(&self, words: &[&str], command: &[&str]) -> Command {
        let mut line = Command::new(env!("CARGO_BIN_EXE_viaduct"));
        line.args(words);
        if matches!(words[0], "run" | "up") {
            line.arg("--guest").arg(self.path("kernel"));
            line.arg("--initramfs").arg(self.path("initramfs"));
            line.args(["--rootfs", "busybox"]);
            if !words.contains(&"--memory") {
                line.args(["--memory", "128M"]);
            }
        }
        if !command.is_empty() {
            line.arg("--").args(command);
        }
        line.env("XDG_RUNTIME_DIR", self.path("run"))
            .env(
                "VIADUCT_QEMU",
                build_folder().join("examples/stand_in_node"),
            )
            .env("VIADUCT_HYPERVISOR", self.path("hv"))
            .env("VIADUCT_ACCEL", "tcg")
            .env("STAND_IN_AGENT", agent())
            .env("STAND_IN_MARK", self.folder.path())
            .env_remove("STAND_IN")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        line
    }

    pub(crate) fn spawn(&self, mut line: Command) -> Child {
        line.spawn().expect("viaduct starts")
    }

    /// Waits for a child's end; kills it if that takes too long.
    pub(crate) fn end(&self, mut child: Child) -> Output {
        let pid = Pid::from_child(&child);
        drop(child.stdin.take());
        let (done, watched) = std::sync::mpsc::channel::<()>();
        let watch = std::thread::spawn(move || {
            if watched.recv_timeout(LIMIT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                let _ = kill_process(pid, Signal::KILL);
            }
        });
        let out = child.wait_with_output().expect("it ends");
        drop(done);
        watch.join().expect("no panic");
        out
    }

    pub(crate) fn viaduct(&self, words: &[&str], command: &[&str]) -> Output {
        self.end(self.spawn(self.command(words, command)))
    }

    pub(crate) fn run(&self, command: &[&str]) -> Output {
        self.viaduct(&["run"], command)
    }

    /// Runs a command with this standard input.
    pub(crate) fn pipe(&self, line: Command, input: &[u8]) -> Output {
        let mut child = self.spawn(line);
        let mut stdin = child.stdin.take().expect("piped");
        let input = input.to_vec();
        let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
        let out = self.end(child);
        writer.join().expect("no panic");
        out
    }

    pub(crate) fn up<'a>(&'a self, name: &'a str) -> (&'a str, Up<'a>) {
        let out = self.viaduct(&["up", "--name", name], &[]);
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        assert_eq!(text(&out.stdout), "");
        (name, Up(self, name.to_owned()))
    }

    /// Sends bytes to a rack's socket; returns what comes back.
    pub(crate) fn talk(&self, name: &str, bytes: &[u8]) -> Vec<u8> {
        let path = self.path("run/viaduct").join(name).join("sock");
        let mut rack = UnixStream::connect(path).expect("it listens");
        rack.write_all(bytes).expect("it reads");
        rack.shutdown(std::net::Shutdown::Write).expect("connected");
        let mut answer = Vec::new();
        rack.set_read_timeout(Some(LIMIT)).expect("connected");
        drop(rack.read_to_end(&mut answer));
        answer
    }

    /// All processes that were started for this bench.
    fn processes(&self) -> Vec<Pid> {
        let mark = format!("STAND_IN_MARK={}", self.folder.path().display());
        let entries = std::fs::read_dir("/proc").expect("a /proc");
        let pids = entries.flatten().filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let environment = std::fs::read(entry.path().join("environ")).ok()?;
            let ours = environment
                .split(|byte| *byte == 0)
                .any(|entry| entry == mark.as_bytes());
            ours.then(|| Pid::from_raw(pid)).flatten()
        });
        pids.collect()
    }

    fn nodes(&self) -> Vec<Pid> {
        let is_node = |pid: &Pid| {
            let path = format!("/proc/{}/exe", pid.as_raw_nonzero());
            std::fs::read_link(path).is_ok_and(|path| path.ends_with("stand_in_node"))
        };
        self.processes().into_iter().filter(is_node).collect()
    }

    /// Kills the node with this id.
    pub(crate) fn kill_node(&self, id: u16) {
        let word = format!("node={id}");
        let is_it = |pid: &&Pid| {
            let line = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero()));
            line.is_ok_and(|line| {
                line.split(|byte| matches!(*byte, 0 | b' '))
                    .any(|at| at == word.as_bytes())
            })
        };
        let nodes = self.nodes();
        let pid = nodes.iter().find(is_it).expect("it runs");
        kill_process(*pid, Signal::KILL).expect("ours");
    }

    /// Writes a file; returns its path.
    pub(crate) fn file(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        std::fs::write(&path, text).expect("writable");
        path.to_str().expect("text").to_owned()
    }

    fn wait_until(&self, what: &str, condition: impl Fn() -> bool) {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < LIMIT, "{what}: {:?}", self.processes());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn wait_for_node(&self) {
        self.wait_until("no node starts", || !self.nodes().is_empty());
    }

    /// Freezes the nodes, as a hung guest would be.
    pub(crate) fn stop_nodes(&self) {
        for pid in self.nodes() {
            kill_process(pid, Signal::STOP).expect("ours");
        }
    }

    pub(crate) fn kill_supervisor(&self, name: &str) {
        let lock = self.path("run/viaduct").join(name).join("lock");
        let pid = std::fs::read_to_string(lock).expect("a lock");
        let pid = Pid::from_raw(pid.trim().parse().expect("a pid")).expect("not 0");
        kill_process(pid, Signal::KILL).expect("ours");
        let line = format!("/proc/{}/cmdline", pid.as_raw_nonzero());
        self.wait_until("the supervisor lives on", || {
            std::fs::read(&line).unwrap_or_default().is_empty()
        });
    }

    /// Fails unless all processes are gone within a moment, and all files.
    pub(crate) fn assert_nothing_left(&self) {
        // Commands on this host outlive their node for a moment; in a real
        // guest they are inside it.
        self.wait_until("nodes are left", || self.nodes().is_empty());
        let racks = self.path("run/viaduct");
        let left: Vec<_> = std::fs::read_dir(racks)
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
            .unwrap_or_default();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// The guest's agent, built for this host.
fn agent() -> PathBuf {
    let path = build_folder().join("viaduct-agent");
    assert!(
        path.exists(),
        "{} is missing: cargo build -p viaduct-agent",
        path.display()
    );
    path
}
