//! Sound images, and broken ones.

use super::*;
use proptest::prelude::*;
use vmm_shared::addr::Gpa;

const LOAD: u64 = 0x40_0000;

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A segment as a 64-bit program header: type, offset, virtual and physical
/// address, bytes in the file and in memory.
fn segment(fields: [u64; 6]) -> Vec<u8> {
    let [kind, offset, virt, phys, file_len, len] = fields;
    [kind, offset, virt, phys, file_len, len, 4096]
        .iter()
        .flat_map(|field| field.to_le_bytes())
        .collect()
}

/// An ELF64 file with these program headers.
fn elf64(entry: u64, segments: &[[u64; 6]]) -> Vec<u8> {
    let mut file = vec![0; 0x1000];
    put(&mut file, 0, b"\x7fELF\x02\x01\x01");
    put(&mut file, 16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(&mut file, 24, &entry.to_le_bytes());
    put(&mut file, 32, &64_u64.to_le_bytes());
    put(&mut file, 52, &[64, 0, 56, 0]);
    let count = u16::try_from(segments.len()).expect("few");
    put(&mut file, 56, &count.to_le_bytes());
    let headers: Vec<u8> = segments
        .iter()
        .flat_map(|fields| segment(*fields))
        .collect();
    put(&mut file, 64, &headers);
    file
}

fn with_multiboot(mut file: Vec<u8>, flags: u32) -> Vec<u8> {
    let magic = 0x1bad_b002_u32;
    let checksum = magic.wrapping_add(flags).wrapping_neg();
    for (at, word) in [magic, flags, checksum].into_iter().enumerate() {
        put(&mut file, 0x800 + at * 4, &word.to_le_bytes());
    }
    file
}

const CODE: [u64; 6] = [1, 0x800, LOAD, LOAD, 0x100, 0x300];

fn multiboot() -> Vec<u8> {
    with_multiboot(elf64(LOAD + 0x20, &[CODE]), 3)
}

fn pvh() -> Vec<u8> {
    let note = [4, 0xc00, 0, 0, 20, 20];
    let mut file = elf64(0xffff_ffff_8100_0000, &[CODE, note]);
    put(&mut file, 0xc00, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(&mut file, 0xc0c, b"Xen\0");
    put(&mut file, 0xc10, &0x40_0040_u32.to_le_bytes());
    file
}

fn read(file: &[u8]) -> Result<Image, ImageError> {
    Image::read(&file)
}

/// A multiboot image with one thing changed.
fn changed(at: usize, bytes: &[u8]) -> Result<Image, ImageError> {
    let mut file = multiboot();
    put(&mut file, at, bytes);
    read(&file)
}

#[test]
fn a_multiboot_image_is_recognised() {
    let image = read(&multiboot()).expect("sound");
    assert_eq!(
        (image.protocol, image.entry),
        (Protocol::Multiboot, 0x40_0020)
    );
    let [segment] = image.segments() else {
        panic!("{image:?}")
    };
    assert_eq!((segment.gpa, segment.end()), (Gpa(LOAD), Gpa(LOAD + 0x300)));
    assert_eq!((segment.file_offset, segment.file_len), (0x800, 0x100));
}

#[test]
fn a_multiboot_image_linked_elsewhere_starts_where_it_is_loaded() {
    let high = 0xffff_ffff_8000_0000;
    let code = [1, 0x800, high, LOAD, 0x100, 0x300];
    let image = read(&with_multiboot(elf64(high + 0x20, &[code]), 0)).expect("sound");
    assert_eq!(image.entry, 0x40_0020);
}

#[test]
fn a_32_bit_image_is_recognised() {
    let mut file = vec![0; 0x1000];
    put(&mut file, 0, b"\x7fELF\x01\x01\x01");
    put(&mut file, 16, &[2, 0, 3, 0, 1, 0, 0, 0]);
    put(&mut file, 24, &0x40_0010_u32.to_le_bytes());
    put(&mut file, 28, &52_u32.to_le_bytes());
    put(&mut file, 40, &[52, 0, 32, 0, 1, 0]);
    let header = [1, 0x900, 0x40_0000, 0x40_0000, 0x80, 0x90, 5, 4096_u32];
    for (at, word) in header.into_iter().enumerate() {
        put(&mut file, 52 + at * 4, &word.to_le_bytes());
    }
    let image = read(&with_multiboot(file, 0)).expect("sound");
    assert_eq!((image.entry, image.end()), (0x40_0010, Gpa(0x40_0090)));
}

#[test]
fn a_pvh_image_starts_where_its_note_says() {
    let image = read(&pvh()).expect("sound");
    assert_eq!((image.protocol, image.entry), (Protocol::Pvh, 0x40_0040));
    let mut other = pvh();
    put(&mut other, 0xc0c, b"Xem\0");
    assert_eq!(read(&other), Err(ImageError::NoEntry));
}

#[test]
fn a_paravirtual_image_is_one_only_if_asked_for() {
    let high = 0xffff_ffff_8000_0000;
    let code = [1, 0x800, high, LOAD, 0x100, 0x300];
    let file = elf64(LOAD + 0x20, &[code]);
    assert_eq!(read(&file), Err(ImageError::NoEntry));
    let image = Image::read_paravirtual(&&file[..]).expect("sound");
    assert_eq!(
        (image.protocol, u64::from(image.entry)),
        (Protocol::Paravirtual, LOAD + 0x20)
    );
    let elsewhere = elf64(high, &[code]);
    assert_eq!(
        Image::read_paravirtual(&&elsewhere[..]),
        Err(ImageError::EntryOutside { entry: high })
    );
    let mut narrow = file;
    narrow[4] = 1;
    assert!(Image::read_paravirtual(&&narrow[..]).is_err());
    assert_eq!(Image::read_paravirtual(&&b""[..]), Err(ImageError::Unknown));
}

#[test]
fn a_bzimage_is_recognised_by_its_marks() {
    let mut file = vec![0; 0x300];
    put(&mut file, 0x1fe, &[0x55, 0xaa]);
    put(&mut file, 0x202, b"HdrS");
    assert_eq!(protocol(&&file[..]), Ok(Protocol::Linux));
    assert_eq!(protocol(&&file[..0x205]), Err(ImageError::Unknown));
}

#[test]
fn broken_images_are_refused_with_their_reason() {
    assert_eq!(read(&[]), Err(ImageError::Unknown));
    assert_eq!(read(b"#!/bin/sh"), Err(ImageError::Unknown));
    assert_eq!(read(&multiboot()[..10]), Err(ImageError::Unknown));
    assert_eq!(
        read(&with_multiboot(vec![0; 0x1000], 0)),
        Err(ImageError::NotElf)
    );
    assert_eq!(read(&elf64(LOAD, &[CODE])), Err(ImageError::NoEntry));
    assert_eq!(
        read(&with_multiboot(elf64(LOAD, &[]), 0)),
        Err(ImageError::NoSegments)
    );
    let machine = 183;
    assert_eq!(
        changed(18, &[183]),
        Err(ImageError::WrongMachine { machine })
    );
    assert_eq!(changed(16, &[3]), Err(ImageError::NotAProgram { kind: 3 }));
    assert_eq!(changed(5, &[2]), Err(ImageError::BadHeader));
    assert_eq!(changed(4, &[7]), Err(ImageError::BadHeader));
    assert_eq!(changed(54, &[55]), Err(ImageError::BadHeader));
    let count = 0xffff;
    assert_eq!(
        changed(56, &[0xff, 0xff]),
        Err(ImageError::TooManySegments { count })
    );
    assert!(matches!(
        changed(32, &[0xff; 8]),
        Err(ImageError::Truncated { .. })
    ));
    assert!(matches!(
        changed(72, &[0xff; 8]),
        Err(ImageError::Truncated { .. })
    ));
    assert_eq!(
        changed(104, &[0x10, 0]),
        Err(ImageError::SegmentShrinks { at: LOAD })
    );
    assert!(matches!(
        changed(88, &[0xff; 8]),
        Err(ImageError::SegmentTooHigh { .. })
    ));
    assert!(matches!(
        changed(104, &[0xff; 8]),
        Err(ImageError::SegmentTooHigh { .. })
    ));
    assert_eq!(
        changed(24, &(LOAD + 0x300).to_le_bytes()),
        Err(ImageError::EntryOutside {
            entry: LOAD + 0x300
        })
    );
    let twice = [CODE, [1, 0x800, 0, LOAD + 0x2ff, 1, 1]];
    assert_eq!(
        read(&with_multiboot(elf64(LOAD, &twice), 0)),
        Err(ImageError::SegmentsOverlap { at: LOAD + 0x2ff })
    );
    let many: Vec<_> = (0..17).map(|n| [1, 0, 0, n * 0x1000, 1, 1]).collect();
    assert!(matches!(
        read(&with_multiboot(elf64(0, &many), 0)),
        Err(ImageError::TooManySegments { .. })
    ));
}

#[test]
fn demands_that_cannot_be_met_are_refused() {
    for (flags, legal) in [
        (0, true),
        (3, true),
        (1 << 16, true),
        (4, false),
        (8, false),
    ] {
        let image = read(&with_multiboot(elf64(LOAD, &[CODE]), flags));
        let expected = if legal {
            None
        } else {
            Some(ImageError::UnknownDemand { flags })
        };
        assert_eq!(image.err(), expected, "{flags:#x}");
    }
}

#[test]
fn every_reason_is_one_line() {
    let mut file = multiboot();
    for at in 0..0xa0 {
        for value in [0, 1, 0x7f, 0xff] {
            let before = std::mem::replace(&mut file[at], value);
            if let Err(why) = read(&file) {
                assert_eq!(why.to_string().lines().count(), 1);
            }
            file[at] = before;
        }
    }
}

proptest! {
    /// Whatever the bytes are: an answer, and one that holds together.
    #[test]
    fn accepted_images_hold_together(
        changes in prop::collection::vec((0_usize..0xd0, any::<u8>()), 0..12),
        base in prop::sample::select(vec![multiboot(), pvh()]),
        len in 0_usize..=0x1000,
    ) {
        let mut file = base;
        for (at, value) in changes {
            file[at] = value;
        }
        file.truncate(len.max(0x400));
        let images = [read(&file), Image::read_paravirtual(&&file[..])];
        for image in images.into_iter().flatten() {
            let inside = |segment: &Segment| {
                let range = segment.gpa.0..segment.end().0;
                range.contains(&u64::from(image.entry))
            };
            prop_assert!(image.segments().iter().any(inside));
            for (number, segment) in image.segments().iter().enumerate() {
                prop_assert!(segment.end() <= Gpa(1 << 32) && segment.len > 0);
                prop_assert!(segment.file_len <= segment.len);
                prop_assert!(segment.file_offset + segment.file_len <= file.len() as u64);
                let range = segment.gpa..segment.end();
                let others = &image.segments()[number + 1..];
                prop_assert!(!others.iter().any(|other| other.overlaps(&range)));
            }
        }
    }
}
