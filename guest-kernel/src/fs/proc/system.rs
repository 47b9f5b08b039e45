//! What files of /proc tell of the system.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;
use core::sync::atomic::{AtomicU64, Ordering};

use super::{ProcPlace, SystemFile};
use crate::errno::{Errno, Result};
use crate::kernel::Kernel;

fn line(bytes: &[u8]) -> Vec<u8> {
    [bytes, b"\n"].concat()
}

impl Kernel {
    /// The text of a file in /proc.
    pub(crate) fn proc_text(&mut self, place: ProcPlace) -> Result<Vec<u8>> {
        match place {
            ProcPlace::System(file) => Ok(match file {
                // What others have chosen, which need not be text.
                SystemFile::CommandLine => line(&self.command_line),
                SystemFile::HostName => line(&self.names.host),
                SystemFile::DomainName => line(&self.names.domain),
                _ => self.system_text(file).into_bytes(),
            }),
            ProcPlace::File(pid, file) => self.process_text(pid, file),
            _ => Err(Errno::EINVAL),
        }
    }

    fn system_text(&self, file: SystemFile) -> String {
        const NS: u64 = 1_000_000_000;
        let now = self.now();
        let centis = |ns: u64| format!("{}.{:02}", ns / NS, ns / (NS / 100) % 100);
        match file {
            SystemFile::CpuInfo => {
                let mhz = self.machine.ticks_khz() / 1000;
                let mut text = String::new();
                for cpu in self.scheduler.all().iter() {
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
                let cpus = self.scheduler.all();
                let count = cpus.iter().count() as u64;
                let idle = (ticks(now) * count).saturating_sub(user + system);
                let mut text = format!("cpu  {user} 0 {system} {idle} 0 0 0 0 0 0\n");
                // Times are kept by process: each gets its share.
                let [user, system, idle] = [user, system, idle].map(|time| time / count);
                for cpu in cpus.iter() {
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
            SystemFile::OsRelease => format!("{}\n", crate::calls::RELEASE),
            SystemFile::OsType => String::from("Linux\n"),
            SystemFile::PidMax => String::from("4194304\n"),
            SystemFile::GroupsMax => String::from("65536\n"),
            SystemFile::Overcommit => String::from("1\n"),
            SystemFile::Somaxconn => String::from("4096\n"),
            SystemFile::CommandLine | SystemFile::HostName | SystemFile::DomainName => {
                String::new()
            }
        }
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
}
