//! The cases, by group. Those that may end the node come last.

mod clock;
mod debug;
mod events;
mod exceptions;
mod instructions;
mod interrupts;
mod invalid;
mod maps;
mod nested;
pub(crate) mod nodes;
mod registers;
mod routing;
mod state;
mod tlb;
mod xsetbv;

use hypervisor::arch::time::Clocks;

use crate::suite::Suite;

/// Adds all that need one node.
pub(crate) fn add(suite: &mut Suite, clocks: Clocks) {
    instructions::add(suite);
    registers::add(suite);
    exceptions::add(suite);
    maps::add(suite);
    xsetbv::add(suite);
    state::add(suite);
    invalid::add(suite);
    events::add(suite);
    interrupts::add(suite);
    nested::add(suite);
    tlb::add(suite);
    clock::add(suite, clocks);
    debug::add(suite);
    routing::add(suite);
}
