//! What the host offers: the programs a rack is made of, and nested SVM.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::RackError;

const LEAST_QEMU: (u32, u32) = (7, 2);

/// The programs that a rack runs.
#[derive(Clone, Debug)]
pub struct Programs {
    /// QEMU for x86-64.
    pub qemu: PathBuf,
    /// The hypervisor's image, an ELF file with a PVH note.
    pub hypervisor: PathBuf,
}

impl Programs {
    /// The programs named by `VIADUCT_QEMU` and `VIADUCT_HYPERVISOR`, else
    /// QEMU from the search path and the hypervisor from the build directory
    /// that the running executable lies in.
    #[must_use]
    pub fn find() -> Self {
        let named = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        Self {
            qemu: named("VIADUCT_QEMU")
                .map_or_else(|| PathBuf::from("qemu-system-x86_64"), PathBuf::from),
            hypervisor: named("VIADUCT_HYPERVISOR").map_or_else(
                || beside_executable("x86_64-unknown-none/release/hypervisor"),
                PathBuf::from,
            ),
        }
    }

    /// Checks that both are there and QEMU is new enough.
    ///
    /// # Errors
    /// Names the program that is missing or too old.
    pub fn check(&self) -> Result<(), RackError> {
        check_qemu(&self.qemu)?;
        std::fs::File::open(&self.hypervisor)
            .map(drop)
            .map_err(|error| RackError::File {
                what: "hypervisor image",
                path: self.hypervisor.clone(),
                error,
                hint: "build it with scripts/viaduct, or set VIADUCT_HYPERVISOR to its path",
            })
    }
}

/// `path` below the target directory that holds the running executable.
#[must_use]
pub fn beside_executable(path: &str) -> PathBuf {
    let executable = std::env::current_exe().unwrap_or_default();
    // target/PROFILE/viaduct; tests and examples lie one folder deeper.
    let profile = executable
        .ancestors()
        .skip(1)
        .find(|folder| {
            let name = folder.file_name();
            name != Some(OsStr::new("deps")) && name != Some(OsStr::new("examples"))
        })
        .unwrap_or(Path::new("."));
    profile.parent().unwrap_or(Path::new("..")).join(path)
}

fn check_qemu(program: &Path) -> Result<(), RackError> {
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| RackError::QemuMissing {
            program: program.to_owned(),
            error,
        })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let first = text.lines().next().unwrap_or_default();
    let Some((major, minor, version)) = parse_version(first) else {
        return Err(RackError::NotQemu {
            program: program.to_owned(),
            said: first.to_owned(),
        });
    };
    if (major, minor) < LEAST_QEMU {
        return Err(RackError::QemuTooOld {
            program: program.to_owned(),
            found: version.to_owned(),
        });
    }
    Ok(())
}

/// The version in "QEMU emulator version 7.2.22 (Debian …)".
fn parse_version(line: &str) -> Option<(u32, u32, &str)> {
    let rest = line.strip_prefix("QEMU emulator version ")?;
    let version = rest.split_whitespace().next()?;
    let mut parts = version.split('.');
    let major = parts.next()?.parse().ok()?;
    let minor = parts.next()?.parse().ok()?;
    Some((major, minor, version))
}

/// How QEMU executes a node's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The host's own nested SVM.
    Kvm,
    /// Emulation: works everywhere.
    Tcg,
}

impl Accelerator {
    /// The fastest that the host offers; `VIADUCT_ACCEL` overrides.
    ///
    /// # Errors
    /// KVM is demanded where there is no nested SVM.
    pub fn pick() -> Result<Self, RackError> {
        match std::env::var("VIADUCT_ACCEL").as_deref() {
            Err(_) | Ok("") => Ok(match nested_svm() {
                Ok(()) => Self::Kvm,
                Err(_) => Self::Tcg,
            }),
            Ok("tcg") => Ok(Self::Tcg),
            Ok("kvm") => nested_svm()
                .map(|()| Self::Kvm)
                .map_err(RackError::NoNestedSvm),
            Ok(other) => Err(RackError::UnknownAccelerator(other.to_owned())),
        }
    }

    /// The name that operators see.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// Whether KVM on this host lets a guest run guests; the reason if not.
fn nested_svm() -> Result<(), &'static str> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if !has_flag(&cpuinfo, "svm") {
        return Err("the CPU does not offer SVM (AMD-V)");
    }
    let nested = std::fs::read_to_string("/sys/module/kvm_amd/parameters/nested");
    if !matches!(nested.as_deref().map(str::trim), Ok("1" | "Y")) {
        return Err("kvm_amd is not loaded with nested=1");
    }
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map(drop)
        .map_err(|_| "/dev/kvm cannot be opened")
}

fn has_flag(cpuinfo: &str, flag: &str) -> bool {
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_whitespace().any(|word| word == flag))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemu_versions_are_read() {
        let parsed = parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)");
        assert_eq!(parsed, Some((7, 2, "7.2.22")));
        assert_eq!(
            parse_version("QEMU emulator version 10.0.2"),
            Some((10, 0, "10.0.2"))
        );
        assert_eq!(parse_version("bash 5"), None);
        assert_eq!(parse_version(""), None);
    }

    fn fake(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/data")
            .join(name)
    }

    #[test]
    fn an_old_a_strange_and_a_missing_qemu_are_told_apart() {
        let error = check_qemu(&fake("qemu-old")).expect_err("too old");
        assert!(error.to_string().contains("7.2 or newer"), "{error}");
        let error = check_qemu(&fake("qemu-strange")).expect_err("not QEMU");
        assert!(error.to_string().contains("does not look like"), "{error}");
        let error = check_qemu(Path::new("/nonexistent/qemu")).expect_err("missing");
        assert!(error.to_string().contains("install"), "{error}");
        assert!(check_qemu(&fake("qemu-least")).is_ok());
    }

    #[test]
    fn flags_are_whole_words() {
        assert!(has_flag("flags\t: fpu svm vmx\n", "svm"));
        assert!(!has_flag("flags\t: fpu svm_lock\n", "svm"));
        assert!(!has_flag("bugs\t: svm\n", "svm"));
    }
}
