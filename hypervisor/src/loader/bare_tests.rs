//! Loading multiboot and PVH images.

use super::tests::{MEMORY, memory, platform};
use super::*;
use crate::mem::sparse::SparseMemory;

const LOAD: u32 = 0x10_0000;

/// An ELF32 image of 256 bytes in the file and 8 KiB in memory, entered at its
/// byte 0xc0.
fn image(mark: [u32; 5], load: u32) -> Vec<u8> {
    let words =
        |words: &[u32]| -> Vec<u8> { words.iter().flat_map(|word| word.to_le_bytes()).collect() };
    let mut file = b"\x7fELF\x01\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2, 0, 3, 0]);
    file.extend(words(&[1, load + 0xc0, 52, 0, 0]));
    file.extend([52, 0, 32, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    file.extend(words(&[1, 0, load, load, 256, 0x2000, 7, 4096]));
    file.extend(words(&[4, 0x80, 0, 0, 20, 20, 4, 4]));
    file.resize(0x80, 0);
    file.extend(words(&mark));
    file.resize(256, 0xcc);
    file
}

fn multiboot(load: u32) -> Vec<u8> {
    image(
        [0x1bad_b002, 3, 0_u32.wrapping_sub(0x1bad_b005), 0, 0],
        load,
    )
}

fn pvh() -> Vec<u8> {
    let name = u32::from_le_bytes(*b"Xen\0");
    image([4, 4, 18, name, LOAD + 0xc4], LOAD)
}

fn load(memory: &SparseMemory, image: &[u8], module: &[u8]) -> Result<BareEntry, LoadError> {
    let module = Module {
        content: &module,
        words: b"its words",
    };
    let boot = BareBoot {
        platform: &platform(MEMORY),
        image: &image,
        modules: &[module],
        command_line: b"image words",
    };
    load_bare(memory, &boot)
}

fn word(memory: &SparseMemory, at: u64) -> u32 {
    memory.read(Gpa(at)).expect("inside of memory")
}

fn text(memory: &SparseMemory, at: u32) -> String {
    let byte = |offset: u64| memory.read::<u8>(Gpa(u64::from(at) + offset)).ok();
    let bytes = (0..).map_while(byte).take_while(|byte| *byte != 0);
    String::from_utf8(bytes.collect()).expect("text")
}

#[test]
fn a_multiboot_image_finds_what_it_was_given() {
    let memory = memory();
    let dirty = Gpa(u64::from(LOAD) + 0x1fff);
    memory.write_bytes(dirty, &[0xff; 2]).expect("RAM");
    let entry = load(&memory, &multiboot(LOAD), b"module").expect("sound");
    assert_eq!((entry.eip, entry.eax), (LOAD + 0xc0, 0x2bad_b002));
    assert_eq!(word(&memory, 0x10_00fc), 0xcccc_cccc);
    assert_eq!(word(&memory, dirty.0 - 3), 0, "what the file doesn't have");

    let info = |at: u64| word(&memory, u64::from(entry.ebx) + at);
    assert_eq!(info(0), 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9);
    let low_end = u32::try_from(MEMORY >> 10).expect("small");
    assert_eq!((info(4), info(8)), (639, low_end - 1024));
    assert_eq!(text(&memory, info(16)), "image words");
    assert_eq!(text(&memory, info(64)), "Viaduct");

    assert_eq!(info(20), 1);
    let module = |at: u64| word(&memory, u64::from(info(24)) + at);
    assert_eq!((module(0), module(4)), (0x10_2000, 0x10_2006));
    assert_eq!(text(&memory, module(0)), "module");
    assert_eq!(text(&memory, module(8)), "its words");

    let map = |at: u64| word(&memory, u64::from(info(48)) + at);
    assert_eq!((info(44) % 24, map(0), map(20)), (0, 20, 1));
    assert_eq!((map(4), map(12)), (0, 0x9_fc00));
}

#[test]
fn a_pvh_image_finds_what_it_was_given() {
    let memory = memory();
    let entry = load(&memory, &pvh(), b"module").expect("sound");
    assert_eq!((entry.eip, entry.eax), (LOAD + 0xc4, 0));
    let info = |at: u64| word(&memory, u64::from(entry.ebx) + at);
    assert_eq!((info(0), info(4), info(12)), (0x336e_c578, 1, 1));
    assert_eq!(text(&memory, info(24)), "image words");
    let module = |at: u64| word(&memory, u64::from(info(16)) + at);
    assert_eq!((module(0), module(8)), (0x10_2000, 6));
    assert_eq!(text(&memory, module(16)), "its words");
    let rsdp = u64::from(info(32));
    assert_eq!(word(&memory, rsdp), u32::from_le_bytes(*b"RSD "));
    let map = |at: u64| word(&memory, u64::from(info(40)) + at);
    assert_eq!((map(8), map(16)), (0x9_fc00, 1));
    assert!(info(48) >= 4);
}

#[test]
fn boot_data_give_way_to_the_image() {
    let memory = memory();
    let entry = load(&memory, &multiboot(0x9_c000), b"module").expect("sound");
    assert!(entry.ebx >= 0x10_0000, "{entry:x?}");
    assert_eq!(word(&memory, 0x9_c0fc), 0xcccc_cccc);
}

#[test]
fn images_in_the_wrong_place_are_refused() {
    let end = u32::try_from(MEMORY).expect("small");
    for place in [0xd_f000, 0xf_0000, end - 0x1000, end, 0xffff_0000 - 0x2000] {
        let refused = load(&memory(), &multiboot(place), b"");
        let start = Gpa(place.into());
        let end = Gpa(start.0 + 0x2000);
        let limit = MEMORY;
        assert_eq!(refused, Err(LoadError::Misplaced { start, end, limit }));
    }
    let large = vec![1; usize::try_from(MEMORY).expect("64-bit")];
    let refused = load(&memory(), &multiboot(LOAD), &large);
    assert!(matches!(refused, Err(LoadError::ModulesDoNotFit { .. })));
    assert_eq!(
        load(&memory(), &multiboot(LOAD)[..200], b""),
        Err(LoadError::Image(ImageError::Truncated {
            expected: 256,
            len: 200
        }))
    );
}
