//! Addresses and identifiers, one type each, so that they cannot be mixed up.

use core::fmt;

/// Bytes in a small page.
pub const PAGE_SIZE: u64 = 4 << 10;
/// Bytes in a large page, the unit in which guest memory is mapped.
pub const LARGE_PAGE_SIZE: u64 = 2 << 20;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `bytes` further on, or `None` on overflow.
            #[must_use]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            /// The start of the `size`-byte unit that holds this address;
            /// `size` is a power of two.
            #[must_use]
            pub const fn align_down(self, size: u64) -> Self {
                Self(self.0 & !(size - 1))
            }

            /// Whether this address is a multiple of `size`, a power of two.
            #[must_use]
            pub const fn is_aligned(self, size: u64) -> bool {
                self.0 & (size - 1) == 0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address!(
    /// A guest physical address.
    Gpa
);
address!(
    /// A guest virtual address.
    Gva
);
address!(
    /// A host physical address of one node.
    Hpa
);

/// A node of the rack: one host, one hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u16);

/// A core of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location {
    /// The node.
    pub node: NodeId,
    /// The core, counted within its node.
    pub core: u16,
}

/// A virtual CPU of the VM, counted over all nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VcpuId(pub u16);

/// The APIC id under which the guest addresses a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ApicId(pub u32);

/// The most nodes a rack may have.
pub const MAX_NODES: usize = 64;
/// The most vCPUs a VM may have: x2APIC ids below 255 need no extensions.
pub const MAX_VCPUS: usize = 254;
