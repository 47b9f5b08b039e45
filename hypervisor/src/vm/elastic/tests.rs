//! What the devices' node says to who wants an order back, and makes of the
//! guest's answers.
#![expect(unsafe_code, reason = "a leaked buffer as the record")]

use core::ptr::NonNull;

use vmm_shared::addr::NodeId;
use vmm_shared::control::{Standing, Ticket};
use vmm_shared::shm::SharedMem;

use super::*;
use crate::devices::hotplug::Hotplug as Registers;

const VCPU: VcpuId = VcpuId(1);
const OWN: Ticket = Ticket::new(8);
const HERE: Location = Location {
    node: NodeId(0),
    core: 1,
};

fn record(place: Place) -> VcpuRecord {
    let memory = Box::leak(Box::new([0_u64; 16]));
    // SAFETY: leaked, aligned, and reached through the window only.
    let window = unsafe { SharedMem::new(NonNull::from(memory).cast(), 128) };
    let record = VcpuRecord::new(window).expect("large enough");
    record.set_place(place);
    record
}

/// Three vCPUs, of which the guest has the first, and the second if `has_it`.
fn units(has_it: bool) -> Units {
    Units::new(3, 1, |unit| unit == 0 || unit == VCPU.0 && has_it)
}

/// The guest finds the first event.
fn look(units: &mut Units) {
    let first = units.registers.read(0, Width::Dword);
    assert_eq!(first, u32::from(VCPU.0));
}

fn end_event(registers: &mut Registers) {
    let events = hotplug::INSERTED | hotplug::REMOVING;
    let _ = registers.write(4, Width::Byte, events.into());
}

#[test]
fn a_grant_is_taken_back_until_the_guest_has_seen_it() {
    for place in [Place::Absent, Place::New(HERE), Place::At(HERE)] {
        let (record, mut units) = (record(place), units(false));
        record.ask(Order::Grant(HERE), OWN).expect("free");
        assert!(
            !take_back(&record, &mut units, VCPU),
            "nobody wants it back"
        );
        record.orders().recall(OWN);
        assert_eq!(
            take_back(&record, &mut units, VCPU),
            place != Place::New(HERE),
            "its core makes it"
        );
        match place {
            Place::At(_) => {
                let order = record.order().expect("its core has to drop it");
                assert_eq!(order, Order::TakeBack);
                assert!(!take_back(&record, &mut units, VCPU), "said once");
                // What the core does.
                record.settle(order, order.outcome());
            }
            Place::New(_) => {
                assert_eq!(record.orders().standing_for([OWN; 2]), Standing::Own);
                continue;
            }
            _ => {}
        }
        assert_eq!(record.outcome_of(OWN), Some(Outcome::Recalled));
    }
    for ends_it in [false, true] {
        let (record, mut units) = (record(Place::At(HERE)), units(false));
        record.ask(Order::Grant(HERE), OWN).expect("free");
        units.tell(VCPU.0, true);
        units.registers.insert(VCPU.0);
        look(&mut units);
        if ends_it {
            end_event(&mut units.registers);
        }
        record.orders().recall(OWN);
        assert!(take_back(&record, &mut units, VCPU));
        assert_eq!(record.orders().standing_for([OWN; 2]), Standing::Seen);
        assert_eq!(record.order(), Some(Order::Grant(HERE)));
        assert!(!take_back(&record, &mut units, VCPU), "said once");
        assert!(units.is_told(VCPU.0) && units.registers.is_present(VCPU.0));
    }
}

#[test]
fn what_is_to_go_is_left_until_the_guest_has_seen_that() {
    for (has_seen, outcome) in [(false, Some(Outcome::Recalled)), (true, None)] {
        let (record, mut units) = (record(Place::At(HERE)), units(true));
        record.ask(Order::Reclaim, OWN).expect("free");
        units.tell(VCPU.0, true);
        units.registers.ask_back(VCPU.0);
        if has_seen {
            look(&mut units);
        }
        record.orders().recall(OWN);
        assert!(take_back(&record, &mut units, VCPU));
        assert_eq!(record.outcome_of(OWN), outcome);
        assert_eq!(units.is_told(VCPU.0), has_seen);
        assert!(units.registers.is_present(VCPU.0));
    }
}

#[test]
fn a_guest_that_ejects_what_it_is_offered_refuses_it() {
    let ejected = HotplugEffect::Ejected(VCPU.0);
    for (order, outcome) in [
        (Order::Grant(HERE), Outcome::Refused(FAILED)),
        (Order::Reclaim, Outcome::Done),
    ] {
        let record = record(Place::At(HERE));
        record.ask(order, OWN).expect("free");
        assert!(take_answer(&record, ejected), "its core drops it");
        let order = record.order().expect("for the core");
        record.settle(order, order.outcome());
        assert_eq!(record.outcome_of(OWN), Some(outcome));
    }
    let record = record(Place::At(HERE));
    assert!(take_answer(&record, ejected), "unasked");
    assert_eq!(record.order(), Some(Order::Drop));
}

#[test]
fn a_guests_answer_ends_the_order() {
    for (order, effect, outcome) in [
        (
            Order::Grant(HERE),
            HotplugEffect::Accepted(VCPU.0),
            Outcome::Done,
        ),
        (
            Order::Reclaim,
            HotplugEffect::Kept(VCPU.0, 0x82),
            Outcome::Refused(0x82),
        ),
    ] {
        let record = record(Place::At(HERE));
        record.ask(order, OWN).expect("free");
        assert!(!take_answer(&record, effect));
        assert_eq!(record.outcome_of(OWN), Some(outcome));
    }
    let record = record(Place::At(HERE));
    record.ask(Order::Grant(HERE), OWN).expect("free");
    assert!(take_answer(&record, HotplugEffect::Declined(VCPU.0, 7)));
    assert_eq!(record.order(), Some(Order::Withdraw(7)));
    assert!(!take_answer(&record, HotplugEffect::Kept(VCPU.0, 7)));
}
