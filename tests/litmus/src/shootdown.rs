//! Whether a change of the page tables reaches all CPUs before the call that
//! makes it returns.
//!
//! A thread whose access faults waits in the signal handler until the page is
//! back, and then repeats the access.
#![expect(unsafe_code, reason = "installs a signal handler")]

use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::machine::{Cpus, wait_until};
use crate::memory::{Mapped, PROT_NONE, PROT_READ, PROT_WRITE, Pages};
use crate::{Failure, Outcome};

/// Odd while the page must not be accessed.
static GATE: AtomicU32 = AtomicU32::new(0);
/// Accesses that had to wait.
static WAITED: AtomicU32 = AtomicU32::new(0);

extern "C" fn on_fault(_signal: libc::c_int) {
    WAITED.fetch_add(1, Ordering::Relaxed);
    // As long as the page is not even on its way back.
    while !GATE.load(Ordering::SeqCst).is_multiple_of(2) {
        std::hint::spin_loop();
    }
}

fn wait_on_faults() {
    WAITED.store(0, Ordering::Relaxed);
    GATE.store(0, Ordering::SeqCst);
    // SAFETY: the handler only touches atomics, and returning from it repeats
    // the access.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_fault as *const () as usize;
        assert_eq!(
            libc::sigaction(libc::SIGSEGV, &raw const action, null_mut()),
            0
        );
    }
}

/// Role 0 changes the page's place in each round while the others access it;
/// what the first that failed says.
fn contest(
    cpus: &Cpus,
    rounds: u32,
    change: impl Fn(u32) -> Result<(), Failure> + Sync,
    access: impl Fn() -> Result<(), Failure> + Sync,
) -> Result<(), Failure> {
    let over = AtomicBool::new(false);
    let accesses: Vec<AtomicU32> = (0..cpus.count()).map(|_| AtomicU32::new(0)).collect();
    let results = cpus.run(cpus.count(), |role| {
        if role > 0 {
            let mut result = Ok(());
            while !over.load(Ordering::Relaxed) && result.is_ok() {
                result = access();
                accesses[role].fetch_add(1, Ordering::Relaxed);
            }
            over.store(true, Ordering::Relaxed);
            return result;
        }
        let mut result = Ok(());
        for round in 1..=rounds {
            // All others have just used the page, so their TLBs know it.
            for count in &accesses[1..] {
                let before = count.load(Ordering::Relaxed);
                wait_until(|| {
                    count.load(Ordering::Relaxed).wrapping_sub(before) > 1
                        || over.load(Ordering::Relaxed)
                });
            }
            if over.load(Ordering::Relaxed) || result.is_err() {
                break;
            }
            result = change(round);
        }
        over.store(true, Ordering::Relaxed);
        result
    });
    results.into_iter().collect()
}

/// Long enough for an access by an old translation to show.
fn linger() {
    for _ in 0..200 {
        std::hint::spin_loop();
    }
}

/// Another page, with a newer number, comes to the same address.
pub(crate) fn remapping(cpus: &Cpus, rounds: u32) -> Outcome {
    let pages = Pages::new(2);
    let writable = [0, 1].map(|page| pages.map(page, PROT_READ | PROT_WRITE, None));
    let place = pages.map(0, PROT_READ, None);
    let newest = AtomicU32::new(0);
    let change = |round: u32| {
        let page = usize::from(!round.is_multiple_of(2));
        writable[page].word(0).store(round, Ordering::SeqCst);
        pages.map(page, PROT_READ, Some(&place));
        newest.store(round, Ordering::SeqCst);
        Ok(())
    };
    let access = || {
        let least = newest.load(Ordering::SeqCst);
        let found = place.word(0).load(Ordering::SeqCst);
        match found >= least {
            true => Ok(()),
            false => Err(format!("read {found} after page {least} had come")),
        }
    };
    contest(cpus, rounds, change, access).map(|()| String::new())
}

/// Nothing is written to a page any more that has become read-only.
pub(crate) fn write_protection(cpus: &Cpus, rounds: u32) -> Outcome {
    wait_on_faults();
    let page = Pages::new(1).map(0, PROT_READ | PROT_WRITE, None);
    let change = |round| {
        GATE.fetch_add(1, Ordering::SeqCst);
        page.protect(PROT_READ);
        let before = page.word(0).load(Ordering::SeqCst);
        linger();
        let after = page.word(0).load(Ordering::SeqCst);
        GATE.fetch_add(1, Ordering::SeqCst);
        page.protect(PROT_READ | PROT_WRITE);
        match before == after {
            true => Ok(()),
            false => Err(format!("{before} became {after} in round {round}")),
        }
    };
    let access = || {
        page.word(0).fetch_add(1, Ordering::SeqCst);
        Ok(())
    };
    contest(cpus, rounds, change, access)?;
    Ok(format!("{} faults", WAITED.load(Ordering::Relaxed)))
}

/// Readers of a page that goes away and comes back.
fn absence(
    cpus: &Cpus,
    rounds: u32,
    page: Mapped,
    leave: impl Fn() + Sync,
    come: impl Fn() + Sync,
) -> Outcome {
    wait_on_faults();
    let change = |_| {
        leave();
        GATE.fetch_add(1, Ordering::SeqCst);
        linger();
        GATE.fetch_add(1, Ordering::SeqCst);
        come();
        Ok(())
    };
    let access = || {
        let before = GATE.load(Ordering::SeqCst);
        let _ = page.word(0).load(Ordering::SeqCst);
        let after = GATE.load(Ordering::SeqCst);
        match before == after && !before.is_multiple_of(2) {
            true => Err(format!("read what was gone, in round {}", before / 2)),
            false => Ok(()),
        }
    };
    contest(cpus, rounds, change, access)?;
    Ok(format!("{} faults", WAITED.load(Ordering::Relaxed)))
}

/// A page without any rights can't be read.
pub(crate) fn protection(cpus: &Cpus, rounds: u32) -> Outcome {
    let page = Pages::new(1).map(0, PROT_READ, None);
    let (leave, come) = (|| page.protect(PROT_NONE), || page.protect(PROT_READ));
    absence(cpus, rounds, page, leave, come)
}

/// Nor can one that is not there.
pub(crate) fn unmapping(cpus: &Cpus, rounds: u32) -> Outcome {
    let pages = Pages::new(1);
    let page = pages.map(0, PROT_READ, None);
    let come = || {
        pages.map(0, PROT_READ, Some(&page));
    };
    absence(cpus, rounds, page, || page.unmap(), come)
}
