//! What is compared in one call: which systems, and by which measurements.

use clap::ValueEnum;

use crate::metric::{GUESTS, HYPERVISORS, Metric, SPANNING, VMEXIT};
use crate::system::System;

/// A comparison of one system with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Suite {
    /// Viaduct on one node against no hypervisor and against nested KVM
    Hypervisors,
    /// A VM that spans two nodes against the same VM on one
    Span,
    /// The paravirtual guest against Linux, each on two nodes
    Pv,
    /// The same as the first by vmexit of kvm-unit-tests, without a kernel
    Vmexit,
}

impl Suite {
    /// What the guest knows it by.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Hypervisors => "hypervisors",
            Self::Span => "span",
            Self::Pv => "pv",
            Self::Vmexit => "vmexit",
        }
    }

    /// The systems, in the order in which they take turns. The first is the
    /// one that is judged.
    pub(crate) fn systems(self) -> &'static [System] {
        match self {
            Self::Hypervisors => &[System::Viaduct, System::Plain, System::Kvm],
            Self::Span => &[System::Spanning, System::Viaduct],
            Self::Pv => &[System::PvGuest, System::LinuxGuest],
            Self::Vmexit => &[System::Viaduct, System::Kvm],
        }
    }

    /// The system that is judged.
    pub(crate) fn subject(self) -> System {
        self.systems()[0]
    }

    /// What is measured, in the order of the table.
    pub(crate) fn metrics(self) -> &'static [Metric] {
        match self {
            Self::Hypervisors => &HYPERVISORS,
            Self::Span => &SPANNING,
            Self::Pv => &GUESTS,
            Self::Vmexit => &VMEXIT,
        }
    }
}
