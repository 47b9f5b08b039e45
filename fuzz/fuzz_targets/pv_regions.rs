//! Entries of the log of a process's regions, as a peer may have written them.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| guest_kernel::fuzzing::regions(bytes));
