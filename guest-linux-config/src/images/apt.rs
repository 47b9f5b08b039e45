//! Debian's packages, by way of the host's own apt.
//!
//! Which server to use, through which proxy and with which keys is the
//! host's configuration; only its entries for Debian are used. First with
//! the package lists that the host has; if they are missing or too old, with
//! lists fetched into a directory of our own, which needs no privilege.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::program::{APT_CACHE, APT_GET, Program};
use crate::ImageError;
use crate::error::io_error;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Debian as the host's apt sees it.
#[derive(Debug)]
pub(crate) struct Apt {
    options: Vec<OsString>,
    scratch: PathBuf,
    sources: PathBuf,
    /// The release's name, as in "bookworm".
    suite: String,
}

impl Apt {
    /// Works with Debian's sources; falls back to lists of our own when
    /// `work` fails with the host's.
    pub(crate) fn with<T>(
        scratch: &Path,
        work: impl Fn(&Self) -> Result<T, ImageError>,
    ) -> Result<T, ImageError> {
        let scratch = scratch.join("apt");
        fs::create_dir_all(&scratch).map_err(io_error("can't make", &scratch))?;
        let with_host_lists = Self::new(scratch.clone(), Vec::new()).and_then(|apt| work(&apt));
        if with_host_lists.is_ok() {
            return with_host_lists;
        }
        let mut options = Vec::new();
        for (name, directory) in [("Dir::State::Lists", "lists"), ("Dir::Cache", "cache")] {
            let path = scratch.join(directory);
            fs::create_dir_all(path.join("partial")).map_err(io_error("can't make", &path))?;
            let mut option = OsString::from(format!("{name}="));
            option.push(path);
            options.extend(["-o".into(), option]);
        }
        // A source of another vendor that does not answer is no matter.
        let mut update = APT_GET.command();
        update.args(&options).args(["-q", "update"]);
        APT_GET.output(&mut update)?;
        work(&Self::new(scratch, options)?)
    }

    fn new(scratch: PathBuf, options: Vec<OsString>) -> Result<Self, ImageError> {
        let format = "$(ORIGIN)\t$(REPO_URI)\t$(RELEASE)\t$(COMPONENT)";
        let mut command = APT_GET.command();
        command
            .args(&options)
            .args(["indextargets", "--format", format])
            .args(["Created-By: Packages", "Architecture: amd64"]);
        let targets = APT_GET.output(&mut command)?;
        let (lines, suite) = debian_sources(
            &String::from_utf8_lossy(&targets),
            Path::new(KEYRING).exists(),
        )
        .ok_or(ImageError::NoDebianSource)?;
        let sources = scratch.join("debian.list");
        fs::write(&sources, lines).map_err(io_error("can't write", &sources))?;
        Ok(Self {
            options,
            scratch,
            sources,
            suite,
        })
    }

    /// A file of one-line source entries.
    pub(crate) fn sources(&self) -> &Path {
        &self.sources
    }

    /// The release's name.
    pub(crate) fn suite(&self) -> &str {
        &self.suite
    }

    fn command(&self, program: Program) -> Command {
        let mut list = OsString::from("Dir::Etc::SourceList=");
        list.push(&self.sources);
        let mut command = program.command();
        command
            .args(&self.options)
            .arg("-o")
            .arg(list)
            .args(["-o", "Dir::Etc::SourceParts=/dev/null"]);
        command
    }

    /// The package that a meta package stands for: the first dependency
    /// whose name begins with `prefix`.
    pub(crate) fn resolve(&self, meta: &str, prefix: &str) -> Result<String, ImageError> {
        let output = APT_CACHE
            .output(self.command(APT_CACHE).args(["depends", meta]))
            .map_err(|error| no_package(error, meta))?;
        let text = String::from_utf8_lossy(&output);
        text.lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with(prefix))
            .map(str::to_owned)
            .ok_or_else(|| ImageError::NoPackage(meta.into()))
    }

    /// Fetches a package and returns the file.
    pub(crate) fn download(&self, package: &str) -> Result<PathBuf, ImageError> {
        let directory = self.scratch.join(package);
        // What an earlier try left may be a package half fetched.
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir(&directory).map_err(io_error("can't make", &directory))?;
        let mut command = self.command(APT_GET);
        command
            .current_dir(&directory)
            .args(["-q", "download"])
            .arg(format!("{package}:amd64"));
        APT_GET
            .output(&mut command)
            .map_err(|error| no_package(error, package))?;
        fs::read_dir(&directory)
            .map_err(io_error("can't read", &directory))?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|end| end == "deb"))
            .ok_or_else(|| ImageError::NoPackage(package.into()))
    }
}

fn no_package(error: ImageError, package: &str) -> ImageError {
    match error {
        ImageError::ProgramFailed { last_words, .. }
            if last_words.contains("Unable to locate") || last_words.contains("No packages") =>
        {
            ImageError::NoPackage(package.into())
        }
        other => other,
    }
}

/// Source entries for the Debian lines of apt's index targets, and the name
/// of the release.
fn debian_sources(targets: &str, keyring: bool) -> Option<(String, String)> {
    let mut lines = Vec::new();
    let mut suite = None;
    for target in targets.lines() {
        let [origin, uri, release, component] = *target.split('\t').collect::<Vec<_>>() else {
            continue;
        };
        if origin != "Debian" {
            continue;
        }
        let option = if keyring {
            format!("[signed-by={KEYRING}] ")
        } else {
            String::new()
        };
        let line = format!("deb {option}{uri} {release} {component}\n");
        if !lines.contains(&line) {
            lines.push(line);
        }
        // The others are called "bookworm-updates", "bookworm-security", …
        if component == "main" && !release.contains('-') {
            suite.get_or_insert_with(|| release.to_owned());
        }
    }
    Some((lines.concat(), suite?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_debian_sources_are_used() {
        let targets = "Debian\tmirror:a/\tbookworm-updates\tmain\n\
                       Vendor\tmirror:v/\tnodistro\tmain\n\
                       Debian\tmirror:a/\tbookworm\tmain\n\
                       Debian\tmirror:a/\tbookworm\tmain\n\
                       Debian\tmirror:a/\tbookworm\tcontrib\n\n";
        let (lines, suite) = debian_sources(targets, false).expect("there are some");
        assert_eq!(
            lines,
            "deb mirror:a/ bookworm-updates main\n\
             deb mirror:a/ bookworm main\n\
             deb mirror:a/ bookworm contrib\n"
        );
        assert_eq!(suite, "bookworm");
        let (lines, _) = debian_sources(targets, true).expect("there are some");
        assert!(lines.starts_with("deb [signed-by=/usr/share/keyrings/"));
    }

    #[test]
    fn a_host_without_debian_sources_is_told_apart() {
        assert_eq!(debian_sources("", true), None);
        assert_eq!(debian_sources("Ubuntu\tu/\tnoble\tmain\n", true), None);
        // apt prints no origin before it has fetched the lists.
        assert_eq!(debian_sources("\tu/\tbookworm\tmain\n", true), None);
    }
}
