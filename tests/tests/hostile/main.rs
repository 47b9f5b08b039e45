//! Guests that do what no sane kernel does. Each is answered as hardware or
//! KVM would, or its VM stops in order; the hypervisor lives through it all.
//!
//! One VM for each case, so that none hides another.

mod devices;
mod ends;
mod interrupts;
mod memory;
mod paravirtual;
mod processor;

use iced_x86::code_asm::*;
use viaduct_tests::guest::{
    Assembled, Expect, Guest, Machine, SCRATCH, STATE, WINDOW, at, check, selector, state, vector,
};

const EFER: u32 = 0xc000_0080;
const PAT: u32 = 0x277;

/// Lists cases, and makes a test of each that is listed. A number in brackets
/// is the VM's vCPUs, if not one.
macro_rules! cases {
    ($($(#[$attribute:meta])* $name:ident: $expect:ident $([$vcpus:literal])?, $guest:expr;)*) => {
        /// All cases of this file.
        pub(crate) const NAMES: &[&str] = &[$(stringify!($name)),*];

        $(
            #[test]
            $(#[$attribute])*
            fn $name() {
                let case: fn(&mut Guest) -> Assembled = $guest;
                let vcpus = [1, $($vcpus)?];
                let machine = Machine {
                    vcpus: vcpus[vcpus.len() - 1],
                    ..Machine::default()
                };
                check(&machine, Expect::$expect, case);
            }
        )*
    };
}
pub(crate) use cases;

/// Where the hypervisor's code is.
struct Code {
    start: u64,
    end: u64,
    /// The first instruction after every exit.
    behind_entry: u64,
}

/// Finds it in the image: segments by the ELF program header, the
/// instruction by its bytes.
fn hypervisor_code() -> Code {
    const EXECUTABLE: u32 = 5;
    const ENTER: [u8; 7] = [0x0f, 0x01, 0xd8, 0x48, 0x8b, 0x04, 0x24];
    let file = std::fs::read(viaduct_tests::hypervisor()).expect("readable");
    let word = |at: usize| u64::from_le_bytes(*file[at..].first_chunk().expect("inside"));
    let half = |at: usize| u16::from_le_bytes(*file[at..].first_chunk().expect("inside"));
    let index = |value: u64| usize::try_from(value).expect("64-bit");
    let headers = index(word(0x20));
    let (offset, start, size) = (0..usize::from(half(0x38)))
        .map(|number| headers + number * usize::from(half(0x36)))
        .find(|at| word(*at) == 1 | u64::from(EXECUTABLE) << 32)
        .map(|at| (word(at + 8), word(at + 16), word(at + 32)))
        .expect("a segment of code");
    let code = &file[index(offset)..index(offset + size)];
    let found = code.windows(ENTER.len()).position(|each| each == ENTER);
    let behind = found.expect("VMRUN") as u64 + 3;
    Code {
        start,
        end: start + size,
        behind_entry: start + behind,
    }
}

#[test]
fn there_are_enough_cases_and_none_twice() {
    let all = [
        devices::NAMES,
        ends::NAMES,
        interrupts::NAMES,
        memory::NAMES,
        paravirtual::NAMES,
        processor::NAMES,
    ]
    .concat();
    assert!(all.len() >= 80, "{}", all.len());
    let mut names = all.clone();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), all.len());
}
