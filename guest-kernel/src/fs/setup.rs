//! What is mounted over the root image: /dev, /proc, /sys and memory.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use linux_raw_sys::general::{S_IFBLK, S_IFCHR};

use super::MEMORY_DEVICE;
use super::names::attach;
use super::node::{Entry, FileData, Kind, Maker, NodeId, Objects};
use crate::errno::{Errno, Result};
use crate::fs::walk::Viewer;
use crate::kernel::Kernel;
use crate::process::files::Device;
use crate::wait::Tid;

/// Name of the port to the launcher, as a virtio console would have it.
const PORT: &[u8] = b"vport0p1";
/// Where the first program is kept.
const INIT: &[u8] = b"viaduct-init";

/// Character devices: name, numbers, permissions.
const DEVICES: [(&[u8], u32, u32, u32); 9] = [
    (b"null", 1, 3, 0o666),
    (b"zero", 1, 5, 0o666),
    (b"full", 1, 7, 0o666),
    (b"random", 1, 8, 0o666),
    (b"urandom", 1, 9, 0o666),
    (b"tty", 5, 0, 0o666),
    (b"console", 5, 1, 0o600),
    (b"ptmx", 5, 2, 0o666),
    (PORT, LAUNCHER.0, LAUNCHER.1, 0o600),
];
const LAUNCHER: (u32, u32) = (250, 1);
/// Major number of terminals.
pub(crate) const TERMINALS: u32 = 136;

/// Files of /sys that programs read.
const SYSTEM_FILES: [(&str, &str); 2] = [
    ("class/virtio-ports/vport0p1/name", "viaduct.agent\n"),
    (
        "kernel/mm/transparent_hugepage/enabled",
        "always madvise [never]\n",
    ),
];

/// Numbers as files of /sys list them.
fn list(numbers: &[usize]) -> String {
    let words: Vec<_> = numbers.iter().map(|number| format!("{number}")).collect();
    words.join(",") + "\n"
}

/// The same for the processors, by the nodes that they are on.
fn processor_files(nodes: &[u32]) -> Vec<(String, String)> {
    const CPUS: &str = "devices/system/cpu";
    let last = nodes.len().saturating_sub(1);
    let all = match last {
        0 => String::from("0\n"),
        _ => format!("0-{last}\n"),
    };
    let mut files: Vec<_> = ["online", "possible", "present"]
        .map(|name| (format!("{CPUS}/{name}"), all.clone()))
        .into();
    for (cpu, node) in nodes.iter().enumerate() {
        let of_node = |other: &usize| nodes[*other] == *node;
        let near: Vec<_> = (0..nodes.len()).filter(of_node).collect();
        let topology = format!("{CPUS}/cpu{cpu}/topology");
        files.extend([
            (format!("{topology}/thread_siblings_list"), list(&[cpu])),
            (format!("{topology}/core_siblings_list"), list(&near)),
            (
                format!("{topology}/physical_package_id"),
                format!("{node}\n"),
            ),
        ]);
        files.push((
            format!("devices/system/node/node{node}/cpulist"),
            list(&near),
        ));
    }
    let mut online: Vec<_> = nodes.iter().map(|node| *node as usize).collect();
    online.dedup();
    files.push((String::from("devices/system/node/online"), list(&online)));
    files
}

/// What a device with these numbers is.
pub(crate) fn device(major: u32, minor: u32) -> Option<Device> {
    Some(match (major, minor) {
        (1, 3) => Device::Null,
        (1, 5) => Device::Zero,
        (1, 7) => Device::Full,
        (1, 8 | 9) => Device::Random,
        (5, 1) => Device::Console,
        LAUNCHER => Device::Launcher,
        _ => return None,
    })
}

/// The root with everything mounted; `None` without an image.
pub(crate) fn root(objects: &mut Objects, cpu_nodes: &[u32], now: u64) -> Option<NodeId> {
    let maker = Maker {
        uid: 0,
        gid: 0,
        now,
    };
    let root = objects.image_root()?;
    fill(objects, root, cpu_nodes, maker).ok()?;
    Some(root)
}

fn fill(objects: &mut Objects, root: NodeId, cpu_nodes: &[u32], maker: Maker) -> Result<()> {
    let proc = objects.directory(root)?;
    proc.entries.insert(b"proc"[..].into(), Entry::Proc);
    let dev = mount(objects, root, b"dev", 0o755, maker)?;
    for (name, major, minor, mode) in DEVICES {
        let id = objects.make(
            Kind::Device(major, minor),
            S_IFCHR | mode,
            MEMORY_DEVICE,
            maker,
        );
        attach(objects, dev, name, id, maker.now)?;
    }
    mount(objects, dev, b"pts", 0o755, maker)?;
    mount(objects, dev, b"shm", 0o1777, maker)?;
    let links: [(&[u8], &[u8]); 4] = [
        (b"fd", b"/proc/self/fd"),
        (b"stdin", b"/proc/self/fd/0"),
        (b"stdout", b"/proc/self/fd/1"),
        (b"stderr", b"/proc/self/fd/2"),
    ];
    for (name, target) in links {
        let id = objects.make(Kind::Link(target.into()), 0o777, MEMORY_DEVICE, maker);
        attach(objects, dev, name, id, maker.now)?;
    }
    mount(objects, root, b"tmp", 0o1777, maker)?;
    mount(objects, root, b"run", 0o755, maker)?;
    let sys = mount(objects, root, b"sys", 0o555, maker)?;
    let fixed = SYSTEM_FILES.map(|(path, text)| (path.into(), text.into()));
    for (path, text) in fixed.into_iter().chain(processor_files(cpu_nodes)) {
        let mut directory = sys;
        let mut names = path.split('/').peekable();
        while let Some(name) = names.next() {
            let name = name.as_bytes();
            if names.peek().is_none() {
                if objects.entry(directory, name).is_ok() {
                    continue;
                }
                let id = objects.make(file(), 0o444, MEMORY_DEVICE, maker);
                attach(objects, directory, name, id, maker.now)?;
                objects.write(id, 0, text.as_bytes())?;
            } else {
                directory = match objects.entry(directory, name) {
                    Ok(Entry::Node(id)) => id,
                    _ => mount(objects, directory, name, 0o755, maker)?,
                };
            }
        }
    }
    Ok(())
}

/// An empty regular file.
pub(crate) fn file() -> Kind {
    Kind::File(FileData::default())
}

/// An empty directory in memory in place of what is there.
fn mount(
    objects: &mut Objects,
    above: NodeId,
    name: &[u8],
    mode: u32,
    maker: Maker,
) -> Result<NodeId> {
    let id = objects.make_directory(mode, MEMORY_DEVICE, maker);
    attach(objects, above, name, id, maker.now)?;
    Ok(id)
}

impl Kernel {
    /// Puts the first program where it can be run from; returns its path.
    pub(crate) fn install_init(&mut self, program: &[u8]) -> Result<Vec<u8>> {
        let maker = Maker {
            uid: 0,
            gid: 0,
            now: self.boot_wall_ns,
        };
        let root = self.root;
        let Entry::Node(run) = self.objects.entry(root, b"run")? else {
            return Err(Errno::EIO);
        };
        let id = self.objects.make(file(), 0o500, MEMORY_DEVICE, maker);
        attach(&mut self.objects, run, INIT, id, maker.now)?;
        if self.objects.write(id, 0, program)? < program.len() {
            return Err(Errno::ENOSPC);
        }
        let mut path = b"/run/".to_vec();
        path.extend_from_slice(INIT);
        Ok(path)
    }

    /// Says in /sys which processors and nodes are left.
    pub(crate) fn write_online(&mut self) {
        let cpus: Vec<_> = self.scheduler.all().iter().collect();
        let node = |cpu: &usize| self.scheduler.node(*cpu) as usize;
        let mut nodes: Vec<_> = cpus.iter().map(node).collect();
        nodes.dedup();
        for (kind, numbers) in [(&b"cpu"[..], cpus), (b"node", nodes)] {
            // Somebody may have removed it by hand.
            let _ = self.write_online_file(kind, &list(&numbers));
        }
    }

    fn write_online_file(&mut self, kind: &[u8], text: &str) -> Result<()> {
        let mut at = self.root;
        for name in [&b"sys"[..], b"devices", b"system", kind, b"online"] {
            let Entry::Node(id) = self.objects.entry(at, name)? else {
                return Err(Errno::ENOENT);
            };
            at = id;
        }
        self.objects.truncate(at, 0)?;
        self.objects.write(at, 0, text.as_bytes())?;
        Ok(())
    }

    /// The directory of terminals.
    fn terminals_directory(&mut self) -> Result<NodeId> {
        let root = self.root;
        let Entry::Node(dev) = self.objects.entry(root, b"dev")? else {
            return Err(Errno::ENOENT);
        };
        match self.objects.entry(dev, b"pts")? {
            Entry::Node(pts) => Ok(pts),
            _ => Err(Errno::ENOENT),
        }
    }

    /// Names a terminal.
    pub(crate) fn add_terminal(&mut self, tid: Tid, number: u32) -> Result<()> {
        const TTY_GROUP: u32 = 5;
        let directory = self.terminals_directory()?;
        let maker = Maker {
            gid: TTY_GROUP,
            ..self.maker(tid)
        };
        let kind = Kind::Device(TERMINALS, number);
        let id = self
            .objects
            .make(kind, S_IFCHR | 0o620, MEMORY_DEVICE, maker);
        let name = format!("{number}");
        attach(&mut self.objects, directory, name.as_bytes(), id, maker.now)
    }

    /// The node of a terminal's name, if it has one.
    pub(crate) fn terminal_node(&mut self, number: u32) -> Option<NodeId> {
        let directory = self.terminals_directory().ok()?;
        let name = format!("{number}");
        match self.objects.entry(directory, name.as_bytes()) {
            Ok(Entry::Node(id)) => Some(id),
            _ => None,
        }
    }

    /// Takes a terminal's name away.
    pub(crate) fn remove_terminal(&mut self, number: u32) {
        let now = self.wall();
        let Some(id) = self.terminal_node(number) else {
            return;
        };
        let Ok(directory) = self.terminals_directory() else {
            return;
        };
        let viewer = Viewer {
            root: self.root,
            directory: super::Place::Node(directory),
            uid: 0,
            gid: 0,
        };
        let name: Box<[u8]> = format!("{number}").into_bytes().into();
        let slot = super::walk::Slot {
            directory: super::Place::Node(directory),
            name,
            found: Some(super::Place::Node(id)),
            must_be_directory: false,
        };
        // Somebody may have removed it by hand.
        let _ = super::names::remove(
            &mut self.objects,
            &slot,
            &viewer,
            super::names::Remove::File,
            now,
        );
    }
}

/// Numbers of a device as `stat` shows them.
pub(crate) fn device_number(major: u32, minor: u32) -> u64 {
    let (major, minor) = (u64::from(major), u64::from(minor));
    (major & 0xfff) << 8 | minor & 0xff | (minor & !0xff) << 12
}

/// The other way round, from what `mknod` is given.
pub(crate) fn device_parts(number: u64) -> (u32, u32) {
    let major = number >> 8 & 0xfff;
    let minor = number & 0xff | number >> 12 & 0xf_ff00;
    (
        u32::try_from(major).expect("12 bits"),
        u32::try_from(minor).expect("20 bits"),
    )
}

/// Whether a mode is that of a device.
pub(crate) fn is_device(mode: u32) -> bool {
    let kind = mode & linux_raw_sys::general::S_IFMT;
    kind == S_IFCHR || kind == S_IFBLK
}
