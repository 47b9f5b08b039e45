//! Addresses and control messages that a program passes to calls of sockets.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| guest_kernel::fuzzing::sockets(bytes));
