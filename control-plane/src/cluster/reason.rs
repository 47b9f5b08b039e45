//! Why a step could not be done: a number in the log, a sentence for operators.

use core::fmt;

use super::StepKind;

/// Why something is not as it was asked to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Nobody knows how to do it.
    NoWay,
    /// The core is not there, or its node is lost.
    NoCore,
    /// The vCPU is not where that could be done.
    Misplaced,
    /// The machine that the guest has can't do that.
    Unable,
    /// The node is not there, or gives nothing.
    NoNode,
    /// The node has no room for more memory.
    NoRoom,
    /// What the nodes share about the VM's memory is damaged.
    Damaged,
    /// The guest does not give it up, with this status of its `_OST`.
    Kept(u8),
    /// The guest does not take it, with this status.
    Declined(u8),
    /// The guest has not answered, and is not waited for.
    Unanswered,
    /// It was cancelled.
    Cancelled,
    /// A node was lost.
    NodeLost,
    /// Another version's.
    Other(u16),
}

const KEPT: u8 = 1;
const DECLINED: u8 = 2;

impl Reason {
    /// Why the guest has not done a step of this kind, by the status of its
    /// `_OST`, of which the low byte counts.
    #[must_use]
    pub const fn refused(kind: StepKind, status: u32) -> Self {
        let [status, ..] = status.to_le_bytes();
        match kind {
            StepKind::Remove => Self::Kept(status),
            _ => Self::Declined(status),
        }
    }

    /// Its number in the log.
    #[must_use]
    pub const fn code(self) -> u16 {
        match self {
            Self::NoWay => 1,
            Self::NoCore => 2,
            Self::Misplaced => 3,
            Self::Unable => 4,
            Self::NoNode => 5,
            Self::NoRoom => 6,
            Self::Damaged => 7,
            Self::Unanswered => 8,
            Self::Kept(status) => u16::from_le_bytes([status, KEPT]),
            Self::Declined(status) => u16::from_le_bytes([status, DECLINED]),
            Self::Cancelled => u16::MAX,
            Self::NodeLost => u16::MAX - 1,
            Self::Other(code) => code,
        }
    }

    /// The reason with this number.
    #[must_use]
    pub const fn from_code(code: u16) -> Self {
        match (code, code.to_le_bytes()) {
            (1, _) => Self::NoWay,
            (2, _) => Self::NoCore,
            (3, _) => Self::Misplaced,
            (4, _) => Self::Unable,
            (5, _) => Self::NoNode,
            (6, _) => Self::NoRoom,
            (7, _) => Self::Damaged,
            (8, _) => Self::Unanswered,
            (_, [status, KEPT]) => Self::Kept(status),
            (_, [status, DECLINED]) => Self::Declined(status),
            (u16::MAX, _) => Self::Cancelled,
            (0xfffe, _) => Self::NodeLost,
            (other, _) => Self::Other(other),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoWay => f.write_str("this version has no way to do that"),
            Self::NoCore => f.write_str("the core is not there, or its node is lost"),
            Self::Misplaced => f.write_str("the vCPU is not where that could be done"),
            Self::Unable => f.write_str("this guest's machine can't do that while it runs"),
            Self::NoNode => f.write_str("the node is not there, or gives nothing"),
            Self::NoRoom => f.write_str("the node has no room for more memory"),
            Self::Damaged => f.write_str("the node can't take memory over; its log says why"),
            Self::Unanswered => {
                f.write_str("the guest has not answered, and may do what it was asked for later")
            }
            // ACPI 6.5, tables 6.15 and 6.14.
            Self::Kept(0x80) => f.write_str("the guest can't do without it"),
            Self::Kept(0x81 | 0x82) => f.write_str("the guest says that it is in use"),
            Self::Kept(0x83) => f.write_str("the guest says that what depends on it is in use"),
            Self::Kept(status) => write!(f, "the guest keeps it: ACPI status {status:#x}"),
            Self::Declined(status) => {
                write!(f, "the guest does not take it: ACPI status {status:#x}")
            }
            Self::Cancelled => f.write_str("it was cancelled"),
            Self::NodeLost => f.write_str("a node was lost"),
            Self::Other(code) => write!(f, "reason {code}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_reasons_are_one_to_one() {
        for code in 0..=u16::MAX {
            assert_eq!(Reason::from_code(code).code(), code);
        }
        assert_eq!(Reason::from_code(0x183), Reason::Kept(0x83));
        assert_eq!(Reason::from_code(9), Reason::Other(9));
    }
}
