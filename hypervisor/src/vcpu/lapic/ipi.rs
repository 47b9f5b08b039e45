//! Interrupts between processors: for whom, and what they do.

use vmm_shared::addr::ApicId;

/// How an APIC understands logical destinations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogicalAddress {
    /// By its id: x2APIC.
    FromId,
    /// xAPIC, flat model: any of these bits.
    Flat(u8),
    /// xAPIC, cluster model: the cluster in the high half, bits in the low.
    Cluster(u8),
    /// Not at all: the APIC is off.
    Off,
}

/// An APIC that may be meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its id.
    pub id: ApicId,
    /// Its logical address.
    pub logical: LogicalAddress,
}

/// Who an inter-processor interrupt is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// The one with this id.
    Physical(ApicId),
    /// Those of an x2APIC cluster whose bits are set.
    Cluster {
        /// Cluster: the id without its low four bits.
        cluster: u16,
        /// One bit per member.
        members: u16,
    },
    /// Those with such a logical address, in the eight bits of xAPIC and
    /// IOAPIC. An x2APIC takes them as members of cluster 0.
    Logical(u8),
    /// The sender.
    Myself,
    /// All, the sender too.
    All,
    /// All but the sender.
    Others,
}

/// In eight bits: everyone.
const BROADCAST: u8 = 0xff;

impl Destination {
    /// What the high half of an ICR in x2APIC mode means.
    pub(super) const fn x2apic(high: u32, logical: bool) -> Self {
        let [a, b, c, d] = high.to_le_bytes();
        match high {
            u32::MAX => Self::All,
            _ if logical => Self::Cluster {
                cluster: u16::from_le_bytes([c, d]),
                members: u16::from_le_bytes([a, b]),
            },
            id => Self::Physical(ApicId(id)),
        }
    }

    /// A destination in eight bits.
    #[must_use]
    pub const fn eight_bits(destination: u8, logical: bool) -> Self {
        match destination {
            BROADCAST => Self::All,
            _ if logical => Self::Logical(destination),
            id => Self::Physical(ApicId(id as u32)),
        }
    }

    /// Whether `target` is meant; `sender` sent it.
    #[must_use]
    pub fn includes(self, target: Target, sender: ApicId) -> bool {
        let id = target.id;
        let in_cluster = |cluster: u16, members: u16| {
            u32::from(cluster) == id.0 >> 4 && members & 1 << (id.0 & 15) != 0
        };
        match self {
            Self::Physical(wanted) => wanted == id,
            Self::Cluster { cluster, members } => in_cluster(cluster, members),
            Self::Logical(wanted) => match target.logical {
                LogicalAddress::FromId => in_cluster(0, wanted.into()),
                LogicalAddress::Flat(own) => own & wanted != 0,
                LogicalAddress::Cluster(own) => {
                    let same = wanted >> 4 == 0xf || own >> 4 == wanted >> 4;
                    same && own & wanted & 0xf != 0
                }
                LogicalAddress::Off => false,
            },
            Self::Myself => id == sender,
            Self::All => true,
            Self::Others => id != sender,
        }
    }
}

/// What an inter-processor interrupt does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// An interrupt, to everyone meant.
    Fixed(u8),
    /// An interrupt, to one of those meant.
    Lowest(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// Reset.
    Init,
    /// Start-up at a real-mode page.
    StartUp(u8),
}

/// An inter-processor interrupt to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipi {
    /// Who it is for.
    pub destination: Destination,
    /// What it does.
    pub delivery: Delivery,
}
