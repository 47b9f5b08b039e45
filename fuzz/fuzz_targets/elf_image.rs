//! Loading whatever claims to be a multiboot or PVH image, or is asked to be
//! the paravirtual guest's.
//!
//! The input is the image file. The loader may refuse it; if it does not, the
//! entry point must be inside of RAM and outside of the firmware tables, and
//! the boot data where EBX points must be in RAM, too.

#![no_main]

use hypervisor::loader::{BareBoot, Module, Protocol, PvBoot, load_bare, load_pv, protocol};
use hypervisor::mem::GuestMemory;
use hypervisor::mem::sparse::SparseMemory;
use hypervisor::platform::{Machine, PlatformConfig, Topology};
use libfuzzer_sys::fuzz_target;
use vmm_shared::addr::Gpa;

const MEMORY: u64 = 128 << 20;
const FIRMWARE: std::ops::Range<u64> = 0xe_0000..0x10_0000;

fuzz_target!(|image: &[u8]| {
    paravirtual(image);
    let Ok(protocol) = protocol(&image) else {
        return;
    };
    let memory = SparseMemory::new(MEMORY);
    let platform = platform(protocol);
    let module = Module {
        content: &&[0x5a; 5000][..],
        words: b"words",
    };
    let boot = BareBoot {
        platform: &platform,
        image: &image,
        modules: &[module],
        command_line: b"quiet",
    };
    let Ok(entry) = load_bare(&memory, &boot) else {
        return;
    };
    let start = u64::from(entry.eip);
    assert!(start < MEMORY && !FIRMWARE.contains(&start));
    let info: u32 = memory.read(Gpa(entry.ebx.into())).expect("the boot data");
    assert_ne!(info, 0);
});

fn platform(protocol: Protocol) -> PlatformConfig {
    PlatformConfig {
        topology: Topology::one_node(2, MEMORY).expect("a possible machine"),
        image: None,
        machine: Machine {
            protocol,
            ..Machine::LINUX
        },
    }
}

fn paravirtual(image: &[u8]) {
    let memory = SparseMemory::new(MEMORY);
    let boot = PvBoot {
        platform: &platform(Protocol::Paravirtual),
        kernel: &image,
        init: &&[0x5a; 5000][..],
        command_line: b"quiet",
        tsc_khz: 1_000_000,
        boot_wall_ns: 0,
    };
    if let Ok(entry) = load_pv(&memory, &boot) {
        assert!((FIRMWARE.end..MEMORY).contains(&entry.rip));
    }
}
