//! A directory of finished images.
//!
//! An entry is built under a temporary name, written to disk, and renamed:
//! under its own name there is a whole one or none. One lock keeps builders
//! apart; whoever holds it clears away what killed builders left.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::{Progress, Stage};
use crate::ImageError;
use crate::error::io_error;

const BUILDING: &str = ".building-";

#[derive(Debug)]
pub(crate) struct Cache {
    directory: PathBuf,
}

/// The place that the environment asks for.
pub(crate) fn default_directory() -> Option<PathBuf> {
    let set = |name| {
        let value = std::env::var_os(name)?;
        (!value.is_empty()).then(|| PathBuf::from(value))
    };
    set("VIADUCT_CACHE")
        .or_else(|| Some(set("XDG_CACHE_HOME")?.join("viaduct")))
        .or_else(|| Some(set("HOME")?.join(".cache/viaduct")))
}

/// A name for what is built from these inputs. Each is hashed with its
/// length, so that two lists with the same bytes differ.
pub(crate) fn key(inputs: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for input in inputs {
        hash.update((input.len() as u64).to_le_bytes());
        hash.update(input);
    }
    let mut name = String::new();
    for byte in &hash.finalize()[..8] {
        name.push_str(&format!("{byte:02x}"));
    }
    name
}

impl Cache {
    pub(crate) fn open(directory: PathBuf) -> Result<Self, ImageError> {
        fs::create_dir_all(&directory).map_err(io_error("can't make the cache", &directory))?;
        // Other programs get the paths, and run in other directories.
        let directory = directory
            .canonicalize()
            .map_err(io_error("can't find", &directory))?;
        Ok(Self { directory })
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The entry of this name. If it is missing, `build` makes it, a file or
    /// a directory, at the path that it is given; the directory beside that
    /// path is for what it needs meanwhile.
    pub(crate) fn entry(
        &self,
        name: &str,
        progress: &Progress,
        build: impl FnOnce(&Path) -> Result<(), ImageError>,
    ) -> Result<PathBuf, ImageError> {
        let path = self.directory.join(name);
        if path.exists() {
            return Ok(path);
        }
        let _lock = self.lock(progress)?;
        if path.exists() {
            return Ok(path);
        }
        self.clear_leftovers();
        let scratch = TempDir::with_prefix_in(BUILDING, &self.directory)
            .map_err(io_error("can't write to the cache", &self.directory))?;
        let unfinished = scratch.path().join("new");
        build(&unfinished)?;
        write_back(&unfinished)?;
        fs::rename(&unfinished, &path).map_err(io_error("can't make", &path))?;
        write_back_one(&self.directory)?;
        Ok(path)
    }

    fn lock(&self, progress: &Progress) -> Result<File, ImageError> {
        let path = self.directory.join("lock");
        let failed = io_error("can't lock", &path);
        let file = match File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
        {
            Ok(file) => file,
            Err(error) => return Err(failed(error)),
        };
        if file.try_lock().is_err() {
            progress(Stage::Waiting, "another process is building images");
            file.lock().map_err(failed)?;
        }
        Ok(file)
    }

    /// Only with the lock held: nobody else builds.
    fn clear_leftovers(&self) {
        for entry in fs::read_dir(&self.directory)
            .into_iter()
            .flatten()
            .flatten()
        {
            if entry.file_name().to_string_lossy().starts_with(BUILDING) {
                // What can't be removed only takes room.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

/// Makes sure that a crash of the machine leaves no half entry behind.
fn write_back(path: &Path) -> Result<(), ImageError> {
    if path.is_dir() {
        let failed = io_error("can't read", path);
        for entry in fs::read_dir(path).map_err(failed)? {
            write_back(&entry.map_err(io_error("can't read", path))?.path())?;
        }
    }
    write_back_one(path)
}

fn write_back_one(path: &Path) -> Result<(), ImageError> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(io_error("can't write back", path))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn quiet(_: Stage, _: &str) {}

    fn cache() -> (TempDir, Cache) {
        let directory = TempDir::new().expect("temporary directory");
        let cache = Cache::open(directory.path().join("a/b")).expect("made");
        (directory, cache)
    }

    #[test]
    fn an_entry_is_built_once() {
        let (_keep, cache) = cache();
        let built = Cell::new(0);
        let build = |path: &Path| {
            built.set(built.get() + 1);
            fs::write(path, "whole").map_err(io_error("can't write", path))
        };
        let first = cache.entry("x", &quiet, build).expect("built");
        let second = cache.entry("x", &quiet, build).expect("found");
        assert_eq!((first, built.get()), (second.clone(), 1));
        assert_eq!(fs::read(second).expect("there"), b"whole");
    }

    #[test]
    fn a_failed_build_leaves_nothing() {
        let (_keep, cache) = cache();
        let result = cache.entry("x", &quiet, |path| {
            fs::write(path, "half").expect("written");
            Err(ImageError::NoDebianSource)
        });
        assert!(matches!(result, Err(ImageError::NoDebianSource)));
        let left: Vec<_> = fs::read_dir(cache.directory())
            .expect("there")
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        assert_eq!(left, ["lock"]);
    }

    #[test]
    fn what_a_killed_builder_left_is_cleared_away_and_not_used() {
        let (_keep, cache) = cache();
        let stale = cache.directory().join(".building-abc");
        fs::create_dir(&stale).expect("made");
        fs::write(stale.join("new"), "half").expect("written");
        let path = cache.entry("x", &quiet, |path| {
            fs::write(path, "whole").map_err(io_error("can't write", path))
        });
        assert_eq!(fs::read(path.expect("built")).expect("there"), b"whole");
        assert!(!stale.exists());
    }

    #[test]
    fn parallel_builders_build_once() {
        let (_keep, cache) = cache();
        let built = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let path = cache.entry("x", &quiet, |path| {
                        built.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        std::thread::sleep(std::time::Duration::from_millis(30));
                        fs::write(path, "whole").map_err(io_error("can't write", path))
                    });
                    assert_eq!(fs::read(path.expect("built")).expect("there"), b"whole");
                });
            }
        });
        assert_eq!(built.into_inner(), 1);
    }

    #[test]
    fn keys_tell_inputs_apart() {
        assert_eq!(key(&[b"ab", b"c"]), key(&[b"ab", b"c"]));
        assert_ne!(key(&[b"ab", b"c"]), key(&[b"a", b"bc"]));
    }
}
