//! The vCPUs of a running VM, as the hypervisors' records say.

use std::sync::atomic::Ordering;

use vmm_shared::addr::VcpuId;
use vmm_shared::control::{Place, VcpuRecord};

use crate::rack::Rack;

/// A vCPU that the VM has or is about to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuStatus {
    /// Which.
    pub id: VcpuId,
    /// Where it is.
    pub place: Place,
    /// Whether the guest has started it.
    pub has_started: bool,
    /// How often it has moved.
    pub moves: u64,
    /// For how long its last move kept it from running, in µs.
    pub blackout_us: u64,
}

impl Rack {
    /// Where a vCPU is and what is asked for it, if there is room for it.
    #[must_use]
    pub fn record(&self, vcpu: VcpuId) -> Option<VcpuRecord> {
        let known = u32::from(vcpu.0) < self.max_vcpus();
        self.control().vcpu(vcpu).filter(|_| known)
    }

    /// vCPUs that there is room for.
    #[must_use]
    pub fn max_vcpus(&self) -> u32 {
        self.shares()
            .iter()
            .map(|share| u32::from(share.max_vcpus))
            .sum()
    }

    fn vcpu_ids(&self) -> impl DoubleEndedIterator<Item = VcpuId> + use<> {
        let most = u16::try_from(self.max_vcpus()).expect("checked to be few");
        (0..most).map(VcpuId)
    }

    /// The vCPUs that the VM has, in order.
    #[must_use]
    pub fn vcpus(&self) -> Vec<VcpuStatus> {
        let khz = self.control().vm().tsc_khz().load(Ordering::Relaxed);
        let status = |id| {
            let record = self.record(id)?;
            let place = record.place().filter(|place| *place != Place::Absent)?;
            let ticks = record.blackout().saturating_mul(1000);
            Some(VcpuStatus {
                id,
                place,
                has_started: record.has_started(),
                moves: record.moves(),
                blackout_us: ticks.checked_div(khz).unwrap_or(0),
            })
        };
        self.vcpu_ids().filter_map(status).collect()
    }
}
