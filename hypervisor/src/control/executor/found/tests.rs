//! Guests that do what nobody has asked for.

use control_plane::optimise::Share;
use vmm_shared::control::{Outcome, Ticket};

use super::super::testing::{VM, World, at};
use super::*;

#[test]
fn a_vcpu_that_is_gone_is_noticed_when_nobody_asks_for_it() {
    let mut world = World::new();
    assert_eq!(world.found(), None);
    let record = world.record(2);
    record.ask(Order::Reclaim, Ticket::NO_JOB).expect("free");
    record.set_place(Place::Absent);
    assert_eq!(world.found(), None, "it is on its way");
    record.settle(Order::Reclaim, Outcome::Done);
    let gone = world.found().expect("it is gone");
    assert_eq!(
        gone,
        Change::GivenUp {
            vm: VM,
            vcpu: Some(VcpuId(2)),
            node: NodeId(1),
            slices: 0,
        }
    );
    world.append(gone);
    assert_eq!(world.found(), None);
    assert_eq!(world.cluster.vms()[&VM].granted(), Share::new(1, 4));
}

#[test]
fn a_vcpu_that_comes_for_no_job_is_the_vms() {
    let mut world = World::new();
    let record = world.record(1);
    let grant = Order::Grant(at(0, 1));
    record.ask(grant, Ticket::NO_JOB).expect("free");
    assert_eq!(world.found(), None, "it is on its way");
    record.set_place(Place::At(at(0, 1)));
    let node = NodeId(0);
    let got = Change::Got {
        vm: VM,
        vcpu: Some(VcpuId(1)),
        node,
        slices: 0,
    };
    assert_eq!(world.found(), Some(got), "the guest may use it");
    let share = Share::new(1, 0);
    let holder = node;
    world.append(Change::Lease {
        holder,
        node,
        share,
    });
    assert_eq!(world.found(), None, "the node has no core left");
    world.append(Change::Return {
        holder,
        node,
        share,
    });
    world.append(got);
    assert_eq!(world.found(), None);
    assert_eq!(world.cluster.vms()[&VM].granted(), Share::new(3, 4));
    world.cluster.check().expect("sound tables");
    // It declines: its core is taking it away.
    record.replace_order(Order::Withdraw(1));
    assert_eq!(world.found(), None);
    record.set_place(Place::Absent);
    record.settle(Order::Withdraw(1), Outcome::Refused(1));
    let gone = world.found();
    assert!(matches!(gone, Some(Change::GivenUp { .. })), "{gone:?}");
}
