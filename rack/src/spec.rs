//! What rack and what VM the operator asks for, and whether they fit.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use vmm_shared::addr::{LARGE_PAGE_SIZE, MAX_VCPUS};

use crate::error::RackError;
use crate::size::Size;

/// The least memory that a guest boots in.
const LEAST_MEMORY: Size = Size::mib(128);
/// The most cores of one node: xAPIC ids must address them all.
const MOST_CORES: u32 = 64;

/// The hosts of a rack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RackSpec {
    /// Nodes in the rack.
    pub nodes: u32,
    /// Cores of each node.
    pub cores: u32,
    /// Memory that each node gives; `None` gives what the VM asks for.
    pub node_memory: Option<Size>,
}

impl Default for RackSpec {
    fn default() -> Self {
        Self {
            nodes: 1,
            cores: 2,
            node_memory: None,
        }
    }
}

/// A virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// Its vCPUs.
    pub vcpus: u32,
    /// Its memory.
    pub memory: Size,
}

/// What runs in the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Guest {
    /// The distribution's stock Linux kernel.
    Linux,
    /// Our own paravirtual kernel.
    Pv,
    /// A kernel image of the operator's.
    Image(PathBuf),
}

impl FromStr for Guest {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "linux" => Self::Linux,
            "pv" => Self::Pv,
            path => Self::Image(path.into()),
        })
    }
}

/// The root file system of the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootFs {
    /// A busybox in the initial RAM file system.
    Busybox,
    /// A stock Debian.
    Debian,
    /// An ext4 image of the operator's.
    Path(PathBuf),
}

impl FromStr for RootFs {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "busybox" => Self::Busybox,
            "debian" => Self::Debian,
            path => Self::Path(path.into()),
        })
    }
}

impl RackSpec {
    /// Memory that all nodes give together for a VM of `vm`'s size.
    #[must_use]
    pub fn memory(&self, vm: &VmSpec) -> Size {
        match self.node_memory {
            Some(Size(each)) => Size(each.saturating_mul(u64::from(self.nodes))),
            None => vm.memory,
        }
    }

    /// Checks that the rack can exist and that `vm` fits into it.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self, vm: &VmSpec) -> Result<(), RackError> {
        if self.nodes == 0 || self.cores == 0 {
            return Err(RackError::EmptyRack);
        }
        if self.nodes > 1 {
            return Err(RackError::ManyNodes(self.nodes));
        }
        if self.cores > MOST_CORES {
            return Err(RackError::TooManyCores {
                asked: self.cores,
                most: MOST_CORES,
            });
        }
        let cores = self.nodes * self.cores;
        if vm.vcpus == 0 {
            return Err(RackError::NoVcpus);
        }
        if vm.vcpus > cores || vm.vcpus as usize > MAX_VCPUS {
            return Err(RackError::TooManyVcpus {
                vcpus: vm.vcpus,
                cores,
            });
        }
        if let Some(memory) = self.node_memory {
            check_alignment(memory)?;
        }
        if vm.memory < LEAST_MEMORY {
            return Err(RackError::MemoryTooSmall {
                memory: vm.memory,
                least: LEAST_MEMORY,
            });
        }
        check_alignment(vm.memory)?;
        let total = self.memory(vm);
        if vm.memory > total {
            return Err(RackError::MemoryTooLarge {
                memory: vm.memory,
                total,
            });
        }
        Ok(())
    }
}

fn check_alignment(memory: Size) -> Result<(), RackError> {
    if memory.0.is_multiple_of(LARGE_PAGE_SIZE) {
        return Ok(());
    }
    let below = Size(memory.0 / LARGE_PAGE_SIZE * LARGE_PAGE_SIZE);
    Err(RackError::MemoryNotAligned {
        memory,
        below: below.max(LEAST_MEMORY),
        above: Size(below.0.saturating_add(LARGE_PAGE_SIZE)),
    })
}

/// A rack written down in a file, one table per node:
///
/// ```toml
/// [[node]]
/// cores = 4
/// memory = "2G"
/// ```
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct RackFile {
    /// The nodes.
    pub node: Vec<RackFileNode>,
}

/// One node of a [`RackFile`].
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct RackFileNode {
    /// Its cores.
    pub cores: u32,
    /// Memory that it gives.
    pub memory: Option<Size>,
}

impl RackFile {
    /// Reads the rack described in `path`.
    ///
    /// # Errors
    /// The file is not there, is no TOML, or describes no rack that this
    /// version can build.
    pub fn read(path: &Path) -> Result<RackSpec, RackError> {
        let text = std::fs::read_to_string(path).map_err(|error| RackError::File {
            what: "rack description",
            path: path.to_owned(),
            error,
            hint: "give a readable TOML file to --rack",
        })?;
        let file: Self = toml::from_str(&text).map_err(|error| RackError::RackFile {
            path: path.to_owned(),
            reason: one_line(error.message(), error.span(), &text),
        })?;
        match file.node.as_slice() {
            [] => Err(RackError::EmptyRack),
            [node] => Ok(RackSpec {
                nodes: 1,
                cores: node.cores,
                node_memory: node.memory,
            }),
            nodes => Err(RackError::ManyNodes(
                u32::try_from(nodes.len()).unwrap_or(u32::MAX),
            )),
        }
    }
}

fn one_line(message: &str, span: Option<std::ops::Range<usize>>, text: &str) -> String {
    let line = span
        .and_then(|span| text.get(..span.start))
        .map_or(1, |before| before.matches('\n').count() + 1);
    let message = message.replace('\n', " ");
    format!("line {line}: {message}; write one [[node]] table with cores and memory per node")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(vcpus: u32, memory: Size) -> VmSpec {
        VmSpec { vcpus, memory }
    }

    fn refusal(rack: &RackSpec, vm: &VmSpec) -> String {
        rack.check(vm).expect_err("must be refused").to_string()
    }

    #[test]
    fn the_default_rack_takes_a_usual_vm() {
        let rack = RackSpec::default();
        assert!(rack.check(&vm(2, Size::mib(1024))).is_ok());
        assert!(rack.check(&vm(1, LEAST_MEMORY)).is_ok());
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_nearest_legal_value() {
        let rack = RackSpec::default();
        let usual = Size::mib(1024);
        assert!(refusal(&rack, &vm(3, usual)).contains("--vcpus 2 or fewer"));
        assert!(refusal(&rack, &vm(0, usual)).contains("--vcpus 1"));
        assert!(refusal(&rack, &vm(1, Size::mib(64))).contains("--memory 128M"));
        assert!(refusal(&rack, &vm(1, Size::mib(1023))).contains("--memory 1022M or 1G"));
        let small = RackSpec {
            node_memory: Some(Size::mib(512)),
            ..RackSpec::default()
        };
        assert!(refusal(&small, &vm(1, usual)).contains("--memory 512M or less"));
        let wide = RackSpec { nodes: 3, ..rack };
        assert!(refusal(&wide, &vm(1, usual)).contains("--nodes 1"));
    }

    #[test]
    fn every_refusal_is_one_line() {
        let rack = RackSpec::default();
        for vcpus in [0, 1, 9] {
            for memory in [0, 1, 127 << 20, (1 << 30) + 1, u64::MAX] {
                if let Err(error) = rack.check(&vm(vcpus, Size(memory))) {
                    assert_eq!(error.to_string().lines().count(), 1);
                }
            }
        }
    }

    fn read(text: &str) -> Result<RackSpec, RackError> {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), text).expect("writable");
        RackFile::read(file.path())
    }

    #[test]
    fn a_rack_file_of_one_node_is_read() {
        let rack = read("[[node]]\ncores = 4\nmemory = \"2G\"\n").expect("legal");
        assert_eq!(rack.cores, 4);
        assert_eq!(rack.node_memory, Some(Size(2 << 30)));
    }

    #[test]
    fn a_wrong_rack_file_is_refused_with_its_line() {
        let error = read("[[node]]\ncores = 4\ncorse = 5\n").expect_err("unknown key");
        assert!(error.to_string().contains("line 3"), "{error}");
        assert_eq!(error.to_string().lines().count(), 1);
        assert!(read("[[node]]\ncores = 1\n[[node]]\ncores = 2\n").is_err());
        assert!(read("node = []").is_err());
        assert!(read("[[node]]\ncores = 1\nmemory = \"12Q\"\n").is_err());
        let missing = RackFile::read(Path::new("/nonexistent/rack.toml"));
        assert!(missing.expect_err("missing").to_string().contains("--rack"));
    }
}
