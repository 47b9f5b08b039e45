//! Loading whatever claims to be a multiboot or PVH image, or is asked to be
//! the paravirtual guest's.
//!
//! The input is the image file, or what is different about a sound one, by
//! words: chance alone does not get past the first checks. The loader may
//! refuse it; if it does not, the entry point must be inside of RAM and outside
//! of the firmware tables, and the boot data where EBX points must be in RAM,
//! too.

#![no_main]

use hypervisor::loader::{BareBoot, Module, Protocol, PvBoot, load_bare, load_pv, protocol};
use hypervisor::mem::GuestMemory;
use hypervisor::mem::sparse::SparseMemory;
use hypervisor::platform::{Machine, PlatformConfig, Topology};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use vmm_shared::addr::Gpa;

const MEMORY: u64 = 128 << 20;
const FIRMWARE: std::ops::Range<u64> = 0xe_0000..0x10_0000;

/// Which sound image is changed.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Base {
    wide: bool,
    pvh: bool,
}

/// An image with two segments and a note, by its program headers; the headers
/// begin behind the file's own. It has a multiboot header, or the note has PVH's
/// entry.
fn sound(base: Base) -> Vec<u8> {
    const LOAD: u32 = 0x10_0000;
    const ENTRY: u32 = LOAD + 0x300;
    let mut words = vec![];
    let wide = |words: &mut Vec<u32>, value: u32| {
        words.push(value);
        if base.wide {
            words.push(0);
        }
    };
    let (class, machine, header, entry_size) = match base.wide {
        false => (1, 3, 52, 32),
        true => (2, 62, 64, 56),
    };
    words.extend([0x464c_457f, 0x0001_0100 | class, 0, 0]);
    words.extend([2 | machine << 16, 1]);
    for value in [ENTRY, header, 0] {
        wide(&mut words, value);
    }
    words.extend([0, header | entry_size << 16, 3, 0]);
    for [kind, offset, at, file_len, len] in [
        [1, 0, LOAD, 0x400, 0x800],
        [1, 0x400, LOAD + 0x1000, 0x100, 0x3000],
        [4, 0x200, 0, 20, 20],
    ] {
        words.push(kind);
        match base.wide {
            false => words.extend([offset, at, at, file_len, len, 7, 4096]),
            true => {
                words.push(7);
                for value in [offset, at, at, file_len, len, 4096] {
                    wide(&mut words, value);
                }
            }
        }
    }
    words.resize(0x200 / 4, 0);
    words.extend(match base.pvh {
        true => [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), ENTRY],
        false => [0x1bad_b002, 3, 0x1bad_b005_u32.wrapping_neg(), 0, 0],
    });
    words.resize(0x500 / 4, 0xf4f4_f4f4);
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fuzz_target!(|input: (&[u8], Base, Vec<(u8, u32)>)| {
    let (noise, base, changes) = input;
    check(noise);
    let mut image = sound(base);
    if changes.is_empty() {
        assert!(check(&image), "a sound image is refused");
    }
    for (word, value) in changes {
        let at = usize::from(word) * 4;
        image[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    check(&image);
});

/// Whether it is loaded by multiboot or PVH.
fn check(image: &[u8]) -> bool {
    paravirtual(image);
    let Ok(protocol) = protocol(&image) else {
        return false;
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
        return false;
    };
    let start = u64::from(entry.eip);
    assert!(start < MEMORY && !FIRMWARE.contains(&start));
    let info: u32 = memory.read(Gpa(entry.ebx.into())).expect("the boot data");
    assert_ne!(info, 0);
    true
}

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
