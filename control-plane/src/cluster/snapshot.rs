//! The state as bytes, for replicas that join.
//!
//! A head with a version, then table after table: a count, then records of
//! fixed layout. Rows of cores and slices are run-length coded. Reading is
//! total, and what was read is believed only if it passes
//! [`Cluster::check`].

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use vmm_shared::addr::NodeId;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, TryFromBytes};

use super::journal::{KEPT, Record};
use super::{
    Change, Cluster, Holder, Job, JobId, JobState, MAX_CORES, MAX_SLICES, MAX_VM_VCPUS, Node, Op,
    Placement, Step, Vm, VmId, VmPhase,
};
use crate::optimise::Share;
use crate::policy::{ANY, Policy, Rule};

/// Version of this format.
const VERSION: u32 = 4;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Head {
    version: u32,
    term: u32,
    last_job: u32,
    /// [`ANY`]: nobody.
    controller: u16,
    reserved: u16,
    nodes: u32,
    vms: u32,
    jobs: u32,
    rules: u32,
    records: u32,
    left: u32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct NodeHead {
    node: u16,
    domain: u16,
    cordoned: u32,
    core_runs: u32,
    slice_runs: u32,
}

/// So many rows in succession have this holder.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Run {
    count: u32,
    /// 0: nobody, 1: a VM that uses it, 2: a node's pool, 3: a VM's lease.
    kind: u16,
    id: u16,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct VmHead {
    vm: u16,
    running: u16,
    least: [u32; 2],
    most: [u32; 2],
    desired: [u32; 2],
    seen: [u32; 2],
    block: u32,
    placements: u32,
    homes: u32,
    seats: u32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct PlacementRow {
    node: u32,
    held: [u32; 2],
    granted: [u32; 2],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct JobHead {
    /// The wish, and the number of the request.
    wish: Op,
    id: u32,
    state: u16,
    reason: u16,
    short: u32,
    steps: u32,
    done: u32,
    /// Why the last step that was done in part was.
    short_reason: u16,
    abandoned: u16,
    before: [u32; 2],
}

const fn pair(share: Share) -> [u32; 2] {
    [share.vcpus, share.slices]
}

const fn share(pair: [u32; 2]) -> Share {
    Share::new(pair[0], pair[1])
}

fn len<T>(items: &[T]) -> u32 {
    u32::try_from(items.len()).expect("tables are small")
}

fn runs(rows: &[Holder]) -> Vec<Run> {
    let chunks = rows.chunk_by(|a, b| a == b);
    chunks
        .map(|chunk| {
            let (kind, id) = match chunk[0] {
                Holder::Free => (0, 0),
                Holder::Vm(vm) => (1, vm.0),
                Holder::Pool(node) => (2, node.0),
                Holder::Leased(vm) => (3, vm.0),
            };
            Run {
                count: len(chunk),
                kind,
                id,
            }
        })
        .collect()
}

/// What is left of the bytes.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<T: TryFromBytes>(&mut self) -> Option<T> {
        let (item, rest) = T::try_read_from_prefix(self.0).ok()?;
        self.0 = rest;
        Some(item)
    }

    fn rows(&mut self, count: u32, most: u32) -> Option<Vec<Holder>> {
        let mut rows = Vec::new();
        for _ in 0..count {
            let run: Run = self.take()?;
            let holder = match run.kind {
                0 => Holder::Free,
                1 => Holder::Vm(VmId(run.id)),
                2 => Holder::Pool(NodeId(run.id)),
                3 => Holder::Leased(VmId(run.id)),
                _ => return None,
            };
            let room = most - len(&rows);
            if run.count > room {
                return None;
            }
            rows.resize(rows.len() + run.count as usize, holder);
        }
        Some(rows)
    }
}

impl Cluster {
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        let records: Vec<Record> = self.journal.since(0).copied().collect();
        let head = Head {
            version: VERSION,
            term: self.term,
            last_job: self.last_job,
            controller: self.controller.map_or(ANY, |node| node.0),
            reserved: 0,
            nodes: u32::try_from(self.nodes.len()).expect("16-bit ids"),
            vms: u32::try_from(self.vms.len()).expect("16-bit ids"),
            jobs: u32::try_from(self.jobs.len()).expect("one per VM, and the kept"),
            rules: len(self.policy.rules()),
            records: len(&records),
            left: u32::try_from(self.left.len()).expect("16-bit ids"),
        };
        out.extend_from_slice(head.as_bytes());
        for node in &self.left {
            out.extend_from_slice(node.0.as_bytes());
        }
        for (id, node) in &self.nodes {
            let (cores, slices) = (runs(&node.cores), runs(&node.slices));
            let head = NodeHead {
                node: id.0,
                domain: node.domain,
                cordoned: node.cordoned.into(),
                core_runs: len(&cores),
                slice_runs: len(&slices),
            };
            out.extend_from_slice(head.as_bytes());
            out.extend_from_slice(cores.as_bytes());
            out.extend_from_slice(slices.as_bytes());
        }
        for (id, vm) in &self.vms {
            write_vm(*id, vm, out);
        }
        for job in self.jobs.values() {
            write_job(job, out);
        }
        out.extend_from_slice(self.policy.as_bytes());
        out.extend_from_slice(records.as_bytes());
    }

    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        let head: Head = reader.take()?;
        if head.version != VERSION {
            return None;
        }
        let mut cluster = Self {
            controller: (head.controller != ANY).then_some(NodeId(head.controller)),
            term: head.term,
            last_job: head.last_job,
            ..Self::default()
        };
        for _ in 0..head.left {
            cluster.left.insert(NodeId(reader.take()?));
        }
        for _ in 0..head.nodes {
            let node: NodeHead = reader.take()?;
            let mut row = Node {
                domain: node.domain,
                cordoned: node.cordoned != 0,
                cores: reader.rows(node.core_runs, MAX_CORES)?,
                slices: reader.rows(node.slice_runs, MAX_SLICES)?,
                free: Share::NONE,
            };
            row.free = row.held_by(Holder::Free);
            cluster.nodes.insert(NodeId(node.node), row);
        }
        for _ in 0..head.vms {
            let (id, vm) = read_vm(&mut reader)?;
            cluster.vms.insert(id, vm);
        }
        for _ in 0..head.jobs {
            let job = read_job(&mut reader)?;
            cluster.jobs.insert(job.id, job);
        }
        let mut rules = Vec::new();
        for _ in 0..head.rules {
            rules.push(reader.take::<Rule>()?);
        }
        cluster.policy = Policy::new(rules).ok()?;
        if head.records as usize > KEPT {
            return None;
        }
        for _ in 0..head.records {
            cluster.journal.add(reader.take()?);
        }
        let whole = reader.0.is_empty() && cluster.check().is_ok();
        whole.then_some(cluster)
    }
}

fn write_vm(id: VmId, vm: &Vm, out: &mut Vec<u8>) {
    let head = VmHead {
        vm: id.0,
        running: (vm.phase == VmPhase::Running).into(),
        least: pair(vm.least),
        most: pair(vm.most),
        desired: pair(vm.desired),
        seen: pair(vm.seen),
        block: vm.block(),
        placements: u32::try_from(vm.placements.len()).expect("16-bit ids"),
        homes: len(&vm.homes),
        seats: len(&vm.seats),
    };
    out.extend_from_slice(head.as_bytes());
    for (node, placement) in &vm.placements {
        let row = PlacementRow {
            node: node.0.into(),
            held: pair(placement.held),
            granted: pair(placement.granted),
        };
        out.extend_from_slice(row.as_bytes());
    }
    for home in &vm.homes {
        out.extend_from_slice(home.map_or(ANY, |node| node.0).as_bytes());
    }
    for seat in &vm.seats {
        out.extend_from_slice(seat.0.as_bytes());
    }
}

fn read_vm(reader: &mut Reader<'_>) -> Option<(VmId, Vm)> {
    let head: VmHead = reader.take()?;
    if head.homes > MAX_VM_VCPUS || head.seats > head.homes {
        return None;
    }
    let mut placements = BTreeMap::new();
    for _ in 0..head.placements {
        let row: PlacementRow = reader.take()?;
        let placement = Placement {
            held: share(row.held),
            granted: share(row.granted),
        };
        placements.insert(NodeId(u16::try_from(row.node).ok()?), placement);
    }
    let mut homes = Vec::new();
    for _ in 0..head.homes {
        let home: u16 = reader.take()?;
        homes.push((home != ANY).then_some(NodeId(home)));
    }
    let mut seats = Vec::new();
    for _ in 0..head.seats {
        seats.push(NodeId(reader.take()?));
    }
    let vm = Vm {
        least: share(head.least),
        most: share(head.most),
        desired: share(head.desired),
        seen: share(head.seen),
        block: u16::try_from(head.block).ok().filter(|block| *block > 0)?,
        phase: if head.running == 0 {
            VmPhase::Booting
        } else {
            VmPhase::Running
        },
        placements,
        homes,
        seats,
    };
    Some((VmId(head.vm), vm))
}

fn write_job(job: &Job, out: &mut Vec<u8>) {
    let (state, reason, short) = match job.state {
        JobState::Waiting => (0, 0, 0),
        JobState::Running => (1, 0, 0),
        JobState::RollingBack { reason } => (2, reason, 0),
        JobState::Finished { short, reason } => (3, reason, short),
        JobState::RolledBack { reason } => (4, reason, 0),
        JobState::Refused => (5, 0, 0),
        JobState::Stuck { reason } => (6, reason, 0),
    };
    let head = JobHead {
        wish: Op::from(Change::Ask {
            request: job.request,
            wish: job.wish,
        }),
        id: job.id.0,
        state,
        reason,
        short: if short > 0 { short } else { job.short },
        steps: len(&job.steps),
        done: job.done,
        short_reason: job.reason,
        abandoned: job.abandoned.into(),
        before: pair(job.before),
    };
    out.extend_from_slice(head.as_bytes());
    out.extend_from_slice(job.steps.as_bytes());
}

fn read_job(reader: &mut Reader<'_>) -> Option<Job> {
    let head: JobHead = reader.take()?;
    let Change::Ask { request, wish } = head.wish.change()? else {
        return None;
    };
    let mut steps: Vec<Step> = Vec::new();
    for _ in 0..head.steps {
        steps.push(reader.take()?);
    }
    let (reason, short) = (head.reason, head.short);
    Some(Job {
        id: JobId(head.id),
        request,
        wish,
        state: match head.state {
            0 => JobState::Waiting,
            1 => JobState::Running,
            2 => JobState::RollingBack { reason },
            3 => JobState::Finished { short, reason },
            4 => JobState::RolledBack { reason },
            5 => JobState::Refused,
            6 => JobState::Stuck { reason },
            _ => return None,
        },
        done: (head.done <= head.steps).then_some(head.done)?,
        steps,
        short,
        reason: head.short_reason,
        abandoned: head.abandoned != 0,
        before: share(head.before),
    })
}
