//! The replicated log between real processes that are killed at random.
//!
//! The parent makes a log in /dev/shm, joins it, starts processes that join it
//! too, kills one after the other with SIGKILL at random moments and starts
//! another in its place. At the end all survivors' replicas must be equal, and
//! of every thread that ever was, each answered operation must have been
//! applied once, and each other at most once.

mod child;
mod ledger;
mod parent;
mod shared;

use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str =
    "usage: log-stress [--kills N] [--processes N] [--threads N] [--seed N] [--directory DIR]";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let mut plan = parent::Plan::default();
    let mut child: Option<(PathBuf, usize, u32)> = None;
    while let Some(name) = arguments.next() {
        let Some(value) = arguments.next() else {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        };
        let number = value.parse::<u64>().ok();
        let small = number.and_then(|number| usize::try_from(number).ok());
        match (name.as_str(), number, small) {
            ("--kills", _, Some(kills)) => plan.kills = kills,
            ("--processes", _, Some(count)) if count < shared::MAX_PROCESSES => {
                plan.processes = count;
            }
            ("--threads", _, Some(count)) if count < shared::MAX_THREADS => plan.threads = count,
            ("--seed", Some(seed), _) => plan.seed = seed,
            ("--directory", ..) => plan.directory = PathBuf::from(value),
            ("--child", ..) => child = Some((PathBuf::from(value), 0, 0)),
            ("--slot", _, Some(slot)) => {
                child.get_or_insert_default().1 = slot;
            }
            ("--generation", Some(number), _) => {
                child.get_or_insert_default().2 = u32::try_from(number).unwrap_or(0);
            }
            _ => {
                eprintln!("{USAGE}");
                return ExitCode::from(2);
            }
        }
    }
    match child {
        Some((path, slot, generation)) => child::run(&path, slot, generation, plan.threads),
        None => match parent::run(&plan) {
            Ok(()) => ExitCode::SUCCESS,
            Err(problem) => {
                eprintln!("log-stress: {problem}");
                ExitCode::FAILURE
            }
        },
    }
}
