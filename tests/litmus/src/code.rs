//! Whether what one CPU writes is what another executes.
//!
//! Everybody waits for a writer before executing, and executes a serialising
//! instruction then: what remains is what the platform promises.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::machine::{Cpus, wait_until};
use crate::memory::{Mapped, PROT_EXEC, PROT_READ, PROT_WRITE, Pages};
use crate::{Failure, Outcome};

/// A value whose every byte changes from round to round.
fn value(round: u32) -> u32 {
    round.wrapping_mul(0x9e37_79b9) ^ 0x0102_0304
}

fn call(code: &Mapped, slot: usize, round: u32) -> Result<(), Failure> {
    let found = code.call_function(slot);
    match found == value(round) {
        true => Ok(()),
        false => Err(format!(
            "slot {slot} returned {found:#x} in round {round}, not {:#x}",
            value(round)
        )),
    }
}

/// In each round, role `round % roles` writes a function and all run it, the
/// writer too.
fn by_turns(
    cpus: &Cpus,
    rounds: u32,
    write: impl Fn(u32) + Sync,
    code: Mapped,
) -> Result<(), Failure> {
    let written = AtomicU32::new(0);
    let ran = AtomicU32::new(0);
    let failed = AtomicBool::new(false);
    let roles = u32::try_from(cpus.count()).expect("few");
    let results = cpus.run(cpus.count(), |role| {
        for round in 1..=rounds {
            let is_writer = round % roles == u32::try_from(role).expect("few");
            let stop = || failed.load(Ordering::Relaxed);
            if is_writer {
                wait_until(|| ran.load(Ordering::SeqCst) == (round - 1) * roles || stop());
                write(round);
                written.store(round, Ordering::SeqCst);
            } else {
                wait_until(|| written.load(Ordering::SeqCst) == round || stop());
            }
            if stop() {
                break;
            }
            if let Err(why) = call(&code, 0, round) {
                failed.store(true, Ordering::Relaxed);
                return Err(why);
            }
            ran.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    });
    results.into_iter().collect()
}

/// The writer changes with each round.
pub(crate) fn here_and_there(cpus: &Cpus, rounds: u32) -> Outcome {
    let code = Pages::new(1).map(0, PROT_READ | PROT_WRITE | PROT_EXEC, None);
    let write = |round| code.write_function(0, value(round));
    by_turns(cpus, rounds, write, code).map(|()| String::new())
}

/// As compilers do that never have a page both writable and executable.
pub(crate) fn two_addresses(cpus: &Cpus, rounds: u32) -> Outcome {
    let pages = Pages::new(1);
    let writable = pages.map(0, PROT_READ | PROT_WRITE, None);
    let code = pages.map(0, PROT_READ | PROT_EXEC, None);
    let write = |round| writable.write_function(0, value(round));
    by_turns(cpus, rounds, write, code).map(|()| String::new())
}

/// As others do that change the page's rights.
pub(crate) fn write_or_execute(cpus: &Cpus, rounds: u32) -> Outcome {
    let code = Pages::new(1).map(0, PROT_READ | PROT_WRITE, None);
    let write = |round| {
        code.protect(PROT_READ | PROT_WRITE);
        code.write_function(0, value(round));
        code.protect(PROT_READ | PROT_EXEC);
    };
    by_turns(cpus, rounds, write, code).map(|()| String::new())
}

/// Each role rewrites a function of its own and runs it at once, on one page;
/// and runs one that nobody changes.
pub(crate) fn shared_page(cpus: &Cpus, rounds: u32) -> Outcome {
    const UNCHANGED: u32 = 77;
    let code = Pages::new(1).map(0, PROT_READ | PROT_WRITE | PROT_EXEC, None);
    code.write_function(0, value(UNCHANGED));
    let results = cpus.run(cpus.count(), |role| {
        for round in 1..=rounds {
            // On lines of their own: one CPU must not change what lies in
            // the middle of what another fetches.
            let slot = (role + 1) * 8;
            code.write_function(slot, value(round));
            call(&code, slot, round)?;
            call(&code, 0, UNCHANGED)?;
        }
        Ok(())
    });
    results.into_iter().collect::<Result<(), Failure>>()?;
    Ok(String::new())
}
