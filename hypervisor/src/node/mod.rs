//! What a node does once its cores run: join the rack, build its part of the
//! VM, run vCPUs until it stops.
//!
//! ```text
//!   every node        node 0, which also owns the devices
//!   ──────────        ──────────────────────────────────
//!   Joined            Joined
//!   proofs, clock <─> proofs, answers until all are Ready: see `trial`
//!   build, Ready      build, load the guest, Ready
//!   wait ...........> VM is Running
//!   run vCPUs         run vCPUs
//! ```
//!
//! A VM that has lost a node that it needs is *frozen*: its vCPUs stay where
//! they are, and its nodes go on giving signs of life until the operator ends
//! the rack. A node that was put out ends at once.

mod build;
mod deciding;
mod trial;

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use vmm_shared::addr::{Hpa, Location, NodeId};
use vmm_shared::control::{NodeState, VmState};

use crate::arch::boot::Machine;
use crate::arch::io::{self, NodeExit};
use crate::arch::svm::bitmaps::PermissionMaps;
use crate::arch::svm::switch;
use crate::arch::time::Clocks;
use crate::arch::{apic, boot, cpu, descriptors};
use crate::fabric::keeper::Held;
use crate::loader::GuestEntry;
use crate::vcpu::exit::StopReason;
use crate::vcpu::host_core::{Core, CoreParts};
use crate::vm::{DEVICE_NODE, Vm};

/// The most that a node sleeps before it looks whether the VM has started.
const START_NAP_US: u64 = 10_000;

/// Why a node can't start, for its log.
type Reason = String;

/// Everything that the cores of this node share.
pub struct Node {
    clocks: Clocks,
    vm: Vm,
    /// Root of the nested tables.
    nested_root: Hpa,
    maps: PermissionMaps,
    /// How vCPU 0 enters the guest, on the node that has it.
    entry: Option<GuestEntry>,
    /// APIC ids of the cores; a core's number is its place here.
    cores: Vec<u8>,
}

/// Takes the boot core through the rest of its life.
pub fn run(machine: Machine) -> ! {
    let Machine {
        clocks,
        cores,
        windows,
        node,
    } = machine;
    if deciding::is_for(&windows, node) {
        let Err(reason) = deciding::run(clocks, cores, &windows, node);
        fail(&reason)
    }
    match build::build(clocks, cores, &windows, node) {
        Ok(node) => {
            let node: &'static Node = Box::leak(Box::new(node));
            node.vm.fabric().set_state(NodeState::Ready);
            if node.vm.fabric().node() == DEVICE_NODE {
                node.vm.fabric().set_vm_state(VmState::Running);
                wake_all_nodes(node);
            } else {
                wait_until_running(node);
            }
            node.vm.fabric().start_watch();
            boot::release_other_cores(Box::leak(Box::new(move || run_core(node))));
            run_core(node)
        }
        Err(reason) => fail(&reason),
    }
}

fn fail(reason: &Reason) -> ! {
    log::error!("this node cannot start: {reason}");
    io::exit(NodeExit::BootFailure)
}

/// Waits for node 0, which may have to wait for others.
fn wait_until_running(node: &Node) {
    let state = node.vm.fabric().control().vm_state();
    // Acquire: what node 0 has loaded is visible.
    let has_started =
        || VmState::from_raw(state.load(Ordering::Acquire)) != Some(VmState::NotStarted);
    cpu::interrupts_on();
    while !has_started() {
        node.vm.nap(START_NAP_US, has_started);
    }
    cpu::interrupts_off();
}

/// Ends the other nodes' wait.
fn wake_all_nodes(node: &Node) {
    let nodes = node.vm.fabric().control().boot_config().nodes;
    for other in (1..u16::try_from(nodes).unwrap_or(0)).map(NodeId) {
        node.vm.fabric().kick(Location {
            node: other,
            core: 0,
        });
    }
}

/// Runs the vCPUs that are sent to the calling core.
pub fn run_core(node: &'static Node) -> ! {
    let core = node.cores.iter().position(|id| *id == apic::id());
    let Some(core) = core.and_then(|core| u16::try_from(core).ok()) else {
        cpu::park()
    };
    if let Err(why) = switch::enable() {
        log::error!("core {core}: {why}");
        io::exit(NodeExit::BootFailure);
    }
    let here = Location {
        node: node.vm.fabric().node(),
        core,
    };
    // What others sent before this node could hear is waiting.
    descriptors::set_doorbell();
    cpu::interrupts_on();
    let reason = Core::new(CoreParts {
        here,
        vm: &node.vm,
        clocks: &node.clocks,
        maps: node.maps,
        root: node.nested_root,
        entry: node.entry.as_ref(),
    })
    .run();
    stop(node, reason)
}

/// The first core of a node whose VM is frozen: answers for the node.
fn keep(node: &Node) -> ! {
    let fabric = node.vm.fabric();
    loop {
        fabric.attend();
        if descriptors::take_doorbell() {
            fabric.look_for_losses();
        }
        if fabric.held() == Some(Held::Fenced) {
            stop(node, StopReason::Held(Held::Fenced));
        }
        // Others may have to get something back before they can stand still.
        node.vm.serve_revocations();
        cpu::interrupts_off();
        if !descriptors::doorbell_rung() {
            if let Some(due) = fabric.next_due() {
                node.clocks.set_timer(due.saturating_sub(cpu::rdtsc()));
            }
            cpu::sleep_until_interrupt();
        }
        cpu::interrupts_on();
    }
}

fn stop(node: &Node, reason: StopReason) -> ! {
    // A node that has been put out says nothing about a VM that goes on
    // without it, nor does anybody about one that is frozen.
    let held = node.vm.fabric().held().map(StopReason::Held);
    let state = match held.unwrap_or(reason) {
        StopReason::Held(Held::Frozen) if apic::id() == node.cores[0] => keep(node),
        StopReason::Held(Held::Frozen) => cpu::park(),
        StopReason::Held(Held::Fenced) => {
            log::error!("the other nodes have put this one out, as it gave no sign of life");
            io::exit(NodeExit::Fenced)
        }
        StopReason::PowerOff => VmState::PoweredOff,
        StopReason::Reset => VmState::Reset,
        StopReason::Exit { value } => {
            let record = node.vm.fabric().control().vm();
            // The state is stored after it, with Release.
            record.exit_value().store(value.into(), Ordering::Relaxed);
            VmState::Exited
        }
        _ => {
            log::error!("the VM has crashed: {reason:x?}");
            VmState::Crashed
        }
    };
    node.vm.fabric().set_vm_state(state);
    node.vm.fabric().set_state(NodeState::Stopped);
    io::exit(NodeExit::Done)
}
