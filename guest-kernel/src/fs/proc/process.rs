//! What files of /proc tell of a process.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;

use super::ProcessFile;
use crate::errno::{Errno, Result};
use crate::fs::node::{NodeId, Objects};
use crate::fs::walk::path_of;
use crate::kernel::Kernel;
use crate::mem::regions::{Backing, Prot, Purpose, Sharing};
use crate::process::{Pid, Process, State};
use crate::wait::Tid;

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
    fn process(&self, pid: Pid) -> Result<&Process> {
        self.processes.get(&pid).ok_or(Errno::ESRCH)
    }

    /// The text of a process's file.
    pub(super) fn process_text(&mut self, pid: Pid, file: ProcessFile) -> Result<Vec<u8>> {
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
