//! The image: a bzImage with code and descriptor tables in it.
//!
//! Setup header: Linux, Documentation/x86/boot.rst.

use super::{
    ENTRY, GDT, GDT_REGISTER, IDT, IDT_REGISTER, IMAGE_SIZE, LOAD, PRIVILEGED_STACK, SECOND_CODE,
    TABLES, TSS, selector,
};

/// One sector of setup code behind the boot sector.
const HEADER_SIZE: usize = 1024;

/// A bzImage that is entered at `code`.
pub(super) fn bzimage(code: &[u8], handlers: &[u64], second: &[u8]) -> Vec<u8> {
    let mut file = header();
    let mut image = vec![0; IMAGE_SIZE];
    let mut put = |address: u64, bytes: &[u8]| {
        let start = usize::try_from(address - LOAD).expect("inside the image");
        image[start..start + bytes.len()].copy_from_slice(bytes);
    };
    assert!(ENTRY + code.len() as u64 <= TABLES, "too much code");
    put(LOAD + ENTRY, code);
    for (handler, number) in handlers.iter().zip(0..) {
        put(IDT + number * 16, &gate(*handler));
    }
    for (descriptor, number) in gdt().iter().zip(0..) {
        put(GDT + number * 8, &descriptor.to_le_bytes());
    }
    put(TSS + 4, &PRIVILEGED_STACK.to_le_bytes());
    // No I/O permission map: it would start behind the segment's end.
    put(TSS + 102, &104_u16.to_le_bytes());
    put(IDT_REGISTER, &table_register(IDT, 4096));
    put(GDT_REGISTER, &table_register(GDT, 64));
    put(SECOND_CODE, second);
    file.extend(image);
    file
}

fn header() -> Vec<u8> {
    let mut header = vec![0; HEADER_SIZE];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    let size = u32::try_from(IMAGE_SIZE).expect("a small number");
    put(0x1f1, &[1]); // setup sectors
    put(0x1f4, &(size / 16).to_le_bytes());
    put(0x1fe, &[0x55, 0xaa]);
    put(0x200, &[0xeb, 0x6a]); // jump over the header
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes()); // protocol 2.15
    put(0x211, &[1]); // loaded high
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // highest initramfs address
    put(0x230, &0x20_0000_u32.to_le_bytes()); // alignment
    put(0x234, &[1]); // relocatable
    put(0x236, &1_u16.to_le_bytes()); // 64-bit entry point
    put(0x238, &2047_u32.to_le_bytes()); // command line
    put(0x258, &LOAD.to_le_bytes());
    put(0x260, &size.to_le_bytes());
    header
}

/// An interrupt gate that user mode may use, too.
fn gate(handler: u64) -> [u8; 16] {
    let [a, b, c, d, e, f, g, h] = handler.to_le_bytes();
    let [low, high] = selector::CODE.to_le_bytes();
    [a, b, low, high, 0, 0xee, c, d, e, f, g, h, 0, 0, 0, 0]
}

fn gdt() -> [u64; 8] {
    const TASK_LIMIT: u64 = 103;
    let low_base = TSS & 0xff_ffff;
    let high_base = TSS >> 24 & 0xff;
    [
        0,
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        TASK_LIMIT | low_base << 16 | 0x89 << 40 | high_base << 56,
        TSS >> 32,
    ]
}

fn table_register(base: u64, size: u16) -> [u8; 10] {
    let mut register = [0; 10];
    register[..2].copy_from_slice(&(size - 1).to_le_bytes());
    register[2..].copy_from_slice(&base.to_le_bytes());
    register
}
