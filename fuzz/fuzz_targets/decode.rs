//! Any bytes, as an instruction that touched a device register.
//!
//! Nothing may panic, and an instruction that is accepted may change at most
//! one register, and the flags only if it computes.
#![no_main]

use hypervisor::vcpu::decode::{Bitness, Operation, decode, length, string_port};
use hypervisor::vcpu::registers::Registers;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Mode {
    Real,
    Protected,
    Long,
}

#[derive(Arbitrary, Debug)]
struct Input {
    mode: Mode,
    gpr: [u64; 16],
    rip: u64,
    device: u64,
    bytes: [u8; 15],
    len: u8,
}

fuzz_target!(|input: Input| {
    let bitness = match input.mode {
        Mode::Real => Bitness::Bits16,
        Mode::Protected => Bitness::Bits32,
        Mode::Long => Bitness::Bits64,
    };
    let before = Registers {
        gpr: input.gpr,
        rip: input.rip,
        rflags: 2,
    };
    let bytes = &input.bytes[..usize::from(input.len) % 16];
    if string_port(bytes, bitness).is_some() {
        assert!(length(bytes, bitness).is_some());
    }
    let Ok(access) = decode(bytes, input.rip, bitness, &before) else {
        return;
    };
    assert!((1..=bytes.len() as u64).contains(&access.len));

    let mut after = before;
    if let Some(written) = access.complete(&mut after, input.device) {
        assert_eq!(written & !access.width.mask(), 0);
    }
    assert_eq!(after.rip, before.rip);
    let changed = (0..16).filter(|n| after.gpr[*n] != before.gpr[*n]).count();
    assert!(changed <= 1);
    let computes = matches!(
        access.operation,
        Operation::Update { .. } | Operation::Combine { .. }
    );
    assert!(computes || after.rflags == before.rflags);
});
