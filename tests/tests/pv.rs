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
printf '#!/bin/sh\ncat /proc/$$/comm\n' > script; chmod +x script; ./script
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
# Locks.
python3 - <<'PYTHON'
import fcntl, os, subprocess, sys, time
f=open('locked','w+b'); f.write(b'x'*100); f.flush()
fcntl.lockf(f, fcntl.LOCK_EX, 10, 20)
other = lambda code: subprocess.run([sys.executable,'-c','import fcntl,struct\nf=open("locked","r+b")\n'+code],capture_output=True,text=True)
T='''
def t(*a):
    try: fcntl.lockf(f,fcntl.LOCK_NB|a[0],*a[1:]); return "got"
    except OSError as e: return e.errno
print(t(fcntl.LOCK_EX,10,0),t(fcntl.LOCK_SH,1,25),t(fcntl.LOCK_EX,5,40))
k=struct.unpack("hhqqi4x",fcntl.fcntl(f,fcntl.F_GETLK,struct.pack("hhqqi4x",fcntl.F_WRLCK,0,0,0,0)))
print(k[:4],k[4]>0)
'''
print(other(T).stdout)
fcntl.lockf(f, fcntl.LOCK_UN, 5, 22)
print(other(T).stdout)
r,w=os.pipe(); pid=os.fork()
if pid==0:
    g=open('locked','r+b'); os.write(w,b'w'); fcntl.lockf(g,fcntl.LOCK_EX); os._exit(7)
os.read(r,1); time.sleep(.1); print(os.waitpid(pid,os.WNOHANG))
open('locked').close()  # gives up all locks of this process
print(os.waitstatus_to_exitcode(os.waitpid(pid,0)[1]))
fcntl.flock(f,fcntl.LOCK_EX)
print(other('''
try: fcntl.flock(f,fcntl.LOCK_SH|fcntl.LOCK_NB); print("got")
except OSError as e: print(e.errno)
''').stdout)
f.close()
g=open('locked'); fcntl.flock(g,fcntl.LOCK_EX|fcntl.LOCK_NB); print('end')
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

/// Threads that hand a turn to each other, share a sum and fork, and a
/// program of OpenMP; what they print is the same wherever they run.
const THREADS: &str = r#"
cd /tmp
nproc; getconf _NPROCESSORS_ONLN; grep -c ^processor /proc/cpuinfo
cat > threads.c <<'C'
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static pthread_barrier_t both;
static long turn, sum;
static void *play(void *argument) {
    long me = (long)argument;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(me, &set);
    if (sched_setaffinity(0, sizeof set, &set) || sched_getcpu() != me) return (void *)1;
    for (long round = 0; round < 500; round++) {
        pthread_mutex_lock(&lock);
        while (turn % 2 != me) pthread_cond_wait(&changed, &lock);
        sum += turn++ * (me + 1);
        pthread_cond_broadcast(&changed);
        pthread_mutex_unlock(&lock);
    }
    for (long round = 0; round < 100; round++) {
        pthread_barrier_wait(&both);
        __atomic_fetch_add(&sum, round, __ATOMIC_RELAXED);
    }
    return 0;
}
int main(void) {
    pthread_t threads[2];
    pthread_barrier_init(&both, 0, 2);
    for (long me = 0; me < 2; me++) pthread_create(&threads[me], 0, play, (void *)me);
    for (int me = 0; me < 2; me++) {
        void *bad;
        pthread_join(threads[me], &bad);
        printf("thread %d: %s\n", me, bad ? "elsewhere" : "done");
    }
    printf("%ld turns, sum %ld\n", turn, sum);
    double pi = 0;
    int team = 0;
#pragma omp parallel num_threads(2) reduction(+ : team)
    team++;
#pragma omp parallel for num_threads(2) reduction(+ : pi)
    for (int i = 0; i < 1000000; i++) pi += (i & 1 ? -4.0 : 4.0) / (2 * i + 1);
    printf("a team of %d: %.6f\n", team, pi);
}
C
gcc -O1 -fopenmp threads.c -o threads && ./threads
python3 - <<'PYTHON'
import mmap, os, signal, subprocess, sys, threading, time
failed = []
def memory(number):
    os.sched_setaffinity(0, {number % 2})
    for round in range(50):
        area = mmap.mmap(-1, 1 << 16)
        area[::4096] = bytes([number]) * 16
        if area[::4096] != bytes([number]) * 16 or sum(area[:]) != number * 16:
            failed.append(number)
        area.close()
def commands(number):
    for status in range(10):
        done = subprocess.run(["sh", "-c", f"echo {number} | cat; exit {status}"], capture_output=True)
        if (done.returncode, done.stdout) != (status, b"%d\n" % number):
            failed.append(done)
for work in memory, commands:
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    [t.start() for t in threads]; [t.join() for t in threads]
    print(work.__name__, failed)
# Threads that never come by themselves are stopped, continued and ended.
spin = "import threading\ndef f():\n  while True: pass\n[threading.Thread(target=f).start() for _ in range(3)]\nprint('up', flush=True)\nf()"
child = subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE)
print(child.stdout.readline())
child.send_signal(signal.SIGSTOP); print(os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1]))
child.send_signal(signal.SIGCONT); child.kill(); print(child.wait())
PYTHON
"#;

/// Threads that change one address space against each other.
const SPACES: &str = include_str!("../programs/spaces.c");

/// The values of `/proc/viaduct` by name, for each node.
fn counts(text: &str) -> Vec<Vec<(String, u64)>> {
    let node = |line: &str| {
        let (_, values) = line.split_once(": ")?;
        let words: Vec<_> = values.split_whitespace().collect();
        let pair = |pair: &[&str]| Some(((*pair.first()?).to_owned(), pair.get(1)?.parse().ok()?));
        words.chunks(2).map(pair).collect()
    };
    text.lines().filter_map(node).collect()
}

#[test]
fn one_address_space_on_two_nodes_is_what_it_is_on_linux() {
    let bench = Bench::new();
    let run = |guest, nodes, cores, then| {
        let shape = ["--rootfs", "debian", "--nodes", nodes, "--cores", cores];
        let words = ["run", "--guest", guest].into_iter().chain(shape);
        let script = format!("cd /tmp; cat >s.c; gcc -O1 -pthread s.c -o s && ./s; {then}");
        let line = bench.line(words).guest(["sh", "-c", &script]);
        line.input(SPACES.into()).finish()
    };
    let linux = run("linux", "1", "2", "true");
    let expected = "0 stale, 0 of others, 0 missing, 160 writes denied, 0 not\n";
    assert_eq!((linux.out().as_str(), linux.status), (expected, 0));
    for (nodes, cores) in [("1", "2"), ("2", "1")] {
        let pv = run("pv", nodes, cores, "cat /proc/viaduct");
        let out = pv.out();
        let rest = out.strip_prefix(expected);
        let counts = counts(rest.unwrap_or_else(|| panic!("{nodes} nodes: {out}")));
        assert_eq!(counts.len().to_string(), nodes, "{out}");
        let of = |name| {
            let value = |node: &Vec<(String, u64)>| {
                node.iter()
                    .find(|(key, _)| key == name)
                    .map(|(_, value)| *value)
            };
            counts
                .iter()
                .map(|node| value(node).expect("all are there"))
                .collect::<Vec<_>>()
        };
        // Each node has served faults by itself and followed the log.
        assert!(
            of("faults_without_lock").iter().all(|count| *count > 0),
            "{out}"
        );
        let [applied, appended] = [of("log_applied"), of("log_appended")];
        if nodes == "1" {
            assert_eq!(
                (applied, appended),
                (vec![0], vec![0]),
                "one node needs no log"
            );
        } else {
            assert!(appended.iter().all(|count| *count > 0), "{out}");
            assert!(applied.iter().all(|count| *count > 0), "{out}");
            assert!(
                applied.iter().max() <= Some(&appended.iter().sum()),
                "{out}"
            );
        }
    }
    bench.assert_nothing_left();
}

#[test]
fn threads_on_all_vcpus_print_what_they_print_on_linux() {
    let bench = Bench::new();
    let run = |guest, nodes, cores| {
        let shape = ["--rootfs", "debian", "--nodes", nodes, "--cores", cores];
        let words = ["run", "--guest", guest].into_iter().chain(shape);
        bench.line(words).guest(["sh", "-c", THREADS]).finish()
    };
    let linux = run("linux", "1", "2");
    for (nodes, cores) in [("1", "2"), ("2", "1")] {
        let pv = run("pv", nodes, cores);
        assert_eq!(pv.out(), linux.out(), "{nodes} nodes of {cores} vCPUs");
        assert_eq!(pv.err(), linux.err(), "{nodes} nodes of {cores} vCPUs");
        assert_eq!((pv.status, linux.status), (0, 0));
    }
    bench.assert_nothing_left();
}

/// Waiting for many things, timers, sockets, locks.
const EVENTS: &str = include_str!("../programs/events.py");

/// Locks whose owners die, and locks that the kernel hands on.
const LOCKS: &str = include_str!("../programs/locks.c");

#[test]
fn locks_of_the_dead_are_what_they_are_on_linux() {
    compiled_prints_what_it_does_on_linux(LOCKS, "gcc -O1 -pthread x.c -o x && ./x", 12);
}

/// The clocks and the processor's number without a call.
const VDSO: &str = include_str!("../programs/vdso.c");

#[test]
fn clocks_without_a_call_are_what_they_are_on_linux() {
    let script = "gcc -O1 -pthread x.c -o x && ./x set; ldd ./x | grep -c linux-vdso.so.1
        gcc -O1 -pthread -static x.c -o x && ./x set";
    compiled_prints_what_it_does_on_linux(VDSO, script, 31);
}

/// Restartable sequences.
const SEQUENCES: &str = include_str!("../programs/rseq.c");

#[test]
fn restartable_sequences_are_what_they_are_on_linux() {
    compiled_prints_what_it_does_on_linux(SEQUENCES, "gcc -O1 -pthread x.c -o x && ./x", 13);
}

/// Calls that few programs make.
const CALLS: &str = include_str!("../programs/calls.py");

#[test]
fn events_and_sockets_are_what_they_are_on_linux() {
    prints_what_it_does_on_linux(EVENTS);
}

#[test]
fn calls_that_few_make_are_what_they_are_on_linux() {
    prints_what_it_does_on_linux(CALLS);
}

/// Compiles and runs a program, on Linux and on two vCPUs of one node and of
/// two; on Linux it prints so many lines.
fn compiled_prints_what_it_does_on_linux(program: &str, script: &str, lines: usize) {
    let bench = Bench::new();
    let script = format!("cd /tmp; cat >x.c; {script}");
    let run = |guest, nodes, cores| {
        let shape = ["--rootfs", "debian", "--nodes", nodes, "--cores", cores];
        let words = ["run", "--guest", guest].into_iter().chain(shape);
        let line = bench.line(words).guest(["sh", "-c", &script]);
        line.input(program.into()).finish()
    };
    let linux = run("linux", "1", "2");
    assert_eq!((linux.out().lines().count(), linux.status), (lines, 0));
    for (nodes, cores) in [("1", "2"), ("2", "1")] {
        let pv = run("pv", nodes, cores);
        assert_eq!(pv.out(), linux.out(), "{nodes} nodes of {cores} vCPUs");
        assert_eq!((pv.status, pv.err()), (0, String::new()));
    }
    bench.assert_nothing_left();
}

/// Runs a program of python3 on Linux and on one node and two.
fn prints_what_it_does_on_linux(program: &str) {
    let bench = Bench::new();
    let run = |guest, nodes, cores| {
        let shape = ["--rootfs", "debian", "--nodes", nodes, "--cores", cores];
        let words = ["run", "--guest", guest].into_iter().chain(shape);
        // Linux has the loopback interface down at first.
        let script = "ip link set lo up 2>/dev/null; exec python3 -";
        let line = bench.line(words).guest(["sh", "-c", script]);
        line.input(program.into()).finish()
    };
    let linux = run("linux", "1", "2");
    for (nodes, cores) in [("1", "1"), ("2", "1")] {
        let pv = run("pv", nodes, cores);
        assert_eq!(pv.out(), linux.out(), "{nodes} nodes of {cores} vCPUs");
        assert_eq!((pv.err(), linux.err()), (String::new(), String::new()));
        assert_eq!((pv.status, linux.status), (0, 0));
    }
    bench.assert_nothing_left();
}
