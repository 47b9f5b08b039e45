//! Loading whatever claims to be a kernel.
//!
//! The input is the kernel file. The loader may refuse it; if it does not, the
//! entry point must be inside of the kernel that the zero page tells of, and
//! kernel and initramfs inside of RAM without overlap.

#![no_main]

use hypervisor::loader::{LinuxBoot, load_linux};
use hypervisor::mem::GuestMemory;
use hypervisor::mem::sparse::SparseMemory;
use hypervisor::platform::{Machine, PlatformConfig, Topology};
use libfuzzer_sys::fuzz_target;
use vmm_shared::addr::Gpa;

const MEMORY: u64 = 512 << 20;
const INITRAMFS: &[u8] = &[0x5a; 5000];

fuzz_target!(|kernel: &[u8]| {
    let memory = SparseMemory::new(MEMORY);
    let platform = PlatformConfig {
        topology: Topology::one_node(2, MEMORY).expect("a possible machine"),
        image: None,
        machine: Machine::LINUX,
    };
    let boot = LinuxBoot {
        platform: &platform,
        kernel: &kernel,
        initramfs: &INITRAMFS,
        command_line: b"quiet",
    };
    let Ok(entry) = load_linux(&memory, &boot) else {
        return;
    };
    let field = |at: u64| -> u64 {
        let value: u32 = memory.read(Gpa(entry.rsi + at)).expect("the zero page");
        value.into()
    };
    let (load, size) = (field(0x214), field(0x260));
    let (start, len) = (field(0x218), field(0x21c));
    assert_eq!(entry.rip, load + 0x200);
    assert!(load >= 1 << 20);
    assert!(load + size <= start, "kernel and initramfs overlap");
    assert!(start + len <= MEMORY);
    assert_eq!(len, INITRAMFS.len() as u64);
});
