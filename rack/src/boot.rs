//! What the VM boots, checked before anything starts.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::RackError;

/// The files and the words that a guest boots from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BootFiles {
    /// The kernel: a bzImage, or the paravirtual guest's ELF image.
    pub kernel: PathBuf,
    /// The initial RAM file system, or the paravirtual guest's first program,
    /// if there is one.
    pub initramfs: Option<PathBuf>,
    /// The root image, a file in the format of an image region, if there is
    /// one.
    pub image: Option<PathBuf>,
    /// The kernel command line.
    pub command_line: String,
}

/// Kernel and initramfs as they go into the boot bundle.
#[derive(Debug)]
pub(crate) struct Bundle {
    pub kernel: Vec<u8>,
    pub initramfs: Vec<u8>,
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
        let kernel = read("kernel", &self.kernel, "give a bzImage to --guest")?;
        check_kernel(&kernel).map_err(|reason| RackError::Kernel {
            path: self.kernel.clone(),
            reason,
        })?;
        let initramfs = match &self.initramfs {
            Some(path) => read("initramfs", path, "give a readable file to --initramfs")?,
            None => Vec::new(),
        };
        Ok(Bundle { kernel, initramfs })
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

/// A kernel that is an ELF image is the paravirtual guest's, which comes with
/// us and which the hypervisor checks.
fn check_kernel(image: &[u8]) -> Result<(), String> {
    if image.starts_with(b"\x7fELF") {
        return Ok(());
    }
    check_bzimage(image)
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
            initramfs: None,
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
