//! Runs the host's programs.

use std::io;
use std::process::{Command, Stdio};

use crate::ImageError;

/// How much of a failed program's last words to repeat.
const LAST_WORDS: usize = 400;

/// A program of the host and the package that has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Program {
    pub(crate) name: &'static str,
    pub(crate) package: &'static str,
}

pub(crate) const APT_GET: Program = program("apt-get", "apt");
pub(crate) const APT_CACHE: Program = program("apt-cache", "apt");
pub(crate) const DPKG_DEB: Program = program("dpkg-deb", "dpkg");
pub(crate) const FAKECHROOT: Program = program("fakechroot", "fakechroot");
pub(crate) const FAKEROOT: Program = program("fakeroot", "fakeroot");
pub(crate) const MMDEBSTRAP: Program = program("mmdebstrap", "mmdebstrap");
pub(crate) const NEWUIDMAP: Program = program("newuidmap", "uidmap");
pub(crate) const SH: Program = program("sh", "dash");
pub(crate) const XZ: Program = program("xz", "xz-utils");
pub(crate) const ZSTD: Program = program("zstd", "zstd");

pub(crate) const fn program(name: &'static str, package: &'static str) -> Program {
    Program { name, package }
}

impl Program {
    /// A command that speaks English and finds what only administrators
    /// usually have in their path.
    pub(crate) fn command(self) -> Command {
        let mut path = std::env::var_os("PATH").unwrap_or_default();
        path.push(":/usr/local/sbin:/usr/sbin:/sbin");
        let mut command = Command::new(self.name);
        command
            .env("LC_ALL", "C.UTF-8")
            .env("PATH", path)
            .stdin(Stdio::null());
        command
    }

    /// Runs it and returns what it printed.
    pub(crate) fn output(self, command: &mut Command) -> Result<Vec<u8>, ImageError> {
        let output = command
            .output()
            .map_err(|error| self.cannot_start(&error))?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        Err(ImageError::ProgramFailed {
            program: self.name,
            status: output.status.to_string(),
            last_words: last_words(&output.stderr),
        })
    }

    pub(crate) fn cannot_start(self, error: &io::Error) -> ImageError {
        if error.kind() == io::ErrorKind::NotFound {
            return ImageError::MissingProgram {
                program: self.name,
                package: self.package,
            };
        }
        ImageError::ProgramFailed {
            program: self.name,
            status: "it can't be started".into(),
            last_words: error.to_string(),
        }
    }

    /// Whether it is there at all.
    pub(crate) fn check(self) -> Result<(), ImageError> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let usual = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(Into::into);
        let found = std::env::split_paths(&path)
            .chain(usual)
            .any(|directory| directory.join(self.name).is_file());
        if found {
            return Ok(());
        }
        Err(ImageError::MissingProgram {
            program: self.name,
            package: self.package,
        })
    }
}

/// The end of what a program printed, on one line.
pub(crate) fn last_words(printed: &[u8]) -> String {
    let text = String::from_utf8_lossy(printed);
    let lines: Vec<_> = text.split('\n').map(str::trim).collect();
    let mut words = String::new();
    for line in lines.into_iter().rev().filter(|line| !line.is_empty()) {
        if !words.is_empty() && words.len() + line.len() > LAST_WORDS {
            break;
        }
        words = if words.is_empty() {
            line.to_owned()
        } else {
            format!("{line}; {words}")
        };
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_named_with_its_package() {
        let missing = program("no-such-program", "its-package");
        let error = missing.output(&mut missing.command()).expect_err("missing");
        let text = error.to_string();
        assert!(
            text.contains("no-such-program") && text.contains("its-package"),
            "{text}"
        );
        assert_eq!(missing.check().expect_err("missing").to_string(), text);
        SH.check().expect("every host has one");
    }

    #[test]
    fn a_failure_is_told_in_one_line() {
        let error = SH
            .output(
                SH.command()
                    .args(["-c", "echo a; echo b >&2; echo c >&2; exit 3"]),
            )
            .expect_err("it fails");
        assert_eq!(error.to_string(), "sh failed (exit status: 3): b; c");
    }

    #[test]
    fn last_words_are_few() {
        let long = format!("first\n{}\nlast\n", "x".repeat(1000));
        assert_eq!(last_words(long.as_bytes()), "last");
    }
}
