//! What the hypervisor and the paravirtual guest kernel agree on.
//!
//! The kernel is an ELF image for fixed guest physical addresses. Its first
//! vCPU enters it at the image's entry point, in 64-bit mode with the first
//! 4 GiB mapped to themselves, interrupts off, and RSI pointing at a
//! [`BootInfo`]. The other vCPUs wait for a start-up interrupt whose vector is
//! the number of the page where the boot information begins; they enter as the
//! first did, at what [`BootInfo::entry`] says by then.
//!
//! There is no emulated device. The byte streams to the launcher are the
//! control region's own [rings](crate::ring), mapped into the guest: bytes
//! pass without an exit, and only a doorbell costs a [`Hypercall`]. When the
//! launcher rings, the guest gets the interrupt [`DOORBELL_VECTOR`] on its
//! first vCPU. Time is the TSC, which starts with the VM; interrupts between
//! vCPUs and the timer go through the x2APIC's registers.
//!
//! A kernel that has said so ([`Hypercall::Survive`]) goes on when a node is
//! lost. Its record of losses says which, and each vCPU that is left gets
//! [`LOSS_VECTOR`] before memory that has been lost stops being what it was:
//! then it reads as anything, and writes to it are lost. So a program, which
//! runs with interrupts on, never sees that; the kernel may, and asks the
//! record afterwards.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::{MAX_NODES, MAX_VCPUS};
use crate::control::MAX_COMMAND_LINE;

/// [`BootInfo::magic`]: "VdPv".
pub const BOOT_MAGIC: u32 = u32::from_le_bytes(*b"VdPv");
/// [`BootInfo::version`].
pub const BOOT_VERSION: u32 = 3;

/// The interrupt by which the launcher is heard.
pub const DOORBELL_VECTOR: u8 = 0xf0;

/// The interrupt by which vCPUs hear that nodes have been lost.
pub const LOSS_VECTOR: u8 = 0xf3;

/// Most pieces of RAM: one for each node, and one more for the node around
/// whose memory the hole below 4 GiB lies.
pub const MAX_RAM: usize = MAX_NODES + 1;

/// What the guest asks of the hypervisor: RAX of a VMMCALL. The answer is in
/// RAX, 0 for success. What takes a number has it in RCX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Hypercall {
    /// Wake the launcher: there are bytes, or room for some, in a ring.
    RingLauncher = 0x5650_0000,
    /// Stop the VM: it is done.
    PowerOff,
    /// Stop the VM: the kernel has failed.
    Crash,
    /// The guest goes on without nodes, as long as it has its memory from 0 up
    /// to the address in RCX, and its first vCPU.
    Survive,
    /// The first address from that in RCX on where memory has been lost;
    /// `u64::MAX` if there is none. RCX: how many bytes have been lost there in
    /// a row.
    NextLost,
}

impl Hypercall {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::RingLauncher,
        Self::PowerOff,
        Self::Crash,
        Self::Survive,
        Self::NextLost,
    ];

    /// The call with this number, if there is one.
    #[must_use]
    pub fn from_raw(raw: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|call| *call as u64 == raw)
    }
}

/// A range of guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Range {
    /// First byte.
    pub gpa: u64,
    /// Bytes; 0 if there is nothing.
    pub len: u64,
}

/// A piece of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Ram {
    /// Where it is.
    pub range: Range,
    /// The node that gives it.
    pub node: u32,
    /// Zero.
    pub reserved: u32,
}

/// A vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Cpu {
    /// The APIC id, by which it knows itself and others interrupt it.
    pub apic_id: u32,
    /// The node that it runs on.
    pub node: u32,
}

/// What the kernel is told when it is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BootInfo {
    /// [`BOOT_MAGIC`].
    pub magic: u32,
    /// [`BOOT_VERSION`].
    pub version: u32,
    /// Nodes that the VM spans.
    pub nodes: u32,
    /// vCPUs of the VM.
    pub vcpus: u32,
    /// Rate of the TSC in kHz.
    pub tsc_khz: u32,
    /// Pieces of RAM.
    pub ram_count: u32,
    /// `CLOCK_REALTIME` when the TSC was 0, in ns.
    pub boot_wall_ns: u64,
    /// Guest physical address at which vCPUs enter.
    pub entry: u64,
    /// RAM in use: from 0 to the end of the kernel.
    pub kernel: Range,
    /// The first program, a static ELF image; in RAM.
    pub init: Range,
    /// The root image: ext4, shared by all nodes and read-only.
    pub image: Range,
    /// The ring to the operator's console.
    pub console_out: Range,
    /// The ring to the launcher.
    pub agent_out: Range,
    /// The ring from the launcher.
    pub agent_in: Range,
    /// What has been lost: a [`LossRecord`](crate::losses::LossRecord), for
    /// reading alone.
    pub losses: Range,
    /// Bytes of `command_line` in use.
    pub command_line_len: u32,
    /// Zero.
    pub reserved: u32,
    /// The command line.
    pub command_line: [u8; MAX_COMMAND_LINE],
    /// The RAM; zero from `ram_count` on.
    pub ram: [Ram; MAX_RAM],
    /// The vCPUs; zero from `vcpus` on.
    pub cpu: [Cpu; MAX_VCPUS],
}

const _: () = assert!(
    size_of::<BootInfo>() == 40 + 7 * 16 + 8 + MAX_COMMAND_LINE + 24 * MAX_RAM + 8 * MAX_VCPUS
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hypercalls_have_the_numbers_they_are_found_by() {
        for call in Hypercall::ALL {
            assert_eq!(Hypercall::from_raw(call as u64), Some(call));
        }
        // KVM's calls have small numbers.
        assert_eq!(Hypercall::from_raw(5), None);
        assert_eq!(Hypercall::from_raw(u64::MAX), None);
    }
}
