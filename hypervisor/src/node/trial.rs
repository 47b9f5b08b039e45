//! What a node goes through before it may build its part of the VM: the
//! proofs of its platform and the comparison of clocks.
//!
//! ```text
//!   node 0                             node n
//!   ──────                             ──────
//!   answers and helps <──────────────> measures its clock, proves
//!   proves, node 1 helps <───────────> waits for the verdict, node 1 helps
//!   verdict on instruction fetch ────> goes on
//!   answers until all are Ready
//! ```
#![expect(unsafe_code, reason = "executes the proof's code")]

use alloc::format;
use alloc::string::String;
use core::sync::atomic::Ordering;

use vmm_shared::addr::{Hpa, NodeId};
use vmm_shared::control::{BootConfig, NodeState};

use super::Reason;
use crate::arch::pci::{Window, WindowKind};
use crate::arch::time::Clocks;
use crate::arch::{cpu, mtrr, paging};
use crate::fabric::proof::{Fetch, Pages};
use crate::fabric::{Fabric, clock};
use crate::vm::DEVICE_NODE;

/// Rates of clocks that exist.
const POSSIBLE_KHZ: core::ops::Range<u32> = 100_000..20_000_000;
/// The node that helps node 0 with its proofs.
const FIRST_HELPER: NodeId = NodeId(1);

/// What a node knows when it is through.
pub(super) struct Passed {
    pub time: GuestTime,
    /// Whether instruction fetch is coherent on all nodes.
    pub fetch: Fetch,
}

/// The guest's clock as this node sees it.
pub(super) struct GuestTime {
    pub khz: u32,
    pub offset: u64,
    pub boot_wall_ns: u64,
}

/// Checks that what nodes share is cached as memory is.
pub(super) fn check_caching(windows: &[Window]) -> Result<(), Reason> {
    let regions = windows
        .iter()
        .filter(|window| matches!(window.kind, WindowKind::Region));
    for window in regions {
        if !mtrr::is_write_back(&window.range) {
            let at = window.range.start;
            return Err(format!(
                "this host cannot take part: its processors do not cache the shared region at {at} \
                 write-back"
            ));
        }
    }
    Ok(())
}

/// Takes this node through it. On node 0 that lasts until all others are
/// ready; the launcher ends the rack if that takes too long.
pub(super) fn pass(
    fabric: &Fabric,
    config: &BootConfig,
    clocks: &Clocks,
) -> Result<Passed, Reason> {
    if fabric.node() == DEVICE_NODE {
        pass_first(fabric, config, clocks)
    } else {
        pass_other(fabric, config)
    }
}

/// Node 0 starts the guest's clock and tells the others.
fn pass_first(fabric: &Fabric, config: &BootConfig, clocks: &Clocks) -> Result<Passed, Reason> {
    let record = fabric.control().vm();
    let now = cpu::rdtsc();
    record
        .tsc_khz()
        .store(clocks.tsc_khz.into(), Ordering::Relaxed);
    // Release: the rate is visible to who sees the offset.
    record
        .tsc_offset()
        .store(now.wrapping_neg(), Ordering::Release);

    let others = fabric.nodes().skip(1);
    let serve_until = |is_so: &dyn Fn(NodeId) -> bool| {
        while !others.clone().all(is_so) {
            clock::answer(fabric);
            others.clone().for_each(|node| fabric.proof(node).help());
            core::hint::spin_loop();
        }
    };
    serve_until(&|node| fabric.proof(node).outcome().is_some());
    let mut fetch = Fetch::Coherent;
    if others.clone().next().is_some() {
        let own = prove(&fabric.proof(fabric.node()))?;
        let is_coherent = |node| fabric.proof(node).outcome() == Some(Fetch::Coherent);
        if own == Fetch::Stale || !others.clone().all(is_coherent) {
            fetch = Fetch::Stale;
        }
    }
    record.fetch().store(fetch as u64, Ordering::Release);
    serve_until(&|node| {
        let state = fabric.control().node_state(node);
        state.map(|state| state.load(Ordering::Acquire)) == Some(NodeState::Ready as u32)
    });
    let since_start_ns = u128::from(now) * 1_000_000 / u128::from(clocks.tsc_khz);
    let since_start_ns = u64::try_from(since_start_ns).unwrap_or(0);
    Ok(Passed {
        time: GuestTime {
            khz: clocks.tsc_khz,
            offset: now.wrapping_neg(),
            boot_wall_ns: config.wall_clock_ns.saturating_add(since_start_ns),
        },
        fetch,
    })
}

/// Any other measures how far its clock is from node 0's.
fn pass_other(fabric: &Fabric, config: &BootConfig) -> Result<Passed, Reason> {
    let control = fabric.control();
    let record = control.vm();
    let mine = control
        .node(fabric.node())
        .expect("`join` has checked the id");
    let (ahead, width) =
        clock::measure(&mine).ok_or_else(|| String::from("node 0 does not tell its time"))?;
    log::info!("clock offset known to {width} ticks");
    let offset = record.tsc_offset().load(Ordering::Acquire);
    let khz = u32::try_from(record.tsc_khz().load(Ordering::Relaxed)).unwrap_or(0);
    if !POSSIBLE_KHZ.contains(&khz) {
        return Err(format!("node 0 tells an impossible clock rate, {khz} kHz"));
    }

    let pages = fabric.proof(fabric.node());
    let own = prove(&pages)?;
    pages.set_outcome(own);
    let fetch = loop {
        // Acquire: pairs with the Release in `pass_first`.
        if let Some(fetch) = Fetch::from_raw(record.fetch().load(Ordering::Acquire)) {
            break fetch;
        }
        if fabric.node() == FIRST_HELPER {
            fabric.proof(DEVICE_NODE).help();
        }
        core::hint::spin_loop();
    };
    Ok(Passed {
        time: GuestTime {
            khz,
            offset: offset.wrapping_add(ahead),
            // Asked for on the guest's first vCPU only, long before others run.
            boot_wall_ns: config.wall_clock_ns,
        },
        fetch,
    })
}

/// Proves this node's platform, with another's help.
fn prove(pages: &Pages) -> Result<Fetch, Reason> {
    let failed = |why| format!("this host cannot take part: {why}");
    let contended = pages.prove_atomics().map_err(failed)?;
    let page = Hpa(pages.code().addr() as u64);
    // SAFETY: 1. the page belongs to the control region, and only the helper,
    // a hypervisor of this rack, writes code there, by whole words; 2. the
    // other cores wait for their job.
    let execute = || unsafe { paging::call_shared_code(page) };
    let found = pages.prove_fetch(execute).map_err(failed)?;
    log::info!("atomics exact over {contended} contended additions, fetch {found:?}");
    // A platform that is known not to be coherent may look so by chance.
    Ok(match cpu::fetches_coherently() {
        true => found,
        false => Fetch::Stale,
    })
}
