# Waiting for things and talking over sockets; what it prints is the same on
# every kernel.
import array, asyncio, ctypes, errno, fcntl, http.server, os, select, signal, socket
import struct, tempfile, threading, time, urllib.request

libc = ctypes.CDLL(None, use_errno=True)


def refused(call, *words):
    try:
        return call(*words)
    except OSError as error:
        return errno.errorcode[error.errno]


# epoll: levels, edges, once; in another one.
one, two = socket.socketpair()
epoll = select.epoll()
epoll.register(one, select.EPOLLIN)
print(epoll.poll(0.01), two.send(b"x"), len(epoll.poll()), len(epoll.poll()), one.recv(9))
epoll.modify(one, select.EPOLLIN | select.EPOLLET)
two.send(b"y")
print(len(epoll.poll()), len(epoll.poll(0.01)), two.send(b"z"), len(epoll.poll()), one.recv(9))
epoll.modify(one, select.EPOLLIN | select.EPOLLONESHOT)
two.send(b"x")
outer = select.epoll()
outer.register(epoll, select.EPOLLIN)
print(len(outer.poll()), len(epoll.poll()), len(epoll.poll(0.01)), outer.poll(0.01))
print(refused(epoll.register, outer.fileno()), refused(epoll.register, one.fileno()))
print(refused(epoll.register, os.open("/etc/passwd", os.O_RDONLY)), refused(epoll.unregister, 0))
two.close()
epoll.modify(one, select.EPOLLIN | select.EPOLLRDHUP)
print(epoll.poll()[0][1])
one.close()
print(epoll.poll(0.01))

# Counters, timers, signals as files.
counter = libc.eventfd(3, 1)  # a semaphore
print([struct.unpack("q", os.read(counter, 8))[0] for _ in range(3)], select.select([counter], [counter], [], 0)[0])
timer = libc.timerfd_create(1, 0)
libc.timerfd_settime(timer, 0, struct.pack("4q", 0, 10_000_000, 0, 10_000_000), None)
time.sleep(0.1)
print(struct.unpack("q", os.read(timer, 8))[0] >= 8, select.select([timer], [], [], 5)[0] == [timer])
# Time is up while the kernel still puts the thread to sleep.
for nap in range(3000):
    select.select([], [], [], nap % 50 / 1_000_000)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGUSR2])
mask = struct.pack("Q", 1 << (signal.SIGUSR1 - 1))
signals = libc.signalfd(-1, mask, 0)
poll = select.epoll()
poll.register(signals, select.EPOLLIN)
print(poll.poll(0.01))
if os.fork() == 0:
    os.kill(os.getppid(), signal.SIGUSR1)
    os._exit(0)
print(len(poll.poll()), struct.unpack_from("I", os.read(signals, 128))[0] == signal.SIGUSR1, os.wait()[1])

# Timers of the process.
identity = ctypes.c_int()
event = struct.pack("qii48x", 42, signal.SIGUSR2, 0)
print(libc.timer_create(1, event, ctypes.byref(identity)))
libc.timer_settime(identity, 0, struct.pack("4q", 0, 5_000_000, 0, 5_000_000), None)
info = signal.sigtimedwait([signal.SIGUSR2], 5)
time.sleep(0.05)
print(info.si_signo == signal.SIGUSR2, info.si_code, libc.timer_getoverrun(identity) >= 0)
print(libc.timer_delete(identity), libc.timer_delete(identity))
fired = []
for which, number in (signal.ITIMER_VIRTUAL, signal.SIGVTALRM), (signal.ITIMER_PROF, signal.SIGPROF):
    signal.signal(number, lambda number, _: fired.append(number.real))
    signal.setitimer(which, 0.02)
    while not fired or fired[-1] != number:
        pass
print(fired)

# Streams: connections, shutdown, refusal, much data.
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
end, address = server.accept()
print(address == client.getsockname(), end.getpeername() == address, server.getsockname()[0])
sender = threading.Thread(target=lambda: (client.sendall(b"q" * 1_000_000), client.shutdown(socket.SHUT_WR)))
sender.start()
count = 0
while piece := end.recv(70_000):
    count += len(piece)
sender.join()
print(count, end.send(b"back"), client.recv(9), refused(client.send, b"x"))
print(refused(socket.create_server, server.getsockname()), refused(end.connect, server.getsockname()))
port = server.getsockname()[1]
server.close()
print(refused(socket.create_connection, ("127.0.0.1", port)))
end.close()
print(client.recv(9), refused(client.getpeername))
late = socket.socket()
late.settimeout(0.05)
server = socket.create_server(("127.0.0.1", 0))
late.connect(server.getsockname())
try:
    late.recv(1)
except TimeoutError:
    print("in vain", late.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

# Names of files, and files that are sent.
path = tempfile.mktemp()
server = socket.socket(socket.AF_UNIX)
server.bind(path)
client = socket.socket(socket.AF_UNIX)
print(refused(client.connect, path), refused(client.connect, path + "?"))
server.listen()
client.connect(path)
end, _ = server.accept()
reader, writer = os.pipe()
socket.send_fds(client, [b"hi"], [reader, writer])
message, files, flags, _ = socket.recv_fds(end, 10, 5)
os.write(files[1], b"through")
print(message, len(files), flags, os.read(reader, 9), end.getsockname() == path)
credentials = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
print(credentials == (os.getpid(), 0, 0), refused(socket.socket(socket.AF_UNIX).bind, path))
hidden = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
hidden.bind("\0hidden")
hidden.listen()
client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
client.connect("\0hidden")
end, _ = hidden.accept()
print(client.send(b"one"), client.send(b"two"), end.recv(2), end.recv(9))

# Datagrams.
one = socket.socket(type=socket.SOCK_DGRAM)
one.bind(("127.0.0.1", 0))
two = socket.socket(type=socket.SOCK_DGRAM)
two.connect(one.getsockname())
print(two.send(b"hello"), two.send(b""), one.recvmsg(3)[0::2], one.recvfrom(9) == (b"", two.getsockname()))

# What others make of it.
async def main():
    async def serve(reader, writer):
        writer.write((await reader.readline()).upper())
        writer.close()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"hello\n")
    print(await reader.read())
    child = await asyncio.create_subprocess_exec("echo", "child", stdout=-1)
    print((await child.communicate())[0])
asyncio.run(main())


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


os.chdir("/etc")
web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
threading.Thread(target=web.serve_forever, daemon=True).start()
print(urllib.request.urlopen(f"http://127.0.0.1:{web.server_port}/hostname").read())

# Locks in a circle; attributes where there are none.
lock = tempfile.TemporaryFile()
fcntl.lockf(lock, fcntl.LOCK_EX, 1, 0)
reader, writer = os.pipe()
if os.fork() == 0:
    fcntl.lockf(lock, fcntl.LOCK_EX, 1, 1)
    os.write(writer, b"x")
    fcntl.lockf(lock, fcntl.LOCK_EX, 1, 0)
    os._exit(3)
os.read(reader, 1)
time.sleep(0.1)
print(refused(fcntl.lockf, lock, fcntl.LOCK_EX, 1, 1))
fcntl.lockf(lock, fcntl.LOCK_UN, 1, 0)
print(os.wait()[1] >> 8)
print(os.listxattr("/proc/self/status"), refused(os.getxattr, "/proc/self/status", "user.x"))
print(refused(os.getxattr, "/none", "user.x"), refused(os.setxattr, "/dev/shm", "user.x", b""))

# IPv6: this machine's own address, and IPv4's mapped into it.
server = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
port = server.getsockname()[1]
for host in "::1", "127.0.0.1", "::ffff:127.0.0.1":
    client = socket.create_connection((host, port))
    end, peer = server.accept()
    client.sendall(host.encode())
    names = end.recv(99), peer[0], end.getsockname()[0], client.getpeername()[0], client.getsockname()[0]
    print(client.family.name, peer[1] == client.getsockname()[1], len(peer), names)
    client.close()
    print(end.recv(1), end.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN) == socket.AF_INET6)
only = socket.create_server(("::1", 0), family=socket.AF_INET6)
there = only.getsockname()[1]
print(refused(socket.create_connection, ("127.0.0.1", there)), socket.create_connection(("::1", there)).getpeername()[0])
six = lambda kind=socket.SOCK_STREAM: socket.socket(socket.AF_INET6, kind)
print(refused(six().bind, ("2001:db8::1", 0)), refused(six().connect, ("::1", 1)), refused(six().bind, ("::ffff:10.0.0.1", 0)))
late, strict = six(), six()
late.bind(("::", 0))
strict.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
print(refused(late.setsockopt, socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1), strict.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
print(refused(strict.bind, ("::ffff:127.0.0.1", 0)), refused(strict.connect, ("::ffff:127.0.0.1", port)))
four = socket.socket()
four.bind(("0.0.0.0", 0))
print(refused(six().bind, ("::", four.getsockname()[1])), strict.bind(("::", four.getsockname()[1])))
both = six(socket.SOCK_DGRAM)
both.bind(("::", 0))
port = both.getsockname()[1]
for family, host in (socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"), (socket.AF_INET6, "::ffff:127.0.0.1"):
    other = socket.socket(family, socket.SOCK_DGRAM)
    other.sendto(b"there", (host, port))
    message, sender = both.recvfrom(9)
    both.sendto(b"back", sender)
    answer, back = other.recvfrom(9)
    print(message, sender[0], sender[1] == other.getsockname()[1], answer, back[0], back[1] == port)
    other.connect((host, port))
    print(other.send(b"joined"), other.getpeername()[0], both.recv(9))
