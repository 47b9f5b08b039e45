//! Racks that are written down in a file.

use std::path::Path;

use serde::Deserialize;

use crate::error::RackError;
use crate::size::Size;
use crate::spec::{NodeSpec, RackSpec, Role};

/// A rack written down in a file, one table per node:
///
/// ```toml
/// [[node]]
/// cores = 4
/// memory = "2G"
///
/// [[node]]
/// role = "control"
/// cores = 1
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
    /// What it is for; "data" if it doesn't say.
    #[serde(default)]
    pub role: Role,
    /// Its cores.
    pub cores: u32,
    /// The most memory that it gives.
    pub memory: Option<Size>,
}

impl RackFile {
    /// Reads the rack described in `path`.
    ///
    /// # Errors
    /// The file is not there, is no TOML, or describes no rack.
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
        let node = |node: &RackFileNode| match node.role {
            Role::Data => NodeSpec::data(node.cores, node.memory),
            Role::Control => NodeSpec::control(node.cores),
        };
        Ok(RackSpec {
            nodes: file.node.iter().map(node).collect(),
        })
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
    use crate::spec::VmSpec;

    fn read(text: &str) -> Result<RackSpec, RackError> {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), text).expect("writable");
        RackFile::read(file.path())
    }

    #[test]
    fn unequal_nodes_are_read_in_order() {
        let rack = read("[[node]]\ncores = 4\nmemory = \"2G\"\n[[node]]\ncores = 1\n");
        let expected = [
            NodeSpec::data(4, Some(Size(2 << 30))),
            NodeSpec::data(1, None),
        ];
        assert_eq!(rack.expect("legal").nodes, expected);
    }

    #[test]
    fn a_node_says_what_it_is_for() {
        let rack = read("[[node]]\ncores = 2\n[[node]]\nrole = \"control\"\ncores = 1\n");
        let expected = [NodeSpec::data(2, None), NodeSpec::control(1)];
        assert_eq!(rack.expect("legal").nodes, expected);
        assert!(read("[[node]]\ncores = 1\nrole = \"king\"\n").is_err());
    }

    #[test]
    fn a_wrong_rack_file_is_refused_with_its_line() {
        let error = read("[[node]]\ncores = 4\ncorse = 5\n").expect_err("unknown key");
        assert!(error.to_string().contains("line 3"), "{error}");
        assert_eq!(error.to_string().lines().count(), 1);
        assert!(read("").is_err());
        assert!(read("[[node]]\ncores = -1\n").is_err());
        assert!(read("[[node]]\nmemory = \"1G\"\n").is_err());
        assert!(read("[[node]]\ncores = 1\nmemory = \"12Q\"\n").is_err());
        let missing = RackFile::read(Path::new("/nonexistent/rack.toml"));
        assert!(missing.expect_err("missing").to_string().contains("--rack"));
    }

    #[test]
    fn what_can_be_read_and_not_built_is_refused_by_the_check() {
        let usual = VmSpec {
            max_vcpus: 1,
            vcpus: 1,
            memory: Size::mib(1024),
        };
        let refusal = |text: &str| {
            let rack = read(text).expect("can be read");
            rack.check(&usual).expect_err("must be refused").to_string()
        };
        assert!(refusal("node = []").contains("at least one node"));
        let idle = refusal("[[node]]\ncores = 1\n[[node]]\ncores = 0\n");
        assert!(idle.contains("node 1 has no cores"), "{idle}");
        let poor = refusal("[[node]]\ncores = 1\nmemory = \"0\"\n[[node]]\ncores = 1\n");
        assert!(poor.contains("node 0"), "{poor}");
    }
}
