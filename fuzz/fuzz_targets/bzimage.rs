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
use hypervisor::platform::{Machine, PlatformConfig, Topology};
use libfuzzer_sys::fuzz_target;
use vmm_shared::addr::Gpa;

const MEMORY: u64 = 512 << 20;
const INITRAMFS: &[u8] = &[0x5a; 5000];

/// Guest memory of which only what was written takes room.
struct Sparse(RefCell<HashMap<u64, [u8; PAGE]>>);

const PAGE: usize = 4096;

impl Sparse {
    /// Calls `access` for each page of the range, with the bytes of the page and
    /// where in the whole access they are.
    fn each(
        &self,
        gpa: Gpa,
        len: usize,
        mut access: impl FnMut(&mut [u8], usize),
    ) -> Result<(), GuestMemoryError> {
        let end = gpa.checked_add(len as u64);
        if end.is_none_or(|end| end.0 > MEMORY) {
            return Err(GuestMemoryError { gpa, len });
        }
        let mut pages = self.0.borrow_mut();
        let mut done = 0;
        while done < len {
            let at = gpa.0 + done as u64;
            let offset = (at % PAGE as u64) as usize;
            let size = (PAGE - offset).min(len - done);
            let page = pages.entry(at / PAGE as u64).or_insert([0; PAGE]);
            access(&mut page[offset..offset + size], done);
            done += size;
        }
        Ok(())
    }
}

impl GuestMemory for Sparse {
    fn read_bytes(&self, gpa: Gpa, into: &mut [u8]) -> Result<(), GuestMemoryError> {
        self.each(gpa, into.len(), |bytes, at| {
            into[at..at + bytes.len()].copy_from_slice(bytes);
        })
    }

    fn write_bytes(&self, gpa: Gpa, from: &[u8]) -> Result<(), GuestMemoryError> {
        self.each(gpa, from.len(), |bytes, at| {
            let len = bytes.len();
            bytes.copy_from_slice(&from[at..at + len]);
        })
    }
}

fuzz_target!(|kernel: &[u8]| {
    let memory = Sparse(RefCell::default());
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
