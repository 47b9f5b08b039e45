# Calls one by one; what it prints is the same on every kernel.
import ctypes, errno, fcntl, os, select, signal, socket, subprocess, tempfile, threading, time

libc = ctypes.CDLL(None, use_errno=True)


def refused(call, *words):
    try:
        return call(*words)
    except OSError as error:
        return errno.errorcode[error.errno]


# Policies.
policies = os.SCHED_OTHER, os.SCHED_FIFO, os.SCHED_RR, os.SCHED_BATCH, os.SCHED_IDLE
print([(os.sched_get_priority_min(policy), os.sched_get_priority_max(policy)) for policy in policies])
print(refused(os.sched_get_priority_min, 77), refused(os.sched_getscheduler, -1))
print(os.sched_getscheduler(0) == os.SCHED_OTHER, os.sched_getparam(0), os.sched_rr_get_interval(0) >= 0)
print(refused(os.sched_setscheduler, 0, os.SCHED_OTHER, os.sched_param(1)))
print(refused(os.sched_setscheduler, 1 << 21, os.SCHED_OTHER, os.sched_param(0)))

# Clocks of processor time: a thread's own, another's, a process's.
whole, own = time.process_time(), time.thread_time()
clock = time.pthread_getcpuclockid(threading.get_ident())
while time.clock_gettime(clock) < own + 0.02:
    pass
print(time.process_time() - whole >= 0.02, time.clock_getres(clock) > 0)
idle = threading.Event()
sleeper = threading.Thread(target=idle.wait)
sleeper.start()
time.sleep(0.05)
print(time.clock_gettime(time.pthread_getcpuclockid(sleeper.ident)) < time.process_time())
idle.set()
sleeper.join()
print(refused(time.clock_gettime, (~os.getppid() << 3) | 2) != 0, refused(time.clock_gettime, (~(1 << 21) << 3) | 2))
print(refused(time.clock_getres, 77))

# Pieces of files at offsets; files without names.
file = os.memfd_create("pieces")
print(os.pwritev(file, [b"one", b"", b"two", b"three"], 2), os.fstat(file).st_size, os.lseek(file, 0, 1))
first, second = bytearray(4), bytearray(5)
print(os.preadv(file, [first, second], 1), bytes(first), bytes(second), os.preadv(file, [first], 11), first[:2])
print(refused(os.preadv, file, [first], -1), refused(os.preadv, os.pipe()[0], [first], 0))
print(os.preadv(file, [first], 2, os.RWF_HIPRI), refused(os.preadv, file, [first], 2, 1 << 20))
print(os.readlink(f"/proc/self/fd/{file}"), fcntl.fcntl(file, fcntl.F_GETFD), refused(os.memfd_create, "x", 1 << 20))

# Notices of changes, of which none are asked for.
directory = os.open("/", os.O_RDONLY)
print(fcntl.fcntl(directory, fcntl.F_NOTIFY, fcntl.DN_MULTISHOT), refused(fcntl.fcntl, file, fcntl.F_NOTIFY, 0))

# What has no name, opened through a descriptor's link.
reader, writer = os.pipe()
again = os.open(f"/proc/self/fd/{reader}", os.O_WRONLY)
print(os.write(again, b"through"), os.read(reader, 9), os.stat(f"/dev/fd/{again}").st_ino == os.fstat(reader).st_ino)
os.close(writer)
later = os.open(f"/dev/fd/{again}", os.O_RDONLY | os.O_NONBLOCK)
print(refused(os.read, later, 1), os.close(again), os.read(later, 1), os.access(f"/dev/fd/{later}", os.W_OK))
print(refused(os.open, f"/dev/fd/{os.eventfd(0)}", os.O_RDWR), refused(os.open, f"/dev/fd/{later}", os.O_DIRECTORY))
print(subprocess.run(["bash", "-c", "cat <(echo a) < <(echo b); echo err >/dev/stderr"], capture_output=True))

# Processes as files.
child = os.fork()
if child == 0:
    time.sleep(0.1)
    os._exit(7)
process = os.pidfd_open(child)
print(fcntl.fcntl(process, fcntl.F_GETFD), select.select([process], [], [], 0), select.select([process], [], [])[0] == [process])
print(os.waitid(os.P_PIDFD, process, os.WEXITED).si_status, refused(os.waitid, os.P_PIDFD, process, os.WEXITED))
print(refused(signal.pidfd_send_signal, process, 0), refused(signal.pidfd_send_signal, 0, 0), refused(os.pidfd_open, -1))
signal.signal(signal.SIGUSR1, lambda *_: print("signalled"))
signal.pidfd_send_signal(os.pidfd_open(os.getpid()), signal.SIGUSR1)
directory = os.open("/proc/self", os.O_RDONLY)
signal.pidfd_send_signal(directory, signal.SIGUSR1)

# Signals that bring a word.
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN])
for number in 3, 4:
    libc.sigqueue(os.getpid(), signal.SIGRTMIN, ctypes.c_void_p(number))
info = signal.sigwaitinfo([signal.SIGRTMIN])
print(info.si_code, info.si_pid == os.getpid(), len(signal.sigpending()), signal.sigwaitinfo([signal.SIGRTMIN]).si_code)

# A named pipe that is waited for in vain is no end of it.
path = tempfile.mktemp()
os.mkfifo(path)
signal.signal(signal.SIGALRM, lambda *_: 1 / 0)
for _ in range(2):
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        os.open(path, os.O_RDONLY)
    except ZeroDivisionError:
        print(refused(os.open, path, os.O_WRONLY | os.O_NONBLOCK))

# From file to file.
source, target = tempfile.TemporaryFile(), tempfile.TemporaryFile()
source.write(bytes(range(256)) * 100)
source.flush()
print(os.copy_file_range(source.fileno(), target.fileno(), 20_000, 100), os.lseek(target.fileno(), 0, 1))
print(refused(os.copy_file_range, source.fileno(), source.fileno(), 200, 0, 100))
reader, writer = os.pipe()
print(os.splice(source.fileno(), writer, 5, offset_src=250), os.read(reader, 9), os.lseek(source.fileno(), 0, 1))
os.set_blocking(reader, False)
print(refused(os.splice, reader, target.fileno(), 9), refused(os.splice, source.fileno(), target.fileno(), 9))
print(os.write(writer, b"spliced"), os.splice(reader, target.fileno(), 99, offset_dst=7), os.pread(target.fileno(), 9, 5))
print(subprocess.run(["sh", "-c", "seq 9 | grep 5 >/dev/null"], capture_output=True))

# Signals in /proc.
os.kill(os.getpid(), signal.SIGRTMIN)
print([line.split() for line in open("/proc/self/status") if line[:4] in ("SigP", "ShdP", "SigB", "SigI", "SigC")])

# From a file to a connection.
one, two = socket.socketpair()
one.setblocking(False)
sent = os.sendfile(one.fileno(), source.fileno(), 1000, 1 << 20)
print(sent > 0, len(two.recv(sent, socket.MSG_WAITALL)) == sent, refused(os.sendfile, one.fileno(), source.fileno(), -1, 9))
two.close()
print(refused(os.sendfile, one.fileno(), source.fileno(), 0, 9))

# A message that waits for room, under signals, is sent once.
one, two = socket.socketpair()
if os.fork() == 0:
    one.close()
    count = 0
    while piece := two.recv(10_000):
        count += len(piece)
        time.sleep(0.001)
    os._exit(count == 1 << 20)
two.close()
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
left = bytes(1 << 20)
while left:
    left = left[one.sendmsg([left]):]
one.close()
print(os.wait()[1] >> 8)
signal.setitimer(signal.ITIMER_REAL, 0)
print(refused(time.clock_settime, time.CLOCK_MONOTONIC, 0))

# What the machine is called.
socket.sethostname("another")
libc.setdomainname(b"elsewhere", 9)
print(os.uname().nodename, socket.gethostname(), [open(f"/proc/sys/kernel/{name}name").read() for name in ("host", "domain")])
print(refused(socket.sethostname, "x" * 65), libc.setdomainname(b"", -1), socket.gethostname())
if os.fork() == 0:
    os.setuid(1000)
    print(refused(socket.sethostname, "mine"), flush=True)
    os._exit(0)
os.wait()


# Sockets that only messages hold: what was sent with them is closed.
def end_of(reader):
    return os.read(reader, 1) if select.select([reader], [], [], 10)[0] else "held"


def close(*all):
    for one in all:
        os.close(one) if isinstance(one, int) else one.close()


def pair_with(*sent):
    one, two = socket.socketpair()
    socket.send_fds(two, [b"x"], [one.fileno(), *sent])
    return one, two


reader, writer = os.pipe()
one, two = pair_with(writer)
close(writer, two)
kept = socket.recv_fds(one, 1, 2)[1]
print(select.select([reader], [], [], 0)[0], len(kept))
close(one, *kept)
print(end_of(reader))
reader, writer = os.pipe()
close(*pair_with(writer), writer)
print(end_of(reader))
reader, writer = os.pipe()
(one, two), (three, four) = socket.socketpair(), socket.socketpair()
socket.send_fds(four, [b"x"], [one.fileno()])
socket.send_fds(two, [b"x"], [three.fileno(), writer])
child = os.fork()
if child == 0:
    time.sleep(0.2)
    os._exit(0)
close(one, two, three, four, writer)
print(select.select([reader], [], [], 0)[0], end_of(reader), os.waitpid(child, 0)[1])
reader, writer = os.pipe()
listener, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
listener.bind("\0circle")
listener.listen()
client.connect("\0circle")
socket.send_fds(client, [b"x"], [listener.fileno(), client.fileno(), writer])
close(writer, client, listener)
print(end_of(reader))
reader, last = os.pipe()
for _ in range(1000):
    one, two = socket.socketpair()
    socket.send_fds(two, [b"x"], [last if isinstance(last, int) else last.fileno()])
    close(two, last)
    last = one
print(select.select([reader], [], [], 0)[0])
close(last)
print(end_of(reader))
