//! The images that a guest boots from, built once and cached.
//!
//! An image that is in the cache is used as it is: the network is touched
//! only to build one that is missing. To get newer packages, delete it.

mod apt;
mod cache;
mod initramfs;
mod kernel;
mod program;
mod root;

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use crate::ImageError;
use cache::Cache;

pub use root::region_len;

/// What is being done, for a progress display.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Another process builds images.
    Waiting,
    /// The kernel is fetched and unpacked.
    Kernel,
    /// The initial RAM file system is put together.
    Initramfs,
    /// Debian is installed into a root.
    DebianRoot,
}

/// Where the guest's userland is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Root {
    /// Busybox, in the initial RAM file system.
    Busybox,
    /// On persistent memory: Debian, or the user's own image.
    Pmem,
}

/// Where the guest's kernel comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KernelSource {
    /// Debian's cloud kernel.
    Debian,
    /// The user's own bzImage, with its drivers built in: `kernel.config`
    /// beside this crate lists them.
    File(PathBuf),
}

type Progress = dyn Fn(Stage, &str) + Send + Sync;

/// The cache of images.
pub struct Images {
    cache: Cache,
    progress: Box<Progress>,
}

impl fmt::Debug for Images {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Images")
            .field("cache", &self.cache)
            .finish_non_exhaustive()
    }
}

impl Images {
    /// The images in the directory `cache`, or in `$VIADUCT_CACHE`,
    /// `$XDG_CACHE_HOME/viaduct`, `~/.cache/viaduct`: the first that is set.
    /// `progress` is told what is being done when something must be built.
    ///
    /// # Errors
    /// If the directory can't be made.
    pub fn open(
        cache: Option<&Path>,
        progress: impl Fn(Stage, &str) + Send + Sync + 'static,
    ) -> Result<Self, ImageError> {
        let cache = match cache {
            Some(directory) => directory.to_path_buf(),
            None => cache::default_directory().ok_or(ImageError::NoCache)?,
        };
        Ok(Self {
            cache: Cache::open(cache)?,
            progress: Box::new(progress),
        })
    }

    /// Where the images are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.cache.directory()
    }

    /// A kernel that can be booted: a checked bzImage.
    ///
    /// # Errors
    /// If it can't be fetched, or is not one.
    pub fn kernel(&self, source: &KernelSource) -> Result<PathBuf, ImageError> {
        let path = match source {
            KernelSource::Debian => self.debian_kernel()?.image(),
            KernelSource::File(path) => path.clone(),
        };
        kernel::check_bzimage(&path)?;
        Ok(path)
    }

    /// The initial RAM file system with the static program `agent` as its
    /// init.
    ///
    /// # Errors
    /// If it can't be built.
    pub fn initramfs(
        &self,
        agent: &Path,
        root: Root,
        kernel: &KernelSource,
    ) -> Result<PathBuf, ImageError> {
        let kernel = match kernel {
            KernelSource::Debian => Some(self.debian_kernel()?),
            KernelSource::File(_) => None,
        };
        let busybox = match root {
            Root::Busybox => Some(initramfs::busybox(&self.cache, &*self.progress)?),
            Root::Pmem => None,
        };
        let recipe = initramfs::Recipe {
            agent,
            kernel: kernel.as_ref(),
            busybox: busybox.as_deref(),
        };
        initramfs::initramfs(&self.cache, &recipe, &*self.progress)
    }

    /// Debian's static busybox.
    ///
    /// # Errors
    /// If it can't be had from the distribution.
    pub fn busybox(&self) -> Result<PathBuf, ImageError> {
        let folder = initramfs::busybox(&self.cache, &*self.progress)?;
        Ok(folder.join("busybox"))
    }

    /// The Debian root as a region file: a header, then ext4. Its length is a
    /// power of two; most of what is unused is a hole.
    ///
    /// # Errors
    /// If it can't be built.
    pub fn debian_root(&self) -> Result<PathBuf, ImageError> {
        root::debian_root(&self.cache, &*self.progress)
    }

    /// Writes the user's raw ext4 image `root` as a region file into the
    /// empty file `region`, and returns that file's length.
    ///
    /// # Errors
    /// If `root` is no ext4 file system, or on I/O errors.
    pub fn root_region(root: &Path, region: &File) -> Result<u64, ImageError> {
        root::write_root_region(root, region)
    }

    fn debian_kernel(&self) -> Result<kernel::DebianKernel, ImageError> {
        kernel::debian_kernel(&self.cache, &*self.progress)
    }
}
