//! /proc: a view of the processes, made when it is looked at.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;
use core::sync::atomic::{AtomicU64, Ordering};

use linux_raw_sys::general::{S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG};

use super::Place;
use super::node::{NodeId, Objects};
use super::walk::path_of;
use crate::errno::{Errno, Result};
use crate::kernel::Kernel;
use crate::mem::regions::{Backing, Prot, Purpose, Sharing};
use crate::process::files::{Object, OpenFile};
use crate::process::{Pid, Process, State};
use crate::table::Table;
use crate::wait::Tid;

/// A file that tells something of the system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SystemFile {
    CommandLine,
    CpuInfo,
    FileSystems,
    LoadAverage,
    MemInfo,
    Stat,
    Swaps,
    UnknownCalls,
    Uptime,
    Version,
    Viaduct,
    HostName,
    OsRelease,
    OsType,
    PidMax,
    GroupsMax,
    Overcommit,
    Somaxconn,
}

/// A file that tells something of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProcessFile {
    Arguments,
    Environment,
    Maps,
    MountInfo,
    Mounts,
    Name,
    Stat,
    Statm,
    Status,
    Limits,
    Loginuid,
    OomScore,
}

/// A link in a process's directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProcessLink {
    Directory,
    Program,
    Root,
}

/// Something in /proc.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProcPlace {
    Root,
    /// `self`, and `thread-self`.
    Myself,
    Mounts,
    System(SystemFile),
    Sys,
    SysKernel,
    SysVm,
    SysNet,
    SysNetCore,
    Process(Pid),
    File(Pid, ProcessFile),
    Link(Pid, ProcessLink),
    Descriptors(Pid),
    Descriptor(Pid, u32),
    /// What a descriptor's link leads to if that has no name anywhere.
    Nameless(Pid, u32),
    Tasks(Pid),
    Task(Pid, Tid),
}

const SYSTEM_FILES: [(&str, SystemFile); 11] = [
    ("cmdline", SystemFile::CommandLine),
    ("cpuinfo", SystemFile::CpuInfo),
    ("filesystems", SystemFile::FileSystems),
    ("loadavg", SystemFile::LoadAverage),
    ("meminfo", SystemFile::MemInfo),
    ("stat", SystemFile::Stat),
    ("swaps", SystemFile::Swaps),
    ("unknown_calls", SystemFile::UnknownCalls),
    ("uptime", SystemFile::Uptime),
    ("version", SystemFile::Version),
    ("viaduct", SystemFile::Viaduct),
];
const KERNEL_FILES: [(&str, SystemFile); 5] = [
    ("hostname", SystemFile::HostName),
    ("ngroups_max", SystemFile::GroupsMax),
    ("osrelease", SystemFile::OsRelease),
    ("ostype", SystemFile::OsType),
    ("pid_max", SystemFile::PidMax),
];
const PROCESS_FILES: [(&str, ProcessFile); 12] = [
    ("cmdline", ProcessFile::Arguments),
    ("comm", ProcessFile::Name),
    ("environ", ProcessFile::Environment),
    ("limits", ProcessFile::Limits),
    ("loginuid", ProcessFile::Loginuid),
    ("maps", ProcessFile::Maps),
    ("mountinfo", ProcessFile::MountInfo),
    ("mounts", ProcessFile::Mounts),
    ("oom_score_adj", ProcessFile::OomScore),
    ("stat", ProcessFile::Stat),
    ("statm", ProcessFile::Statm),
    ("status", ProcessFile::Status),
];
const PROCESS_LINKS: [(&str, ProcessLink); 3] = [
    ("cwd", ProcessLink::Directory),
    ("exe", ProcessLink::Program),
    ("root", ProcessLink::Root),
];

impl ProcPlace {
    /// Type and permissions, as in `st_mode`.
    pub(crate) fn mode(self) -> u32 {
        match self {
            Self::Root
            | Self::Sys
            | Self::SysKernel
            | Self::SysVm
            | Self::SysNet
            | Self::SysNetCore
            | Self::Process(_)
            | Self::Tasks(_)
            | Self::Task(..) => S_IFDIR | 0o555,
            Self::Descriptors(_) => S_IFDIR | 0o500,
            Self::Myself | Self::Mounts | Self::Link(..) => S_IFLNK | 0o777,
            Self::Descriptor(..) => S_IFLNK | 0o700,
            Self::Nameless(..) => S_IFIFO | 0o600,
            Self::System(_) | Self::File(..) => S_IFREG | 0o444,
        }
    }

    /// A number for `st_ino`.
    pub(crate) fn inode(self) -> u64 {
        let text = format!("{self:?}");
        // FNV-1a: the same name, the same number.
        text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        }) >> 16
    }
}

/// What looking names up in /proc needs to know.
pub(crate) struct ProcView<'a> {
    pub(crate) processes: &'a BTreeMap<Pid, Process>,
    pub(crate) files: &'a Table<OpenFile>,
    /// Who looks.
    pub(crate) me: Pid,
}

fn named<T: Copy>(table: &[(&str, T)], name: &[u8]) -> Option<T> {
    let mut hits = table.iter().filter(|(other, _)| other.as_bytes() == name);
    Some(hits.next()?.1)
}

impl ProcView<'_> {
    pub(crate) fn parent(&self, place: ProcPlace) -> Option<ProcPlace> {
        use ProcPlace as P;
        match place {
            P::Root => None,
            P::SysKernel | P::SysVm | P::SysNet => Some(P::Sys),
            P::SysNetCore => Some(P::SysNet),
            P::File(pid, _) | P::Link(pid, _) | P::Descriptors(pid) | P::Tasks(pid) => {
                Some(P::Process(pid))
            }
            P::Descriptor(pid, _) => Some(P::Descriptors(pid)),
            P::Task(pid, _) => Some(P::Tasks(pid)),
            _ => Some(P::Root),
        }
    }

    pub(crate) fn lookup(&self, place: ProcPlace, name: &[u8]) -> Result<ProcPlace> {
        use ProcPlace as P;
        let number = core::str::from_utf8(name)
            .ok()
            .filter(|text| !text.starts_with('+'))
            .and_then(|text| text.parse::<u32>().ok());
        let found = match place {
            P::Root => match name {
                b"self" | b"thread-self" => Some(P::Myself),
                b"mounts" => Some(P::Mounts),
                b"sys" => Some(P::Sys),
                _ => named(&SYSTEM_FILES, name).map(P::System).or_else(|| {
                    number
                        .filter(|pid| self.processes.contains_key(pid))
                        .map(P::Process)
                }),
            },
            P::Sys => match name {
                b"kernel" => Some(P::SysKernel),
                b"vm" => Some(P::SysVm),
                b"net" => Some(P::SysNet),
                _ => None,
            },
            P::SysKernel => named(&KERNEL_FILES, name).map(P::System),
            P::SysVm => {
                named(&[("overcommit_memory", SystemFile::Overcommit)], name).map(P::System)
            }
            P::SysNet => (name == b"core").then_some(P::SysNetCore),
            P::SysNetCore => named(&[("somaxconn", SystemFile::Somaxconn)], name).map(P::System),
            P::Process(pid) | P::Task(pid, _) => match name {
                b"fd" => Some(P::Descriptors(pid)),
                b"task" => Some(P::Tasks(pid)),
                _ => named(&PROCESS_FILES, name)
                    .map(|file| P::File(pid, file))
                    .or_else(|| named(&PROCESS_LINKS, name).map(|link| P::Link(pid, link))),
            },
            P::Descriptors(pid) => {
                let process = self.processes.get(&pid).ok_or(Errno::ENOENT)?;
                number
                    .filter(|number| process.files.get(*number).is_ok())
                    .map(|number| P::Descriptor(pid, number))
            }
            P::Tasks(pid) => {
                let process = self.processes.get(&pid).ok_or(Errno::ENOENT)?;
                number
                    .filter(|tid| process.threads.contains(tid))
                    .map(|tid| P::Task(pid, tid))
            }
            _ => return Err(Errno::ENOTDIR),
        };
        found.ok_or(Errno::ENOENT)
    }

    /// The names in a directory of /proc.
    pub(crate) fn list(&self, place: ProcPlace) -> Vec<String> {
        use ProcPlace as P;
        fn names<T>(table: &[(&str, T)]) -> Vec<String> {
            table.iter().map(|(name, _)| String::from(*name)).collect()
        }
        let plain = |all: &[&str]| all.iter().map(|name| String::from(*name)).collect();
        match place {
            P::Root => {
                let mut all: Vec<_> = self.processes.keys().map(|pid| format!("{pid}")).collect();
                all.extend(names(&SYSTEM_FILES));
                all.extend(["mounts", "self", "sys", "thread-self"].map(String::from));
                all
            }
            P::Sys => plain(&["kernel", "net", "vm"]),
            P::SysKernel => names(&KERNEL_FILES),
            P::SysVm => plain(&["overcommit_memory"]),
            P::SysNet => plain(&["core"]),
            P::SysNetCore => plain(&["somaxconn"]),
            P::Process(_) | P::Task(..) => {
                let mut all = names(&PROCESS_FILES);
                all.extend(names(&PROCESS_LINKS));
                all.push(String::from("fd"));
                if matches!(place, P::Process(_)) {
                    all.push(String::from("task"));
                }
                all
            }
            P::Descriptors(pid) => {
                let files = self.processes.get(&pid).map(|process| process.files.iter());
                files
                    .into_iter()
                    .flatten()
                    .map(|(number, _)| format!("{number}"))
                    .collect()
            }
            P::Tasks(pid) => {
                let threads = self.processes.get(&pid).map(|process| &process.threads);
                threads
                    .into_iter()
                    .flatten()
                    .map(|tid| format!("{tid}"))
                    .collect()
            }
            _ => Vec::new(),
        }
    }

    fn open_file(&self, pid: Pid, number: u32) -> Option<&OpenFile> {
        let descriptor = self.processes.get(&pid)?.files.get(number).ok()?;
        self.files.get(descriptor.file)
    }

    /// What a link stands for itself, whatever its text is.
    pub(crate) fn jump(&self, place: ProcPlace) -> Option<Place> {
        match place {
            ProcPlace::Descriptor(pid, number) => {
                let nameless = Place::Proc(ProcPlace::Nameless(pid, number));
                Some(self.open_file(pid, number)?.place.unwrap_or(nameless))
            }
            ProcPlace::Link(pid, ProcessLink::Directory) => {
                Some(self.processes.get(&pid)?.directory)
            }
            ProcPlace::Link(pid, ProcessLink::Root) => {
                Some(Place::Node(self.processes.get(&pid)?.root))
            }
            _ => None,
        }
    }

    /// A link's text, where that needs no walk.
    pub(crate) fn link(&self, place: ProcPlace) -> Option<Vec<u8>> {
        match place {
            ProcPlace::Myself => Some(format!("/proc/{}", self.me).into_bytes()),
            ProcPlace::Mounts => Some(format!("/proc/{}/mounts", self.me).into_bytes()),
            ProcPlace::Link(pid, ProcessLink::Program) => {
                Some(self.processes.get(&pid)?.program.path.clone())
            }
            ProcPlace::Descriptor(pid, number) => {
                let id = self.processes.get(&pid)?.files.get(number).ok()?.file;
                let file = self.files.get(id)?;
                if let Some(path) = &file.path {
                    return Some(path.to_vec());
                }
                Some(
                    match &file.object {
                        Object::PipeReader(pipe)
                        | Object::PipeWriter(pipe)
                        | Object::PipeBoth(pipe) => format!("pipe:[{pipe}]"),
                        Object::Socket(socket) => format!("socket:[{socket}]"),
                        Object::Terminal(number) => format!("/dev/pts/{number}"),
                        Object::Master(_) => String::from("/dev/pts/ptmx"),
                        Object::Event(_) => String::from("anon_inode:[eventfd]"),
                        Object::Timer(_) => String::from("anon_inode:[timerfd]"),
                        Object::Signals(_) => String::from("anon_inode:[signalfd]"),
                        Object::Epoll(_) => String::from("anon_inode:[eventpoll]"),
                        Object::Process { .. } => String::from("anon_inode:[pidfd]"),
                        _ => format!("anon_inode:[{id}]"),
                    }
                    .into_bytes(),
                )
            }
            _ => None,
        }
    }
}

/// The bits of a set as /proc writes them: `0-2,5`.
fn ranges(set: u64) -> String {
    let mut text = String::new();
    let mut rest = set;
    while rest != 0 {
        let first = rest.trailing_zeros();
        let last = first + (rest >> first).trailing_ones() - 1;
        let comma = if text.is_empty() { "" } else { "," };
        let _ = match first == last {
            true => write!(text, "{comma}{first}"),
            false => write!(text, "{comma}{first}-{last}"),
        };
        rest &= u64::MAX.checked_shl(last + 1).unwrap_or(0);
    }
    text
}

impl Kernel {
    /// The text of a file in /proc.
    pub(crate) fn proc_text(&mut self, place: ProcPlace) -> Result<Vec<u8>> {
        match place {
            ProcPlace::System(SystemFile::CommandLine) => {
                let mut line = self.command_line.clone();
                line.push(b'\n');
                Ok(line)
            }
            ProcPlace::System(file) => Ok(self.system_text(file).into_bytes()),
            ProcPlace::File(pid, file) => self.process_text(pid, file),
            _ => Err(Errno::EINVAL),
        }
    }

    fn process(&self, pid: Pid) -> Result<&Process> {
        self.processes.get(&pid).ok_or(Errno::ESRCH)
    }

    fn system_text(&self, file: SystemFile) -> String {
        const NS: u64 = 1_000_000_000;
        let now = self.now();
        let centis = |ns: u64| format!("{}.{:02}", ns / NS, ns / (NS / 100) % 100);
        match file {
            SystemFile::CpuInfo => {
                let mhz = self.machine.ticks_khz() / 1000;
                let mut text = String::new();
                for cpu in 0..self.scheduler.count() {
                    let node = self.scheduler.node(cpu);
                    let _ = write!(
                        text,
                        "processor\t: {cpu}\nvendor_id\t: AuthenticAMD\n\
                         model name\t: Viaduct vCPU\ncpu MHz\t\t: {mhz}.000\n\
                         physical id\t: {node}\nflags\t\t: fpu sse sse2\n\n"
                    );
                }
                text
            }
            SystemFile::FileSystems => {
                String::from("nodev\tproc\nnodev\ttmpfs\nnodev\tsysfs\nnodev\tdevtmpfs\n\text4\n")
            }
            SystemFile::Viaduct => self.node_counts(),
            SystemFile::LoadAverage => format!(
                "0.00 0.00 0.00 1/{} {}\n",
                self.threads.len(),
                self.processes.keys().last().copied().unwrap_or(0)
            ),
            SystemFile::MemInfo => {
                let total = self.objects.frames.total() * 4;
                let free = self.objects.frames.available() * 4;
                let mut text = String::new();
                for (name, value) in [
                    ("MemTotal", total),
                    ("MemFree", free),
                    ("MemAvailable", free),
                    ("Buffers", 0),
                    ("Cached", 0),
                    ("SwapCached", 0),
                    ("SwapTotal", 0),
                    ("SwapFree", 0),
                    ("Shmem", 0),
                    ("Slab", 0),
                ] {
                    let name = format!("{name}:");
                    let _ = writeln!(text, "{name:<15} {value:>8} kB");
                }
                text
            }
            SystemFile::Stat => {
                let ticks = |ns: u64| ns / (NS / 100);
                let all = self.processes.values();
                let (user, system) = all.fold((0, 0), |(user, system), process| {
                    (user + process.times.user, system + process.times.system)
                });
                let (user, system) = (ticks(user), ticks(system));
                let all = ticks(now) * self.scheduler.count() as u64;
                let idle = all.saturating_sub(user + system);
                let count = self.scheduler.count() as u64;
                let mut text = format!("cpu  {user} 0 {system} {idle} 0 0 0 0 0 0\n");
                // Times are kept by process: each gets its share.
                let [user, system, idle] = [user, system, idle].map(|time| time / count);
                for cpu in 0..count {
                    let _ = writeln!(text, "cpu{cpu} {user} 0 {system} {idle} 0 0 0 0 0 0");
                }
                let _ = write!(
                    text,
                    "intr 0\nctxt 0\nbtime {}\nprocesses {}\n\
                     procs_running {}\nprocs_blocked 0\n",
                    self.boot_wall_ns / NS,
                    self.forks,
                    self.scheduler.running().max(1)
                );
                text
            }
            SystemFile::Swaps => String::from("Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"),
            SystemFile::UnknownCalls => {
                let mut text = String::new();
                for (number, count) in &self.unknown_calls {
                    let _ = writeln!(text, "{} {count}", crate::calls::name(*number));
                }
                text
            }
            SystemFile::Uptime => format!("{} {}\n", centis(now), centis(0)),
            SystemFile::Version => format!(
                "Linux version {} (viaduct) {}\n",
                crate::calls::RELEASE,
                crate::calls::BUILD
            ),
            SystemFile::HostName => String::from("viaduct\n"),
            SystemFile::OsRelease => format!("{}\n", crate::calls::RELEASE),
            SystemFile::OsType => String::from("Linux\n"),
            SystemFile::PidMax => String::from("4194304\n"),
            SystemFile::GroupsMax => String::from("65536\n"),
            SystemFile::Overcommit => String::from("1\n"),
            SystemFile::Somaxconn => String::from("4096\n"),
            SystemFile::CommandLine => String::new(),
        }
    }

    fn process_text(&mut self, pid: Pid, file: ProcessFile) -> Result<Vec<u8>> {
        let text = match file {
            ProcessFile::Arguments => return Ok(self.process(pid)?.program.arguments.clone()),
            ProcessFile::Environment => return Ok(self.process(pid)?.program.environment.clone()),
            ProcessFile::Maps => self.maps(pid),
            ProcessFile::MountInfo => Ok(String::from(
                "1 1 0:1 / / rw - overlay root rw\n2 1 0:2 / /proc rw - proc proc rw\n\
                 3 1 0:3 / /dev rw - devtmpfs devtmpfs rw\n4 1 0:3 / /sys rw - sysfs sysfs rw\n\
                 5 1 0:3 / /tmp rw - tmpfs tmpfs rw\n6 1 0:3 / /run rw - tmpfs tmpfs rw\n",
            )),
            ProcessFile::Mounts => Ok(String::from(
                "root / overlay rw 0 0\nproc /proc proc rw 0 0\ndevtmpfs /dev devtmpfs rw 0 0\n\
                 sysfs /sys sysfs rw 0 0\ntmpfs /tmp tmpfs rw 0 0\ntmpfs /run tmpfs rw 0 0\n",
            )),
            ProcessFile::Name => Ok(format!("{}\n", self.thread_name(pid))),
            ProcessFile::Loginuid => Ok(String::from("4294967295")),
            ProcessFile::OomScore => Ok(String::from("0\n")),
            ProcessFile::Limits => {
                let (soft, hard) = self.process(pid)?.limits[7];
                Ok(format!(
                    "Max open files            {soft:<20} {hard:<20} files\n"
                ))
            }
            ProcessFile::Stat => self.stat_line(pid),
            ProcessFile::Statm => {
                let pages = self.size_of(pid)? / 4096;
                Ok(format!("{pages} {pages} 0 0 0 {pages} 0\n"))
            }
            ProcessFile::Status => self.status(pid),
        };
        text.map(String::into_bytes)
    }

    /// What each node has done for programs' memory.
    fn node_counts(&self) -> String {
        let places = &self.objects.frames.places;
        let mut text = String::new();
        for node in (0..places.slots()).filter(|node| places.has_processors(*node)) {
            let counts = places.counts(node);
            let logs = self
                .spaces
                .iter()
                .flat_map(|(_, space)| space.pages().applied());
            let live: u64 = logs.filter(|log| log.0 == node).map(|log| log.1).sum();
            let value = |count: &AtomicU64| count.load(Ordering::Relaxed);
            let _ = writeln!(
                text,
                "node {node}: faults_without_lock {} faults_with_lock {} \
                 log_appended {} log_applied {}",
                value(&counts.alone),
                value(&counts.locked),
                value(&counts.appended),
                value(&counts.applied) + live,
            );
        }
        text
    }

    fn thread_name(&self, tid: Tid) -> String {
        let name = self.threads.get(&tid).map(|thread| thread.name);
        let name = name.unwrap_or_default();
        let end = name.iter().position(|byte| *byte == 0).unwrap_or(16);
        String::from_utf8_lossy(&name[..end]).into_owned()
    }

    fn size_of(&self, pid: Pid) -> Result<u64> {
        let space = self.process(pid)?.space;
        let space = space.and_then(|space| self.spaces.get(space));
        Ok(space.map_or(0, |space| space.size()))
    }

    fn state_letter(&self, pid: Pid) -> Result<char> {
        let process = self.process(pid)?;
        Ok(match process.state {
            State::Ended(_) => 'Z',
            State::Stopped(_) => 'T',
            State::Running => {
                let waits = |tid: &Tid| self.threads.get(tid).is_some_and(|thread| thread.waits);
                if process.threads.iter().all(waits) {
                    'S'
                } else {
                    'R'
                }
            }
        })
    }

    fn stat_line(&self, pid: Pid) -> Result<String> {
        let process = self.process(pid)?;
        let ticks = |ns: u64| ns / 10_000_000;
        let terminal = process
            .terminal
            .map_or(0, |number| 136 << 8 | i64::from(number));
        let foreground = process
            .terminal
            .and_then(|number| self.terminals.get(number))
            .map_or(-1, |terminal| i64::from(terminal.foreground));
        Ok(format!(
            "{pid} ({}) {} {} {} {} {terminal} {foreground} 0 0 0 0 0 {} {} {} {} 20 {} {} 0 {} {} {} \
             18446744073709551615 0 0 0 0 0 0 0 0 0 0 0 0 17 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n",
            self.thread_name(pid),
            self.state_letter(pid)?,
            process.parent,
            process.group,
            process.session,
            ticks(process.times.user),
            ticks(process.times.system),
            ticks(process.children.user),
            ticks(process.children.system),
            process.nice,
            process.threads.len(),
            ticks(process.started),
            self.size_of(pid)?,
            self.size_of(pid)? / 4096,
        ))
    }

    fn status(&self, pid: Pid) -> Result<String> {
        let process = self.process(pid)?;
        let owner = &process.owner;
        let kib = self.size_of(pid)? / 1024;
        let state = match self.state_letter(pid)? {
            'Z' => "Z (zombie)",
            'T' => "T (stopped)",
            'S' => "S (sleeping)",
            _ => "R (running)",
        };
        let first = self.threads.get(&pid);
        let mask = first.map_or(0, |thread| thread.mask);
        let pending = first.map_or(0, |thread| thread.pending.set());
        let (ignored, handled) = process.actions.sets();
        let all = self.scheduler.all();
        let allowed = first.map_or(all.0, |thread| thread.allowed.0 & all.0);
        let groups: Vec<_> = owner
            .groups
            .iter()
            .map(|group| format!("{group} "))
            .collect();
        Ok(format!(
            "Name:\t{}\nUmask:\t{:04o}\nState:\t{state}\nTgid:\t{pid}\nNgid:\t0\nPid:\t{pid}\n\
             PPid:\t{}\nTracerPid:\t0\nUid:\t{}\t{}\t{}\t{}\nGid:\t{}\t{}\t{}\t{}\nFDSize:\t64\n\
             Groups:\t{}\nVmPeak:\t{kib:>8} kB\nVmSize:\t{kib:>8} kB\nVmRSS:\t{kib:>8} kB\n\
             Threads:\t{}\nSigPnd:\t{pending:016x}\nShdPnd:\t{:016x}\nSigBlk:\t{mask:016x}\n\
             SigIgn:\t{ignored:016x}\nSigCgt:\t{handled:016x}\nCpus_allowed:\t{allowed:x}\n\
             Cpus_allowed_list:\t{}\n",
            self.thread_name(pid),
            process.umask,
            process.parent,
            owner.user.real,
            owner.user.effective,
            owner.user.saved,
            owner.user.effective,
            owner.group.real,
            owner.group.effective,
            owner.group.saved,
            owner.group.effective,
            groups.concat(),
            process.threads.len(),
            process.pending.set(),
            ranges(allowed),
        ))
    }

    fn maps(&mut self, pid: Pid) -> Result<String> {
        let root = self.root;
        let space = self.process(pid)?.space;
        let Some(space) = space.and_then(|space| self.spaces.get(space)) else {
            return Ok(String::new());
        };
        let mut text = String::new();
        for (start, region) in space.regions() {
            let flag = |flag, letter| {
                if region.prot.contains(flag) {
                    letter
                } else {
                    '-'
                }
            };
            let shared = match region.sharing {
                Sharing::Private => 'p',
                Sharing::Shared => 's',
            };
            let (offset, node) = match region.backing {
                Backing::File(node, offset) => (offset, Some(node)),
                Backing::Zeros => (0, None),
            };
            let special = node.and_then(|node| self.vdso.name(node, offset));
            // As Linux shows it: no file.
            let (offset, node) = match special {
                Some(_) => (0, None),
                None => (offset, node),
            };
            let meta = node.map(|node| self.objects.node(node).meta);
            let line = format!(
                "{start:08x}-{:08x} {}{}{}{shared} {offset:08x} 00:{:02x} {} ",
                region.end,
                flag(Prot::READ, 'r'),
                flag(Prot::WRITE, 'w'),
                flag(Prot::EXECUTE, 'x'),
                meta.map_or(0, |meta| meta.device),
                meta.map_or(0, |meta| meta.inode),
            );
            let name = match (node, region.purpose) {
                (Some(node), _) => file_name(&mut self.objects, root, node),
                (None, Purpose::Heap) => String::from("[heap]"),
                (None, Purpose::Stack) => String::from("[stack]"),
                (None, Purpose::Mapping) => String::from(special.unwrap_or_default()),
            };
            if name.is_empty() {
                let _ = writeln!(text, "{line}");
            } else {
                let _ = writeln!(text, "{line:<73}{name}");
            }
        }
        Ok(text)
    }
}

/// A name of a mapped file, found in the directories that have been read.
fn file_name(objects: &mut Objects, root: NodeId, node: NodeId) -> String {
    let Some((directory, name)) = objects.find_name(node) else {
        return String::from("(deleted)");
    };
    let mut path = path_of(objects, root, directory).unwrap_or_default();
    if path.last() != Some(&b'/') {
        path.push(b'/');
    }
    path.extend_from_slice(&name);
    String::from_utf8_lossy(&path).into_owned()
}
