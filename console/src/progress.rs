//! What is being done, shown on a terminal while it lasts and wiped away
//! afterwards. Where standard error is no terminal, nothing is shown.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use indicatif::ProgressBar;

use crate::terminal;

static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

fn bar() -> MutexGuard<'static, Option<ProgressBar>> {
    BAR.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says what is being done now.
pub(crate) fn say(what: impl Into<String>) {
    if !terminal::on_stderr() {
        return;
    }
    let mut bar = bar();
    let bar = bar.get_or_insert_with(|| {
        let bar = ProgressBar::new_spinner();
        bar.enable_steady_tick(Duration::from_millis(100));
        bar
    });
    bar.set_message(what.into());
}

/// Prints a line above what is being shown.
pub(crate) fn print_line(line: &str) {
    match &*bar() {
        Some(bar) => bar.suspend(|| eprintln!("{line}")),
        None => eprintln!("{line}"),
    }
}

/// Wipes the display away.
pub(crate) fn clear() {
    if let Some(bar) = bar().take() {
        bar.finish_and_clear();
    }
}
