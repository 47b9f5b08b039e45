//! The life of a node with the role `control`: it joins, and decides.
//!
//! It gives the VM nothing, so it takes part in no proof but those at boot, and
//! may end and come back while the VM runs.

use alloc::boxed::Box;
use alloc::string::ToString;
use alloc::vec::Vec;
use core::convert::Infallible;
use core::sync::atomic::Ordering;

use vmm_shared::addr::NodeId;
use vmm_shared::control::{BootConfig, NodeState, VmState};

use super::{Reason, START_NAP_US, trial};
use crate::arch::io::{self, NodeExit};
use crate::arch::pci::Window;
use crate::arch::time::Clocks;
use crate::arch::{cpu, descriptors};
use crate::control::Control;
use crate::fabric::keeper::Held;
use crate::fabric::{self, Fabric};

/// Whether this node has that role.
pub(super) fn is_for(windows: &[Window], node: NodeId) -> bool {
    let regions = fabric::find_regions(windows);
    // What is wrong with them is said where they are needed.
    regions.is_ok_and(|regions| regions.control.boot_config().control_nodes().contains(node))
}

/// Joins the rack and decides until the end.
pub(super) fn run(
    clocks: Clocks,
    cores: Vec<u8>,
    windows: &[Window],
    node: NodeId,
) -> Result<Infallible, Reason> {
    let regions = fabric::find_regions(windows).map_err(|why| why.to_string())?;
    trial::check_caching(windows)?;
    let config = Box::new(regions.control.boot_config());
    let joined = Fabric::join(node, regions.control, windows, cores, &clocks, &config);
    let fabric = Box::new(joined.map_err(|why| why.to_string())?);
    if !has_started(&fabric) {
        trial::pass(&fabric, &config, &clocks)?;
    }
    fabric.set_state(NodeState::Ready);
    cpu::interrupts_on();
    while !has_started(&fabric) {
        sleep(&clocks, clocks.ticks(START_NAP_US));
    }
    fabric.start_watch();
    decide(&fabric, &config, &clocks)
}

fn has_started(fabric: &Fabric) -> bool {
    // Acquire: what node 0 has written before is visible.
    let state = fabric.control().vm_state().load(Ordering::Acquire);
    VmState::from_raw(state) != Some(VmState::NotStarted)
}

/// Sleeps for so long, or until the doorbell rings.
fn sleep(clocks: &Clocks, ticks: u64) {
    cpu::interrupts_off();
    if !descriptors::doorbell_rung() {
        clocks.set_timer(ticks);
        cpu::sleep_until_interrupt();
    }
    cpu::interrupts_on();
}

fn decide(fabric: &Fabric, config: &BootConfig, clocks: &Clocks) -> ! {
    let mut control = Control::default();
    loop {
        fabric.attend();
        if descriptors::take_doorbell() {
            fabric.look_for_losses();
        }
        if fabric.held() == Some(Held::Fenced) {
            log::error!("the other nodes have put this one out, as it gave no sign of life");
            io::exit(NodeExit::Fenced)
        }
        control.attend(fabric, config);
        let due = fabric.next_due().unwrap_or(u64::MAX);
        sleep(clocks, due.saturating_sub(cpu::rdtsc()));
    }
}
