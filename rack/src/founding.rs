//! The first operations in a cluster's log: its nodes, its policy, and the VM
//! with its first placement.
//!
//! Nodes need to know what they give before they start, so the launcher asks
//! the scheduler and founds the log with the answer. From then on the log is
//! what counts, and the control role decides.

use std::collections::BTreeSet;

use control_plane::cluster::{Change, Cluster, Done, JobId, Op, Refusal, StepResult, VmId, Wish};
use control_plane::optimise::{Budget, Share};
use control_plane::place::plan::plan;
use control_plane::place::steps::steps;
use control_plane::policy::text;
use vmm_shared::addr::{LARGE_PAGE_SIZE, NodeId};
use vmm_shared::control::{BLOCK_SIZE, MAX_BLOCKS, NodeShare, PIECES_PER_BLOCK, vcpus_per_core};
use vmm_shared::log::{At, Clock, MemberId, StateMachine};
use zerocopy::IntoBytes;

use crate::error::RackError;
use crate::size::Size;
use crate::spec::{MOST_MEMORY, NodeSpec, RackSpec, Role, VmSpec};

/// The rack's one VM.
pub const VM: VmId = VmId(0);

/// The policy that a rack starts with.
pub const DEFAULT_POLICY: &str = include_str!("default-policy.toml");

/// How long the scheduler may take for the first placement.
const PLANNING: Budget = Budget::exact(1_000_000_000);

/// An operation of the log and its payload.
type Entry = (Op, Vec<u8>);

/// What a log begins with, and what each node gives by it.
#[derive(Debug)]
pub(crate) struct Founding {
    pub entries: Vec<Entry>,
    pub shares: Vec<NodeShare>,
}

/// Places a VM that [fits](RackSpec::check).
pub(crate) fn found<C: Clock>(
    rack: &RackSpec,
    vm: &VmSpec,
    clock: &C,
) -> Result<Founding, RackError> {
    let mut draft = Draft::default();
    for (node, spec) in (0..).map(NodeId).zip(&rack.nodes) {
        draft.change(Change::Join {
            node,
            domain: node.0,
            size: size(spec, rack, vm),
        })?;
    }
    let policy = text::parse(DEFAULT_POLICY).map_err(|why| RackError::NoPlacement {
        reason: why.to_string(),
    })?;
    draft.append(Change::LoadPolicy.into(), policy.as_bytes().to_vec())?;
    let create = |most: u64| {
        Op::from(Change::CreateVm {
            vm: VM,
            most: share(vm.max_vcpus, most),
            least: share(1, vm.memory.0),
            block: u16::try_from(PIECES_PER_BLOCK).expect("few"),
        })
    };
    let to = share(vm.vcpus, vm.memory.0);
    // What may come, vCPUs with their seats and memory, follows from where the
    // first is: so that is placed before the VM is made.
    let mut trial = draft.clone();
    trial.append(create(rack.memory(vm).0), Vec::new())?;
    let placed = trial.plan(to, clock)?;
    let on = |node: NodeId| {
        let its = placed.iter().find(|(id, _)| *id == node);
        its.map_or(Share::NONE, |(_, share)| *share)
    };
    let nodes = || (0..).map(NodeId).zip(&rack.nodes);
    let first: Vec<u32> = nodes().map(|(node, _)| on(node).vcpus).collect();
    let rooms = room(vm.max_vcpus, &first, rack);
    let given = |((node, spec), room): ((NodeId, &NodeSpec), &u32)| NodeShare {
        memory: u64::from(on(node).slices) * LARGE_PAGE_SIZE,
        cores: spec.cores,
        vcpus: on(node).vcpus,
        max_vcpus: few(*room),
        blocks: 0,
        room: size(spec, rack, vm).slices,
    };
    let mut shares: Vec<NodeShare> = nodes().zip(&rooms).map(given).collect();
    let limits: Vec<_> = rack.nodes.iter().map(|node| node.most_memory(vm)).collect();
    add_blocks(&mut shares, &limits, vm);
    let most = shares.iter().map(NodeShare::home).sum();
    draft.append(create(most), seats(&rooms))?;
    draft.place(to, &placed)?;
    Ok(Founding {
        shares,
        entries: draft.entries,
    })
}

fn few(vcpus: u32) -> u16 {
    u16::try_from(vcpus).expect("checked to be few")
}

/// How many vCPUs have their seat at which node, as the log has it.
fn seats(rooms: &[u32]) -> Vec<u8> {
    let pairs = (0_u16..).zip(rooms).map(|(node, room)| [node, few(*room)]);
    pairs.flatten().flat_map(u16::to_le_bytes).collect()
}

/// Room for `max` vCPUs, `vcpus` of which are there: each that may come later
/// goes where it makes the cores of a data node least crowded.
fn room(max: u32, vcpus: &[u32], rack: &RackSpec) -> Vec<u32> {
    let mut room = vcpus.to_vec();
    let is_data = |node: &usize| rack.nodes[*node].role == Role::Data;
    for _ in room.iter().sum::<u32>()..max {
        let crowded = |node: &usize| {
            let cores = u64::from(rack.nodes[*node].cores.max(1));
            (u64::from(room[*node]) + 1) * 1_000_000 / cores
        };
        match (0..room.len()).filter(is_data).min_by_key(crowded) {
            Some(node) => room[node] += 1,
            None => break,
        }
    }
    room
}

/// Room for memory that may come later: of each node as much as it can give, in
/// whole blocks, and one by one in turn if that is more than a VM can have.
fn add_blocks(shares: &mut [NodeShare], limits: &[Size], vm: &VmSpec) {
    let addresses = MOST_MEMORY.saturating_sub(vm.memory.0) / BLOCK_SIZE;
    let mut left = addresses.min(MAX_BLOCKS as u64);
    loop {
        let before = left;
        for (share, Size(limit)) in shares.iter_mut().zip(limits) {
            if left > 0 && share.home() + BLOCK_SIZE <= *limit {
                share.blocks += 1;
                left -= 1;
            }
        }
        if left == before {
            break;
        }
    }
}

/// So many vCPUs and bytes in the scheduler's units.
fn share(vcpus: u32, memory: u64) -> Share {
    let slices = u32::try_from(memory / LARGE_PAGE_SIZE).unwrap_or(u32::MAX);
    Share::new(vcpus, slices)
}

/// What a node can give: see [`vcpus_per_core`].
fn size(node: &NodeSpec, rack: &RackSpec, vm: &VmSpec) -> Share {
    let per_core = vcpus_per_core(vm.max_vcpus, rack.cores());
    match node.role {
        Role::Data => share(node.cores * per_core, node.most_memory(vm).0),
        Role::Control => Share::NONE,
    }
}

#[derive(Clone, Default)]
struct Draft {
    cluster: Cluster,
    entries: Vec<Entry>,
}

impl Draft {
    fn change(&mut self, change: Change) -> Result<Done, RackError> {
        self.append(change.into(), Vec::new())
    }

    fn append(&mut self, op: Op, payload: Vec<u8>) -> Result<Done, RackError> {
        let at = At {
            position: self.entries.len() as u64,
            member: MemberId::new(0).expect("the first"),
        };
        let done = self.cluster.apply(&op, &payload, at);
        self.entries.push((op, payload));
        done.map_err(|refusal: Refusal| RackError::NoPlacement {
            reason: refusal.to_string(),
        })
    }

    /// What each node is to give to the VM.
    fn plan<C: Clock>(&self, to: Share, clock: &C) -> Result<Vec<(NodeId, Share)>, RackError> {
        let wish = Wish::Resize { vm: VM, to };
        let planned = plan(&self.cluster, wish, PLANNING, clock);
        let planned = planned.map_err(|why| RackError::NoPlacement {
            reason: why.to_string(),
        })?;
        let part = planned.parts.first();
        Ok(self.first_give_most(part.map_or(&[][..], |part| &part.shares)))
    }

    /// A job that has ended: its VM boots with what it gives.
    fn place(&mut self, to: Share, shares: &[(NodeId, Share)]) -> Result<(), RackError> {
        let wish = Wish::Resize { vm: VM, to };
        let Done::Started { job } = self.change(Change::Ask { request: 0, wish })? else {
            return Ok(());
        };
        let steps = steps(&self.cluster, VM, shares).unwrap_or_default();
        self.append(Change::Plan { job }.into(), steps.as_bytes().to_vec())?;
        while let Some(index) = self.current(job) {
            let result = StepResult::Done;
            self.change(Change::Step { job, index, result })?;
        }
        Ok(())
    }

    /// The same among equal nodes, with the larger shares first: then the
    /// guest's APIC ids have fewer gaps.
    fn first_give_most(&self, shares: &[(NodeId, Share)]) -> Vec<(NodeId, Share)> {
        let size = |node: NodeId| self.cluster.nodes()[&node].size();
        let mut sorted: Vec<_> = shares.to_vec();
        let all = self.cluster.nodes().keys();
        for group in all.map(|node| size(*node)).collect::<BTreeSet<_>>() {
            let is_in = |(node, _): &&(NodeId, Share)| size(*node) == group;
            let mut equal: Vec<Share> = shares.iter().filter(is_in).map(|pair| pair.1).collect();
            // From behind: the largest is taken first.
            equal.sort_unstable();
            for pair in sorted.iter_mut().filter(|pair| size(pair.0) == group) {
                pair.1 = equal.pop().expect("as many as there are");
            }
        }
        sorted
    }

    fn current(&self, job: JobId) -> Option<u32> {
        let (index, _) = self.cluster.jobs().get(&job)?.current()?;
        Some(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::size::Size;
    use crate::spec::NodeSpec;
    use control_plane::cluster::Vm;
    use vmm_shared::addr::VcpuId;
    use vmm_shared::control::{BootConfig, first_places};
    use zerocopy::FromZeros;

    struct Wall(std::time::Instant);

    impl Clock for Wall {
        fn now_ns(&self) -> u64 {
            u64::try_from(self.0.elapsed().as_nanos()).expect("not for centuries")
        }
    }

    fn founded(rack: &RackSpec, vm: &VmSpec) -> Founding {
        rack.check(vm).expect("fits");
        found(rack, vm, &Wall(std::time::Instant::now())).expect("placed")
    }

    fn rack(nodes: &[(u32, Option<u64>)]) -> RackSpec {
        let node = |(cores, mib): &(u32, Option<u64>)| NodeSpec::data(*cores, mib.map(Size::mib));
        RackSpec {
            nodes: nodes.iter().map(node).collect(),
        }
    }

    fn vcpus(cores: &[u32], vcpus: u32) -> Vec<u32> {
        let nodes: Vec<_> = cores.iter().map(|cores| (*cores, None)).collect();
        let vm = VmSpec {
            vcpus,
            max_vcpus: vcpus,
            memory: Size::mib(1024),
        };
        let shares = founded(&rack(&nodes), &vm).shares;
        shares.iter().map(|share| share.vcpus).collect()
    }

    fn mib(limits: &[Option<u64>], memory: u64) -> Vec<u64> {
        let nodes: Vec<_> = limits.iter().map(|limit| (1, *limit)).collect();
        let vm = VmSpec {
            vcpus: 1,
            max_vcpus: 1,
            memory: Size::mib(memory),
        };
        let shares = founded(&rack(&nodes), &vm).shares;
        shares.iter().map(|share| share.memory >> 20).collect()
    }

    #[test]
    fn nodes_may_have_far_more_than_the_vm_wants() {
        let terabyte = Some(1 << 20);
        assert_eq!(mib(&[terabyte, terabyte], 300), [150, 150]);
    }

    #[test]
    fn the_log_begins_with_what_the_nodes_give() {
        let rack = rack(&[(2, None), (2, None)]).with_control(1).expect("few");
        let vm = VmSpec {
            vcpus: 3,
            max_vcpus: 3,
            memory: Size::mib(512),
        };
        let founding = founded(&rack, &vm);
        let cluster = applied(&founding);
        let placed = &cluster.vms()[&VM];
        assert_eq!(placed.desired(), placed.granted());
        for (node, given) in (0..).map(NodeId).zip(&founding.shares) {
            let granted = placed.granted_at(node);
            assert_eq!(granted.vcpus, given.vcpus);
            assert_eq!(u64::from(granted.slices) << 21, given.memory);
        }
        assert_eq!(numbers(placed), places(&founding));
        let control = founding.shares[2];
        assert_eq!((control.memory, control.cores, control.vcpus), (0, 1, 0));
    }

    /// The vCPUs of the tables and where they are.
    fn numbers(vm: &Vm) -> Vec<(VcpuId, NodeId)> {
        let homes = (0..).map(VcpuId).zip(vm.homes());
        homes
            .filter_map(|(vcpu, home)| Some((vcpu, (*home)?)))
            .collect()
    }

    /// The same of the hypervisors.
    fn places(founding: &Founding) -> Vec<(VcpuId, NodeId)> {
        let places = first_places(&founding.shares);
        places.map(|(vcpu, at)| (vcpu, at.node)).collect()
    }

    #[test]
    fn tables_and_hypervisors_count_vcpus_alike() {
        for (cores, vcpus, max_vcpus) in [
            (&[2, 2][..], 2, 4),
            (&[1, 3], 2, 4),
            (&[2, 2], 2, 12),
            (&[1, 1, 1], 1, 3),
            (&[4, 1], 5, 5),
            (&[3, 1, 2], 2, 6),
        ] {
            let nodes: Vec<_> = cores.iter().map(|cores| (*cores, None)).collect();
            let (rack, memory) = (rack(&nodes), Size::mib(512));
            let vm = VmSpec {
                vcpus,
                max_vcpus,
                memory,
            };
            let founding = founded(&rack, &vm);
            let cluster = applied(&founding);
            let placed = &cluster.vms()[&VM];
            assert_eq!(numbers(placed), places(&founding), "{cores:?}");
            let seats = (0..).zip(&founding.shares);
            let seats = seats.flat_map(|(node, share)| (0..share.max_vcpus).map(move |_| node));
            for (vcpu, node) in (0..).map(VcpuId).zip(seats) {
                assert_eq!(placed.seat(vcpu), Some(NodeId(node)));
            }
            assert_eq!(placed.most().vcpus, max_vcpus);
            let mut config = BootConfig::new_zeroed();
            config.nodes = u32::try_from(cores.len()).expect("few");
            config.shares[..cores.len()].copy_from_slice(&founding.shares);
            for (node, row) in cluster.nodes() {
                assert_eq!(config.places(*node), row.size().vcpus, "{cores:?}");
            }
        }
    }

    fn applied(founding: &Founding) -> Cluster {
        let mut cluster = Cluster::default();
        for ((op, payload), position) in founding.entries.iter().zip(0..) {
            let member = MemberId::new(1).expect("any");
            let done = cluster.apply(op, payload, At { position, member });
            assert!(done.is_ok(), "{done:?}");
        }
        assert_eq!(cluster.check(), Ok(()));
        cluster
    }

    #[test]
    fn vcpus_go_where_the_cores_are() {
        assert_eq!(vcpus(&[1, 1], 2), [1, 1]);
        assert_eq!(vcpus(&[2, 2], 3), [2, 1]);
        assert_eq!(vcpus(&[2, 2, 2], 6), [2, 2, 2]);
        assert_eq!(vcpus(&[1, 8], 9), [1, 8]);
        assert_eq!(vcpus(&[1, 3], 2), [1, 1]);
        assert_eq!(vcpus(&[1, 1, 1], 1), [1, 0, 0]);
        assert_eq!(vcpus(&[4], 2), [2]);
    }

    #[test]
    fn there_is_room_where_cores_are_free() {
        let room = |cores: &[u32], vcpus, max_vcpus| {
            let nodes: Vec<_> = cores.iter().map(|cores| (*cores, None)).collect();
            let vm = VmSpec {
                vcpus,
                max_vcpus,
                memory: Size::mib(1024),
            };
            let shares = founded(&rack(&nodes), &vm).shares;
            let room = shares.iter().map(|share| share.max_vcpus);
            room.collect::<Vec<_>>()
        };
        assert_eq!(room(&[2, 2], 1, 4), [2, 2]);
        assert_eq!(room(&[1, 3], 1, 4), [1, 3]);
        assert_eq!(room(&[1, 1], 4, 6), [3, 3]);
        assert_eq!(room(&[2], 2, 2), [2]);
    }

    #[test]
    fn there_is_room_for_the_memory_that_nodes_have_left() {
        let blocks = |limits: &[Option<u64>], memory| {
            let nodes: Vec<_> = limits.iter().map(|limit| (1, *limit)).collect();
            let vm = VmSpec {
                vcpus: 1,
                max_vcpus: 1,
                memory: Size::mib(memory),
            };
            let rack = rack(&nodes).with_control(1).expect("few");
            let shares = founded(&rack, &vm).shares;
            shares.iter().map(|share| share.blocks).collect::<Vec<_>>()
        };
        // Without a limit: as much again as the VM starts with.
        assert_eq!(blocks(&[None], 1024), [8, 0]);
        assert_eq!(blocks(&[Some(1024)], 1024), [0, 0]);
        assert_eq!(blocks(&[Some(1150)], 1024), [0, 0]);
        assert_eq!(blocks(&[Some(1152)], 1024), [1, 0]);
        assert_eq!(blocks(&[Some(512), Some(1024)], 1024), [0, 4, 0]);
        // More than a VM can have is shared evenly.
        let many = [Some(20 << 10), Some(20 << 10), Some(512)];
        assert_eq!(blocks(&many, 300), [127, 126, 3, 0]);
    }

    #[test]
    fn vcpus_share_cores_if_there_are_more() {
        assert_eq!(vcpus(&[1, 1], 4), [2, 2]);
    }

    #[test]
    fn every_vcpu_has_a_core_and_the_first_node_the_first_vcpu() {
        for cores in [&[1, 1][..], &[3, 1, 2], &[1, 7, 5, 64], &[9, 1, 1, 1, 1]] {
            let total: u32 = cores.iter().sum();
            for asked in 1..=total {
                let placed = vcpus(cores, asked);
                assert_eq!(placed.iter().sum::<u32>(), asked);
                assert!(placed[0] >= 1, "{cores:?} {asked}");
                let fits = placed
                    .iter()
                    .zip(cores)
                    .all(|(vcpus, cores)| vcpus <= cores);
                assert!(fits, "{cores:?} {asked}: {placed:?}");
            }
        }
    }

    #[test]
    fn memory_is_split_evenly() {
        assert_eq!(mib(&[None], 1024), [1024]);
        assert_eq!(mib(&[None, None], 1024), [512, 512]);
        assert_eq!(mib(&[None, None, None], 1024), [342, 342, 340]);
    }

    #[test]
    fn a_small_node_gives_all_and_the_others_the_rest() {
        assert_eq!(mib(&[Some(512), Some(512)], 1024), [512, 512]);
        assert_eq!(mib(&[Some(128), None], 1024), [128, 896]);
        assert_eq!(mib(&[None, Some(100), Some(200)], 1024), [724, 100, 200]);
        assert_eq!(
            mib(&[Some(342), Some(342), Some(340)], 1024),
            [342, 342, 340]
        );
    }
}
