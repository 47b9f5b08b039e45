//! The control plane: which node gives which vCPU and which slice of memory.
//!
//! A library without a run loop, a clock or a line of hardware: the hypervisor
//! links it, hosts test it.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`cluster`] | the cluster as tables: a state machine for the replicated log |
//! | [`policy`] | constraints that an operator declares, by name |
//! | [`optimise`] | the optimiser, with a proven gap and a time budget |
//! | [`place`] | drafts, plans and explanations: from a wish to steps |
//! | [`role`] | what the control role does: operators' requests, jobs |
//!
//! # How the hypervisors use it
//!
//! Every hypervisor has a [`Replica`](vmm_shared::log::Replica) of a
//! [`Cluster`](cluster::Cluster) and reads it at leisure: where a vCPU lives
//! ([`Vm::home`](cluster::Vm::home)), who holds a slice
//! ([`Node::slices`](cluster::Node::slices)), what may be given out locally (the
//! node's own [pool](cluster::Holder::Pool), which it fills and empties with
//! [`Change::Lease`](cluster::Change::Lease) and `Return`).
//!
//! The control role is whoever appended
//! [`Change::TakeOver`](cluster::Change::TakeOver) last. It does, again and
//! again, what [`todo`](place::plan::todo) says of its replica ([`Role::turn`](role::Role::turn)):
//!
//! ```text
//! Plan(job)             plan(cluster, wish, budget, clock)
//!                         Ok:  append Plan::into_op(job)
//!                         Err: append Change::Refuse { job }, keep the reason
//! Execute{job, i, step} unless step.is_bookkeeping(): make it so, by RPC to
//!                         the nodes it names; wait for the guest where it has
//!                         a say
//!                       append Change::Step { job, index: i, result }
//! ```
//!
//! Nothing of this is remembered outside of the tables. A control role that
//! was killed is replaced by one that goes on at the same step; steps say what
//! shall be, so doing one twice does no harm. Before it executes an `Add`, a
//! `Remove` or a `Move` of slices, the executor finds in the tables which they
//! are: the lowest leased ones are taken into use, the highest ones in use
//! are given up. Two control roles that think that they are in charge do no
//! harm either: of two plans for one job, or two results of one step, the
//! second is refused by every replica.
//!
//! # How the console uses it
//!
//! It sends a [`Wish`](cluster::Wish), which is appended as
//! [`Change::Ask`](cluster::Change::Ask); the answer names the job that was
//! started or joined, or the [`Refusal`](cluster::Refusal) with its stable
//! code. `--dry-run` is [`plan`](fn@place::plan::plan) without appending
//! anything: steps, [`Effort`](place::plan::Effort), cost, bound and
//! explanation. `explain` is the same for the wish of a
//! [rebalance](cluster::Wish::Rebalance). A job's progress is its row
//! ([`Job`](cluster::Job)); events and audit lines are the
//! [`journal`](cluster::journal). A policy's text is parsed where the console
//! runs (`policy::text::parse`, feature `text`), and its bytes are the
//! payload of [`Change::LoadPolicy`](cluster::Change::LoadPolicy).

#![cfg_attr(not(any(test, feature = "text")), no_std)]

extern crate alloc;

pub mod cluster;
pub mod optimise;
pub mod place;
pub mod policy;
pub mod role;
