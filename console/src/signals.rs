//! What happens on Ctrl-C and its kin.
//!
//! One thread takes all signals. While a command runs in the guest they go to
//! it; otherwise, or when the operator insists, everything is torn down and
//! the program ends as if the signal had killed it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use guest_linux_config::agent_client::Control;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;

use crate::terminal;

/// How long a command gets to end itself after SIGTERM or SIGHUP.
const GRACE: Duration = Duration::from_secs(3);

type Cleanup = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    /// What to tear down, last made first.
    cleanups: Vec<Cleanup>,
    command: Option<Command>,
}

struct Command {
    control: Control,
    on_terminal: bool,
    interrupted: bool,
}

static STATE: Mutex<State> = Mutex::new(State {
    cleanups: Vec::new(),
    command: None,
});

static ABORTING: AtomicBool = AtomicBool::new(false);

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts taking signals. Once, before there is anything to tear down.
pub(crate) fn install() -> Result<()> {
    let mut wanted = vec![SIGINT, SIGTERM, SIGQUIT, SIGWINCH];
    if !is_ignored(SIGHUP) {
        wanted.push(SIGHUP);
    }
    let mut signals = Signals::new(wanted).context("cannot take signals")?;
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || signals.forever().for_each(take))
        .context("cannot start the signal thread")?;
    Ok(())
}

/// Whether we were started with a signal ignored, as `nohup` does: that is to
/// stay so.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// Has `cleanup` run when the program ends, in whichever way.
pub(crate) fn at_end(cleanup: impl FnOnce() + Send + 'static) {
    state().cleanups.push(Box::new(cleanup));
}

/// Runs what [`at_end`] has collected, the latest first.
pub(crate) fn clean_up() {
    // Taken out first: a cleanup may need other threads to make progress.
    let cleanups = std::mem::take(&mut state().cleanups);
    for cleanup in cleanups.into_iter().rev() {
        cleanup();
    }
}

/// Forgets what [`at_end`] has collected: it is to stay.
pub(crate) fn keep() {
    state().cleanups.clear();
}

/// Sends signals to a command in the guest from now on.
pub(crate) fn forward_to(control: Control, on_terminal: bool) {
    state().command = Some(Command {
        control,
        on_terminal,
        interrupted: false,
    });
}

/// The command has ended: signals are for this program again.
pub(crate) fn stop_forwarding() {
    state().command = None;
}

fn take(signal: i32) {
    let mut state = state();
    let Some(command) = &mut state.command else {
        drop(state);
        if signal != SIGWINCH {
            abort(signal);
        }
        return;
    };
    match signal {
        SIGWINCH => {
            if command.on_terminal
                && let Some(size) = terminal::size()
            {
                send(command, move |control| drop(control.resize(size)));
            }
        }
        SIGINT | SIGQUIT if !command.interrupted => {
            command.interrupted = true;
            forward(command, signal);
        }
        SIGTERM | SIGHUP if !command.interrupted => {
            command.interrupted = true;
            forward(command, signal);
            drop(thread::spawn(move || {
                thread::sleep(GRACE);
                abort(signal);
            }));
        }
        _ => {
            drop(state);
            abort(signal);
        }
    }
}

fn forward(command: &Command, signal: i32) {
    if let Ok(number) = u8::try_from(signal) {
        send(command, move |control| drop(control.signal(number)));
    }
}

/// Sending may block while the guest hangs; taking signals must not.
fn send(command: &Command, what: impl FnOnce(&Control) + Send + 'static) {
    let control = command.control.clone();
    drop(thread::spawn(move || what(&control)));
}

/// Leaves the end of the program to [`abort`] if that has begun: what fails
/// then fails because it is being torn down.
pub(crate) fn wait_if_aborting() {
    // Acquire: pairs with the Release in `abort`.
    while ABORTING.load(Ordering::Acquire) {
        thread::park();
    }
}

/// Tears everything down and ends the program as if `signal` had killed it.
fn abort(signal: i32) -> ! {
    // Release: what is torn down below is seen to fail only after this.
    ABORTING.store(true, Ordering::Release);
    clean_up();
    end_children();
    crate::progress::clear();
    terminal::restore();
    std::process::exit(128 + signal)
}

/// Ends what image builds have started.
fn end_children() {
    let children = || {
        let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten();
        let lists = tasks
            .flatten()
            .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
        let pids: Vec<_> = lists
            .flat_map(|list| {
                list.split_whitespace()
                    .filter_map(|pid| rustix::process::Pid::from_raw(pid.parse().ok()?))
                    .collect::<Vec<_>>()
            })
            .collect();
        pids
    };
    for pid in children() {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    for _ in 0..50 {
        if children().is_empty() {
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
}
