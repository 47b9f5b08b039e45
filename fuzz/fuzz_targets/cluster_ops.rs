//! Operations on the cluster and their payloads, then the snapshot.
//!
//! The input is a list of operations, 32 bytes each, with a byte that says how
//! much of what follows is payload. Whatever they are, the tables stay
//! consistent, and a snapshot is the state. What is left of the input is
//! loaded as a snapshot itself.

#![no_main]

use control_plane::cluster::{Change, Cluster, Op, VmId, VmPhase, Wish};
use control_plane::optimise::Share;
use libfuzzer_sys::fuzz_target;
use vmm_shared::addr::NodeId;
use vmm_shared::log::{At, MemberId, StateMachine};
use zerocopy::FromBytes;

fn apply(cluster: &mut Cluster, op: &Op, payload: &[u8], position: u64) {
    let at = At {
        position,
        member: MemberId::new(0).expect("a small number"),
    };
    // Refusals are fine.
    let _ = cluster.apply(op, payload, at);
}

/// Something to work on: three nodes, and a VM with a job that waits.
fn start() -> Cluster {
    let mut cluster = Cluster::default();
    let vm = VmId(0);
    let size = Share::new(4, 16);
    let join = |node| Change::Join {
        node: NodeId(node),
        domain: node,
        size,
    };
    let changes = [
        join(0),
        join(1),
        join(2),
        Change::CreateVm {
            vm,
            most: size,
            least: Share::new(1, 1),
            block: 1,
        },
        Change::Phase {
            vm,
            phase: VmPhase::Running,
        },
        Change::Ask {
            request: 0,
            wish: Wish::Resize {
                vm,
                to: Share::new(2, 8),
            },
        },
    ];
    for change in changes {
        apply(&mut cluster, &Op::from(change), &[], 0);
    }
    cluster
}

fuzz_target!(|input: &[u8]| {
    let mut cluster = start();
    let mut rest = input;
    let mut position = 0;
    while let Ok((op, tail)) = Op::read_from_prefix(rest) {
        // Large nodes are honest but slow.
        let large = matches!(op.change(), Some(Change::Join { size, .. }) if size.slices > 1 << 12);
        let (&len, tail) = tail.split_first().unwrap_or((&0, &[]));
        let (payload, tail) = tail.split_at(tail.len().min(len.into()));
        if !large {
            apply(&mut cluster, &op, payload, position);
        }
        position += 1;
        rest = tail;
    }
    assert_eq!(cluster.check(), Ok(()));
    let mut bytes = Vec::new();
    assert_eq!(cluster.save(0, 1 << 16, &mut bytes), None);
    let mut copy = Cluster::default();
    assert_eq!(copy.load(0, &bytes), Ok(()));
    assert_eq!(copy, cluster);
    let mut stranger = Cluster::default();
    if stranger.load(0, input).is_ok() {
        assert_eq!(stranger.check(), Ok(()));
    }
});
