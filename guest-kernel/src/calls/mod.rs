//! System calls: the list of all, and what each does with its arguments.
//!
//! A call that must wait returns [`Stop::Block`] and is made again when its
//! thread is woken; what it has done by then is in its [`Call`].

mod descriptors;
mod epoll;
mod events;
mod extended;
mod identity;
mod locks;
mod memory;
mod metadata;
mod moves;
mod names;
mod open;
mod pidfds;
mod policy;
mod processes;
mod signals;
pub(crate) mod sockets;
mod splice;
pub(crate) mod system;
mod terminals;
mod threads;
mod time;
mod timers;
mod transfer;

use alloc::format;
use alloc::string::String;

use linux_raw_sys::general as nr;

use extended::Extended;
use identity::Kind;
use system::Name;

use crate::errno::{Errno, Outcome};
use crate::fs::walk::Last;
use crate::kernel::Kernel;
use crate::process::Call;
use crate::wait::Tid;

/// The Linux release whose calls these are.
pub(crate) const RELEASE: &str = "6.1.0-viaduct";
/// What `uname -v` says.
pub(crate) const BUILD: &str = "#1 SMP Viaduct";
/// `AT_FDCWD`, as a descriptor's 32 bits.
pub(crate) const HERE: u32 = nr::AT_FDCWD.cast_unsigned();

/// What becomes of a call that a signal interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Restart {
    /// It fails with `EINTR`.
    Never,
    /// It is made again if the handler was set up so.
    IfWanted,
}

/// See signal(7), "Interruption of system calls".
pub(crate) fn restart_rule(number: u32) -> Restart {
    match number {
        nr::__NR_pause
        | nr::__NR_rt_sigsuspend
        | nr::__NR_rt_sigtimedwait
        | nr::__NR_nanosleep
        | nr::__NR_clock_nanosleep
        | nr::__NR_poll
        | nr::__NR_ppoll
        | nr::__NR_select
        | nr::__NR_pselect6
        | nr::__NR_epoll_wait
        | nr::__NR_epoll_pwait
        | nr::__NR_epoll_pwait2 => Restart::Never,
        _ => Restart::IfWanted,
    }
}

/// The low 32 bits of an argument: what a C `int` or `unsigned` is passed in.
pub(crate) fn low(argument: u64) -> u32 {
    let [a, b, c, d, ..] = argument.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// The same as a signed number.
pub(crate) fn signed(argument: u64) -> i32 {
    low(argument).cast_signed()
}

/// Whether a call at most waits, wakes threads, sends signals and uses its
/// process's memory: it ends, stops and moves no thread, and changes no mapping.
pub(crate) fn is_plain(number: u32) -> bool {
    matches!(
        number,
        nr::__NR_read
            | nr::__NR_write
            | nr::__NR_readv
            | nr::__NR_writev
            | nr::__NR_pread64
            | nr::__NR_pwrite64
            | nr::__NR_lseek
            | nr::__NR_poll
            | nr::__NR_ppoll
            | nr::__NR_select
            | nr::__NR_pselect6
            | nr::__NR_dup
            | nr::__NR_getdents64
            | nr::__NR_stat
            | nr::__NR_lstat
            | nr::__NR_fstat
            | nr::__NR_newfstatat
            | nr::__NR_statx
            | nr::__NR_access
            | nr::__NR_faccessat
            | nr::__NR_faccessat2
            | nr::__NR_readlink
            | nr::__NR_readlinkat
            | nr::__NR_getcwd
            | nr::__NR_getpid
            | nr::__NR_gettid
            | nr::__NR_getppid
            | nr::__NR_getpgrp
            | nr::__NR_getpgid
            | nr::__NR_getsid
            | nr::__NR_getuid
            | nr::__NR_geteuid
            | nr::__NR_getgid
            | nr::__NR_getegid
            | nr::__NR_futex
            | nr::__NR_getcpu
            | nr::__NR_rt_sigaction
            | nr::__NR_rt_sigprocmask
            | nr::__NR_clock_gettime
            | nr::__NR_gettimeofday
            | nr::__NR_time
            | nr::__NR_getrandom
            | nr::__NR_uname
    )
}

macro_rules! calls {
    ($kernel:ident, $tid:ident, $a:ident, $call:ident; $($name:ident => $body:expr,)*) => {
        /// Makes a call.
        pub(crate) fn make($kernel: &mut Kernel, $tid: Tid, $call: &Call) -> Outcome {
            let $a = $call.arguments;
            match $call.number {
                $(nr::$name => $body,)*
                number => {
                    *$kernel.unknown_calls.entry(number).or_default() += 1;
                    Err(Errno::ENOSYS.into())
                }
            }
        }
    };
}

calls! { k, tid, a, call;
    __NR_read => k.read_call(tid, low(a[0]), a[1], a[2]),
    __NR_write => k.write_call(tid, low(a[0]), a[1], a[2]),
    __NR_readv => k.readv(tid, low(a[0]), a[1], a[2]),
    __NR_writev => k.writev(tid, low(a[0]), a[1], a[2]),
    __NR_pread64 => k.pread(tid, low(a[0]), a[1], a[2], a[3]),
    __NR_pwrite64 => k.pwrite(tid, low(a[0]), a[1], a[2], a[3]),
    __NR_preadv => k.preadv(tid, a, 0),
    __NR_pwritev => k.pwritev(tid, a, 0),
    __NR_preadv2 => k.preadv2(tid, a),
    __NR_pwritev2 => k.pwritev2(tid, a),
    __NR_lseek => k.seek(tid, low(a[0]), a[1].cast_signed(), low(a[2])),
    __NR_sendfile => k.sendfile(tid, low(a[0]), low(a[1]), a[2], a[3]),
    __NR_splice => k.splice(tid, a),
    __NR_copy_file_range => k.copy_file_range(tid, a),
    __NR_open => k.open(tid, HERE, a[0], low(a[1]), low(a[2])),
    __NR_openat => k.open(tid, low(a[0]), a[1], low(a[2]), low(a[3])),
    __NR_creat => k.open(tid, HERE, a[0], nr::O_CREAT | nr::O_WRONLY | nr::O_TRUNC, low(a[1])),
    __NR_memfd_create => k.memfd_create(tid, a[0], low(a[1])),
    __NR_close => k.close(tid, low(a[0])),
    __NR_close_range => k.close_range(tid, low(a[0]), low(a[1]), low(a[2])),
    __NR_dup => k.dup(tid, low(a[0]), 0, false),
    __NR_dup2 => k.dup_to(tid, low(a[0]), low(a[1]), 0, true),
    __NR_dup3 => k.dup_to(tid, low(a[0]), low(a[1]), low(a[2]), false),
    __NR_fcntl => k.fcntl(tid, low(a[0]), low(a[1]), a[2]),
    __NR_flock => k.flock(tid, low(a[0]), low(a[1])),
    __NR_fsync => k.descriptor_exists(tid, low(a[0])),
    __NR_fdatasync => k.descriptor_exists(tid, low(a[0])),
    __NR_syncfs => k.descriptor_exists(tid, low(a[0])),
    __NR_fadvise64 => k.descriptor_exists(tid, low(a[0])),
    __NR_sync => Ok(0),
    __NR_ioctl => k.ioctl(tid, low(a[0]), low(a[1]), a[2]),
    __NR_pipe => k.pipe(tid, a[0], 0),
    __NR_pipe2 => k.pipe(tid, a[0], low(a[1])),
    __NR_poll => k.poll(tid, a[0], a[1], signed(a[2])),
    __NR_ppoll => k.ppoll(tid, a),
    __NR_select => k.select(tid, a),
    __NR_pselect6 => k.pselect(tid, a),
    __NR_eventfd => k.eventfd(tid, low(a[0]), 0),
    __NR_eventfd2 => k.eventfd(tid, low(a[0]), low(a[1])),
    __NR_epoll_create => match signed(a[0]) {
        ..=0 => Err(Errno::EINVAL.into()),
        _ => k.epoll_create(tid, 0),
    },
    __NR_epoll_create1 => k.epoll_create(tid, low(a[0])),
    __NR_epoll_ctl => k.epoll_ctl(tid, low(a[0]), low(a[1]), low(a[2]), a[3]),
    __NR_epoll_wait => k.epoll_wait_ms(tid, a, 0),
    __NR_epoll_pwait => k.epoll_wait_ms(tid, a, a[4]),
    __NR_epoll_pwait2 => k.epoll_pwait2(tid, a),
    __NR_timerfd_create => k.timerfd_create(tid, low(a[0]), low(a[1])),
    __NR_timerfd_settime => k.timerfd_settime(tid, low(a[0]), low(a[1]), a[2], a[3]),
    __NR_timerfd_gettime => k.timerfd_gettime(tid, low(a[0]), a[1]),
    __NR_signalfd => k.signalfd(tid, low(a[0]), a[1], a[2], 0),
    __NR_signalfd4 => k.signalfd(tid, low(a[0]), a[1], a[2], low(a[3])),
    __NR_getdents64 => k.getdents(tid, low(a[0]), a[1], a[2]),

    __NR_stat => k.stat(tid, HERE, a[0], a[1], 0),
    __NR_lstat => k.stat(tid, HERE, a[0], a[1], nr::AT_SYMLINK_NOFOLLOW),
    __NR_fstat => k.fstat(tid, low(a[0]), a[1]),
    __NR_newfstatat => k.stat(tid, low(a[0]), a[1], a[2], low(a[3])),
    __NR_statx => k.statx(tid, low(a[0]), a[1], low(a[2]), low(a[3]), a[4]),
    __NR_statfs => k.statfs(tid, a[0], a[1]),
    __NR_fstatfs => k.fstatfs(tid, low(a[0]), a[1]),
    __NR_access => k.access(tid, HERE, a[0], low(a[1]), 0),
    __NR_faccessat => k.access(tid, low(a[0]), a[1], low(a[2]), 0),
    __NR_faccessat2 => k.access(tid, low(a[0]), a[1], low(a[2]), low(a[3])),
    __NR_readlink => k.readlink(tid, HERE, a[0], a[1], a[2]),
    __NR_readlinkat => k.readlink(tid, low(a[0]), a[1], a[2], a[3]),
    __NR_chmod => k.chmod(tid, HERE, a[0], low(a[1])),
    __NR_fchmod => k.fchmod(tid, low(a[0]), low(a[1])),
    __NR_fchmodat => k.chmod(tid, low(a[0]), a[1], low(a[2])),
    __NR_chown => k.chown(tid, HERE, a[0], low(a[1]), low(a[2]), 0),
    __NR_lchown => k.chown(tid, HERE, a[0], low(a[1]), low(a[2]), nr::AT_SYMLINK_NOFOLLOW),
    __NR_fchown => k.fchown(tid, low(a[0]), low(a[1]), low(a[2])),
    __NR_fchownat => k.chown(tid, low(a[0]), a[1], low(a[2]), low(a[3]), low(a[4])),
    __NR_utimensat => k.utimensat(tid, low(a[0]), a[1], a[2], low(a[3])),
    __NR_truncate => k.truncate(tid, a[0], a[1]),
    __NR_ftruncate => k.ftruncate(tid, low(a[0]), a[1]),
    __NR_fallocate => k.fallocate(tid, low(a[0]), low(a[1]), a[2], a[3]),

    __NR_mkdir => k.mkdir(tid, HERE, a[0], low(a[1])),
    __NR_mkdirat => k.mkdir(tid, low(a[0]), a[1], low(a[2])),
    __NR_mknod => k.mknod(tid, HERE, a[0], low(a[1]), a[2]),
    __NR_mknodat => k.mknod(tid, low(a[0]), a[1], low(a[2]), a[3]),
    __NR_unlink => k.unlink(tid, HERE, a[0], 0),
    __NR_unlinkat => k.unlink(tid, low(a[0]), a[1], low(a[2])),
    __NR_rmdir => k.unlink(tid, HERE, a[0], nr::AT_REMOVEDIR),
    __NR_rename => k.rename(tid, (HERE, a[0]), (HERE, a[1]), 0),
    __NR_renameat => k.rename(tid, (low(a[0]), a[1]), (low(a[2]), a[3]), 0),
    __NR_renameat2 => k.rename(tid, (low(a[0]), a[1]), (low(a[2]), a[3]), low(a[4])),
    __NR_link => k.link(tid, (HERE, a[0]), (HERE, a[1]), 0),
    __NR_linkat => k.link(tid, (low(a[0]), a[1]), (low(a[2]), a[3]), low(a[4])),
    __NR_symlink => k.symlink(tid, a[0], HERE, a[1]),
    __NR_symlinkat => k.symlink(tid, a[0], low(a[1]), a[2]),
    __NR_chdir => k.chdir(tid, a[0]),
    __NR_fchdir => k.fchdir(tid, low(a[0])),
    __NR_chroot => k.chroot(tid, a[0]),
    __NR_getcwd => k.getcwd(tid, a[0], a[1]),
    __NR_umask => k.umask(tid, low(a[0])),

    __NR_brk => k.brk(tid, a[0]),
    __NR_mmap => k.mmap(tid, a),
    __NR_munmap => k.munmap(tid, a[0], a[1]),
    __NR_mprotect => k.mprotect(tid, a[0], a[1], low(a[2])),
    __NR_mremap => k.mremap(tid, a),
    __NR_madvise => k.madvise(tid, a[0], a[1], low(a[2])),
    __NR_msync => k.msync(tid, a[0], a[1], low(a[2])),
    __NR_mlock => Ok(0),
    __NR_munlock => Ok(0),

    __NR_clone => k.clone_call(tid, a),
    __NR_clone3 => k.clone3(tid, a[0], a[1]),
    __NR_fork => k.fork(tid),
    __NR_vfork => k.vfork(tid),
    __NR_execve => k.execve(tid, HERE, a[0], a[1], a[2], 0),
    __NR_execveat => k.execve(tid, low(a[0]), a[1], a[2], a[3], low(a[4])),
    __NR_exit => k.exit_call(tid, low(a[0])),
    __NR_exit_group => k.exit_group(tid, low(a[0])),
    __NR_wait4 => k.wait4(tid, signed(a[0]), a[1], low(a[2]), a[3]),
    __NR_waitid => k.waitid(tid, low(a[0]), low(a[1]), a[2], low(a[3]), a[4]),
    __NR_getpid => Ok(k.pid_of(tid).into()),
    __NR_gettid => Ok(tid.into()),
    __NR_getppid => Ok(k.process_of(tid).parent.into()),
    __NR_getpgrp => Ok(k.process_of(tid).group.into()),
    __NR_getpgid => k.getpgid(tid, low(a[0])),
    __NR_setpgid => k.setpgid(tid, low(a[0]), low(a[1])),
    __NR_getsid => k.getsid(tid, low(a[0])),
    __NR_setsid => k.setsid(tid),
    __NR_getuid => Ok(k.process_of(tid).owner.user.real.into()),
    __NR_geteuid => Ok(k.process_of(tid).owner.user.effective.into()),
    __NR_getgid => Ok(k.process_of(tid).owner.group.real.into()),
    __NR_getegid => Ok(k.process_of(tid).owner.group.effective.into()),
    __NR_getresuid => k.get_ids(tid, Kind::User, a),
    __NR_getresgid => k.get_ids(tid, Kind::Group, a),
    __NR_setuid => k.set_id(tid, Kind::User, low(a[0])),
    __NR_setgid => k.set_id(tid, Kind::Group, low(a[0])),
    __NR_setreuid => k.set_ids(tid, Kind::User, [low(a[0]), low(a[1]), u32::MAX]),
    __NR_setregid => k.set_ids(tid, Kind::Group, [low(a[0]), low(a[1]), u32::MAX]),
    __NR_setresuid => k.set_ids(tid, Kind::User, [low(a[0]), low(a[1]), low(a[2])]),
    __NR_setresgid => k.set_ids(tid, Kind::Group, [low(a[0]), low(a[1]), low(a[2])]),
    __NR_getgroups => k.getgroups(tid, a[0], a[1]),
    __NR_setgroups => k.setgroups(tid, a[0], a[1]),
    __NR_set_tid_address => k.set_tid_address(tid, a[0]),
    __NR_set_robust_list => k.set_robust_list(tid, a[0], a[1]),
    __NR_rseq => k.rseq(tid, a[0], low(a[1]), low(a[2]), low(a[3])),
    __NR_get_robust_list => k.get_robust_list(tid, low(a[0]), a[1], a[2]),
    __NR_futex => k.futex(tid, call),
    __NR_arch_prctl => k.arch_prctl(tid, low(a[0]), a[1]),
    __NR_prctl => k.prctl(tid, a),
    __NR_prlimit64 => k.prlimit(tid, low(a[0]), low(a[1]), a[2], a[3]),
    __NR_getrlimit => k.prlimit(tid, 0, low(a[0]), 0, a[1]),
    __NR_setrlimit => k.prlimit(tid, 0, low(a[0]), a[1], 0),
    __NR_getrusage => k.getrusage(tid, low(a[0]), a[1]),
    __NR_getpriority => k.getpriority(tid, low(a[0]), low(a[1])),
    __NR_setpriority => k.setpriority(tid, low(a[0]), low(a[1]), signed(a[2])),
    __NR_sched_yield => k.sched_yield(tid),
    __NR_sched_getaffinity => k.sched_getaffinity(tid, low(a[0]), a[1], a[2]),
    __NR_sched_setaffinity => k.sched_setaffinity(tid, low(a[0]), a[1], a[2]),
    __NR_sched_getscheduler => k.sched_getscheduler(tid, a[0]),
    __NR_sched_setscheduler => k.sched_setscheduler(tid, a[0], low(a[1]), a[2]),
    __NR_sched_getparam => k.sched_getparam(tid, a[0], a[1]),
    __NR_sched_setparam => k.sched_setscheduler(tid, a[0], nr::SCHED_NORMAL, a[1]),
    __NR_sched_get_priority_min => Ok(policy::priorities(low(a[0]))?[0]),
    __NR_sched_get_priority_max => Ok(policy::priorities(low(a[0]))?[1]),
    __NR_sched_rr_get_interval => k.sched_rr_get_interval(tid, a[0], a[1]),
    __NR_getcpu => k.getcpu(tid, a[0], a[1]),

    __NR_rt_sigaction => k.sigaction(tid, low(a[0]), a[1], a[2], a[3]),
    __NR_rt_sigprocmask => k.sigprocmask(tid, a[0], a[1], a[2], a[3]),
    __NR_rt_sigpending => k.sigpending(tid, a[0]),
    __NR_rt_sigsuspend => k.sigsuspend(tid, a[0]),
    __NR_rt_sigtimedwait => k.sigtimedwait(tid, a[0], a[1], a[2]),
    __NR_rt_sigreturn => k.return_from_signal(tid),
    __NR_sigaltstack => k.sigaltstack(tid, a[0], a[1]),
    __NR_kill => k.kill(tid, signed(a[0]), low(a[1])),
    __NR_tgkill => k.tgkill(tid, low(a[0]), low(a[1]), low(a[2])),
    __NR_tkill => k.tgkill(tid, 0, low(a[0]), low(a[1])),
    __NR_rt_sigqueueinfo => k.sigqueueinfo(tid, low(a[0]), low(a[1]), a[2]),
    __NR_rt_tgsigqueueinfo => k.tgsigqueueinfo(tid, low(a[0]), low(a[1]), low(a[2]), a[3]),
    __NR_pidfd_open => k.pidfd_open(tid, low(a[0]), low(a[1])),
    __NR_pidfd_send_signal => k.pidfd_send_signal(tid, low(a[0]), low(a[1]), a[2], low(a[3])),
    __NR_pause => k.pause(tid),
    __NR_alarm => k.alarm(tid, low(a[0])),
    __NR_setitimer => k.setitimer(tid, low(a[0]), a[1], a[2]),
    __NR_getitimer => k.getitimer(tid, low(a[0]), a[1]),

    __NR_timer_create => k.timer_create(tid, low(a[0]), a[1], a[2]),
    __NR_timer_settime => k.timer_settime(tid, low(a[0]), low(a[1]), a[2], a[3]),
    __NR_timer_gettime => k.timer_gettime(tid, low(a[0]), a[1]),
    __NR_timer_getoverrun => k.timer_getoverrun(tid, low(a[0])),
    __NR_timer_delete => k.timer_delete(tid, low(a[0])),

    __NR_clock_gettime => k.clock_gettime(tid, low(a[0]), a[1]),
    __NR_clock_settime => k.clock_settime(tid, low(a[0]), a[1]),
    __NR_clock_getres => k.clock_getres(tid, low(a[0]), a[1]),
    __NR_gettimeofday => k.gettimeofday(tid, a[0], a[1]),
    __NR_time => k.time(tid, a[0]),
    __NR_times => k.times(tid, a[0]),
    __NR_nanosleep => k.sleep(tid, nr::CLOCK_MONOTONIC, 0, a[0], a[1]),
    __NR_clock_nanosleep => k.sleep(tid, low(a[0]), low(a[1]), a[2], a[3]),

    __NR_socket => k.socket(tid, low(a[0]), low(a[1]), low(a[2])),
    __NR_socketpair => k.socketpair(tid, low(a[0]), low(a[1]), low(a[2]), a[3]),
    __NR_bind => k.bind(tid, low(a[0]), a[1], low(a[2])),
    __NR_listen => k.listen(tid, low(a[0]), low(a[1])),
    __NR_accept => k.accept(tid, low(a[0]), a[1], a[2], 0),
    __NR_accept4 => k.accept(tid, low(a[0]), a[1], a[2], low(a[3])),
    __NR_connect => k.connect(tid, low(a[0]), a[1], low(a[2])),
    __NR_getsockname => k.socket_name(tid, low(a[0]), a[1], a[2], false),
    __NR_getpeername => k.socket_name(tid, low(a[0]), a[1], a[2], true),
    __NR_sendto => k.sendto(tid, a),
    __NR_recvfrom => k.recvfrom(tid, a),
    __NR_sendmsg => k.sendmsg(tid, low(a[0]), a[1], low(a[2])),
    __NR_recvmsg => k.recvmsg(tid, low(a[0]), a[1], low(a[2])),
    __NR_shutdown => k.shutdown(tid, low(a[0]), low(a[1])),
    __NR_setsockopt => k.setsockopt(tid, a),
    __NR_getsockopt => k.getsockopt(tid, a),

    __NR_uname => k.uname(tid, a[0]),
    __NR_sysinfo => k.sysinfo(tid, a[0]),
    __NR_getrandom => k.getrandom(tid, a[0], a[1]),
    __NR_reboot => k.reboot(tid, low(a[2])),
    __NR_sethostname => k.set_name(tid, Name::Host, a[0], signed(a[1])),
    __NR_setdomainname => k.set_name(tid, Name::Domain, a[0], signed(a[1])),
    __NR_getxattr => k.path_extended(tid, a[0], Last::Follow, Extended::One(a[1])),
    __NR_lgetxattr => k.path_extended(tid, a[0], Last::Keep, Extended::One(a[1])),
    __NR_fgetxattr => k.file_extended(tid, low(a[0]), Extended::One(a[1])),
    __NR_setxattr => k.path_extended(tid, a[0], Last::Follow, Extended::One(a[1])),
    __NR_lsetxattr => k.path_extended(tid, a[0], Last::Keep, Extended::One(a[1])),
    __NR_fsetxattr => k.file_extended(tid, low(a[0]), Extended::One(a[1])),
    __NR_removexattr => k.path_extended(tid, a[0], Last::Follow, Extended::One(a[1])),
    __NR_lremovexattr => k.path_extended(tid, a[0], Last::Keep, Extended::One(a[1])),
    __NR_fremovexattr => k.file_extended(tid, low(a[0]), Extended::One(a[1])),
    __NR_listxattr => k.path_extended(tid, a[0], Last::Follow, Extended::List),
    __NR_llistxattr => k.path_extended(tid, a[0], Last::Keep, Extended::List),
    __NR_flistxattr => k.file_extended(tid, low(a[0]), Extended::List),
}

/// A name for a call that is not known here.
pub(crate) fn name(number: u32) -> String {
    const NAMES: [(u32, &str); 11] = [
        (nr::__NR_get_mempolicy, "get_mempolicy"),
        (nr::__NR_inotify_init1, "inotify_init1"),
        (nr::__NR_io_uring_setup, "io_uring_setup"),
        (nr::__NR_membarrier, "membarrier"),
        (nr::__NR_mount, "mount"),
        (nr::__NR_openat2, "openat2"),
        (nr::__NR_personality, "personality"),
        (nr::__NR_ptrace, "ptrace"),
        (nr::__NR_set_mempolicy, "set_mempolicy"),
        (nr::__NR_shmget, "shmget"),
        (nr::__NR_syslog, "syslog"),
    ];
    let known = NAMES.iter().find(|(other, _)| *other == number);
    known.map_or_else(|| format!("call_{number}"), |(_, name)| String::from(*name))
}
