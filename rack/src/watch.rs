//! The launcher's own watch over the nodes of a running VM.
//!
//! A node whose process ends is noticed at once, by its keeper. This thread
//! notices those that hang: by their heartbeats, and by what their peers have
//! found out.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_shared::coherence::NodeSet;
use vmm_shared::control::{ControlRegion, VmState};
use vmm_shared::membership::{TICK_MS, Watch};

use crate::doorbell::Bell;
use crate::error::RackError;
use crate::fleet::Fleet;

const TICK: Duration = Duration::from_millis(TICK_MS);

/// The watching thread. Dropping it ends the watch.
#[derive(Debug)]
pub(crate) struct Watcher {
    closing: Arc<AtomicBool>,
    bell: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Watches `nodes` from the moment their VM runs.
    pub(crate) fn start(
        control: ControlRegion,
        nodes: NodeSet,
        fleet: Arc<Fleet>,
        bell: Arc<Bell>,
    ) -> Result<Self, RackError> {
        let closing = Arc::new(AtomicBool::new(false));
        let (closed, rung) = (Arc::clone(&closing), Arc::clone(&bell));
        let thread = std::thread::Builder::new()
            .name("watch".into())
            .spawn(move || watch(&control, nodes, &fleet, &rung, &closed))
            .map_err(RackError::host("start the watching thread"))?;
        Ok(Self {
            closing,
            bell,
            thread: Some(thread),
        })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // Release: pairs with the Acquire in `watch`.
        self.closing.store(true, Ordering::Release);
        self.bell.ring();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn watch(
    control: &ControlRegion,
    nodes: NodeSet,
    fleet: &Fleet,
    bell: &Bell,
    closing: &AtomicBool,
) {
    let mut watch = None;
    let mut known = NodeSet::EMPTY;
    let mut last_tick = Instant::now();
    loop {
        let rings = bell.rings();
        // Acquire: pairs with the Release in `drop`.
        if closing.load(Ordering::Acquire) {
            return;
        }
        let state = VmState::from_raw(control.vm_state().load(Ordering::Acquire));
        if matches!(state, Some(VmState::Running | VmState::Frozen)) {
            let watch = watch.get_or_insert_with(|| Watch::new(control.membership(), nodes));
            let lost = if last_tick.elapsed() >= TICK {
                last_tick = Instant::now();
                watch.tick()
            } else {
                watch.look()
            };
            for node in { lost }.filter(|node| !known.contains(*node)) {
                fleet.silent(node);
                bell.ring();
            }
            known = lost;
        }
        bell.wait(rings, TICK.saturating_sub(last_tick.elapsed()));
    }
}
