//! /proc: a view of the processes, made when it is looked at.

mod process;
mod system;

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use linux_raw_sys::general::{S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG};

use super::Place;
use crate::errno::{Errno, Result};
use crate::process::files::{Object, OpenFile};
use crate::process::{Pid, Process};
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
    DomainName,
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
const KERNEL_FILES: [(&str, SystemFile); 6] = [
    ("domainname", SystemFile::DomainName),
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
