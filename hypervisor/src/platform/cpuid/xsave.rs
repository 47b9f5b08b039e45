//! Leaf 0xD: the state that XSAVE keeps and the room it takes.
//!
//! The host's own sizes depend on the XCR0 that happens to be loaded, so only
//! the host's layout is taken from it and all sizes are computed.

use super::features::{XsaveEax, xcr0};
use super::{CpuidResult, Host};

const LEAF: u32 = 0xd;
/// Room for x87 and SSE state and the header behind it.
const LEGACY_AND_HEADER: u32 = 512 + 64;
/// Components that may be offered: AVX and the three of AVX-512.
const COMPONENTS: [u32; 4] = [2, 5, 6, 7];

/// Where a component is in the save area.
#[derive(Clone, Copy, Debug, Default)]
struct Component {
    size: u32,
    offset: u32,
    /// Bit 1: starts at a multiple of 64 in the compacted form.
    flags: u32,
}

/// Leaf 0xD with all its subleaves.
#[derive(Clone, Debug)]
pub(super) struct XsaveLeaves {
    supported: u64,
    instructions: XsaveEax,
    components: [Component; COMPONENTS.len()],
}

impl XsaveLeaves {
    /// What of the `allowed` state this host can keep.
    pub(super) fn new(host: &Host<'_>, allowed: u64) -> Self {
        let none = Self {
            supported: 0,
            instructions: XsaveEax::empty(),
            components: [Component::default(); COMPONENTS.len()],
        };
        let leaf = host.leaf(LEAF);
        let has = allowed & (u64::from(leaf.eax) | u64::from(leaf.edx) << 32);
        let basic = xcr0::X87 | xcr0::SSE;
        if has & basic != basic {
            return none;
        }
        let mut leaves = Self {
            supported: basic,
            instructions: XsaveEax::from_bits_truncate(host.subleaf(LEAF, 1).eax),
            ..none
        };
        if has & xcr0::AVX != 0 {
            leaves.supported |= xcr0::AVX;
            // Its three components only come together, and on top of AVX.
            if has & xcr0::AVX512 == xcr0::AVX512 {
                leaves.supported |= xcr0::AVX512;
            }
        }
        for (component, index) in leaves.components.iter_mut().zip(COMPONENTS) {
            if leaves.supported >> index & 1 != 0 {
                let layout = host.subleaf(LEAF, index);
                *component = Component {
                    size: layout.eax,
                    offset: layout.ebx,
                    flags: layout.ecx & 2,
                };
            }
        }
        leaves
    }

    /// The bits of XCR0 that can be set.
    pub(super) const fn supported(&self) -> u64 {
        self.supported
    }

    /// A subleaf, for a guest with this XCR0.
    pub(super) fn get(&self, subleaf: u32, guest_xcr0: u64) -> CpuidResult {
        if self.supported == 0 {
            return CpuidResult::default();
        }
        match subleaf {
            0 => {
                // No supported component is above bit 31.
                let [a, b, c, d, ..] = self.supported.to_le_bytes();
                let supported = u32::from_le_bytes([a, b, c, d]);
                CpuidResult::new(
                    supported,
                    self.standard_size(guest_xcr0),
                    self.standard_size(self.supported),
                    0,
                )
            }
            1 => {
                let size = if self.instructions.contains(XsaveEax::XSAVEC) {
                    self.compacted_size(guest_xcr0)
                } else {
                    0
                };
                CpuidResult::new(self.instructions.bits(), size, 0, 0)
            }
            _ => self
                .components_in(self.supported)
                .find(|(index, _)| *index == subleaf)
                .map_or_else(CpuidResult::default, |(_, component)| {
                    CpuidResult::new(component.size, component.offset, component.flags, 0)
                }),
        }
    }

    fn components_in(&self, mask: u64) -> impl Iterator<Item = (u32, Component)> {
        let mask = mask & self.supported;
        COMPONENTS
            .into_iter()
            .zip(self.components)
            .filter(move |(index, _)| mask >> index & 1 != 0)
    }

    fn standard_size(&self, mask: u64) -> u32 {
        self.components_in(mask)
            .map(|(_, component)| component.offset.saturating_add(component.size))
            .fold(LEGACY_AND_HEADER, u32::max)
    }

    fn compacted_size(&self, mask: u64) -> u32 {
        self.components_in(mask)
            .fold(LEGACY_AND_HEADER, |end, (_, component)| {
                let start = match component.flags & 2 {
                    0 => end,
                    _ => end.saturating_add(63) & !63,
                };
                start.saturating_add(component.size)
            })
    }
}
