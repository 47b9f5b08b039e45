//! vCPUs of a running VM: more, fewer, elsewhere.
//!
//! The hypervisors do it; here is left what is wanted, and waited for what
//! becomes of it. See [`vmm_shared::control::VcpuRecord`].

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vmm_shared::addr::{Location, NodeId, VcpuId};
use vmm_shared::control::{Busy, Order, Outcome, Place, VcpuRecord};

use crate::rack::Rack;

/// Why the vCPUs are not as they were asked to be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ElasticError {
    /// A VM has at least one.
    #[error("a VM has at least one vCPU; use --vcpus 1 or more")]
    NoVcpus,
    /// There is no room for so many.
    #[error(
        "{asked} vCPUs asked for, and the VM was started with room for {most}; use --vcpus {most} \
         or fewer, or start it with --max-vcpus"
    )]
    TooMany {
        /// What was asked for.
        asked: u32,
        /// What there is room for.
        most: u32,
    },
    /// There is no such vCPU.
    #[error("there is no vCPU {}; viaduct vcpus shows them", .0.0)]
    Unknown(VcpuId),
    /// There is no such node.
    #[error("there is no node {} in the rack, or it is lost; viaduct nodes shows them", .0.0)]
    NoNode(NodeId),
    /// Somebody else is changing it.
    #[error("vCPU {} is being changed by somebody else; try again later", .0.0)]
    Busy(VcpuId),
    /// It makes no sense now.
    #[error("vCPU {} is not where that could be done; viaduct vcpus shows where they are", .0.0)]
    Misplaced(VcpuId),
    /// The guest has no driver for that.
    #[error("this guest's vCPU {} can't be changed so while it runs", .0.0)]
    Unable(VcpuId),
    /// The guest refused.
    #[error("the guest keeps vCPU {}: {}", .vcpu.0, ost(*vcpu, *status))]
    Refused {
        /// Which.
        vcpu: VcpuId,
        /// The status of its `_OST`.
        status: u32,
    },
    /// Not done in time; it may still be.
    #[error("vCPU {} was not ready within {seconds} s: {what}", .vcpu.0)]
    Late {
        /// Which.
        vcpu: VcpuId,
        /// The time given.
        seconds: u64,
        /// What is still missing.
        what: &'static str,
    },
    /// The VM has ended.
    #[error("the VM has ended")]
    Ended,
}

/// What a status of `_OST` means (ACPI 6.5, tables 6.14 to 6.16).
fn ost(vcpu: VcpuId, status: u32) -> String {
    match (vcpu, status) {
        (VcpuId(0), _) => "Linux never gives up the CPU that it has booted on".into(),
        (_, 0x80) => "it can't do without it".into(),
        (_, 0x81 | 0x82) => "it is in use".into(),
        (_, 0x83) => "something that depends on it is in use".into(),
        (_, other) => format!("ACPI status {other:#x}"),
    }
}

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
    fn record(&self, vcpu: VcpuId) -> Option<VcpuRecord> {
        let known = u32::from(vcpu.0) < self.max_vcpus();
        self.control().vcpu(vcpu).filter(|_| known)
    }

    /// vCPUs that there is room for.
    #[must_use]
    pub fn max_vcpus(&self) -> u32 {
        self.shares().iter().map(|share| share.max_vcpus).sum()
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

    /// The node whose memory a vCPU is near to, as the guest has been told.
    fn home_node(&self, vcpu: VcpuId) -> NodeId {
        let mut rooms = self.shares().iter().scan(0, |next, share| {
            *next += share.max_vcpus;
            Some(*next)
        });
        let node = rooms.position(|end| u32::from(vcpu.0) < end);
        NodeId(u16::try_from(node.unwrap_or(0)).expect("few nodes"))
    }

    /// The core of a node that has the fewest vCPUs.
    fn emptiest_core(&self, node: NodeId, taken: &[Location]) -> Result<Location, ElasticError> {
        let share = self.shares().get(usize::from(node.0));
        let deciding = self.control().boot_config().control_nodes();
        let is_out = self.control().membership().is_out(node) || deciding.contains(node);
        let share = share.filter(|_| !is_out);
        let cores = share.ok_or(ElasticError::NoNode(node))?.cores;
        let places: Vec<_> = self
            .vcpus()
            .iter()
            .filter_map(|vcpu| vcpu.place.location())
            .collect();
        let load = |core: &u16| {
            let at = Location { node, core: *core };
            places
                .iter()
                .chain(taken)
                .filter(|place| **place == at)
                .count()
        };
        let cores = 0..u16::try_from(cores).expect("checked to be few");
        let core = cores.min_by_key(load);
        let core = core.ok_or(ElasticError::NoNode(node))?;
        Ok(Location { node, core })
    }

    fn ask(&self, vcpu: VcpuId, order: Order) -> Result<(), ElasticError> {
        let record = self.record(vcpu).ok_or(ElasticError::Unknown(vcpu))?;
        record.ask(order).map_err(|Busy| ElasticError::Busy(vcpu))?;
        // Release: the order is visible to who sees the count.
        self.control().vm().orders().fetch_add(1, Ordering::Release);
        self.ring_devices();
        Ok(())
    }

    /// Waits for something about a vCPU.
    fn wait(
        &self,
        vcpu: VcpuId,
        (deadline, limit): (Instant, Duration),
        what: &'static str,
        is_so: impl Fn(&VcpuRecord) -> bool,
    ) -> Result<(), ElasticError> {
        let record = self.record(vcpu).ok_or(ElasticError::Unknown(vcpu))?;
        loop {
            let rings = self.rings();
            if is_so(&record) {
                return Ok(());
            }
            if self.ended().is_some() {
                return Err(ElasticError::Ended);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let seconds = limit.as_secs();
                return Err(ElasticError::Late {
                    vcpu,
                    seconds,
                    what,
                });
            }
            self.wait_ring(rings, left);
        }
    }

    fn wait_outcome(
        &self,
        vcpu: VcpuId,
        node: NodeId,
        until: (Instant, Duration),
    ) -> Result<(), ElasticError> {
        let what = "the hypervisor or the guest has not answered";
        self.wait(vcpu, until, what, |record| {
            record.outcome() != Outcome::Pending
        })?;
        let outcome = self.record(vcpu).map(|record| record.outcome());
        match outcome.unwrap_or(Outcome::Unable) {
            Outcome::Done => Ok(()),
            Outcome::NoSuchCore => Err(ElasticError::NoNode(node)),
            Outcome::Pending => Err(ElasticError::Busy(vcpu)),
            Outcome::Misplaced => Err(ElasticError::Misplaced(vcpu)),
            Outcome::Unable => Err(ElasticError::Unable(vcpu)),
            Outcome::Refused(status) => Err(ElasticError::Refused { vcpu, status }),
        }
    }

    /// Gives the guest these vCPUs, on a node or where they are at home, and
    /// waits until it has started them.
    ///
    /// # Errors
    /// The first thing that went wrong; what was asked for may still come.
    pub fn grant_vcpus(
        &self,
        vcpus: &[VcpuId],
        node: Option<NodeId>,
        limit: Duration,
    ) -> Result<(), ElasticError> {
        let until = (Instant::now() + limit, limit);
        let mut places = Vec::new();
        for vcpu in vcpus {
            let node = node.unwrap_or_else(|| self.home_node(*vcpu));
            let at = self.emptiest_core(node, &places)?;
            self.ask(*vcpu, Order::Grant(at))?;
            places.push(at);
        }
        for (vcpu, at) in vcpus.iter().zip(&places) {
            self.wait_outcome(*vcpu, at.node, until)?;
        }
        for vcpu in vcpus {
            let what = "the guest has it, but has not started it";
            self.wait(*vcpu, until, what, VcpuRecord::has_started)?;
        }
        Ok(())
    }

    /// Asks the guest for these vCPUs back, and waits until they are free.
    ///
    /// # Errors
    /// The first thing that went wrong; the others may have been given back.
    pub fn reclaim_vcpus(&self, vcpus: &[VcpuId], limit: Duration) -> Result<(), ElasticError> {
        let until = (Instant::now() + limit, limit);
        for vcpu in vcpus {
            self.ask(*vcpu, Order::Reclaim)?;
        }
        let results = vcpus
            .iter()
            .map(|vcpu| self.wait_outcome(*vcpu, self.home_node(*vcpu), until));
        results.collect::<Vec<_>>().into_iter().collect()
    }

    /// Takes a vCPU to a node, or to one of its cores, and waits until it runs
    /// there.
    ///
    /// # Errors
    /// Why it stays where it is.
    pub fn move_vcpu(
        &self,
        vcpu: VcpuId,
        node: NodeId,
        core: Option<u16>,
        limit: Duration,
    ) -> Result<(), ElasticError> {
        let until = (Instant::now() + limit, limit);
        let to = match core {
            Some(core) => Location { node, core },
            None => self.emptiest_core(node, &[])?,
        };
        self.ask(vcpu, Order::Move(to))?;
        self.wait_outcome(vcpu, node, until)
    }

    /// Makes the VM have so many vCPUs. New ones come to the emptiest nodes;
    /// of those that go the last go first, and the first never.
    ///
    /// # Errors
    /// As of [`grant_vcpus`](Self::grant_vcpus) and
    /// [`reclaim_vcpus`](Self::reclaim_vcpus).
    pub fn resize_vcpus(&self, count: u32, limit: Duration) -> Result<(), ElasticError> {
        let most = self.max_vcpus();
        match count {
            0 => return Err(ElasticError::NoVcpus),
            asked if asked > most => return Err(ElasticError::TooMany { asked, most }),
            _ => {}
        }
        self.control()
            .vm()
            .desired_vcpus()
            .store(count.into(), Ordering::Relaxed);
        let present: Vec<_> = self.vcpus().iter().map(|vcpu| vcpu.id).collect();
        let count = usize::try_from(count).expect("64-bit");
        if count >= present.len() {
            let absent: Vec<_> = self
                .vcpu_ids()
                .filter(|vcpu| !present.contains(vcpu))
                .collect();
            let chosen = self.by_load(absent, count - present.len());
            self.grant_vcpus(&chosen, None, limit)
        } else {
            let last = present.iter().rev().take(present.len() - count);
            let last: Vec<_> = last.copied().collect();
            self.reclaim_vcpus(&last, limit)
        }
    }

    /// Chooses so many of the absent vCPUs: each from the node with the fewest
    /// vCPUs for its cores.
    fn by_load(&self, mut absent: Vec<VcpuId>, count: usize) -> Vec<VcpuId> {
        let mut load = vec![0; self.shares().len()];
        for vcpu in self.vcpus() {
            if let Some(at) = vcpu.place.location() {
                load[usize::from(at.node.0)] += 1;
            }
        }
        let mut chosen = Vec::new();
        while chosen.len() < count && !absent.is_empty() {
            let fullness = |vcpu: &VcpuId| {
                let node = usize::from(self.home_node(*vcpu).0);
                load[node] * 1000 / self.shares()[node].cores.max(1)
            };
            let next = (0..absent.len()).min_by_key(|index| fullness(&absent[*index]));
            let vcpu = absent.remove(next.expect("there are some"));
            load[usize::from(self.home_node(vcpu).0)] += 1;
            chosen.push(vcpu);
        }
        chosen
    }
}
