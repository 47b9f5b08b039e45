//! Faults put into a starting rack, to try that it says what is wrong.

use std::str::FromStr;
use std::sync::atomic::Ordering;

use vmm_shared::addr::{LARGE_PAGE_SIZE, NodeId};
use vmm_shared::control::{ControlRegion, NodeShare, first_places};
use vmm_shared::region::RegionHeader;
use zerocopy::FromZeros;

use crate::error::RackError;
use crate::region::Region;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultKind {
    /// The node is shown a control region of another version: as if it, or
    /// the launcher, were of another build.
    Version,
    /// The header of the node's memory region is overwritten.
    Header,
    /// That header ends behind its magic number.
    Cut,
    /// That header names another owner.
    Owner,
    /// The node's memory region is shorter than its header says.
    Size,
    /// The node's memory region has less than the node's share of the VM.
    Short,
    /// The node's doorbell server is gone before the node starts.
    Doorbell,
    /// The node's process starts and its CPUs do not.
    Paused,
    /// Two processes are started as this node.
    Twice,
    /// The node's locked instructions are not atomic towards other nodes. For
    /// nodes with one core.
    Atomics,
    /// What the node's vCPUs are asked for, and what they ask for, is nonsense
    /// when the nodes start.
    Nonsense,
}

/// Where a vCPU's home has its signals and its question to the devices' node
/// (see the hypervisor's `vcpu::posted` and `fabric::forward`).
const SIGNALS: usize = 32;
const QUESTION: usize = 128;

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

    /// Damages the header of the memory region that a node gives.
    pub(crate) fn apply_to_header(&self, node: NodeId, region: &Region) -> Result<(), RackError> {
        let len = region.len();
        for (kind, _) in self.0.iter().filter(|(_, at)| *at == node) {
            region.change_header(|header| match kind {
                FaultKind::Header => header.magic = 0,
                FaultKind::Cut => {
                    *header = RegionHeader {
                        magic: header.magic,
                        ..RegionHeader::new_zeroed()
                    };
                }
                FaultKind::Owner => header.owner = u32::from(node.0) + 1000,
                FaultKind::Size => header.content_len = len,
                FaultKind::Short => header.content_len -= LARGE_PAGE_SIZE,
                _ => {}
            })?;
        }
        Ok(())
    }

    /// Puts nonsense where vCPUs of the nodes are spoken to.
    pub(crate) fn apply_to_homes(&self, control: &ControlRegion, shares: &[NodeShare]) {
        let vm = control.vm();
        let asked = vm.waiting_for_devices().next().expect("at least one word");
        for (vcpu, at) in first_places(shares) {
            if !self.has(FaultKind::Nonsense, at.node) {
                continue;
            }
            let home = control.vcpu_home(vcpu).expect("checked to be few");
            let word = |offset| home.atomic_u32(offset).expect("inside a home");
            word(SIGNALS).store(1 << 31, Ordering::Relaxed);
            word(QUESTION).store(1, Ordering::Relaxed);
            word(QUESTION + 4).store(u32::MAX, Ordering::Relaxed);
            // By this one, and by one that there is not.
            asked.fetch_or(1 << (vcpu.0 % 63) | 1 << 63, Ordering::Relaxed);
        }
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
                "cut" => FaultKind::Cut,
                "owner" => FaultKind::Owner,
                "size" => FaultKind::Size,
                "short" => FaultKind::Short,
                "twice" => FaultKind::Twice,
                "atomics" => FaultKind::Atomics,
                "doorbell" => FaultKind::Doorbell,
                "paused" => FaultKind::Paused,
                "nonsense" => FaultKind::Nonsense,
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
