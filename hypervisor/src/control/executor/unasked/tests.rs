//! Guests that do what nobody has asked for.

use control_plane::optimise::Share;
use vmm_shared::control::{Order, Outcome, Ticket};

use super::super::testing::{VM, World};
use super::*;

#[test]
fn a_vcpu_that_is_gone_is_noticed_when_nobody_asks_for_it() {
    let mut world = World::new();
    assert_eq!(world.given_up(), None);
    let record = world.record(2);
    record.ask(Order::Reclaim, Ticket::NO_JOB).expect("free");
    record.set_place(Place::Absent);
    assert_eq!(world.given_up(), None, "it is on its way");
    record.settle(Order::Reclaim, Outcome::Done);
    let gone = world.given_up().expect("it is gone");
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
    assert_eq!(world.given_up(), None);
    assert_eq!(world.cluster.vms()[&VM].granted(), Share::new(1, 4));
}
