//! Loading whatever claims to be a kernel.
//!
//! The input is the kernel file, or what is different about a sound one: chance
//! alone does not get past the header's checks. The loader may refuse it; if it
//! does not, the entry point must be inside of the kernel that the zero page
//! tells of, and kernel and initramfs inside of RAM without overlap.

#![no_main]

use hypervisor::loader::{LinuxBoot, load_linux};
use hypervisor::mem::GuestMemory;
use hypervisor::mem::sparse::SparseMemory;
use hypervisor::platform::{Machine, PlatformConfig, Topology};
use libfuzzer_sys::fuzz_target;
use vmm_shared::addr::Gpa;

const MEMORY: u64 = 512 << 20;
const INITRAMFS: &[u8] = &[0x5a; 5000];

/// A kernel that the loader takes.
fn sound() -> Vec<u8> {
    let mut kernel = vec![0x90; 4096];
    kernel[0x1f1..0x290].fill(0);
    for (at, bytes) in [
        (0x1f1, &[1][..]),
        (0x1f4, &[0xc0]),
        (0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]),
        (0x202, b"HdrS"),
        (0x206, &[0x0f, 0x02]),
        (0x211, &[1]),
        (0x22c, &[0xff, 0xff, 0xff, 0x7f]),
        (0x230, &[0, 0, 0x20, 0]),
        (0x234, &[1]),
        (0x236, &[1]),
        (0x238, &[0xff, 0x07]),
    ] {
        kernel[at..at + bytes.len()].copy_from_slice(bytes);
    }
    kernel
}

fuzz_target!(|input: (&[u8], Vec<(u16, u32)>)| {
    let (noise, changes) = input;
    check(noise);
    let mut kernel = sound();
    if changes.is_empty() {
        assert!(check(&kernel), "a sound kernel is refused");
    }
    for (at, value) in changes {
        let at = usize::from(at) % kernel.len();
        let bytes = value.to_le_bytes();
        let len = bytes.len().min(kernel.len() - at);
        kernel[at..at + len].copy_from_slice(&bytes[..len]);
    }
    check(&kernel);
});

/// Whether it is loaded.
fn check(kernel: &[u8]) -> bool {
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
        return false;
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
    true
}
