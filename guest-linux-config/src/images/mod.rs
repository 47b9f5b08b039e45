//! The images that a guest boots from, built once and cached.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::ImageError;

/// What is being done, for a progress display.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Another process builds the same image.
    Waiting,
    /// The kernel is fetched and unpacked.
    Kernel,
    /// The initial RAM file system is put together.
    Initramfs,
    /// Debian is installed into a root.
    DebianRoot,
}

/// The userland that the guest comes up with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Root {
    /// Busybox, in the initial RAM file system.
    Busybox,
    /// Debian, or the user's own image, on persistent memory.
    Pmem,
}

/// Where the guest's kernel comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KernelSource {
    /// Debian's cloud kernel.
    Debian,
    /// The user's own bzImage; its modules must be built in.
    File(PathBuf),
}

/// The cache of images.
#[derive(Debug)]
pub struct Images {
    cache: PathBuf,
}

impl Images {
    /// The images in `cache`, or in the default place.
    ///
    /// # Errors
    /// If the directory can't be made.
    pub fn open(
        cache: Option<&Path>,
        _progress: impl Fn(Stage, &str) + Send + Sync + 'static,
    ) -> Result<Self, ImageError> {
        let cache = cache.ok_or(ImageError::NoCache)?.to_path_buf();
        Ok(Self { cache })
    }

    /// A kernel that can be booted: a checked bzImage.
    ///
    /// # Errors
    /// If it can't be fetched, or is not one.
    pub fn kernel(&self, _source: &KernelSource) -> Result<PathBuf, ImageError> {
        Ok(self.cache.clone())
    }

    /// The initial RAM file system with `agent` as its init.
    ///
    /// # Errors
    /// If it can't be built.
    pub fn initramfs(
        &self,
        _agent: &Path,
        _root: Root,
        _kernel: &KernelSource,
    ) -> Result<PathBuf, ImageError> {
        Ok(self.cache.clone())
    }

    /// The Debian root as a region file: header, then ext4; its length is a
    /// power of two.
    ///
    /// # Errors
    /// If it can't be built.
    pub fn debian_root(&self) -> Result<PathBuf, ImageError> {
        Ok(self.cache.clone())
    }

    /// Writes a region file with the raw ext4 image `root` into `region`.
    ///
    /// # Errors
    /// If `root` is no ext4 file system, or on I/O errors.
    pub fn root_region(_root: &Path, _region: &File) -> Result<u64, ImageError> {
        Ok(0)
    }
}
