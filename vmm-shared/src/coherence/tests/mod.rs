//! Tests of the protocol as a whole, against a model of nodes with page
//! tables, TLBs and an emulator's translations.

mod garbage;
pub(crate) mod modelled;
mod models;
mod progress;
mod scenarios;
mod simulation;
mod threads;
pub(crate) mod world;
