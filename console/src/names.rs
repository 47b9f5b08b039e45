//! Names of racks, and the runtime directory in which a named rack is found.
//!
//! ```text
//! $XDG_RUNTIME_DIR/viaduct/NAME/   (or /tmp/viaduct-UID/NAME/), mode 0700
//!     lock   locked by the process that holds the rack; its pid is inside
//!     sock   where that process takes requests
//!     log    its log, and its nodes'
//! ```
//!
//! The lock tells whether a directory is in use. It goes with its holder,
//! however that ends, so a directory without one is stale and is cleared away.

use std::fmt;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

/// The name of a rack: safe in paths and in process titles.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RackName(String);

impl FromStr for RackName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if text.is_empty() || text.len() > 32 || text.starts_with('.') || !text.chars().all(legal) {
            return Err("use 1 to 32 letters, digits, '-', '_' or '.', not '.' first".into());
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for RackName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The folder of all runtime directories, made if it is not there.
fn base() -> Result<PathBuf> {
    let uid = rustix::process::getuid().as_raw();
    let base = match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(folder) if Path::new(&folder).is_dir() => Path::new(&folder).join("viaduct"),
        _ => PathBuf::from(format!("/tmp/viaduct-{uid}")),
    };
    make_private(&base)?;
    Ok(base)
}

/// Makes a folder that only this user can enter; refuses one that is not so.
fn make_private(folder: &Path) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(folder) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => {
            return Err(error)
                .with_context(|| format!("cannot make {}; set XDG_RUNTIME_DIR", folder.display()));
        }
    }
    let found = folder
        .symlink_metadata()
        .with_context(|| format!("cannot look at {}", folder.display()))?;
    let uid = rustix::process::getuid().as_raw();
    if !found.is_dir() || found.uid() != uid || found.mode() & 0o077 != 0 {
        bail!(
            "{} is not a private folder of yours; remove it or set XDG_RUNTIME_DIR",
            folder.display()
        );
    }
    Ok(())
}

/// Where a rack of this name is found, whether it is up or not.
#[derive(Clone, Debug)]
pub(crate) struct RuntimeDir {
    path: PathBuf,
}

/// The runtime directory of a rack that this process holds. Dropping it
/// removes it.
#[derive(Debug)]
pub(crate) struct HeldDir {
    dir: RuntimeDir,
    lock: File,
}

impl RuntimeDir {
    pub(crate) fn of(name: &RackName) -> Result<Self> {
        Ok(Self {
            path: base()?.join(&name.0),
        })
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path.join("sock")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    fn lock_path(&self) -> PathBuf {
        self.path.join("lock")
    }

    /// The process that holds the rack, or `None` if no rack is up. A stale
    /// directory is cleared away.
    pub(crate) fn holder(&self) -> Result<Option<i32>> {
        let mut lock = match File::open(self.lock_path()) {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // Half-made or half-removed: without a lock it means nothing.
                return Ok(None);
            }
            Err(error) => return Err(error).context("cannot look for a running rack"),
        };
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                drop(HeldDir {
                    dir: self.clone(),
                    lock,
                });
                Ok(None)
            }
            Err(_) => {
                let mut pid = String::new();
                lock.read_to_string(&mut pid)
                    .context("cannot read the rack's lock")?;
                Ok(Some(pid.trim().parse().unwrap_or(0)))
            }
        }
    }

    /// Takes the name for this process, or returns `None` if it is taken.
    pub(crate) fn hold(self) -> Result<Option<HeldDir>> {
        loop {
            make_private(&self.path)?;
            let opened = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(self.lock_path());
            let mut lock = match opened {
                Ok(lock) => lock,
                // Another process has just removed a stale directory.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error).context("cannot make the rack's lock"),
            };
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
                return Ok(None);
            }
            // The lock counts only if it is still the one in the directory.
            let here = lock.metadata().context("cannot look at the rack's lock")?;
            match self.lock_path().metadata() {
                Ok(there) if (there.dev(), there.ino()) == (here.dev(), here.ino()) => {}
                _ => continue,
            }
            for leftover in [self.socket(), self.log()] {
                remove(&leftover);
            }
            lock.set_len(0)
                .and_then(|()| writeln!(lock, "{}", std::process::id()))
                .context("cannot write the rack's lock")?;
            return Ok(Some(HeldDir { dir: self, lock }));
        }
    }
}

impl HeldDir {
    pub(crate) fn dir(&self) -> &RuntimeDir {
        &self.dir
    }

    /// Removes the directory's contents and the directory. Also done on drop.
    pub(crate) fn clear(&self) {
        let dir = &self.dir;
        // The lock goes last, while it is still held: whoever opens it now
        // finds out that it is no longer in the directory.
        for path in [dir.socket(), dir.log(), dir.lock_path()] {
            remove(&path);
        }
        drop(std::fs::remove_dir(&dir.path));
        let _ = flock(&self.lock, FlockOperation::Unlock);
    }
}

impl Drop for HeldDir {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Removes a file that may not be there. A failure shows when the name is
/// used next.
fn remove(path: &Path) {
    drop(std::fs::remove_file(path));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_harmless_names_are_taken() {
        for name in ["default", "a", "web-1_x.y"] {
            assert!(name.parse::<RackName>().is_ok(), "{name}");
        }
        let long = "x".repeat(33);
        for name in ["", ".", "..", "a/b", "a b", "ä", &long, "a,b"] {
            assert!(name.parse::<RackName>().is_err(), "{name}");
        }
    }

    fn dir(base: &tempfile::TempDir) -> RuntimeDir {
        RuntimeDir {
            path: base.path().join("name"),
        }
    }

    #[test]
    fn a_name_is_held_by_one_and_free_again_afterwards() {
        let base = tempfile::tempdir().expect("a folder");
        let held = dir(&base).hold().expect("possible").expect("free");
        assert!(dir(&base).hold().expect("possible").is_none());
        let pid = i32::try_from(std::process::id()).expect("small");
        assert_eq!(dir(&base).holder().expect("possible"), Some(pid));
        drop(held);
        assert!(!dir(&base).path.exists());
        assert_eq!(dir(&base).holder().expect("possible"), None);
        assert!(dir(&base).hold().expect("possible").is_some());
    }

    #[test]
    fn what_a_dead_holder_left_is_cleared_away() {
        let base = tempfile::tempdir().expect("a folder");
        let path = dir(&base).path;
        make_private(&path).expect("possible");
        for file in ["lock", "sock", "log"] {
            std::fs::write(path.join(file), "12345").expect("writable");
        }
        assert_eq!(dir(&base).holder().expect("possible"), None);
        assert!(!path.exists());
    }

    #[test]
    fn a_folder_open_to_others_is_refused() {
        let base = tempfile::tempdir().expect("a folder");
        let path = dir(&base).path;
        DirBuilder::new().mode(0o755).create(&path).expect("made");
        assert!(make_private(&path).is_err());
        let link = base.path().join("link");
        std::os::unix::fs::symlink(base.path(), &link).expect("made");
        assert!(make_private(&link).is_err());
    }
}
