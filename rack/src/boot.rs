//! What the VM boots, checked before anything starts.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use guest_image::Protocol;
use serde::{Deserialize, Serialize};

use crate::error::RackError;
use crate::spec::{BootBySpec, PlatformSpec};

/// The files and the words that a guest boots from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BootFiles {
    /// The kernel: a bzImage, a multiboot or PVH image, or the paravirtual
    /// guest's.
    pub kernel: PathBuf,
    /// By which protocol the kernel is booted.
    pub boot_by: BootBySpec,
    /// The initial RAM file system of a Linux kernel, or the paravirtual
    /// guest's first program, if there is one.
    pub initramfs: Option<PathBuf>,
    /// What another image is booted with.
    pub modules: Vec<ModuleFile>,
    /// Whether the VM has a PC's old devices.
    pub platform: PlatformSpec,
    /// The root image, a file in the format of an image region, if there is
    /// one.
    pub image: Option<PathBuf>,
    /// The kernel command line.
    pub command_line: String,
}

/// A file for a multiboot or PVH image, with words of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleFile {
    /// The file.
    pub path: PathBuf,
    /// Its command line.
    pub words: String,
}

impl FromStr for ModuleFile {
    type Err = std::convert::Infallible;

    /// The file up to the first blank, then its command line.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (path, words) = text.split_once(' ').unwrap_or((text, ""));
        Ok(Self {
            path: path.into(),
            words: words.into(),
        })
    }
}

/// Kernel and initramfs as they go into the boot bundle, and modules with their
/// command lines.
#[derive(Debug)]
pub(crate) struct Bundle {
    pub kernel: Vec<u8>,
    pub initramfs: Vec<u8>,
    pub modules: Vec<(Vec<u8>, Vec<u8>)>,
}

impl BootFiles {
    /// Reads and checks the files that go into the boot bundle.
    pub(crate) fn read(&self) -> Result<Bundle, RackError> {
        let most = vmm_shared::control::MAX_COMMAND_LINE - 1;
        if self.command_line.len() > most || self.command_line.contains('\0') {
            return Err(RackError::CommandLine {
                len: self.command_line.len(),
                most,
            });
        }
        let hint = "give a bzImage, a multiboot or a PVH image to --guest";
        let kernel = read("kernel", &self.kernel, hint)?;
        self.check(&kernel)?;
        let initramfs = match &self.initramfs {
            Some(path) => read("initramfs", path, "give a readable file to --initramfs")?,
            None => Vec::new(),
        };
        let mut modules = Vec::new();
        for module in &self.modules {
            let content = read("module", &module.path, "give a readable file to --module")?;
            modules.push((content, module.words.clone().into_bytes()));
        }
        Ok(Bundle {
            kernel,
            initramfs,
            modules,
        })
    }

    fn check(&self, kernel: &[u8]) -> Result<(), RackError> {
        let broken = |reason| RackError::Kernel {
            path: self.kernel.clone(),
            reason,
        };
        let protocol = match self.boot_by {
            BootBySpec::Image => guest_image::protocol(&kernel),
            BootBySpec::Paravirtual => {
                guest_image::Image::read_paravirtual(&kernel).map(|image| image.protocol)
            }
        };
        match protocol {
            Ok(Protocol::Linux) => check_bzimage(kernel).map_err(broken)?,
            Ok(_) => {}
            Err(why) => return Err(broken(why.to_string())),
        }
        let most = vmm_shared::control::MAX_MODULES;
        if self.modules.len() > most {
            return Err(RackError::Modules { most });
        }
        let most = vmm_shared::control::MAX_MODULE_WORDS;
        let wrong = |module: &&ModuleFile| module.words.len() > most || module.words.contains('\0');
        match self.modules.iter().find(wrong) {
            Some(module) => Err(RackError::ModuleWords {
                path: module.path.clone(),
                most,
            }),
            None => Ok(()),
        }
    }

    /// Which protocol the image is booted by.
    ///
    /// # Errors
    /// The file can't be read, or is no image.
    pub fn protocol(path: &Path) -> Result<Protocol, RackError> {
        let hint = "give a bzImage, a multiboot or a PVH image to --guest";
        let bytes = read("kernel", path, hint)?;
        guest_image::protocol(&&bytes[..]).map_err(|why| RackError::Kernel {
            path: path.to_owned(),
            reason: why.to_string(),
        })
    }
}

/// Checks that `path` is there and can be read; `hint` says what to do if not.
///
/// # Errors
/// Names the file.
pub fn check_readable(
    what: &'static str,
    path: &Path,
    hint: &'static str,
) -> Result<(), RackError> {
    let opened = File::open(path).and_then(|file| file.metadata());
    let checked = opened.and_then(|file| match file.is_dir() {
        true => Err(std::io::ErrorKind::IsADirectory.into()),
        false => Ok(()),
    });
    checked.map_err(|error| RackError::File {
        what,
        path: path.to_owned(),
        error,
        hint,
    })
}

fn read(what: &'static str, path: &Path, hint: &'static str) -> Result<Vec<u8>, RackError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|mut file| file.read_to_end(&mut bytes))
        .map_err(|error| RackError::File {
            what,
            path: path.to_owned(),
            error,
            hint,
        })?;
    Ok(bytes)
}

/// Offsets in a bzImage's setup header (Linux documentation, "The Linux/x86
/// Boot Protocol").
mod setup {
    pub(super) const SECTORS: usize = 0x1f1;
    pub(super) const BOOT_FLAG: usize = 0x1fe;
    pub(super) const MAGIC: usize = 0x202;
    pub(super) const VERSION: usize = 0x206;
    pub(super) const LOAD_FLAGS: usize = 0x236;
    pub(super) const END: usize = 0x238;
    /// The 64-bit entry point, at 0x200 into the protected-mode part.
    pub(super) const KERNEL_64: u16 = 1;
    /// The first version that says whether there is a 64-bit entry point.
    pub(super) const LEAST_VERSION: u16 = 0x020c;
}

/// Says why `image` can't be booted through its 64-bit entry point.
///
/// # Errors
/// The reason, in words for the operator.
pub fn check_bzimage(image: &[u8]) -> Result<(), String> {
    let Some(header) = image.get(..setup::END) else {
        return Err("not a bzImage: it is too short".into());
    };
    let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    if word(setup::BOOT_FLAG) != 0xaa55 || header[setup::MAGIC..setup::MAGIC + 4] != *b"HdrS" {
        return Err("not a bzImage".into());
    }
    let version = word(setup::VERSION);
    if version < setup::LEAST_VERSION {
        return Err(format!(
            "its boot protocol {}.{:02} is too old, 2.12 is needed",
            version >> 8,
            version & 0xff
        ));
    }
    if word(setup::LOAD_FLAGS) & setup::KERNEL_64 == 0 {
        return Err("it has no 64-bit entry point".into());
    }
    let sectors = match header[setup::SECTORS] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    if image.len() <= (sectors + 1) * 512 {
        return Err("it is truncated".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Vec<u8> {
        let mut image = vec![0; 8192];
        image[setup::SECTORS] = 4;
        image[setup::BOOT_FLAG..][..2].copy_from_slice(&[0x55, 0xaa]);
        image[setup::MAGIC..][..4].copy_from_slice(b"HdrS");
        image[setup::VERSION..][..2].copy_from_slice(&0x020f_u16.to_le_bytes());
        image[setup::LOAD_FLAGS] = 0x7f;
        image
    }

    #[test]
    fn a_modern_kernel_is_accepted() {
        assert_eq!(check_bzimage(&image()), Ok(()));
    }

    #[test]
    fn everything_else_is_refused_with_its_reason() {
        let refusal = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut image = image();
            change(&mut image);
            check_bzimage(&image).expect_err("must be refused")
        };
        assert!(refusal(&|i| i.truncate(100)).contains("too short"));
        assert!(refusal(&|i| i[setup::MAGIC] = b'h').contains("not a bzImage"));
        assert!(refusal(&|i| i[setup::BOOT_FLAG] = 0).contains("not a bzImage"));
        assert!(refusal(&|i| i[setup::VERSION] = 0x0a).contains("2.10 is too old"));
        assert!(refusal(&|i| i[setup::LOAD_FLAGS] = 0).contains("64-bit"));
        assert!(refusal(&|i| i.truncate(2560)).contains("truncated"));
        assert!(check_bzimage(&[]).is_err());
    }

    #[test]
    fn a_missing_kernel_and_a_long_command_line_are_refused() {
        let files = BootFiles {
            kernel: "/nonexistent/vmlinuz".into(),
            boot_by: BootBySpec::Image,
            initramfs: None,
            modules: Vec::new(),
            platform: PlatformSpec::Lean,
            image: None,
            command_line: String::new(),
        };
        let error = files.read().expect_err("missing").to_string();
        assert!(error.contains("/nonexistent/vmlinuz"), "{error}");
        let long = BootFiles {
            command_line: "x".repeat(2048),
            ..files
        };
        let error = long.read().expect_err("too long").to_string();
        assert!(error.contains("2047"), "{error}");
    }
}
