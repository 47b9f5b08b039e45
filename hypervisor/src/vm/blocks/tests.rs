//! What the devices' node says to who wants a block's order back.
#![expect(unsafe_code, reason = "a leaked buffer as the record")]

use core::ptr::NonNull;

use vmm_shared::addr::NodeId;
use vmm_shared::control::{Standing, Ticket};
use vmm_shared::shm::SharedMem;

use super::*;
use crate::devices::Width;

const BLOCK: BlockId = BlockId(1);
const OWN: Ticket = Ticket::new(8);
const GRANT: BlockOrder = BlockOrder::Grant(NodeId(0));

/// A block in this state, with an order that is wanted back.
fn recalled(state: BlockState, order: BlockOrder) -> BlockRecord {
    let memory = Box::leak(Box::new([0_u64; 8]));
    // SAFETY: leaked, aligned, and reached through the window only.
    let window = unsafe { SharedMem::new(NonNull::from(memory).cast(), 64) };
    let record = BlockRecord::new(window).expect("large enough");
    record.set_state(state);
    record.ask(order, OWN).expect("free");
    record.orders().recall(OWN);
    record
}

/// The guest has been told of the block; and has looked, if it `has_seen` that.
fn told(order: BlockOrder, has_seen: bool) -> Units {
    let mut units = Units::new(2, 0, |unit| unit == BLOCK.0 && order == BlockOrder::Reclaim);
    units.tell(BLOCK.0, true);
    match order {
        BlockOrder::Reclaim => units.registers.ask_back(BLOCK.0),
        _ => units.registers.insert(BLOCK.0),
    }
    if has_seen {
        let first = units.registers.read(0, Width::Dword);
        assert_eq!(first, u32::from(BLOCK.0));
    }
    units
}

#[test]
fn what_the_guest_has_not_seen_is_taken_back() {
    let record = recalled(BlockState::Absent, GRANT);
    let mut units = Units::new(2, 0, |_| false);
    assert!(take_back(&record, &mut units, BLOCK));
    assert_eq!(record.outcome_of(OWN), Some(Outcome::Recalled));

    let record = recalled(BlockState::Offered, GRANT);
    let mut units = told(GRANT, false);
    assert!(take_back(&record, &mut units, BLOCK));
    let order = record.order().expect("nodes have to unmap it");
    assert_eq!(record.state(), Some(BlockState::Leaving));
    assert_eq!(order.outcome(), Outcome::Recalled);
    assert!(!units.registers.is_present(BLOCK.0) && !units.is_told(BLOCK.0));
    assert!(!take_back(&record, &mut units, BLOCK), "said once");

    let record = recalled(BlockState::Used, BlockOrder::Reclaim);
    assert!(take_back(
        &record,
        &mut told(BlockOrder::Reclaim, false),
        BLOCK
    ));
    assert_eq!(record.outcome_of(OWN), Some(Outcome::Recalled));
    assert_eq!(record.state(), Some(BlockState::Used));
}

#[test]
fn what_it_has_seen_stands() {
    for (state, order) in [
        (BlockState::Offered, GRANT),
        (BlockState::Used, BlockOrder::Reclaim),
    ] {
        let (record, mut units) = (recalled(state, order), told(order, true));
        assert!(take_back(&record, &mut units, BLOCK));
        assert_eq!(record.orders().standing_for([OWN; 2]), Standing::Seen);
        assert_eq!((record.order(), record.state()), (Some(order), Some(state)));
        assert!(units.registers.is_present(BLOCK.0) && units.is_told(BLOCK.0));
        assert!(!take_back(&record, &mut units, BLOCK), "said once");
    }
}
