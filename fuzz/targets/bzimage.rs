//! Loading whatever claims to be a kernel.
//!
//! The input is the kernel file. The loader may refuse it; if it does not, the
//! entry point must be inside of the kernel that the zero page tells of, and
//! kernel and initramfs inside of RAM without overlap.

#![no_main]

use std::cell::RefCell;
use std::collections::HashMap;

use hypervisor::loader::{LinuxBoot, load_linux};
use hypervisor::mem::{GuestMemory, GuestMemoryError};
use hypervisor::platform::PlatformConfig;
use libfuzzer_sys::fuzz_target;
use vmm_shared::addr::Gpa;

const PLATFORM: PlatformConfig = PlatformConfig {
    vcpus: 2,
    memory: 512 << 20,
    image: None,
};
const INITRAMFS: &[u8] = &[0x5a; 5000];

/// Guest memory of which only what was written takes room.
struct Sparse(RefCell<HashMap<u64, u8>>);

impl Sparse {
    fn check(gpa: Gpa, len: usize) -> Result<(), GuestMemoryError> {
        gpa.checked_add(len as u64)
            .filter(|end| end.0 <= PLATFORM.memory)
            .map(|_| ())
            .ok_or(GuestMemoryError { gpa, len })
    }
}

impl GuestMemory for Sparse {
    fn read_bytes(&self, gpa: Gpa, into: &mut [u8]) -> Result<(), GuestMemoryError> {
        Self::check(gpa, into.len())?;
        let memory = self.0.borrow();
        for (byte, at) in into.iter_mut().zip(gpa.0..) {
            *byte = memory.get(&at).copied().unwrap_or(0);
        }
        Ok(())
    }

    fn write_bytes(&self, gpa: Gpa, from: &[u8]) -> Result<(), GuestMemoryError> {
        Self::check(gpa, from.len())?;
        let mut memory = self.0.borrow_mut();
        for (byte, at) in from.iter().zip(gpa.0..) {
            memory.insert(at, *byte);
        }
        Ok(())
    }
}

fuzz_target!(|kernel: &[u8]| {
    let memory = Sparse(RefCell::default());
    let boot = LinuxBoot {
        platform: &PLATFORM,
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
    assert!(start + len <= PLATFORM.memory);
    assert_eq!(len, INITRAMFS.len() as u64);
});
