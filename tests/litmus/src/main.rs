//! `viaduct-litmus ROUNDS [CPU,CPU,…]`: whether some CPUs are one machine.
//!
//! Runs in a guest, each thread on a CPU of its own: by default the first CPU
//! of every NUMA node, and at least two. A line for each program says `ok` or
//! `FAIL`; the exit status is 1 if any has failed.

mod atomics;
mod code;
mod machine;
mod memory;
mod ordering;
mod shootdown;

use std::process::ExitCode;

use machine::Cpus;

/// What went wrong.
type Failure = String;
/// Something to know about a program that went well, or what went wrong.
type Outcome = Result<String, Failure>;
/// Its name, and the function that tries so many rounds.
type Program = (&'static str, fn(&Cpus, u32) -> Outcome);

const PROGRAMS: [Program; 17] = [
    ("atomic additions", atomics::additions),
    ("compare and exchange of 16 bytes", atomics::wide_exchanges),
    ("mutual exclusion", atomics::mutual_exclusion),
    ("store buffering", ordering::store_buffering),
    ("store buffering, fences", ordering::store_buffering_fenced),
    ("message passing", ordering::message_passing),
    ("load buffering", ordering::load_buffering),
    ("independent reads of independent writes", ordering::iriw),
    ("IRIW, fences", ordering::iriw_fenced),
    ("remapping under readers", shootdown::remapping),
    (
        "write protection under writers",
        shootdown::write_protection,
    ),
    ("protection under readers", shootdown::protection),
    ("unmapping under readers", shootdown::unmapping),
    ("code written here and run there", code::here_and_there),
    (
        "code written by one address and run by another",
        code::two_addresses,
    ),
    (
        "code written and made executable by turns",
        code::write_or_execute,
    ),
    ("a page of code that all write and run", code::shared_page),
];

fn run() -> Result<bool, Failure> {
    let mut words = std::env::args().skip(1);
    let usage = "usage: viaduct-litmus ROUNDS [CPU,CPU,…]";
    let rounds = words.next().and_then(|word| word.parse().ok());
    let rounds: u32 = rounds.ok_or(usage)?;
    let cpus = match words.next() {
        Some(list) => Cpus::parse(&list).ok_or(usage)?,
        None => Cpus::of_all_nodes()?,
    };
    println!("{rounds} rounds on CPUs {cpus}");
    let mut good = true;
    for (name, program) in PROGRAMS {
        let start = std::time::Instant::now();
        let outcome = program(&cpus, rounds);
        let seconds = start.elapsed().as_secs_f32();
        match outcome {
            Ok(note) if note.is_empty() => println!("ok    {name} ({seconds:.1} s)"),
            Ok(note) => println!("ok    {name}: {note} ({seconds:.1} s)"),
            Err(why) => {
                println!("FAIL  {name}: {why} ({seconds:.1} s)");
                good = false;
            }
        }
    }
    Ok(good)
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("viaduct-litmus: {why}");
            ExitCode::from(2)
        }
    }
}
