//! What can go wrong while images are built or found.

use std::io;
use std::path::{Path, PathBuf};

/// Why an image is not to be had, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A program that the host needs is missing.
    #[error("{program} is missing: install the Debian package {package}")]
    MissingProgram {
        /// What was to be run.
        program: &'static str,
        /// The package that has it.
        package: &'static str,
    },
    /// A program failed.
    #[error("{program} failed ({status}): {last_words}")]
    ProgramFailed {
        /// What was run.
        program: &'static str,
        /// How it ended.
        status: String,
        /// The end of what it printed.
        last_words: String,
    },
    /// apt knows no source of Debian packages.
    #[error(
        "the host's apt has no Debian source: add one to /etc/apt/sources.list and run `apt-get \
         update`"
    )]
    NoDebianSource,
    /// A package that apt does not have.
    #[error("apt has no package {0}: run `apt-get update`, then try again")]
    NoPackage(String),
    /// A package without the file that it was taken for.
    #[error("the package {package} has no {file}: this Debian release is not supported")]
    NotInPackage {
        /// The package's name.
        package: String,
        /// What was looked for.
        file: String,
    },
    /// A kernel module that can't be read.
    #[error("the kernel module {path} is damaged: {problem}", path = .path.display())]
    BadModule {
        /// The module's file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A kernel file that can't be booted.
    #[error("{path} is no kernel that can be booted: {problem}", path = .path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: KernelProblem,
    },
    /// A root file system that can't be used.
    #[error(
        "{path} is no root file system: give a raw ext4 image with 4 KiB blocks (mke2fs -t ext4 \
         -b 4096), not {found}", path = .path.display()
    )]
    Root {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        found: &'static str,
    },
    /// The home directory is unknown.
    #[error("no cache directory: set VIADUCT_CACHE to one, or HOME")]
    NoCache,
    /// The operating system refused.
    #[error("{what} {path}: {source}", path = .path.display())]
    Io {
        /// What was tried, as in "can't read".
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
}

/// What is wrong with a kernel file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KernelProblem {
    /// Too short, or without the boot sector's signature.
    #[error("it is no bzImage; use the distribution's vmlinuz or arch/x86/boot/bzImage")]
    NotABzImage,
    /// A boot protocol before 2.12.
    #[error("its boot protocol {}.{:02} is older than 2.12; use Linux 3.8 or later", .0 >> 8, .0 & 0xff)]
    TooOld(u16),
    /// Not built for 64 bits.
    #[error("it has no 64-bit entry; use a kernel built for x86_64")]
    NotX86_64,
    /// Shorter than its header says.
    #[error("it is cut off: {present} bytes of {promised}")]
    Truncated {
        /// Bytes in the file.
        present: u64,
        /// Bytes that the header promises.
        promised: u64,
    },
    /// It can't be loaded anywhere but at its own address.
    #[error("it is not relocatable; build it with CONFIG_RELOCATABLE=y")]
    NotRelocatable,
}

/// Turns an I/O error into "what path: reason".
pub(crate) fn io_error(what: &'static str, path: &Path) -> impl Fn(io::Error) -> ImageError {
    let path = path.to_path_buf();
    move |source| ImageError::Io {
        what,
        path: path.clone(),
        source,
    }
}
