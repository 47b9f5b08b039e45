//! The guest that runs KVM: the stock kernel with its KVM modules, and this
//! host's QEMU with its libraries and firmware, in an initial RAM file system.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use cpio::newc::{Builder, trailer};

use crate::images::{BenchImages, utf8};
use crate::qemu::{self, Engine, Machine};
use crate::system::Guest;

/// The modules to load, in this order, and their folders in the package.
const MODULES: [(&str, &str); 3] = [
    ("irqbypass", "kernel/virt/lib"),
    ("kvm", "kernel/arch/x86/kvm"),
    ("kvm-amd", "kernel/arch/x86/kvm"),
];

/// What QEMU's smallest machine loads to boot a kernel, and a PC to boot an
/// image without.
const FIRMWARE: [&str; 6] = [
    "bios-256k.bin",
    "bios-microvm.bin",
    "kvmvapic.bin",
    "linuxboot_dma.bin",
    "multiboot_dma.bin",
    "pvh.bin",
];

/// Writes the file: what `base` holds, then everything else. The kernel
/// unpacks one archive behind the other.
pub(crate) fn build(
    file: &Path,
    base: &Path,
    images: &BenchImages,
    guest: &Guest,
    cache: &Path,
) -> Result<()> {
    let output = File::create(file).with_context(|| format!("can't make {}", file.display()))?;
    let mut output = BufWriter::new(output);
    output.write_all(&read(base)?)?;

    let mut archive = Archive {
        output,
        inode: 0,
        folders: BTreeSet::new(),
    };
    let program = find_program(&rack::Programs::find().qemu)?;
    let folders = data_folders(&program)?;
    archive.add("bench/qemu", 0o755, &read(&program)?)?;
    for library in libraries(&program)? {
        archive.add(
            utf8(&library)?.trim_start_matches('/'),
            0o755,
            &read(&library)?,
        )?;
    }
    for name in FIRMWARE {
        let path = folders.iter().map(|folder| folder.join(name));
        let path = path
            .into_iter()
            .find(|path| path.is_file())
            .with_context(|| format!("QEMU has no {name} in {folders:?}"))?;
        archive.add(&format!("bench/share/{name}"), 0o644, &read(&path)?)?;
    }

    let mut list = String::new();
    for module in modules(&images.kernel, cache)? {
        let name = module
            .file_name()
            .and_then(OsStr::to_str)
            .context("named")?;
        archive.add(&format!("bench/{name}"), 0o644, &read(&module)?)?;
        list += &format!("/bench/{name}\n");
    }
    archive.add("bench/modules", 0o644, list.as_bytes())?;

    archive.add("bench/kernel", 0o644, &read(&images.kernel)?)?;
    archive.add("bench/initramfs", 0o644, &read(&images.initramfs)?)?;
    let machine = Machine {
        engine: Engine::Kvm,
        vcpus: guest.vcpus,
        memory: guest.memory,
        kernel: "/bench/kernel",
        initramfs: "/bench/initramfs",
        command_line: &images.command_line,
    };
    let mut command = vec!["/bench/qemu".to_owned()];
    command.extend(match &images.bare {
        None => qemu::arguments(&machine),
        Some(bare) => {
            archive.add("bench/image", 0o644, &read(&bare.file)?)?;
            qemu::bare_arguments(guest, "/bench/image", &bare.arguments)
        }
    });
    command.extend(["-L".to_owned(), "/bench/share".to_owned()]);
    archive.add("bench/command", 0o644, command.join("\n").as_bytes())?;
    trailer(&mut archive.output)?;
    archive.output.flush()?;
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("can't read {}", path.display()))
}

struct Archive<W> {
    output: W,
    inode: u32,
    /// Those that have an entry.
    folders: BTreeSet<PathBuf>,
}

impl<W: Write> Archive<W> {
    /// Adds a file and the folders it lies in.
    fn add(&mut self, name: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        let above: Vec<&Path> = Path::new(name).ancestors().skip(1).collect();
        for folder in above.into_iter().rev() {
            if folder != Path::new("") && self.folders.insert(folder.to_owned()) {
                self.entry(utf8(folder)?, 0o040_755, &[])?;
            }
        }
        self.entry(name, 0o100_000 | mode, bytes)
    }

    fn entry(&mut self, name: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        self.inode += 1;
        let len = u32::try_from(bytes.len()).with_context(|| format!("{name} is too big"))?;
        let mut entry = Builder::new(name)
            .ino(self.inode)
            .mode(mode)
            .write(&mut self.output, len);
        entry.write_all(bytes)?;
        entry.finish()?;
        Ok(())
    }
}

/// The file that a command runs.
fn find_program(name: &Path) -> Result<PathBuf> {
    if name.components().count() > 1 {
        return Ok(name.to_owned());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
        .with_context(|| format!("{} is not in the search path", name.display()))
}

fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_owned();
    let program = program.display();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("can't run {program}"))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        bail!("{program} failed ({}): {}", output.status, words.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Where QEMU looks for firmware.
fn data_folders(program: &Path) -> Result<Vec<PathBuf>> {
    let folders = output(Command::new(program).args(["-L", "help"]))?;
    Ok(folders.lines().map(PathBuf::from).collect())
}

/// The shared libraries that a program needs, the loader among them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let list = output(Command::new("ldd").arg(program))?;
    let libraries: Vec<_> = list.lines().filter_map(library).collect();
    ensure!(!libraries.is_empty(), "ldd finds no libraries: {list}");
    Ok(libraries)
}

/// The path in "name => /path (address)" or "/path (address)".
fn library(line: &str) -> Option<PathBuf> {
    let path = line.split_whitespace().find(|word| word.starts_with('/'))?;
    Some(path.into())
}

/// The KVM modules from the package that `kernel` was taken from.
fn modules(kernel: &Path, cache: &Path) -> Result<Vec<PathBuf>> {
    let version = kernel.with_file_name("version");
    let package = fs::read_to_string(&version)
        .with_context(|| format!("can't read {}", version.display()))?;
    let package = package.trim().trim_end_matches(".deb");
    let folder = cache.join(format!("kvm-{package}"));
    if !folder.is_dir() {
        fetch_modules(package, cache, &folder)?;
    }
    let find = |(name, _): &(&str, &str)| {
        [".ko", ".ko.xz", ".ko.zst"]
            .map(|end| folder.join(format!("{name}{end}")))
            .into_iter()
            .find(|path| path.is_file())
            .with_context(|| format!("{} has no {name}", folder.display()))
    };
    MODULES.iter().map(find).collect()
}

/// Fetches the package NAME_VERSION_ARCHITECTURE and keeps its KVM modules.
fn fetch_modules(package: &str, cache: &Path, folder: &Path) -> Result<()> {
    let [name, version, architecture] = *package.split('_').collect::<Vec<_>>() else {
        bail!("{package:?} is no package's name");
    };
    eprintln!("bench: fetching KVM's modules");
    // In the cache, so that it can be renamed to its place.
    let scratch = tempfile::tempdir_in(cache).context("can't write to the cache")?;
    let package = format!("{name}:{architecture}={}", version.replace("%3a", ":"));
    output(
        Command::new("apt-get")
            .current_dir(scratch.path())
            .args(["-q", "download", &package]),
    )
    .context(
        "apt has no longer the cached kernel's package; remove the cache's folder kernel-… to \
         get the one that it has, or run apt-get update",
    )?;
    let tree = scratch.path().join("tree");
    let deb = files(scratch.path())?
        .into_iter()
        .find(|path| path.extension() == Some(OsStr::new("deb")))
        .context("apt-get has fetched nothing")?;
    output(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&tree))?;
    let release = name.trim_start_matches("linux-image-");
    let kept = scratch.path().join("kept");
    fs::create_dir(&kept)?;
    for (module, place) in MODULES {
        let file = ["lib/modules", "usr/lib/modules"]
            .map(|root| tree.join(root).join(release).join(place))
            .into_iter()
            .filter_map(|folder| files(&folder).ok())
            .flatten()
            .find(|file| {
                let name = file.file_name().and_then(OsStr::to_str);
                name.and_then(|name| name.split_once(".ko"))
                    .is_some_and(|(stem, _)| stem == module)
            })
            .with_context(|| format!("the package has no module {module}"))?;
        fs::copy(&file, kept.join(file.file_name().context("named")?))?;
    }
    fs::rename(&kept, folder).with_context(|| format!("can't make {}", folder.display()))
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder)?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_ldd() {
        let path = |line| library(line).map(|path| path.display().to_string());
        let line = "\tlibz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x7f)";
        assert_eq!(
            path(line).as_deref(),
            Some("/lib/x86_64-linux-gnu/libz.so.1")
        );
        let line = "\t/lib64/ld-linux-x86-64.so.2 (0x7f)";
        assert_eq!(path(line).as_deref(), Some("/lib64/ld-linux-x86-64.so.2"));
        assert_eq!(path("\tlinux-vdso.so.1 (0x7f)"), None);
    }

    #[test]
    fn each_folder_comes_once_and_before_its_files() {
        let mut archive = Archive {
            output: Vec::new(),
            inode: 0,
            folders: BTreeSet::new(),
        };
        archive.add("a/b/c", 0o644, b"1").expect("to memory");
        archive.add("a/b/d", 0o644, b"2").expect("to memory");
        trailer(&mut archive.output).expect("to memory");
        let mut names = Vec::new();
        let mut rest = archive.output.as_slice();
        loop {
            let reader = cpio::newc::Reader::new(rest).expect("sound");
            if reader.entry().is_trailer() {
                break;
            }
            names.push(reader.entry().name().to_owned());
            rest = reader.finish().expect("whole");
        }
        assert_eq!(names, ["a", "a/b", "a/b/c", "a/b/d"]);
    }
}
