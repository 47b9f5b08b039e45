//! The initial RAM file system: a cpio archive, uncompressed, because under
//! emulation decompressing costs more than reading.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use cpio::newc::{Builder, trailer};

use super::apt::Apt;
use super::cache::{Cache, key};
use super::kernel::DebianKernel;
use super::program::{DPKG_DEB, program};
use super::{Progress, Stage};
use crate::ImageError;
use crate::error::io_error;

/// Changes when what is made from the same inputs does.
const RECIPE: &str = "initramfs 1";
const BUSYBOX_PACKAGE: &str = "busybox-static";

const DIRECTORIES: [&str; 17] = [
    "bin",
    "dev",
    "etc",
    "lib",
    "lib/modules",
    "mnt",
    "proc",
    "root",
    "run",
    "sbin",
    "sys",
    "tmp",
    "usr",
    "usr/bin",
    "usr/sbin",
    "var",
    "var/tmp",
];
const FILES: [(&str, &str); 5] = [
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    ),
    ("etc/group", "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"),
    ("etc/hostname", "viaduct\n"),
    ("etc/hosts", "127.0.0.1 localhost viaduct\n::1 localhost\n"),
    ("etc/profile", "PS1='\\u@\\h:\\w\\$ '\nexport PS1\n"),
];

/// What an initial RAM file system is made from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recipe<'a> {
    /// The static program that becomes its init.
    pub(crate) agent: &'a Path,
    /// Whose modules to put in; none for a kernel with built-in drivers.
    pub(crate) kernel: Option<&'a DebianKernel>,
    /// The directory of [`busybox`]; none if the root is elsewhere.
    pub(crate) busybox: Option<&'a Path>,
}

/// Busybox as a directory: the program, and the list of its applets.
pub(crate) fn busybox(cache: &Cache, progress: &Progress) -> Result<PathBuf, ImageError> {
    let name = format!(
        "busybox-{}",
        key(&[b"busybox 1", BUSYBOX_PACKAGE.as_bytes()])
    );
    cache.entry(&name, progress, |new| {
        let scratch = new.with_file_name("scratch");
        for directory in [new, &scratch] {
            fs::create_dir(directory).map_err(io_error("can't make", directory))?;
        }
        progress(Stage::Initramfs, "fetching busybox");
        let package = Apt::with(&scratch, |apt| apt.download(BUSYBOX_PACKAGE))?;
        let tree = scratch.join("tree");
        DPKG_DEB.output(DPKG_DEB.command().arg("-x").arg(package).arg(&tree))?;
        let program_path = new.join("busybox");
        ["bin/busybox", "usr/bin/busybox"]
            .iter()
            .find(|path| fs::copy(tree.join(path), &program_path).is_ok())
            .ok_or_else(|| ImageError::NotInPackage {
                package: BUSYBOX_PACKAGE.into(),
                file: "bin/busybox".into(),
            })?;
        let applets = program("busybox", BUSYBOX_PACKAGE)
            .output(Command::new(&program_path).arg("--list-full"))?;
        let path = new.join("applets");
        fs::write(&path, applets).map_err(io_error("can't write", &path))
    })
}

/// The archive, from the cache or made anew.
pub(crate) fn initramfs(
    cache: &Cache,
    recipe: &Recipe<'_>,
    progress: &Progress,
) -> Result<PathBuf, ImageError> {
    let agent = read(recipe.agent)?;
    let identity = recipe.kernel.map(DebianKernel::identity).transpose()?;
    let root: &[u8] = if recipe.busybox.is_some() {
        b"busybox"
    } else {
        b"pmem"
    };
    let fixed = format!("{DIRECTORIES:?}{FILES:?}");
    let name = format!(
        "initramfs-{}.cpio",
        key(&[
            RECIPE.as_bytes(),
            fixed.as_bytes(),
            &agent,
            &identity.unwrap_or_default(),
            root,
        ])
    );
    cache.entry(&name, progress, |new| {
        progress(
            Stage::Initramfs,
            "putting the initial RAM file system together",
        );
        let mut archive = Vec::new();
        fill(&mut archive, &agent, recipe)?;
        fs::write(new, &archive).map_err(io_error("can't write", new))
    })
}

fn fill(archive: &mut Vec<u8>, agent: &[u8], recipe: &Recipe<'_>) -> Result<(), ImageError> {
    let mut cpio = Cpio { archive, inode: 0 };
    let failed = io_error("can't pack", Path::new("the initial RAM file system"));
    for directory in DIRECTORIES {
        let mode = if directory.ends_with("tmp") {
            0o1777
        } else {
            0o755
        };
        cpio.add(directory, 0o040_000 | mode, &[], (0, 0))
            .map_err(&failed)?;
    }
    // The kernel opens the console for init before devtmpfs is mounted.
    cpio.add("dev/console", 0o020_600, &[], (5, 1))
        .map_err(&failed)?;
    cpio.add("dev/null", 0o020_666, &[], (1, 3))
        .map_err(&failed)?;
    cpio.add("init", 0o100_755, agent, (0, 0))
        .map_err(&failed)?;
    for (name, text) in FILES {
        cpio.add(name, 0o100_644, text.as_bytes(), (0, 0))
            .map_err(&failed)?;
    }
    if let Some(busybox) = recipe.busybox {
        let program = read(&busybox.join("busybox"))?;
        cpio.add("bin/busybox", 0o100_755, &program, (0, 0))
            .map_err(&failed)?;
        let applets = read(&busybox.join("applets"))?;
        for applet in String::from_utf8_lossy(&applets).lines() {
            let applet = applet.trim_start_matches('/');
            // Init is ours; other names must have their directory.
            let known = DIRECTORIES.iter().any(|directory| {
                applet
                    .strip_prefix(directory)
                    .and_then(|rest| rest.strip_prefix('/'))
                    .is_some_and(|name| !name.contains('/'))
            });
            if known && applet != "bin/busybox" && applet != "sbin/init" {
                cpio.add(applet, 0o120_777, b"/bin/busybox", (0, 0))
                    .map_err(&failed)?;
            }
        }
    }
    if let Some(kernel) = recipe.kernel {
        let mut list = String::new();
        for module in kernel.modules()? {
            if module.pmem_only && recipe.busybox.is_some() {
                continue;
            }
            let name = format!("lib/modules/{}.ko", module.name);
            let bytes = read(&kernel.module_path(&module))?;
            cpio.add(&name, 0o100_644, &bytes, (0, 0))
                .map_err(&failed)?;
            list.push_str(&format!("/{name}"));
            if let Some(condition) = &module.condition {
                list.push_str(&format!(" {condition}"));
            }
            list.push('\n');
        }
        cpio.add("lib/modules/load.list", 0o100_644, list.as_bytes(), (0, 0))
            .map_err(&failed)?;
    }
    trailer(&mut *cpio.archive).map_err(failed)?;
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>, ImageError> {
    fs::read(path).map_err(io_error("can't read", path))
}

struct Cpio<'a> {
    archive: &'a mut Vec<u8>,
    inode: u32,
}

impl Cpio<'_> {
    /// Adds an entry that belongs to root, with the epoch as its time, so
    /// that the same inputs give the same archive.
    fn add(&mut self, name: &str, mode: u32, bytes: &[u8], device: (u32, u32)) -> io::Result<()> {
        self.inode += 1;
        let len = u32::try_from(bytes.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let mut entry = Builder::new(name)
            .ino(self.inode)
            .mode(mode)
            .rdev_major(device.0)
            .rdev_minor(device.1)
            .write(&mut *self.archive, len);
        entry.write_all(bytes)?;
        entry.finish()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use cpio::newc::Reader;

    use super::*;

    fn unpack(mut archive: &[u8]) -> BTreeMap<String, (u32, Vec<u8>)> {
        let mut entries = BTreeMap::new();
        loop {
            let mut reader = Reader::new(archive).expect("valid");
            if reader.entry().is_trailer() {
                return entries;
            }
            let mut bytes = Vec::new();
            io::copy(&mut reader, &mut bytes).expect("complete");
            let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
            assert!(entries.insert(name, (mode, bytes)).is_none(), "twice");
            archive = reader.finish().expect("padded");
        }
    }

    #[test]
    fn an_archive_has_all_that_a_guest_needs() {
        let busybox = tempfile::TempDir::new().expect("temporary directory");
        fs::write(busybox.path().join("busybox"), b"program").expect("written");
        fs::write(
            busybox.path().join("applets"),
            "bin/busybox\nbin/sh\nsbin/init\nusr/bin/env\nlinuxrc\nbin/a/b\n",
        )
        .expect("written");
        let mut archive = Vec::new();
        let recipe = Recipe {
            agent: Path::new("unused"),
            kernel: None,
            busybox: Some(busybox.path()),
        };
        fill(&mut archive, b"agent", &recipe).expect("packed");
        let entries = unpack(&archive);
        assert_eq!(entries["init"], (0o100_755, b"agent".to_vec()));
        assert_eq!(entries["bin/sh"], (0o120_777, b"/bin/busybox".to_vec()));
        assert_eq!(entries["usr/bin/env"].0, 0o120_777);
        assert_eq!(entries["dev/console"].0, 0o020_600);
        assert_eq!(entries["bin/busybox"].0, 0o100_755);
        for absent in ["sbin/init", "linuxrc", "bin/a/b"] {
            assert!(!entries.contains_key(absent), "{absent}");
        }
        for directory in DIRECTORIES {
            assert_eq!(entries[directory].0 & 0o170_000, 0o040_000);
        }
    }

    #[test]
    fn the_same_inputs_give_the_same_archive() {
        let recipe = Recipe {
            agent: Path::new("unused"),
            kernel: None,
            busybox: None,
        };
        let make = || {
            let mut archive = Vec::new();
            fill(&mut archive, b"agent", &recipe).expect("packed");
            archive
        };
        assert_eq!(make(), make());
        assert!(!unpack(&make()).contains_key("bin/busybox"));
    }
}
