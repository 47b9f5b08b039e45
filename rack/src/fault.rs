//! Faults put into a starting rack, to try that it says what is wrong.

use std::str::FromStr;

use vmm_shared::addr::NodeId;

use crate::error::RackError;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultKind {
    /// The node is shown a control region of another version: as if it, or
    /// the launcher, were of another build.
    Version,
    /// The header of the node's memory region is overwritten.
    Header,
    /// The node's memory region is shorter than its header says.
    Size,
    /// The node's doorbell server is gone before the node starts.
    Doorbell,
    /// The node's process starts and its CPUs do not.
    Paused,
}

/// The faults to put in, none by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults(Vec<(FaultKind, NodeId)>);

impl Faults {
    /// What `VIADUCT_FAULT` asks for: KIND@NODE, several with commas.
    ///
    /// # Errors
    /// It is not of that form.
    pub fn from_env() -> Result<Self, RackError> {
        std::env::var("VIADUCT_FAULT").unwrap_or_default().parse()
    }

    pub(crate) fn has(&self, kind: FaultKind, node: NodeId) -> bool {
        self.0.contains(&(kind, node))
    }
}

impl FromStr for Faults {
    type Err = RackError;

    fn from_str(text: &str) -> Result<Self, RackError> {
        let fault = |word: &str| {
            let (kind, node) = word.split_once('@')?;
            let kind = match kind {
                "version" => FaultKind::Version,
                "header" => FaultKind::Header,
                "size" => FaultKind::Size,
                "doorbell" => FaultKind::Doorbell,
                "paused" => FaultKind::Paused,
                _ => return None,
            };
            Some((kind, NodeId(node.parse().ok()?)))
        };
        let words = text.split(',').filter(|word| !word.is_empty());
        words
            .map(fault)
            .collect::<Option<_>>()
            .map(Self)
            .ok_or_else(|| RackError::UnknownFault(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_for_one_node_each() {
        let faults: Faults = "header@1,paused@0".parse().expect("legal");
        assert!(faults.has(FaultKind::Header, NodeId(1)));
        assert!(faults.has(FaultKind::Paused, NodeId(0)));
        assert!(!faults.has(FaultKind::Header, NodeId(0)));
        assert_eq!("".parse::<Faults>().expect("none"), Faults::default());
        for wrong in ["header", "header@", "header@x", "@1", "fire@1"] {
            assert!(wrong.parse::<Faults>().is_err(), "{wrong}");
        }
    }
}
