//! Debian's cloud kernel: fetched, unpacked, and the modules that a guest
//! needs picked out with what they depend on.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use object::read::elf::{FileHeader, SectionHeader};
use object::{Endianness, elf};

use super::apt::Apt;
use super::cache::{Cache, key};
use super::program::{DPKG_DEB, XZ, ZSTD};
use super::{Progress, Stage};
use crate::ImageError;
use crate::error::{KernelProblem, io_error};

/// Changes when the layout of the cache entry does.
const RECIPE: &str = "kernel 1";
const META_PACKAGE: &str = "linux-image-cloud-amd64";
const IMAGE_PREFIX: &str = "linux-image-";

/// A module that guests need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wanted {
    name: &'static str,
    /// Only guests with their root on persistent memory need it.
    pmem_only: bool,
    /// The agent loads it only if this exists in the guest.
    condition: Option<&'static str>,
}

const fn always(name: &'static str) -> Wanted {
    Wanted {
        name,
        pmem_only: false,
        condition: None,
    }
}

const fn pmem(name: &'static str) -> Wanted {
    Wanted {
        pmem_only: true,
        ..always(name)
    }
}

impl Wanted {
    const fn if_exists(self, path: &'static str) -> Self {
        Self {
            condition: Some(path),
            ..self
        }
    }
}

/// The modules that a guest needs. Those without a condition come first, so
/// that what they share with others is loaded without one.
const MODULES: [Wanted; 7] = [
    always("virtio_mmio"),
    always("virtio_console"),
    pmem("nd_pmem"),
    pmem("overlay"),
    // Persistent memory is told by ACPI, or by the E820 map alone.
    pmem("nfit").if_exists("/sys/firmware/acpi/tables/NFIT"),
    pmem("nd_e820").if_exists("/sys/bus/platform/devices/e820_pmem"),
    // On PCI our machine has a bare host bridge; a plain one, in which the
    // same image is to run for comparison, has more.
    always("virtio_pci").if_exists("/sys/bus/pci/devices/0000:00:01.0"),
];

/// The kernel's entry in the cache.
#[derive(Debug)]
pub(crate) struct DebianKernel {
    directory: PathBuf,
}

/// A module in the order of loading.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Module {
    pub(crate) name: String,
    /// Only guests with their root on persistent memory need it.
    pub(crate) pmem_only: bool,
    /// It is loaded only if this exists.
    pub(crate) condition: Option<String>,
}

impl DebianKernel {
    /// The bzImage.
    pub(crate) fn image(&self) -> PathBuf {
        self.directory.join("vmlinuz")
    }

    /// The package's name and version, and the modules picked from it: they
    /// stand for all that is here.
    pub(crate) fn identity(&self) -> Result<Vec<u8>, ImageError> {
        let mut identity = Vec::new();
        for name in ["version", "modules"] {
            let path = self.directory.join(name);
            identity.extend(fs::read(&path).map_err(io_error("can't read", &path))?);
        }
        Ok(identity)
    }

    /// Where a module is.
    pub(crate) fn module_path(&self, module: &Module) -> PathBuf {
        self.directory.join(format!("{}.ko", module.name))
    }

    /// The modules, in the order of loading.
    pub(crate) fn modules(&self) -> Result<Vec<Module>, ImageError> {
        let path = self.directory.join("modules");
        let text = fs::read_to_string(&path).map_err(io_error("can't read", &path))?;
        Ok(text.lines().filter_map(parse_module).collect())
    }
}

fn module_line(name: &str, wanted: &Wanted) -> String {
    let group = if wanted.pmem_only { "pmem" } else { "always" };
    match wanted.condition {
        Some(path) => format!("{name} {group} {path}\n"),
        None => format!("{name} {group}\n"),
    }
}

fn parse_module(line: &str) -> Option<Module> {
    let mut words = line.split(' ');
    Some(Module {
        name: words.next()?.to_owned(),
        pmem_only: words.next()? == "pmem",
        condition: words.next().map(str::to_owned),
    })
}

/// Debian's kernel, from the cache or from its package.
pub(crate) fn debian_kernel(
    cache: &Cache,
    progress: &Progress,
) -> Result<DebianKernel, ImageError> {
    let wanted = format!("{MODULES:?}");
    let name = format!(
        "kernel-{}",
        key(&[
            RECIPE.as_bytes(),
            META_PACKAGE.as_bytes(),
            wanted.as_bytes()
        ])
    );
    let directory = cache.entry(&name, progress, |new| build(new, progress))?;
    Ok(DebianKernel { directory })
}

fn build(new: &Path, progress: &Progress) -> Result<(), ImageError> {
    let scratch = new.with_file_name("scratch");
    fs::create_dir(new).map_err(io_error("can't make", new))?;
    fs::create_dir(&scratch).map_err(io_error("can't make", &scratch))?;
    progress(Stage::Kernel, "fetching Debian's kernel package");
    let (package, file) = Apt::with(&scratch, |apt| {
        let package = apt.resolve(META_PACKAGE, IMAGE_PREFIX)?;
        let file = apt.download(&package)?;
        Ok((package, file))
    })?;
    progress(Stage::Kernel, &format!("unpacking {package}"));
    let tree = scratch.join("tree");
    DPKG_DEB.output(DPKG_DEB.command().arg("-x").arg(&file).arg(&tree))?;

    let release = package.trim_start_matches(IMAGE_PREFIX);
    let missing = |what: &str| ImageError::NotInPackage {
        package: package.clone(),
        file: what.to_owned(),
    };
    for (from, to) in [("vmlinuz", "vmlinuz"), ("config", "config")] {
        let from = tree.join(format!("boot/{from}-{release}"));
        fs::copy(&from, new.join(to)).map_err(|_| missing(&from.display().to_string()))?;
    }
    // Since the merge of /usr, packages ship their modules below it.
    let modules = ["lib/modules", "usr/lib/modules"]
        .map(|place| tree.join(place).join(release))
        .into_iter()
        .find(|place| place.is_dir())
        .ok_or_else(|| missing("lib/modules"))?;
    let list = pick_modules(&modules, new, &missing)?;
    let version = file.file_name().unwrap_or_default();
    for (name, bytes) in [
        ("modules", list.as_bytes()),
        ("version", version.as_encoded_bytes()),
    ] {
        let path = new.join(name);
        fs::write(&path, bytes).map_err(io_error("can't write", &path))?;
    }
    Ok(())
}

/// Copies the wanted modules and their dependencies to `new` and returns the
/// list of them.
fn pick_modules(
    modules: &Path,
    new: &Path,
    missing: &dyn Fn(&str) -> ImageError,
) -> Result<String, ImageError> {
    let mut files = HashMap::new();
    find_modules(&modules.join("kernel"), &mut files)?;
    let built_in = fs::read_to_string(modules.join("modules.builtin")).unwrap_or_default();
    let built_in = |name: &str| {
        let mut names = built_in
            .lines()
            .filter_map(|path| module_name(Path::new(path)));
        names.any(|built_in| built_in == name)
    };

    let mut list = String::new();
    let mut done: Vec<String> = Vec::new();
    for wanted in MODULES {
        // Depth first: what is on the stack waits for its dependencies.
        let mut stack = vec![(wanted.name.to_owned(), false)];
        while let Some((name, ready)) = stack.pop() {
            if done.contains(&name) || built_in(&name) {
                continue;
            }
            let copy = new.join(format!("{name}.ko"));
            if ready {
                list.push_str(&module_line(&name, &wanted));
                done.push(name);
                continue;
            }
            let file = files
                .get(&name)
                .ok_or_else(|| missing(&format!("module {name}")))?;
            unpack_module(file, &copy)?;
            stack.push((name, true));
            for dependency in dependencies(&copy)? {
                stack.push((dependency, false));
            }
        }
    }
    Ok(list)
}

/// A module's name, if the file is one: underscores for hyphens, and without
/// the endings for compression.
fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let (stem, _) = file.split_once(".ko")?;
    Some(stem.replace('-', "_"))
}

fn find_modules(directory: &Path, found: &mut HashMap<String, PathBuf>) -> Result<(), ImageError> {
    let failed = io_error("can't read", directory);
    for entry in fs::read_dir(directory).map_err(&failed)? {
        let path = entry.map_err(&failed)?.path();
        if path.is_dir() {
            find_modules(&path, found)?;
        } else if let Some(name) = module_name(&path) {
            found.insert(name, path);
        }
    }
    Ok(())
}

/// Decompressed here, once, not in every guest.
fn unpack_module(from: &Path, to: &Path) -> Result<(), ImageError> {
    let program = match from.extension().and_then(|end| end.to_str()) {
        Some("xz") => XZ,
        Some("zst") => ZSTD,
        _ => {
            fs::copy(from, to).map_err(io_error("can't copy", from))?;
            return Ok(());
        }
    };
    let bytes = program.output(program.command().arg("-dc").arg(from))?;
    fs::write(to, bytes).map_err(io_error("can't write", to))
}

/// The modules that a module says it needs.
fn dependencies(path: &Path) -> Result<Vec<String>, ImageError> {
    let bytes = fs::read(path).map_err(io_error("can't read", path))?;
    let info = module_info(&bytes).map_err(|problem| ImageError::BadModule {
        path: path.to_path_buf(),
        problem,
    })?;
    let depends = info
        .split(|byte| *byte == 0)
        .find_map(|entry| entry.strip_prefix(b"depends="))
        .unwrap_or_default();
    Ok(String::from_utf8_lossy(depends)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect())
}

fn module_info(bytes: &[u8]) -> Result<&[u8], String> {
    let read = || -> object::read::Result<Option<&[u8]>> {
        let header = elf::FileHeader64::<Endianness>::parse(bytes)?;
        let endian = header.endian()?;
        let sections = header.sections(endian, bytes)?;
        let Some((_, section)) = sections.section_by_name(endian, b".modinfo") else {
            return Ok(None);
        };
        section.data(endian, bytes).map(Some)
    };
    match read() {
        Ok(Some(info)) => Ok(info),
        Ok(None) => Err("it has no section .modinfo".into()),
        Err(error) => Err(error.to_string()),
    }
}

/// Refuses a file that is no bzImage with a 64-bit entry. Offsets are those
/// of Linux, Documentation/x86/boot.rst, "The Real-Mode Kernel Header".
pub(crate) fn check_bzimage(path: &Path) -> Result<(), ImageError> {
    let mut file = File::open(path).map_err(io_error("can't read the kernel", path))?;
    let present = file
        .metadata()
        .map_err(io_error("can't read the kernel", path))?
        .len();
    let mut header = Vec::new();
    file.by_ref()
        .take(0x268)
        .read_to_end(&mut header)
        .map_err(io_error("can't read the kernel", path))?;
    check_header(&header, present).map_err(|problem| ImageError::Kernel {
        path: path.to_path_buf(),
        problem,
    })
}

fn check_header(header: &[u8], present: u64) -> Result<(), KernelProblem> {
    let Some(header) = header.first_chunk::<0x268>() else {
        return Err(KernelProblem::NotABzImage);
    };
    let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let loaded_high = header[0x211] & 1 != 0;
    if half(0x1fe) != 0xaa55 || header[0x202..0x206] != *b"HdrS" || !loaded_high {
        return Err(KernelProblem::NotABzImage);
    }
    let protocol = half(0x206);
    if protocol < 0x20c {
        return Err(KernelProblem::TooOld(protocol));
    }
    // XLF_KERNEL_64, and XLF_CAN_BE_LOADED_ABOVE_4G is not asked for.
    if half(0x236) & 1 == 0 {
        return Err(KernelProblem::NotX86_64);
    }
    if header[0x234] == 0 {
        return Err(KernelProblem::NotRelocatable);
    }
    // 0 stands for 4 setup sectors.
    let sectors = match header[0x1f1] {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let paragraphs = u64::from(half(0x1f4)) | u64::from(half(0x1f6)) << 16;
    let promised = (sectors + 1) * 512 + paragraphs * 16;
    if present < promised {
        return Err(KernelProblem::Truncated { present, promised });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good_header() -> Vec<u8> {
        let mut header = vec![0; 0x268];
        header[0x1f1] = 1;
        header[0x1f4..0x1f8].copy_from_slice(&64_u32.to_le_bytes());
        header[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        header[0x202..0x206].copy_from_slice(b"HdrS");
        header[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        header[0x211] = 1;
        header[0x234] = 1;
        header[0x236] = 1;
        header
    }

    #[test]
    fn a_kernel_is_told_from_what_is_none() {
        assert_eq!(check_header(&good_header(), 2048), Ok(()));
        let with = |at: usize, value: u8| {
            let mut header = good_header();
            header[at] = value;
            check_header(&header, 2048)
        };
        for at in [0x1fe, 0x202, 0x211] {
            assert_eq!(with(at, 0), Err(KernelProblem::NotABzImage));
        }
        assert_eq!(with(0x206, 5), Err(KernelProblem::TooOld(0x205)));
        assert_eq!(with(0x236, 0), Err(KernelProblem::NotX86_64));
        assert_eq!(with(0x234, 0), Err(KernelProblem::NotRelocatable));
        assert_eq!(
            check_header(&good_header(), 2047),
            Err(KernelProblem::Truncated {
                present: 2047,
                promised: 2048
            })
        );
        assert_eq!(
            check_header(&[0x7f, b'E', b'L', b'F'], 4),
            Err(KernelProblem::NotABzImage)
        );
        assert!(KernelProblem::TooOld(0x205).to_string().contains("2.05"));
    }

    #[test]
    fn a_missing_kernel_is_named() {
        let error = check_bzimage(Path::new("/no/such/kernel")).expect_err("missing");
        assert!(error.to_string().contains("/no/such/kernel"));
    }

    #[test]
    fn the_module_list_comes_back() {
        let line = module_line("nfit", &pmem("nfit").if_exists("/sys/x"));
        let module = parse_module(line.trim_end()).expect("valid");
        assert_eq!(
            (
                module.name.as_str(),
                module.pmem_only,
                module.condition.as_deref()
            ),
            ("nfit", true, Some("/sys/x"))
        );
        let module = parse_module(module_line("virtio", &always("virtio_mmio")).trim_end());
        assert!(module.is_some_and(|m| !m.pmem_only && m.condition.is_none()));
    }

    #[test]
    fn modules_are_known_by_their_names() {
        let name = |path| module_name(Path::new(path));
        assert_eq!(name("a/virtio-rng.ko.xz").as_deref(), Some("virtio_rng"));
        assert_eq!(name("a/nfit.ko").as_deref(), Some("nfit"));
        assert_eq!(name("a/modules.dep"), None);
        assert!(module_info(b"no ELF").is_err());
    }
}
