//! The operator's terminal: raw while a session has it, and as it was before
//! on every way out.

use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use rustix::stdio::{stderr, stdin, stdout};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};
use vmm_shared::agent::WindowSize;

/// The terminal's settings before it was made raw.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Keeps the terminal raw while it lives.
#[derive(Debug)]
pub(crate) struct RawMode(());

impl RawMode {
    /// Makes the terminal on standard input raw: every key goes to the guest.
    pub(crate) fn enter() -> Result<Self> {
        let before = tcgetattr(stdin()).context("standard input is not a terminal")?;
        let mut raw = before.clone();
        raw.make_raw();
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        tcsetattr(stdin(), OptionalActions::Drain, &raw).context("cannot set up the terminal")?;
        Ok(Self(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal its former settings back, if they were changed.
pub(crate) fn restore() {
    let saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(before) = saved {
        // Without a terminal there is nothing left to restore.
        let _ = tcsetattr(stdin(), OptionalActions::Drain, &before);
    }
}

/// Restores the terminal when the program panics: panics abort, and run no
/// destructors.
pub(crate) fn restore_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        restore();
        report(panic);
    }));
}

/// The size of the operator's terminal, if there is one.
pub(crate) fn size() -> Option<WindowSize> {
    let size = tcgetwinsize(stdout())
        .or_else(|_| tcgetwinsize(stdin()))
        .ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some(WindowSize {
        rows: size.ws_row,
        cols: size.ws_col,
    })
}

/// Whether the operator types into standard input.
pub(crate) fn on_stdin() -> bool {
    isatty(stdin())
}

/// Whether standard error is shown on a terminal.
pub(crate) fn on_stderr() -> bool {
    isatty(stderr())
}
