//! What the guests boot.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use guest_linux_config::command_line::command_line;
use guest_linux_config::{Images, KernelSource, Root};
use tempfile::TempDir;

use crate::outer;
use crate::suite::Suite;
use crate::system::Guest;
use crate::tsc;

/// A program that runs without a kernel.
#[derive(Debug)]
pub(crate) struct BareImage {
    pub file: PathBuf,
    pub arguments: String,
    /// Rate of the clock in whose ticks it measures.
    pub tsc_khz: u64,
}

/// The files of the measured guest and of the guest around it.
#[derive(Debug)]
pub(crate) struct BenchImages {
    /// What measures, as a program of its own.
    pub program: PathBuf,
    /// What it runs.
    pub busybox: PathBuf,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    pub command_line: String,
    /// What is measured instead of Linux, if anything.
    pub bare: Option<BareImage>,
    /// The initial RAM file system of the outer guest, if one was asked for.
    pub outer: Option<PathBuf>,
    /// Holds the outer guest's file.
    scratch: TempDir,
}

impl BenchImages {
    /// Builds what is missing; the outer guest's file only for `with_outer`.
    pub(crate) fn build(
        suite: Suite,
        guest: &Guest,
        bare: Option<PathBuf>,
        with_outer: bool,
    ) -> Result<Self> {
        let images = Images::open(None, |_, text| eprintln!("bench: {text}"))?;
        let source = KernelSource::Debian;
        let program = |name: &str| {
            rack::beside_executable(&format!("x86_64-unknown-linux-musl/release/{name}"))
        };
        // Static programs, each in the place of the agent.
        let initramfs = |name: &str| {
            images
                .initramfs(&program(name), Root::Busybox, &source)
                .context("cannot build the guest's files; start with scripts/bench")
        };
        let tsc_khz = tsc::khz();
        let metrics: Vec<_> = suite.metrics().iter().map(|metric| metric.name).collect();
        let mut built = Self {
            program: program("viaduct-bench-guest"),
            busybox: images.busybox()?,
            kernel: images.kernel(&source)?,
            initramfs: initramfs("viaduct-bench-guest")?,
            // What the kernel doesn't know becomes a variable of init's.
            command_line: command_line(
                Root::Busybox,
                &format!("tsc_early_khz={tsc_khz} suite={}", suite.name()),
            ),
            bare: bare.map(|file| BareImage {
                file,
                arguments: metrics.join(" "),
                tsc_khz,
            }),
            outer: None,
            scratch: tempfile::tempdir().context("cannot make a temporary folder")?,
        };
        if with_outer {
            let base = initramfs("viaduct-bench-outer")?;
            let file = built.scratch.path().join("outer.cpio");
            outer::build(&file, &base, &built, guest, images.directory())
                .context("cannot build the guest that runs KVM")?;
            built.outer = Some(file);
        }
        Ok(built)
    }
}

/// A path as it is written into a command line.
pub(crate) fn utf8(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))
}
