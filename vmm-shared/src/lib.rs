//! What both sides of every boundary in Viaduct must agree on.
//!
//! The hypervisor, its guests' agents and the host tools all link this crate:
//! identifiers and addresses, the layout of shared regions, and the queues
//! that live in them. Nothing here knows which side it runs on, and nothing
//! found in a region is trusted: every offset and length read from one is
//! checked against the region before use.

#![cfg_attr(not(any(test, loom)), no_std)]
#![cfg_attr(test, expect(clippy::cast_possible_truncation, reason = "test data"))]

#[cfg(any(feature = "alloc", test, loom))]
extern crate alloc;

pub mod addr;
pub mod agent;
pub mod coherence;
pub mod control;
#[cfg(any(feature = "alloc", test, loom))]
pub mod gate;
mod lapped;
#[cfg(any(feature = "alloc", test, loom))]
pub mod log;
pub mod losses;
pub mod membership;
pub mod pieces;
pub mod pv;
pub mod region;
pub mod ring;
pub mod rpc;
pub mod selftest;
pub mod shm;
mod sync;
