//! The paravirtual guest: stock programs do there what they do on Linux.

use viaduct_tests::{Bench, noise};

/// Programs of the Debian root, and what could go wrong with each.
const PROGRAMS: &str = r#"
cd /tmp
# Shells, pipelines, statuses.
for i in 3 1 2; do echo "line $i"; done | sort | tee copy | tr a-z A-Z
bash -c 'declare -A m=([a]=1 [b]=2); echo "${m[a]}${m[b]}"; set -o pipefail; false | true; echo $?'
(exit 9); echo "status $?"
sh -c 'kill -TERM $$'; echo "killed $?"
trap 'echo trapped' USR1; kill -USR1 $$; sleep 0.1
# Files and names.
mkdir -p d/e && echo text > d/e/f && ln -s e/f d/link && ln d/e/f d/hard
cat d/link; stat -c '%s %h %a %F' d/hard; mv d/hard d/moved; ls d; rm -r d; ls d 2>&1
seq 1 5000 | sha256sum; seq 1 5000 | gzip -9 | gunzip | tail -n 1
tar -C /etc -cf - passwd group | tar -tf -
sha256sum /bin/bash
find /etc/apt -type d | sort | head -3; grep -c . /etc/passwd
sed -i s/2/two/ copy && awk '{ n += length($0) } END { print n, NR }' copy
truncate -s 10000 hole; od -c hole | head -2; dd if=/dev/zero bs=1k count=3 2>/dev/null | wc -c
mkfifo pipe; (echo through > pipe &); cat pipe
# Bad programs die alone.
head -c 3000 /bin/ls > broken; chmod +x broken; ./broken 2>/dev/null || echo broken
python3 -c 'import ctypes; ctypes.string_at(8)' 2>/dev/null; echo "fault $?"
# Threads, processes, memory.
python3 - <<'PYTHON'
import hashlib, json, mmap, os, signal, sqlite3, subprocess, threading
lock, seen = threading.Lock(), []
def work(number):
    with lock:
        seen.append(number)
threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
print(sorted(seen), json.dumps({"a": [1, 2.5, None]}))
print(subprocess.run(["sh", "-c", "echo out; echo err >&2; exit 3"], capture_output=True))
table = sqlite3.connect("t.db")
table.execute("create table t(a)"); table.execute("insert into t values(42)"); table.commit()
print(table.execute("select * from t").fetchall())
shared, private = mmap.mmap(-1, 8192), bytearray(b"old")
if os.fork() == 0:
    shared[:3] = b"new"; private[:] = b"new"; os._exit(5)
print(os.waitstatus_to_exitcode(os.wait()[1]), shared[:3], bytes(private))
signal.signal(signal.SIGALRM, lambda *_: print("alarm"))
signal.setitimer(signal.ITIMER_REAL, 0.05); signal.pause()
print(hashlib.sha256(open("/bin/ls", "rb").read()).hexdigest())
PYTHON
exit 17
"#;

#[test]
fn stock_programs_print_what_they_print_on_linux() {
    let bench = Bench::new();
    let run = |guest| {
        let words = [
            "run", "--guest", guest, "--rootfs", "debian", "--cores", "1",
        ];
        bench.line(words).guest(["sh", "-c", PROGRAMS]).finish()
    };
    let (linux, pv) = (run("linux"), run("pv"));
    assert_eq!(pv.out(), linux.out());
    assert_eq!(pv.err(), linux.err());
    assert_eq!((pv.status, linux.status), (17, 17));
    bench.assert_nothing_left();
}

#[test]
fn bytes_pass_unchanged_in_both_directions() {
    let bench = Bench::new();
    let input = noise(1 << 20);
    let words = ["run", "--guest", "pv", "--rootfs", "debian", "--cores", "1"];
    let done = bench
        .line(words)
        .guest(["cat"])
        .input(input.clone())
        .finish();
    assert_eq!((done.status, done.err().as_str()), (0, ""));
    assert!(done.stdout == input, "the bytes differ");
    bench.assert_nothing_left();
}
