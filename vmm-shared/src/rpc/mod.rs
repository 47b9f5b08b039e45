//! Calls between nodes, over queues in shared memory.
//!
//! Every node has one inbox, a [`queue`] with one producer number per peer.
//! Requests, replies and cancellations are messages in it; an [`Endpoint`] is
//! a node's side of all its calls.
//!
//! ```text
//!  caller                        peer's inbox            callee
//!  call() ── request(id) ──────▶ [ . . r . ] ──────────▶ poll() → Request
//!  poll() ◀───────────────────── [ . a . . ] ◀── reply(id) ── answer()
//!           own inbox
//! ```
//!
//! What a caller can count on: a call is carried out **at most once**, and its
//! caller learns of an answer, a refusal or a time-out, never nothing. A peer
//! that is absent, asleep or evicted costs a time-out. What a peer writes is
//! not trusted: a message of another version, of an incarnation that is no
//! member, of an impossible length, or an answer to no call, is counted and
//! dropped.

#[cfg(not(loom))]
pub mod console;
mod endpoint;
mod message;
#[cfg(all(test, loom))]
mod models;
pub mod queue;
mod wait;

pub use endpoint::{CallId, CallResult, Endpoint, Refused, RpcError};
pub use message::{BODY_BYTES, Header, Kind, PROTOCOL, Request};
pub use queue::{Message, Producer, Queue, QueueError, QueueSizes};
pub use wait::{Doorbell, Waiter};
