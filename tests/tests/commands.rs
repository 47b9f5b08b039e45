//! Commands in the guest: their arguments, streams and exit statuses.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use guest_linux_config::Images;
use rustix::process::Signal;
use viaduct_tests::{Bench, Line, noise, text, viaduct};

/// A script and the exit status that it must lead to.
const STATUSES: [(&str, i32); 8] = [
    ("exit 0", 0),
    ("exit 1", 1),
    ("exit 7", 7),
    ("exit 255", 255),
    ("kill -TERM $$", 128 + 15),
    ("kill -KILL $$", 128 + 9),
    ("kill -INT $$", 128 + 2),
    ("kill -SEGV $$", 128 + 11),
];

/// Fails unless a command that can't be started is reported so.
#[track_caller]
fn assert_cannot_start(line: Line<'_>, status: i32, name: &str) {
    let done = line.finish();
    assert_eq!((done.status, done.out().as_str()), (status, ""));
    let said = done.err();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(
        said.starts_with("viaduct: ") && said.contains(name),
        "{said}"
    );
}

#[test]
fn run_ends_with_the_commands_status() {
    let bench = Bench::new();
    for (script, status) in [STATUSES[0], STATUSES[1], STATUSES[2], STATUSES[4]] {
        let done = bench.run(&["sh", "-c", script]);
        assert_eq!(
            (done.status, done.out().as_str(), done.err().as_str()),
            (status, "", ""),
            "{script}"
        );
    }
    let run = |command| {
        let words = ["run", "--rootfs", "busybox"];
        bench.line(words).guest([command])
    };
    assert_cannot_start(run("/no/such/thing"), 127, "/no/such/thing");
    assert_cannot_start(run("/etc"), 126, "/etc");
    bench.assert_nothing_left();
}

/// Fails unless a VM that ends under its command is Viaduct's failure.
fn assert_ends_vm(sysrq: char, reason: &str) {
    let bench = Bench::new();
    let script = format!("echo {sysrq} > /proc/sysrq-trigger; sleep 1000");
    let done = bench.run(&["sh", "-c", &script]);
    let said = done.err();
    assert_eq!((done.status, said.lines().count()), (125, 1), "{said}");
    assert!(said.contains(reason), "{said}");
    bench.assert_nothing_left();
}

#[test]
fn a_guest_that_switches_itself_off() {
    assert_ends_vm('o', "switched itself off");
}

#[test]
fn a_guest_that_resets_itself() {
    assert_ends_vm('b', "reset");
}

#[test]
fn a_guest_that_panics() {
    assert_ends_vm('c', "Kernel panic");
}

#[test]
fn exec_in_a_debian_that_is_up() {
    let bench = Bench::new();
    bench.up("debian", &[]);
    exit_statuses(&bench);
    arguments_are_untouched(&bench);
    streams_are_apart_and_exact(&bench);
    two_at_once(&bench);
    stock_programs_run(&bench);
    bench.down("debian");
    bench.assert_nothing_left();
}

fn exit_statuses(bench: &Bench) {
    for (script, status) in STATUSES {
        let done = bench.exec("debian", &["bash", "-c", script]).finish();
        assert_eq!(
            (done.status, done.out().as_str(), done.err().as_str()),
            (status, "", ""),
            "{script}"
        );
    }
    let name = "/no/such/thing";
    assert_cannot_start(bench.exec("debian", &[name]), 127, name);
    assert_cannot_start(bench.exec("debian", &["nosuchthing"]), 127, "nosuchthing");
    let name = "/etc/passwd";
    assert_cannot_start(bench.exec("debian", &[name]), 126, name);
    assert_cannot_start(bench.exec("debian", &["/usr"]), 126, "/usr");
}

fn arguments_are_untouched(bench: &Bench) {
    let every_byte: Vec<u8> = (1..=255).collect();
    let arguments: Vec<Vec<u8>> = vec![
        b"two words".to_vec(),
        b"  spaces  around  ".to_vec(),
        b"it's \"quoted\" \\and\\ `escaped`".to_vec(),
        b"$HOME ${HOME} $(id) * ? [a-z] ~ ; | & < > #".to_vec(),
        b"new\nline\n".to_vec(),
        b"tab\there\r".to_vec(),
        Vec::new(),
        b"--".to_vec(),
        b"-x".to_vec(),
        b"--memory=1T".to_vec(),
        every_byte,
        "Ünïcödé 🚀".as_bytes().to_vec(),
        vec![0xff, 0xfe, 0x80],
        vec![b'a'; 60_000],
        Vec::new(),
    ];
    let words = arguments.iter().cloned().map(OsString::from_vec);
    let done = bench
        .exec("debian", &["printf", "%s\\0"])
        .words(words)
        .finish()
        .well();
    let expected: Vec<u8> = arguments
        .iter()
        .flat_map(|each| each.iter().copied().chain([0]))
        .collect();
    assert!(done.stdout == expected, "{}", done.out());
}

fn streams_are_apart_and_exact(bench: &Bench) {
    let script = "echo out; echo err >&2; echo more; exit 3";
    let done = bench.exec("debian", &["sh", "-c", script]).finish();
    assert_eq!(
        (done.status, done.out().as_str(), done.err().as_str()),
        (3, "out\nmore\n", "err\n")
    );

    // The guest makes the same noise by itself, so that only it comes out.
    let script = format!(
        "import sys\nstate, mask, out = {}, (1 << 64) - 1, bytearray()\n\
         for _ in range(1 << 17):\n\
        \x20   state ^= state << 13 & mask\n\
        \x20   state ^= state >> 7\n\
        \x20   state ^= state << 17 & mask\n\
        \x20   out += state.to_bytes(8, 'little')\n\
         for _ in range(32): sys.stdout.buffer.write(out)\n",
        0x9e37_79b9_7f4a_7c15_u64
    );
    let done = bench
        .exec("debian", &["python3", "-c", &script])
        .finish()
        .well();
    let expected = noise(1 << 20).repeat(32);
    assert_eq!(done.stdout.len(), expected.len());
    assert!(done.stdout == expected, "the bytes differ");

    let sent = noise(8 << 20);
    let cat = bench.exec("debian", &["cat"]).input(sent.clone());
    let done = cat.finish().well();
    assert_eq!(done.stdout.len(), sent.len());
    assert!(done.stdout == sent, "the bytes differ");

    let both = bench
        .exec("debian", &["sh", "-c", "tee /dev/stderr"])
        .input(sent[..1 << 20].to_vec())
        .finish();
    assert_eq!(both.status, 0);
    assert!(both.stdout == sent[..1 << 20], "the bytes differ");
    assert!(both.stderr == sent[..1 << 20], "the bytes differ");

    let none = bench.exec("debian", &["cat"]).input(Vec::new());
    assert_eq!(none.finish().well().stdout, b"");
    let part = bench.exec("debian", &["head", "-c", "5"]).input(sent);
    assert_eq!(part.finish().well().stdout, noise(5));
}

/// Each waits for the other.
fn two_at_once(bench: &Bench) {
    bench
        .exec("debian", &["mkfifo", "/tmp/there", "/tmp/back"])
        .finish()
        .well();
    let script = "echo ping > /tmp/there; cat /tmp/back";
    let first = bench.exec("debian", &["sh", "-c", script]).start();
    let script = "cat /tmp/there; echo pong > /tmp/back";
    let second = bench.exec("debian", &["sh", "-c", script]).start();
    assert_eq!(first.finish().well().out(), "pong\n");
    assert_eq!(second.finish().well().out(), "ping\n");
}

/// What a stock userland is there for.
fn stock_programs_run(bench: &Bench) {
    for (script, expected) in [
        ("uname -s -m", "Linux x86_64\n"),
        (". /etc/os-release; echo $ID", "debian\n"),
        (
            "python3 -c 'print(sum(i * i for i in range(100000)))'",
            "333328333350000\n",
        ),
        (
            "cd /tmp; printf 'int main(void) { return 42; }' > a.c; gcc -O2 -o a a.c; ./a; echo $?",
            "42\n",
        ),
        ("stress-ng --cpu 2 --cpu-ops 20 -q && echo done", "done\n"),
        ("ps -e -o comm= | grep -cx 'kthreadd'", "1\n"),
        (
            "seq 1 200000 | sort -R | sort -n | md5sum",
            "0e10426a1d5bddffcef02f1345787128  -\n",
        ),
        (
            "for i in $(seq 300); do (exit $((i % 7))) || :; done; echo forked",
            "forked\n",
        ),
    ] {
        let done = bench.exec("debian", &["bash", "-c", script]).finish();
        assert_eq!(
            (done.out().as_str(), done.err().as_str()),
            (expected, ""),
            "{script}"
        );
    }
}

#[test]
fn the_root_is_writable_and_forgets() {
    let bench = Bench::new();
    let image = debian_image();
    let before = sum(&image);
    let run = |script: &str| {
        let words = ["run", "--memory", "512M"];
        bench
            .line(words)
            .guest(["bash", "-c", script])
            .finish()
            .well()
            .out()
    };
    let script = "set -e; echo changed > /root/kept; echo x >> /etc/passwd; rm /etc/os-release; \
                  head -c 16M /dev/zero > /usr/large; sync; cat /root/kept";
    assert_eq!(run(script), "changed\n");
    let script = "ls /root/kept /usr/large 2>/dev/null; tail -n 1 /etc/passwd | grep -cx x; \
                  test -e /etc/os-release && echo there";
    assert_eq!(run(script), "0\nthere\n");
    assert_eq!(sum(&image), before);
    bench.assert_nothing_left();
}

#[test]
fn a_root_cannot_change_its_image() {
    let bench = Bench::new();
    // A rack with a copy of the image, so that every byte can be compared.
    let image = bench.path("root.img");
    bench
        .shell(&format!(
            "cp --sparse=always '{}' '{}'",
            debian_image().display(),
            image.display()
        ))
        .well();
    let before = sum(&image);
    let script = "dd if=/dev/urandom of=/dev/pmem0 bs=4k seek=100000 count=64 oflag=direct";
    let done = bench
        .line(["run", "--memory", "512M", "--rootfs"])
        .words([&image])
        .guest(["bash", "-c", script])
        .finish();
    // It was tried, and whatever became of the VM:
    assert!(done.err().contains("records out"), "{}", done.err());
    assert_eq!(sum(&image), before, "{}", done.err());
    bench.assert_nothing_left();
}

/// The cached root image.
fn debian_image() -> PathBuf {
    let images = Images::open(None, |_, _| {}).expect("a cache");
    images.debian_root().expect("it can be built")
}

fn sum(path: &Path) -> String {
    let out = Command::new("sha256sum").arg(path).output();
    let out = out.expect("coreutils");
    assert!(out.status.success());
    text(&out.stdout)
}

#[test]
fn a_reader_that_goes_away_ends_the_command() {
    let bench = Bench::new();
    let script = format!(
        "{} run --rootfs busybox -- yes | head -n 1; echo \"${{PIPESTATUS[0]}}\"",
        viaduct().display()
    );
    let out = bench.shell(&script);
    assert_eq!((out.out().as_str(), out.err().as_str()), ("y\n141\n", ""));
    bench.assert_nothing_left();
}

#[test]
fn two_racks_side_by_side() {
    let bench = Bench::new();
    let small = ["--rootfs", "busybox", "--cores", "1", "--memory", "256M"];
    bench.up("left", &small);
    bench.up("right", &small);
    let write = |name, word: &str| {
        let script = format!("echo {word} > /tmp/word");
        bench.exec(name, &["sh", "-c", &script]).finish().well();
    };
    write("left", "sinister");
    write("right", "dexter");
    let read = |name| bench.exec(name, &["cat", "/tmp/word"]).finish();
    assert_eq!(read("left").well().out(), "sinister\n");
    assert_eq!(read("right").well().out(), "dexter\n");
    bench.down("left");
    assert_eq!(read("right").well().out(), "dexter\n");
    assert_eq!(read("left").status, 125);
    bench.down("right");
    bench.assert_nothing_left();
}

#[test]
fn status_and_console_of_a_rack_that_is_up() {
    let bench = Bench::new();
    bench.up("shown", &["--rootfs", "busybox", "--memory", "256M"]);
    let done = bench
        .viaduct(["status", "--json", "--name", "shown"])
        .well();
    let report: serde_json::Value = serde_json::from_str(&done.out()).expect("it is JSON");
    assert_eq!(report["name"], "shown");
    assert_eq!(report["vm"]["state"], "running");
    assert_eq!(report["vm"]["vcpus"], 2);
    assert_eq!(report["vm"]["memory_bytes"], 256 << 20);
    assert_eq!(report["nodes"].as_array().expect("a list").len(), 1);
    let vcpus = report["vcpus"].as_array().expect("a list");
    assert_eq!(vcpus.len(), 2);
    for what in ["status", "nodes", "vcpus", "memory"] {
        let done = bench.viaduct([what, "--name", "shown"]).well();
        assert!(done.out().lines().count() >= 2, "{what}: {}", done.out());
    }

    let script = "echo \"from $(uname -s)\" > /dev/ttyS0";
    bench.exec("shown", &["sh", "-c", script]).finish().well();
    bench.wait_until("the console has it", || {
        let done = bench.viaduct(["console", "--no-follow", "--name", "shown"]);
        done.well().out().contains("from Linux\r\n")
    });

    let again = bench.viaduct(["up", "--name", "shown", "--rootfs", "busybox"]);
    assert_eq!(again.status, 125);
    assert!(again.err().contains("already up"), "{}", again.err());
    bench.down("shown");
    let gone = bench.viaduct(["status", "--name", "shown"]);
    assert_eq!(gone.status, 125, "{}", gone.out());
    bench.assert_nothing_left();
}

#[test]
fn signals_reach_the_command() {
    let bench = Bench::new();
    bench.up("signals", &["--rootfs", "busybox", "--memory", "256M"]);
    let script = "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 1; done";
    let running = bench.exec("signals", &["sh", "-c", script]).start();
    running.wait_for_output();
    running.signal(Signal::INT);
    let done = running.finish();
    assert_eq!((done.status, done.out().as_str()), (9, "ready\ncaught\n"));
    let script = "echo ready; exec sleep 1000";
    let running = bench.exec("signals", &["sh", "-c", script]).start();
    running.wait_for_output();
    running.signal(Signal::TERM);
    assert_eq!(running.finish().status, 128 + 15);
    bench.down("signals");
    bench.assert_nothing_left();
}
