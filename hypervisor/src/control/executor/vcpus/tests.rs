//! A vCPU's steps, with cores that are the test's own hand; and where it matters
//! what the guest has seen, with the devices' node's own registers.

use core::sync::atomic::Ordering;

use control_plane::cluster::{Change, JobId, Wish};

use super::super::testing::{VM, World, at};
use super::*;
use crate::devices::Width;
use crate::devices::hotplug::{EJECT, INSERTED, REMOVING};
use crate::vm::elastic::{Units, take_answer, take_back};

impl World {
    /// A job of one step, about a vCPU.
    fn place(&mut self, vcpu: u16, to: Option<u16>) -> JobId {
        self.begin(Wish::PlaceVcpu {
            vm: VM,
            vcpu: VcpuId(vcpu),
            to: to.map(NodeId),
        })
    }

    fn settle(&self, vcpu: u16, outcome: Outcome) {
        let record = self.record(vcpu);
        record.settle(record.order().expect("an order"), outcome);
    }
}

/// What the devices' node has for the guest, and the cores besides.
struct Devices(Units);

impl Devices {
    fn new(world: &World) -> Self {
        let is_there = |vcpu| world.record(vcpu).place() != Some(Place::Absent);
        Self(Units::new(4, 1, is_there))
    }

    /// Answers who wants orders back.
    fn take_back(&mut self, world: &World) {
        for vcpu in 0..4 {
            let _ = take_back(&world.record(vcpu), &mut self.0, VcpuId(vcpu));
        }
    }

    /// Carries orders on, as cores do.
    fn carry_on(&mut self, world: &World) {
        for vcpu in 0..4 {
            let record = world.record(vcpu);
            match (record.order(), record.place()) {
                (Some(Order::Grant(at)), Some(Place::Absent)) => {
                    record.set_place(Place::At(at));
                    self.0.tell(vcpu, true);
                    self.0.registers.insert(vcpu);
                }
                (Some(Order::Reclaim), _) if self.0.tell(vcpu, true) => {
                    self.0.registers.ask_back(vcpu);
                }
                (Some(order @ (Order::Drop | Order::Withdraw(_) | Order::TakeBack)), _) => {
                    record.set_started(false);
                    record.set_place(Place::Absent);
                    record.settle(order, order.outcome());
                }
                _ => {}
            }
        }
    }

    fn serve(&mut self, world: &World) {
        self.take_back(world);
        self.carry_on(world);
    }

    /// The guest finds the first event.
    fn look(&mut self) {
        assert_ne!(self.0.registers.read(0, Width::Dword), u32::MAX);
    }

    /// The guest ends the event that it has found, and says no; or ejects.
    fn answer(&mut self, world: &World, vcpu: u16, flags: u8, event: u32) {
        let registers = &mut self.0.registers;
        let _ = registers.write(0, Width::Dword, vcpu.into());
        let ended = registers.write(4, Width::Byte, (flags | INSERTED | REMOVING).into());
        let _ = registers.write(8, Width::Dword, event);
        let said = registers.write(12, Width::Dword, 0x82);
        for effect in [ended, said] {
            let _ = take_answer(&world.record(vcpu), effect);
        }
        self.carry_on(world);
    }
}

#[test]
fn a_vcpu_has_come_when_the_guest_has_started_it() {
    let mut world = World::new();
    let job = world.place(1, Some(0));
    assert_eq!(world.drive(job), None);
    let record = world.record(1);
    // Core 0 has vCPU 0.
    assert_eq!(record.order(), Some(Order::Grant(at(0, 1))));
    assert_eq!((world.rings.get(), world.drive(job)), (1, None));
    record.set_place(Place::At(at(0, 1)));
    assert_eq!(world.drive(job), None, "the guest has not answered");
    world.settle(1, Outcome::Done);
    assert_eq!(world.drive(job), None, "nor started it");
    assert_eq!(record.order(), None, "and is not asked again");
    record.set_started(true);
    assert_eq!(world.drive(job), Some(StepResult::Done));
}

#[test]
fn who_takes_over_rings_for_an_order_that_stands() {
    let mut world = World::new();
    let job = world.place(2, Some(0));
    // The one before has died between the order and the ring.
    let ticket = ticket(&world.cluster.jobs()[&job], false);
    let order = Order::Move(at(0, 1));
    world.record(2).ask(order, ticket).expect("free");
    let before = world.control.vm().orders().load(Ordering::Relaxed);
    assert_eq!(world.drive(job), None);
    assert_eq!(world.record(2).order(), Some(order), "the one there was");
    assert_eq!(world.rings.get(), 1);
    assert_ne!(world.control.vm().orders().load(Ordering::Relaxed), before);
    world.record(2).set_place(Place::At(at(0, 1)));
    world.settle(2, Outcome::Done);
    assert_eq!(world.drive(job), Some(StepResult::Done));
    assert_eq!(world.rings.get(), 1);
}

#[test]
fn what_the_guest_refuses_is_told_with_its_reason() {
    let mut world = World::new();
    let job = world.place(2, None);
    assert_eq!(world.drive(job), None);
    assert_eq!(world.record(2).order(), Some(Order::Reclaim));
    world.settle(2, Outcome::Refused(0x82));
    let kept = StepResult::Short {
        slices: 0,
        reason: Reason::Kept(0x82).code(),
    };
    assert_eq!(world.drive(job), Some(kept));
    world.report(job, kept);
    // Another job asks anew: that outcome is not its.
    world.report(job, StepResult::Done);
    let job = world.place(2, None);
    assert_eq!(world.drive(job), None);
    assert_eq!(world.record(2).order(), Some(Order::Reclaim));
    world.record(2).set_place(Place::Absent);
    world.settle(2, Outcome::Done);
    assert_eq!(world.drive(job), Some(StepResult::Done));
}

#[test]
fn a_vcpu_that_the_guest_does_not_take_fails_the_step() {
    for (outcome, reason) in [
        (Outcome::Refused(1), Reason::Declined(1)),
        (Outcome::NoSuchCore, Reason::NoCore),
        (Outcome::Unable, Reason::Unable),
        (Outcome::Misplaced, Reason::Misplaced),
    ] {
        let mut world = World::new();
        let job = world.place(1, Some(1));
        assert_eq!(world.drive(job), None);
        world.settle(1, outcome);
        assert_eq!(world.drive(job), Some(failed(reason)));
    }
}

#[test]
fn undoing_waits_for_what_was_ordered_and_then_takes_it_back() {
    let mut world = World::new();
    let job = world.place(1, Some(0));
    assert_eq!(world.drive(job), None);
    world.append(Change::Cancel { job });
    assert_eq!(world.drive(job), None, "the grant stands");
    let record = world.record(1);
    record.set_place(Place::At(at(0, 1)));
    world.settle(1, Outcome::Done);
    assert_eq!(world.drive(job), None);
    assert_eq!(record.order(), Some(Order::Reclaim));
    record.set_place(Place::Absent);
    world.settle(1, Outcome::Done);
    assert_eq!(world.drive(job), Some(StepResult::Done));
}

#[test]
fn what_is_being_undone_is_wanted_back() {
    for (vcpu, to) in [(1, Some(0)), (2, None)] {
        let mut world = World::new();
        let mut devices = Devices::new(&world);
        let job = world.place(vcpu, to);
        assert_eq!(world.drive(job), None);
        devices.serve(&world);
        assert!(!world.record(vcpu).orders().is_recalled());
        world.append(Change::Cancel { job });
        assert_eq!(world.drive(job), None);
        assert!(world.record(vcpu).orders().is_recalled());
        assert_eq!(world.rings.get(), 2);
        devices.take_back(&world);
        if to.is_some() {
            assert_eq!(world.drive(job), None, "its core has to drop it");
        }
        devices.serve(&world);
        assert_eq!(world.drive(job), Some(StepResult::Done), "vCPU {vcpu}");
        assert!(!world.record(vcpu).is_busy());
    }
}

#[test]
fn what_the_guest_has_seen_is_waited_for() {
    for (vcpu, to) in [(1, Some(0)), (2, None)] {
        let mut world = World::new();
        let mut devices = Devices::new(&world);
        let job = world.place(vcpu, to);
        assert_eq!(world.drive(job), None);
        devices.serve(&world);
        devices.look();
        world.append(Change::Cancel { job });
        for _ in 0..3 {
            assert_eq!(world.drive(job), None);
            devices.serve(&world);
        }
        let event = if to.is_some() { 1 } else { 3 };
        devices.answer(&world, vcpu, 0, event);
        assert_eq!(world.drive(job), Some(StepResult::Done), "vCPU {vcpu}");
    }
}

#[test]
fn an_abandoned_job_leaves_the_vm_what_the_guest_may_have() {
    let reason = Reason::Unanswered.code();
    for (vcpu, to, ended) in [
        (1, Some(0), StepResult::Failed { reason }),
        (2, None, StepResult::Done),
    ] {
        let mut world = World::new();
        let mut devices = Devices::new(&world);
        let job = world.place(vcpu, to);
        assert_eq!(world.drive(job), None);
        devices.serve(&world);
        devices.look();
        let record = world.record(vcpu);
        let standing = record.order();
        world.append(Change::Abandon { job });
        for _ in 0..3 {
            assert_eq!(world.drive(job), None, "nobody has decided");
        }
        devices.serve(&world);
        assert_eq!(world.drive(job), Some(ended), "vCPU {vcpu}");
        assert_eq!(record.order(), standing, "the guest may answer yet");
        world.report(job, ended);
        let state = world.cluster.jobs()[&job].state();
        assert!(state.has_ended(), "{state:?}");
        let home = |world: &World| world.cluster.vms()[&VM].home(VcpuId(vcpu));
        assert!(home(&world).is_some(), "vCPU {vcpu} may be the guest's");
        assert_eq!(world.found(), None);
        // It ejects after all.
        devices.answer(&world, vcpu, EJECT, 3);
        let gone = world.found().expect("it is gone");
        world.append(gone);
        assert_eq!((home(&world), world.found()), (None, None));
    }
}

/// A job whose guest has given up vCPU 2, and is given it back: the grant stands.
fn giving_back() -> (World, Devices, JobId) {
    let mut world = World::new();
    let mut devices = Devices::new(&world);
    let job = world.place(2, None);
    assert_eq!(world.drive(job), None);
    devices.serve(&world);
    devices.look();
    devices.answer(&world, 2, EJECT, 3);
    world.append(Change::Cancel { job });
    assert_eq!(world.drive(job), None);
    devices.serve(&world);
    let record = world.record(2);
    assert!(matches!(record.order(), Some(Order::Grant(_))));
    assert!(matches!(record.place(), Some(Place::At(_))));
    (world, devices, job)
}

#[test]
fn what_is_given_back_and_not_seen_is_taken_back_when_the_job_is_abandoned() {
    let (mut world, mut devices, job) = giving_back();
    world.append(Change::Abandon { job });
    assert_eq!(world.drive(job), None);
    devices.take_back(&world);
    assert_eq!(world.drive(job), None, "its core has to drop it");
    devices.serve(&world);
    let ended = failed(Reason::Unanswered);
    assert_eq!(world.drive(job), Some(ended));
    world.report(job, ended);
    assert_eq!(world.cluster.vms()[&VM].home(VcpuId(2)), None);
    assert_eq!(world.found(), None);
}

#[test]
fn what_is_given_back_and_seen_is_the_vms_when_the_job_is_abandoned() {
    let (mut world, mut devices, job) = giving_back();
    devices.look();
    world.append(Change::Abandon { job });
    assert_eq!(world.drive(job), None);
    devices.serve(&world);
    assert_eq!(world.drive(job), Some(StepResult::Done));
    world.report(job, StepResult::Done);
    while world.cluster.jobs()[&job].current().is_some() {
        world.report(job, StepResult::Done);
    }
    assert!(world.cluster.vms()[&VM].home(VcpuId(2)).is_some());
    // The next job is not held up, whatever the guest does.
    let job = world.place(2, None);
    assert_eq!(world.drive(job), None, "the guest has to answer the first");
    world.append(Change::Cancel { job });
    assert_eq!(world.drive(job), Some(StepResult::Done));
}

#[test]
fn a_guest_that_ejects_what_it_is_given_back_has_declined_it() {
    let (world, mut devices, job) = giving_back();
    devices.answer(&world, 2, EJECT, 3);
    assert_eq!(world.drive(job), Some(failed(Reason::Declined(1))));
}

#[test]
fn an_abandoned_job_asks_for_nothing_more() {
    let mut world = World::new();
    let job = world.place(1, Some(0));
    assert_eq!(world.drive(job), None);
    let record = world.record(1);
    record.set_place(Place::At(at(0, 1)));
    world.settle(1, Outcome::Done);
    world.append(Change::Abandon { job });
    let reason = Reason::Unanswered.code();
    assert_eq!(world.drive(job), Some(StepResult::Failed { reason }));
    assert_eq!(record.order(), None);
    // A move is the nodes' to end.
    let mut world = World::new();
    let job = world.place(2, Some(0));
    assert_eq!(world.drive(job), None);
    world.append(Change::Abandon { job });
    for _ in 0..3 {
        assert_eq!(world.drive(job), None);
    }
    world.record(2).set_place(Place::At(at(0, 1)));
    world.settle(2, Outcome::Done);
    assert_eq!(world.drive(job), None);
    let back = world.record(2).order();
    assert!(matches!(back, Some(Order::Move(at)) if at.node == NodeId(1)));
}

#[test]
fn undoing_what_was_never_begun_is_nothing() {
    for (vcpu, to) in [(1, Some(0)), (2, Some(0)), (2, None)] {
        let mut world = World::new();
        let job = world.place(vcpu, to);
        world.append(Change::Cancel { job });
        assert_eq!(world.drive(job), Some(StepResult::Done), "vCPU {vcpu}");
        assert_eq!(world.rings.get(), 0);
    }
}

#[test]
fn who_was_put_out_orders_nothing() {
    let mut world = World::new();
    let job = world.place(1, Some(0));
    world.is_in = false;
    assert_eq!(world.drive(job), None);
    assert_eq!((world.record(1).order(), world.rings.get()), (None, 0));
}

#[test]
fn garbage_in_a_record_stops_nothing() {
    let mut world = World::new();
    let job = world.place(1, Some(0));
    let home = world.control.vcpu_home(VcpuId(1)).expect("there is room");
    for byte in 0..home.len() / 8 {
        let word = home.atomic_u64(byte * 8).expect("inside");
        word.store(u64::MAX, Ordering::Relaxed);
    }
    assert_eq!(world.drive(job), None);
}
